//! Whole-VM tests as prose: run the real `bantam` and look at what a person or a script would see.
//!
//! A test that needs something which is not there says so on stderr and in the file that `BANTAM_SKIP_LOG` names, one
//! line each; with `BANTAM_REQUIRE_KVM=1` a missing `/dev/kvm` is a failure.

#![allow(
    dead_code,
    unused_imports,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    missing_docs
)]

#[cfg_attr(target_arch = "aarch64", path = "aarch64.rs")]
#[cfg_attr(target_arch = "x86_64", path = "x86_64.rs")]
pub mod arch;
pub mod counting;
pub mod place;
pub use arch::code;

use std::ffi::OsString;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long anything may take before the test gives up on it, in seconds on a host that is not itself emulated.
const PATIENCE: f64 = 60.0;

/// The program under test.
pub fn program() -> PathBuf {
    std::env::var_os("BANTAM_BIN").map_or_else(|| env!("CARGO_BIN_EXE_bantam").into(), PathBuf::from)
}

/// Copies the program under test. By another process: one that a test beside this one starts meanwhile would have our file open
/// to write, and nobody can run such a file (ETXTBSY).
pub fn copy_program(to: &Path) {
    assert!(Command::new("cp").arg(program()).arg(to).status().unwrap().success());
}

/// How long something may take that takes no more than `seconds` on a host that is not itself emulated.
pub fn within(seconds: f64) -> Duration {
    Duration::from_secs_f64(if host_is_emulated() { 5.0 * seconds } else { seconds })
}

/// What a soak asks for: the number of its first case, and of cases.
pub fn soak() -> Option<(u64, u64)> {
    let number = |name| std::env::var(name).ok()?.parse().ok();
    number("BANTAM_SOAK_SEED").zip(number("BANTAM_SOAK_COUNT"))
}

/// This host is one that `cargo xtask test` made, of QEMU without hardware's help.
pub fn host_is_emulated() -> bool {
    std::env::var_os("BANTAM_HOST_IS_TCG").is_some()
}

/// What a run left behind.
#[derive(Debug)]
pub struct Outcome {
    pub status: i32,
    pub stdout: Vec<u8>,
    pub stderr: String,
    pub took: Duration,
}

impl Outcome {
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// The status is `status`, and stderr is not a panic's.
    #[track_caller]
    pub fn expect(&self, status: i32) -> &Self {
        assert_eq!(self.status, status, "stdout: {:?}\nstderr: {}", self.out(), self.stderr);
        assert!(!self.stderr.contains("bug in Bantam") || status == 101, "{}", self.stderr);
        self
    }

    /// Stdout is exactly `text`.
    #[track_caller]
    pub fn printed(&self, text: &str) -> &Self {
        assert_eq!(self.out(), text, "stderr: {}", self.stderr);
        self
    }

    /// Stderr contains `text`.
    #[track_caller]
    pub fn said(&self, text: &str) -> &Self {
        assert!(self.stderr.contains(text), "{text:?} is not in: {}", self.stderr);
        self
    }

    /// Stderr does not contain `text`.
    #[track_caller]
    pub fn never_said(&self, text: &str) -> &Self {
        assert!(!self.stderr.contains(text), "{text:?} is in: {}", self.stderr);
        self
    }

    /// Stderr is empty.
    #[track_caller]
    pub fn said_nothing(&self) -> &Self {
        assert_eq!(self.stderr, "");
        self
    }

    /// An error in the contract's form: `bantam: what: why`, at most a hint after it, nothing on stdout.
    #[track_caller]
    pub fn refused(&self, status: i32) -> &Self {
        self.expect(status).printed("");
        let lines: Vec<_> = self.stderr.lines().collect();
        let form = match lines.as_slice() {
            [line] => line.starts_with("bantam: "),
            [line, hint] => line.starts_with("bantam: ") && hint.starts_with("hint: "),
            _ => false,
        };
        assert!(form, "not the form of an error: {}", self.stderr);
        self
    }

