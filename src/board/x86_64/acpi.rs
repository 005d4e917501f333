//! The ACPI tables of a PC without fixed hardware (ACPI 6.5 §4.1, hardware-reduced): what there is, and where.
//!
//! Invariant: the tables are a pure function of the configuration, and each is found from the root with a right sum.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule,
    FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify, ONE, OpRegion, OpRegionSpace,
    Package, Path, ResourceTemplate, Return, Scope, Store, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace as RegisterSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use anyhow::{Context, Result};

use super::INTX_INPUTS;
use crate::arch::PCI_ECAM_SIZE;
use crate::arch::layout::{
    ACPI, CMOS, GENERATION, IOAPIC, LOCAL_APIC, PCI_ECAM, PCI_PORTS, PCI_WINDOW, PCI_WINDOW_SIZE, POWER, POWER_IRQ,
    PVPANIC, SERIAL, SERIAL_IRQ,
};
use crate::board::Firmware;
use crate::board::virtio::{page_of, turn};
use crate::config::{Config, IrqChip, Platform};
use crate::device::power::{self, BUTTON, EVENT, RESET, S5, SLEEP_CONTROL, SLEEP_STATUS};
use crate::host::random;
use crate::memory::Span;

const OEM: [u8; 6] = *b"BANTAM";
const OEM_TABLE: [u8; 8] = *b"BANTAMPC";
const OEM_REVISION: u32 = 1;
/// Tables begin at multiples of it.
const ALIGN: usize = 64;
/// FADT "IA-PC boot architecture flags": devices on ports that nobody need look for, and no VGA.
const LEGACY_DEVICES: u16 = 1;
const NO_VGA: u16 = 1 << 2;

/// The PCI bus's segment. Of segment 0 Linux reads the configuration through the two ports wherever they answer, an access
/// two exits (arch/x86/pci/common.c); of any other through ECAM, which the ports' protocol cannot name.
const PCI_SEGMENT: u16 = 1;

/// Where a PC's CPU finds its firmware's first instruction when software jumps to it to restart (F000:FFF0).
const RESET_VECTOR: u64 = 0xf_fff0;

/// The tables of a machine that has them, and a firmware of one purpose: to reset the machine. Linux restarts by way of
/// the firmware where ACPI has no fixed hardware and there is no EFI (arch/x86/kernel/reboot.c, BOOT_EFI, then BOOT_BIOS).
///
/// # Errors
/// More CPUs than ACPI can name, or a host without random numbers.
pub fn firmware(config: &Config) -> Result<Firmware> {
    if config.platform != Some(Platform::Acpi) {
        return Ok(Firmware::default());
    }
    let [low, high, ..] = (POWER + RESET).to_le_bytes();
    // mov dx, RESET; mov al, 1; out dx, al; hlt; jmp to the hlt.
    let restart = vec![0xba, low, high, 0xb0, 1, 0xee, 0xf4, 0xeb, 0xfd];
    let parts = vec![
        ("the ACPI tables", ACPI, tables(config)?),
        ("the reset vector", RESET_VECTOR, restart),
        ("the generation id", GENERATION, random::<16>()?.to_vec()),
    ];
    Ok(Firmware { rsdp: Some(ACPI), parts })
}

fn tables(config: &Config) -> Result<Vec<u8>> {
    let mut blob = vec![0; ALIGN];
    let dsdt = append(&mut blob, table(*b"DSDT", 6, &dsdt(config)?).as_slice());
    let mut all = vec![append(&mut blob, &bytes(&fadt(dsdt)))];
    if config.irqchip != Some(IrqChip::None) {
        all.push(append(&mut blob, table(*b"APIC", 6, &madt(config)?).as_slice()));
    }
    if config.has_pci() {
        let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
        mcfg.add_ecam(PCI_ECAM, PCI_SEGMENT, 0, 0);
        all.push(append(&mut blob, &bytes(&mcfg)));
    }
    all.push(append(&mut blob, table(*b"SPCR", 2, &spcr()).as_slice()));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    all.into_iter().for_each(|at| xsdt.add_entry(at));
    let xsdt = append(&mut blob, &bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM, xsdt));
    blob.get_mut(..rsdp.len()).context("the RSDP")?.copy_from_slice(&rsdp);
    Ok(blob)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Puts a table behind the others; gives its address.
