//! The machine as data: what a person can ask for, and nothing else.
//!
//! One type serves the command line, `--config FILE` and a snapshot's manifest; its documentation is the help
//! text. Invariant: a `Config` is dumb. It checks the form of each value, never whether values fit together; that is
//! the work of `load::settle` and of the layout.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use self::disks::DiskMode;
pub use self::words::{Taken, Words};
use crate::trace::Filter;

mod disks;
mod kept;
mod words;

/// The machine to build and how to run it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Guest RAM: bytes, or a number with K, M or G (powers of 1024); a multiple of the page size [default: 512M]
    #[arg(long, value_name = "SIZE", help_heading = "Machine", required = false)]
    pub memory: Size,
    /// Virtual CPUs: a number, or sockets=N,cores=N,threads=N (cores a socket, threads a core; x86-64) [default: 1]
    #[arg(long, value_name = "N", allow_negative_numbers = true, help_heading = "Machine", required = false)]
    pub cpus: Cpus,
    /// The machine's name [default: bantam-PID]
    #[arg(long, value_name = "NAME", help_heading = "Machine")]
    pub name: Option<String>,
    /// Back guest RAM with huge pages (2 MiB; the host must have some free)
    #[arg(long, num_args = 0, action = clap::ArgAction::Set, default_missing_value = "true", help_heading = "Machine", required = false)]
    pub hugepages: bool,
    /// Interrupt controllers: `none` (HLT ends the machine; default for a flat guest with one CPU), `kernel` (KVM's own;
    /// default for everything else) or `split` (local APICs in KVM, an I/O APIC in Bantam, no 8259A and 8254; x86-64)
    #[arg(long, value_name = "WHERE", help_heading = "Machine")]
    pub irqchip: Option<IrqChip>,
    /// The interrupt controller's version on arm64: 2 or 3 [default: 3 where the host has it, else 2]
    #[arg(long, value_name = "VERSION", help_heading = "Machine")]
    pub gic: Option<Gic>,
    /// What takes the message-signalled interrupts of devices on arm64: `its` (of GICv3) or `none` [default: its where the
    /// host has it]
    #[arg(long, value_name = "WHAT", help_heading = "Machine")]
    pub msi: Option<Msi>,
    /// What arm64 CPUs have in addition, a list with commas: `pmu` (performance counters), `sve` (scalable vectors); refused
    /// where the host has it not
    #[arg(long, value_name = "LIST", value_delimiter = ',', help_heading = "Machine", required = false)]
    pub cpu_features: Vec<CpuFeature>,
    /// How a PC presents itself: `acpi` (hardware-reduced ACPI, no i8042; default for Linux) or `legacy` (ports where hobby
    /// kernels look for them; default for everything else)
    #[arg(long, value_name = "KIND", help_heading = "Machine")]
    pub platform: Option<Platform>,
    /// Guest-physical address of the first byte of RAM [default: 0 on x86-64, 0x40000000 on arm64]
    #[arg(long, value_name = "ADDR", help_heading = "Machine")]
    pub ram_base: Option<Addr>,

    /// Where a flat guest is loaded [default: 0x1000 on x86-64, the start of RAM on arm64]
    #[arg(long, value_name = "ADDR", help_heading = "Guest")]
    pub load_at: Option<Addr>,
    /// Where a flat guest is entered: an address, or SEG:OFF in real mode [default: where it is loaded]
    #[arg(long, value_name = "ADDR", help_heading = "Guest")]
    pub entry: Option<Entry>,
    /// The CPU mode a flat guest is entered in [default: real on x86-64; arm64 has el1 only]
    #[arg(long, value_name = "MODE", help_heading = "Guest")]
    pub cpu_mode: Option<CpuMode>,
    /// Set a register before entry, as in rax=2 (repeatable); registers that nothing sets are 0
    #[arg(long, value_name = "NAME=VALUE", help_heading = "Guest", required = false)]
    pub reg: Vec<RegValue>,
    /// What the CPUID instruction says: what the `host` supports, or `none` (zeroes) [default: host; none for a tiny real-mode
    /// guest in which neither that instruction nor one that depends on it occurs, since KVM takes long to ask]
    #[arg(long, value_name = "WHAT", help_heading = "Guest")]
    pub cpuid: Option<Cpuid>,
    /// Where the device tree of an arm64 machine lies; it must fit there [default: as high in RAM as it fits, or nowhere]
    #[arg(long, value_name = "ADDR", help_heading = "Guest")]
    pub fdt_at: Option<Addr>,
    /// A file handed to the guest: a multiboot module, or Linux's initial RAM disk; repeatable (Linux gets them as one)
    #[arg(long, value_name = "FILE", help_heading = "Guest", required = false)]
    pub initrd: Vec<PathBuf>,
    /// The guest's command line
    #[arg(long, value_name = "TEXT", help_heading = "Guest")]
    pub cmdline: Option<String>,
    /// Add nothing to Linux's command line (else: the console, and what makes a virtual machine boot fast, unless said)
    #[arg(long, num_args = 0, action = clap::ArgAction::Set, default_missing_value = "true", help_heading = "Guest", required = false)]
    pub cmdline_raw: bool,

    /// What the serial port is connected to: stdio, none, file:PATH or unix:PATH [default: stdio]
    #[arg(long, value_name = "TO", help_heading = "Input and output", required = false)]
    pub serial: Serial,
    /// A byte-wide output register at a port or an address (pio:ADDR or mmio:ADDR); without a value: pio:0xe9
    #[arg(long, value_name = "WHERE", num_args = 0..=1, default_missing_value = "pio:0xe9", help_heading = "Input and output")]
    pub debugcon: Option<DebugConsole>,

    /// How the guest reaches its virtio devices: `pci` or `mmio` [default: pci]
    #[arg(long, value_name = "HOW", help_heading = "Virtio devices")]
    pub transport: Option<Transport>,
    /// Where a driver's notification goes: `ioeventfd` wakes the device's thread inside KVM, `exit` makes an exit, so that
    /// a trace shows it [default: ioeventfd]
    #[arg(long, value_name = "HOW", help_heading = "Virtio devices")]
    pub doorbell: Option<Doorbell>,
    /// A disk (repeatable): `PATH[,ro|,overlay|,copy][,format=raw|qcow2][,queues=N][,cache=writeback|none][,serial=TEXT][,rate=N[iops]]`;
    /// a comma in PATH is written twice (docs/disks.md)
    #[arg(long, value_name = "PATH,…", help_heading = "Virtio devices", required = false)]
    pub disk: Vec<Words>,
    /// A network: `user` (what this user reaches, by passt), `tap:NAME` (an interface of the host's), or `socket:PATH` (another
    /// machine, one of the two with `,listen`); then `,mac=`, `,mtu=`, and for tap `,queues=`; repeatable
    #[arg(long, value_name = "OPTIONS", help_heading = "Virtio devices", required = false)]
    pub net: Vec<Words>,
    /// Sockets between guest and host: `cid=N,path=SOCKET`. Connect to SOCKET and say `CONNECT port`; the guest's
    /// connections to port P of the host go to SOCKET_P
    #[arg(long, value_name = "OPTIONS", help_heading = "Virtio devices")]
    pub vsock: Option<Words>,
    /// A console on virtio (Linux: hvc0): stdio, none, file:PATH or unix:PATH. With stdio what is typed goes there and not to
    /// the serial port, whose output is still shown, and hvc0 is Linux's console [default: none]
    #[arg(long, value_name = "TO", help_heading = "Virtio devices")]
    pub console: Option<Serial>,
    /// A balloon, by which `bantam balloon` takes memory from a guest that goes on; what the guest has free goes back to
    /// the host by itself
    #[arg(long, num_args = 0, action = clap::ArgAction::Set, default_missing_value = "true", help_heading = "Virtio devices", required = false)]
    pub balloon: bool,
    /// A source of random numbers: `on` or `off` [default: on for Linux]
    #[arg(long, value_name = "SWITCH", help_heading = "Virtio devices")]
    pub rng: Option<Switch>,

    /// End the machine with status 0 once the guest has written TEXT to a console
    #[arg(long, value_name = "TEXT", help_heading = "Life")]
    pub until: Option<String>,
    /// End the machine with status 124 after this many seconds (fractions allowed)
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true, help_heading = "Life")]
    pub timeout: Option<Seconds>,
    /// How long the guest has to switch itself off once its power button was pressed (`bantam stop`, SIGTERM) [default: 30]
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true, help_heading = "Life")]
    pub stop_timeout: Option<Seconds>,
    /// End the machine with status 124 after this many exits of all CPUs
    #[arg(long, value_name = "N", value_parser = number, allow_negative_numbers = true, help_heading = "Life")]
    pub max_exits: Option<u64>,
    /// A reset starts the machine anew; without it a reset ends it
    #[arg(long, num_args = 0, action = clap::ArgAction::Set, default_missing_value = "true", help_heading = "Life", required = false)]
    pub reboot: bool,

    /// Tell every KVM call on stderr, with its arguments, its result, its time and why it is made: as text, or (json) one
    /// object a line
    #[arg(long, value_name = "FORM", num_args = 0..=1, require_equals = true, default_missing_value = "text", help_heading = "Looking in")]
    pub explain: Option<Explain>,
    /// When the guest dies, write its RAM and registers to FILE as an ELF core file, for gdb; untouched RAM is a hole
    #[arg(long, value_name = "FILE", help_heading = "Looking in")]
    pub core: Option<PathBuf>,
    /// Print one line for each exit to stderr, or to FILE; a FILE that ends in .json gets trace events, which
    /// ui.perfetto.dev shows
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true, default_missing_value = "-", help_heading = "Looking in")]
    pub trace: Option<PathBuf>,
    /// Trace these exits only: io, mmio, read, write, halt, irq, vcpu=N, device=NAME, an address or FIRST..LAST; `&` joins
    /// conditions, `|` alternatives
    #[arg(long, value_name = "TERMS", help_heading = "Looking in")]
    pub trace_filter: Option<Filter>,
    /// What a trace for a viewer (FILE.json) may keep in memory, at least 1M; when it is full the oldest give way
    /// [default: 64M]
    #[arg(long, value_name = "SIZE", help_heading = "Looking in")]
    pub trace_memory: Option<Size>,
    /// Say in the trace which instruction caused each exit
    #[arg(long, help_heading = "Looking in")]
    pub trace_insn: bool,
    /// An ELF file with names for the guest's addresses [default: the guest, where it is one]
    #[arg(long, value_name = "FILE", help_heading = "Looking in")]
    pub symbols: Option<PathBuf>,
    /// Keep the last 32 exits for a report [default: on]
    #[arg(long, value_name = "SWITCH", help_heading = "Looking in")]
    pub last_exits: Option<Switch>,
    /// Count exits, times and faults: a table on stderr at the end and on SIGUSR1, or JSON in FILE
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true, default_missing_value = "-", help_heading = "Looking in")]
    pub stats: Option<PathBuf>,
    /// Tell the statistics every so many seconds too (implies --stats)
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true, help_heading = "Looking in")]
    pub stats_interval: Option<Seconds>,
    /// Report a CPU that stalls, once each time; it goes on. Stalled is who for so many seconds runs, makes no exit, waits
    /// for no interrupt and stays within 4 KiB of code; each CPU is looked at eight times in that span, or every second.
    /// On arm64 a CPU that does not leave its exception vectors, always with the same exception, has died
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true, help_heading = "Looking in")]
    pub watchdog: Option<Seconds>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            memory: Size(512 << 20),
            cpus: Cpus::default(),
            name: None,
            hugepages: false,
            irqchip: None,
            gic: None,
            msi: None,
            cpu_features: Vec::new(),
            platform: None,
            ram_base: None,
            load_at: None,
            entry: None,
            cpu_mode: None,
            reg: Vec::new(),
            cpuid: None,
            fdt_at: None,
            initrd: Vec::new(),
            cmdline: None,
            cmdline_raw: false,
            serial: Serial::Stdio,
            debugcon: None,
            transport: None,
            doorbell: None,
            disk: Vec::new(),
            net: Vec::new(),
            vsock: None,
            console: None,
            balloon: false,
            rng: None,
            until: None,
            timeout: None,
            stop_timeout: None,
            max_exits: None,
            reboot: false,
            explain: None,
            core: None,
            trace: None,
            trace_filter: None,
            trace_memory: None,
            trace_insn: false,
            symbols: None,
            last_exits: None,
            stats: None,
            stats_interval: None,
            watchdog: None,
        }
    }
}

