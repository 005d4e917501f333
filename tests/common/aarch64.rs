//! The arm64 machine, where tests must know that it is one.

/// Flat guests.
pub mod code {
    const fn bytes<const WORDS: usize, const BYTES: usize>(words: [u32; WORDS]) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        let mut at = 0;
        while at < BYTES {
            bytes[at] = words[at / 4].to_le_bytes()[at % 4];
            at += 1;
        }
        bytes
    }

    /// `a: wfi; b a`
    pub const HALT: &[u8] = &bytes::<2, 8>([0xd503_207f, 0x17ff_ffff]);
    /// `b .`
    pub const SPIN: &[u8] = &bytes::<1, 4>([0x1400_0000]);
    /// `mov w0,0x84000000; add w0,w0,9; hvc 0`
    pub const RESET: &[u8] = &bytes::<3, 12>([0x52b0_8000, 0x1100_2400, 0xd400_0002]);
    /// `mov x1,0x10; strb w0,[x1]`, and a reset.
    pub const LIFE: &[u8] = &bytes::<5, 20>([0xd280_0201, 0x3900_0020, 0x52b0_8000, 0x1100_2400, 0xd400_0002]);
    /// `mov x1,0x10; mov w2,1000; L: strb w0,[x1]; subs w2,w2,1; b.ne L`, and a reset.
    pub const CHATTY_LIFE: &[u8] = &bytes::<8, 32>([
        0xd280_0201,
        0x5280_7d02,
        0x3900_0020,
        0x7100_0442,
        0x54ff_ffc1,
        0x52b0_8000,
        0x1100_2400,
        0xd400_0002,
    ]);
    /// Counts in RAM, and prints the last three bits of it as a digit, again and again: `mov x1,0x9000000; mov x2,0x40002000;
    /// L: ldr w3,[x2]; add w3,w3,1; str w3,[x2]; and w0,w3,7; add w0,w0,'0'; strb w0,[x1]; b L`
    pub const COUNTS: &[u8] = &bytes::<10, 40>([
        0xd2a1_2001,
        0xd2a8_0002,
        0xf284_0002,
        0xb940_0043,
        0x1100_0463,
        0xb900_0043,
        0x1200_0860,
        0x1100_c000,
        0x3900_0020,
        0x17ff_fffa,
    ]);
    /// There are no strings for devices here: it counts.
    pub const STRINGS: &[u8] = COUNTS;
    /// Prints a byte, and writes its number to the first word of [`super::SWEPT`], again and again, each time the next:
    /// `mov x1,0x9000000; L: add w0,w0,1; strb w0,[x1]; mov x2,0x40100000; mov x3,128; M: str w0,[x2]; add x2,x2,0x10000;
    /// subs x3,x3,1; b.ne M; b L`
    pub const SWEEPS: &[u8] = &bytes::<10, 40>([
        0xd2a1_2001,
        0x1100_0400,
        0x3900_0020,
        0xd2a8_0202,
        0xd280_1003,
        0xb900_0040,
        0x9140_4042,
        0xf100_0463,
        0x54ff_ffa1,
        0x17ff_fff8,
    ]);
    /// Looks for serial input once: `mov x1,0x9000000; ldr w0,[x1,0x18]; b .`
    pub const LISTEN_ONCE: &[u8] = &bytes::<3, 12>([0xd2a1_2001, 0xb940_1820, 0x1400_0000]);
    /// All of RAM, with [`super::FILL`]: `L: str w0,[x1]; add x1,x1,0x1000; b L`
    pub const FILL: &[u8] = &bytes::<3, 12>([0xb900_0020, 0x9140_0421, 0x17ff_fffe]);
    /// Whether the byte at [`super::POINTER`] is 0 and can be 1: `mov x4,0x9080000; ldrb w2,[x1]; cbnz w2,bad; mov w2,1;
    /// strb w2,[x1]; ldrb w3,[x1]; cmp w3,1; b.ne bad; mov w0,5; str w0,[x4]; bad: mov w0,6; str w0,[x4]`
    pub const TOUCH: &[u8] = &bytes::<12, 48>([
        0xd2a1_2104,
        0x3940_0022,
        0x3500_0102,
        0x5280_0022,
        0x3900_0022,
        0x3940_0023,
        0x7100_047f,
        0x5400_0061,
        0x5280_00a0,
        0xb900_0080,
        0x5280_00c0,
        0xb900_0080,
    ]);
    /// The byte m to [`super::POINTER`]: `mov w0,'m'; strb w0,[x1]; a: wfi; b a`
    pub const STORE: &[u8] = &bytes::<4, 16>([0x5280_0da0, 0x3900_0020, 0xd503_207f, 0x17ff_ffff]);
    /// Sleeps with the virtual timer set to go off in a second, its interrupt not enabled: `mrs x0,cntfrq_el0;
    /// msr cntv_tval_el0,x0; mov x0,1; msr cntv_ctl_el0,x0; a: wfi; b a`
    pub const TIMER: &[u8] =
        &bytes::<6, 24>([0xd53b_e000, 0xd51b_e300, 0xd280_0020, 0xd51b_e320, 0xd503_207f, 0x17ff_ffff]);
    /// Sleeps with the virtual timer on, but silent: `mov x0,3; msr cntv_ctl_el0,x0; a: wfi; b a`
    pub const SILENT_TIMER: &[u8] = &bytes::<4, 16>([0xd280_0060, 0xd51b_e320, 0xd503_207f, 0x17ff_ffff]);
    /// Writes x0, sp, the exception level and the interrupt masks to address 0x10: `mov x1,0x10; str x0,[x1];
    /// mov x2,sp; str x2,[x1]; mrs x2,currentel; str x2,[x1]; mrs x2,daif; str x2,[x1]; a: wfi; b a`
    pub const STATE: &[u8] = &bytes::<10, 40>([
        0xd280_0201,
        0xf900_0020,
        0x9100_03e2,
        0xf900_0022,
        0xd538_4242,
        0xf900_0022,
        0xd53b_4222,
        0xf900_0022,
        0xd503_207f,
        0x17ff_ffff,
    ]);
}

