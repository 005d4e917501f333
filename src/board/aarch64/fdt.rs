//! The device tree: what the machine is made of, as Linux and other guests read it (Devicetree Specification 0.4, and the
//! bindings in Linux's Documentation/devicetree).
//!
//! Invariant: it says what is there and nothing else, and it is a pure function of the configuration, the map and what
//! the guest is told.

use anyhow::Result;
use vm_fdt::FdtWriter;

use super::cpus::PMU_PPI;
use super::gic::FIRST_SPI;
use crate::arch::layout::{
    CLOCK, DEBUG_EXIT, GENERATION, GENERATION_SPI, GIC_CPU, GIC_CPU_SIZE, GIC_DISTRIBUTOR, GIC_DISTRIBUTOR_SIZE,
    GIC_ITS, GIC_ITS_SIZE, GIC_REDISTRIBUTOR, GIC_REDISTRIBUTOR_SIZE, GPIO, GPIO_SPI, PAGE, PCI_ECAM, PCI_SPI,
    PCI_WINDOW, PCI_WINDOW_SIZE, PVPANIC, SERIAL, SERIAL_SPI, VIRTIO_SPI, has_its,
};
use crate::arch::{Layout, PCI_ECAM_SIZE, mpidr};
use crate::board::Chosen;
use crate::board::virtio::{page_of, turn};
use crate::config::{Config, CpuFeature, Gic, IrqChip};
use crate::device::pl061::POWER;
use crate::device::{pl011, pl031, pl061};
use crate::memory::Span;

/// Names by which nodes refer to one another.
const GIC: u32 = 1;
const SERIAL_CLOCK: u32 = 2;
const BUTTONS: u32 = 3;
const ITS: u32 = 4;

/// Interrupt specifiers (bindings/interrupt-controller/arm,gic.yaml): kind, and level-triggered, active high or low.
const SPI: u32 = 0;
const PPI: u32 = 1;
const HIGH: u32 = 4;
/// A rising edge.
const EDGE: u32 = 1;
const LOW: u32 = 8;

/// The clock of the PL011, 24 MHz: a rate that every driver can divide.
const HERTZ: u32 = 24_000_000;

/// KEY_POWER (Linux include/uapi/linux/input-event-codes.h).
const KEY_POWER: u32 = 116;
/// GPIO_ACTIVE_HIGH (Linux include/dt-bindings/gpio/gpio.h).
const ACTIVE_HIGH: u32 = 0;
/// What a primecell's identification registers say, so that nobody need read them (bindings/arm/primecell.yaml).
const PERIPHID: &str = "arm,primecell-periphid";

/// The machine's device tree.
///
/// # Errors
/// Only where there are more CPUs or ranges than the format has room for.
pub fn device_tree(config: &Config, layout: &Layout, told: &Chosen) -> Result<Option<Vec<u8>>> {
    let mut tree = FdtWriter::new()?;
    let root = tree.begin_node("")?;
    tree.property_string("compatible", "linux,dummy-virt")?;
    tree.property_string("model", "bantam")?;
    tree.property_u32("#address-cells", 2)?;
    tree.property_u32("#size-cells", 2)?;
    let gic = config.irqchip != Some(IrqChip::None);
    if gic {
        tree.property_u32("interrupt-parent", GIC)?;
    }
    chosen(&mut tree, told)?;
    for ram in &layout.ram {
        let node = tree.begin_node(&format!("memory@{:x}", ram.start))?;
        tree.property_string("device_type", "memory")?;
        tree.property_array_u64("reg", &[ram.start, ram.size])?;
        tree.end_node(node)?;
    }
    cpus(&mut tree, config.cpus.count())?;
    psci(&mut tree)?;
    if gic {
        interrupts(&mut tree, config)?;
        timer(&mut tree)?;
        performance(&mut tree, config)?;
    }
    devices(&mut tree, gic)?;
    if gic {
        power_button(&mut tree)?;
        generation(&mut tree)?;
    }
    virtio_pages(&mut tree, config, gic)?;
    if config.has_pci() {
        pci(&mut tree, config, gic)?;
    }
    if let Some(console) = config.debugcon {
        let node = tree.begin_node(&format!("debug-console@{:x}", console.addr))?;
        tree.property_string("compatible", "bantam,debug-console")?;
        tree.property_array_u64("reg", &[console.addr, 1])?;
        tree.end_node(node)?;
    }
    tree.end_node(root)?;
    Ok(Some(tree.finish()?))
}

