//! `/dev/kvm` and one virtual machine: memory slots, interrupt lines, vCPUs.
//!
//! Invariant: every memory slot is registered before any in-kernel device exists (5–8 ms each otherwise on some
//! kernels), which `machine::build` sees to by its order.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result};
use kvm_bindings::{
    KVM_API_VERSION, KVM_CREATE_DEVICE_TEST, kvm_create_device, kvm_device_attr, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, DeviceFd, Kvm, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::error::{Refusal, refuse};
use crate::irq::IrqLine;
use crate::memory::Memory;
use crate::vcpu::Vcpu;

/// How often an interrupted KVM_CREATE_VM is tried again.
const TRIES: u32 = 5;
/// A slot holds fewer than 2^31 pages (KVM_MEM_MAX_NR_PAGES).
const SLOT: u64 = 1 << 42;

const DEV_KVM: &str = "/dev/kvm";

/// What no machine can do without.
const REQUIRED: [(Cap, &str); 2] =
    [(Cap::UserMemory, "KVM_CAP_USER_MEMORY"), (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT")];

/// The host's KVM, opened once a process.
///
/// # Errors
/// There is no `/dev/kvm`, it may not be opened, or it is not one that Bantam can use: each with its remedy.
pub fn kvm() -> Result<&'static Kvm> {
    static KVM: OnceLock<Kvm> = OnceLock::new();
    if let Some(kvm) = KVM.get() {
        return Ok(kvm);
    }
    let kvm = open()?;
    Ok(KVM.get_or_init(|| kvm))
}

fn open() -> Result<Kvm> {
    let kvm = Kvm::new().map_err(|e| cannot_open(&e.into()))?;
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION.cast_signed() {
        return Err(refuse(format!("{DEV_KVM} has API version {version}, Bantam needs {KVM_API_VERSION}")).into());
    }
    for (cap, name) in REQUIRED {
        if !kvm.check_extension(cap) {
            return Err(refuse(format!("{DEV_KVM} lacks {name}")).hint("`bantam check` lists what is there").into());
        }
    }
    Ok(kvm)
}

/// The reason why `/dev/kvm` cannot be opened, and its remedy.
fn cannot_open(error: &io::Error) -> Refusal {
    let refusal = refuse(format!("cannot open {DEV_KVM}: {error}"));
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => refusal.hint(crate::arch::NO_KVM),
        Some(libc::EACCES | libc::EPERM) => {
            refusal.hint(permission_hint().unwrap_or_else(|| "run as a user who may".into()))
        }
        _ => refusal,
    }
}

fn permission_hint() -> Option<String> {
    let metadata = std::fs::metadata(DEV_KVM).ok()?;
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    let gid = metadata.gid().to_string();
    let group = groups.lines().find(|line| line.split(':').nth(2) == Some(gid.as_str()))?.split(':').next()?;
    let mode = metadata.mode() & 0o777;
    let what = format!("it belongs to group {group}, mode {mode:04o}");
    Some(match mode & 0o060 {
        0o060 => format!("{what}; join the group: usermod -aG {group} USER"),
        _ => {
            format!("{what}, so that only its owner may; give it to a group: chgrp kvm {DEV_KVM}; chmod 0660 {DEV_KVM}")
        }
    })
}

/// One virtual machine.
pub struct Vm {
    fd: Arc<VmFd>,
}

impl Vm {
    /// Creates a machine without memory, CPUs or devices; `kind` is KVM_CREATE_VM's argument.
    ///
    /// # Errors
    /// KVM refuses; an interrupted call is tried again a few times.
    pub fn new(kind: u64) -> Result<Self> {
        let kvm = kvm()?;
        let mut tries = 0;
        loop {
            match kvm.create_vm_with_type(kind) {
                Ok(fd) => return Ok(Self { fd: Arc::new(fd) }),
                Err(e) if e.errno() == libc::EINTR && tries < TRIES => {
                    tries += 1;
                    std::thread::sleep(Duration::from_millis(1 << tries));
                }
                Err(e) => return Err(refuse(format!("KVM_CREATE_VM: {}", io::Error::from(e))).into()),
            }
        }
    }

    /// The machine's descriptor, for the board's own calls.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Makes all of `memory` visible to the guest.
    ///
    /// # Errors
    /// KVM refuses a slot.
    pub fn map(&self, memory: &Memory) -> Result<()> {
        let slots = memory.slots();
        let pieces = slots.iter().flat_map(|s| {
            (0..s.span.size).step_by(1 << 42).map(|at| (s.span.start + at, s.host + at, (s.span.size - at).min(SLOT)))
        });
        for (slot, (guest_phys_addr, userspace_addr, memory_size)) in (0u32..).zip(pieces) {
            let region = kvm_userspace_memory_region { slot, flags: 0, guest_phys_addr, memory_size, userspace_addr };
            // SAFETY: `memory` keeps the mapping; the machine keeps a clone of `memory` as long as its vCPUs exist.
            unsafe { self.fd.set_user_memory_region(region) }.map_err(io::Error::from).with_context(|| {
                format!("KVM_SET_USER_MEMORY_REGION: {memory_size:#x} bytes at {guest_phys_addr:#x}")
            })?;
        }
        Ok(())
    }

    /// The interrupt input `gsi` of the in-kernel controllers, as a wire.
    ///
    /// # Errors
    /// No descriptor is left, or KVM refuses the irqfd.
    pub fn line(&self, gsi: u32) -> Result<Box<dyn IrqLine>> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).context("eventfd for an interrupt")?;
        self.fd.register_irqfd(&event, gsi).with_context(|| format!("KVM_IRQFD {gsi}"))?;
        Ok(Box::new(KernelLine { vm: self.fd.clone(), event, gsi }))
    }

    /// An input of the in-kernel controllers that is only ever held at levels, by KVM_IRQ_LINE's number for it.
    pub fn level(&self, number: u32) -> Box<dyn IrqLine> {
        Box::new(LevelLine { vm: self.fd.clone(), number })
    }

    /// Whether KVM_CREATE_DEVICE can make a device of this type here (KVM_DEV_TYPE_*); none is made.
    pub fn can_make(&self, kind: u32) -> bool {
        /// `_IOWR(KVMIO, 0xe0, struct kvm_create_device)`.
        const KVM_CREATE_DEVICE: u64 = 0xc00c_aee0;
        let mut device = kvm_create_device { type_: kind, fd: 0, flags: KVM_CREATE_DEVICE_TEST };
        // SAFETY: the structure is the one this call takes, and it lives as long as the call.
        unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_CREATE_DEVICE, &raw mut device) == 0 }
    }

    /// A new vCPU.
    ///
    /// # Errors
    /// KVM refuses it.
    pub fn vcpu(&self, id: u32) -> Result<Vcpu> {
        let fd = self
            .fd
            .create_vcpu(u64::from(id))
            .map_err(io::Error::from)
            .with_context(|| format!("KVM_CREATE_VCPU {id}"))?;
        Ok(Vcpu::new(fd, id, self.fd.run_size()))
    }
}

