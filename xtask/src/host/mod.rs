//! `cargo xtask host`: a test host, made on the spot: QEMU (TCG) running an unmodified Debian kernel with `/dev/kvm`.
//!
//! Invariant: what the command in the host prints is all that comes out on stdout and stderr of a run that went well.
//! The host's own messages are kept aside, and shown when it came to a bad end.

pub mod initramfs;
pub mod packages;
mod qemu;

use std::fs;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};

use crate::arch::Arch;
use crate::cross;
use packages::{HOSTS, Set};
use qemu::{Host, Port, Trouble, Unpacker};

/// Words of `cargo xtask host`.
#[derive(clap::Args)]
pub struct Words {
    /// The host's architecture
    arch: Arch,
    /// Put this file into the host, as /files/NAME (repeatable)
    #[arg(long, value_name = "PATH")]
    file: Vec<PathBuf>,
    /// Bring the host's folder /out back into this one
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Give up after so many seconds; 0: never [default: 600; 0 for a shell]
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// The host's memory, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 2048)]
    memory: u32,
    /// The host's number of CPUs [default: 1 on x86-64, where more end in a panic of its kernel after a minute; 2 on arm64]
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// Neither build bantam nor put it into the host
    #[arg(long)]
    no_bantam: bool,
    /// What to run [default: a shell on this terminal]
    #[arg(last = true)]
    command: Vec<String>,
}

/// Something to do in a host.
pub struct Job {
    /// The command and its words; none: a shell on this terminal.
    pub command: Vec<String>,
    /// Files: the name in the host, without the first `/`, and the file here.
    pub files: Vec<(String, PathBuf)>,
    /// Where the host's /out goes.
    pub out: Option<PathBuf>,
    /// How long it may take.
    pub timeout: Option<Duration>,
    /// MiB of memory.
    pub memory: u32,
    /// CPUs.
    pub cpus: u32,
}

/// Runs the command.
pub fn run(words: &Words) -> Result<ExitCode> {
    let mut files = Vec::new();
    for path in &words.file {
        let name = path.file_name().with_context(|| format!("--file {}: not a file", path.display()))?;
        files.push((format!("files/{}", name.to_string_lossy()), std::path::absolute(path)?));
    }
    if !words.no_bantam {
        files.push(("usr/bin/bantam".into(), cross::bantam(words.arch)?));
    }
    let default = if words.command.is_empty() { 0 } else { 600 };
    let seconds = words.timeout.unwrap_or(default);
    let job = Job {
        command: words.command.clone(),
        files,
        out: words.out.as_ref().map(std::path::absolute).transpose()?,
        timeout: (seconds > 0).then(|| Duration::from_secs(seconds)),
        memory: words.memory,
        cpus: words.cpus.unwrap_or(words.arch.host_cpus()),
    };
    let show = |bytes: &[u8]| {
        let mut stdout = std::io::stdout().lock();
        Ok(stdout.write_all(bytes).and_then(|()| stdout.flush())?)
    };
    Ok(match enter(words.arch, &job, show)? {
        Ok(status) => ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)),
        Err(trouble) => {
            eprintln!("xtask: {}", describe(&trouble, words.arch, job.timeout));
            ExitCode::from(if matches!(trouble, Trouble::Timeout(true)) { 124 } else { 125 })
        }
    })
}

/// How time passes in a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// As it does here; every CPU of the host has a thread here.
    Real,
    /// A nanosecond an instruction, whatever else runs here, and a wait takes none: what is measured repeats. The host
    /// must have one CPU.
    Instructions,
}

/// Held by who builds or fetches what a host runs or is made of: there is one of each folder, and two builds at once only
/// wait for each other.
pub fn preparing() -> MutexGuard<'static, ()> {
    static PREPARING: Mutex<()> = Mutex::new(());
    PREPARING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Does a job in a host: gives the command's exit status, or how the host failed. The command's stdout goes to `show`,
/// its stderr to ours.
pub fn enter(
    arch: Arch,
    job: &Job,
    show: impl FnMut(&[u8]) -> Result<()>,
) -> Result<std::result::Result<i32, Trouble>> {
    enter_by(Clock::Real, arch, job, show)
}

/// As [`enter`], with time as it is to be.
pub fn enter_by(
    clock: Clock,
    arch: Arch,
    job: &Job,
    mut show: impl FnMut(&[u8]) -> Result<()>,
) -> Result<std::result::Result<i32, Trouble>> {
    let preparing = preparing();
    let tools = tools()?;
    let base = initramfs::base(arch, &tools)?;
    drop(preparing);
    let run = RunFolder::new()?;
    let mark = mark();
    let archive = run.0.join("initramfs.cpio");
    initramfs::write(&base, &extra(arch, job, &mark), &archive)?;
    let mut command = command(arch, job, &tools, &run.0)?;
    command.args(accelerator(clock));
    command.arg("-kernel").arg(&base.kernel).arg("-initrd").arg(&archive);
    if job.command.is_empty() {
        return shell(command).map(Ok);
    }
    let mut files = job.out.as_deref().map(Unpacker::new).transpose()?;
    let mut host = Host::start(command, &run.0, &mark)?;
    if clock == Clock::Instructions {
        // Its 5 s may be minutes here.
        host.patience = host.patience.saturating_mul(5);
    }
    let limit = job.timeout.unwrap_or(Duration::from_secs(u32::MAX.into()));
    let ended = host.wait(limit, |port, bytes| match port {
        Port::Out => show(bytes),
        Port::Err => Ok(std::io::stderr().write_all(bytes)?),
        Port::Files => files.as_mut().map_or(Ok(()), |files| files.take(bytes)),
        Port::Alive => Ok(()),
    })?;
    if std::env::var_os("BANTAM_HOST_LOG").is_some() {
        eprintln!("xtask: up after {:?}\n{}", host.up, host.last_words());
    }
    if let (Ok(_), Some(files)) = (&ended, files) {
        files.finish()?;
    }
    Ok(ended)
}

