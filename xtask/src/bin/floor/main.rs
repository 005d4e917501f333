//! The floor: the least that a program against libc can do to run a guest under KVM. The bench runs it beside Bantam.
//!
//! `floor add|thread|spin` or `floor none|serial [EXITS]`; `thread` is `add` with the vCPU on a named thread of its own.
//! Invariant: it makes no system call that could be left out. That is why it asks for no API version, and on x86-64 hands
//! the registers over in `kvm_run`. It is no example to follow: it checks nothing that a machine monitor must check.
#![no_main]
// The point of this program is that nothing stands between it and the system calls.
#![allow(unsafe_code)]

#[cfg_attr(target_arch = "aarch64", path = "aarch64.rs")]
#[cfg_attr(target_arch = "x86_64", path = "x86_64.rs")]
mod arch;
#[path = "../../guest/mod.rs"]
mod guest;
mod kvm;

use std::ffi::{CStr, c_char, c_int, c_ulong, c_void};
use std::mem::MaybeUninit;
use std::ptr::null_mut;

use arch::Run;
use kvm::{KVM_CREATE_VCPU, KVM_CREATE_VM, KVM_GET_VCPU_MMAP_SIZE, KVM_RUN, KVM_SET_USER_MEMORY_REGION, Slot};

/// RAM of the machine: one page, as in system B.
const RAM: usize = 0x1000;

/// Ends the program when a system call failed: there is nothing else to do about it here.
fn must(result: impl Into<i64>, what: &CStr) -> i64 {
    let result = result.into();
    if result < 0 {
        // SAFETY: `what` is a C string.
        unsafe { libc::perror(what.as_ptr()) };
        // SAFETY: no argument can be wrong.
        unsafe { libc::_exit(125) };
    }
    result
}

fn ioctl(fd: c_int, request: c_ulong, argument: u64, what: &CStr) -> c_int {
    // SAFETY: the callers pass what the KVM API document asks for with each request.
    let result = unsafe { libc::ioctl(fd, request, argument) };
    must(result, what);
    result
}

