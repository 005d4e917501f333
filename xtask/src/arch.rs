//! The two architectures: what Rust, Debian and QEMU call them.
//!
//! Invariant: whatever differs between the two test hosts is here, and nowhere else.

/// An architecture that Bantam runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Arch {
    /// Intel's and AMD's 64-bit processors
    #[value(name = "x86_64")]
    X86_64,
    /// 64-bit Arm processors
    #[value(name = "arm64")]
    Arm64,
}

impl Arch {
    /// The name that people type.
    pub fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Arm64 => "arm64",
        }
    }

    /// Rust's target. glibc, since Debian has a standard library for it; the programs are static all the same.
    pub fn triple(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-unknown-linux-gnu",
            Self::Arm64 => "aarch64-unknown-linux-gnu",
        }
    }

    /// Debian's name, which is also the end of its kernel packages' names.
    pub fn debian(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// The folder of its libraries in Debian.
    pub fn libraries(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-linux-gnu",
            Self::Arm64 => "aarch64-linux-gnu",
        }
    }

    /// QEMU's program.
    pub fn qemu(self) -> &'static str {
        match self {
            Self::X86_64 => "qemu-system-x86_64",
            Self::Arm64 => "qemu-system-aarch64",
        }
    }

    /// The machine that QEMU makes: one whose CPUs have what KVM needs. Of Arm's it is one with TLB maintenance by ranges
    /// (FEAT_TLBIRANGE): a Linux under Linux then boots in half the time that it takes on a Cortex-A72.
    pub fn machine(self) -> &'static [&'static str] {
        match self {
            Self::X86_64 => &["-machine", "pc", "-cpu", "EPYC,+svm,+npt"],
            Self::Arm64 => &["-machine", "virt,virtualization=on,gic-version=3", "-cpu", "neoverse-v1"],
        }
    }

    /// CPUs that a test host can have. QEMU runs each on a thread of its own, and where it emulates SVM that is not safe: with
    /// two CPUs the host's kernel panics ("corrupted stack end", "Oops: int3") within two minutes of busy machines. Two that
    /// take turns are no way out: a turn is long, so what waits for the other CPU waits for ever.
    pub fn host_cpus(self) -> u32 {
        match self {
            Self::X86_64 => 1,
            Self::Arm64 => 2,
        }
    }

    /// The name of the machine's first serial port in Linux.
    pub fn console(self) -> &'static str {
        match self {
            Self::X86_64 => "ttyS0",
            Self::Arm64 => "ttyAMA0",
        }
    }

    /// Is this the machine's own architecture?
    pub fn is_native(self) -> bool {
        self == Self::native()
    }

    /// The machine's own architecture.
    pub fn native() -> Self {
        if std::env::consts::ARCH == "aarch64" { Self::Arm64 } else { Self::X86_64 }
    }
}
