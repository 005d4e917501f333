//! The whole state of a CPU, and of what KVM emulates besides CPUs, read and set: what a snapshot holds of KVM.
//!
//! Most of it are structures of the KVM API that nobody here looks into, so they are lists of 32-bit words under their names;
//! model-specific registers are pairs. Invariants: what was read is set in an order in which nothing changes what was set
//! before: the local APIC before its timer's deadline, the time-stamp counter before that, a CPU's events last of all that is
//! its own. And the guest's clocks are read and set in one go, in one order: one that was read a millisecond after the
//! other would be a millisecond off for ever.

use std::io;
use std::iter;
use std::ops::RangeInclusive;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::cpuid::lacking;
use crate::config::IrqChip;
use crate::error::{Refusal, refuse};
use crate::host::sys::state::{ask, nested, reads, set_nested, size_of_request, writes};

/// IA32_TIME_STAMP_COUNTER, IA32_TSC_DEADLINE (SDM vol. 4), in the order in which they are set.
const TIMES: [u32; 2] = [0x10, 0x6e0];

/// Where a local APIC has the processor priority (SDM vol. 3, "Processor Priority Register"), as a word.
const PRIORITY: usize = 0xa0 / 4;
/// Where the state of a guest's guest by SVM has DR6 of the guest itself: behind the head, in the VMCB (AMD64 APM vol. 2,
/// appendix B), as a word.
const OUTER_DR6: usize = (128 + 0x568) / 4;

/// CR4 and EFER: the guest may run guests of its own, by VMX or by SVM.
const CR4_VMXE: u64 = 1 << 13;
const EFER_SVME: u64 = 1 << 12;

/// Structures in which a new CPU has nothing but these words (SDM vol. 3, "Processor State After Reset"): XCR0 is x87's bit,
/// DR6 and DR7 have the bits that are always set, the control word of x87 and MXCSR their initial values; and it runs, where
/// nobody has to start it.
const NEW: [(&str, &[(usize, u32)]); 4] = [
    (XSAVE, &[(0, 0x37f), (6, 0x1f80)]),
    ("xcrs", &[(0, 1), (4, 1)]),
    ("debugregs", &[(8, 0xffff_0ff0), (10, 0x400)]),
    (MP_STATE, &[]),
];
/// What the host's CPUs have of MXCSR, and of XCR0 (SDM vol. 1, 10.5.1.2 and 13.4.1: bytes 28, and 464, which are software's).
const OF_THE_HOST: [usize; 2] = [7, 116];
/// Which of its fields are valid, in `kvm_vcpu_events`, whose others are 0 where nothing is pending or masked.
const EVENTS_FLAGS: usize = 5;

/// KVM's own registers, which a new CPU has at 0, and which only a guest that was told of them may set.
const OF_KVM: RangeInclusive<u32> = 0x4b56_4d00..=0x4b56_4dff;

/// MSR_KVM_SYSTEM_TIME and MSR_KVM_SYSTEM_TIME_NEW (Documentation/virt/kvm/x86/msr.rst): where the guest's kvmclock is.
const SYSTEM_TIME: [u32; 2] = [0x12, 0x4b56_4d01];

/// Hyper-V's registers, which CPUID offers to no guest here; two of them are clocks.
const HYPER_V: RangeInclusive<u32> = 0x4000_0000..=0x4000_01ff;

/// A structure of the KVM API: its name, and the requests that read and set it.
struct Part {
    name: &'static str,
    read: u64,
    set: u64,
}

const fn part<T>(name: &'static str, read: u64, set: u64) -> Part {
    Part { name, read: reads(read, size_of::<T>()), set: writes(set, size_of::<T>()) }
}