/// What went wrong, for people.
pub fn describe(trouble: &Trouble, arch: Arch, limit: Option<Duration>) -> String {
    let (arch, limit) = (arch.name(), limit.unwrap_or_default().as_secs());
    match trouble {
        Trouble::Timeout(true) => format!("the {arch} host: the command was still running after {limit} s"),
        Trouble::Timeout(false) => format!("the {arch} host hangs: it gave no sign of life for two minutes"),
        Trouble::Died(words) if words.contains("Kernel panic") => {
            format!("the {arch} host's kernel panicked:\n{words}")
        }
        Trouble::Died(words) => format!("the {arch} host ended before its command did:\n{words}"),
    }
}

/// QEMU and what else runs on this machine to make a host.
fn tools() -> Result<PathBuf> {
    let packages = ["qemu-system-x86", "qemu-system-arm", "kmod"].map(String::from).to_vec();
    let nothing = |_: &Path| Ok(());
    Set { name: "qemu", suite: HOSTS, arch: Arch::native(), packages, only: "", finish: nothing }.folder()
}

/// QEMU with all its words but for the kernel's and the ports'.
fn command(arch: Arch, job: &Job, tools: &Path, folder: &Path) -> Result<Command> {
    let mut command = packages::program(tools, &format!("usr/bin/{}", arch.qemu()), arch.qemu())?;
    for data in ["qemu", "seabios"] {
        command.arg("-L").arg(tools.join("usr/share").join(data));
    }
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    command.args(arch.machine());
    if let Some(model) = std::env::var_os("BANTAM_HOST_CPU") {
        // The last one counts.
        command.arg("-cpu").arg(model);
    }
    if let Some(options) = std::env::var_os("BANTAM_HOST_MACHINE") {
        // The rest stays as it is.
        command.arg("-machine").arg(options);
    }
    command.args(["-smp", &job.cpus.to_string(), "-m", &job.memory.to_string()]);
    let console = folder.join("console.log").display().to_string().replace(',', ",,");
    command.args(["-serial", &format!("file:{console}")]);
    let kernel = format!("console={} panic=-1 oops=panic quiet rdinit=/init", arch.console());
    command.args(["-append", &kernel]);
    Ok(command)
}

/// QEMU's words for a clock.
fn accelerator(clock: Clock) -> &'static [&'static str] {
    match clock {
        Clock::Real => &["-accel", "tcg,thread=multi"],
        Clock::Instructions => &["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off"],
    }
}

/// A shell on this terminal: QEMU's own, since it knows how to treat one. `ctrl-a x` kills the host.
fn shell(mut command: Command) -> Result<i32> {
    command.args(["-chardev", "stdio,id=terminal,signal=off,mux=on", "-device", "virtio-serial-pci"]);
    command.args(["-device", "virtconsole,chardev=terminal"]);
    qemu::bind(&mut command, Vec::new());
    if !std::io::stdin().is_terminal() {
        bail!("a shell needs a terminal: say what to run, after --");
    }
    eprintln!("xtask: a shell in the host; exit or ctrl-a x leaves it");
    let status = command.stderr(std::process::Stdio::null()).status()?;
    Ok(status.code().unwrap_or(1))
}

/// The files that are this run's.
fn extra(arch: Arch, job: &Job, mark: &str) -> initramfs::Extra {
    let interactive = if job.command.is_empty() { "1" } else { "" };
    let (rows, columns) = window();
    let term = std::env::var("TERM").unwrap_or_else(|_| "linux".into());
    let settings = format!("interactive={interactive} rows={rows} columns={columns} term={}\n", quote(&term));
    let words: Vec<_> = job.command.iter().map(|word| quote(word)).collect();
    let text = |name: &str, mode, text: String| (name.to_owned(), mode, text);
    let texts = vec![
        text("init", 0o755, include_str!("init.sh").into()),
        text("settings", 0o644, settings),
        text("mark", 0o644, mark.into()),
        text("name", 0o644, arch.name().replace('_', "-")),
        text("command", 0o755, format!("{}\n", words.join(" "))),
    ];
    initramfs::Extra { files: job.files.clone(), texts }
}

/// A word for the shell.
pub fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Rows and columns of the terminal.
fn window() -> (u16, u16) {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the ioctl writes one winsize, where `size` is one.
    #[allow(unsafe_code)]
    unsafe {
        libc::ioctl(0, libc::TIOCGWINSZ, &raw mut size)
    };
    if size.ws_row == 0 { (24, 80) } else { (size.ws_row, size.ws_col) }
}

/// What ends a stream: nothing that a command prints by chance.
fn mark() -> String {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    format!("\x01end-{:x}-{:x}\x01", std::process::id(), now.as_nanos())
}

/// A folder that goes away with its run.
struct RunFolder(PathBuf);

impl RunFolder {
    fn new() -> Result<Self> {
        // Those of runs that were killed.
        for entry in fs::read_dir(packages::cache())? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if let Some(id) = name.strip_prefix("run-").and_then(|rest| rest.split('-').next())
                && !Path::new("/proc").join(id).exists()
            {
                let _ = fs::remove_dir_all(&path);
            }
        }
        // One process may have several.
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = packages::cache().join(format!("run-{}-{number}", std::process::id()));
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        Ok(Self(folder))
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
