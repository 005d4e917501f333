//! The guest-physical address map of an arm64 machine: a pure function of the configuration.
//!
//! Devices lie between 128 MiB and 1 GiB, RAM from 1 GiB on. What QEMU's `virt` machine has too lies where it has it, so
//! that guests written for that machine find it.

use anyhow::Result;
use kvm_ioctls::{Cap, Kvm};

use crate::arch::map::{self, Layout, mmio};
use crate::config::{Config, CpuFeature, Cpuid, Gic, IrqChip, Msi, Size, Space};
use crate::error::{Refusal, refuse, usage};
use crate::memory::Span;

/// Devices live from here …
pub const DEVICES: u64 = 0x0800_0000;
/// … to RAM.
pub const RAM: u64 = 0x4000_0000;
/// The GIC's distributor, 64 KiB (4 KiB of it used by GICv2).
pub const GIC_DISTRIBUTOR: u64 = 0x0800_0000;
/// Of the distributor.
pub const GIC_DISTRIBUTOR_SIZE: u64 = 0x1_0000;
/// GICv2: each CPU's own interface.
pub const GIC_CPU: u64 = 0x0801_0000;
/// Of the CPU interface.
pub const GIC_CPU_SIZE: u64 = 0x2000;
/// GICv3's Interrupt Translation Service: a frame of registers, one that messages are written to.
pub const GIC_ITS: u64 = 0x0808_0000;
/// Of the two.
pub const GIC_ITS_SIZE: u64 = 0x2_0000;
/// GICv3: one redistributor after the other.
pub const GIC_REDISTRIBUTOR: u64 = 0x080a_0000;
/// Of one redistributor: a frame for itself, one for SGIs and PPIs.
pub const GIC_REDISTRIBUTOR_SIZE: u64 = 0x2_0000;
/// PL011 serial port.
pub const SERIAL: u64 = 0x0900_0000;
/// Its shared peripheral interrupt, counted from 0 (interrupt id 32).
pub const SERIAL_SPI: u32 = 1;
/// PL031 clock.
pub const CLOCK: u64 = 0x0901_0000;
/// PL061 inputs, one of which is the power button's.
pub const GPIO: u64 = 0x0903_0000;
/// Its shared peripheral interrupt.
pub const GPIO_SPI: u32 = 7;
/// Debug-exit register, 4 bytes.
pub const DEBUG_EXIT: u64 = 0x0908_0000;
/// pvpanic, one byte.
pub const PVPANIC: u64 = 0x0909_0000;
/// The generation id: 16 bytes of memory, for which KVM has a slot of its own, as large as a page of any host. RAM would not
/// do: a guest's driver maps it as it maps a device's registers, which Linux does with nothing that is RAM.
pub const GENERATION: u64 = 0x090c_0000;
/// Of its slot.
pub const GENERATION_SIZE: u64 = 0x1_0000;
/// The shared peripheral interrupt that says that it is another.
pub const GENERATION_SPI: u32 = 8;
/// Virtio devices that are not on PCI: a page each.
pub const VIRTIO: u64 = 0x0a00_0000;
/// The first one's shared peripheral interrupt; the others' follow.
pub const VIRTIO_SPI: u32 = 16;
/// The window of the PCI bus, where its functions' BARs lie.
pub const PCI_WINDOW: u64 = 0x1000_0000;
/// Bytes of it.
pub const PCI_WINDOW_SIZE: u64 = 0x2000_0000;
/// ECAM of the PCI bus (PCI Express 6.0 §7.2.2).
pub const PCI_ECAM: u64 = 0x3f00_0000;
/// The first of the four shared peripheral interrupts of its INTx.
pub const PCI_SPI: u32 = 3;
/// Of each device's own page.
pub const PAGE: u64 = 0x1000;

/// RAM ends below 2^47.
const MAX_RAM: u64 = 1 << 46;
/// The smallest IPA size that KVM takes (api.rst, KVM_VM_TYPE_ARM_IPA_SIZE), and the usual one.
const IPA_LEAST: u32 = 32;
const IPA_USUAL: u32 = 40;