/// Those of a CPU in the order in which they are set; model-specific registers come before the last.
const CPU: [Part; 9] = [
    part::<kvm_mp_state>(MP_STATE, 0x98, 0x99),
    part::<kvm_regs>("regs", 0x81, 0x82),
    part::<kvm_sregs>("sregs", 0x83, 0x84),
    NESTED,
    part::<kvm_xsave>(XSAVE, 0xa4, 0xa5),
    part::<kvm_xcrs>("xcrs", 0xa6, 0xa7),
    part::<kvm_debugregs>("debugregs", 0xa1, 0xa2),
    LAPIC,
    EVENTS,
];
const MP_STATE: &str = "mp-state";
const XSAVE: &str = "xsave";
const LAPIC: Part = part::<kvm_lapic_state>("lapic", 0x8e, 0x8f);
const EVENTS: Part = part::<kvm_vcpu_events>("events", 0x9f, 0xa0);
/// The guest's own guests. It is there where EFER.SVME is set, has no size of its own, and is set once the registers are those
/// of who runs, the guest or its guest, and before model-specific registers (api.rst, KVM_SET_NESTED_STATE).
const NESTED: Part = Part { name: "nested", read: 0, set: 0 };

/// KVM_GET_IRQCHIP is `_IOWR`, and KVM_SET_IRQCHIP `_IOR`, though it sets.
const IRQCHIP: Part = Part { name: "irqchip", read: writes(0x62, SIZE) | reads(0x62, SIZE), set: reads(0x63, SIZE) };
const SIZE: usize = size_of::<kvm_irqchip>();
/// Two 8259A and the I/O APIC.
const IRQCHIPS: [&str; 3] = ["pic-master", "pic-slave", "ioapic"];
const PIT: Part = part::<kvm_pit_state2>("pit", 0x9f, 0xa0);
const CLOCK: Part = part::<kvm_clock_data>("clock", 0x7c, 0x7b);

/// A structure's content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Words {
    name: String,
    words: Vec<u32>,
}

/// A CPU's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedCpu {
    /// How fast its time-stamp counter runs, where KVM says so.
    tsc_khz: Option<u32>,
    /// function, index, flags, eax, ebx, ecx, edx
    cpuid: Vec<[u32; 7]>,
    parts: Vec<Words>,
    msrs: Registers,
}

impl SavedCpu {
    /// Its guest has a kvmclock, by which it can be told that it stood still.
    pub fn hears_of_stops(&self) -> bool {
        self.msrs.iter().any(|(index, value)| SYSTEM_TIME.contains(index) && *value != 0)
    }
}

/// Model-specific registers: number and value.
type Registers = Vec<(u32, u64)>;

/// The state of what KVM emulates besides CPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedVm {
    parts: Vec<Words>,
    /// How fast the time-stamp counter of each CPU runs, where KVM says so.
    rates: Vec<Option<u32>>,
    /// That counter and what depends on it.
    times: Vec<Registers>,
    clock: Words,
}

/// Reads a structure; its first word says which of several is meant, where there are several.
fn read(fd: &impl AsRawFd, part: &Part, name: &str, which: u32) -> Result<Words> {
    let bytes = if part.name == NESTED.name {
        nested(fd)
    } else {
        let mut bytes = vec![0; size_of_request(part.read)];
        bytes.iter_mut().zip(which.to_le_bytes()).for_each(|(byte, from)| *byte = from);
        ask(fd, part.read, &mut bytes).map(|()| bytes)
    };
    let bytes = bytes.with_context(|| format!("reading {name} from KVM"))?;
    let words = bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
    Ok(Words { name: name.into(), words })
}

/// It is as in a CPU that has not run yet.
fn is_new(Words { name, words }: &Words) -> bool {
    if name == EVENTS.name {
        return words.iter().enumerate().all(|(at, word)| *word == 0 || at == EVENTS_FLAGS);
    }
    let new = NEW.iter().find(|(known, _)| known == name).map(|(_, words)| *words);
    let value = |at| new.into_iter().flatten().find(|(index, _)| *index == at).map_or(0, |(_, value)| *value);
    let hosts = |at| name == XSAVE && OF_THE_HOST.contains(&at);
    new.is_some() && words.iter().enumerate().all(|(at, word)| *word == value(at) || hosts(at))
}

