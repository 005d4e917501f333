//! The guest-physical address map of an x86-64 machine: a pure function of the configuration.
//!
//! Guest addresses are ABI: a change here changes what guests and snapshots see, so golden tests pin it. The shape is
//! the PC's: RAM from 0, a hole below 4 GiB for devices, the rest of RAM from 4 GiB on.

use anyhow::Result;
use kvm_ioctls::Kvm;

use crate::arch::map::{self, Layout, Region, mmio};
use crate::config::{Config, CpuMode, Cpus, IrqChip, Platform, Space};
use crate::error::{Refusal, refuse, usage};
use crate::memory::{Span, page_size};

/// Where RAM must end below 4 GiB; devices live from here to 4 GiB.
pub const HOLE: u64 = 0xc000_0000;
/// Where RAM goes on.
pub const ABOVE: u64 = 0x1_0000_0000;
/// ECAM of the PCI bus (PCI Express 6.0 §7.2.2).
pub const PCI_ECAM: u64 = 0xc000_0000;
/// Virtio devices that are not on PCI: a page each.
pub const VIRTIO: u64 = 0xc800_0000;
/// The window of the PCI bus, where its functions' BARs lie.
pub const PCI_WINDOW: u64 = 0xd000_0000;
/// Bytes of it.
pub const PCI_WINDOW_SIZE: u64 = 0x1000_0000;
/// PCI's configuration mechanism #1.
pub const PCI_PORTS: u64 = 0xcf8;
/// GDT and page tables for guests that start in protected or long mode; not RAM, so that no guest is in their way.
pub const TABLES: u64 = 0xf800_0000;
/// I/O APIC (82093AA, also Intel SDM vol. 3 "APIC").
pub const IOAPIC: u64 = 0xfec0_0000;
/// Local APIC of each CPU (Intel SDM vol. 3 "Local APIC").
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// One page for KVM on Intel CPUs that cannot run real mode (KVM api.rst 4.41 KVM_SET_IDENTITY_MAP_ADDR).
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages for the same purpose (KVM api.rst 4.40 KVM_SET_TSS_ADDR).
pub const TSS: u64 = 0xfffb_d000;

/// 16550 serial port, interrupt 4.
pub const SERIAL: u64 = 0x3f8;
/// ISA interrupt of the serial port.
pub const SERIAL_IRQ: u32 = 4;
/// Debug-exit register, 4 bytes.
pub const DEBUG_EXIT: u64 = 0xf4;
/// Keyboard controller: data, and command or status.
pub const I8042_DATA: u64 = 0x60;
/// Its command and status register.
pub const I8042_COMMAND: u64 = 0x64;
/// CMOS clock: index and data.
pub const CMOS: u64 = 0x70;
/// ACPI's registers for sleep, reset and events.
pub const POWER: u64 = 0x608;
/// Bytes of them.
pub const POWER_SIZE: u64 = 5;
/// Their interrupt.
pub const POWER_IRQ: u32 = 9;
/// pvpanic, where QEMU has it.
pub const PVPANIC: u64 = 0x505;
/// The ACPI tables: where a PC's firmware has its ROM, and where the RSDP is looked for (ACPI 6.5 §5.2.5.1).
pub const ACPI: u64 = 0xe_0000;
/// The generation id: 16 bytes that are others each time that the machine begins or goes on from a snapshot. In the same
/// place, which no guest that knows of tables takes for RAM.
pub const GENERATION: u64 = 0xf_fe00;
/// Power-off register, 2 bytes: PM1a control as hobby kernels know it from QEMU.
pub const POWER_OFF: u64 = 0x604;

/// The largest RAM that the page tables' place has room for: 8 TiB.
const MAX_RAM: u64 = 8 << 40;