fn append(blob: &mut Vec<u8>, table: &[u8]) -> u64 {
    let at = ACPI + blob.len() as u64;
    blob.extend_from_slice(table);
    blob.resize(blob.len().next_multiple_of(ALIGN), 0);
    at
}

fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Sdt {
    let mut table = Sdt::new(signature, 36, revision, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(body);
    table
}

fn port(at: u64) -> GAS {
    GAS::new(RegisterSpace::SystemIo, 8, 0, AccessSize::ByteAccess, at)
}

/// §5.2.9: no fixed hardware; sleep, reset and buttons by registers of our own.
fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION).dsdt_64(dsdt);
    // The power and the sleep button are no fixed ones, nor is the alarm of the clock.
    for flag in [
        Flags::Wbinvd,
        Flags::PwrButton,
        Flags::SlpButton,
        Flags::FixRtc,
        Flags::ResetRegSup,
        Flags::Headless,
        Flags::HwReducedAcpi,
    ] {
        fadt = fadt.flag(flag);
    }
    fadt = fadt.preferred_pm_profile(PmProfile::EnterpriseServer);
    fadt.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA).into();
    fadt.reset_reg = port(POWER + RESET);
    fadt.reset_value = 1;
    fadt.sleep_control_reg = port(POWER + SLEEP_CONTROL);
    fadt.sleep_status_reg = port(POWER + SLEEP_STATUS);
    fadt.finalize()
}

/// §5.2.12: the local APIC of each CPU, the I/O APIC, that LINT1 is the NMI everywhere, and whether there are 8259A.
fn madt(config: &Config) -> Result<Vec<u8>> {
    let address = |at: u64| u32::try_from(at).map(u32::to_le_bytes).context("an APIC beyond 4 GiB");
    let mut body = address(LOCAL_APIC)?.to_vec();
    body.extend(u32::from(config.irqchip != Some(IrqChip::Split)).to_le_bytes());
    for id in 0..config.cpus.count() {
        let id = u8::try_from(id).context("more CPUs than local APIC ids")?;
        body.extend([0, 8, id, id, 1, 0, 0, 0]);
    }
    body.extend([1, 12, 0, 0]);
    body.extend(address(IOAPIC)?);
    body.extend(0u32.to_le_bytes());
    body.extend([4, 6, 0xff, 0, 0, 1]);
    Ok(body)
}

/// Microsoft's "Serial Port Console Redirection Table", revision 2: a 16550 at a port, 115,200 bits a second.
fn spcr() -> Vec<u8> {
    const BAUD_115200: u8 = 7;
    /// By a PC's interrupt number, and by the I/O APIC's.
    const PC_AND_APIC: u8 = 3;
    let mut body = vec![0; 4];
    body.extend(bytes(&port(SERIAL)));
    body.extend([PC_AND_APIC, SERIAL_IRQ.to_le_bytes()[0]]);
    body.extend(SERIAL_IRQ.to_le_bytes());
    // One stop bit; no flow control; a VT-UTF8 terminal; no PCI device.
    body.extend([BAUD_115200, 0, 1, 0, 2, 0, 0xff, 0xff, 0xff, 0xff]);
    body.resize(44, 0);
    body
}

fn ports(at: u64, size: u8) -> Result<IO> {
    let at = u16::try_from(at).context("a port beyond 65,535")?;
    Ok(IO::new(at, at, 1, size))
}

/// Machine code that is code already: parts are encoded as they are made, so that none borrows another.
struct Code(Vec<u8>);

