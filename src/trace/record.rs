//! A trace for a viewer: rounds of each vCPU, and services of devices, kept in memory, written at the end as trace events (the format of Chrome and
//! Perfetto: docs.google.com "Trace Event Format"; ui.perfetto.dev opens it).
//!
//! Invariant: memory is bounded, what the ring holds in reserve included. Each CPU has a ring; when it is full the oldest
//! rounds give way, and are counted.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use serde_json::json;

use super::filter::{Filter, wants};
use super::last::{LAST, Recent};
use super::print::{Name, access};
use super::ring::{Entry, Ring, Room};
use super::track::Service;
use super::{Culprit, Round, Sight, Symbols, Trace, Track, describe};
use crate::bus::{Buses, Exit, Space};
use crate::stats::Halts;

/// What a trace for a viewer keeps unless it is told otherwise, in bytes, and the least that it can be told.
pub const MEMORY: u64 = 64 << 20;
pub const LEAST: u64 = 1 << 20;
/// One part of so many is for the thread of devices, the rest for all CPUs together.
const PARTS: usize = 16;

/// What one CPU keeps for it: their texts are cut at about 200 bytes.
const LITTLE: Room = Room { events: LAST, text: LAST * 200 };

/// One answered exit.
#[derive(Debug, Clone)]
struct Event {
    round: Round,
    /// Of the time that KVM_RUN took, what the CPU was halted for.
    halted: Duration,
    answered: Duration,
    what: What,
    /// The instruction, with `--trace-insn`.
    code: Option<Box<str>>,
}

/// What the guest did. To put it into words takes longer than to answer it, so that waits; but for what does not fit.
#[derive(Debug, Clone)]
enum What {
    Access {
        name: Name,
        at: (Space, u64, usize),
        write: bool,
        data: [u8; 8],
    },
    /// As [`describe`] has it; long string accesses are cut.
    Other(Box<str>),
}

impl What {
    fn new(exit: &Exit<'_>, buses: &Buses) -> Self {
        let (at, data, write) = match exit {
            Exit::Read { space, addr, width, data } => ((*space, *addr, *width), &data[..], false),
            Exit::Write { space, addr, width, data } => ((*space, *addr, *width), *data, true),
            _ => ((Space::Pio, 0, 0), &[][..], false),
        };
        let mut bytes = [0; 8];
        match bytes.get_mut(..data.len()) {
            Some(place) if data.len() == at.2 && !data.is_empty() => {
                place.copy_from_slice(data);
                Self::Access { name: buses.name(at.0, at.1, write), at, write, data: bytes }
            }
            _ => {
                let mut line = String::new();
                describe(&mut line, exit, buses);
                Self::Other(line.into())
            }
        }
    }

    fn words(&self) -> String {
        match self {
            Self::Other(text) => text.to_string(),
            Self::Access { name, at, write, data } => {
                let mut line = String::new();
                access(&mut line, *name, *at, data.get(..at.2).unwrap_or_default(), *write);
                line
            }
        }
    }

    /// Bytes elsewhere.
    fn len(&self) -> usize {
        if let Self::Other(text) = self { text.len() } else { 0 }
    }
}

impl Entry for Event {
    fn text(&self) -> usize {
        self.what.len() + self.code.as_ref().map_or(0, |code| code.len())
    }
}

/// A CPU and its ring.
type Rings = (u32, Arc<Mutex<Ring<Event>>>);