/// Where the interrupt controllers live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum IrqChip {
    /// There are none: a CPU that halts has nothing to wake it.
    None,
    /// In KVM.
    Kernel,
    /// Local APICs in KVM, the I/O APIC in Bantam.
    Split,
}

/// How a guest reaches its virtio devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// As PCI functions.
    Pci,
    /// As pages of registers, which ACPI or the device tree names.
    Mmio,
}

/// What a driver's notification does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Doorbell {
    /// Wakes the device's thread, inside KVM.
    Ioeventfd,
    /// Makes an exit.
    Exit,
}

/// Something that is there or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Switch {
    /// It is.
    On,
    /// It is not.
    Off,
}

impl Config {
    /// How many virtio devices the machine has.
    pub fn virtio_devices(&self) -> usize {
        let there = [self.vsock.is_some(), self.has_console(), self.balloon, self.rng == Some(Switch::On)];
        self.disk.len() + self.net.len() + there.into_iter().filter(|there| *there).count()
    }

    /// There is a console on virtio.
    pub fn has_console(&self) -> bool {
        self.console.as_ref().is_some_and(|to| *to != Serial::None)
    }

    /// It is the one that a person looks at.
    pub fn console_is_first(&self) -> bool {
        self.has_console() && (self.console == Some(Serial::Stdio) || self.serial == Serial::None)
    }

