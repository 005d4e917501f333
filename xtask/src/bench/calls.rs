//! Counting system calls with strace, and what each KVM ioctl of a run is for.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::sh;

/// An ioctl of the KVM API: its number (the low byte of the request), its name, and why Bantam may make it although the
/// floor does without. An empty reason justifies nothing.
type Known = (u8, &'static str, &'static str);

const CPUID: &str = "a CPU without CPUID refuses long mode and SSE; asked once a process, set once a CPU";
const NISV: &str =
    "an access that KVM cannot emulate is reported with its address, not as ENOSYS (KVM_CAP_ARM_NISV_TO_USER)";
const STACK: &str = "a flat guest's stack pointer is at the end of RAM";
const GIC: &str = "a guest with one CPU may want interrupts; first the version, and the ITS, are asked for. --irqchip none does without";
const REAL_MODE: &str = "VT-x without unrestricted guest runs real mode in pages put here (api.rst 4.35, 4.90)";

/// Every ioctl that Bantam or the floor may make. The bench calls an additional one without a reason UNJUSTIFIED.
const KNOWN: [Known; 61] = [
    (0x00, "KVM_GET_API_VERSION", "any version but 12 is refused, and the reason said (P-03)"),
    (0x01, "KVM_CREATE_VM", ""),
    (0x02, "KVM_GET_MSR_INDEX_LIST", ""),
    (0x03, "KVM_CHECK_EXTENSION", "a missing capability is named before the guest starts (P-03)"),
    (0x04, "KVM_GET_VCPU_MMAP_SIZE", ""),
    (0x05, "KVM_GET_SUPPORTED_CPUID", CPUID),
    (0x09, "KVM_GET_EMULATED_CPUID", ""),
    (0x0a, "KVM_GET_MSR_FEATURE_INDEX_LIST", ""),
    (0x41, "KVM_CREATE_VCPU", ""),
    (0x42, "KVM_GET_DIRTY_LOG", ""),
    (0x46, "KVM_SET_USER_MEMORY_REGION", ""),
    (0x47, "KVM_SET_TSS_ADDR", REAL_MODE),
    (0x48, "KVM_SET_IDENTITY_MAP_ADDR", REAL_MODE),
    (0x49, "KVM_SET_USER_MEMORY_REGION2", ""),
    (0x60, "KVM_CREATE_IRQCHIP", ""),
    (0x61, "KVM_IRQ_LINE", ""),
    (0x62, "KVM_GET_IRQCHIP", ""),
    (0x63, "KVM_SET_IRQCHIP", ""),
    (0x6a, "KVM_SET_GSI_ROUTING", ""),
    (0x76, "KVM_IRQFD", ""),
    (0x77, "KVM_CREATE_PIT2", ""),
    (0x78, "KVM_SET_BOOT_CPU_ID", ""),
    (0x79, "KVM_IOEVENTFD", ""),
    (0x7b, "KVM_SET_CLOCK", ""),
    (0x7c, "KVM_GET_CLOCK", ""),
    (0x80, "KVM_RUN", ""),
    (0x81, "KVM_GET_REGS", ""),
    (0x82, "KVM_SET_REGS", ""),
    (0x83, "KVM_GET_SREGS", ""),
    (0x84, "KVM_SET_SREGS", ""),
    (0x85, "KVM_TRANSLATE", ""),
    (0x86, "KVM_INTERRUPT", ""),
    (0x88, "KVM_GET_MSRS", ""),
    (0x89, "KVM_SET_MSRS", ""),
    (0x8b, "KVM_SET_SIGNAL_MASK", ""),
    (0x8c, "KVM_GET_FPU", ""),
    (0x8d, "KVM_SET_FPU", ""),
    (0x8e, "KVM_GET_LAPIC", ""),
    (0x8f, "KVM_SET_LAPIC", ""),
    (0x90, "KVM_SET_CPUID2", CPUID),
    (0x98, "KVM_GET_MP_STATE", ""),
    (0x99, "KVM_SET_MP_STATE", ""),
    (0x9b, "KVM_SET_GUEST_DEBUG", ""),
    (0x9f, "KVM_GET_VCPU_EVENTS", ""),
    (0xa0, "KVM_SET_VCPU_EVENTS", ""),
    (0xa1, "KVM_GET_DEBUGREGS", ""),
    (0xa2, "KVM_SET_DEBUGREGS", ""),
    (0xa3, "KVM_ENABLE_CAP or KVM_GET_TSC_KHZ", NISV),
    (0xa4, "KVM_GET_XSAVE", ""),
    (0xa5, "KVM_SET_XSAVE", ""),
    (0xa6, "KVM_GET_XCRS", ""),
    (0xa7, "KVM_SET_XCRS", ""),
    (0xab, "KVM_GET_ONE_REG", ""),
    (0xac, "KVM_SET_ONE_REG", STACK),
    (0xad, "KVM_KVMCLOCK_CTRL", ""),
    (0xae, "KVM_ARM_VCPU_INIT", ""),
    (0xaf, "KVM_ARM_PREFERRED_TARGET", ""),
    (0xb0, "KVM_GET_REG_LIST", ""),
    (0xe0, "KVM_CREATE_DEVICE", GIC),
    (0xe1, "KVM_SET_DEVICE_ATTR", GIC),
    (0xe2, "KVM_GET_DEVICE_ATTR", ""),
];

