//! Tap devices: network interfaces of the host's whose other end is a descriptor (Linux, Documentation/networking/tuntap).
//!
//! Invariant: what is passed to an ioctl here lives on the stack of its caller, and is as large as the kernel expects.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

// include/uapi/linux/if_tun.h
const TUNSETIFF: u64 = 0x4004_54ca;
const TUNSETOFFLOAD: u64 = 0x4004_54d0;
const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;
const TUNSETQUEUE: u64 = 0x4004_54d9;
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_ATTACH_QUEUE: u16 = 0x0200;
const IFF_DETACH_QUEUE: u16 = 0x0400;

/// What the other side does itself, so that frames may come to it undone: sums, and cutting into segments.
pub mod offload {
    /// TUN_F_CSUM
    pub const CSUM: u32 = 1;
    /// TUN_F_TSO4
    pub const TSO4: u32 = 2;
    /// TUN_F_TSO6
    pub const TSO6: u32 = 4;
    /// TUN_F_TSO_ECN
    pub const ECN: u32 = 8;
}

/// `struct ifreq`, of which the flags are used only.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

impl Request {
    fn new(name: &str, flags: u16) -> Self {
        let mut own = Self { name: [0; 16], flags, rest: [0; 22] };
        // The last byte stays a NUL.
        own.name.iter_mut().take(15).zip(name.bytes()).for_each(|(to, from)| *to = from);
        own
    }
}

fn result(value: i32) -> io::Result<()> {
    if value == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Opens a queue of the tap device `name`; frames come with a header of 12 bytes. With `several` it may have more queues.
///
/// # Errors
/// The host has no tap devices, or this one is somebody else's, or was made for another number of queues.
pub fn open(name: &str, several: bool) -> io::Result<OwnedFd> {
    let fd = rustix::fs::open("/dev/net/tun", OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
    let more = if several { IFF_MULTI_QUEUE } else { 0 };
    let mut request = Request::new(name, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | more);
    // SAFETY: the kernel reads and writes a `struct ifreq`, of 40 bytes on 64-bit hosts, which this is.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETIFF as _, &raw mut request) })?;
    let size: i32 = 12;
    // SAFETY: the kernel reads an int.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ as _, &raw const size) })?;
    Ok(fd)
}

/// Says what may be left undone in frames that come out.
///
/// # Errors
/// The host does not know all of it.
pub fn set_offloads(fd: impl AsFd, bits: u32) -> io::Result<()> {
    // SAFETY: the argument is a number.
    result(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), TUNSETOFFLOAD as _, libc::c_ulong::from(bits)) })
}

/// Makes the host use this queue of several, or not.
///
/// # Errors
/// It is so already, or the device is gone.
pub fn attach(fd: impl AsFd, on: bool) -> io::Result<()> {
    let mut request = Request::new("", if on { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE });
    // SAFETY: as for TUNSETIFF.
    result(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), TUNSETQUEUE as _, &raw mut request) })
}