    /// The machine has a PCI bus.
    pub fn has_pci(&self) -> bool {
        self.virtio_devices() > 0 && self.transport != Some(Transport::Mmio)
    }

    /// How many virtio devices the machine has as pages of registers.
    pub fn virtio_pages(&self) -> usize {
        if self.has_pci() { 0 } else { self.virtio_devices() }
    }
}

/// How a PC presents itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Platform {
    /// Ports where a PC has them, found by looking.
    Legacy,
    /// ACPI tables that name what there is.
    Acpi,
}

/// How a machine's KVM calls are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Explain {
    /// A line for the call, a line for the reason.
    Text,
    /// One JSON object a line.
    Json,
}

/// What a guest's CPUID instruction says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Cpuid {
    /// What KVM supports on this host.
    Host,
    /// Zeroes.
    None,
}

/// The version of Arm's Generic Interrupt Controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub enum Gic {
    /// GICv2: at most 8 CPUs.
    #[serde(rename = "2")]
    #[value(name = "2")]
    V2,
    /// GICv3.
    #[serde(rename = "3")]
    #[value(name = "3")]
    V3,
}

/// What takes message-signalled interrupts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Msi {
    /// Nothing: devices have wires only.
    None,
    /// GICv3's Interrupt Translation Service.
    Its,
}