fn set(fd: &impl AsRawFd, part: &Part, saved: &Words) -> Result<()> {
    let mut bytes: Vec<u8> = saved.words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let given = if part.name == NESTED.name { set_nested(fd, &bytes) } else { ask(fd, part.set, &mut bytes) };
    given.with_context(|| format!("giving KVM {}", saved.name))
}

/// KVM_GET_XSAVE and KVM_SET_XSAVE pass 4 KiB, where there is no more.
fn check_size(kvm: &Kvm) -> Result<(), Refusal> {
    static SIZE: OnceLock<i32> = OnceLock::new();
    if *SIZE.get_or_init(|| kvm.check_extension_int(Cap::Xsave2)) > size_of::<kvm_xsave>() as i32 {
        return Err(refuse("this host's CPUs have more registers than a snapshot holds (KVM_CAP_XSAVE2)"));
    }
    Ok(())
}

/// Reads a CPU's state; its last exit was completed.
///
/// # Errors
/// KVM refuses, or it has more state than is known here.
pub fn save_cpu(kvm: &Kvm, fd: &VcpuFd, irqchip: Option<IrqChip>) -> Result<SavedCpu> {
    check_size(kvm)?;
    let sregs = fd.get_sregs().map_err(io::Error::from).context("KVM_GET_SREGS")?;
    if sregs.cr4 & CR4_VMXE != 0 {
        return Err(
            refuse("the guest is a hypervisor itself, by VMX, whose guests a snapshot does not hold yet").into()
        );
    }
    let there = |part: &&Part| match part.name {
        name if name == LAPIC.name => irqchip != Some(IrqChip::None),
        name if name == NESTED.name => sregs.efer & EFER_SVME != 0,
        _ => true,
    };
    let mut parts = CPU.iter().filter(there).map(|part| read(fd, part, part.name, 0)).collect::<Result<Vec<_>>>()?;
    // The first follows from others, and KVM brings it up to date when it needs it; the second is among the debug registers
    // too. Neither is an input of the other call.
    for (name, at) in [(LAPIC.name, PRIORITY), (NESTED.name, OUTER_DR6)] {
        let part = parts.iter_mut().find(|part| part.name == name);
        part.and_then(|part| part.words.get_mut(at)).into_iter().for_each(|word| *word = 0);
    }
    let cpuid = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(io::Error::from).context("KVM_GET_CPUID2")?;
    let leaf = |e: &kvm_cpuid_entry2| [e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx];
    Ok(SavedCpu {
        tsc_khz: fd.get_tsc_khz().ok(),
        cpuid: cpuid.as_slice().iter().map(leaf).collect(),
        parts,
        msrs: {
            let list = kvm.get_msr_index_list().map_err(io::Error::from).context("KVM_GET_MSR_INDEX_LIST")?;
            let kept = |index: &u32| !TIMES.contains(index) && !HYPER_V.contains(index);
            msrs(fd, &list.as_slice().iter().copied().filter(kept).collect::<Vec<_>>())?
        },
    })
}

/// Those of the model-specific registers `rest` that KVM gives.
fn msrs(fd: &VcpuFd, mut rest: &[u32]) -> Result<Registers> {
    let mut known = Vec::new();
    while !rest.is_empty() {
        let entries: Vec<_> = rest.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut asked = Msrs::from_entries(&entries).context("too many MSRs")?;
        let count = fd.get_msrs(&mut asked).map_err(io::Error::from).context("KVM_GET_MSRS")?;
        let given = asked.as_slice().iter().take(count).map(|entry| (entry.index, entry.data));
        known.extend(given.filter(|(index, data)| *data != 0 || !OF_KVM.contains(index)));
        // It stops at the first that it does not give.
        rest = rest.get(count + 1..).unwrap_or_default();
    }
    Ok(known)
}

