//! Measures Bantam as a library, in this process: allocations of an exit and the time of `dispatch`.
//!
//! `cargo xtask bench` runs it and reads what it prints: `allocations-none N`, `allocations-serial N` and lines
//! `dispatch WHAT MIN / P50 / P99`. What cannot be measured is left out and said on stderr.

// Printing is what this tool is for.
#![allow(clippy::print_stdout, clippy::print_stderr)]

#[path = "../guest.rs"]
mod guest;

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Result, ensure};
use bantam::bus::{Buses, Exit, Space};
use bantam::config::{Addr, Config, IrqChip, Serial, Size};
use bantam::load::{self, Image};
use bantam::machine::{self, Streams};
use bantam::vcpu;

/// The system's allocator, counted.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes to the system's allocator as it is.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `realloc`.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn main() {
    for (key, port) in [("allocations-none", guest::NO_DEVICE), ("allocations-serial", guest::SERIAL)] {
        match allocations(port) {
            Ok(count) => println!("{key} {count}"),
            Err(error) => eprintln!("inside: {key}: {error:#}"),
        }
    }
    match full_buses() {
        Ok(buses) => dispatch(&buses),
        Err(error) => eprintln!("inside: dispatch: {error:#}"),
    }
}

/// The machine that runs flat real-mode code as the floor does; its serial port writes to /dev/null.
fn config() -> Config {
    Config {
        memory: Size(4096),
        ram_base: Some(Addr(guest::AT)),
        serial: Serial::File("/dev/null".into()),
        ..Config::default()
    }
}

/// Builds a machine in this process, runs the flat real-mode `code` (loaded and entered at `guest::AT`) to its HLT, and
/// drops it.
fn run_machine(code: &[u8]) -> Result<()> {
    let guest = load::identify(Image::from_bytes("bench", code.to_vec()))?;
    let ended = machine::run(&load::settle(&config(), &guest)?, &guest)?;
    ensure!(ended.end.status() == 0, "{:?}", ended.end);
    Ok(())
}

/// The buses of a default machine, with all of its devices.
fn full_buses() -> Result<Arc<Buses>> {
    let config = Config { irqchip: Some(IrqChip::None), ..config() };
    let machine = machine::build(&config, &Streams::open(&config)?)?;
    Ok(machine.buses().clone())
}

/// Allocations of one exit: those of a run with many exits less those of a run with few.
fn allocations(port: u16) -> Result<f64> {
    let run = |exits| -> Result<u64> {
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        run_machine(&guest::outs(port, exits))?;
        Ok(ALLOCATIONS.load(Ordering::Relaxed) - before)
    };
    let (few, many) = (guest::EXITS / 100, guest::EXITS);
    run(few)?;
    let (least, most) = (run(few)?, run(many)?);
    Ok((most as f64 - least as f64) / f64::from(many - few))
}

/// Times synthetic exits, a thousand at a time, and prints one line for each kind.
fn dispatch(buses: &Buses) {
    let read = [
        ("in, 16550 LSR", Space::Pio, 0x3fd, 1),
        ("in, no device", Space::Pio, 0x10, 1),
        ("read, no device", Space::Mmio, 0xd000_0000, 4),
    ];
    let write = [("out, 16550 THR", Space::Pio, 0x3f8, 1), ("out, no device", Space::Pio, 0x10, 2)];
    let mut bytes = [0; 8];
    for (name, space, addr, width) in read {
        let data = bytes.get_mut(..width).unwrap_or_default();
        time(name, || _ = black_box(vcpu::dispatch(black_box(&mut Exit::Read { space, addr, width, data }), buses)));
    }
    for (name, space, addr, width) in write {
        let data = bytes.get(..width).unwrap_or_default();
        time(name, || _ = black_box(vcpu::dispatch(black_box(&mut Exit::Write { space, addr, width, data }), buses)));
    }
}

fn time(name: &str, mut exit: impl FnMut()) {
    const BATCH: u32 = 1000;
    let mut times: Vec<f64> = (0..BATCH)
        .map(|_| {
            let start = Instant::now();
            (0..BATCH).for_each(|_| exit());
            start.elapsed().as_nanos() as f64 / f64::from(BATCH)
        })
        .collect();
    times.sort_by(f64::total_cmp);
    let at = |share: usize| times.get(times.len() * share / 100).copied().unwrap_or(f64::NAN);
    println!("dispatch {name} {:.1} / {:.1} / {:.1}", at(0), at(50), at(99));
}