/// The map of the machine that `config` describes.
///
/// # Errors
/// RAM of no or of an odd size, or in a place where it cannot be; a debug console on top of something else.
pub fn layout(config: &Config) -> Result<Layout> {
    let options = [
        ("--gic", config.gic.is_some()),
        ("--msi", config.msi.is_some()),
        ("--cpu-features", !config.cpu_features.is_empty()),
        ("--fdt-at", config.fdt_at.is_some()),
    ];
    for (option, given) in options {
        if given {
            return Err(usage(format!("{option} means nothing for an x86-64 machine")).into());
        }
    }
    check_topology(config.cpus)?;
    let ram = ram_spans(config)?;
    let tables = match config.cpu_mode {
        None | Some(CpuMode::Real) => None,
        Some(mode @ CpuMode::El1) => return Err(usage(format!("--cpu-mode {mode} is not one of an x86-64 CPU")).into()),
        Some(CpuMode::Protected) => Some(Span { start: TABLES, size: page_size() }),
        Some(CpuMode::Long) => Some(Span { start: TABLES, size: super::boot::long_mode_tables_size(&ram) }),
    };
    let pio = |start, size, name| Region { space: Space::Pio, span: Span { start, size }, name };
    let mut regions = vec![
        mmio(IDENTITY_MAP, 0x1000, "KVM identity map"),
        mmio(TSS, 0x3000, "KVM task state segment"),
        pio(CMOS, 2, "CMOS clock"),
        pio(DEBUG_EXIT, 4, "debug exit"),
        pio(SERIAL, 8, "serial port"),
        pio(POWER_OFF, 2, "power off"),
    ];
    if config.platform == Some(Platform::Acpi) {
        regions.extend([pio(POWER, POWER_SIZE, "ACPI power registers"), pio(PVPANIC, 1, "pvpanic")]);
    } else {
        regions.extend([pio(I8042_DATA, 1, "i8042 data"), pio(I8042_COMMAND, 1, "i8042 command")]);
    }
    if config.irqchip != Some(IrqChip::None) {
        regions.extend([mmio(IOAPIC, 0x1000, "I/O APIC"), mmio(LOCAL_APIC, 0x1000, "local APIC")]);
    }
    if matches!(config.irqchip, None | Some(IrqChip::Kernel)) {
        regions.extend([
            pio(0x20, 2, "PIC, primary"),
            pio(0x40, 4, "PIT"),
            pio(0x61, 1, "PIT channel 2 gate"),
            pio(0xa0, 2, "PIC, secondary"),
            pio(0x4d0, 2, "PIC edge/level"),
        ]);
    }
    if config.has_pci() {
        let ecam = match config.platform {
            Some(Platform::Acpi) => "PCI configuration (ECAM; segment 1 to ACPI)",
            _ => "PCI configuration (ECAM)",
        };
        regions.extend([
            mmio(PCI_ECAM, map::PCI_ECAM_SIZE, ecam),
            mmio(PCI_WINDOW, PCI_WINDOW_SIZE, "PCI window"),
            pio(PCI_PORTS, 8, "PCI configuration"),
        ]);
    }
    regions.extend(map::virtio_pages(config, VIRTIO));
    Layout::new(config, ram, tables, None, regions)
}

/// A CPU's number is its APIC id, in which thread, core and package have whole bits (SDM vol. 3, 10.9.2); so only the
/// last of them may be no power of two.
fn check_topology(cpus: Cpus) -> Result<(), Refusal> {
    let Cpus { sockets, cores, threads } = cpus;
    let odd = |number: u32| !number.is_power_of_two();
    if cpus.count() > 0 && (odd(threads) || sockets > 1 && odd(cores)) {
        let what = format!("--cpus {cpus}: threads, and with several sockets cores, must be a power of two");
        return Err(usage(what).hint("APIC ids have whole bits for each"));
    }
    Ok(())
}

/// The kind of virtual machine that KVM_CREATE_VM is asked for: the usual one.
///
/// # Errors
/// None here.
pub fn vm_type(_kvm: &Kvm, _layout: &Layout) -> Result<u64> {
    Ok(0)
}