/// The machine has an ITS, as far as is settled: without a word for or against, that is the host's to say.
pub fn has_its(config: &Config) -> bool {
    config.irqchip != Some(IrqChip::None) && config.gic != Some(Gic::V2) && config.msi != Some(Msi::None)
}

/// The map of the machine that `config` describes.
///
/// # Errors
/// RAM of no or of an odd size, or in a place where it cannot be; a debug console on top of something else; an option
/// that means nothing on arm64.
pub fn layout(config: &Config) -> Result<Layout> {
    refuse_words(config)?;
    let (size, base) = map::ram(config, MAX_RAM)?;
    let base = base.unwrap_or(RAM);
    let devices = Span { start: DEVICES, size: RAM - DEVICES };
    let ram = Span::new(base, size).filter(|ram| ram.last() < 1 << 47);
    let ram = ram.ok_or_else(|| refuse(format!("RAM of {size} bytes at {base:#x} ends beyond 2^47")))?;
    if ram.overlaps(&devices) {
        let what = format!("RAM at {ram} overlaps the devices' place, {devices}");
        return Err(refuse(what).hint(format!("leave --ram-base out, or end RAM below {DEVICES:#x}")).into());
    }
    let mut regions = vec![
        mmio(SERIAL, PAGE, "serial port (PL011)"),
        mmio(CLOCK, PAGE, "clock (PL031)"),
        mmio(DEBUG_EXIT, 4, "debug exit"),
        mmio(PVPANIC, 1, "pvpanic"),
    ];
    if config.irqchip != Some(IrqChip::None) {
        regions.push(mmio(GPIO, PAGE, "power button (PL061)"));
        regions.push(mmio(GIC_DISTRIBUTOR, GIC_DISTRIBUTOR_SIZE, "GIC distributor"));
        regions.push(match config.gic {
            Some(Gic::V2) => mmio(GIC_CPU, GIC_CPU_SIZE, "GICv2 CPU interface"),
            Some(Gic::V3) | None => {
                let all = GIC_REDISTRIBUTOR_SIZE * u64::from(config.cpus.count().max(1));
                mmio(GIC_REDISTRIBUTOR, all, "GICv3 redistributors")
            }
        });
    }
    if config.has_pci() {
        regions.extend([
            mmio(PCI_WINDOW, PCI_WINDOW_SIZE, "PCI window"),
            mmio(PCI_ECAM, map::PCI_ECAM_SIZE, "PCI configuration (ECAM)"),
        ]);
    }
    regions.extend(map::virtio_pages(config, VIRTIO));
    if has_its(config) {
        regions.push(mmio(GIC_ITS, GIC_ITS_SIZE, "GICv3 ITS"));
    }
    // Without interrupts nobody would hear that it has changed.
    let there = config.irqchip != Some(IrqChip::None);
    let generation = there.then_some(Span { start: GENERATION, size: GENERATION_SIZE });
    Layout::new(config, vec![ram], None, generation, regions)
}

