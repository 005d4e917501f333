//! The floor of a clone: what nobody can do without who wants a machine with that RAM and those registers to go on.
//!
//! Invariant: of all that is in a snapshot it sets RAM and the registers that a guest in real mode uses, handed over in
//! `kvm_run` (KVM_CAP_SYNC_REGS); `/dev/kvm` and the file are open already, as the library's are.

// The point of this is that nothing stands between it and the system calls.
#![allow(unsafe_code)]

#[path = "../floor/kvm.rs"]
mod kvm;

use std::ffi::{c_int, c_ulong, c_void};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::ptr::null_mut;

use anyhow::{Context, Result, ensure};
use bantam::machine::{Machine, Paused};
use bantam::memory::Span;
use kvm::{KVM_CREATE_VCPU, KVM_CREATE_VM, KVM_GET_VCPU_MMAP_SIZE, KVM_RUN, KVM_SET_USER_MEMORY_REGION, Slot};

const KVM_EXIT_IO: u32 = 2;
/// KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS.
const BOTH: u64 = 3;

/// Where things are in struct kvm_run: why it returned, the KVM_EXIT_IO member of its union, what is to be set and its values.
const REASON: usize = 8;
const PORT: usize = 34;
const DATA_OFFSET: usize = 40;
const DIRTY: usize = 296;
const REGISTERS: usize = 304;

/// What its clones are made of.
pub struct Floor {
    kvm: File,
    image: File,
    ram: Span,
    run_size: usize,
    /// struct kvm_regs, struct kvm_sregs.
    registers: Vec<u8>,
}

fn must(result: impl Into<i64>) -> io::Result<i64> {
    let result = result.into();
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn ioctl(fd: &impl AsRawFd, request: c_ulong, argument: u64) -> io::Result<c_int> {
    // SAFETY: the callers pass what the KVM API document asks for with each request.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) };
    must(result).map(|_| result)
}

/// A descriptor that KVM has just given.
fn own(fd: c_int) -> OwnedFd {
    // SAFETY: nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn bytes<T: Copy>(value: &T) -> &[u8] {
    // SAFETY: structures of the KVM API have no padding that is not a member.
    unsafe { std::slice::from_raw_parts((&raw const *value).cast(), size_of::<T>()) }
}

/// A mapping, as long as it lives.
struct Map(*mut c_void, usize);

impl Map {
    fn new(size: usize, flags: c_int, fd: &impl AsRawFd) -> io::Result<Self> {
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let at = unsafe { libc::mmap(null_mut(), size, rights, flags, fd.as_raw_fd(), 0) };
        must(at as isize as i64).map(|_| Self(at, size))
    }

    fn read<T: Copy>(&self, at: usize) -> T {
        // SAFETY: it lies in the mapping of kvm_run, which KVM writes only inside KVM_RUN.
        unsafe { self.0.wrapping_byte_add(at).cast::<T>().read_unaligned() }
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        // SAFETY: as above.
        unsafe { self.0.wrapping_byte_add(at).cast::<u8>().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: nothing refers to it any more.
        unsafe { libc::munmap(self.0, self.1) };
    }
}

/// A machine that has made its first exit.
pub struct Clone {
    // KVM lets go of a machine's memory with the last of these.
    _vcpu: OwnedFd,
    _vm: OwnedFd,
    run: Map,
    _ram: Map,
}

impl Floor {
    /// Takes the registers of a machine of the same snapshot that has not run yet.
    pub fn new(image: &Path, machine: &mut Machine<Paused>) -> Result<Self> {
        let slots = machine.memory().slots();
        ensure!(slots.len() == 1, "RAM has {} parts", slots.len());
        let ram = slots.first().context("no RAM")?.span;
        let cpu = machine.vcpus().first().context("no CPU")?;
        let registers = [bytes(&cpu.fd().get_regs()?), bytes(&cpu.fd().get_sregs()?)].concat();
        let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
        let run_size = usize::try_from(ioctl(&kvm, KVM_GET_VCPU_MMAP_SIZE, 0)?)?;
        Ok(Self { kvm, image: File::open(image)?, ram, run_size, registers })
    }

    /// Makes a machine and runs it to its first exit.
    pub fn spawn(&self) -> Result<Clone> {
        let vm = own(ioctl(&self.kvm, KVM_CREATE_VM, 0).context("KVM_CREATE_VM")?);
        let size = self.ram.size as usize;
        let ram = Map::new(size, libc::MAP_PRIVATE | libc::MAP_NORESERVE, &self.image).context("mmap of RAM")?;
        let slot = Slot { slot: 0, flags: 0, guest: self.ram.start, size: self.ram.size, host: ram.0 as u64 };
        ioctl(&vm, KVM_SET_USER_MEMORY_REGION, &raw const slot as u64).context("KVM_SET_USER_MEMORY_REGION")?;
        let vcpu = own(ioctl(&vm, KVM_CREATE_VCPU, 0).context("KVM_CREATE_VCPU")?);
        let run = Map::new(self.run_size, libc::MAP_SHARED, &vcpu).context("mmap of kvm_run")?;
        run.write(REGISTERS, &self.registers);
        run.write(DIRTY, &BOTH.to_le_bytes());
        ioctl(&vcpu, KVM_RUN, 0).context("KVM_RUN")?;
        let clone = Clone { _vcpu: vcpu, _vm: vm, run, _ram: ram };
        ensure!(clone.run.read::<u32>(REASON) == KVM_EXIT_IO, "the floor's guest made no exit to a port");
        Ok(clone)
    }
}

impl Clone {
    /// The port, and the byte.
    pub fn exit(&self) -> (u16, u8) {
        (self.run.read(PORT), self.run.read(self.run.read::<u64>(DATA_OFFSET) as usize))
    }
}