fn map(len: usize, flags: c_int, fd: c_int, what: &CStr) -> *mut c_void {
    // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
    let address = unsafe { libc::mmap(null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
    must(address as isize as i64, what);
    address
}

/// A machine with one page of RAM that holds `code`: its vCPU and the vCPU's `kvm_run`.
fn build(code: &[u8], adds: bool) -> (c_int, *mut Run) {
    // SAFETY: the path is a C string.
    let kvm = unsafe { libc::open(c"/dev/kvm".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    must(kvm, c"/dev/kvm");
    let vm = ioctl(kvm, KVM_CREATE_VM, 0, c"KVM_CREATE_VM");
    let ram = map(RAM, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, c"mmap of RAM");
    // SAFETY: every guest is shorter than the page.
    unsafe { ram.cast::<u8>().copy_from_nonoverlapping(code.as_ptr(), code.len()) };
    let slot = Slot { slot: 0, flags: 0, guest: guest::AT, size: RAM as u64, host: ram as u64 };
    ioctl(vm, KVM_SET_USER_MEMORY_REGION, &raw const slot as u64, c"KVM_SET_USER_MEMORY_REGION");
    let vcpu = ioctl(vm, KVM_CREATE_VCPU, 0, c"KVM_CREATE_VCPU");
    let size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0, c"KVM_GET_VCPU_MMAP_SIZE");
    let run = map(size.unsigned_abs() as usize, libc::MAP_SHARED, vcpu, c"mmap of kvm_run").cast::<Run>();
    arch::enter(vm, vcpu, run, adds);
    (vcpu, run)
}

/// What the guest wrote to the serial port and has not left yet.
struct Output {
    /// Not zeroed: that alone would touch 16 pages.
    bytes: MaybeUninit<[u8; 0x1_0000]>,
    len: usize,
    /// Write as soon as this many bytes are there.
    limit: usize,
}

impl Output {
    fn push(&mut self, byte: u8) {
        // SAFETY: `len` is under `limit`, and that is at most the length of the array.
        unsafe { self.bytes.as_mut_ptr().cast::<u8>().wrapping_add(self.len).write(byte) };
        self.len += 1;
        if self.len == self.limit {
            self.flush();
        }
    }

    fn flush(&mut self) {
        if self.len > 0 {
            // SAFETY: the first `len` bytes of the array have been written.
            must(unsafe { libc::write(1, self.bytes.as_ptr().cast(), self.len) } as i64, c"write");
            self.len = 0;
        }
    }
}

/// What an exit is to the floor.
enum Exit {
    /// A byte for the serial port.
    Output(u8),
    /// Nobody answers.
    Nothing,
    /// The guest has ended.
    End,
    /// Something that no guest of the floor does.
    Other(u32),
}

/// The bare loop: everything that one exit costs is here.
fn run(vcpu: c_int, run: *mut Run, output: &mut Output) -> c_int {
    loop {
        // SAFETY: KVM_RUN takes no argument.
        let result = unsafe { libc::ioctl(vcpu, KVM_RUN, 0) };
        must(result, c"KVM_RUN");
        match arch::exit(run) {
            Exit::Output(byte) => output.push(byte),
            Exit::Nothing => {}
            Exit::End => return 0,
            Exit::Other(reason) => return 64 + (reason & 63) as c_int,
        }
    }
}

/// What the vCPU's thread is lent, and what it gives back.
struct Lent {
    vcpu: c_int,
    state: *mut Run,
    output: *mut Output,
    status: c_int,
}

extern "C" fn on_thread(lent: *mut c_void) -> *mut c_void {
    // SAFETY: `threaded` waits for this thread before it touches what it lent.
    let lent = unsafe { &mut *lent.cast::<Lent>() };
    // SAFETY: the name is a C string of less than 16 bytes.
    unsafe { libc::prctl(libc::PR_SET_NAME, c"vcpu0".as_ptr()) };
    // SAFETY: as above.
    lent.status = run(lent.vcpu, lent.state, unsafe { &mut *lent.output });
    std::ptr::null_mut()
}

/// The loop on a thread of its own: the least that "one named thread for each vCPU" costs.
fn threaded(vcpu: c_int, state: *mut Run, output: &mut Output) -> c_int {
    let mut lent = Lent { vcpu, state, output, status: 0 };
    let mut thread = MaybeUninit::uninit();
    let argument = (&raw mut lent).cast();
    // SAFETY: `lent` lives until the thread has been joined.
    let made = unsafe { libc::pthread_create(thread.as_mut_ptr(), std::ptr::null(), on_thread, argument) };
    must(-made, c"pthread_create");
    // SAFETY: pthread_create has filled it.
    let thread = unsafe { thread.assume_init() };
    // SAFETY: the thread has not been joined before.
    unsafe { libc::pthread_join(thread, std::ptr::null_mut()) };
    lent.status
}

/// A decimal number.
fn number(digits: &[u8]) -> u32 {
    digits.iter().fold(0, |number: u32, digit| number.wrapping_mul(10).wrapping_add(u32::from(digit & 15)))
}

/// Where the C library starts the program.
///
/// # Safety
/// `words` are `count` C strings.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn main(count: c_int, words: *const *const c_char) -> c_int {
    // SAFETY: the C library passes that many.
    let words = unsafe { std::slice::from_raw_parts(words, count.unsigned_abs() as usize) };
    // SAFETY: each is a C string.
    let word = |i: usize| words.get(i).map(|word| unsafe { CStr::from_ptr(*word) }.to_bytes());
    let exits = word(2).map_or(guest::EXITS, number);
    let (none, serial) = (guest::outs(guest::NO_DEVICE, exits), guest::outs(guest::SERIAL, exits));
    let (code, limit): (&[u8], _) = match word(1) {
        Some(b"add" | b"thread") => (&guest::ADD, 0x1_0000),
        Some(b"none") => (&none, 0x1_0000),
        Some(b"serial") => (&serial, 0x1_0000),
        Some(b"spin") => (&guest::SPIN, 1),
        _ => return 2,
    };
    let mut output = Output { bytes: MaybeUninit::uninit(), len: 0, limit };
    let (vcpu, state) = build(code, matches!(word(1), Some(b"add" | b"thread")));
    let run = if word(1) == Some(b"thread") { threaded } else { run };
    let status = run(vcpu, state, &mut output);
    output.flush();
    status
}
