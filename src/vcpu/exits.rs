//! Reading `kvm_run`: from KVM's exit reasons to [`Exit`], and the names of the fatal ones.

#![allow(unsafe_code)]

use kvm_bindings::*;

use super::reasons;
use crate::bus::{Exit, FaultInfo, Space};

/// What `run`, the start of a mapping of `run_size` bytes, says of the last KVM_RUN.
pub fn decode(run: &mut kvm_run, run_size: usize) -> Exit<'_> {
    match run.exit_reason {
        KVM_EXIT_IO => return port_io(run, run_size),
        KVM_EXIT_MMIO => {
            // SAFETY: the exit reason says that this member of the union is the one that KVM filled.
            let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
            let (addr, write) = (mmio.phys_addr, mmio.is_write != 0);
            let width = usize::try_from(mmio.len).map_or(8, |len| len.clamp(1, 8));
            let data = mmio.data.split_at_mut(width).0;
            return match write {
                true => Exit::Write { space: Space::Mmio, addr, width, data },
                false => Exit::Read { space: Space::Mmio, addr, width, data },
            };
        }
        KVM_EXIT_HLT => return Exit::Halt,
        // SAFETY: the exit reason says that this member of the union is the one that KVM filled.
        KVM_EXIT_IOAPIC_EOI => return Exit::EndOfInterrupt(unsafe { run.__bindgen_anon_1.eoi }.vector),
        KVM_EXIT_INTR | KVM_EXIT_IRQ_WINDOW_OPEN | KVM_EXIT_SET_TPR => return Exit::Interrupted,
        KVM_EXIT_SHUTDOWN => return Exit::Shutdown,
        KVM_EXIT_DEBUG => return Exit::Debug,
        KVM_EXIT_SYSTEM_EVENT => return system_event(run),
        _ => {}
    }
    Exit::Fault(Box::new(fault(run)))
}

fn port_io(run: &mut kvm_run, run_size: usize) -> Exit<'_> {
    // SAFETY: the exit reason says that this member of the union is the one that KVM filled.
    let io = unsafe { run.__bindgen_anon_1.io };
    let width = usize::from(io.size);
    let offset = usize::try_from(io.data_offset).ok();
    let length = usize::try_from(io.count).ok().and_then(|count| count.checked_mul(width));
    let (Some(offset), Some(length)) = (offset, length) else { return bad_io(&io) };
    if offset.checked_add(length).is_none_or(|end| end > run_size) {
        return bad_io(&io);
    }
    // SAFETY: `run` is the start of a mapping of `run_size` bytes, which the range was just checked against.
    let data = unsafe { (&raw mut *run).cast::<u8>().add(offset) };
    // SAFETY: as above; the mapping is borrowed through `run` for as long as the slice lives.
    let data = unsafe { std::slice::from_raw_parts_mut(data, length) };
    let addr = u64::from(io.port);
    match u32::from(io.direction) {
        KVM_EXIT_IO_OUT => Exit::Write { space: Space::Pio, addr, width, data },
        _ => Exit::Read { space: Space::Pio, addr, width, data },
    }
}

fn bad_io(io: &kvm_run__bindgen_ty_1__bindgen_ty_4) -> Exit<'static> {
    let detail = format!("size {}, count {}, offset {:#x} lie outside kvm_run", io.size, io.count, io.data_offset);
    Exit::Fault(Box::new(FaultInfo { name: "KVM_EXIT_IO".into(), detail, bytes: Vec::new() }))
}

fn system_event(run: &kvm_run) -> Exit<'_> {
    // SAFETY: the exit reason says that this member of the union is the one that KVM filled.
    let event = unsafe { run.__bindgen_anon_1.system_event };
    // SAFETY: `data` is the union's largest member; every bit pattern is valid.
    let words = unsafe { event.__bindgen_anon_1.data };
    let count = usize::try_from(event.ndata).unwrap_or(0).min(words.len());
    Exit::System { event: event.type_, data: words.iter().take(count).copied().collect() }
}