/// The rings of a machine's CPUs, in their order, and what happened before they ran.
#[derive(Debug, Clone)]
pub struct Recording {
    rings: Arc<Mutex<Vec<Rings>>>,
    /// The name and the track of the thread of devices, where there is one.
    worker: Arc<OnceLock<(&'static str, Track)>>,
    /// Bytes for a viewer; none to keep only what a report shows.
    memory: Option<usize>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Records one CPU.
pub struct Record {
    cpu: u32,
    room: Room,
    ring: Arc<Mutex<Ring<Event>>>,
    filter: Option<Filter>,
    round: Round,
    culprit: Option<Culprit>,
    halts: Option<Halts>,
    halted: Duration,
    /// KVM_RUN has returned, but for no exit of the guest's: for a viewer it goes on.
    under_way: bool,
}

/// A KVM_RUN that took less is not asked how long its CPU was halted: that takes system calls.
const LONG: Duration = Duration::from_micros(100);

impl Recording {
    /// One that keeps so many bytes for a viewer.
    pub fn new(bytes: u64) -> Self {
        let memory = usize::try_from(bytes.max(LEAST)).unwrap_or(usize::MAX);
        Self { rings: Arc::default(), worker: Arc::default(), memory: Some(memory) }
    }

    /// One that keeps the last exits only, for a report.
    pub fn little() -> Self {
        Self { rings: Arc::default(), worker: Arc::default(), memory: None }
    }

    /// The track of the thread of devices, which has this name.
    pub fn of_worker(&self, name: &'static str) -> Track {
        let memory = self.memory.unwrap_or_default() / PARTS;
        self.worker.get_or_init(|| (name, Track::new(memory))).1.clone()
    }

    /// The last exits of all CPUs in words.
    pub fn last(&self, symbols: &Symbols) -> Recent {
        let mut all = Vec::new();
        for (cpu, ring) in lock(&self.rings).iter() {
            let ring = lock(ring);
            let line = |event: &Event| {
                let pc = event.round.pc;
                (event.round.returned, format!("cpu{cpu} {}  pc {pc:#x}{}", event.what.words(), symbols.suffix(pc)))
            };
            all.extend(ring.events.iter().rev().take(LAST).map(line));
        }
        all.sort();
        let from = all.len().saturating_sub(LAST);
        let lines = all.into_iter().skip(from).map(|(_, line)| line).collect();
        Recent { lines, places: true, by_cpu: false }
    }

    /// Someone records.
    pub fn is_used(&self) -> bool {
        !lock(&self.rings).is_empty()
    }

    /// A recorder for one of `cpus` CPUs; one that runs anew goes on in its ring.
    pub fn of_cpu(&self, cpu: u32, cpus: u32, filter: Option<Filter>) -> Record {
        let mut rings = lock(&self.rings);
        let ring = match rings.iter().find(|(id, _)| *id == cpu) {
            Some((_, ring)) => ring.clone(),
            None => {
                let ring = Arc::<Mutex<Ring<Event>>>::default();
                rings.push((cpu, ring.clone()));
                ring
            }
        };
        let of = |memory: usize| Room::of::<Event>((memory - memory / PARTS) / cpus.max(1) as usize);
        let room = self.memory.map_or(LITTLE, of);
        let (round, halted) = (Round::default(), Duration::ZERO);
        Record { cpu, room, ring, filter, round, culprit: None, halts: None, halted, under_way: false }
    }

    /// Writes everything as one JSON object; `calls` are KVM's at the start: name, begin, duration.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(
        &self,
        to: &mut impl Write,
        calls: &[(String, Duration, Duration)],
        symbols: &Symbols,
    ) -> io::Result<u64> {
        let micros = |time: Duration| time.as_nanos() as f64 / 1000.0;
        let slice = |name: &str, tid: u32, begin: Duration, end: Duration, args: serde_json::Value| {
            let dur = micros(end.saturating_sub(begin));
            json!({"name": name, "ph": "X", "pid": 1, "tid": tid, "ts": micros(begin), "dur": dur, "args": args})
        };
        let title = |tid: u32, name: &str| json!({"name": "thread_name", "ph": "M", "pid": 1, "tid": tid, "args": {"name": name}});
        let rings = lock(&self.rings);
        let mut dropped = 0;
        let set_up = rings.iter().map(|(cpu, _)| cpu + 1).max().unwrap_or(0);
        write!(to, "{{\"displayTimeUnit\":\"ns\",\"traceEvents\":[\n{}", title(set_up, "set-up"))?;
        for (name, begin, time) in calls {
            write!(to, ",\n{}", slice(name, set_up, *begin, *begin + *time, json!({})))?;
        }
        for (cpu, ring) in rings.iter() {
            let ring = lock(ring);
            dropped += ring.dropped;
            write!(to, ",\n{}", title(*cpu, &format!("vcpu{cpu}")))?;
            for event in &ring.events {
                let Round { entered, returned, pc } = event.round;
                let entered = entered.unwrap_or(returned);
                let place = format!("{pc:#x}{}", symbols.suffix(pc));
                write!(to, ",\n{}", slice("guest", *cpu, entered, returned, json!({"pc": place})))?;
                if !event.halted.is_zero() {
                    let args = json!({"note": "KVM tells how long, not when: it is drawn at the start"});
                    write!(to, ",\n{}", slice("halted", *cpu, entered, entered + event.halted, args))?;
                }
                let code = event.code.as_ref().map_or(json!({}), |code| json!({ "instruction": code }));
                write!(to, ",\n{}", slice(&event.what.words(), *cpu, returned, event.answered, code))?;
            }
        }
        if let Some((name, track)) = self.worker.get() {
            let (tid, (lost, services)) = (set_up + 1, track.services());
            dropped += lost;
            write!(to, ",\n{}", title(tid, name))?;
            for Service { device: (device, number), woken: (by, which), begun, ended } in services {
                let woken = which.map_or(by.to_owned(), |which| format!("{by} {which}"));
                let args = json!({"device": number, "woken by": woken});
                write!(to, ",\n{}", slice(device, tid, begun, ended, args))?;
            }
        }
        writeln!(to, "\n],\"otherData\":{{\"dropped\":{dropped}}}}}")?;
        Ok(dropped)
    }
}

impl Trace for Record {
    fn wants_pc(&self) -> bool {
        true
    }