/// One 32-bit attribute of an in-kernel device.
///
/// # Errors
/// The device has no such attribute, or not while CPUs run.
pub fn device_word(device: &DeviceFd, group: u32, attr: u64) -> Result<u32> {
    let mut word = 0u32;
    let mut attribute = kvm_device_attr { flags: 0, group, attr, addr: (&raw mut word).expose_provenance() as u64 };
    // SAFETY: `addr` is that of `word`, which the attributes of this kind fill and which lives as long as the call.
    unsafe { device.get_device_attr(&mut attribute) }
        .map_err(io::Error::from)
        .with_context(|| format!("KVM_GET_DEVICE_ATTR {group} {attr:#x}"))?;
    Ok(word)
}

/// Edges go through an irqfd, one write each; a plain irqfd cannot hold a level, so levels go through KVM_IRQ_LINE.
struct KernelLine {
    vm: Arc<VmFd>,
    event: EventFd,
    gsi: u32,
}

impl IrqLine for KernelLine {
    fn pulse(&self) {
        // Fails only where 2^64 - 2 pulses wait.
        let _ = self.event.write(1);
    }

    fn set(&self, high: bool) {
        let _ = self.vm.set_irq_line(self.gsi, high);
    }
}

/// Needs no descriptor, and no controller yet when it is made.
struct LevelLine {
    vm: Arc<VmFd>,
    number: u32,
}

impl IrqLine for LevelLine {
    fn pulse(&self) {
        self.set(true);
        self.set(false);
    }

    fn set(&self, high: bool) {
        let _ = self.vm.set_irq_line(self.number, high);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_names_its_remedy() {
        let hint = |errno| cannot_open(&io::Error::from_raw_os_error(errno)).hint.unwrap_or_default();
        assert_eq!(hint(libc::ENOENT), crate::arch::NO_KVM);
        assert_eq!(cannot_open(&io::Error::from_raw_os_error(libc::EMFILE)).hint, None);
        assert_eq!(cannot_open(&io::Error::from_raw_os_error(libc::EACCES)).status, 125);
    }
}