/// An exit that no guest survives, in the words of the KVM API document.
fn fault(run: &kvm_run) -> FaultInfo {
    let name = name(run.exit_reason);
    let union = &run.__bindgen_anon_1;
    let mut bytes = Vec::new();
    let detail = match run.exit_reason {
        KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: the exit reason says which member of the union KVM filled.
            let entry = unsafe { union.fail_entry };
            let (reason, cpu) = (entry.hardware_entry_failure_reason, entry.cpu);
            let name = reasons::entry_failure(reason);
            format!(
                "hardware entry failure reason {reason:#x} ({name}) on host CPU {cpu}: the CPU refuses the guest's state"
            )
        }
        KVM_EXIT_UNKNOWN => {
            // SAFETY: as above.
            let reason = unsafe { union.hw }.hardware_exit_reason;
            format!("hardware exit reason {reason:#x} ({})", reasons::exit(reason))
        }
        KVM_EXIT_INTERNAL_ERROR => {
            // SAFETY: as above.
            let internal = unsafe { union.internal };
            let count = usize::try_from(internal.ndata).unwrap_or(0).min(internal.data.len());
            let words = internal.data.get(..count).unwrap_or_default();
            let suberror = internal.suberror;
            if suberror == KVM_INTERNAL_ERROR_EMULATION {
                bytes = emulated_bytes(words);
            }
            let name = suberror_name(suberror);
            // KVM api.rst: where an exit was in the way, its reason is the word after the event's, or the first.
            let reason = match (suberror, words) {
                (KVM_INTERNAL_ERROR_DELIVERY_EV, [_, reason, ..])
                | (KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, [reason, ..]) => format!("; {}", reasons::exit(*reason)),
                _ => String::new(),
            };
            format!("suberror {suberror} ({name}{reason}), data {words:x?}")
        }
        KVM_EXIT_EXCEPTION => {
            // SAFETY: as above.
            let exception = unsafe { union.ex };
            format!("exception {}, error code {:#x}", exception.exception, exception.error_code)
        }
        KVM_EXIT_ARM_NISV => {
            // SAFETY: as above.
            let access = unsafe { union.arm_nisv };
            let (address, syndrome) = (access.fault_ipa, access.esr_iss);
            format!(
                "a load or store at {address:#x}, outside RAM, by an instruction that the CPU does not describe (ISS \
                 {syndrome:#x}): of a pair, of a vector register, or with its base updated; devices want plain LDR and STR"
            )
        }
        _ => "an exit that Bantam does not expect".into(),
    };
    FaultInfo { name, detail, bytes }
}

/// The instruction that KVM could not emulate: word 0 is flags, then a size byte and up to 15 bytes (KVM api.rst,
/// `emulation_failure`).
fn emulated_bytes(words: &[u64]) -> Vec<u8> {
    let [flags, rest @ ..] = words else { return Vec::new() };
    if flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) == 0 {
        return Vec::new();
    }
    let bytes: Vec<u8> = rest.iter().flat_map(|w| w.to_le_bytes()).collect();
    let [size, bytes @ ..] = bytes.as_slice() else { return Vec::new() };
    bytes.iter().take(usize::from(*size).min(15)).copied().collect()
}

/// What a system event that is neither power-off nor reset says (KVM api.rst, KVM_EXIT_SYSTEM_EVENT).
pub fn system_event_name(event: u32) -> &'static str {
    match event {
        KVM_SYSTEM_EVENT_CRASH => "KVM_SYSTEM_EVENT_CRASH: the guest says that it has crashed",
        KVM_SYSTEM_EVENT_WAKEUP => "KVM_SYSTEM_EVENT_WAKEUP: an interrupt for a suspended CPU",
        KVM_SYSTEM_EVENT_SUSPEND => "KVM_SYSTEM_EVENT_SUSPEND: the guest wants to sleep",
        KVM_SYSTEM_EVENT_SEV_TERM => "KVM_SYSTEM_EVENT_SEV_TERM: an encrypted guest ended itself",
        _ => "unknown to Bantam",
    }
}

fn suberror_name(suberror: u32) -> &'static str {
    match suberror {
        KVM_INTERNAL_ERROR_EMULATION => "KVM_INTERNAL_ERROR_EMULATION: KVM cannot emulate the instruction",
        KVM_INTERNAL_ERROR_SIMUL_EX => "KVM_INTERNAL_ERROR_SIMUL_EX: exceptions at the same time",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "KVM_INTERNAL_ERROR_DELIVERY_EV: an exit while delivering an event",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
            "KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: an exit that KVM does not know"
        }
        _ => "unknown",
    }
}