/// The number of KVM_RUN.
const RUN: u8 = 0x80;
/// The number of KVM_CHECK_EXTENSION, whose argument is worth showing.
const CHECK_EXTENSION: u8 = 0x03;

/// The system calls of one run.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Calls {
    /// All of them, by any thread.
    pub all: u64,
    /// The KVM ioctls among them, by number.
    pub kvm: BTreeMap<u8, u64>,
    /// The capabilities that were asked for.
    pub capabilities: Vec<String>,
}

impl Calls {
    /// KVM ioctls other than KVM_RUN.
    pub fn kvm_setup(&self) -> u64 {
        self.kvm.iter().filter(|(number, _)| **number != RUN).map(|(_, count)| count).sum()
    }

    /// Takes in one line of `strace -f -X raw -o`: a process, then `name(argument, …) = result`. A call that another
    /// thread's cuts in two counts where it starts.
    fn line(&mut self, line: &str) {
        let call = line.trim_start().trim_start_matches(|c: char| c.is_ascii_digit()).trim_start();
        let Some((name, words)) = call.split_once('(') else { return };
        if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
            return;
        }
        self.all += 1;
        if name != "ioctl" {
            return;
        }
        let mut words = words.splitn(3, ", ").skip(1);
        // A call may be cut before its third argument.
        let request = words.next().and_then(|word| word.split([' ', ')']).next());
        let request = request.and_then(|word| u32::from_str_radix(word.strip_prefix("0x")?, 16).ok()).unwrap_or(0);
        // linux/kvm.h: KVMIO is 0xAE; the type is the second byte of a request, the number the first.
        let [number, kind, ..] = request.to_le_bytes();
        if kind == 0xae {
            *self.kvm.entry(number).or_default() += 1;
            if number == CHECK_EXTENSION {
                let argument = words.next().unwrap_or("").split([')', ' ']).next().unwrap_or("");
                let number = argument.strip_prefix("0x").and_then(|hex| u32::from_str_radix(hex, 16).ok());
                self.capabilities.push(number.map_or_else(|| argument.to_string(), |n| n.to_string()));
            }
        }
    }
}

/// Runs a command under strace. With `only` (a strace expression) other calls are not counted and, thanks to a seccomp
/// filter, run at full speed. What strace writes goes to `folder`.
pub fn count(command: &Command, only: Option<&str>, folder: &Path) -> Result<Calls> {
    let log = folder.join("strace.txt");
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-X", "raw", "-s", "0", "-o"]).arg(&log);
    if let Some(only) = only {
        strace.args(["--seccomp-bpf", "-e", &format!("trace={only}")]);
    }
    strace.arg(command.get_program()).args(command.get_args());
    strace.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let status = strace.status().context("strace")?;
    if !status.success() {
        bail!("{}: {status}", sh::words(&strace));
    }
    read(&log)
}

/// What strace has written of a run.
pub fn read(log: &Path) -> Result<Calls> {
    let text = fs::read_to_string(log).with_context(|| log.display().to_string())?;
    let mut calls = Calls::default();
    text.lines().for_each(|line| calls.line(line));
    Ok(calls)
}

