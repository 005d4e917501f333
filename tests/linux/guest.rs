//! A Linux guest, its console, and what its init tells there.
#![allow(dead_code)]

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant, SystemTime};

use crate::common;

/// How long a guest may take for anything, on a host that is not itself emulated.
const PATIENCE: f64 = 30.0;

/// A kernel of the folder; none where there is no such folder, or no KVM that can run it, and says so.
pub fn kernel(name: &str) -> Option<PathBuf> {
    if !common::kvm() {
        return None;
    }
    let Some(folder) = std::env::var_os("BANTAM_KERNELS").map(PathBuf::from) else {
        common::skipped("BANTAM_KERNELS names no folder of kernels");
        return None;
    };
    if !common::arch::runs_linux() {
        common::skipped("this host's KVM emulates instructions, and not all that Linux needs");
        return None;
    }
    let kernel = folder.join(name);
    assert!(kernel.exists(), "{} is missing", kernel.display());
    Some(kernel)
}

/// Starts a kernel of the folder.
pub fn linux(name: &str, words: &str, cmdline: &str) -> Option<Guest> {
    let kernel = kernel(name)?;
    let initrd = kernel.parent()?.parent()?.join("initrd.img");
    Some(Guest::start(&kernel, &initrd, words, cmdline))
}

/// What may be in the kernel's messages: where, which text, and why.
pub fn allowed() -> Vec<(&'static str, &'static str, &'static str)> {
    let lines = include_str!("dmesg-allowed.txt").lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let parts = |line: &'static str| {
        let mut parts = line.splitn(3, " | ").map(str::trim);
        (parts.next().unwrap(), parts.next().unwrap_or(""), parts.next().unwrap_or(""))
    };
    lines.map(parts).collect()
}

/// Tells whoever runs the tests; the harness keeps what a test that passes prints.
pub fn note(text: &str) {
    let _ = std::io::stderr().write_all(format!("-- linux: {text}\n").as_bytes());
}

/// fio and iperf3, the same for a guest and beside it: the words of a disk that has them, which [`TOOLS`] takes from it.
/// None where nobody has brought them.
pub fn tools() -> Option<String> {
    let Some(archive) = std::env::var_os("BANTAM_TOOLS").map(PathBuf::from) else {
        common::skipped("only `cargo xtask bench io --host ARCH` brings fio and iperf3 along");
        return None;
    };
    let have = format!("[ -e /tools ] || {{ mkdir /tools && tar xf {} -C /tools; }}", archive.display());
    let had = Command::new("busybox").args(["sh", "-c", &have]).status().unwrap();
    assert!(had.success());
    Some(format!("--disk {},ro", archive.display()))
}

/// What a guest does to have them, of its last disk.
pub const TOOLS: &str = "mkdir /tools && tar xf $(ls /dev/vd? | tail -n 1) -C /tools";

/// Shows a guest's speed beside that of its host: bytes a second, as both print them.
pub fn beside(what: &str, own: &str, guests: &str) {
    let rate =
        |text: &str| text.trim().parse::<f64>().unwrap_or_else(|_| panic!("{what}: {text:?}")) / f64::from(1 << 20);
    let (own, guests) = (rate(own), rate(guests));
    note(&format!("beside | {what} | {own:.0} | {guests:.0} | {:.2} |", guests / own));
}

/// A guest that runs.
pub struct Guest {
    child: Child,
    keys: ChildStdin,
    start: Instant,
    /// When it last did what was waited for.
    alive: Instant,
    console: Receiver<(SystemTime, Vec<u8>)>,
    errors: Option<std::thread::JoinHandle<Vec<u8>>>,
    shown: Shown,
    /// Up to where the text was looked at.
    seen: usize,
}

/// What a console has shown, and when each part came.
#[derive(Default)]
struct Shown {
    text: String,
    came: Vec<(usize, SystemTime)>,
}

impl Shown {
    fn take(&mut self, time: SystemTime, bytes: &[u8]) {
        self.came.push((self.text.len(), time));
        self.text += &String::from_utf8_lossy(bytes).replace('\r', "");
    }

    fn when(&self, at: usize) -> SystemTime {
        let later = self.came.partition_point(|(start, _)| *start <= at);
        self.came[later - 1].1
    }
}

impl Guest {
    fn start(kernel: &Path, initrd: &Path, words: &str, cmdline: &str) -> Self {
        let mut command = Command::new(common::program());
        command.arg("run").arg(kernel).arg("--initrd").arg(initrd).args(words.split_whitespace());
        command.args(["--cmdline", cmdline]);
        Self::spawn(command)
    }

    /// Goes on where a snapshot was written.
    pub fn restore(folder: &Path, verify: &str) -> Self {
        let mut command = Command::new(common::program());
        command.args(["restore", "--verify", verify]).arg(folder);
        Self::spawn(command)
    }