/// What [`code::SWEEPS`] runs with, and the first of the 128 parts of 64 KiB that it writes to.
pub const SWEEP: &str = "";
pub const SWEPT: u64 = 0x4010_0000;

/// Machines of different parts, to be kept; the last has all features that this host has for guests.
pub fn kept() -> Vec<String> {
    let host = super::bantam("check").run().out();
    let has = |(name, _): &(&str, &str)| host.lines().any(|line| line.starts_with(name) && line.contains(" yes "));
    let all = [("KVM_CAP_ARM_PMU_V3", "pmu"), ("KVM_CAP_ARM_SVE", "sve")];
    let features: Vec<_> = all.into_iter().filter(has).map(|(_, word)| word).collect();
    let words = if features.is_empty() { String::new() } else { format!("--cpu-features {}", features.join(",")) };
    let mut all = vec!["".into(), "--irqchip none".into(), "--cpus 2 --rng on".into(), "--memory 5G".into(), words];
    // A host has what its own GIC allows.
    if host.contains("GICv2") {
        all.push("--gic 2 --cpus 2 --rng on".into());
    }
    if host.contains("GICv3") {
        all.push("--cpus 2 --msi none".into());
    }
    all
}
/// A machine with devices on PCI, without these.
pub const PCI: &str = "--cpus 2 --rng on --transport pci";
/// What is read differs from what was set before, since it follows time: the guest's counters.
pub fn follows_time(path: &str) -> bool {
    path.starts_with("/kvm/clock/counters/") && path.contains("/1: ")
}

/// How a trace shows a write of [`code::LIFE`].
pub const LIFE_WRITES: &str = "write 0x00000010";
/// The words that [`code::FILL`] and [`code::TOUCH`] need.
pub const FILL: &str = "--reg x1=0x40010000";
pub const TOUCH: &str = "";
pub const POINTER: &str = "x1";
/// A size of RAM, and its last byte (where the device tree ends, with a zero).
pub const RAM: &[(&str, u64)] = &[
    ("1M", 0x400f_ffff),
    ("512000000", 0x4000_0000 + 511_999_999),
    ("3G", (4 << 30) - 1),
    ("4G", (5 << 30) - 1),
    ("6G", (7 << 30) - 1),
    ("6G", 4 << 30),
    ("40G", (41 << 30) - 1),
];
/// Where no memory is, whatever its size.
pub const HOLE: u64 = 0x3fff_0000;
/// The flat guest is loaded there, and this is the place.
pub const BEYOND_RAM: (&str, &str) = ("--memory 4K --load-at 0x40001000", "0x40001000");

/// What `--explain` says of the registers; the instruction of the first exit of `add`, and what it accesses.
pub const REGISTERS_TOLD: &str = "KVM_SET_ONE_REG";
pub const ADD_INSTRUCTION: &str = "str w0, [x20]";
pub const ADD_ADDRESS: &str = "0x09000000";
/// Examples that need no input: status and output.
pub const EXAMPLES: &[(&str, i32, &str)] = &[
    ("hello", 0, "Hello\n"),
    ("add", 0, "4\n"),
    ("counter", 124, ""),
    ("reader", 124, ""),
    ("hello-el1", 0, "Hello from EL1\n"),
    ("modes", 0, "physical\nvirtual\nuser\n"),
    ("timer", 7, "tick\ntick\ntick\n"),
    ("elf64", 0, "Hello from a 64-bit ELF file\nbss is zero\n"),
    ("exit", 43, ""),
    ("poweroff", 0, ""),
    ("reset", 0, ""),
];
/// An example that prints one line, a word in that line, and the line up to there.
pub const LINE: (&str, &str) = ("hello-el1", "Hello from EL1\n");
pub const UNTIL: (&str, &str) = ("EL", "Hello from EL");
/// What the serial port prints, wide accesses included.
pub const SERIAL_WIDE: &str = "bhwd\n";
pub const ADD_TRACE: &[&str] =
    &["write 0x09000000 ← 0x00000034 (4 bytes, pl011.DR)", "write 0x09000000 ← 0x0000000a (4 bytes, pl011.DR)"];
