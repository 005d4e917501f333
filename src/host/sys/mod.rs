//! System calls that no crate of ours wraps safely: signals and thread clocks.
//!
//! Invariant: every handler in this file is async-signal-safe: it touches thread-local plain data, atomics and raw
//! system calls, nothing else.

#![allow(unsafe_code)]

pub mod tap;

use std::cell::Cell;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

pub mod disk;
pub mod lease;
pub mod process;
pub mod room;
pub mod state;
pub mod twin;
pub mod uring;
pub mod userfault;

thread_local! {
    /// `kvm_run.immediate_exit` of the vCPU that this thread runs.
    static IMMEDIATE_EXIT: Cell<*const AtomicU8> = const { Cell::new(ptr::null()) };
}

/// The descriptor of an eventfd, which its crate does not lend safely.
pub fn fd_of(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd owns the descriptor and stays borrowed as long as the result lives.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// An eventfd that never blocks, and that no program started by this process gets.
///
/// # Errors
/// The host has no descriptor left.
pub fn eventfd() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

/// The signal that kicks a vCPU thread out of KVM_RUN. Not a real-time one: those queue, and the kernel refuses one that finds
/// its user's queue full (RLIMIT_SIGPENDING); then no CPU could be stopped.
const KICK: i32 = libc::SIGURG;

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

/// Makes a kick heard. Call before any thread is started that may be kicked: it would be lost.
///
/// # Errors
/// The host refuses the signal handler.
pub fn handle_kicks() -> io::Result<()> {
    handle(KICK, on_kick, 0)?;
    // A parent may have left it blocked; then no CPU could be stopped.
    mask(libc::SIG_UNBLOCK, &set_of(&[KICK]))
}

/// All threads take memory from one heap. One of its own costs a thread system calls and pages, and no thread asks for
/// memory often enough to wait for another.
pub fn share_heap() {
    // SAFETY: mallopt changes nothing but how malloc goes on, and no other thread runs yet that could ask for memory.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1)
    };
}

/// The process may map so much and no more (RLIMIT_AS).
pub fn address_space_is_limited() -> bool {
    let mut limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the call writes to `limit` only.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_AS, &raw mut limit) } == 0;
    known && limit.rlim_cur != libc::RLIM_INFINITY
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

/// Kicks a thread that has not been joined; false where the host refuses.
pub fn kick(thread: libc::pthread_t) -> bool {
    // SAFETY: the caller holds the join handle, so the id is valid.
    let error = unsafe { libc::pthread_kill(thread, KICK) };
    // One that has ended needs none.
    matches!(error, 0 | libc::ESRCH)
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

/// The monotonic clock in nanoseconds. The kernel's page of code answers; no system call is made.
pub fn monotonic() -> u64 {
    let mut time = MaybeUninit::<libc::timespec>::uninit();
    // SAFETY: `time` is writable; this clock exists everywhere, so the call fills it.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, time.as_mut_ptr()) };
    // SAFETY: the call above has filled it.
    let time = unsafe { time.assume_init() };
    time.tv_sec.unsigned_abs().wrapping_mul(1_000_000_000).wrapping_add(time.tv_nsec.unsigned_abs())
}

/// Besides [`ENDS`], the two that stop the process for a while and let it go on, the one that says that the terminal has
/// another size, and that of a file that somebody wants to write to.
const CONTROL: [i32; 4] = [SIGTSTP, SIGCONT, SIGWINCH, lease::LOST];

/// The terminal's "stop".
pub const SIGTSTP: i32 = libc::SIGTSTP;
/// The process goes on.
pub const SIGCONT: i32 = libc::SIGCONT;
/// The terminal has another size.
pub const SIGWINCH: i32 = libc::SIGWINCH;
/// "Show your statistics", where there are any.
pub const SIGUSR1: i32 = libc::SIGUSR1;
/// What ctrl-c sends.
pub const SIGINT: i32 = libc::SIGINT;
/// The signal that asks to end.
pub const SIGTERM: i32 = libc::SIGTERM;
/// The signals that end a machine: also that of a terminal that is gone, and what ctrl-\ sends.
pub const ENDS: [i32; 4] = [SIGINT, SIGTERM, libc::SIGHUP, libc::SIGQUIT];

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

/// Blocks all signals that can be blocked in this thread; gives those that were.
fn mask_all() -> io::Result<libc::sigset_t> {
    let (mut all, mut before) = (set_of(&[]), set_of(&[]));
    // SAFETY: the set is valid for the call.
    unsafe { libc::sigfillset(&raw mut all) };
    // SAFETY: both sets are valid for the call.
    match unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before) } {
        0 => Ok(before),
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

/// Turns the control signals of this process, and `more`, into readable events. Call before any thread is started.
///
/// # Errors
/// The host has no descriptor left.
pub fn control_signals(more: Option<i32>) -> io::Result<OwnedFd> {
    let ours: Vec<i32> = ENDS.into_iter().chain(CONTROL).filter(|signal| !is_ignored(*signal)).chain(more).collect();
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

/// The next signal of [`control_signals`] that has come, if any.
pub fn next_signal(signals: &OwnedFd) -> Option<i32> {
    let mut info = [0; size_of::<libc::signalfd_siginfo>()];
    let count = rustix::io::read(signals, &mut info).ok()?;
    // Its number is the first word of `signalfd_siginfo`.
    (count == info.len()).then(|| info.first_chunk().copied().map(i32::from_ne_bytes))?
}

/// Keeps a signal waiting until [`control_signals`] asks for it.
///
/// # Errors
/// The host refuses.
pub fn hold(signal: i32) -> io::Result<()> {
    mask(libc::SIG_BLOCK, &set_of(&[signal]))
}

/// Stops this process as SIGTSTP would, until it is continued.
pub fn stop_self() {
    // SAFETY: plain signal to ourselves.
    unsafe { libc::raise(libc::SIGSTOP) };
}

/// A signal that means a bug or the host's doing: put the terminal back, say so, end with 128 + n.
extern "C" fn on_fatal(signal: i32) {
    crate::host::terminal::restore();
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
        // The kernel wakes who joins before it has forgotten the thread.
        while thread_cpu_time(id).is_some() {}
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