    fn spawn(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let (start, mut child) = (Instant::now(), command.spawn().unwrap());
        let (keys, mut out) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut err = child.stderr.take().unwrap();
        let (sender, console) = channel();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = out.read(&mut bytes) {
                if sender.send((SystemTime::now(), bytes[..count].to_vec())).is_err() {
                    break;
                }
            }
        });
        let errors = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = err.read_to_end(&mut bytes);
            bytes
        });
        Self { child, keys, start, console, errors: Some(errors), shown: Shown::default(), seen: 0, alive: start }
    }

    /// Waits for more of the console; false: it has ended.
    fn more(&mut self) -> bool {
        let left = common::within(PATIENCE).saturating_sub(self.alive.elapsed());
        match self.console.recv_timeout(left) {
            Ok((time, bytes)) => self.shown.take(time, &bytes),
            Err(RecvTimeoutError::Disconnected) => return false,
            Err(RecvTimeoutError::Timeout) => {
                panic!("still running after {:?}", self.start.elapsed());
            }
        }
        true
    }

    /// Waits until the console shows `text` once more.
    pub fn until(&mut self, text: &str) -> &mut Self {
        loop {
            if let Some(at) = self.shown.text[self.seen..].find(text) {
                self.seen += at + text.len();
                self.alive = Instant::now();
                return self;
            }
            if !self.more() {
                panic!("{text:?} never came; the guest has ended ({:?})", self.child.wait());
            }
        }
    }

    /// The line that was last waited for, whole.
    pub fn line(&mut self) -> String {
        while !self.shown.text[self.seen..].contains('\n') && self.more() {}
        let start = self.shown.text[..self.seen].rfind('\n').map_or(0, |at| at + 1);
        self.shown.text[start..].lines().next().unwrap_or_default().to_owned()
    }

    /// All that the console has shown.
    pub fn text(&self) -> &str {
        &self.shown.text
    }

    /// Types.
    pub fn keys(&mut self, text: &str) {
        self.keys.write_all(text.as_bytes()).unwrap();
    }

    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Of the monitor.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How many threads and descriptors the monitor has, and KiB of memory that are its own.
    pub fn footprint(&self) -> ((usize, usize), u64) {
        let folder = PathBuf::from(format!("/proc/{}", self.child.id()));
        let count = |name: &str| std::fs::read_dir(folder.join(name)).unwrap().count();
        let status = std::fs::read_to_string(folder.join("status")).unwrap();
        let own = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        ((count("task"), count("fd")), own.trim().trim_end_matches(" kB").parse().unwrap())
    }

    /// Waits for the end of the machine.
    pub fn end(mut self) -> Told {
        while self.more() {}
        let status = self.child.wait().unwrap();
        use std::os::unix::process::ExitStatusExt;
        let status = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
        let stderr = String::from_utf8_lossy(&self.errors.take().unwrap().join().unwrap()).into_owned();
        let Shown { text, came } = std::mem::take(&mut self.shown);
        Told { status, stderr, took: self.start.elapsed(), text, came }
    }
}

/// A test that fails shows what its guests showed, and leaves none behind.
impl Drop for Guest {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.console.try_iter().for_each(|(time, bytes)| self.shown.take(time, &bytes));
            note(&format!("a guest ran for {:?} and showed:\n{}", self.start.elapsed(), self.shown.text));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a guest that has ended left behind.
pub struct Told {
    pub status: i32,
    pub stderr: String,
    pub took: Duration,
    /// All that the console has shown.
    pub text: String,
    came: Vec<(usize, SystemTime)>,
}

impl Told {
    #[track_caller]
    pub fn expect(&self, status: i32) -> &Self {
        assert_eq!(self.status, status, "console:\n{}\nstderr:\n{}", self.text, self.stderr);
        self
    }

    /// The lines `check WHAT: RESULT` of a thing: where each result begins, and the result.
    fn checks(&self, what: &str) -> Vec<(usize, &str)> {
        let name = if what == "done" { "check done".to_owned() } else { format!("check {what}: ") };
        let found = self.text.match_indices(&name).map(|(at, _)| at + name.len());
        found.map(|at| (at, self.text[at..].lines().next().unwrap_or_default())).collect()
    }

    /// The result of a check.
    #[track_caller]
    pub fn value(&self, what: &str) -> &str {
        let checks = self.checks(what);
        let [(_, value)] = checks.as_slice() else {
            panic!("{} results of {what:?} in:\n{}\nstderr:\n{}", checks.len(), self.text, self.stderr);
        };
        value
    }

    #[track_caller]
    pub fn is(&self, what: &str, value: &str) -> &Self {
        assert_eq!(self.value(what), value, "{what}, in:\n{}", self.text);
        self
    }

    /// How much a clock of the guest, whose seconds are the last word of its check, differed from the host's when its
    /// line came. A clock that counts whole seconds is late by half of one.
    pub fn clock_off(&self, what: &str) -> Duration {
        let shown = Shown { text: String::new(), came: self.came.clone() };
        let (at, value) = *self.checks(what).last().unwrap();
        let guest: u64 = value.split_whitespace().last().unwrap().parse().unwrap();
        let host = shown.when(at).duration_since(SystemTime::UNIX_EPOCH).unwrap();
        host.abs_diff(Duration::from_secs(guest) + Duration::from_millis(500))
    }

    /// Errors and warnings of the kernel that are not allowed.
    pub fn complaints(&self) -> Vec<&str> {
        let rules = allowed();
        let here = if cfg!(target_arch = "x86_64") { "x86_64" } else { "arm64" };
        let holds = |place: &str| place == "any" || place == here || (place == "tcg" && common::host_is_emulated());
        let fine = |line: &str| rules.iter().any(|(place, text, _)| holds(place) && line.contains(text));
        self.checks("dmesg").into_iter().map(|(_, line)| line).filter(|line| !fine(line)).collect()
    }
}
