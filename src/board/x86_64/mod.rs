//! The PC's board, as little of it as guests expect.

mod acpi;

use std::collections::BTreeMap;
use std::io;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result};
use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_pit_config,
};
use kvm_ioctls::VcpuFd;

pub use self::acpi::firmware;
use super::virtio::{self, INTX, Sockets};
use super::{Board, Chosen, PowerButton, Wires};

pub use crate::arch::SavedVm;
use crate::arch::layout::{
    ACPI, CMOS, DEBUG_EXIT, GENERATION, I8042_COMMAND, I8042_DATA, IDENTITY_MAP, IOAPIC, PCI_PORTS, POWER, POWER_IRQ,
    POWER_OFF, POWER_SIZE, PVPANIC, SERIAL, SERIAL_IRQ, TSS,
};
use crate::arch::{self, Layout};
use crate::bus::{Builder, Space};
use crate::clock::HostClock;
use crate::config::{Config, Cpuid, IrqChip, Platform};
use crate::device::cmos::{self, Cmos};
use crate::device::debug_console::DebugConsole;
use crate::device::debug_exit::DebugExit;
use crate::device::i8042::I8042;
use crate::device::ioapic::{IoApic, Message, Messages, PINS};
use crate::device::power::{Button, Power};
use crate::device::power_off::PowerOff;
use crate::device::pvpanic::PvPanic;
use crate::device::serial::{self, Serial};
use crate::explain::{Outcome, call};
use crate::host::random;
use crate::irq::{IrqLine, Shared, Unconnected};
use crate::memory::{Memory, Span};
use crate::vcpu::Vcpu;
use crate::vm::{KernelMessages, Vm, kvm};

/// The console that Linux is told of.
pub const LINUX_CONSOLE: &str = "console=ttyS0";
/// What it is told besides: not to look for what this machine has not. Of PCI that is, before ACPI says where it is, the
/// chipsets with flaws that Linux goes round; of the serial port, more of them, and a transmitter that forgets its interrupt.
pub fn linux_arguments(config: &Config) -> Vec<&'static str> {
    vec!["8250.nr_uarts=1", "8250.skip_txen_test=1", if config.has_pci() { "pci=noearly" } else { "pci=off" }]
}

/// The I/O APIC's inputs of PCI's INTx, and the numbers that a PC without ACPI reads for them.
pub const INTX_INPUTS: [u32; INTX] = [16, 17, 18, 19];
const INTX_LEGACY: [u32; INTX] = [10, 11, 10, 11];

/// Registers whose writes do nothing until another register of the device is asked for. A trace shows them when they happen,
/// so they make exits then.
const POSTPONED: [Span; 2] =
    [Span { start: CMOS + cmos::INDEX, size: 1 }, Span { start: SERIAL + serial::LINE_CONTROL, size: 1 }];
/// The same, where there is PCI.
const PCI_ADDRESS: Span = Span { start: PCI_PORTS, size: 4 };

/// KVM's own controllers have no descriptor of their own.
pub struct Irqchip;