impl Aml for Code {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn code(part: &dyn Aml) -> Code {
    Code(bytes(part))
}

fn all(parts: &[Code]) -> Vec<&dyn Aml> {
    parts.iter().map(|part| part as &dyn Aml).collect()
}

fn path(name: &str) -> Path {
    Path::new(name)
}

fn named(name: &str, value: &dyn Aml) -> Code {
    code(&Name::new(path(name), value))
}

fn resources(parts: &[Code]) -> Code {
    named("_CRS", &ResourceTemplate::new(all(parts)))
}

fn method(name: &str, arguments: u8, serialized: bool, body: &[Code]) -> Code {
    code(&Method::new(path(name), arguments, serialized, all(body)))
}

fn device(name: &str, parts: &[Code]) -> Code {
    code(&Device::new(path(name), all(parts)))
}

/// What there is.
fn dsdt(config: &Config) -> Result<Vec<u8>> {
    let interrupts = config.irqchip != Some(IrqChip::None);
    let mut serial = vec![code(&ports(SERIAL, 8)?)];
    if interrupts {
        serial.push(code(&Interrupt::new(true, true, false, false, SERIAL_IRQ)));
    }
    let mut devices = vec![
        device("COM1", &[named("_HID", &EISAName::new("PNP0501")), named("_UID", &ZERO), resources(&serial)]),
        device("RTC_", &[named("_HID", &EISAName::new("PNP0B00")), resources(&[code(&ports(CMOS, 2)?)])]),
        device("PVPA", &[named("_HID", &"QEMU0001"), resources(&[code(&ports(PVPANIC, 1)?)])]),
    ];
    if interrupts {
        devices.extend(events());
    }
    devices.extend((0..config.virtio_pages()).map(|number| virtio(number, interrupts)));
    if config.has_pci() {
        devices.extend(pci(config, interrupts)?);
    }
    let mut table = bytes(&Scope::new(path("_SB_"), all(&devices)));
    // The sleeping type of the power-off; nothing else of it is used.
    named("_S5_", &Package::new(vec![&S5, &ZERO, &ZERO, &ZERO])).to_aml_bytes(&mut table);
    Ok(table)
}

/// The power button, the generation id (Microsoft's "Virtual Machine Generation ID"), and the generic event device (§5.6.9)
/// that tells of both.
///
/// A guest may have a driver for event devices and nobody who listens to buttons. Who does, listens to all: so there is a
/// lid too, always open, whose state is asked for by its driver as soon as somebody listens (\_LID).
fn events() -> [Code; 6] {
    // The two registers for events lie side by side.
    let region = code(&OpRegion::new(path("POWR"), OpRegionSpace::SystemIO, &((POWER + EVENT) as u16), &2u8));
    let names = vec![FieldEntry::Named(*b"EVNT", 8), FieldEntry::Named(*b"HEAR", 8)];
    let (width, update) = (FieldAccessType::Byte, FieldUpdateRule::Preserve);
    let fields = code(&Field::new(path("POWR"), width, FieldLockRule::NoLock, update, names));
    let button = device("PWRB", &[named("_HID", &EISAName::new("PNP0C0C")), named("_UID", &ZERO)]);
    let hears = code(&Store::new(&path("HEAR"), &ONE));
    let lid = [named("_HID", &EISAName::new("PNP0C0D")), method("_LID", 0, false, &[hears, code(&Return::new(&ONE))])];
    // A read clears the register, so it is read once.
    let pressed = code(&Notify::new(&path("PWRB"), &0x80u8));
    let renewed = code(&Notify::new(&path("VGEN"), &0x80u8));
    let happened = [
        code(&Store::new(&Local(0), &path("EVNT"))),
        code(&And::new(&Local(1), &Local(0), &BUTTON)),
        code(&If::new(&Local(1), all(&[pressed]))),
        code(&And::new(&Local(1), &Local(0), &power::GENERATION)),
        code(&If::new(&Local(1), all(&[renewed]))),
    ];
    let generation = [
        named("_HID", &"BNTM0001"),
        named("_CID", &"VM_Gen_Counter"),
        named("_DDN", &"VM_Gen_Counter"),
        named("ADDR", &Package::new(vec![&(GENERATION as u32), &ZERO])),
    ];
    let ged = [
        named("_HID", &"ACPI0013"),
        resources(&[code(&Interrupt::new(true, false, false, false, POWER_IRQ))]),
        method("_EVT", 1, true, &happened),
    ];
    [region, fields, button, device("LID_", &lid), device("VGEN", &generation), device("GED_", &ged)]
}

/// A page of registers of a virtio device ("LNRO0005"), with one of the lines that they share.
fn virtio(number: usize, interrupts: bool) -> Code {
    let Span { start, size } = page_of(number);
    let mut parts = vec![code(&Memory32Fixed::new(true, start as u32, size as u32))];
    if interrupts {
        let input = INTX_INPUTS.get(turn(number)).copied().unwrap_or_default();
        parts.push(code(&Interrupt::new(true, false, false, true, input)));
    }
    let name = format!("VR{number:02X}");
    device(&name, &[named("_HID", &"LNRO0005"), named("_UID", &number), named("_CCA", &ONE), resources(&parts)])
}

/// The PCI bus, and that the place of its configuration spaces is taken, without which Linux does not use it (PCI Firmware
/// 3.3 §4.1.2).
fn pci(config: &Config, interrupts: bool) -> Result<[Code; 2]> {
    let last = PCI_WINDOW + (PCI_WINDOW_SIZE - 1);
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        PCI_WINDOW as u32,
        u32::try_from(last)?,
        None,
    );
    let ports = u16::try_from(PCI_PORTS)?;
    let parts = [code(&AddressSpace::new_bus_number(0u16, 0u16)), code(&IO::new(ports, ports, 1, 8)), code(&window)];
    // INTA of each slot is an input of the I/O APIC, without a link in between (ACPI 6.5 §6.2.13).
    let routes: Vec<_> = (1..=config.virtio_devices())
        .filter(|_| interrupts)
        .map(|slot| {
            let input = INTX_INPUTS.get(turn(slot)).copied().unwrap_or_default();
            code(&Package::new(vec![&((slot as u32) << 16 | 0xffff), &ZERO, &ZERO, &input]))
        })
        .collect();
    let bridge = device(
        "PCI0",
        &[
            named("_HID", &EISAName::new("PNP0A08")),
            named("_CID", &EISAName::new("PNP0A03")),
            named("_SEG", &PCI_SEGMENT),
            named("_UID", &ZERO),
            named("_BBN", &ZERO),
            named("_CCA", &ONE),
            resources(&parts),
            named("_PRT", &Package::new(all(&routes))),
        ],
    );
    let taken = [code(&Memory32Fixed::new(true, PCI_ECAM as u32, PCI_ECAM_SIZE as u32))];
    Ok([bridge, device("MRES", &[named("_HID", &EISAName::new("PNP0C02")), resources(&taken)])])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Cpus;