    /// The same, where warnings come first.
    #[track_caller]
    pub fn refused_after_warnings(&self, status: i32) -> &Self {
        self.expect(status).printed("");
        let errors: Vec<_> = self.stderr.lines().filter(|l| !l.starts_with("bantam: warning: ")).collect();
        assert!(errors.first().is_some_and(|l| l.starts_with("bantam: ")) && errors.len() <= 2, "{}", self.stderr);
        self
    }

    /// The lines of the trace, without their numbers, times and places.
    pub fn trace(&self) -> Vec<String> {
        let exit = |l: &str| l.split_once("  at ").map_or(l.to_owned(), |(exit, _)| exit.to_owned());
        let line = |l: &str| l.split_once(" cpu").and_then(|(_, l)| l.split_once(' ')).map(|(_, l)| exit(l));
        self.stderr.lines().filter_map(line).collect()
    }
}

/// A run to be.
pub struct Run {
    command: Command,
    input: Vec<u8>,
    hold_stdin: bool,
    patience: Duration,
}

/// `bantam` with words separated by spaces.
pub fn bantam(words: &str) -> Run {
    Run::of(&program(), words.split_whitespace().map(OsString::from))
}

/// `bantam run` of the guest `bytes`, kept in a file for the while.
pub struct File(pub tempfile::TempPath);

impl File {
    pub fn path(&self) -> &Path {
        &self.0
    }
}

pub fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    File(file.into_temp_path())
}

/// Runs guest bytes with these words.
pub fn run_bytes(bytes: &[u8], words: &str) -> Outcome {
    let guest = file(bytes);
    bantam("run").arg(guest.path()).words(words).run()
}

impl Run {
    pub fn of(program: &Path, words: impl IntoIterator<Item = OsString>) -> Self {
        let mut command = Command::new(program);
        command.args(words).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self { command, input: Vec::new(), hold_stdin: false, patience: within(PATIENCE) }
    }

    pub fn arg(mut self, word: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.arg(word);
        self
    }

    pub fn words(mut self, words: &str) -> Self {
        self.command.args(words.split_whitespace());
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// What stdin gives, and then its end.
    pub fn input(mut self, bytes: &[u8]) -> Self {
        self.input = bytes.to_vec();
        self.command.stdin(Stdio::piped());
        self
    }

    /// Stdin stays open and silent.
    pub fn silent_stdin(mut self) -> Self {
        self.hold_stdin = true;
        self.command.stdin(Stdio::piped());
        self
    }

    /// It may take ten times as long as others.
    pub fn patient(mut self) -> Self {
        self.patience *= 10;
        self
    }

    pub fn command(&mut self) -> &mut Command {
        &mut self.command
    }

    pub fn start(mut self) -> Started {
        let start = Instant::now();
        let mut child = self.command.spawn().unwrap_or_else(|e| panic!("{:?}: {e}", self.command));
        let mut stdin = child.stdin.take();
        let held = if self.hold_stdin { stdin.take() } else { None };
        let input = std::mem::take(&mut self.input);
        let feeder = std::thread::spawn(move || stdin.map(|mut s| s.write_all(&input).is_ok()));
        let out = reader(child.stdout.take());
        let err = reader(child.stderr.take());
        Started { child, start, patience: self.patience, held, feeder: Some(feeder), out, err }
    }

    pub fn run(self) -> Outcome {
        self.start().wait()
    }
}

type Reader = Option<std::thread::JoinHandle<Vec<u8>>>;

fn reader(from: Option<impl Read + Send + 'static>) -> Reader {
    from.map(|mut from| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = from.read_to_end(&mut bytes);
            bytes
        })
    })
}

/// A run that is on.
pub struct Started {
    pub child: Child,
    start: Instant,
    patience: Duration,
    held: Option<std::process::ChildStdin>,
    feeder: Option<std::thread::JoinHandle<Option<bool>>>,
    out: Reader,
    err: Reader,
}