fn ram_spans(config: &Config) -> Result<Vec<Span>> {
    let (size, base) = map::ram(config, MAX_RAM)?;
    let base = base.unwrap_or(0);
    if (HOLE..ABOVE).contains(&base) {
        return Err(usage(format!("--ram-base {base:#x} lies in the device hole, {HOLE:#x}..={:#x}", ABOVE - 1)).into());
    }
    let Some(all) = Span::new(base, size).filter(|s| s.last() < 1 << 46) else {
        return Err(refuse(format!(
            "RAM of {size} bytes at {base:#x} ends beyond 2^46, the last address a machine of Bantam's has"
        ))
        .into());
    };
    if base >= ABOVE || all.last() < HOLE {
        return Ok(vec![all]);
    }
    let below = HOLE - base;
    Ok(vec![Span { start: base, size: below }, Span { start: ABOVE, size: size - below }])
}

/// One past the last byte of RAM below 4 GiB, if there is RAM there: the first stack.
pub fn top_below_4g(layout: &Layout) -> Option<u64> {
    layout.ram.iter().filter(|s| s.last() < ABOVE).map(|s| s.start + s.size).max()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Size;

    fn with(memory: u64) -> Config {
        Config { memory: Size(memory), ..Config::default() }
    }

    fn spans(config: &Config) -> Vec<(u64, u64)> {
        layout(config).unwrap().ram.iter().map(|s| (s.start, s.size)).collect()
    }

    #[test]
    fn cpus_whose_numbers_are_no_apic_ids_are_refused() {
        let fits = |cpus: &str| layout(&Config { cpus: cpus.parse().unwrap(), ..with(4096) }).is_ok();
        assert!(["1", "7", "sockets=3,cores=4,threads=2", "cores=3,threads=2"].into_iter().all(fits));
        assert!(!["threads=3", "sockets=2,cores=3"].into_iter().any(fits));
    }

    #[test]
    fn ram_is_split_by_the_hole_below_4_gib() {
        assert_eq!(spans(&with(4096)), [(0, 4096)]);
        assert_eq!(spans(&with(512_000_000)), [(0, 512_000_000)]);
        assert_eq!(spans(&with(3 << 30)), [(0, 3 << 30)]);
        assert_eq!(spans(&with((3 << 30) + 4096)), [(0, 3 << 30), (4 << 30, 4096)]);
        assert_eq!(spans(&with(6 << 30)), [(0, 3 << 30), (4 << 30, 3 << 30)]);
        let based = Config { ram_base: Some(crate::config::Addr(0x1000)), ..with(4096) };
        assert_eq!(spans(&based), [(0x1000, 4096)]);
        let high = Config { ram_base: Some(crate::config::Addr(8 << 30)), ..with(4096) };
        assert_eq!(spans(&high), [(8 << 30, 4096)]);
    }

    #[test]
    fn sizes_and_places_that_cannot_be_are_refused() {
        for size in [0, 1, 4095, 4097, u64::MAX, 1 << 50] {
            assert!(layout(&with(size)).is_err(), "{size}");
        }
        for base in [0x800, HOLE, ABOVE - 4096, u64::MAX - 4095] {
            assert!(layout(&Config { ram_base: Some(crate::config::Addr(base)), ..with(4096) }).is_err(), "{base:#x}");
        }
    }

    #[test]
    fn nothing_overlaps_whatever_the_configuration() {
        for mode in [None, Some(CpuMode::Real), Some(CpuMode::Protected), Some(CpuMode::Long)] {
            for irqchip in [None, Some(IrqChip::None)] {
                for memory in [4096, 3 << 30, 8 << 40] {
                    let map = layout(&Config { cpu_mode: mode, irqchip, ..with(memory) }).unwrap();
                    for (i, a) in map.regions.iter().enumerate() {
                        for b in &map.regions[i + 1..] {
                            assert!(a.space != b.space || !a.span.overlaps(&b.span), "{a:?} {b:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_debug_console_on_top_of_something_is_refused() {
        for place in ["pio:0x3f8", "pio:0x71", "mmio:0x996", "mmio:0xfee00000"] {
            assert!(layout(&Config { debugcon: Some(place.parse().unwrap()), ..with(4096) }).is_err(), "{place}");
        }
        let based = Config {
            ram_base: Some(crate::config::Addr(0x10000)),
            debugcon: Some("mmio:0x996".parse().unwrap()),
            ..with(4096)
        };
        assert!(layout(&based).is_ok());
    }
}
