//! A process that has this one's memory as it is when it is made, and does nothing: whatever is written here later, privately
//! mapped memory stays there as it was, and can be read (fork(2); proc(5), /proc/PID/mem and pagemap).
//!
//! Invariant: it runs nothing but system calls, so that it needs none of what another thread held; it keeps no descriptor
//! open; and it ends with its [`Twin`], or with the thread that made it, or at the latest with this process.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::ptr;

/// Such a process, looked into.
pub struct Twin {
    memory: File,
    /// What tells of its pages.
    pub pagemap: File,
    _process: Process,
}

/// It ends with this.
struct Process(libc::pid_t);

impl Twin {
    /// Makes one. The calling thread has to be there as long as it is needed.
    ///
    /// # Errors
    /// The host has no process or not as much memory left, or lets nobody look into another process's.
    pub fn new() -> io::Result<Self> {
        let parent = std::process::id();
        // That of another namespace has other processes under these numbers.
        if std::fs::read_link("/proc/self")? != *parent.to_string() {
            return Err(io::Error::other("/proc is not that of this process"));
        }
        // What handlers do is not for it.
        let before = super::mask_all()?;
        // One table of descriptors, until it has one of its own with nothing in it: a copy would keep files, locks and machines
        // that are closed here.
        let flags = libc::CLONE_FILES | libc::CLONE_FS;
        // SAFETY: without CLONE_VM it has memory of its own, so it can go on with this stack; and it never returns from here.
        let process = unsafe { libc::syscall(libc::SYS_clone, i64::from(flags), 0_usize, 0_usize, 0_usize, 0_usize) };
        if process == 0 {
            stay(parent);
        }
        // Before the mask is put back, which says nothing of this.
        let failed = io::Error::last_os_error();
        super::mask(libc::SIG_SETMASK, &before)?;
        let process = libc::pid_t::try_from(process).ok().filter(|process| *process > 0).ok_or(failed)?;
        let own = Process(process);
        let open = |what| File::open(format!("/proc/{process}/{what}"));
        Ok(Self { memory: open("mem")?, pagemap: open("pagemap")?, _process: own })
    }

    /// Reads what was at an address of this process.
    ///
    /// # Errors
    /// Nothing was.
    pub fn read(&self, at: usize, into: &mut [u8]) -> io::Result<()> {
        self.memory.read_exact_at(into, at as u64)
    }
}

/// What it does all its life.
fn stay(parent: u32) -> ! {
    // SAFETY: a plain call on this process.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    // SAFETY: a plain call.
    let orphaned = unsafe { libc::getppid() }.cast_unsigned() != parent;
    if orphaned {
        super::exit_now(0);
    }
    // SAFETY: a plain call. What fails leaves it with descriptors that are closed when they are closed here.
    unsafe { libc::syscall(libc::SYS_close_range, 0, u32::MAX, libc::CLOSE_RANGE_UNSHARE) };
    // Where memory runs out it goes first, and the snapshot with it.
    // SAFETY: the path ends with a zero.
    let score = unsafe { libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) };
    // SAFETY: as many bytes are there; where there is no such file, the call fails.
    unsafe { libc::write(score, c"1000".as_ptr().cast(), 4) };
    // SAFETY: it is open, or the call fails.
    unsafe { libc::close(score) };
    loop {
        // SAFETY: a plain call; every signal but those that end it is blocked.
        unsafe { libc::pause() };
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // SAFETY: a plain call; the process is ours until it was waited for.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
        // SAFETY: the status is wanted by nobody. No signal tells of its end, which __WALL is for.
        while unsafe { libc::waitpid(self.0, ptr::null_mut(), libc::__WALL) } < 0
            && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
        {}
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn it_has_what_was_here_when_it_was_made_and_goes_with_its_value() {
        let mut bytes = vec![7_u8; 100_000];
        let (reads, writes) = std::io::pipe().unwrap();
        let twin = Twin::new().unwrap();
        // What is closed here is open nowhere.
        drop(writes);
        assert_eq!(std::io::read_to_string(reads).unwrap(), "");
        bytes.fill(9);
        let mut back = vec![0; bytes.len()];
        twin.read(bytes.as_ptr().addr(), &mut back).unwrap();
        assert!(back.iter().all(|byte| *byte == 7) && bytes.iter().all(|byte| *byte == 9));
        assert!(twin.read(8, &mut [0; 4]).is_err());
        // No signal but the last moves it.
        for signal in [libc::SIGTERM, libc::SIGURG, libc::SIGINT] {
            // SAFETY: the process is ours.
            assert_eq!(unsafe { libc::kill(twin._process.0, signal) }, 0);
        }
        assert!(twin.read(bytes.as_ptr().addr(), &mut back).is_ok());
        let of_it = format!("/proc/{}", twin._process.0);
        let (score, until) = (format!("{of_it}/oom_score_adj"), Instant::now() + Duration::from_secs(10));
        let is_ready = || {
            let open = std::fs::read_dir(format!("{of_it}/fd")).unwrap().count();
            open == 0 && std::fs::read_to_string(&score).unwrap() == "1000\n"
        };
        while !is_ready() {
            assert!(Instant::now() < until);
            std::thread::yield_now();
        }
        drop(twin);
        assert!(!std::fs::exists(&of_it).unwrap());
    }
}
