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

/// What a guest's own guests are to KVM (`struct kvm_nested_state`, api.rst, KVM_GET_NESTED_STATE): a head that says how long all
/// of it is, and what stands behind it.
const NESTED: usize = 128;
/// Where in the head that is; and the most that it is, which VMX has.
const NESTED_SIZE: usize = 4;
const NESTED_MOST: usize = NESTED + (2 << 12);

/// Reads it.
///
/// # Errors
/// KVM refuses.
pub fn nested(fd: &impl AsRawFd) -> io::Result<Vec<u8>> {
    const KVM_GET_NESTED_STATE: u64 = reads(0xbe, NESTED) | writes(0xbe, NESTED);
    let mut bytes = vec![0; NESTED_MOST];
    bytes.iter_mut().skip(NESTED_SIZE).zip((NESTED_MOST as u32).to_le_bytes()).for_each(|(byte, from)| *byte = from);
    // SAFETY: the kernel writes no more than the head says that there is room for.
    if unsafe { libc::ioctl(fd.as_raw_fd(), KVM_GET_NESTED_STATE, bytes.as_mut_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let size = nested_size(&bytes).ok_or(io::ErrorKind::InvalidData)?;
    bytes.truncate(size);
    Ok(bytes)
}

/// Sets it.
///
/// # Errors
/// KVM refuses, or it is not as long as it says.
pub fn set_nested(fd: &impl AsRawFd, bytes: &[u8]) -> io::Result<()> {
    const KVM_SET_NESTED_STATE: u64 = writes(0xbf, NESTED);
    if nested_size(bytes) != Some(bytes.len()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the kernel reads as many bytes as the head says, which is as many as there are.
    match unsafe { libc::ioctl(fd.as_raw_fd(), KVM_SET_NESTED_STATE, bytes.as_ptr()) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// How long it says that it is, which is no more than there may be.
fn nested_size(bytes: &[u8]) -> Option<usize> {
    let size = u32::from_le_bytes(*bytes.get(NESTED_SIZE..)?.first_chunk()?) as usize;
    (NESTED..=NESTED_MOST).contains(&size).then_some(size)
}

/// The numbers of all registers of a CPU whose KVM knows them by number (KVM_GET_REG_LIST, api.rst 4.84).
///
/// # Errors
/// KVM refuses.
pub fn register_list(fd: &impl AsRawFd) -> io::Result<Vec<u64>> {
    /// `_IOWR(KVMIO, 0xb0, struct kvm_reg_list)`: the head alone, a count; the numbers stand behind it.
    const KVM_GET_REG_LIST: u64 = reads(0xb0, 8) | writes(0xb0, 8);
    let mut list = vec![0];
    loop {
        let room = list.len() as u64 - 1;
        list.iter_mut().take(1).for_each(|count| *count = room);
        // SAFETY: the kernel writes the count, and no more numbers than it says that there is room for.
        match unsafe { libc::ioctl(fd.as_raw_fd(), KVM_GET_REG_LIST, list.as_mut_ptr()) } {
            0.. => return Ok(list.into_iter().skip(1).collect()),
            _ => match (io::Error::last_os_error(), list.first()) {
                // Too little: it has said how many there are.
                (e, Some(count)) if e.raw_os_error() == Some(libc::E2BIG) && *count > room && *count < 1 << 16 => {
                    list.resize(*count as usize + 1, 0);
                }
                (e, _) => return Err(e),
            },
        }
    }
}

/// How often a second the counter counts that an arm64 host shares with its guests (CNTFRQ_EL0).
#[cfg(target_arch = "aarch64")]
pub fn counter_hertz() -> u64 {
    let hertz: u64;
    // SAFETY: reads a register that Linux lets every program read, and does nothing else.
    unsafe {
        std::arch::asm!("mrs {}, cntfrq_el0", out(reg) hertz, options(nomem, nostack, preserves_flags));
    }
    hertz
}

/// Has what was written at these addresses of this process reach memory itself (DC CVAC), where a guest finds it that
/// reads past the caches, as it does what it takes for a device's registers.
///
/// # Safety
/// All of `[start, start + size)` is mapped, and can be read.
#[cfg(target_arch = "aarch64")]
pub unsafe fn write_back(start: usize, size: usize) {
    let kind: u64;
    // SAFETY: reads a register that Linux lets every program read, and does nothing else.
    unsafe { std::arch::asm!("mrs {}, ctr_el0", out(reg) kind, options(nomem, nostack, preserves_flags)) };
    // CTR_EL0.DminLine: of the smallest line, in words of four bytes.
    let line = 4usize << (kind >> 16 & 0xf);
    for at in (start & !(line - 1)..start.saturating_add(size)).step_by(line) {
        // SAFETY: the caller has it mapped, and no byte changes.
        unsafe { std::arch::asm!("dc cvac, {}", in(reg) at, options(nostack, preserves_flags)) };
    }
    // SAFETY: waits for that to be done.
    unsafe { std::arch::asm!("dsb sy", options(nostack, preserves_flags)) };
}

/// On x86-64 no guest reads past the caches: KVM has the CPU ignore that it wants to, but for what is no RAM.
///
/// # Safety
/// None is needed here.
#[cfg(target_arch = "x86_64")]
pub const unsafe fn write_back(_start: usize, _size: usize) {}

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
        // As api.rst has it: _IOWR(0xAE, 0xb0, 8).
        assert_eq!(register_list(&null).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        // As long as it says, and no longer than it may be.
        let said = |size: u32, there: usize| {
            let mut bytes = vec![0; there];
            bytes[4..8].copy_from_slice(&size.to_le_bytes());
            set_nested(&null, &bytes).unwrap_err().raw_os_error()
        };
        assert_eq!((said(128, 128), said(8320, 8320)), (Some(libc::ENOTTY), Some(libc::ENOTTY)));
        assert_eq!((said(129, 128), said(127, 127), said(8321, 8321), said(128, 129)), (None, None, None, None));
        // KVM_GET_MSRS writes behind its head.
        assert_eq!(ask(&null, reads(0x88, 8), &mut [0; 8]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
