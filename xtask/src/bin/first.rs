//! The only process of the guest of `cargo xtask bench boot`: says that it is there, says so again, and powers off.
//!
//! Invariant: before its line it does nothing, so that the line ends the boot of the kernel and nothing else. A second one
//! tells what a line costs by itself. It waits after each for the measurement to read KVM's counts, which go with the machine.
#![no_main]
// Nothing is to stand between this program and the system calls.
#![allow(unsafe_code)]

use std::ffi::c_int;

/// What the measurement waits for: two lines of one length.
const LINES: [&[u8]; 2] = [b"init\n", b"more\n"];

/// The C library calls this.
#[unsafe(no_mangle)]
extern "C" fn main() -> c_int {
    for line in LINES {
        // SAFETY: the buffer is as long as said. Linux gives its first process the console as stdout.
        unsafe { libc::write(1, line.as_ptr().cast(), line.len()) };
        // SAFETY: no argument can be wrong.
        unsafe { libc::usleep(200_000) };
    }
    // SAFETY: the call ends the machine, and this process with it.
    unsafe { libc::reboot(libc::RB_POWER_OFF) }
}
