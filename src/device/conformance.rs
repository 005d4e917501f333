//! One suite that every device runs (DESIGN rule 18). A new device adds one line to the list below.
//!
//! Invariant: the suite knows devices only as [`Device`]; what is special about one is tested beside it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};

use super::cmos::Cmos;
use super::debug_console::DebugConsole;
use super::debug_exit::DebugExit;
use super::i8042::I8042;
use super::ioapic::IoApic;
use super::pl011::Pl011;
use super::pl031::Pl031;
use super::pl061::Pl061;
use super::power::{Button, Power};
use super::power_off::PowerOff;
use super::pvpanic::PvPanic;
use super::serial::Serial;
use crate::bus::{Builder, Device, Effect, Saved, Space};
use crate::clock::Clock;
use crate::console::{Console, TestConsole};
use crate::irq::{IrqLine, TestWire};
use crate::memory::Span;

/// A module of tests for one device, so that a failure names the device and the property.
macro_rules! conform {
    ($device:ident, $size:expr, $make:expr) => {
        mod $device {
            use super::*;

            #[test]
            fn what_is_saved_and_loaded_is_the_same() {
                saved_and_loaded_is_the_same(&Shape::from($size), $make);
            }

            #[test]
            fn a_loaded_device_goes_on_like_the_saved_one() {
                loaded_goes_on_like_saved(&Shape::from($size), $make);
            }

            #[test]
            fn a_reset_device_is_a_fresh_one() {
                reset_is_fresh(&Shape::from($size), $make);
            }

            #[test]
            fn no_access_through_the_buses_panics() {
                no_access_panics(&Shape::from($size), $make);
            }

            #[test]
            fn a_hostile_state_is_refused_whole_or_harmless() {
                hostile_state_is_harmless(&Shape::from($size), $make);
            }

            #[test]
            fn another_version_is_refused() {
                super::another_version_is_refused($make);
            }

            #[test]
            fn every_register_has_a_name() {
                super::every_register_has_a_name(&Shape::from($size), $make);
            }
        }
    };
}

mod virtio;

/// Where a device answers, and what a driver of it does, so that what happens to it means something.
struct Shape {
    /// Offset and bytes of each piece.
    areas: Vec<(u64, u64)>,
    /// Things that are done one after the other.
    scripts: Vec<Vec<Step>>,
}

impl From<u64> for Shape {
    fn from(size: u64) -> Self {
        Self { areas: vec![(0, size)], scripts: Vec::new() }
    }
}

// Name of the test, bytes that the device answers at, the device on its wires.
conform!(serial, 8, |w: &Wires| Serial::new(w.console(), w.line()));
conform!(cmos, 2, |w: &Wires| Cmos::new(w.clock(), &[Span { start: 0, size: 64 << 20 }]));
conform!(i8042, 5, |_: &Wires| I8042::default());
conform!(debug_exit, 4, |_: &Wires| DebugExit);
conform!(debug_console, 1, |w: &Wires| DebugConsole::new(w.console()));
conform!(acpi_power, 5, |w: &Wires| Power::new(Button::default(), w.line()));
conform!(ioapic, 0x20, |_: &Wires| IoApic::new(Box::new(super::super::ioapic::tests::Sent::default())));
conform!(pvpanic, 1, |_: &Wires| PvPanic);
conform!(power_off, 2, |_: &Wires| PowerOff::default());
// Of their 4 KiB those that hold registers, so that most accesses meet one.
conform!(pl011, 0x4c, |w: &Wires| Pl011::new(w.console(), w.line()));
conform!(pl031, 0x20, |w: &Wires| Pl031::new(w.clock()));
// Most of its registers are the data of some lines or others.
conform!(pl061, 0x424, |w: &Wires| Pl061::new(w.line(), Button::default()));