fn refuse_words(config: &Config) -> Result<(), Refusal> {
    if config.cpuid == Some(Cpuid::Host) || config.cpuid == Some(Cpuid::None) {
        return Err(usage("--cpuid means nothing for an arm64 machine"));
    }
    if config.irqchip == Some(IrqChip::Split) {
        return Err(usage("--irqchip split means nothing for an arm64 machine").hint("--irqchip kernel is the GIC"));
    }
    if config.platform.is_some() {
        return Err(usage("--platform means nothing for an arm64 machine: it has a device tree"));
    }
    if let Some(console) = config.debugcon.filter(|at| at.space == Space::Pio) {
        return Err(usage(format!("--debugcon {console}: an arm64 machine has no ports"))
            .hint("give it an address, as in --debugcon mmio:0x996"));
    }
    if (config.cpus.sockets, config.cpus.threads) != (1, 1) {
        return Err(usage(format!("--cpus {}: an arm64 machine's CPUs are cores, told by their number", config.cpus)));
    }
    if config.cpus.count() as usize > super::MAX_CPUS {
        return Err(usage(format!("--cpus {}: an arm64 machine has at most {}", config.cpus.count(), super::MAX_CPUS)));
    }
    if config.gic == Some(Gic::V2) && config.cpus.count() > 8 {
        return Err(usage(format!("--cpus {}: GICv2 has at most 8", config.cpus.count())).hint("--gic 3 takes more"));
    }
    if config.gic.is_some() && config.irqchip == Some(IrqChip::None) {
        return Err(usage("--gic means nothing with --irqchip none"));
    }
    if config.msi == Some(Msi::Its) && !has_its(config) {
        let without = if config.gic == Some(Gic::V2) { "--gic 2" } else { "--irqchip none" };
        return Err(usage(format!("--msi its with {without}: an ITS is a part of GICv3")));
    }
    if config.cpu_features.contains(&CpuFeature::Pmu) && config.irqchip == Some(IrqChip::None) {
        return Err(usage("--cpu-features pmu with --irqchip none: a counter's overflow is an interrupt"));
    }
    let told = |name: &str| config.reg.iter().find(|reg| reg.name == name);
    if let (Some(at), Some(reg)) = (config.fdt_at, told("x0").or_else(|| told("w0"))) {
        return Err(usage(format!("--fdt-at {at} and --reg {reg}: a guest is told of its device tree in x0")));
    }
    Ok(())
}

/// Bits of an address.
fn bits(last: u64) -> u32 {
    u64::BITS - last.leading_zeros()
}

/// The kind of virtual machine that KVM_CREATE_VM is asked for: the bits of its guest-physical addresses (IPA), as many
/// as the map needs.
///
/// # Errors
/// RAM ends beyond what this host's KVM can give a guest.
pub fn vm_type(kvm: &Kvm, layout: &Layout) -> Result<u64> {
    let last = layout.memory().iter().map(Span::last).max().unwrap_or(0).max(RAM);
    let can = u32::try_from(kvm.check_extension_int(Cap::ArmVmIPASize)).ok().filter(|can| *can > 0);
    choose_ipa(bits(last), can, layout).map(u64::from).map_err(Into::into)
}