/// The name of an exit reason; its number where there is none.
pub fn name(reason: u32) -> String {
    const NAMES: [&str; 40] = [
        "UNKNOWN",
        "EXCEPTION",
        "IO",
        "HYPERCALL",
        "DEBUG",
        "HLT",
        "MMIO",
        "IRQ_WINDOW_OPEN",
        "SHUTDOWN",
        "FAIL_ENTRY",
        "INTR",
        "SET_TPR",
        "TPR_ACCESS",
        "S390_SIEIC",
        "S390_RESET",
        "DCR",
        "NMI",
        "INTERNAL_ERROR",
        "OSI",
        "PAPR_HCALL",
        "S390_UCONTROL",
        "WATCHDOG",
        "S390_TSCH",
        "EPR",
        "SYSTEM_EVENT",
        "S390_STSI",
        "IOAPIC_EOI",
        "HYPERV",
        "ARM_NISV",
        "X86_RDMSR",
        "X86_WRMSR",
        "DIRTY_RING_FULL",
        "AP_RESET_HOLD",
        "X86_BUS_LOCK",
        "XEN",
        "RISCV_SBI",
        "RISCV_CSR",
        "NOTIFY",
        "LOONGARCH_IOCSR",
        "MEMORY_FAULT",
    ];
    let name = usize::try_from(reason).ok().and_then(|i| NAMES.get(i));
    name.map_or_else(|| format!("exit reason {reason}"), |name| format!("KVM_EXIT_{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_emulation_failure_gives_its_instruction() {
        // Flags, then size 3 and bytes c5 f8 77 in one little-endian word.
        assert_eq!(emulated_bytes(&[1, 0x77f8_c503, 0]), [0xc5, 0xf8, 0x77]);
        assert!(emulated_bytes(&[0, 0x77f8_c503]).is_empty());
        assert_eq!(emulated_bytes(&[1, 0xff]).len(), 7);
        assert!(emulated_bytes(&[]).is_empty());
    }

    #[test]
    fn every_fatal_exit_has_its_name() {
        assert_eq!(name(KVM_EXIT_IO), "KVM_EXIT_IO");
        assert_eq!(name(KVM_EXIT_INTERNAL_ERROR), "KVM_EXIT_INTERNAL_ERROR");
        assert_eq!(name(KVM_EXIT_SYSTEM_EVENT), "KVM_EXIT_SYSTEM_EVENT");
        assert_eq!(name(KVM_EXIT_NOTIFY), "KVM_EXIT_NOTIFY");
        assert_eq!(name(KVM_EXIT_MEMORY_FAULT), "KVM_EXIT_MEMORY_FAULT");
        assert_eq!(name(1000), "exit reason 1000");
        let mut run = kvm_run { exit_reason: KVM_EXIT_FAIL_ENTRY, ..Default::default() };
        run.__bindgen_anon_1.fail_entry.hardware_entry_failure_reason = 0x8000_0021;
        assert!(fault(&run).detail.contains("0x80000021 (VT-x: invalid guest state)"));
        let mut run = kvm_run { exit_reason: KVM_EXIT_INTERNAL_ERROR, ..Default::default() };
        run.__bindgen_anon_1.internal = kvm_run__bindgen_ty_1__bindgen_ty_13 { suberror: 3, ndata: 99, data: [5; 16] };
        assert!(fault(&run).detail.contains("DELIVERY_EV"));
        let mut run = kvm_run { exit_reason: KVM_EXIT_ARM_NISV, ..Default::default() };
        run.__bindgen_anon_1.arm_nisv = kvm_run__bindgen_ty_1__bindgen_ty_22 { esr_iss: 0x46, fault_ipa: 0x996 };
        let fault = fault(&run);
        assert!(
            fault.name == "KVM_EXIT_ARM_NISV" && fault.detail.contains("at 0x996") && fault.detail.contains("0x46")
        );
        assert!(system_event_name(3).contains("CRASH") && system_event_name(99).contains("unknown"));
    }

    #[test]
    fn string_io_outside_kvm_run_is_a_fault_not_a_read() {
        let mut run = kvm_run { exit_reason: KVM_EXIT_IO, ..Default::default() };
        run.__bindgen_anon_1.io =
            kvm_run__bindgen_ty_1__bindgen_ty_4 { direction: 1, size: 4, port: 1, count: u32::MAX, data_offset: 4096 };
        assert!(matches!(port_io(&mut run, 8192), Exit::Fault(_)));
    }
}