impl Started {
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Waits until the first CPU runs.
    pub fn up(&self) -> &Self {
        let tasks = || std::fs::read_dir(format!("/proc/{}/task", self.pid())).into_iter().flatten().flatten();
        let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        while !tasks().any(|task| name(task) == "vcpu0\n") && self.start.elapsed() < self.patience {
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(50));
        self
    }

    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").arg(format!("-{name}")).arg(self.pid().to_string()).status().unwrap();
        assert!(status.success());
    }

    /// A number of `/proc/PID/status`, in the unit that it has there.
    pub fn proc_status(&self, field: &str) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = text.lines().find(|l| l.starts_with(field)).unwrap_or_else(|| panic!("no {field} in {text}"));
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    pub fn wait(mut self) -> Outcome {
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None if self.start.elapsed() > self.patience => {
                    let tasks: String = self.family().into_iter().map(tasks).collect();
                    // Who traces another would leave it behind, with our pipes.
                    for pid in self.family().into_iter().skip(1) {
                        let _ = Command::new("kill").arg("-9").arg(pid.to_string()).status();
                    }
                    let _ = self.child.kill();
                    let _ = self.child.wait();
                    let patience = self.patience;
                    panic!("still running after {patience:?}: {}\n{tasks}", self.collect(-1).stderr);
                }
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        use std::os::unix::process::ExitStatusExt;
        let status = status.code().unwrap_or_else(|| -status.signal().unwrap_or(0));
        self.collect(status)
    }

    /// The process, and those that it started.
    fn family(&self) -> Vec<i32> {
        let mut all = vec![self.pid()];
        let mut at = 0;
        while let Some(pid) = all.get(at) {
            let path = format!("/proc/{pid}/task/{pid}/children");
            let children = std::fs::read_to_string(path).unwrap_or_default();
            all.extend(children.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok()));
            at += 1;
        }
        all
    }

    fn collect(&mut self, status: i32) -> Outcome {
        let took = self.start.elapsed();
        drop(self.held.take());
        let get = |reader: &mut Reader| reader.take().map_or_else(Vec::new, |r| r.join().unwrap());
        let (stdout, stderr) = (get(&mut self.out), get(&mut self.err));
        drop(self.feeder.take());
        Outcome { status, stdout, stderr: String::from_utf8_lossy(&stderr).into_owned(), took }
    }
}

/// Where each thread of a process is, as far as the kernel tells.
fn tasks(pid: i32) -> String {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let tell = |task: std::fs::DirEntry| {
        let read = |name: &str| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let status = read("status");
        let fields = ["State", "SigPnd", "ShdPnd", "SigBlk"];
        let state: Vec<_> = status.lines().filter(|l| fields.iter().any(|field| l.starts_with(field))).collect();
        format!("{}{}\nsyscall {}{}\n", read("comm"), state.join(", "), read("syscall"), read("stack"))
    };
    tasks.map(tell).collect()
}

/// Says loudly that the calling test does not run.
pub fn skipped(why: &str) {
    let name = std::thread::current().name().unwrap_or("a test").to_owned();
    let line = format!("SKIPPED: {name}: {why}\n");
    // Not eprint: the harness would swallow it.
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os("BANTAM_SKIP_LOG")
        && let Ok(mut log) = std::fs::OpenOptions::new().create(true).append(true).open(path)
    {
        let _ = log.write_all(line.as_bytes());
    }
}

/// Whether `/dev/kvm` is there; where it must be and is not, the test fails.
pub fn kvm() -> bool {
    let there = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    if !there {
        assert!(std::env::var_os("BANTAM_REQUIRE_KVM").is_none_or(|v| v != "1"), "/dev/kvm is required and not usable");
        skipped("/dev/kvm is not usable");
    }
    there
}

/// Whether a program is there; busybox's, which knows few of the options, is not it.
pub fn have(name: &str) -> bool {
    let real = |dir: PathBuf| {
        let program = dir.join(name).canonicalize().ok();
        program.is_some_and(|p| p.file_name().is_some_and(|name| name != "busybox"))
    };
    let found = std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(real));
    if !found {
        skipped(&format!("the program {name} is not installed"));
    }
    found
}

/// Whether this runs as root.
pub fn root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        skipped("not root");
    }
    root
}
