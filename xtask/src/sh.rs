//! Running other programs: cargo, git, strace.
//!
//! Invariant: every program starts in the root of the repository, and one that fails is an error that names it.

use std::ffi::OsStr;
use std::mem::MaybeUninit;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// The root of the repository.
pub fn root() -> PathBuf {
    let here = std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(PathBuf::new, PathBuf::from);
    here.parent().map_or_else(PathBuf::new, PathBuf::from)
}

/// Cargo's target directory.
pub fn target() -> PathBuf {
    root().join(std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

/// A program, with its words.
pub fn program(name: impl AsRef<OsStr>, words: &[&str]) -> Command {
    let mut command = Command::new(name);
    command.args(words).current_dir(root());
    command
}

/// Cargo, with its words. Cargo's own settings for this very process are not handed on.
pub fn cargo(words: &[&str]) -> Command {
    let mut command = program(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()), words);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("CARGO_PKG_")) {
        command.env_remove(name);
    }
    command
}

/// The words of a command, as a person would type them.
pub fn words(command: &Command) -> String {
    let program = PathBuf::from(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned();
    command.get_args().fold(name, |text, word| text + " " + &word.to_string_lossy())
}

/// Runs a command to its end, its output where ours goes.
pub fn run(mut command: Command) -> Result<()> {
    let status = command.status().with_context(|| words(&command))?;
    if !status.success() {
        bail!("{}: {status}", words(&command));
    }
    Ok(())
}

/// What a command prints.
pub fn output(mut command: Command) -> Result<String> {
    let output = command.stderr(Stdio::inherit()).output().with_context(|| words(&command))?;
    if !output.status.success() {
        bail!("{}: {}", words(&command), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Is there such a program on the search path?
pub fn found(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
}

/// The commit, with `-dirty` if the tree differs from it.
pub fn commit() -> String {
    let words = ["describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"];
    output(program("git", &words)).map_or_else(|_| "unknown".into(), |text| text.trim().into())
}

/// Today's date, in UTC.
pub fn date() -> String {
    output(program("date", &["-u", "+%F"])).map_or_else(|_| "unknown".into(), |text| text.trim().into())
}

/// Whether this runs as root.
pub fn is_root() -> bool {
    // SAFETY: geteuid cannot fail and changes nothing.
    #[allow(unsafe_code)]
    unsafe {
        libc::geteuid() == 0
    }
}

/// CPU time of all children that have been waited for.
pub fn cpu_of_children() -> Duration {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: getrusage writes one rusage, where `usage` is one.
    #[allow(unsafe_code)]
    unsafe {
        libc::getrusage(libc::RUSAGE_CHILDREN, usage.as_mut_ptr())
    };
    // SAFETY: all zeroes is an rusage too.
    #[allow(unsafe_code)]
    let usage = unsafe { usage.assume_init() };
    let micros = |time: libc::timeval| time.tv_sec.unsigned_abs() * 1_000_000 + time.tv_usec.unsigned_abs();
    Duration::from_micros(micros(usage.ru_utime) + micros(usage.ru_stime))
}

/// Installs what a test or the bench needs from outside where that is possible, else says how.
pub fn require(name: &str, package: &str) -> bool {
    if found(name) {
        return true;
    }
    let install = || run(program("apt-get", &["install", "-y", "-qq", "--no-install-recommends", package]));
    if is_root() && found("apt-get") {
        eprintln!("xtask: {name} is missing: apt-get install {package}");
        let done = install().or_else(|_| run(program("apt-get", &["update", "-qq"])).and_then(|()| install()));
        if done.is_ok() && found(name) {
            return true;
        }
    }
    eprintln!("xtask: {name} is missing, and what needs it is skipped: sudo apt-get install {package}");
    false
}
