//! The device tree: what the machine is made of, as Linux and other guests read it (Devicetree Specification 0.4, and the
//! bindings in Linux's Documentation/devicetree).
//!
//! Invariant: it says what is there and nothing else, and it is a pure function of the configuration and the map.

use anyhow::Result;
use vm_fdt::FdtWriter;

use super::gic::FIRST_SPI;
use crate::arch::layout::{
    CLOCK, DEBUG_EXIT, GIC_CPU, GIC_CPU_SIZE, GIC_DISTRIBUTOR, GIC_DISTRIBUTOR_SIZE, GIC_REDISTRIBUTOR,
    GIC_REDISTRIBUTOR_SIZE, PAGE, SERIAL, SERIAL_SPI,
};
use crate::arch::{Layout, mpidr};
use crate::config::{Config, Gic, IrqChip};

/// Names by which nodes refer to one another.
const GIC: u32 = 1;
const SERIAL_CLOCK: u32 = 2;

/// Interrupt specifiers (bindings/interrupt-controller/arm,gic.yaml): kind, and level-triggered, active high or low.
const SPI: u32 = 0;
const PPI: u32 = 1;
const HIGH: u32 = 4;
const LOW: u32 = 8;

/// The clock of the PL011, 24 MHz: a rate that every driver can divide.
const HERTZ: u32 = 24_000_000;

/// The machine's device tree.
///
/// # Errors
/// Only where there are more CPUs or ranges than the format has room for.
pub fn device_tree(config: &Config, layout: &Layout) -> Result<Option<Vec<u8>>> {
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
    chosen(&mut tree, config)?;
    for ram in &layout.ram {
        let node = tree.begin_node(&format!("memory@{:x}", ram.start))?;
        tree.property_string("device_type", "memory")?;
        tree.property_array_u64("reg", &[ram.start, ram.size])?;
        tree.end_node(node)?;
    }
    cpus(&mut tree, config.cpus)?;
    psci(&mut tree)?;
    if gic {
        interrupts(&mut tree, config)?;
        timer(&mut tree)?;
    }
    devices(&mut tree, gic)?;
    if let Some(console) = config.debugcon {
        let node = tree.begin_node(&format!("debug-console@{:x}", console.addr))?;
        tree.property_string("compatible", "bantam,debug-console")?;
        tree.property_array_u64("reg", &[console.addr, 1])?;
        tree.end_node(node)?;
    }
    tree.end_node(root)?;
    Ok(Some(tree.finish()?))
}

fn chosen(tree: &mut FdtWriter, config: &Config) -> Result<()> {
    let node = tree.begin_node("chosen")?;
    tree.property_string("stdout-path", &format!("/serial@{SERIAL:x}"))?;
    if let Some(cmdline) = &config.cmdline {
        tree.property_string("bootargs", cmdline)?;
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
        _ => ("arm,gic-v3", [GIC_REDISTRIBUTOR, GIC_REDISTRIBUTOR_SIZE * u64::from(config.cpus)]),
    };
    let [start, size] = second;
    tree.property_string("compatible", compatible)?;
    tree.property_null("interrupt-controller")?;
    tree.property_u32("#interrupt-cells", 3)?;
    tree.property_u32("#address-cells", 0)?;
    tree.property_array_u64("reg", &[GIC_DISTRIBUTOR, GIC_DISTRIBUTOR_SIZE, start, size])?;
    tree.property_u32("phandle", GIC)?;
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
    if gic {
        tree.property_array_u32("interrupts", &[SPI, SERIAL_SPI, HIGH])?;
    }
    tree.property_array_u32("clocks", &[SERIAL_CLOCK, SERIAL_CLOCK])?;
    tree.property_string_list("clock-names", vec!["uartclk".into(), "apb_pclk".into()])?;
    tree.end_node(node)?;

    let node = tree.begin_node(&format!("rtc@{CLOCK:x}"))?;
    tree.property_string_list("compatible", vec!["arm,pl031".into(), "arm,primecell".into()])?;
    tree.property_array_u64("reg", &[CLOCK, PAGE])?;
    tree.property_u32("clocks", SERIAL_CLOCK)?;
    tree.property_string("clock-names", "apb_pclk")?;
    tree.end_node(node)?;

    let node = tree.begin_node(&format!("debug-exit@{DEBUG_EXIT:x}"))?;
    tree.property_string("compatible", "bantam,debug-exit")?;
    tree.property_array_u64("reg", &[DEBUG_EXIT, 4])?;
    tree.end_node(node)?;
    Ok(())
}

const _: () = assert!(FIRST_SPI == 32, "device trees count shared peripheral interrupts from 32");
