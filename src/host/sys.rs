//! System calls that no crate of ours wraps safely: signals and thread clocks.
//!
//! Invariant: every handler in this file is async-signal-safe: it touches thread-local plain data, atomics and raw
//! system calls, nothing else.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

thread_local! {
    /// `kvm_run.immediate_exit` of the vCPU that this thread runs.
    static IMMEDIATE_EXIT: Cell<*const AtomicU8> = const { Cell::new(ptr::null()) };
}

/// The signal that kicks a vCPU thread out of KVM_RUN.
fn kick_signal() -> i32 {
    libc::SIGRTMIN()
}

fn check(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn handle(signal: i32, handler: extern "C" fn(i32), flags: i32) -> io::Result<()> {
    // SAFETY: all zeroes is a valid sigaction: empty mask, no flags.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler as *const () as libc::sighandler_t;
    action.sa_flags = flags;
    // SAFETY: `action` is valid for the call and the handler has the signature that these flags ask for.
    check(unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) })
}

/// A kick between "no one wants me" and KVM_RUN must not be lost: KVM looks at `immediate_exit` once it can be
/// interrupted (KVM api.rst, "immediate_exit").
extern "C" fn on_kick(_signal: i32) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: `watch_kicks` promised that the byte lives as long as this thread may run the vCPU.
        unsafe { (*flag).store(1, Ordering::Relaxed) };
    }
}

/// Makes a kick harmless to a thread that runs no vCPU. Call before any thread is started that may be kicked: the
/// signal would end the process.
///
/// # Errors
/// The host refuses the signal handler.
pub fn handle_kicks() -> io::Result<()> {
    handle(kick_signal(), on_kick, 0)?;
    // A parent may have left it blocked; then no CPU could be stopped.
    mask(libc::SIG_UNBLOCK, &set_of(&[kick_signal()]))
}

/// Makes kicks of the calling thread set `immediate_exit`, the byte in `kvm_run`.
///
/// # Safety
/// `immediate_exit` stays valid until [`forget_kicks`] is called on this thread, or the thread ends.
pub unsafe fn watch_kicks(immediate_exit: *const AtomicU8) {
    IMMEDIATE_EXIT.set(immediate_exit);
}

/// The opposite of [`watch_kicks`].
pub fn forget_kicks() {
    IMMEDIATE_EXIT.set(ptr::null());
}

/// Kicks a thread that has not been joined.
pub fn kick(thread: libc::pthread_t) {
    // SAFETY: the caller holds the join handle, so the id is valid; an error means that the thread has ended.
    unsafe { libc::pthread_kill(thread, kick_signal()) };
}

/// The calling thread's id, for [`thread_cpu_time`].
pub fn thread_id() -> i32 {
    // SAFETY: no arguments, cannot fail.
    unsafe { libc::gettid() }
}

/// The CPU time that a thread of this process has used; none where it has ended.
pub fn thread_cpu_time(thread: i32) -> Option<Duration> {
    // The kernel's own encoding of a thread's scheduler clock (clock_getcpuclockid(3), include/linux/posix-timers.h).
    let clock = (!thread << 3) | 6;
    let mut time = MaybeUninit::<libc::timespec>::uninit();
    // SAFETY: `time` is writable.
    let result = unsafe { libc::clock_gettime(clock, time.as_mut_ptr()) };
    if result != 0 {
        return None;
    }
    // SAFETY: the call succeeded and has filled it.
    let time = unsafe { time.assume_init() };
    Some(Duration::new(u64::try_from(time.tv_sec).ok()?, u32::try_from(time.tv_nsec).ok()?))
}

/// The signals that end a machine, and the two that stop the process for a while and let it go on.
const CONTROL: [i32; 6] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGTSTP, libc::SIGCONT];

/// The terminal's "stop".
pub const SIGTSTP: i32 = libc::SIGTSTP;
/// The process goes on.
pub const SIGCONT: i32 = libc::SIGCONT;
/// What ctrl-c sends.
pub const SIGINT: i32 = libc::SIGINT;

fn set_of(signals: &[i32]) -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    for signal in signals {
        // SAFETY: the set was initialised above.
        unsafe { libc::sigaddset(set.as_mut_ptr(), *signal) };
    }
    // SAFETY: as above.
    unsafe { set.assume_init() }
}