/// The far ends of all wires that a device may be given.
#[derive(Default)]
struct Wires {
    console: TestConsole,
    line: Arc<TestWire>,
    /// Milliseconds since 1970.
    time: Arc<AtomicU64>,
    /// What only virtio devices need.
    guest: OnceLock<virtio::Guest>,
}

struct TestClock(Arc<AtomicU64>);

impl Clock for TestClock {
    fn now(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::SeqCst))
    }
}

impl Wires {
    fn new(closed: bool) -> Self {
        Self { console: TestConsole { closed, ..TestConsole::default() }, ..Self::default() }
    }

    fn console(&self) -> Box<dyn Console> {
        Box::new(self.console.clone())
    }

    fn line(&self) -> Box<dyn IrqLine> {
        Box::new(self.line.clone())
    }

    fn clock(&self) -> Box<dyn Clock> {
        Box::new(TestClock(self.time.clone()))
    }

    /// Wires of their own that are in the same state, but for what the device has already done to them.
    fn twin(&self) -> Self {
        let input = self.console.input.lock().unwrap().clone();
        let console = TestConsole { input: Arc::new(Mutex::new(input)), ..Self::new(self.console.closed).console };
        let guest = self.guest.get().map(|guest| OnceLock::from(guest.twin())).unwrap_or_default();
        Self { console, line: Arc::default(), time: Arc::new(self.time.load(Ordering::SeqCst).into()), guest }
    }
}

/// Something that happens to a device.
#[derive(Debug, Clone)]
enum Step {
    Read { offset: u64, width: usize },
    Write { offset: u64, width: usize, value: u64 },
    Input(Vec<u8>),
    Service,
    Wait(u64),
}

/// Everything that a guest and a host can tell of what a device did.
#[derive(Debug, PartialEq)]
struct Seen {
    answers: Vec<u64>,
    effects: Vec<Effect>,
    output: Vec<u8>,
    pulses: u64,
    level: bool,
}

/// Whole accesses of 1, 2, 4 or 8 bytes, none wider than the device takes, none across its end.
fn accesses(shape: &Shape, widest: usize) -> impl Strategy<Value = (u64, usize)> + use<> {
    let all = shape.areas.iter().flat_map(|(start, size)| (*start..start + size).map(move |at| (at, start + size)));
    let fits = all.flat_map(|(at, end)| [1, 2, 4, 8].map(|width| (at, width, end)));
    let fits = fits.filter(|(at, width, end)| *width <= widest && at + *width as u64 <= *end);
    prop::sample::select(fits.map(|(at, width, _)| (at, width)).collect::<Vec<_>>())
}

fn steps(shape: &Shape, widest: usize) -> impl Strategy<Value = Vec<Step>> + use<> {
    let value = prop_oneof![any::<u64>(), 0..0x100u64, prop::sample::select(vec![0, 1, 0x80, 0xff, u64::MAX])];
    let step = prop_oneof![
        4 => accesses(shape, widest).prop_map(|(offset, width)| Step::Read { offset, width }),
        8 => (accesses(shape, widest), value).prop_map(|((offset, width), value)| {
            Step::Write { offset, width, value: value & (u64::MAX >> (64 - 8 * width)) }
        }),
        1 => vec(any::<u8>(), 1..20).prop_map(Step::Input),
        1 => Just(Step::Service),
        1 => (0..100_000_000_000u64).prop_map(Step::Wait),
    ];
    let scripts = [shape.scripts.clone(), vec![Vec::new()]].concat();
    let often = shape.scripts.len().min(2) as u32;
    let some = prop_oneof![
        8 => step.prop_map(|step| vec![step]),
        often + 1 => prop::sample::select(scripts),
    ];
    vec(some, 0..60).prop_map(|steps| steps.concat())
}

