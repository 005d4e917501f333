//! Statistics: exits by reason, device and CPU, how long each took, where the time went.
//!
//! Each vCPU has a [`Recorder`], a trace, and is the only one to write its counters; the event loop reads them while the
//! CPU runs. Invariant: between two exits there is no lock, no allocation (but at the first exit of a kind) and no system
//! call: two reads of the clock, which the kernel's page of code does, and a few additions.

mod addresses;
mod histogram;
mod kvm;
mod process;
mod report;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::fd::OwnedFd;

use self::addresses::Addresses;
use self::histogram::{Histogram, add};
pub use self::kvm::Halts;
use self::kvm::{Counters, KvmStats};
pub use self::report::Report;
use crate::bus::{Buses, Exit, Occupied, Space};
use crate::host::sys::monotonic;
use crate::trace::{Sight, Trace};

/// Devices that are told apart; those beyond share one row.
const DEVICES: usize = 32;
/// Rows of one reason that has an address: for each device, and for none.
const ROWS: usize = DEVICES + 1;

/// Why a CPU exited, as statistics tell it. Those with an address come first.
const REASONS: [&str; 10] =
    ["io-out", "io-in", "mmio-write", "mmio-read", "halt", "shutdown", "system-event", "debug", "fault", "ioapic-eoi"];
const WITH_ADDRESS: usize = 4;
const ALL_ROWS: usize = WITH_ADDRESS * ROWS + REASONS.len() - WITH_ADDRESS;

/// The counters of one CPU; they live as long as the process, through all lives of a machine.
struct Cpu {
    rows: Vec<OnceLock<Box<Histogram>>>,
    addresses: Addresses,
    /// Nanoseconds in KVM_RUN, and answering exits.
    inside: AtomicU64,
    outside: AtomicU64,
    /// When the CPU entered the guest; 0 while it is not there.
    entered: AtomicU64,
    /// KVM_RUN calls that ended with a signal.
    interrupted: AtomicU64,
    /// What KVM counted in former lives, and its counters of this one.
    kvm: Mutex<(Counters, Option<KvmStats>)>,
}

impl Default for Cpu {
    fn default() -> Self {
        Self {
            rows: (0..ALL_ROWS).map(|_| OnceLock::new()).collect(),
            addresses: Addresses::default(),
            inside: AtomicU64::new(0),
            outside: AtomicU64::new(0),
            entered: AtomicU64::new(0),
            interrupted: AtomicU64::new(0),
            kvm: Mutex::default(),
        }
    }
}

/// The statistics of one machine.
pub struct Stats {
    started: u64,
    cpus: Mutex<Vec<Arc<Cpu>>>,
    devices: Mutex<Devices>,
}

/// The machine's devices, as they were found when no CPU ran: their names are behind locks that CPUs take.
#[derive(Default)]
struct Devices {
    names: Vec<&'static str>,
    map: Vec<Occupied>,
}

/// No vCPU ever takes these locks, and a panic ends the process.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for Stats {
    fn default() -> Self {
        Self { started: monotonic(), cpus: Mutex::default(), devices: Mutex::default() }
    }
}

impl Stats {
    /// A machine with these devices is about to run.
    pub fn begin(&self, buses: &Buses) {
        *lock(&self.devices) = Devices { names: buses.names(), map: buses.map() };
    }

    /// The recorder of CPU `id`; `kvm` is KVM's descriptor for its own counters, where it has one.
    pub fn recorder(&self, id: u32, kvm: Option<OwnedFd>) -> Recorder {
        let mut cpus = lock(&self.cpus);
        let at = usize::try_from(id).unwrap_or(0);
        if cpus.len() <= at {
            cpus.resize_with(at + 1, Arc::default);
        }
        let cpu = cpus.get(at).cloned().unwrap_or_default();
        if let Some(new) = kvm.and_then(KvmStats::new) {
            let mut counters = lock(&cpu.kvm);
            let begun = new.read();
            // A CPU that goes on counts on; a new one, after a reset, begins at 0.
            if let Some(old) = counters.1.replace(new) {
                counters.0.merge(old.read());
                counters.0.since(begun);
            }
        }
        Recorder { cpu, now: 0, returned: 0, guess: 0 }
    }

    /// What has been counted so far.
    pub fn report(&self) -> Report {
        let now = monotonic();
        report::of(&lock(&self.cpus), &lock(&self.devices), now.saturating_sub(self.started), now)
    }
}

/// Counts the exits of one CPU, on its thread.
pub struct Recorder {
    cpu: Arc<Cpu>,
    /// When the last exit had been answered; 0 before the first.
    now: u64,
    /// When KVM_RUN last returned.
    returned: u64,
    /// Where the last access was found.
    guess: usize,
}

impl Recorder {
    fn access(&mut self, reason: usize, at: (Space, u64), buses: &Buses) -> usize {
        let (space, addr) = at;
        self.guess = self.cpu.addresses.record(space, addr, reason.is_multiple_of(2), self.guess);
        reason * ROWS + buses.at(space, addr).map_or(0, |device| 1 + device.min(DEVICES - 1))
    }