/// Sets a CPU's state, which has not run yet.
///
/// # Errors
/// KVM refuses, or the state is not one of this version's.
pub fn load_cpu(kvm: &Kvm, fd: &VcpuFd, saved: &SavedCpu) -> Result<()> {
    check_size(kvm)?;
    let SavedCpu { tsc_khz, cpuid, parts, msrs } = saved;
    // The same for all, before any is set.
    static USUAL: OnceLock<Option<u32>> = OnceLock::new();
    if let Some(khz) = tsc_khz
        && *USUAL.get_or_init(|| fd.get_tsc_khz().ok()) != Some(*khz)
    {
        fd.set_tsc_khz(*khz).map_err(|e| {
            refuse(format!("this host cannot let a time-stamp counter run at {khz} kHz: {}", io::Error::from(e)))
        })?;
    }
    if !cpuid.is_empty() {
        // What it was told when it was built is what this host has.
        let here = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(io::Error::from).context("KVM_GET_CPUID2")?;
        let lacking = lacking(cpuid, here.as_slice());
        if !lacking.is_empty() {
            let why = format!("this host's CPUs lack what the guest was told of, in CPUID: {}", lacking.join(", "));
            return Err(refuse(why).hint("go on where its snapshot was written, or on a CPU with more").into());
        }
        let entry = |[function, index, flags, eax, ebx, ecx, edx]: &[u32; 7]| kvm_cpuid_entry2 {
            function: *function,
            index: *index,
            flags: *flags,
            eax: *eax,
            ebx: *ebx,
            ecx: *ecx,
            edx: *edx,
            ..Default::default()
        };
        let entries: Vec<_> = cpuid.iter().map(entry).collect();
        let entries = CpuId::from_entries(&entries).context("too many CPUID leaves")?;
        fd.set_cpuid2(&entries).map_err(io::Error::from).context("KVM_SET_CPUID2")?;
    }
    let mut left: Vec<&Words> = parts.iter().collect();
    // CPUs with a local APIC wait to be started.
    let starts = left.iter().any(|words| words.name == LAPIC.name);
    // And of one with guests of its own it is not known what events there are.
    let guests = left.iter().any(|words| words.name == NESTED.name);
    for part in &CPU {
        if part.name == EVENTS.name {
            set_msrs(fd, msrs)?;
        }
        let Some(at) = left.iter().position(|words| words.name == part.name) else {
            if part.name == LAPIC.name || part.name == NESTED.name {
                continue;
            }
            bail!("a CPU's saved state has no {}", part.name);
        };
        let words = left.remove(at);
        let odd = match part.name {
            name if name == MP_STATE => starts,
            name if name == EVENTS.name => guests,
            _ => false,
        };
        // Each call counts in the life of a small machine.
        if odd || !is_new(words) {
            set(fd, part, words)?;
        }
    }
    match left.first() {
        Some(words) => bail!("a CPU's saved state has {:?}, which nobody knows", words.name),
        None => Ok(()),
    }
}

fn set_msrs(fd: &VcpuFd, msrs: &[(u32, u64)]) -> Result<()> {
    let entry = |(index, data): &(u32, u64)| kvm_msr_entry { index: *index, data: *data, ..Default::default() };
    let mut rest = msrs;
    while let Some((refused, data)) = {
        let entries: Vec<_> = rest.iter().map(entry).collect();
        let given = Msrs::from_entries(&entries).context("too many MSRs")?;
        let count = fd.set_msrs(&given).map_err(io::Error::from).context("KVM_SET_MSRS")?;
        let refused = rest.get(count).copied();
        rest = rest.get(count + 1..).unwrap_or_default();
        refused
    } {
        // Some can only be read; what is there is as good.
        let mut now = Msrs::from_entries(&[entry(&(refused, 0))]).context("one MSR")?;
        let known = fd.get_msrs(&mut now).is_ok_and(|count| count == 1);
        if !known || now.as_slice().first().is_none_or(|entry| entry.data != data) {
            bail!("KVM does not take {data:#x} for the model-specific register {refused:#x}");
        }
    }
    Ok(())
}

