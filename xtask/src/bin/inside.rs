//! Measures Bantam as a library, in this process: allocations of an exit and the time of `dispatch`.
//!
//! `cargo xtask bench` runs it (`inside [EXITS]`) and reads what it prints: `allocations-none N`, `allocations-serial N` and lines
//! `dispatch WHAT MIN / P50 / P99`. What cannot be measured is left out and said on stderr.

// Printing is what this tool is for.
#![allow(clippy::print_stdout, clippy::print_stderr)]

#[path = "../allocations.rs"]
mod counted;
#[path = "../guest/mod.rs"]
mod guest;

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use bantam::bus::{Buses, Exit, Space};
use bantam::config::{Addr, Config, IrqChip, Serial, Size};
use bantam::load::{self, Image};
use bantam::machine::{self, Streams};
use bantam::vcpu;

fn main() {
    let exits = std::env::args().nth(1).and_then(|word| word.parse().ok()).unwrap_or(guest::EXITS);
    for (key, address) in [("allocations-none", guest::NO_DEVICE), ("allocations-serial", guest::SERIAL)] {
        match allocations(address, exits) {
            Ok(count) => println!("{key} {count}"),
            Err(error) => eprintln!("inside: {key}: {error:#}"),
        }
    }
    match full_buses() {
        Ok(buses) => dispatch(&buses),
        Err(error) => eprintln!("inside: dispatch: {error:#}"),
    }
}

/// The machine that runs flat code as the floor does; its serial port writes to /dev/null.
fn config() -> Config {
    Config {
        memory: Size(4096),
        ram_base: Some(Addr(guest::AT)),
        irqchip: Some(IrqChip::None),
        serial: Serial::File("/dev/null".into()),
        ..Config::default()
    }
}

/// Builds a machine in this process, runs the flat `code` (loaded and entered at `guest::AT`) to its end, and drops it.
fn run_machine(code: &[u8]) -> Result<()> {
    let guest = load::identify(Image::from_bytes("bench", code.to_vec()))?;
    let ended = machine::run(&load::settle(&config(), &guest)?, &guest)?;
    ensure!(ended.end.status() == 0, "{:?}", ended.end);
    Ok(())
}

/// The buses of a default machine, with all of its devices.
fn full_buses() -> Result<Arc<Buses>> {
    let config = config();
    let machine = machine::build(&config, &Streams::open(&config)?)?;
    Ok(machine.buses().clone())
}

/// Allocations of one exit: those of a run with many exits less those of a run with few.
fn allocations(address: u64, many: u32) -> Result<f64> {
    let run = |exits| -> Result<u64> {
        let before = counted::allocations();
        run_machine(&guest::outs(address, exits))?;
        Ok(counted::allocations() - before)
    };
    // Long enough for what a machine does once, after some time: its control socket.
    let few = many / 2;
    run(few)?;
    let (least, most) = (run(few)?, run(many)?);
    Ok((most as f64 - least as f64) / f64::from(many - few))
}

/// Times synthetic exits, a thousand at a time, and prints one line for each kind.
fn dispatch(buses: &Buses) {
    let mut bytes = [0; 8];
    let space = |port| if port { Space::Pio } else { Space::Mmio };
    for (name, port, addr, width) in guest::READS {
        let space = space(port);
        let data = bytes.get_mut(..width).unwrap_or_default();
        time(name, || _ = black_box(vcpu::dispatch(black_box(&mut Exit::Read { space, addr, width, data }), buses)));
    }
    for (name, port, addr, width) in guest::WRITES {
        let space = space(port);
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