/// What the guest is told (Devicetree Specification 0.4, 3.6; Linux's drivers/of/fdt.c). Linux takes the seeds out of
/// the tree before anyone else reads it.
fn chosen(tree: &mut FdtWriter, told: &Chosen) -> Result<()> {
    let node = tree.begin_node("chosen")?;
    tree.property_string("stdout-path", &format!("/serial@{SERIAL:x}"))?;
    if let Some(cmdline) = told.cmdline {
        tree.property_string("bootargs", cmdline)?;
    }
    if let Some(initrd) = told.initrd {
        tree.property_u64("linux,initrd-start", initrd.start)?;
        tree.property_u64("linux,initrd-end", initrd.start.saturating_add(initrd.size))?;
    }
    if let Some((kaslr, rng)) = told.seed.and_then(|seed| seed.split_first_chunk::<8>()) {
        tree.property("kaslr-seed", kaslr)?;
        tree.property("rng-seed", rng)?;
    }
    tree.end_node(node)?;
    Ok(())
}

fn cpus(tree: &mut FdtWriter, count: u32) -> Result<()> {
    let all = tree.begin_node("cpus")?;
    tree.property_u32("#address-cells", 1)?;
    tree.property_u32("#size-cells", 0)?;
    for id in 0..count {
        let affinity = u32::try_from(mpidr(id))?;
        let node = tree.begin_node(&format!("cpu@{affinity:x}"))?;
        tree.property_string("device_type", "cpu")?;
        tree.property_string("compatible", "arm,armv8")?;
        tree.property_string("enable-method", "psci")?;
        tree.property_u32("reg", affinity)?;
        tree.end_node(node)?;
    }
    tree.end_node(all)?;
    Ok(())
}

/// KVM answers PSCI calls by HVC (bindings/arm/psci.yaml).
fn psci(tree: &mut FdtWriter) -> Result<()> {
    let node = tree.begin_node("psci")?;
    tree.property_string_list("compatible", vec!["arm,psci-1.0".into(), "arm,psci-0.2".into()])?;
    tree.property_string("method", "hvc")?;
    tree.end_node(node)?;
    Ok(())
}

fn interrupts(tree: &mut FdtWriter, config: &Config) -> Result<()> {
    let node = tree.begin_node(&format!("interrupt-controller@{GIC_DISTRIBUTOR:x}"))?;
    let (compatible, second) = match config.gic {
        Some(Gic::V2) => ("arm,cortex-a15-gic", [GIC_CPU, GIC_CPU_SIZE]),
        _ => ("arm,gic-v3", [GIC_REDISTRIBUTOR, GIC_REDISTRIBUTOR_SIZE * u64::from(config.cpus.count())]),
    };
    let [start, size] = second;
    tree.property_string("compatible", compatible)?;
    tree.property_null("interrupt-controller")?;
    tree.property_u32("#interrupt-cells", 3)?;
    // Also how long the GIC's part is in an `interrupt-map` of another node.
    let cells = if has_its(config) { 2 } else { 0 };
    tree.property_u32("#address-cells", cells)?;
    tree.property_array_u64("reg", &[GIC_DISTRIBUTOR, GIC_DISTRIBUTOR_SIZE, start, size])?;
    tree.property_u32("phandle", GIC)?;
    if has_its(config) {
        tree.property_u32("#size-cells", cells)?;
        tree.property_null("ranges")?;
        its(tree)?;
    }
    tree.end_node(node)?;
    Ok(())
}

/// What takes messages as interrupts (bindings/interrupt-controller/arm,gic-v3.yaml). The cell is a device's number.
fn its(tree: &mut FdtWriter) -> Result<()> {
    let node = tree.begin_node(&format!("msi-controller@{GIC_ITS:x}"))?;
    tree.property_string("compatible", "arm,gic-v3-its")?;
    tree.property_null("msi-controller")?;
    tree.property_u32("#msi-cells", 1)?;
    tree.property_array_u64("reg", &[GIC_ITS, GIC_ITS_SIZE])?;
    tree.property_u32("phandle", ITS)?;
    tree.end_node(node)?;
    Ok(())
}

