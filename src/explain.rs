//! Narration: every KVM call of a machine's life, in order, with its arguments, its result, its time and why it is made.
//!
//! One narrator a process, like the one `/dev/kvm`. It speaks on set-up and teardown through [`call`], which costs one
//! load of a flag while it is off, and of exits through [`Narrator`], a trace. Invariant: nothing here changes what is
//! called, nor in which order.

use std::fmt::Display;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use kvm_ioctls::{DeviceFd, Kvm, VcpuFd, VmFd};
use serde::Serialize;

use crate::bus::{Buses, Exit};
use crate::config::{Explain, Space};
use crate::host::say::say;
use crate::trace::{Sight, Trace, describe, now};

/// How many exits of each CPU are told of.
const EXITS: u64 = 16;

static FORMAT: OnceLock<Explain> = OnceLock::new();
static NUMBER: AtomicU64 = AtomicU64::new(0);
/// Calls made through [`call`], told or not.
static MADE: AtomicU64 = AtomicU64::new(0);

/// Calls of set-up, for a trace: name, begin on the trace's clock, time. Few, so the lock is never waited for.
static CALLS: Mutex<Vec<(String, Duration, Duration)>> = Mutex::new(Vec::new());
static RECORDING: AtomicBool = AtomicBool::new(false);
/// Calls that are kept: more than any machine of the most CPUs makes once.
const KEPT: usize = 4096;

/// Keeps the calls of set-up for [`calls`].
pub fn record() {
    RECORDING.store(true, Ordering::Relaxed);
}

/// The calls that were kept.
pub fn calls() -> Vec<(String, Duration, Duration)> {
    CALLS.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Starts the narration; it lasts as long as the process.
pub fn start(format: Explain) {
    let _ = FORMAT.set(format);
}

/// Whether there is someone to tell.
pub fn is_on() -> bool {
    FORMAT.get().is_some()
}

/// How many calls have been made through [`call`].
pub fn count() -> u64 {
    MADE.load(Ordering::Relaxed)
}

/// One step, as it is told.
#[derive(Serialize)]
struct Step<'a> {
    number: u64,
    call: &'a str,
    arguments: &'a str,
    result: &'a str,
    nanoseconds: u64,
    why: &'a str,
}

fn micros(time: u64) -> String {
    match time {
        0..10_000 => format!("{}.{} µs", time / 1000, time % 1000 / 100),
        _ => format!("{} µs", time / 1000),
    }
}

impl Step<'_> {
    fn text(&self, format: Explain) -> String {
        if format == Explain::Json {
            return serde_json::to_string(self).unwrap_or_default();
        }
        let Self { number, call, arguments, result, nanoseconds, why } = self;
        let arguments = if arguments.is_empty() { String::new() } else { format!(" {arguments}") };
        let result = if result.is_empty() { String::new() } else { format!(" → {result}") };
        let time = if *nanoseconds == 0 { String::new() } else { format!("  ({})", micros(*nanoseconds)) };
        // Each reason is given once.
        let why = if why.is_empty() || is_old(why) { String::new() } else { format!("\n     {why}") };
        format!("[{number}] {call}{arguments}{result}{time}{why}")
    }
}

/// Whether a reason has been given before.
fn is_old(why: &str) -> bool {
    static GIVEN: Mutex<Vec<String>> = Mutex::new(Vec::new());
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    let old = given.iter().any(|one| one == why);
    if !old {
        given.push(why.to_owned());
    }
    old
}

