//! The PC, where tests must know that it is one.

/// Flat guests.
pub mod code {
    /// `hlt`
    pub const HALT: &[u8] = &[0xf4];
    /// `cli; jmp $`
    pub const SPIN: &[u8] = &[0xfa, 0xeb, 0xfe];
    /// `mov al,0xfe; out 0x64,al`
    pub const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64];
    /// `mov al,1; out 0x10,al; mov al,0xfe; out 0x64,al; hlt`
    pub const LIFE: &[u8] = &[0xb0, 0x01, 0xe6, 0x10, 0xb0, 0xfe, 0xe6, 0x64, 0xf4];
    /// `mov cx,1000; L: out 0x10,al; loop L; mov al,0xfe; out 0x64,al`
    pub const CHATTY_LIFE: &[u8] = &[0xb9, 0xe8, 0x03, 0xe6, 0x10, 0xe2, 0xfc, 0xb0, 0xfe, 0xe6, 0x64];
    /// Counts in RAM, and prints the last three bits of it as a digit, again and again: `mov dx, 0x3f8; L: inc word [0x2000];
    /// mov al, [0x2000]; and al, 7; add al, '0'; out dx, al; jmp L`
    pub const COUNTS: &[u8] =
        &[0xba, 0xf8, 0x03, 0xff, 0x06, 0x00, 0x20, 0xa0, 0x00, 0x20, 0x24, 0x07, 0x04, 0x30, 0xee, 0xeb, 0xf2];
    /// Prints what it is, sixteen bytes at a time: `mov dx,0x3f8; L: mov si,0x1000; mov cx,16; rep outsb; jmp L`
    pub const STRINGS: &[u8] = &[0xba, 0xf8, 0x03, 0xbe, 0x00, 0x10, 0xb9, 0x10, 0x00, 0xf3, 0x6e, 0xeb, 0xf6];
    /// Prints a byte, and writes its number to the first word of [`super::SWEPT`], again and again, each time the next: in
    /// protected mode `L: inc eax; mov edx,0x3f8; out dx,al; mov edi,0x100000; mov ecx,128; M: mov [edi],eax;
    /// add edi,0x10000; dec ecx; jnz M; jmp L`
    pub const SWEEPS: &[u8] = &[
        0x40, 0xba, 0xf8, 0x03, 0x00, 0x00, 0xee, 0xbf, 0x00, 0x00, 0x10, 0x00, 0xb9, 0x80, 0x00, 0x00, 0x00, 0x89,
        0x07, 0x81, 0xc7, 0x00, 0x00, 0x01, 0x00, 0x49, 0x75, 0xf5, 0xeb, 0xe2,
    ];
    /// A hypervisor by SVM in long mode, whose guest in protected mode prints a digit of the word at 0x202000 and asks it
    /// (VMMCALL) to count it up, again and again: EFER.SVME; VM_HSAVE_PA 0x201000; the VMCB at 0x200000 (intercepts VMRUN and
    /// VMMCALL, ASID 1, flat segments, EFER.SVME, CR0 0x11, DR6 and DR7 as after reset, RFLAGS 2, RIP); `outer: mov eax,edi;
    /// vmrun; inc dword [0x202000]; add dword [rdi+0x578],3; jmp outer; inner: mov al,[0x202000]; and al,7; add al,'0';
    /// out dx,al; vmmcall; jmp inner`
    pub const HYPERVISOR: &[u8] = &[
        0xb9, 0x80, 0x00, 0x00, 0xc0, 0x0f, 0x32, 0x0d, 0x00, 0x10, 0x00, 0x00, 0x0f, 0x30, 0xb9, 0x17, 0x01, 0x01,
        0xc0, 0xb8, 0x00, 0x10, 0x20, 0x00, 0x31, 0xd2, 0x0f, 0x30, 0xbf, 0x00, 0x00, 0x20, 0x00, 0xc7, 0x47, 0x10,
        0x03, 0x00, 0x00, 0x00, 0xc7, 0x47, 0x58, 0x01, 0x00, 0x00, 0x00, 0xc7, 0x87, 0x10, 0x04, 0x00, 0x00, 0x08,
        0x00, 0x9b, 0x0c, 0xb8, 0x10, 0x00, 0x93, 0x0c, 0x89, 0x87, 0x00, 0x04, 0x00, 0x00, 0x89, 0x87, 0x20, 0x04,
        0x00, 0x00, 0x89, 0x87, 0x30, 0x04, 0x00, 0x00, 0x83, 0xc8, 0xff, 0x89, 0x87, 0x04, 0x04, 0x00, 0x00, 0x89,
        0x87, 0x14, 0x04, 0x00, 0x00, 0x89, 0x87, 0x24, 0x04, 0x00, 0x00, 0x89, 0x87, 0x34, 0x04, 0x00, 0x00, 0xc7,
        0x87, 0xd0, 0x04, 0x00, 0x00, 0x00, 0x10, 0x00, 0x00, 0xc7, 0x87, 0x58, 0x05, 0x00, 0x00, 0x11, 0x00, 0x00,
        0x00, 0xc7, 0x87, 0x60, 0x05, 0x00, 0x00, 0x00, 0x04, 0x00, 0x00, 0xc7, 0x87, 0x68, 0x05, 0x00, 0x00, 0xf0,
        0x0f, 0xff, 0xff, 0xc7, 0x87, 0x70, 0x05, 0x00, 0x00, 0x02, 0x00, 0x00, 0x00, 0x48, 0x8d, 0x05, 0x20, 0x00,
        0x00, 0x00, 0x89, 0x87, 0x78, 0x05, 0x00, 0x00, 0xba, 0xf8, 0x03, 0x00, 0x00, 0x89, 0xf8, 0x0f, 0x01, 0xd8,
        0xff, 0x04, 0x25, 0x00, 0x20, 0x20, 0x00, 0x83, 0x87, 0x78, 0x05, 0x00, 0x00, 0x03, 0xeb, 0xeb, 0xa0, 0x00,
        0x20, 0x20, 0x00, 0x24, 0x07, 0x04, 0x30, 0xee, 0x0f, 0x01, 0xd9, 0xeb, 0xf1,
    ];
    /// Looks for serial input once: `mov dx,0x3fd; in al,dx; jmp $`
    pub const LISTEN_ONCE: &[u8] = &[0xba, 0xfd, 0x03, 0xec, 0xeb, 0xfe];
    /// All of RAM, with [`super::FILL`]: `L: mov [esi],eax; add esi,0x1000; jmp L`
    pub const FILL: &[u8] = &[0x89, 0x06, 0x81, 0xc6, 0x00, 0x10, 0x00, 0x00, 0xeb, 0xf6];
    /// Whether the byte at [`super::POINTER`] is 0 and can be 1: `mov al,[rsi]; cmp al,0; jne bad; mov byte [rsi],1;
    /// cmp byte [rsi],1; jne bad; mov al,5; out 0xf4,al; bad: mov al,6; out 0xf4,al`
    pub const TOUCH: &[u8] = &[
        0x8a, 0x06, 0x3c, 0x00, 0x75, 0x0c, 0xc6, 0x06, 0x01, 0x80, 0x3e, 0x01, 0x75, 0x04, 0xb0, 0x05, 0xe6, 0xf4,
        0xb0, 0x06, 0xe6, 0xf4,
    ];
}