    fn enter(&mut self) {
        self.round.enter();
    }

    fn returned(&mut self, cpu: &mut impl Sight) {
        self.round.end(cpu);
        self.culprit = cpu.culprit();
        if let Some(halts) = self.halts.as_mut().filter(|_| self.round.inside() >= LONG) {
            self.halted = (self.halted + Duration::from_nanos(halts.since())).min(self.round.inside());
        }
    }

    fn leave(&mut self, exit: &Exit<'_>, buses: &Buses) {
        let wanted = wants(self.filter.as_ref(), self.cpu, exit, buses);
        self.under_way = !wanted && matches!(exit, Exit::Interrupted);
        if self.under_way {
            return;
        }
        let ((round, answered), halted) = (self.round.answered(), std::mem::take(&mut self.halted));
        if wanted {
            let what = What::new(exit, buses);
            let code = self.culprit.take().and_then(|culprit| culprit(exit)).map(Into::into);
            lock(&self.ring).push(Event { round, halted, answered, what, code }, self.room);
        }
    }
}

impl Record {
    /// Has it tell how long the CPU was halted, by KVM's own count.
    #[must_use]
    pub fn with_halts(mut self, halts: Option<Halts>) -> Self {
        self.halts = halts;
        self
    }
}

impl Drop for Record {
    /// The CPU has been stopped; where it was in the guest, a viewer shall see that.
    fn drop(&mut self) {
        if self.under_way && self.filter.is_none() && self.halts.is_some() {
            let (round, what) = (self.round, What::Other("stopped".into()));
            let event = Event { round, halted: self.halted, answered: round.returned, what, code: None };
            lock(&self.ring).push(event, self.room);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{At, now};
    use super::*;
    use crate::bus::{Builder, Space};

    fn exit(record: &mut Record, value: u8) {
        record.enter();
        record.returned(&mut At(0x1005));
        let exit = Exit::Write { space: Space::Pio, addr: 0x3f8, width: 1, data: &[value] };
        record.leave(&exit, &Builder::default().finish());
    }

    #[test]
    fn what_is_written_is_in_the_trace_event_format() {
        let recording = Recording::new(MEMORY);
        let mut cpus = [0, 1].map(|cpu| recording.of_cpu(cpu, 2, None));
        exit(&mut cpus[0], 1);
        exit(&mut cpus[1], 2);
        cpus[1].halted = Duration::from_millis(2);
        exit(&mut cpus[1], 3);
        let track = recording.of_worker("virtio");
        track.served(("virtio-rng", 3), ("queue", Some(1)), now());
        track.served(("virtio-rng", 3), ("start", None), now());
        let mut text = Vec::new();
        let calls = [("KVM_CREATE_VM".to_owned(), Duration::ZERO, Duration::from_micros(3))];
        let symbols = Symbols::new(vec![(0x1000, 0, "start".into())]);
        assert_eq!(recording.write(&mut text, &calls, &symbols).unwrap(), 0);
        let value: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let events = value["traceEvents"].as_array().unwrap();
        for event in events {
            assert!(event["name"].is_string() && event["pid"].is_u64() && event["tid"].is_u64(), "{event}");
            match event["ph"].as_str().unwrap() {
                "X" => assert!(event["ts"].is_f64() && event["dur"].as_f64().unwrap() >= 0.0, "{event}"),
                "M" => assert!(event["args"]["name"].is_string(), "{event}"),
                other => panic!("{other}"),
            }
        }
        let halted: Vec<_> = events.iter().filter(|e| e["name"] == "halted").collect();
        assert!(halted.len() == 1 && halted[0]["dur"] == 2000.0 && halted[0]["tid"] == 1, "{halted:?}");
        let of = |tid: u64, ph: &str| events.iter().filter(|e| e["tid"] == tid && e["ph"] == ph).count();
        assert_eq!((of(0, "X"), of(1, "X"), of(2, "X"), of(1, "M")), (2, 5, 1, 1));
        let served: Vec<_> = events.iter().filter(|e| e["tid"] == 3).collect();
        assert!(served.len() == 3 && served[0]["args"]["name"] == "virtio", "{served:?}");
        assert!(served[1]["name"] == "virtio-rng" && served[1]["args"] == json!({"device": 3, "woken by": "queue 1"}));
        assert_eq!(served[2]["args"]["woken by"], "start");
        assert!(events.iter().any(|e| e["args"]["pc"] == "0x1005 <start+0x5>"));
    }

    #[test]
    fn a_report_gets_the_last_exits_of_all_cpus_in_order() {
        let recording = Recording::little();
        let mut cpus = [0, 1].map(|cpu| recording.of_cpu(cpu, 2, None));
        for value in 0..100 {
            exit(&mut cpus[usize::from(value % 2)], value);
        }
        let last = recording.last(&Symbols::new(vec![(0x1000, 0, "start".into())])).lines;
        assert_eq!(last.len(), LAST);
        assert_eq!(last[LAST - 1], "cpu1 out 0x03f8 ← 0x63 (1 bytes, no device)  pc 0x1005 <start+0x5>");
        assert!(last[0].starts_with("cpu0 out 0x03f8 ← 0x44 "), "{last:?}");
        assert_eq!(lock(&recording.rings)[0].1.lock().unwrap().events.capacity(), LAST);
    }

    #[test]
    fn a_full_ring_drops_the_oldest_and_counts() {
        let recording = Recording::new(MEMORY);
        let mut record = recording.of_cpu(0, 1, None);
        record.room = Room::of::<Event>(16 * size_of::<Event>());
        for value in 0..100 {
            exit(&mut record, value);
        }
        let mut text = Vec::new();
        let dropped = recording.write(&mut text, &[], &Symbols::default()).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(dropped == 88 && text.contains("\"dropped\":88"), "{dropped}");
        assert!(text.contains("← 0x63 ") && !text.contains("← 0x00 "), "the newest are there");
    }
}
