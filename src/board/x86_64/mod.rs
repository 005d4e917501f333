//! The PC's board, as little of it as guests expect.

use std::io;
use std::sync::OnceLock;

use anyhow::{Context, Result};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};

use super::Board;

use crate::arch::layout::{
    CMOS, DEBUG_EXIT, I8042_COMMAND, I8042_DATA, IDENTITY_MAP, POWER_OFF, SERIAL, SERIAL_IRQ, TSS,
};
use crate::arch::{self, Layout};
use crate::bus::{Builder, Space};
use crate::clock::HostClock;
use crate::config::{Config, Cpuid, IrqChip};
use crate::console::HostConsole;
use crate::device::cmos::Cmos;
use crate::device::debug_console::DebugConsole;
use crate::device::debug_exit::DebugExit;
use crate::device::i8042::I8042;
use crate::device::power_off::PowerOff;
use crate::device::serial::Serial;
use crate::irq::{IrqLine, Unconnected};
use crate::memory::{Memory, Span};
use crate::vcpu::Vcpu;
use crate::vm::{Vm, kvm};

/// KVM's own controllers have no descriptor of their own.
pub struct Irqchip;

/// Makes the in-kernel parts and the devices. Memory slots must be there already, vCPUs must not.
///
/// # Errors
/// KVM refuses a part, or a debug console lies on a device.
pub fn build(vm: &Vm, config: &Config, layout: &Layout, serial: HostConsole, debug: HostConsole) -> Result<Board> {
    vm.fd().set_identity_map_address(IDENTITY_MAP).map_err(io::Error::from).context("KVM_SET_IDENTITY_MAP_ADDR")?;
    let tss = usize::try_from(TSS).context("KVM_SET_TSS_ADDR")?;
    vm.fd().set_tss_address(tss).map_err(io::Error::from).context("KVM_SET_TSS_ADDR")?;
    let line: Box<dyn IrqLine> = if config.irqchip == Some(IrqChip::None) {
        Box::new(Unconnected)
    } else {
        vm.fd().create_irq_chip().map_err(io::Error::from).context("KVM_CREATE_IRQCHIP")?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.fd().create_pit2(pit).map_err(io::Error::from).context("KVM_CREATE_PIT2")?;
        vm.line(SERIAL_IRQ)?
    };
    let mut devices = Builder::default();
    let serial = devices.place(Space::Pio, Span { start: SERIAL, size: 8 }, Serial::new(Box::new(serial), line))?;
    devices.place(Space::Pio, Span { start: CMOS, size: 2 }, Cmos::new(Box::new(HostClock), &layout.ram))?;
    devices.place(Space::Pio, Span { start: DEBUG_EXIT, size: 4 }, DebugExit)?;
    devices.place(Space::Pio, Span { start: POWER_OFF, size: 2 }, PowerOff::default())?;
    let keyboard = devices.add(I8042::default());
    devices.attach(keyboard, Space::Pio, Span { start: I8042_DATA, size: 1 }, 0)?;
    devices.attach(keyboard, Space::Pio, Span { start: I8042_COMMAND, size: 1 }, 4)?;
    if let Some(at) = config.debugcon {
        devices.place(at.space, Span { start: at.addr, size: 1 }, DebugConsole::new(Box::new(debug)))?;
    }
    Ok(Board { buses: devices.finish(), serial, irqchip: Irqchip })
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
    let cpuid = kvm()?.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM_GET_SUPPORTED_CPUID")?;
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
    vcpus.iter().try_for_each(|vcpu| tell_cpuid(vcpu, config))
}

/// Whether a machine whose CPUs all said that they are halted for good may go on after all: what a halted CPU of a PC
/// says is true.
///
/// # Errors
/// None here.
pub fn can_wake(_board: &Board, _vcpus: &[Vcpu], _memory: &Memory) -> Result<bool> {
    Ok(false)
}

/// A PC has no device tree.
///
/// # Errors
/// None here.
pub fn device_tree(_config: &Config, _layout: &Layout) -> Result<Option<Vec<u8>>> {
    Ok(None)
}

fn tell_cpuid(vcpu: &Vcpu, config: &Config) -> Result<()> {
    let local_apic = config.irqchip != Some(IrqChip::None);
    let cpuid = arch::cpuid(supported_cpuid()?, vcpu.id(), config.cpus, local_apic);
    vcpu.fd()
        .set_cpuid2(&cpuid)
        .map_err(io::Error::from)
        .with_context(|| format!("KVM_SET_CPUID2 of CPU {}", vcpu.id()))
}