/// What an arm64 CPU may have in addition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum CpuFeature {
    /// Performance counters, PMUv3.
    Pmu,
    /// The Scalable Vector Extension.
    Sve,
}

/// The processor mode a flat guest starts in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum CpuMode {
    /// 16-bit real mode.
    Real,
    /// 32-bit protected mode, flat segments, no paging.
    Protected,
    /// 64-bit mode, identity-mapped.
    Long,
    /// Exception level 1 of an arm64 CPU, MMU off.
    El1,
}

impl fmt::Display for CpuMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Real => "real",
            Self::Protected => "protected",
            Self::Long => "long",
            Self::El1 => "el1",
        })
    }
}

/// Reads a number: decimal, or hexadecimal after `0x`.
pub fn number(text: &str) -> Result<u64, String> {
    let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let parsed = match digits {
        Some(hex) if !hex.starts_with('+') => u64::from_str_radix(hex, 16),
        None if !text.starts_with('+') => text.parse(),
        _ => return Err(format!("{text:?} is not a number")),
    };
    parsed.map_err(|e| match e.kind() {
        std::num::IntErrorKind::PosOverflow => format!("{text:?} does not fit in 64 bits"),
        _ => format!("{text:?} is not a number (decimal, or hexadecimal after 0x)"),
    })
}

/// Reads a number of at most 32 bits.
fn small_number(text: &str) -> Result<u32, String> {
    u32::try_from(number(text)?).map_err(|_| format!("{text:?} does not fit in 32 bits"))
}