/// Reads the state of what KVM emulates besides CPUs.
///
/// # Errors
/// KVM refuses.
pub fn save_vm(fd: &VmFd, cpus: &[&VcpuFd], irqchip: Option<IrqChip>) -> Result<SavedVm> {
    let mut parts = Vec::new();
    if irqchip == Some(IrqChip::Kernel) {
        for (which, name) in (0..).zip(IRQCHIPS) {
            parts.push(read(fd, &IRQCHIP, name, which)?);
        }
        parts.push(read(fd, &PIT, PIT.name, 0)?);
    }
    let times = cpus.iter().map(|cpu| msrs(cpu, &TIMES)).collect::<Result<_>>()?;
    let mut clock = read(fd, &CLOCK, CLOCK.name, 0)?;
    // The time alone: what KVM says besides is of this moment and this host, and no input of the other call.
    clock.words.iter_mut().skip(2).for_each(|word| *word = 0);
    let rates = cpus.iter().map(|cpu| cpu.get_tsc_khz().ok()).collect();
    Ok(SavedVm { parts, rates, times, clock })
}

/// Sets that state, of a machine of the same kind whose CPUs have theirs.
///
/// # Errors
/// KVM refuses, or the state is not one of this version's.
pub fn load_vm(fd: &VmFd, cpus: &[&VcpuFd], saved: &SavedVm, passed: Duration) -> Result<()> {
    let SavedVm { parts, rates, times, clock } = saved;
    for words in parts {
        let part = match words.name.as_str() {
            name if IRQCHIPS.contains(&name) => &IRQCHIP,
            name if name == PIT.name => &PIT,
            name => bail!("a machine's saved state has {name:?}, which nobody knows"),
        };
        set(fd, part, words)?;
    }
    if times.len() != cpus.len() {
        bail!("the saved state has the times of {} CPUs", times.len());
    }
    // All its clocks, or none: they would not agree else.
    let known = rates.len() == cpus.len() && rates.iter().all(Option::is_some);
    let passed = if known { passed } else { Duration::ZERO };
    for ((cpu, times), khz) in cpus.iter().zip(times).zip(rates.iter().copied().chain(iter::repeat(None))) {
        set_msrs(cpu, &later(times, khz.unwrap_or(0), passed))?;
    }
    let mut clock = clock.clone();
    if let [low, high, ..] = clock.words.as_mut_slice() {
        let nanoseconds = u64::try_from(passed.as_nanos()).unwrap_or(u64::MAX);
        let now = (u64::from(*high) << 32 | u64::from(*low)).wrapping_add(nanoseconds);
        (*low, *high) = (now as u32, (now >> 32) as u32);
    }
    set(fd, &CLOCK, &clock)
}

/// A CPU's times once so much time has passed.
fn later(times: &[(u32, u64)], khz: u32, passed: Duration) -> Registers {
    let ticks = passed.as_nanos().saturating_mul(khz.into()) / 1_000_000;
    let later = |(index, value): &(u32, u64)| match TIMES.first() == Some(index) {
        true => (*index, value.wrapping_add(ticks as u64)),
        false => (*index, *value),
    };
    times.iter().map(later).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_stamp_counter_goes_on_with_the_time_and_a_deadline_stays() {
        let times = [(0x10, u64::MAX), (0x6e0, 7)];
        assert_eq!(later(&times, 2_596_124, Duration::from_secs(2)), [(0x10, 5_192_247_999), (0x6e0, 7)]);
        assert_eq!(later(&times, 2_596_124, Duration::ZERO), times);
        assert_eq!(later(&times, u32::MAX, Duration::MAX).len(), 2);
    }

    #[test]
    fn what_is_new_is_known_by_every_word() {
        let words = |name: &str, words: &[u32]| is_new(&Words { name: name.into(), words: words.to_vec() });
        assert!(words("xcrs", &[1, 0, 0, 0, 1, 0]) && !words("xcrs", &[1, 0, 0, 0, 7, 0]) && words("mp-state", &[0]));
        let mut debug = vec![0; 32];
        (debug[8], debug[10]) = (0xffff_0ff0, 0x400);
        assert!(words("debugregs", &debug));
        debug[0] = 1;
        assert!(words("events", &[0, 0, 0, 0, 0, 13, 0]) && !words("events", &[0, 0, 0, 1, 0, 13, 0]));
        assert!(!words("debugregs", &debug) && !words("regs", &[0]) && !words("mp-state", &[1]));
    }
}