fn known(number: u8) -> Option<&'static Known> {
    KNOWN.iter().find(|(known, ..)| *known == number)
}

fn name(number: u8) -> String {
    known(number).map_or_else(|| format!("ioctl 0xae{number:02x}"), |(_, name, _)| (*name).to_string())
}

/// KVM ioctls by kind, in a line.
pub fn kinds(kvm: &BTreeMap<u8, u64>) -> String {
    let one = |(number, count): (&u8, &u64)| match count {
        1 => name(*number),
        _ => format!("{} × {count}", name(*number)),
    };
    kvm.iter().filter(|(_, count)| **count > 0).map(one).collect::<Vec<_>>().join(", ").replace("KVM_", "")
}

/// The table of a run's KVM ioctls beside the floor's, and how many have no justification.
pub fn table(ours: &Calls, floor: &Calls) -> (String, u64) {
    let mut text = "| KVM ioctl | Bantam | floor | why more than the floor |\n|---|---|---|---|\n".to_string();
    let mut unjustified = 0;
    for (number, count) in &ours.kvm {
        let least = floor.kvm.get(number).copied().unwrap_or(0);
        let (known, name) = (known(*number), name(*number));
        let reason = match known {
            _ if *count <= least => String::new(),
            Some((.., reason)) if !reason.is_empty() => (*reason).into(),
            _ => {
                unjustified += 1;
                "**UNJUSTIFIED**".into()
            }
        };
        let asked =
            if *number == CHECK_EXTENSION { format!(" ({})", ours.capabilities.join(", ")) } else { String::new() };
        text += &format!("| {name}{asked} | {count} | {least} | {reason} |\n");
    }
    (text, unjustified)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calls(text: &str) -> Calls {
        let mut calls = Calls::default();
        text.lines().for_each(|line| calls.line(line));
        calls
    }

    const RUN_OF_ONE: &str = "10 execve(\"bantam\", [\"x\"], 0x7f) = 0\n10 ioctl(3, 0xae01, 0) = 4\n\
        10 ioctl(3, 0xae03, 0x4a)       = 1\n11 ioctl(5, 0xae80, 0 <unfinished ...>\n10 futex(0x55, 0x80) = 0\n\
        12 ioctl(6, 0xae80 <unfinished ...>\n12 <... ioctl resumed>, 0) = 0\n11 <... ioctl resumed>) = 0\n11 ioctl(1, 0x5401, 0x7f) = -1 ENOTTY\n10 ioctl(5, 0x4020ae46, {slot=0}) = 0\n\
        11 --- SIGUSR1 {si_signo=SIGUSR1} ---\n10 +++ exited with 0 +++\n";

    #[test]
    fn calls_are_counted_once_and_kvms_by_number() {
        let calls = calls(RUN_OF_ONE);
        assert_eq!(calls.all, 8);
        assert_eq!(calls.kvm, BTreeMap::from([(1, 1), (3, 1), (0x46, 1), (0x80, 2)]));
        assert_eq!((calls.kvm_setup(), calls.capabilities), (3, vec!["74".to_string()]));
    }

    #[test]
    fn an_additional_ioctl_needs_a_reason() {
        let ours = calls(
            "1 ioctl(3, 0xae00, 0) = 12\n1 ioctl(5, 0xae80, 0) = 0\n1 ioctl(5, 0xae80, 0) = 0\n1 ioctl(5, 0xaefe, 0) = 0",
        );
        let (text, unjustified) = table(&ours, &calls("1 ioctl(5, 0xae80, 0) = 0"));
        assert_eq!(unjustified, 2, "{text}");
        assert!(text.contains("| KVM_RUN | 2 | 1 | **UNJUSTIFIED** |"), "{text}");
        assert!(text.contains("| ioctl 0xaefe | 1 | 0 | **UNJUSTIFIED** |"), "{text}");
        assert!(text.contains("| KVM_GET_API_VERSION | 1 | 0 | any version"), "{text}");
    }

    #[test]
    fn the_known_ioctls_are_in_order_and_unique() {
        assert!(KNOWN.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }
}