/// Makes the in-kernel parts and the devices. Memory slots must be there already, vCPUs must not.
///
/// # Errors
/// KVM refuses a part, or a debug console lies on a device.
pub fn build(vm: &Vm, config: &Config, layout: &Layout, wires: Wires) -> Result<Board> {
    let Wires { serial, debug, ends } = wires;
    let why = "One page that KVM wants on Intel CPUs which cannot run real mode by themselves; before any CPU exists.";
    call(
        "KVM_SET_IDENTITY_MAP_ADDR",
        || (format!("{IDENTITY_MAP:#x}"), why),
        || vm.fd().set_identity_map_address(IDENTITY_MAP),
    )
    .map_err(io::Error::from)
    .context("KVM_SET_IDENTITY_MAP_ADDR")?;
    let tss = usize::try_from(TSS).context("KVM_SET_TSS_ADDR")?;
    let why = "Three pages for the same purpose: a task state segment. Both lie where no guest looks.";
    call("KVM_SET_TSS_ADDR", || (format!("{TSS:#x}"), why), || vm.fd().set_tss_address(tss))
        .map_err(io::Error::from)
        .context("KVM_SET_TSS_ADDR")?;
    // A slot is made before in-kernel devices.
    let acpi = config.platform == Some(Platform::Acpi);
    // ACPI alone tells a guest of it.
    let mirror = if acpi { virtio::mirror(vm, config) } else { None };
    let lines = match config.irqchip {
        Some(IrqChip::None) => Inputs::None,
        Some(IrqChip::Split) => Inputs::Split(split(vm)?),
        _ => in_kernel(vm)?,
    };
    let (line, power_line) = (lines.edge(vm, SERIAL_IRQ)?, lines.level(vm, POWER_IRQ));
    let sockets = Sockets { mirror, ..sockets(vm, config, &lines) };
    let mut devices = Builder::default();
    if let Inputs::Split(chip) = lines {
        let id = devices.place(Space::Mmio, Span { start: IOAPIC, size: 0x1000 }, chip)?;
        devices.hears_ends(id);
    }
    let serial = devices.place(Space::Pio, Span { start: SERIAL, size: 8 }, Serial::new(Box::new(serial), line))?;
    devices.place(Space::Pio, Span { start: CMOS, size: 2 }, Cmos::new(Box::new(HostClock), &layout.ram))?;
    devices.place(Space::Pio, Span { start: DEBUG_EXIT, size: 4 }, DebugExit)?;
    devices.place(Space::Pio, Span { start: POWER_OFF, size: 2 }, PowerOff::default())?;
    let mut power = None;
    if acpi {
        let button = Button::default();
        let device = Power::new(button.clone(), power_line);
        let device = devices.place(Space::Pio, Span { start: POWER, size: POWER_SIZE }, device)?;
        power = Some(PowerButton { device, button, certain: false });
        devices.place(Space::Pio, Span { start: PVPANIC, size: 1 }, PvPanic)?;
    } else {
        let keyboard = devices.add(I8042::default());
        devices.attach(keyboard, Space::Pio, Span { start: I8042_DATA, size: 1 }, 0)?;
        devices.attach(keyboard, Space::Pio, Span { start: I8042_COMMAND, size: 1 }, 4)?;
    }
    if let Some(at) = config.debugcon {
        devices.place(at.space, Span { start: at.addr, size: 1 }, DebugConsole::new(Box::new(debug)))?;
    }
    let bench = virtio::place(vm, config, ends, sockets, &mut devices)?;
    if acpi && config.trace.is_none() {
        let pci = config.has_pci().then_some(PCI_ADDRESS);
        POSTPONED.into_iter().chain(pci).for_each(|ports| vm.postpone(Space::Pio, ports));
    }
    Ok(Board { buses: devices.finish(), serial, bench, power, irqchip: Irqchip })
}

/// A PC's interrupt controllers, inside KVM.
fn in_kernel(vm: &Vm) -> Result<Inputs> {
    let why = "A PC's interrupt controllers (two 8259A, an I/O APIC, a local APIC for each CPU), inside KVM.";
    call("KVM_CREATE_IRQCHIP", || (String::new(), why), || vm.fd().create_irq_chip())
        .map_err(io::Error::from)
        .context("KVM_CREATE_IRQCHIP")?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    let why = "A PC's interval timer (8254), inside KVM; port 0x61 is answered there too.";
    call("KVM_CREATE_PIT2", || ("flags KVM_PIT_SPEAKER_DUMMY".into(), why), || vm.fd().create_pit2(pit))
        .map_err(io::Error::from)
        .context("KVM_CREATE_PIT2")?;
    Ok(Inputs::Kernel)
}

/// The inputs of the interrupt controllers, wherever these are.
enum Inputs {
    None,
    Kernel,
    Split(IoApic),
}

impl Inputs {
    fn edge(&self, vm: &Vm, number: u32) -> Result<Box<dyn IrqLine>> {
        match self {
            Self::Kernel => vm.line(number),
            other => Ok(other.level(vm, number)),
        }
    }