    fn tables(config: &Config) -> Vec<u8> {
        let firmware = firmware(&Config { platform: Some(Platform::Acpi), ..config.clone() }).unwrap();
        assert_eq!((firmware.rsdp, firmware.parts[0].1), (Some(ACPI), ACPI));
        firmware.parts[0].2.clone()
    }

    fn long(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(*bytes[at..].first_chunk().unwrap())
    }

    /// A table of the blob by its address, its length and checksum found to be right.
    fn table(blob: &[u8], at: u64) -> &[u8] {
        let table = &blob[usize::try_from(at - ACPI).unwrap()..];
        let length = u32::from_le_bytes(*table[4..].first_chunk().unwrap()) as usize;
        let table = &table[..length];
        assert_eq!(table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0, "{:?}", &table[..4]);
        table
    }

    #[test]
    fn every_table_is_found_from_the_root_and_its_sum_is_right() {
        for (cpus, irqchip) in [(1, None), (255, None), (1, Some(IrqChip::None))] {
            let blob = tables(&Config { cpus: Cpus::cores(cpus), irqchip, ..Config::default() });
            assert_eq!(&blob[..8], b"RSD PTR ");
            let xsdt = table(&blob, long(&blob, 24));
            let names: Vec<_> = xsdt[36..]
                .chunks(8)
                .map(|at| String::from_utf8_lossy(&table(&blob, long(at, 0))[..4]).into_owned())
                .collect();
            let expected = if irqchip.is_none() { vec!["FACP", "APIC", "SPCR"] } else { vec!["FACP", "SPCR"] };
            assert_eq!(names, expected);
            let fadt = table(&blob, long(xsdt, 36));
            assert_eq!((fadt.len(), &table(&blob, long(fadt, 140))[..4]), (276, &b"DSDT"[..]));
            assert!(blob.len() < 0x2_0000);
        }
    }

    #[test]
    fn each_cpu_has_its_local_apic() {
        let body = madt(&Config { cpus: Cpus::cores(3), ..Config::default() }).unwrap();
        let ids: Vec<_> = (0..3).map(|n| body[8 + 8 * n..][..5].to_vec()).collect();
        assert_eq!(ids, [[0, 8, 0, 0, 1], [0, 8, 1, 1, 1], [0, 8, 2, 2, 1]]);
        assert_eq!(body.len(), 8 + 3 * 8 + 12 + 6);
    }

    #[test]
    fn a_legacy_machine_has_none() {
        assert_eq!(firmware(&Config::default()).unwrap(), Firmware::default());
    }
}