/// The architectural timers and the interrupts that KVM gives them (bindings/timer/arm,arch_timer.yaml): secure
/// physical, physical, virtual, hypervisor's.
fn timer(tree: &mut FdtWriter) -> Result<()> {
    let node = tree.begin_node("timer")?;
    tree.property_string("compatible", "arm,armv8-timer")?;
    let lines: Vec<u32> = [13, 14, 11, 10].into_iter().flat_map(|ppi| [PPI, ppi, LOW]).collect();
    tree.property_array_u32("interrupts", &lines)?;
    tree.property_null("always-on")?;
    tree.end_node(node)?;
    Ok(())
}

/// The CPUs' performance counters (bindings/arm/pmu.yaml).
fn performance(tree: &mut FdtWriter, config: &Config) -> Result<()> {
    if config.cpu_features.contains(&CpuFeature::Pmu) {
        let node = tree.begin_node("pmu")?;
        tree.property_string("compatible", "arm,armv8-pmuv3")?;
        tree.property_array_u32("interrupts", &[PPI, PMU_PPI, HIGH])?;
        tree.end_node(node)?;
    }
    Ok(())
}

fn devices(tree: &mut FdtWriter, gic: bool) -> Result<()> {
    let node = tree.begin_node("serial-clock")?;
    tree.property_string("compatible", "fixed-clock")?;
    tree.property_u32("#clock-cells", 0)?;
    tree.property_u32("clock-frequency", HERTZ)?;
    tree.property_u32("phandle", SERIAL_CLOCK)?;
    tree.end_node(node)?;

    let node = tree.begin_node(&format!("serial@{SERIAL:x}"))?;
    tree.property_string_list("compatible", vec!["arm,pl011".into(), "arm,primecell".into()])?;
    tree.property_array_u64("reg", &[SERIAL, PAGE])?;
    tree.property_u32(PERIPHID, u32::from_le_bytes(pl011::PERIPHERAL))?;
    if gic {
        tree.property_array_u32("interrupts", &[SPI, SERIAL_SPI, HIGH])?;
    }
    tree.property_array_u32("clocks", &[SERIAL_CLOCK, SERIAL_CLOCK])?;
    tree.property_string_list("clock-names", vec!["uartclk".into(), "apb_pclk".into()])?;
    tree.end_node(node)?;

    let node = tree.begin_node(&format!("rtc@{CLOCK:x}"))?;
    tree.property_string_list("compatible", vec!["arm,pl031".into(), "arm,primecell".into()])?;
    tree.property_array_u64("reg", &[CLOCK, PAGE])?;
    tree.property_u32(PERIPHID, u32::from_le_bytes(pl031::PERIPHERAL))?;
    tree.property_u32("clocks", SERIAL_CLOCK)?;
    tree.property_string("clock-names", "apb_pclk")?;
    tree.end_node(node)?;

    let node = tree.begin_node(&format!("debug-exit@{DEBUG_EXIT:x}"))?;
    tree.property_string("compatible", "bantam,debug-exit")?;
    tree.property_array_u64("reg", &[DEBUG_EXIT, 4])?;
    tree.end_node(node)?;

    // bindings/misc/pvpanic-mmio.txt
    let node = tree.begin_node(&format!("pvpanic@{PVPANIC:x}"))?;
    tree.property_string("compatible", "qemu,pvpanic-mmio")?;
    tree.property_array_u64("reg", &[PVPANIC, 1])?;
    tree.end_node(node)?;
    Ok(())
}

/// The line of a virtio device's page: they share as many as a PCI bus has.
fn virtio_pages(tree: &mut FdtWriter, config: &Config, gic: bool) -> Result<()> {
    // bindings/virtio/mmio.yaml
    for number in 0..config.virtio_pages() {
        let Span { start, size } = page_of(number);
        let node = tree.begin_node(&format!("virtio_mmio@{start:x}"))?;
        tree.property_string("compatible", "virtio,mmio")?;
        tree.property_array_u64("reg", &[start, size])?;
        if gic {
            tree.property_array_u32("interrupts", &[SPI, VIRTIO_SPI + turn(number) as u32, HIGH])?;
        }
        tree.property_null("dma-coherent")?;
        tree.end_node(node)?;
    }
    Ok(())
}

