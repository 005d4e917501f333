//! State that KVM keeps, as bytes: for each kind of it there is one call that reads it whole and one that sets it.
//!
//! Invariant: a request's number says how many bytes it takes (`_IOC_SIZE`), nothing is asked with a buffer of another
//! size, and nothing but what takes just these: other requests have more behind a head.

use std::io;
use std::os::fd::AsRawFd;

/// The numbers of requests that take a structure of one size (KVM api.rst): those on interrupt controllers, the clock,
/// registers, the local APIC, whether a CPU runs, the 8254 (machine) or events (CPU), debug registers, XSAVE and XCRs.
const FIXED: [u64; 22] = [
    0x62, 0x63, 0x7b, 0x7c, 0x81, 0x82, 0x83, 0x84, 0x8e, 0x8f, 0x98, 0x99, 0x9f, 0xa0, 0xa1, 0xa2, 0xa4, 0xa5, 0xa6,
    0xa7, 0xcc, 0xcd,
];

/// `_IOR(KVMIO, number, a type of so many bytes)`.
pub const fn reads(number: u64, size: usize) -> u64 {
    2 << 30 | (size as u64) << 16 | 0xae << 8 | number
}

/// `_IOW(KVMIO, number, a type of so many bytes)`.
pub const fn writes(number: u64, size: usize) -> u64 {
    1 << 30 | (size as u64) << 16 | 0xae << 8 | number
}

/// How many bytes a request takes.
pub const fn size_of_request(request: u64) -> usize {
    (request >> 16 & 0x3fff) as usize
}

/// Carries out a request on a descriptor of KVM's, which reads from `bytes`, writes to them, or both.
///
/// # Errors
/// KVM refuses, `bytes` are not as many as the request takes, or it is not one of those that are known to take just these.
pub fn ask(fd: &impl AsRawFd, request: u64, bytes: &mut [u8]) -> io::Result<()> {
    if bytes.len() != size_of_request(request) || !FIXED.contains(&(request & 0xff)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the kernel takes and gives as many bytes as the request's number says, which is as many as there are.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request, bytes.as_mut_ptr()) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_kvm_api() {
        // KVM_GET_REGS and KVM_SET_REGS of x86-64, as strace shows them.
        assert_eq!((reads(0x81, 144), writes(0x82, 144)), (0x8090_ae81, 0x4090_ae82));
        assert_eq!(size_of_request(0x8090_ae81), 144);
        let null = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(ask(&null, 0x8090_ae81, &mut [0; 143]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert!(ask(&null, 0x8090_ae81, &mut [0; 144]).is_err());
        // KVM_GET_MSRS writes behind its head.
        assert_eq!(ask(&null, reads(0x88, 8), &mut [0; 8]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
