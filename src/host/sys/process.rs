//! Processes that go on from here.
//!
//! Invariant: they are made while this process has one thread, so that nothing in them is held by a thread that they have
//! not; and they end when it does.

use std::io;
use std::time::Duration;

/// The signal that tells that one has ended.
pub const ENDED: i32 = libc::SIGCHLD;

/// How often, and how long apart, it is looked for threads.
const LOOKS: u32 = 100;
const LOOK: Duration = Duration::from_millis(1);

/// Has the host keep each that ends until it was asked for its status, whatever whoever started this process wanted.
pub fn hear_of_ends() {
    // SAFETY: SIG_DFL is a valid disposition.
    unsafe { libc::signal(ENDED, libc::SIG_DFL) };
}

/// One of them.
pub struct Process(libc::pid_t);

/// Starts a process that does `work` and ends with its status. Ctrl-c at the terminal does not reach it, nor does what is
/// typed there.
///
/// # Errors
/// The host has no more, or this process has more than one thread.
pub fn fork(work: impl FnOnce() -> u8) -> io::Result<Process> {
    let alone = || std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() == 1);
    // One that has been waited for may be there for a moment.
    let mut looks = 0;
    while !alone() {
        if looks == LOOKS {
            return Err(io::Error::other("there is more than one thread"));
        }
        looks += 1;
        std::thread::sleep(LOOK);
    }
    let parent = std::process::id();
    // SAFETY: with one thread, which was seen above, the child is as whole as this process.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // SAFETY: a plain call on this process.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) };
            // SAFETY: the same.
            unsafe { libc::setpgid(0, 0) };
            // SAFETY: a plain call.
            let orphaned = unsafe { libc::getppid() }.cast_unsigned() != parent;
            if !orphaned && no_input().is_ok() {
                super::exit_now(work());
            }
            super::exit_now(crate::error::status::HOST)
        }
        child => Ok(Process(child)),
    }
}

/// Nothing comes from stdin.
fn no_input() -> io::Result<()> {
    let null = std::fs::File::open("/dev/null")?;
    Ok(rustix::stdio::dup2_stdin(null)?)
}

impl Process {
    /// Sends it a signal.
    pub fn signal(&self, signal: i32) {
        // SAFETY: a plain call; the process is ours until `status` has seen its end, and nobody else's then.
        unsafe { libc::kill(self.0, signal) };
    }

    /// Its status once it has ended, 128 and more for a signal. To be asked no more then.
    pub fn status(&self) -> Option<u8> {
        let mut status = 0;
        // SAFETY: the call only writes to `status`.
        match unsafe { libc::waitpid(self.0, &raw mut status, libc::WNOHANG) } {
            0 => return None,
            process if process == self.0 => {}
            // Somebody else has waited for it.
            _ => return Some(crate::error::status::HOST),
        }
        let (status, signal) = (libc::WEXITSTATUS(status), libc::WIFSIGNALED(status).then(|| libc::WTERMSIG(status)));
        Some(u8::try_from(signal.map_or(status, |signal| 128 + signal)).unwrap_or(u8::MAX))
    }
}
