//! Measures virtio devices in this process, with a driver of its own: no guest, no KVM.
//!
//! `cargo xtask bench io` runs it and reads what it prints. `io time ROUNDS REQUESTS FOLDER`: lines `time WHAT SIDE NS`, of
//! one request, the sides in turns. `io count WHAT REQUESTS FOLDER`: the device on its thread; lines `KEY VALUE`.

// Printing is what this tool is for.
#![allow(clippy::print_stdout, clippy::print_stderr)]

#[path = "../../allocations.rs"]
mod allocations;
mod block;
mod driver;
mod net;
mod stage;
mod vsock;

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use allocations::allocations;
use stage::Stage;

/// A device with its driver.
pub trait Subject {
    /// Makes so many requests, and waits for all of them.
    fn run(&mut self, requests: u64) -> Result<()>;
    /// Where it is at work.
    fn stage(&self) -> &Stage;
}

/// What is measured.
const ALL: [&str; 5] = ["block-read", "net-out", "net-in", "vsock-out", "vsock-in"];

fn subject(what: &str, folder: &Path, thread: bool) -> Result<Box<dyn Subject>> {
    let socket = folder.join(format!("{what}.{}", u8::from(thread)));
    let out = what.ends_with("out");
    Ok(match what.split_once('-') {
        Some(("block", _)) => Box::new(block::Disk::new(&folder.join("io.img"), thread)?),
        Some(("net", _)) => Box::new(net::Card::new(&socket, out, thread)?),
        Some(("vsock", _)) => Box::new(vsock::Sockets::new(&socket, out, thread)?),
        _ => bail!("{what} is not measured"),
    })
}

type Run = Box<dyn FnMut(u64) -> Result<()>>;

fn floor(what: &str, folder: &Path) -> Result<Run> {
    let out = what.ends_with("out");
    let mut floor = match what.split_once('-') {
        Some(("block", _)) => {
            let mut floor = block::Floor::new(&folder.join("io.img"))?;
            return Ok(Box::new(move |requests| floor.run(requests)));
        }
        Some(("net", _)) => net::Floor::net(out)?,
        _ => vsock::Sockets::floor(out)?,
    };
    Ok(Box::new(move |requests| floor.run(requests)))
}

/// Times all sides of all that is measured, in turns; the first turn warms caches.
fn time(rounds: u64, requests: u64, folder: &Path) -> Result<()> {
    for what in ALL {
        let device = |thread| -> Result<Run> {
            let mut subject = subject(what, folder, thread)?;
            Ok(Box::new(move |requests| subject.run(requests)))
        };
        let mut sides = [("floor", floor(what, folder)?), ("alone", device(false)?), ("thread", device(true)?)];
        for round in 0..=rounds {
            for (side, run) in &mut sides {
                let start = Instant::now();
                run(requests).with_context(|| format!("{what}, {side}"))?;
                let time = start.elapsed().as_nanos() as f64 / requests as f64;
                if round > 0 {
                    println!("time {what} {side} {time:.1}");
                }
            }
        }
    }
    Ok(())
}

/// Counts what a device on its thread does for so many requests.
fn count(what: &str, requests: u64, folder: &Path) -> Result<()> {
    let mut subject = subject(what, folder, true)?;
    // Buffers grow to what they need.
    subject.run(1000)?;
    let now = |subject: &dyn Subject| {
        let stage = subject.stage();
        [stage.kicks, stage.interrupts(), stage.calls, allocations()]
    };
    let mut before = now(&*subject);
    // Its own system calls count from the start, as those of others do who look from outside.
    let [_, _, own, _] = &mut before;
    *own = 0;
    subject.run(requests)?;
    let after = now(&*subject);
    for (key, (after, before)) in ["kicks", "interrupts", "own", "allocations"].iter().zip(after.iter().zip(before)) {
        println!("{key} {}", after - before);
    }
    Ok(())
}

fn main() -> Result<()> {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["time", rounds, requests, folder] => {
            let folder = Path::new(folder);
            block::make(&folder.join("io.img"))?;
            time(rounds.parse()?, requests.parse()?, folder)
        }
        ["count", what, requests, folder] => {
            let folder = Path::new(folder);
            block::make(&folder.join("io.img"))?;
            count(what, requests.parse()?, folder)
        }
        _ => bail!("io time ROUNDS REQUESTS FOLDER, or io count WHAT REQUESTS FOLDER"),
    }
}
