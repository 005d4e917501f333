//! `/dev/kvm` and one virtual machine: memory slots, interrupt lines, vCPUs.
//!
//! Invariant: every memory slot is registered before any in-kernel device exists (5–8 ms each otherwise on some
//! kernels), which `machine::build` sees to by its order.

#![allow(unsafe_code)]

mod routes;
mod shown;

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result};
use kvm_bindings::{
    KVM_API_VERSION, KVM_CREATE_DEVICE_TEST, kvm_create_device, kvm_device_attr, kvm_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, DeviceFd, IoEventAddress, Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

pub use self::routes::Routes;
use self::routes::message;
pub use self::shown::Shown;
use crate::bus::Space;
use crate::error::{Refusal, refuse};
use crate::explain::{call, tell};
use crate::host::sys::eventfd;
use crate::irq::IrqLine;
use crate::memory::{Memory, Span};
use crate::vcpu::{Late, Vcpu};

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
    let open =
        "The kernel's hypervisor is a device. Every other call is made on this descriptor, or on one that it leads to.";
    let kvm = call("open", || (DEV_KVM.into(), open), Kvm::new).map_err(|e| cannot_open(&e.into()))?;
    let version = "12 since Linux 2.6.22, and for good: new things are capabilities, asked for one by one.";
    let ask = || Ok::<_, kvm_ioctls::Error>(kvm.get_api_version());
    let version = call("KVM_GET_API_VERSION", || (String::new(), version), ask).unwrap_or(0);
    if version != KVM_API_VERSION.cast_signed() {
        return Err(refuse(format!("{DEV_KVM} has API version {version}, Bantam needs {KVM_API_VERSION}")).into());
    }
    for (cap, name) in REQUIRED {
        let why = "What no machine of Bantam's can do without.";
        let there = || Ok::<_, kvm_ioctls::Error>(kvm.check_extension(cap));
        if !call("KVM_CHECK_EXTENSION", || (name.into(), why), there).unwrap_or(false) {
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
    routes: Arc<Routes>,
    /// Some writes come late, and the ring that they come in.
    postpones: AtomicBool,
    late: OnceLock<Arc<Late>>,
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
            let why = "A machine, with no memory, no CPU and no device yet; its descriptor takes the calls that give it those.";
            match call("KVM_CREATE_VM", || (format!("type {kind}"), why), || kvm.create_vm_with_type(kind)) {
                Ok(fd) => {
                    let fd = Arc::new(fd);
                    let routes = Routes::new(fd.clone());
                    return Ok(Self { fd, routes, postpones: AtomicBool::new(false), late: OnceLock::new() });
                }
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
            let why =
                "The guest's RAM is memory of this process: KVM maps guest-physical addresses to it. All else exits.";
            let fields = || {
                let host = format!("userspace_addr {userspace_addr:#x}");
                (
                    format!("slot {slot}, guest_phys_addr {guest_phys_addr:#x}, memory_size {memory_size:#x}, {host}"),
                    why,
                )
            };
            // SAFETY: `memory` keeps the mapping; the machine keeps a clone of `memory` as long as its vCPUs exist.
            let set = || unsafe { self.fd.set_user_memory_region(region) };
            call("KVM_SET_USER_MEMORY_REGION", fields, set).map_err(io::Error::from).with_context(|| {
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
        let event = eventfd().context("eventfd for an interrupt")?;
        let why = "A write to this eventfd raises the interrupt, from any thread, without a call into KVM's machine.";
        let fields = || (format!("gsi {gsi}, fd {}", event.as_raw_fd()), why);
        call("KVM_IRQFD", fields, || self.fd.register_irqfd(&event, gsi))
            .with_context(|| format!("KVM_IRQFD {gsi}"))?;
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
        let why =
            "A CPU. Its descriptor takes the calls on registers, and KVM_RUN; a thread of ours lends it its time.";
        let fd = call("KVM_CREATE_VCPU", || (format!("id {id}"), why), || self.fd.create_vcpu(u64::from(id)))
            .map_err(io::Error::from)
            .with_context(|| format!("KVM_CREATE_VCPU {id}"))?;
        let size = self.fd.run_size();
        let why = "A page shared with KVM: why KVM_RUN returned, and the data of port and memory accesses.";
        tell("mmap kvm_run", || format!("{size} bytes (KVM_GET_VCPU_MMAP_SIZE)"), why);
        let late = self.postpones.load(Ordering::Relaxed).then(|| self.late(&fd)).transpose()?;
        Ok(Vcpu::new(fd, id, size, late))
    }

    /// Lets writes that lie in `at` come with the CPU's next exit, instead of being one. Before there are vCPUs.
    pub fn postpone(&self, space: Space, at: Span) {
        // An older KVM would take a port for an address in memory.
        let (cap, place, address) = match space {
            Space::Pio => (Cap::CoalescedPio, "port", IoEventAddress::Pio(at.start)),
            Space::Mmio => (Cap::CoalescedMmio, "address", IoEventAddress::Mmio(at.start)),
        };
        let Ok(size) = u32::try_from(at.size) else { return };
        if !kvm().is_ok_and(|kvm| kvm.check_extension(cap)) {
            return;
        }
        let why =
            "A write there does nothing by itself. KVM keeps it, and Bantam carries it out at the CPU's next exit.";
        let fields = || (format!("{place} {:#x}, size {size}", at.start), why);
        let set = || self.fd.register_coalesced_mmio(address, size);
        if call("KVM_REGISTER_COALESCED_MMIO", fields, set).is_ok() {
            self.postpones.store(true, Ordering::Relaxed);
        }
    }

    /// The one ring of all vCPUs; `fd` is one of them.
    fn late(&self, fd: &VcpuFd) -> Result<Arc<Late>> {
        if let Some(late) = self.late.get() {
            return Ok(late.clone());
        }
        let late = Late::new(fd).context("the ring of late writes")?;
        tell("mmap ring", || "1 page".into(), "The writes that KVM keeps; one page of a machine, reached by any CPU.");
        Ok(self.late.get_or_init(|| Arc::new(late)).clone())
    }
}

/// The wire from an I/O APIC of Bantam's to the local APICs in KVM.
pub struct KernelMessages {
    vm: Arc<VmFd>,
    routes: Arc<Routes>,
}

impl Vm {
    /// A wire to the local APICs in KVM.
    pub fn messages(&self) -> KernelMessages {
        KernelMessages { vm: self.fd.clone(), routes: self.routes.clone() }
    }
}

impl KernelMessages {
    /// Sends a message to local APICs; false where none took it.
    pub fn send(&self, address: u64, data: u32) -> bool {
        let [low, high] = halves(address);
        self.vm
            .signal_msi(kvm_msi { address_lo: low, address_hi: high, data, ..Default::default() })
            .is_ok_and(|taken| taken > 0)
    }

    /// Has KVM report the ends of these interrupts: it looks for their vectors in the routes of the I/O APIC's inputs.
    pub fn expect_ends(&self, inputs: impl Iterator<Item = (u32, u64, u32)>) {
        // At most 24; and a guest that gets no ends of interrupt has an interrupt that comes once.
        self.routes.set_inputs(inputs.map(|(gsi, address, data)| message(gsi, address, data, None)).collect(), false);
    }
}

fn halves(value: u64) -> [u32; 2] {
    [(value & 0xffff_ffff) as u32, (value >> 32) as u32]
}

/// One 32-bit attribute of an in-kernel device.
///
/// # Errors
/// The device has no such attribute, or not while CPUs run.
pub fn device_word(device: &DeviceFd, group: u32, attr: u64) -> Result<u32> {
    let mut word = 0u32;
    ask_device(device, group, attr, (&raw mut word).expose_provenance())?;
    Ok(word)
}

/// One 64-bit attribute of an in-kernel device.
///
/// # Errors
/// The device has no such attribute, or not while CPUs run.
pub fn device_double(device: &DeviceFd, group: u32, attr: u64) -> Result<u64> {
    let mut double = 0u64;
    ask_device(device, group, attr, (&raw mut double).expose_provenance())?;
    Ok(double)
}

/// Has KVM write an attribute to `place`, which must be as wide as the attributes of this group are.
fn ask_device(device: &DeviceFd, group: u32, attr: u64, place: usize) -> Result<()> {
    let mut attribute = kvm_device_attr { flags: 0, group, attr, addr: place as u64 };
    // SAFETY: `place` is that of a variable of the callers above, as wide as they say, which outlives the call.
    unsafe { device.get_device_attr(&mut attribute) }
        .map_err(io::Error::from)
        .with_context(|| format!("KVM_GET_DEVICE_ATTR {group} {attr:#x}"))
}

/// Edges go through an irqfd, one write each; a plain irqfd cannot hold a level, so levels go through KVM_IRQ_LINE.
struct KernelLine {
    vm: Arc<VmFd>,
    event: EventFd,
    gsi: u32,
}

impl IrqLine for KernelLine {
    fn pulse(&self) {
        crate::irq::count();
        // Fails only where 2^64 - 2 pulses wait.
        let _ = self.event.write(1);
    }

    fn set(&self, high: bool) {
        if high {
            crate::irq::count();
        }
        let _ = self.vm.set_irq_line(self.gsi, high);
    }
}

/// Needs no descriptor, and no controller yet when it is made.
struct LevelLine {
    vm: Arc<VmFd>,
    number: u32,
}

impl IrqLine for LevelLine {
    fn set(&self, high: bool) {
        if high {
            crate::irq::count();
        }
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