/// What [`code::SWEEPS`] runs with, and the first of the 128 parts of 64 KiB that it writes to.
pub const SWEEP: &str = "--cpu-mode protected";
pub const SWEPT: u64 = 0x10_0000;

/// Machines of different parts, to be kept.
pub fn kept() -> Vec<String> {
    let all = ["", "--irqchip kernel --cpus 2", "--irqchip split --rng on", "--irqchip kernel --rng on", "--memory 5G"];
    all.map(String::from).to_vec()
}
/// A machine with devices on PCI, without these.
pub const PCI: &str = "--irqchip split --cpus 2 --rng on --transport pci";
/// What is read differs from what was set before, since it follows time: the guest's clock, the time-stamp counter, and since
/// when each channel of the 8254 counts. And of IA32_SYSENTER_ESP, which means nothing to a 64-bit guest of AMD's CPUs, KVM
/// there takes the lower half.
pub fn follows_time(path: &str) -> bool {
    let loaded = [4, 5, 10, 11, 16, 17].map(|word| format!("/kvm/parts/pit/words/{word}: "));
    path.starts_with("/kvm/clock/words/")
        || path.starts_with("/kvm/times/") && path.contains("/0/1: ")
        || path.contains("/msrs/0x175/1: ")
        || loaded.iter().any(|word| path.starts_with(word))
}

/// How a trace shows a write of [`code::LIFE`].
pub const LIFE_WRITES: &str = "out 0x0010";
/// The words that [`code::FILL`] and [`code::TOUCH`] need.
pub const FILL: &str = "--cpu-mode protected --reg esi=0x10000";
pub const TOUCH: &str = "--cpu-mode long";
pub const POINTER: &str = "rsi";
/// A size of RAM, and its last byte.
pub const RAM: &[(&str, u64)] = &[
    ("1M", 0xf_ffff),
    ("512000000", 511_999_999),
    ("3G", (3 << 30) - 1),
    ("4G", (5 << 30) - 1),
    ("6G", (7 << 30) - 1),
    ("6G", 4 << 30),
    ("40G", (41 << 30) - 1),
];
/// Where no memory is, whatever its size.
pub const HOLE: u64 = 0xc000_0000;
/// The flat guest is loaded there, and this is the place.
pub const BEYOND_RAM: (&str, &str) = ("--memory 4K", "0x1000");