/// `add`, of 2 and 3.
pub const ADD_CONFIG: &str = "memory = \"4K\"\nram-base = 0x10000\nreg = [\"x0=2\", \"x1=3\"]\n";
/// What examples/01_twelve_bytes prints.
pub const TWELVE: &str = "Hello\n";

/// Guests that spin, each in a way of its own.
pub const SPINNERS: &[&str] = &["spin", "spin-wfe", "smp-spin"];
/// Guests that access all that there is, and end.
pub const SWEEPS: &[&str] = &["mmio-sweep"];
/// Guests that keep KVM busy for ever.
pub const STORMS: &[&str] = &["irq-storm"];
/// The register in which `print-1m` counts, and the program counter's name in a report.
pub const LINES: &str = "x19";
pub const PC: &str = "pc ";

/// What the report of `crash` says of the machine.
pub fn death() -> &'static [&'static str] {
    &["KVM_EXIT_ARM_NISV", "pc ", "vbar ", "at 0x40000008", "x2     000000000dead000", "bytes there: 40 04 40 a9"]
}
/// A guest with an instruction that KVM cannot emulate, its words, and what is said where KVM has to.
pub const UNEMULATED: &[(&str, &str, &[&str])] = &[
    ("nisv", "--reg x1=0", &["KVM_EXIT_ARM_NISV"]),
    ("nisv", "--reg x1=1", &["KVM_EXIT_ARM_NISV"]),
    ("nisv", "--reg x1=2", &["KVM_EXIT_ARM_NISV"]),
    ("nisv", "--reg x1=3", &["KVM_EXIT_ARM_NISV"]),
];
/// This host's KVM runs Linux.
pub fn runs_linux() -> bool {
    true
}

/// KVM has to emulate such an instruction here: everywhere.
pub fn must_emulate() -> bool {
    true
}

/// What is said where there is no `/dev/kvm`, and a capability that is used where it is there.
pub const NO_KVM: &str = "a start at EL2";
pub const OPTIONAL: &str = "KVM_CAP_ARM_VM_IPA_SIZE";

/// Maps, as `bantam layout` prints them.
pub const LAYOUTS: &[(&str, &str)] = &[
    ("--memory 4G --cpus 4", include_str!("../golden/layout-4g-arm64.txt")),
    ("--irqchip none --memory 1M --debugcon mmio:0x996", include_str!("../golden/layout-1m-arm64-none.txt")),
];

/// Words that mean nothing for a flat guest, and what is said of them.
pub const WORDS: &[(&str, &str)] = &[
    ("--reg x0", "NAME=VALUE"),
    ("--reg w0=0x100000000", "32-bit"),
    ("--reg rax=1", "rax"),
    ("--debugcon pio:0xe9", "no ports"),
    ("--debugcon mmio:0x9000000", "serial"),
    ("--debugcon mmio:0x40000000", "RAM"),
    ("--entry 0x40000002", "multiple of 4"),
    ("--entry 1:2", "SEG:OFF"),
    ("--cpu-mode long", "el1"),
    ("--cpuid none", "--cpuid"),
    ("--gic 2 --cpus 9", "8"),
    ("--gic 3 --irqchip none", "--gic"),
    ("--msi its --gic 2", "--msi"),
    ("--msi its --irqchip none", "--msi"),
    ("--cpu-features pmu --irqchip none", "overflow"),
    ("--cpu-features sse", "sse"),
    ("--fdt-at 0x40000000 --reg x0=1", "--fdt-at"),
    ("--fdt-at 0x40000004", "multiple of 8"),
];
/// And for an ELF.
pub const ELF_WORDS: &[&str] = &[];
/// The status of `--cpus 100000`.
pub const TOO_MANY_CPUS: i32 = 2;
/// The ELF machine of another architecture, and what is said of such a file.
pub const FOREIGN: (u16, &str) = (62, "this is an x86-64 guest; this host is arm64");
/// What is said of Linux images: a bzImage, and arm64's.
pub const LINUX: (&str, &str) = ("this is an x86-64 guest", "it begins with no instruction");