fn play(device: &mut dyn Device, wires: &Wires, steps: &[Step]) -> Seen {
    let (start, written) = (wires.line.pulses(), wires.console.output.lock().unwrap().len());
    let (mut answers, mut effects) = (Vec::new(), Vec::new());
    for step in steps {
        match step {
            Step::Read { offset, width } => answers.push(device.read(*offset, *width)),
            Step::Write { offset, width, value } => effects.push(device.write(*offset, *width, *value)),
            Step::Input(bytes) => {
                wires.console.input.lock().unwrap().extend(bytes);
                device.service();
            }
            Step::Service => {
                device.service();
                wires.guest.get().into_iter().for_each(virtio::Guest::turn);
            }
            Step::Wait(millis) => {
                wires.time.fetch_add(*millis, Ordering::SeqCst);
            }
        }
    }
    let output = wires.console.output.lock().unwrap()[written..].to_vec();
    Seen { answers, effects, output, pulses: wires.line.pulses() - start, level: wires.line.level() }
}

fn check<S: Strategy>(strategy: &S, property: impl Fn(S::Value)) {
    let config = Config { failure_persistence: None, ..Config::default() };
    let test = |value| {
        property(value);
        Ok(())
    };
    TestRunner::new(config).run(strategy, test).unwrap_or_else(|failure| panic!("{failure}"));
}

/// A history of a device: whether its far end has hung up, and what happened to it.
fn history<D: Device>(shape: &Shape, make: impl Fn(&Wires) -> D) -> impl Strategy<Value = (bool, Vec<Step>)> {
    (any::<bool>(), steps(shape, make(&Wires::default()).width()))
}

fn saved_and_loaded_is_the_same<D: Device>(shape: &Shape, make: impl Fn(&Wires) -> D) {
    check(&history(shape, &make), |(closed, steps)| {
        let wires = Wires::new(closed);
        let mut device = make(&wires);
        play(&mut device, &wires, &steps);
        let saved = device.save();
        assert_eq!(device.save(), saved, "saving changes the device");
        let text = serde_json::to_string(&saved).unwrap();
        let mut other = make(&wires.twin());
        other.load(&serde_json::from_str(&text).unwrap()).unwrap();
        assert_eq!(other.save(), saved);
        device.load(&saved).unwrap();
        assert_eq!(device.save(), saved);
    });
}

fn loaded_goes_on_like_saved<D: Device>(shape: &Shape, make: impl Fn(&Wires) -> D) {
    let later = steps(shape, make(&Wires::default()).width());
    check(&(history(shape, &make), later), |((closed, before), after)| {
        let wires = Wires::new(closed);
        let mut device = make(&wires);
        play(&mut device, &wires, &before);
        let twins = wires.twin();
        let mut twin = make(&twins);
        twin.load(&device.save()).unwrap();
        assert_eq!(play(&mut twin, &twins, &after), play(&mut device, &wires, &after));
        assert_eq!(twin.save(), device.save());
    });
}

fn reset_is_fresh<D: Device>(shape: &Shape, make: impl Fn(&Wires) -> D) {
    let later = steps(shape, make(&Wires::default()).width());
    check(&(history(shape, &make), later), |((closed, before), after)| {
        let wires = Wires::new(closed);
        let mut device = make(&wires);
        play(&mut device, &wires, &before);
        device.reset();
        let twins = wires.twin();
        let mut fresh = make(&twins);
        assert_eq!(device.save(), fresh.save());
        assert_eq!(play(&mut device, &wires, &after), play(&mut fresh, &twins, &after));
    });
}

fn no_access_panics<D: Device + 'static>(shape: &Shape, make: impl Fn(&Wires) -> D) {
    let space = prop::sample::select(vec![Space::Pio, Space::Mmio]);
    // Any width and length, wide ones and odd ones, from before the device to past its end.
    let size: u64 = shape.areas.iter().map(|(_, size)| size).sum();
    let access = (space, 0xf0..0x110 + size, 0..17usize, vec(any::<u8>(), 0..40), any::<bool>());
    check(&vec(access, 0..60), |accesses| {
        let wires = Wires::default();
        let mut builder = Builder::default();
        for space in [Space::Pio, Space::Mmio] {
            let (device, mut start) = (builder.add(make(&wires)), 0x100);
            for (offset, size) in &shape.areas {
                builder.attach(device, space, Span { start, size: *size }, *offset).unwrap();
                start += size;
            }
        }
        let buses = builder.finish();
        for (space, addr, width, mut data, write) in accesses {
            if write {
                buses.write(space, addr, width, &data);
            } else {
                buses.read(space, addr, width, &mut data);
            }
        }
    });
}