fn mask(how: i32, set: &libc::sigset_t) -> io::Result<()> {
    // SAFETY: the set is valid for the call.
    match unsafe { libc::pthread_sigmask(how, set, ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Whether whoever started this process asked that the signal be ignored, as nohup and a script's `&` do.
fn is_ignored(signal: i32) -> bool {
    // SAFETY: all zeroes is a valid sigaction.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    // SAFETY: the call only writes to `action`.
    let result = unsafe { libc::sigaction(signal, ptr::null(), &raw mut action) };
    result == 0 && action.sa_sigaction == libc::SIG_IGN
}

/// Turns the control signals of this process into readable events. Call before any thread is started.
///
/// # Errors
/// The host has no descriptor left.
pub fn control_signals() -> io::Result<OwnedFd> {
    let ours: Vec<i32> = CONTROL.into_iter().filter(|signal| !is_ignored(*signal)).collect();
    let set = set_of(&ours);
    mask(libc::SIG_BLOCK, &set)?;
    // SAFETY: the set is valid for the call.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: signalfd has just given it to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The number of a signal as `read` from [`control_signals`]: the first word of `signalfd_siginfo`.
pub fn signal_number(info: &[u8]) -> Option<i32> {
    let word = info.first_chunk::<4>()?;
    (info.len() >= size_of::<libc::signalfd_siginfo>()).then(|| i32::from_ne_bytes(*word))
}

/// Bytes of one [`control_signals`] record.
pub const SIGNAL_INFO: usize = size_of::<libc::signalfd_siginfo>();

/// Stops this process as SIGTSTP would, until it is continued.
pub fn stop_self() {
    // SAFETY: plain signal to ourselves.
    unsafe { libc::raise(libc::SIGSTOP) };
}

/// A signal that means a bug or the host's doing: put the terminal back, say so, end with 128 + n.
extern "C" fn on_fatal(signal: i32) {
    super::terminal::restore();
    let mut line = *b"bantam: killed by signal 00\n";
    let digits = line.len() - 3;
    line[digits] += u8::try_from(signal / 10 % 10).unwrap_or(0);
    line[digits + 1] += u8::try_from(signal % 10).unwrap_or(0);
    let _ = rustix::io::write(rustix::stdio::stderr(), &line);
    // SAFETY: async-signal-safe, does not return.
    unsafe { libc::_exit(128 + signal) };
}

/// Ends the process at once, running nothing.
pub fn exit_now(status: u8) -> ! {
    // SAFETY: does not return.
    unsafe { libc::_exit(i32::from(status)) }
}

/// What ends a process that does nothing about it, crashes first.
const FATAL: [i32; 15] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGSYS,
    libc::SIGABRT,
    libc::SIGTRAP,
    libc::SIGXCPU,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGIO,
    libc::SIGPWR,
];

/// Handles the signals of a crash, on the alternate stacks that the standard library gives each thread. Those that only
/// tell of a failed call (a file too large, the terminal's refusal in the background) are ignored: the call fails.
///
/// # Errors
/// The host refuses a handler.
pub fn handle_fatal_signals() -> io::Result<()> {
    for signal in [libc::SIGXFSZ, libc::SIGTTOU, libc::SIGTTIN] {
        // SAFETY: SIG_IGN is a valid disposition.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    FATAL.into_iter().try_for_each(|signal| handle(signal, on_fatal, libc::SA_ONSTACK))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_waits_uses_no_cpu_time() {
        let own = thread_id();
        let before = thread_cpu_time(own).unwrap();
        while thread_cpu_time(own).unwrap() == before {}
        let (send, receive) = std::sync::mpsc::channel();
        let (end, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            send.send(thread_id()).unwrap();
            wait.recv().unwrap_err();
        });
        let id = receive.recv().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        let first = thread_cpu_time(id).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(thread_cpu_time(id), Some(first));
        drop(end);
        thread.join().unwrap();
        assert_eq!(thread_cpu_time(id), None);
    }

    #[test]
    fn a_kick_sets_the_byte_of_the_kicked_thread_only() {
        use std::os::unix::thread::JoinHandleExt;
        static FLAG: AtomicU8 = AtomicU8::new(0);
        handle_kicks().unwrap();
        let (send, receive) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            // SAFETY: a static lives for ever.
            unsafe { watch_kicks(&raw const FLAG) };
            send.send(()).unwrap();
            while FLAG.load(Ordering::Relaxed) == 0 {
                std::thread::yield_now();
            }
            forget_kicks();
        });
        receive.recv().unwrap();
        kick(thread.as_pthread_t());
        thread.join().unwrap();
    }
}