    /// The row of an exit; none for what the guest had no part in.
    fn row(&mut self, exit: &Exit<'_>, buses: &Buses) -> Option<usize> {
        Some(match exit {
            Exit::Write { space: Space::Pio, addr, .. } => self.access(0, (Space::Pio, *addr), buses),
            Exit::Read { space: Space::Pio, addr, .. } => self.access(1, (Space::Pio, *addr), buses),
            Exit::Write { space: Space::Mmio, addr, .. } => self.access(2, (Space::Mmio, *addr), buses),
            Exit::Read { space: Space::Mmio, addr, .. } => self.access(3, (Space::Mmio, *addr), buses),
            Exit::Halt => WITH_ADDRESS * ROWS,
            Exit::Shutdown => WITH_ADDRESS * ROWS + 1,
            Exit::System { .. } => WITH_ADDRESS * ROWS + 2,
            Exit::Debug => WITH_ADDRESS * ROWS + 3,
            Exit::Fault(_) => WITH_ADDRESS * ROWS + 4,
            Exit::EndOfInterrupt(_) => WITH_ADDRESS * ROWS + 5,
            Exit::Interrupted => return None,
        })
    }
}

/// The reason and the device of a row; `None` for no device.
fn name_of(row: usize, devices: &[&'static str]) -> (&'static str, Option<&'static str>) {
    let with_address = row < WITH_ADDRESS * ROWS;
    let reason = if with_address { row / ROWS } else { row - WITH_ADDRESS * ROWS + WITH_ADDRESS };
    let device = if with_address { row % ROWS } else { 0 };
    let name = match device {
        0 => None,
        DEVICES if devices.len() > DEVICES => Some("others"),
        number => Some(devices.get(number - 1).copied().unwrap_or("?")),
    };
    (REASONS.get(reason).copied().unwrap_or("?"), name)
}

impl Trace for Recorder {
    fn enter(&mut self) {
        if self.now == 0 {
            self.now = monotonic();
            self.cpu.entered.store(self.now, Ordering::Relaxed);
        }
    }

    fn returned(&mut self, _cpu: &mut impl Sight) {
        self.returned = monotonic();
        add(&self.cpu.inside, self.returned.saturating_sub(self.now));
        self.cpu.entered.store(0, Ordering::Relaxed);
    }

    fn leave(&mut self, exit: &Exit<'_>, buses: &Buses) {
        let row = self.row(exit, buses);
        self.now = monotonic();
        let took = self.now.saturating_sub(self.returned);
        add(&self.cpu.outside, took);
        self.cpu.entered.store(self.now, Ordering::Relaxed);
        match row.and_then(|row| self.cpu.rows.get(row)) {
            Some(row) => row.get_or_init(Box::default).record(took),
            None => add(&self.cpu.interrupted, 1),
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.cpu.entered.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::Builder;
    use crate::device::debug_exit::DebugExit;
    use crate::memory::Span;

    #[test]
    fn exits_are_counted_by_reason_device_and_cpu() {
        let mut builder = Builder::default();
        builder.place(Space::Pio, Span { start: 0xf4, size: 4 }, DebugExit).unwrap();
        let (stats, buses) = (Stats::default(), builder.finish());
        stats.begin(&buses);
        for (cpu, port, times) in [(0, 0xf4, 3), (0, 0x10, 2), (2, 0xf4, 1)] {
            let mut recorder = stats.recorder(cpu, None);
            for _ in 0..times {
                recorder.enter();
                recorder.returned(&mut crate::trace::At(0));
                recorder.leave(&Exit::Write { space: Space::Pio, addr: port, width: 1, data: &[1] }, &buses);
            }
            recorder.leave(&Exit::Interrupted, &buses);
            recorder.leave(&Exit::Halt, &buses);
        }
        let report = serde_json::to_value(stats.report()).unwrap();
        assert_eq!((&report["exits"]["total"], &report["exits"]["interrupted"]), (&9.into(), &3.into()));
        let by = report["exits"]["by"].as_array().unwrap();
        let count = |vcpu: u32, reason: &str, device: serde_json::Value| {
            let row = by.iter().find(|r| r["vcpu"] == vcpu && r["reason"] == reason && r["device"] == device);
            row.map_or(0, |r| r["count"].as_u64().unwrap())
        };
        assert_eq!(count(0, "io-out", "debug-exit".into()), 3);
        assert_eq!(count(0, "io-out", serde_json::Value::Null), 2);
        assert_eq!(count(2, "io-out", "debug-exit".into()), 1);
        assert_eq!((count(0, "halt", serde_json::Value::Null), count(1, "halt", serde_json::Value::Null)), (2, 0));
        let hot = &report["addresses"][0];
        assert_eq!((&hot["addr"], &hot["count"], &hot["device"]), (&0xf4.into(), &4.into(), &"debug-exit".into()));
    }

    #[test]
    fn every_row_has_one_name() {
        let devices = ["serial", "cmos"];
        assert_eq!(name_of(0, &devices), ("io-out", None));
        assert_eq!(name_of(ROWS + 2, &devices), ("io-in", Some("cmos")));
        assert_eq!(name_of(3 * ROWS + DEVICES, &["x"; 40]), ("mmio-read", Some("others")));
        assert_eq!(name_of(WITH_ADDRESS * ROWS, &devices), ("halt", None));
        assert_eq!(name_of(ALL_ROWS - 1, &devices), ("ioapic-eoi", None));
    }
}