/// Gives a type serde by way of its words, so that a configuration file and the command line say the same.
macro_rules! serde_as_text {
    ($($name:ty),*) => {$(
        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                #[derive(Deserialize)]
                #[serde(untagged)]
                enum Word { Number(u64), Fraction(f64), Text(String) }
                let text = match Word::deserialize(d)? {
                    Word::Number(n) => n.to_string(),
                    Word::Fraction(f) => f.to_string(),
                    Word::Text(t) => t,
                };
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}
serde_as_text!(Size, Cpus, Addr, Entry, RegValue, Serial, DebugConsole, Seconds, Filter);

/// The machine's CPUs: so many in each of so many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cpus {
    /// Packages.
    pub sockets: u32,
    /// Cores of each.
    pub cores: u32,
    /// Threads of each core.
    pub threads: u32,
}

impl Cpus {
    /// Cores of one package.
    pub fn cores(cores: u32) -> Self {
        Self { sockets: 1, cores, threads: 1 }
    }

    /// How many there are.
    pub fn count(&self) -> u32 {
        self.sockets.saturating_mul(self.cores).saturating_mul(self.threads)
    }
}

impl Default for Cpus {
    fn default() -> Self {
        Self::cores(1)
    }
}

impl FromStr for Cpus {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if !text.contains('=') {
            return small_number(text).map(Self::cores);
        }
        let mut cpus = Self::default();
        let mut said = Vec::new();
        for part in text.split(',') {
            let (name, value) = part.split_once('=').ok_or_else(|| format!("{part:?} is not NAME=N"))?;
            let place = match name {
                "sockets" => &mut cpus.sockets,
                "cores" => &mut cpus.cores,
                "threads" => &mut cpus.threads,
                _ => return Err(format!("{name:?} is not sockets, cores or threads")),
            };
            if said.contains(&name) {
                return Err(format!("{name} is said twice"));
            }
            said.push(name);
            *place = small_number(value)?;
        }
        Ok(cpus)
    }
}

impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sockets, cores, threads } = self;
        match (sockets, threads) {
            (1, 1) => write!(f, "{cores}"),
            _ => write!(f, "sockets={sockets},cores={cores},threads={threads}"),
        }
    }
}

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (digits, shift) = match text.as_bytes().last() {
            Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
            Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
            Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
            _ => (text, 0),
        };
        let not_a_size = |why| format!("{why}; a size is a number of bytes, or a number with K, M or G");
        let bytes = number(digits).map_err(not_a_size)?.checked_mul(1 << shift);
        bytes.map(Self).ok_or_else(|| format!("{text:?} does not fit in 64 bits"))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            n if n == 0 || n % 1024 != 0 => write!(f, "{n}"),
            n if n % (1 << 30) == 0 => write!(f, "{}G", n >> 30),
            n if n % (1 << 20) == 0 => write!(f, "{}M", n >> 20),
            n => write!(f, "{}K", n >> 10),
        }
    }
}

/// A guest-physical address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Addr(pub u64);

impl FromStr for Addr {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        number(text).map(Self)
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Where a flat guest is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// A linear address.
    Linear(u64),
    /// Real mode: cs is the segment, its base 16 times that, and rip the offset.
    Far(u16, u16),
}

impl FromStr for Entry {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let word = |t: &str| u16::try_from(number(t)?).map_err(|_| format!("{t:?} does not fit in 16 bits"));
        match text.split_once(':') {
            Some((segment, offset)) => Ok(Self::Far(word(segment)?, word(offset)?)),
            None => number(text).map(Self::Linear),
        }
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Linear(address) => write!(f, "{address:#x}"),
            Self::Far(segment, offset) => write!(f, "{segment:#x}:{offset:#x}"),
        }
    }
}

/// A register and the value it gets before entry. Which names exist is the architecture's to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegValue {
    /// The register's name, in lower case.
    pub name: String,
    /// Its value.
    pub value: u64,
}

impl FromStr for RegValue {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or_else(|| format!("{text:?} is not NAME=VALUE"))?;
        Ok(Self { name: name.to_ascii_lowercase(), value: number(value)? })
    }
}

impl fmt::Display for RegValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={:#x}", self.name, self.value)
    }
}

/// What the serial port is connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Serial {
    /// Bantam's own standard input and output.
    Stdio,
    /// Nothing.
    None,
    /// A file that receives the output.
    File(PathBuf),
    /// A Unix socket that one client at a time connects to.
    Unix(PathBuf),
}