/// 0 stands for the usual size, the only one of old hosts.
fn choose_ipa(needed: u32, can: Option<u32>, layout: &Layout) -> Result<u32, Refusal> {
    let most = can.unwrap_or(IPA_USUAL);
    if needed > most {
        let ram = layout.ram.iter().map(Span::to_string).collect::<Vec<_>>().join(" and ");
        let what = format!(
            "RAM at {ram} needs guest-physical addresses (IPA) of {needed} bits; this host's KVM has {most}, the last is {:#x}",
            (1u64 << most) - 1
        );
        let room = (1u64 << most).saturating_sub(RAM);
        return Err(refuse(what).hint(format!("--memory {} is the most, with RAM where it usually is", Size(room))));
    }
    Ok(can.map_or(0, |_| needed.max(IPA_LEAST)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Addr, Cpus};

    fn with(memory: u64) -> Config {
        Config { memory: Size(memory), ..Config::default() }
    }

    fn based(base: u64, memory: u64) -> Config {
        Config { ram_base: Some(Addr(base)), ..with(memory) }
    }

    #[test]
    fn ram_is_one_piece_clear_of_the_devices() {
        let ram = |config: &Config| layout(config).unwrap().ram;
        assert_eq!(ram(&with(8 << 30)), [Span { start: RAM, size: 8 << 30 }]);
        assert_eq!(ram(&based(0x10000, 4096)), [Span { start: 0x10000, size: 4096 }]);
        assert_eq!(ram(&based(0, DEVICES)), [Span { start: 0, size: DEVICES }]);
        for config in [based(0, DEVICES + 4096), based(DEVICES, 4096), based(SERIAL, 4096), based(RAM - 4096, 8192)] {
            assert!(layout(&config).unwrap_err().to_string().contains("overlaps the devices"));
        }
        for config in [with(0), with(1), with(4097), with(!0xfff), based(u64::MAX - 4095, 4096), based(1, 4096)] {
            assert!(layout(&config).is_err(), "{config:?}");
        }
    }

    #[test]
    fn nothing_overlaps_whatever_the_configuration() {
        for gic in [None, Some(Gic::V2), Some(Gic::V3)] {
            for cpus in [1, 8, 123] {
                let Ok(map) = layout(&Config { gic, cpus: Cpus::cores(cpus), ..with(4096) }) else { continue };
                for (i, a) in map.regions.iter().enumerate() {
                    for b in &map.regions[i + 1..] {
                        assert!(!a.span.overlaps(&b.span), "{a:?} {b:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn an_its_is_where_gicv3_is_and_nobody_says_no() {
        let has = |gic, msi| {
            let map = layout(&Config { gic, msi, ..with(4096) }).unwrap();
            map.regions.iter().any(|region| region.span == Span { start: GIC_ITS, size: GIC_ITS_SIZE })
        };
        assert!(has(None, None) && has(Some(Gic::V3), Some(Msi::Its)));
        assert!(!has(Some(Gic::V2), None) && !has(Some(Gic::V3), Some(Msi::None)));
        let none = Config { irqchip: Some(IrqChip::None), ..with(4096) };
        assert!(!has_its(&none) && layout(&none).is_ok());
    }

    #[test]
    fn what_means_nothing_on_arm64_is_refused_with_status_2() {
        let base = with(4096);
        for config in [
            Config { cpuid: Some(Cpuid::None), ..base.clone() },
            Config { debugcon: Some("pio:0xe9".parse().unwrap()), ..base.clone() },
            Config { gic: Some(Gic::V2), cpus: Cpus::cores(9), ..base.clone() },
            Config { cpus: Cpus::cores(124), ..base.clone() },
            Config { gic: Some(Gic::V3), irqchip: Some(IrqChip::None), ..base.clone() },
            Config { gic: Some(Gic::V2), msi: Some(Msi::Its), ..base.clone() },
            Config { irqchip: Some(IrqChip::None), msi: Some(Msi::Its), ..base.clone() },
            Config { irqchip: Some(IrqChip::None), cpu_features: vec![CpuFeature::Pmu], ..base.clone() },
            Config { fdt_at: Some(Addr(RAM)), reg: vec!["x0=1".parse().unwrap()], ..base.clone() },
            Config { debugcon: Some("mmio:0x9000000".parse().unwrap()), ..base.clone() },
        ] {
            assert_eq!(crate::error::verdict(&layout(&config).unwrap_err()).0, 2, "{config:?}");
        }
        let system_d = Config { debugcon: Some("mmio:0x996".parse().unwrap()), ..based(0x10000, 4096) };
        assert!(layout(&system_d).is_ok());
    }

    #[test]
    fn the_ipa_size_is_what_ram_needs_and_no_more_than_the_host_has() {
        let map = layout(&with(8 << 30)).unwrap();
        assert_eq!(choose_ipa(31, Some(44), &map).unwrap(), 32);
        assert_eq!(choose_ipa(41, Some(44), &map).unwrap(), 41);
        assert_eq!(choose_ipa(40, None, &map).unwrap(), 0);
        let refusal = choose_ipa(45, Some(44), &map).unwrap_err();
        assert!(refusal.to_string().contains("45 bits") && refusal.to_string().contains("has 44"), "{refusal}");
        assert!(choose_ipa(41, None, &map).is_err());
        assert_eq!((bits(0x4000_0fff), bits((1 << 40) - 1), bits(1 << 40)), (31, 40, 41));
    }
}
