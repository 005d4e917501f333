//! The guest-physical address map of an x86-64 machine: a pure function of the configuration.
//!
//! Guest addresses are ABI: a change here changes what guests and snapshots see, so golden tests pin it. The shape is
//! the PC's: RAM from 0, a hole below 4 GiB for devices, the rest of RAM from 4 GiB on.

use anyhow::Result;
use kvm_ioctls::Kvm;

use crate::arch::map::{self, Layout, Region, mmio};
use crate::config::{Config, CpuMode, Space};
use crate::error::{refuse, usage};
use crate::memory::{Span, page_size};

/// Where RAM must end below 4 GiB; devices live from here to 4 GiB.
pub const HOLE: u64 = 0xc000_0000;
/// Where RAM goes on.
pub const ABOVE: u64 = 0x1_0000_0000;
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
/// Power-off register, 2 bytes: PM1a control as hobby kernels know it from QEMU.
pub const POWER_OFF: u64 = 0x604;

/// The largest RAM that the page tables' place has room for: 8 TiB.
const MAX_RAM: u64 = 8 << 40;

/// The map of the machine that `config` describes.
///
/// # Errors
/// RAM of no or of an odd size, or in a place where it cannot be; a debug console on top of something else.
pub fn layout(config: &Config) -> Result<Layout> {
    for (option, given) in [("--gic", config.gic.is_some()), ("--fdt-at", config.fdt_at.is_some())] {
        if given {
            return Err(usage(format!("{option} means nothing for an x86-64 machine")).into());
        }
    }
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
        pio(I8042_DATA, 1, "i8042 data"),
        pio(I8042_COMMAND, 1, "i8042 command"),
        pio(CMOS, 2, "CMOS clock"),
        pio(DEBUG_EXIT, 4, "debug exit"),
        pio(SERIAL, 8, "serial port"),
        pio(POWER_OFF, 2, "power off"),
    ];
    if config.irqchip != Some(crate::config::IrqChip::None) {
        regions.extend([
            mmio(IOAPIC, 0x1000, "I/O APIC"),
            mmio(LOCAL_APIC, 0x1000, "local APIC"),
            pio(0x20, 2, "PIC, primary"),
            pio(0x40, 4, "PIT"),
            pio(0x61, 1, "PIT channel 2 gate"),
            pio(0xa0, 2, "PIC, secondary"),
            pio(0x4d0, 2, "PIC edge/level"),
        ]);
    }
    Layout::new(config, ram, tables, regions)
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
    use crate::config::{IrqChip, Size};

    fn with(memory: u64) -> Config {
        Config { memory: Size(memory), ..Config::default() }
    }

    fn spans(config: &Config) -> Vec<(u64, u64)> {
        layout(config).unwrap().ram.iter().map(|s| (s.start, s.size)).collect()
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