fn next() -> u64 {
    NUMBER.fetch_add(1, Ordering::Relaxed) + 1
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// What a call gave, in a word or two.
pub trait Outcome {
    /// The words.
    fn show(&self) -> String;
}

macro_rules! show_descriptors {
    ($($name:ty),*) => {$(
        impl Outcome for $name {
            fn show(&self) -> String {
                format!("fd {}", self.as_raw_fd())
            }
        }
    )*};
}
show_descriptors!(Kvm, VmFd, VcpuFd, DeviceFd);

macro_rules! show_numbers {
    ($($name:ty),*) => {$(
        impl Outcome for $name {
            fn show(&self) -> String {
                self.to_string()
            }
        }
    )*};
}
show_numbers!(i32, u32, usize, bool);

impl Outcome for () {
    fn show(&self) -> String {
        "0".to_owned()
    }
}

/// Makes a call, and tells of it where someone listens: its arguments and why it is made come from `tell`.
///
/// # Errors
/// Those of the call.
pub fn call<T: Outcome, E: Display>(
    name: &str,
    tell: impl FnOnce() -> (String, &'static str),
    make: impl FnOnce() -> Result<T, E>,
) -> Result<T, E> {
    MADE.fetch_add(1, Ordering::Relaxed);
    let recording = RECORDING.load(Ordering::Relaxed);
    if FORMAT.get().is_none() && !recording {
        return make();
    }
    let begin = now();
    let made = make();
    let taken = now().saturating_sub(begin);
    let mut kept = CALLS.lock().unwrap_or_else(PoisonError::into_inner);
    if recording && kept.len() < KEPT {
        kept.push((name.to_owned(), begin, taken));
    }
    drop(kept);
    let Some(format) = FORMAT.get() else { return made };
    let time = nanoseconds(taken);
    let result = made.as_ref().map_or_else(|e| format!("error: {e}"), Outcome::show);
    let (arguments, why) = tell();
    let step = Step { number: next(), call: name, arguments: &arguments, result: &result, nanoseconds: time, why };
    say(&step.text(*format));
    made
}

/// Does something that is no KVM call, and tells of it where someone listens.
pub fn step(what: &str, arguments: &str, why: &'static str, act: impl FnOnce()) {
    let act = || {
        act();
        Ok::<_, std::convert::Infallible>(())
    };
    let _ = call(what, || (arguments.to_owned(), why), act);
}

/// Tells of something that is done without a call of its own.
pub fn tell(what: &str, arguments: impl FnOnce() -> String, why: &str) {
    if let Some(format) = FORMAT.get() {
        let (number, arguments) = (next(), arguments());
        let step = Step { number, call: what, arguments: &arguments, result: "", nanoseconds: 0, why };
        say(&step.text(*format));
    }
}

/// Tells of the first exits of one CPU, and what was done about each: few enough that a slow stderr holds no CPU up for long.
pub struct Narrator {
    cpu: u32,
    told: u64,
    entered: Instant,
    /// How long the last KVM_RUN took.
    inside: Duration,
}

impl Narrator {
    /// A narrator for one CPU, where someone listens.
    pub fn new(cpu: u32) -> Option<Self> {
        is_on().then(|| Self { cpu, told: 0, entered: Instant::now(), inside: Duration::ZERO })
    }
}

impl Trace for Narrator {
    fn enter(&mut self) {
        self.entered = Instant::now();
    }

    fn returned(&mut self, _cpu: &mut impl Sight) {
        self.inside = self.entered.elapsed();
    }

    fn leave(&mut self, exit: &Exit<'_>, buses: &Buses) {
        let Some(format) = FORMAT.get() else { return };
        if matches!(exit, Exit::Interrupted) || self.told > EXITS {
            return;
        }
        self.told += 1;
        let mut what = String::new();
        describe(&mut what, exit, buses);
        let why = if self.told > EXITS { "… and so on: --trace shows every exit" } else { done(exit, buses) };
        let step = Step {
            number: next(),
            call: "KVM_RUN",
            arguments: &format!("of vCPU {}", self.cpu),
            result: &format!("{}: {what}", reason(exit)),
            nanoseconds: nanoseconds(self.inside),
            why,
        };
        say(&step.text(*format));
    }
}

/// The exit reason, by the KVM API document's name.
fn reason(exit: &Exit<'_>) -> &'static str {
    use Space::{Mmio, Pio};
    match exit {
        Exit::Read { space: Pio, .. } | Exit::Write { space: Pio, .. } => "KVM_EXIT_IO",
        Exit::Read { space: Mmio, .. } | Exit::Write { space: Mmio, .. } => "KVM_EXIT_MMIO",
        Exit::Halt => "KVM_EXIT_HLT",
        Exit::EndOfInterrupt(_) => "KVM_EXIT_IOAPIC_EOI",
        Exit::Shutdown => "KVM_EXIT_SHUTDOWN",
        Exit::System { .. } => "KVM_EXIT_SYSTEM_EVENT",
        Exit::Debug => "KVM_EXIT_DEBUG",
        Exit::Interrupted => "KVM_EXIT_INTR",
        Exit::Fault(_) => "a fatal exit",
    }
}

/// What the monitor does about an exit.
fn done(exit: &Exit<'_>, buses: &Buses) -> &'static str {
    let device = |space, addr, write| buses.name(space, addr, write).is_some();
    match exit {
        Exit::Write { space: Space::Pio, addr, .. } if device(Space::Pio, *addr, true) => {
            "The guest executed OUT, which leaves it: KVM returned. Bantam's model of the device took the value."
        }
        Exit::Read { space: Space::Pio, addr, .. } if device(Space::Pio, *addr, false) => {
            "The guest executed IN: Bantam's model of the device gave the value, which the next KVM_RUN puts into the register."
        }
        Exit::Write { space, addr, .. } if device(*space, *addr, true) => {
            "The guest wrote where no RAM is, so the CPU stopped and KVM returned. Bantam's model of the device took the value."
        }
        Exit::Write { .. } => {
            "The guest wrote where no RAM and no device is: the value is dropped, as on an empty bus."
        }
        Exit::Read { space, addr, .. } if device(*space, *addr, false) => {
            "The guest read a device: Bantam's model of it gave the value, which the next KVM_RUN puts into the register."
        }
        Exit::Read { .. } => "The guest read where no device is: all ones, as from an empty bus.",
        Exit::Halt => {
            "The CPU has nothing to do until an interrupt. There is no interrupt controller to bring one: the machine ends."
        }
        Exit::EndOfInterrupt(_) => {
            "A CPU has done with a level-triggered interrupt: Bantam's I/O APIC looks whether the line is still high."
        }
        Exit::Shutdown => "An exception while the CPU was reporting another, twice: it gave up. The guest has died.",
        Exit::System { .. } => "The guest asked KVM's firmware interface to switch off, to reset, or told of a crash.",
        Exit::Debug => "A debug exit that nobody asked for.",
        Exit::Interrupted => "A signal to Bantam's own thread.",
        Exit::Fault(_) => "Neither the guest nor KVM can go on. The guest has died.",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Step<'static> = Step {
        number: 2,
        call: "KVM_CREATE_VM",
        arguments: "type 0",
        result: "fd 4",
        nanoseconds: 187_400,
        why: "A machine, with nothing in it yet.",
    };

    #[test]
    fn a_step_reads_as_a_line_and_its_reason() {
        let text = "[2] KVM_CREATE_VM type 0 → fd 4  (187 µs)\n     A machine, with nothing in it yet.";
        assert_eq!(STEP.text(Explain::Text), text);
        assert_eq!(STEP.text(Explain::Text), "[2] KVM_CREATE_VM type 0 → fd 4  (187 µs)", "a reason is given once");
        assert_eq!(micros(1234), "1.2 µs");
    }

    #[test]
    fn a_step_is_one_json_object_on_one_line() {
        let text = STEP.text(Explain::Json);
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert!(!text.contains('\n') && value["call"] == "KVM_CREATE_VM" && value["nanoseconds"] == 187_400);
    }

    #[test]
    fn a_call_is_made_whether_or_not_someone_listens() {
        assert_eq!(call("X", || (String::new(), ""), || Ok::<_, kvm_ioctls::Error>(7)).unwrap(), 7);
        assert!(call("X", || (String::new(), ""), || Err::<(), _>(kvm_ioctls::Error::new(22))).is_err());
    }
}