    fn level(&self, vm: &Vm, number: u32) -> Box<dyn IrqLine> {
        match self {
            Self::None => Box::new(Unconnected),
            Self::Kernel => vm.level(number),
            Self::Split(chip) => chip.line(number as usize),
        }
    }
}

/// What virtio devices are plugged into.
fn sockets(vm: &Vm, config: &Config, inputs: &Inputs) -> Sockets {
    let acpi = config.platform == Some(Platform::Acpi);
    let numbers = if acpi { INTX_INPUTS } else { INTX_LEGACY };
    let there = !matches!(inputs, Inputs::None) && config.virtio_devices() > 0;
    let shared = |number: &u32| (*number, Shared::new(inputs.level(vm, *number)));
    let made: BTreeMap<_, _> = numbers.iter().filter(|_| there).map(shared).collect();
    if there && matches!(inputs, Inputs::Kernel) {
        vm.routes().set_inputs(kernel_inputs(), true);
    }
    Sockets {
        lines: numbers.iter().filter_map(|number| made.get(number).cloned()).collect(),
        numbers: numbers.map(|number| number.to_le_bytes()[0]),
        messages: there,
        senders: false,
        ports: Some(PCI_PORTS),
        mirror: None,
    }
}

/// The routes that KVM_CREATE_IRQCHIP makes: each input of the I/O APIC, and the first 16 to the 8259As too.
fn kernel_inputs() -> Vec<kvm_irq_routing_entry> {
    let entry = |gsi, irqchip, pin| kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 { irqchip: kvm_irq_routing_irqchip { irqchip, pin } },
        ..Default::default()
    };
    let both =
        (0..16).map(|gsi| entry(gsi, if gsi < 8 { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE }, gsi % 8));
    both.chain((0..PINS as u32).map(|gsi| entry(gsi, KVM_IRQCHIP_IOAPIC, gsi))).collect()
}

/// Local APICs in KVM, and an I/O APIC of ours in front of them.
fn split(vm: &Vm) -> Result<IoApic> {
    let mut cap = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    if let Some(pins) = cap.args.first_mut() {
        *pins = PINS as u64;
    }
    let why = "Each CPU gets its local APIC in KVM; the I/O APIC is Bantam's, and sends it messages.";
    call("KVM_ENABLE_CAP", || (format!("KVM_CAP_SPLIT_IRQCHIP, {PINS} inputs"), why), || vm.fd().enable_cap(&cap))
        .map_err(io::Error::from)
        .context("KVM_CAP_SPLIT_IRQCHIP")?;
    Ok(IoApic::new(Box::new(vm.messages())))
}

impl Messages for KernelMessages {
    fn send(&self, Message { address, data }: Message) -> bool {
        KernelMessages::send(self, address, data)
    }

    fn expect_ends(&self, inputs: &[(usize, Message)]) {
        // There are 24.
        KernelMessages::expect_ends(self, inputs.iter().map(|(pin, sent)| (*pin as u32, sent.address, sent.data)));
    }
}

impl Outcome for CpuId {
    fn show(&self) -> String {
        format!("{} entries", self.as_slice().len())
    }
}

/// The CPUID that KVM supports, asked once a process: each leaf is a trap on a virtual host.
///
/// # Errors
/// KVM refuses.
fn supported_cpuid() -> Result<&'static CpuId> {
    static CPUID: OnceLock<CpuId> = OnceLock::new();
    if let Some(cpuid) = CPUID.get() {
        return Ok(cpuid);
    }
    let kvm = kvm()?;
    let why = "What the CPUID instruction can say in a guest on this host.";
    let cpuid =
        call("KVM_GET_SUPPORTED_CPUID", || (String::new(), why), || kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES))
            .context("KVM_GET_SUPPORTED_CPUID")?;
    Ok(CPUID.get_or_init(|| cpuid))
}

/// What only the host can say of a machine that `config` leaves open: nothing here.
///
/// # Errors
/// None here.
pub fn choose(_vm: &Vm, config: &Config) -> Result<Config> {
    Ok(config.clone())
}