/// A value that does not belong where it is put.
fn intruder() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (0..300u64).prop_map(Value::from),
        (-10..10i64).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
        vec(any::<u8>(), 0..300).prop_map(Value::from),
        Just(json!({})),
        Just(json!({ "unknown": 1 })),
        Just(json!([[[[]]]])),
    ]
}

/// Puts `intruder` at the place that `way` leads to: at each level it says where to go, and its end how deep.
fn invade(value: &mut Value, way: &[usize], intruder: Value) {
    let inner: Vec<&mut Value> = match value {
        Value::Array(items) => items.iter_mut().collect(),
        Value::Object(fields) => fields.values_mut().collect(),
        _ => Vec::new(),
    };
    let count = inner.len().max(1);
    match (way, inner.into_iter().nth(way.first().map_or(0, |i| i % count))) {
        ([_, rest @ ..], Some(next)) => invade(next, rest, intruder),
        _ => *value = intruder,
    }
}

/// A state with one field too many or too few.
fn misshape(state: &mut Value, which: usize) {
    if let Value::Object(fields) = state {
        let name = fields.keys().nth(which % (fields.len() + 1)).cloned();
        match name {
            Some(name) => fields.remove(&name),
            None => fields.insert("unknown".to_owned(), json!(0)),
        };
    }
}

fn hostile_state_is_harmless<D: Device>(shape: &Shape, make: impl Fn(&Wires) -> D) {
    let later = steps(shape, make(&Wires::default()).width());
    let attack = (vec(any::<usize>(), 0..3), intruder(), proptest::option::of(any::<usize>()));
    check(&(history(shape, &make), attack, later), |((closed, before), (way, intruder, missing), after)| {
        let wires = Wires::new(closed);
        let mut device = make(&wires);
        play(&mut device, &wires, &before);
        let mut hostile = device.save();
        match missing {
            Some(which) => misshape(&mut hostile.state, which),
            None => invade(&mut hostile.state, &way, intruder),
        }
        let wires = Wires::new(closed);
        let mut victim = make(&wires);
        let whole = victim.save();
        match victim.load(&hostile) {
            Err(_) => assert_eq!(victim.save(), whole, "a refused state left something behind"),
            Ok(()) => assert_eq!(victim.save(), hostile, "a state was taken in part"),
        }
        play(&mut victim, &wires, &after);
        make(&wires.twin()).load(&victim.save()).unwrap();
    });
}

fn another_version_is_refused<D: Device>(make: impl Fn(&Wires) -> D) {
    let mut device = make(&Wires::default());
    let saved = device.save();
    for version in [0, saved.version.wrapping_add(1), u32::MAX] {
        let other = Saved { version, ..saved.clone() };
        let error = device.load(&other).unwrap_err().to_string();
        assert!(error.starts_with(device.name()) && error.contains(&format!("version {version}")), "{error}");
    }
}

fn every_register_has_a_name<D: Device>(shape: &Shape, make: impl Fn(&Wires) -> D) {
    let device = make(&Wires::default());
    assert!(!device.name().is_empty());
    assert!([1, 2, 4, 8].contains(&device.width()));
    let ends = shape.areas.iter().map(|(start, size)| start + size);
    let inside = shape.areas.iter().flat_map(|(start, size)| *start..start + size);
    for offset in inside.chain(ends).chain([u64::MAX]) {
        for write in [false, true] {
            assert!(!device.register(offset, write).is_empty(), "{offset} {write}");
        }
    }
}