/// What `--explain` says of the registers; the instruction of the first exit of `add`, and what it accesses.
pub const REGISTERS_TOLD: &str = "KVM_SET_SREGS";
pub const ADD_INSTRUCTION: &str = "out dx, al";
pub const ADD_ADDRESS: &str = "0x3f8";
/// Examples that need no input: status and output.
pub const EXAMPLES: &[(&str, i32, &str)] = &[
    ("add", 0, "4\n"),
    ("add-nasm", 0, "4\\"),
    ("counter", 124, ""),
    ("reader", 124, ""),
    ("hello-protected", 0, "Hello from protected mode\n"),
    ("hello-long", 0, "Hello from long mode\n"),
    ("modes", 0, "real\nprotected\nlong\n"),
    ("timer", 7, "tick\ntick\ntick\n"),
    ("elf32", 0, "Hello from a 32-bit ELF file\nbss is zero\n"),
    ("elf64", 0, "Hello from a 64-bit ELF file\nbss is zero\n"),
    ("exit", 43, ""),
    ("poweroff", 0, ""),
    ("reset", 0, ""),
];
/// An example that prints one line, a word in that line, and the line up to there.
pub const LINE: (&str, &str) = ("hello-long", "Hello from long mode\n");
pub const UNTIL: (&str, &str) = ("long", "Hello from long");
/// What the serial port and the one after it print, wide accesses included.
pub const SERIAL_WIDE: &str = "wW\n";
pub const ADD_TRACE: &[&str] =
    &["out 0x03f8 ← 0x34 (1 bytes, serial.THR)", "out 0x03f8 ← 0x0a (1 bytes, serial.THR)", "hlt"];
/// `add`, of 2 and 3.
pub const ADD_CONFIG: &str = "memory = \"4K\"\nram-base = 0x1000\nreg = [\"rax=2\", \"rbx=3\"]\n";
/// What examples/01_twelve_bytes prints.
pub const TWELVE: &str = "4\n";

/// Guests that spin, each in a way of its own.
pub const SPINNERS: &[&str] = &["spin-real", "spin-long", "smp-spin"];
/// Guests that access all that there is, and end.
pub const SWEEPS: &[&str] = &["ports-sweep", "mmio-sweep"];
/// Guests that keep KVM busy for ever.
pub const STORMS: &[&str] = &["outs-huge"];
/// The register in which `print-1m` counts, and the program counter's name in a report.
pub const LINES: &str = "rbx";
pub const PC: &str = "rip ";

/// What the report of `crash` says of the machine; on AMD hosts most of it is lost.
pub fn death() -> &'static [&'static str] {
    let all = &["KVM_EXIT_SHUTDOWN", "rip ", "cr3 ", "0x100a", "00000deadbeef000", "bytes there: 48 8b 03"];
    if std::path::Path::new("/sys/module/kvm_amd").exists() { &all[..3] } else { all }
}
/// A guest with an instruction that KVM cannot emulate, its words, and what is said where KVM has to.
pub const UNEMULATED: &[(&str, &str, &[&str])] = &[("vex", "", &["KVM_EXIT_INTERNAL_ERROR", "suberror 1", "c5 f8 77"])];
/// This host's KVM runs Linux: not where it emulates the guest's instructions.
pub fn runs_linux() -> bool {
    !must_emulate()
}

/// KVM has to emulate such an instruction here.
pub fn must_emulate() -> bool {
    std::path::Path::new("/sys/module/kvm_pvm").exists() || {
        let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        !flags.contains("vmx") && !flags.contains("svm")
    }
}

/// What is said where there is no `/dev/kvm`, and a capability that is used where it is there.
pub const NO_KVM: &str = "modprobe kvm";
pub const OPTIONAL: &str = "KVM_CAP_SYNC_REGS";

/// Maps, as `bantam layout` prints them.
pub const LAYOUTS: &[(&str, &str)] = &[
    ("--memory 4G --cpu-mode long", include_str!("../golden/layout-4g-long.txt")),
    ("--irqchip none --memory 1M", include_str!("../golden/layout-1m-none.txt")),
];

/// Words that mean nothing for a flat guest, and what is said of them.
pub const WORDS: &[(&str, &str)] = &[
    ("--reg rax", "NAME=VALUE"),
    ("--reg ax=0x10000", "16-bit"),
    ("--cpus 2 --irqchip none", "--irqchip"),
    ("--debugcon pio:0x3f8", "serial"),
    ("--debugcon mmio:0x1000", "RAM"),
    ("--load-at 0x10000", "--entry 0x1000:0"),
    ("--entry 0x10000", "0x1000:0"),
    ("--cpu-mode long --entry 1:2", "real"),
    ("--gic 3", "--gic"),
    ("--msi its", "--msi"),
    ("--cpu-features pmu", "--cpu-features"),
];
/// And for an ELF.
pub const ELF_WORDS: &[&str] = &["--cpu-mode long"];
/// The status of `--cpus 100000`.
pub const TOO_MANY_CPUS: i32 = 125;
/// The ELF machine of another architecture, and what is said of such a file.
pub const FOREIGN: (u16, &str) = (183, "this is an arm64 guest; this host is x86-64");
/// What is said of Linux images: a bzImage, and arm64's.
pub const LINUX: (&str, &str) = ("boot protocol 0.00, before 2.10", "this is an arm64 guest");