/// The PCI bus (bindings/pci/host-generic-pci.yaml, Open Firmware's PCI Bus Binding 2.1): one, all of whose BARs lie in one
/// window, at the addresses that they have on the bus too.
fn pci(tree: &mut FdtWriter, config: &Config, gic: bool) -> Result<()> {
    /// ss = 10: 32-bit memory space.
    const MEMORY: u32 = 2 << 24;
    /// Of an address on the bus: the device's number.
    const SLOT: u32 = 11;
    const INTA: u32 = 1;
    let node = tree.begin_node(&format!("pcie@{PCI_ECAM:x}"))?;
    tree.property_string("compatible", "pci-host-ecam-generic")?;
    tree.property_string("device_type", "pci")?;
    tree.property_u32("#address-cells", 3)?;
    tree.property_u32("#size-cells", 2)?;
    tree.property_array_u32("bus-range", &[0, 0])?;
    tree.property_array_u64("reg", &[PCI_ECAM, PCI_ECAM_SIZE])?;
    let (window, size) = (u32::try_from(PCI_WINDOW)?, u32::try_from(PCI_WINDOW_SIZE)?);
    tree.property_array_u32("ranges", &[MEMORY, 0, window, 0, window, 0, size])?;
    tree.property_null("dma-coherent")?;
    if gic {
        // An address has as many cells as the GIC says: two with an ITS, else none.
        let address: &[u32] = if has_its(config) { &[0, 0] } else { &[] };
        let of = |slot: u32| {
            let spi = PCI_SPI + turn(slot as usize) as u32;
            [&[slot << SLOT, 0, 0, INTA, GIC], address, &[SPI, spi, HIGH]].concat()
        };
        let slots = 1..=u32::try_from(config.virtio_devices())?;
        tree.property_u32("#interrupt-cells", 1)?;
        tree.property_array_u32("interrupt-map-mask", &[0x1f << SLOT, 0, 0, 7])?;
        tree.property_array_u32("interrupt-map", &slots.flat_map(of).collect::<Vec<_>>())?;
    }
    if has_its(config) {
        // Each requester is a device of the ITS, by the same number.
        tree.property_array_u32("msi-map", &[0, ITS, 0, 0x1_0000])?;
    }
    tree.end_node(node)?;
    Ok(())
}

/// Says which of several machines this is, that were one (bindings/rng/microsoft,vmgenid.yaml).
fn generation(tree: &mut FdtWriter) -> Result<()> {
    let node = tree.begin_node(&format!("rng@{GENERATION:x}"))?;
    tree.property_string("compatible", "microsoft,vmgenid")?;
    tree.property_array_u64("reg", &[GENERATION, 16])?;
    tree.property_array_u32("interrupts", &[SPI, GENERATION_SPI, EDGE])?;
    tree.end_node(node)?;
    Ok(())
}

/// A PL061 and a key on one of its lines (bindings/gpio/pl061-gpio.yaml, bindings/input/gpio-keys.yaml).
fn power_button(tree: &mut FdtWriter) -> Result<()> {
    let node = tree.begin_node(&format!("gpio@{GPIO:x}"))?;
    tree.property_string_list("compatible", vec!["arm,pl061".into(), "arm,primecell".into()])?;
    tree.property_array_u64("reg", &[GPIO, PAGE])?;
    tree.property_u32(PERIPHID, u32::from_le_bytes(pl061::PERIPHERAL))?;
    tree.property_array_u32("interrupts", &[SPI, GPIO_SPI, HIGH])?;
    tree.property_null("gpio-controller")?;
    tree.property_u32("#gpio-cells", 2)?;
    tree.property_null("interrupt-controller")?;
    tree.property_u32("#interrupt-cells", 2)?;
    tree.property_u32("#address-cells", 0)?;
    tree.property_u32("clocks", SERIAL_CLOCK)?;
    tree.property_string("clock-names", "apb_pclk")?;
    tree.property_u32("phandle", BUTTONS)?;
    tree.end_node(node)?;

    let keys = tree.begin_node("gpio-keys")?;
    tree.property_string("compatible", "gpio-keys")?;
    let node = tree.begin_node("power")?;
    tree.property_string("label", "power button")?;
    tree.property_u32("linux,code", KEY_POWER)?;
    tree.property_array_u32("gpios", &[BUTTONS, POWER, ACTIVE_HIGH])?;
    tree.end_node(node)?;
    tree.end_node(keys)?;
    Ok(())
}

const _: () = assert!(FIRST_SPI == 32, "device trees count shared peripheral interrupts from 32");
