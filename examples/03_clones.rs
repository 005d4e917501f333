//! A machine as a value: it runs for a while, becomes a snapshot, and three clones go on from there, each by itself.
//!
//!     cargo run --example 03_clones
//!
//! The snapshot is opened, and its sums compared, once; a clone shares its RAM with it until it writes to it.

#![allow(clippy::print_stdout)]

mod parts;

use std::sync::atomic::AtomicBool;

use anyhow::Context;
use bantam::config::{Config, Serial, Size};
use bantam::load::{self, Image};
use bantam::machine::{self, End, Life, Machine, Paused, Streams};
use bantam::snapshot::{How, Moment, Snapshot, Taken, Target};
use bantam::trace::Symbols;

/// Lets a machine run until it ends; gives it back.
fn run(machine: Machine<Paused>, config: &Config, streams: &mut Streams) -> anyhow::Result<(Machine<Paused>, End)> {
    let life = Life::new(config, Symbols::default());
    machine.resume(&life, streams)?.wait(&life, streams)
}

fn main() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let serial = |name: &str| Serial::File(folder.path().join(name));

    // A guest prints 12345670123… for twenty exits, and is kept.
    let config = Config { memory: Size(1 << 20), max_exits: Some(20), serial: serial("first"), ..Config::default() };
    let guest = load::identify(Image::from_bytes("counts", parts::COUNTS.to_vec()))?;
    let config = load::settle(&config, &guest)?;
    let mut streams = Streams::open(&config)?;
    let mut machine = machine::build(&config, &streams)?;
    machine.boot(&guest)?;
    let (machine, _) = run(machine, &config, &mut streams)?;
    let target = Target { path: folder.path().join("snapshot"), keep: false, disks: None };
    let taken = Taken::new("counts", config.of_a_snapshot(), machine.save()?)?;
    taken.write(Moment::still(machine.memory()), &target, &AtomicBool::new(false))?;

    // Three others go on behind its last digit.
    let snapshot = Snapshot::open(&target.path, How::default())?;
    for name in ["first", "second", "third", "fourth"] {
        if name != "first" {
            let config = Config { serial: serial(name), ..config.clone() };
            let mut streams = Streams::open(&config)?;
            let clone = Machine::spawn(&snapshot, &config, &streams)?;
            run(clone, &config, &mut streams)?;
        }
        let printed = std::fs::read_to_string(folder.path().join(name)).context("what it printed")?;
        println!("{name:6} {printed}");
    }
    Ok(())
}