impl FromStr for Serial {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.split_once(':')) {
            ("stdio", _) => Ok(Self::Stdio),
            ("none", _) => Ok(Self::None),
            (_, Some(("file", path))) if !path.is_empty() => Ok(Self::File(path.into())),
            (_, Some(("unix", path))) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => Err(format!("{text:?} is not stdio, none, file:PATH or unix:PATH")),
        }
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdio => f.write_str("stdio"),
            Self::None => f.write_str("none"),
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// An address space of the guest that devices live in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Space {
    /// Port I/O (x86).
    Pio,
    /// Memory-mapped I/O.
    Mmio,
}

/// Where the debug console's register lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DebugConsole {
    /// Ports or memory.
    pub space: Space,
    /// The register's address.
    pub addr: u64,
}

impl FromStr for DebugConsole {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("pio", port)) => {
                let addr = number(port)?;
                match addr {
                    0..=0xffff => Ok(Self { space: Space::Pio, addr }),
                    _ => Err(format!("port {addr:#x} is over 0xffff")),
                }
            }
            Some(("mmio", addr)) => Ok(Self { space: Space::Mmio, addr: number(addr)? }),
            _ => Err(format!("{text:?} is not pio:ADDR or mmio:ADDR (for port 0xe9 put the guest before --debugcon)")),
        }
    }
}

impl fmt::Display for DebugConsole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let space = if self.space == Space::Pio { "pio" } else { "mmio" };
        write!(f, "{space}:{:#x}", self.addr)
    }
}

/// A time span in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Seconds(pub std::time::Duration);

impl FromStr for Seconds {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let not_seconds = || format!("{text:?} is not a number of seconds");
        let seconds: f64 = match number(text) {
            Ok(whole) => std::time::Duration::from_secs(whole).as_secs_f64(),
            Err(_) => text.parse().map_err(|_| not_seconds())?,
        };
        std::time::Duration::try_from_secs_f64(seconds)
            .map(Self)
            .map_err(|_| format!("{text:?} is not a possible time span"))
    }
}

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_take_hex_and_refuse_signs_and_overflow() {
        assert_eq!(number("0x1000"), Ok(0x1000));
        assert_eq!(number("4096"), Ok(4096));
        for bad in ["", "0x", "+1", "0x+1", "-1", "1x", "99999999999999999999"] {
            assert!(number(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn sizes_take_suffixes_and_plain_bytes() {
        for (text, bytes) in [("4K", 4096), ("512M", 512 << 20), ("5G", 5 << 30), ("512000000", 512_000_000)] {
            assert_eq!(text.parse(), Ok(Size(bytes)));
        }
        assert!("99999999999G".parse::<Size>().is_err());
        assert!("".parse::<Size>().is_err());
        assert!("é".parse::<Size>().is_err());
    }

    #[test]
    fn every_word_reads_back_what_it_prints() {
        fn both_ways<T: FromStr<Err = String> + fmt::Display + PartialEq + fmt::Debug>(texts: &[&str]) {
            for text in texts {
                let value: T = text.parse().unwrap();
                assert_eq!(value.to_string().parse::<T>().unwrap(), value);
            }
        }
        both_ways::<Size>(&["1", "4096", "4K", "0", "3M"]);
        both_ways::<Entry>(&["0x1000", "0x1000:0", "7"]);
        both_ways::<Serial>(&["stdio", "none", "file:/x", "unix:a:b"]);
        both_ways::<DebugConsole>(&["pio:0xe9", "mmio:0x996"]);
        both_ways::<RegValue>(&["rax=2", "x0=0x10"]);
        both_ways::<Seconds>(&["0.25", "3"]);
    }

    #[test]
    fn a_config_survives_toml() {
        let config = Config {
            entry: Some(Entry::Far(0x1000, 0)),
            reg: vec!["rax=2".parse().unwrap()],
            timeout: Some("1.5".parse().unwrap()),
            debugcon: Some("mmio:0x996".parse().unwrap()),
            ..Config::default()
        };
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<Config>(&text).unwrap(), config);
        let toml: Config = toml::from_str("memory = \"1M\"\ncpus = 2\ntimeout = 3\nirqchip = \"kernel\"").unwrap();
        assert_eq!((toml.memory, toml.cpus, toml.irqchip), (Size(1 << 20), Cpus::cores(2), Some(IrqChip::Kernel)));
        assert!(toml::from_str::<Config>("memroy = 1").is_err());
    }
}