/// Tells each vCPU who it is.
///
/// # Errors
/// KVM refuses its CPUID.
pub fn prepare(_vm: &Vm, vcpus: &[Vcpu], config: &Config, _board: &mut Board) -> Result<()> {
    if config.cpuid == Some(Cpuid::None) {
        return Ok(());
    }
    let local_apic = config.irqchip != Some(IrqChip::None);
    // The frequency is the same for all.
    let why = "How fast the guest's time-stamp counter runs, for CPUID to tell.";
    let khz = |vcpu: &Vcpu| call("KVM_GET_TSC_KHZ", || (String::new(), why), || vcpu.fd().get_tsc_khz()).ok();
    let tsc_khz = vcpus.first().and_then(khz);
    for vcpu in vcpus {
        tell_cpuid(vcpu, arch::Identity { id: vcpu.id(), cpus: config.cpus, local_apic, tsc_khz })?;
        if config.platform == Some(Platform::Acpi) {
            arch::as_firmware_leaves_it(vcpu.fd(), local_apic, config.irqchip != Some(IrqChip::Split))
                .with_context(|| format!("CPU {}", vcpu.id()))?;
        }
    }
    Ok(())
}

/// What this host's KVM has to solder on: its capabilities say all of it.
pub fn host_facts(_vm: &Vm) -> Vec<(&'static str, String)> {
    Vec::new()
}

/// Whether a machine whose CPUs all said that they are halted for good may go on after all: what a halted CPU of a PC
/// says is true.
///
/// # Errors
/// None here.
pub fn can_wake(_board: &Board, _vcpus: &[Vcpu], _memory: &Memory) -> Result<bool> {
    Ok(false)
}

/// Has a machine that goes on from a snapshot be another one than that which was written, where its guest knows of that:
/// such a guest makes new random numbers as soon as it has taken the interrupt that tells it.
///
/// # Errors
/// The host has no random numbers.
pub fn renew(board: &Board, memory: &Memory) -> Result<()> {
    let mut root = [0; 8];
    let tables = memory.read(ACPI, &mut root).is_ok() && root == *b"RSD PTR ";
    if let Some(power) = board.power.as_ref().filter(|_| tables) {
        memory.write(GENERATION, &random::<16>()?)?;
        power.button.renew();
        board.serve(power);
    }
    Ok(())
}

/// Reads the state of what KVM emulates besides CPUs: all of it belongs to the machine's own descriptor.
///
/// # Errors
/// KVM refuses.
pub fn save_vm(vm: &Vm, cpus: &[&VcpuFd], _board: &Board, irqchip: Option<IrqChip>) -> Result<SavedVm> {
    arch::save_vm(vm.fd(), cpus, irqchip)
}

/// Sets that state.
///
/// # Errors
/// KVM refuses, or the state is not one of this version's.
pub fn load_vm(vm: &Vm, cpus: &[&VcpuFd], _board: &Board, (saved, passed): (&SavedVm, Duration)) -> Result<()> {
    arch::load_vm(vm.fd(), cpus, saved, passed)
}

/// A PC has no device tree.
///
/// # Errors
/// None here.
pub fn device_tree(_config: &Config, _layout: &Layout, _chosen: &Chosen) -> Result<Option<Vec<u8>>> {
    Ok(None)
}

fn tell_cpuid(vcpu: &Vcpu, identity: arch::Identity) -> Result<()> {
    let cpuid = arch::cpuid(supported_cpuid()?, identity);
    let why = "What the CPUID instruction says on this CPU: the host's answers, with this CPU's number in them.";
    let fields = || (format!("vCPU {}, {} entries", vcpu.id(), cpuid.as_slice().len()), why);
    call("KVM_SET_CPUID2", fields, || vcpu.fd().set_cpuid2(&cpuid))
        .map_err(io::Error::from)
        .with_context(|| format!("KVM_SET_CPUID2 of CPU {}", vcpu.id()))
}
