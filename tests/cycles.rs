//! Clones come and go, and nothing is left of them. Alone in its process, since it counts what the process has.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use bantam::config::{Config, Serial};
use bantam::machine::{Machine, Streams};
use bantam::snapshot::{How, Snapshot};
use common::arch::PCI;
use common::counting::counts;
use common::kvm;
use common::place::Place;

/// Descriptors, threads, mappings, and KiB of memory of this process.
fn held() -> [usize; 4] {
    let count = |folder: &str| std::fs::read_dir(format!("/proc/self/{folder}")).unwrap().count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let memory = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok());
    [count("fd"), count("task"), maps, memory.unwrap()]
}

#[test]
fn clones_come_and_go_and_nothing_is_left_of_them() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), counts());
    let folder = place.kept(&guest, PCI);
    let snapshot = Snapshot::open(&folder, How::default()).unwrap();
    let config = Config { serial: Serial::None, ..snapshot.manifest.config.clone() };
    let cycle = || {
        let streams = Streams::open(&config).unwrap();
        drop(Machine::spawn(&snapshot, &config, &streams).unwrap());
    };
    (0..20).for_each(|_| cycle());
    let before = held();
    let (_, count) = common::soak().unwrap_or((0, if common::host_is_emulated() { 20 } else { 300 }));
    (0..count).for_each(|_| cycle());
    let after = held();
    // The allocator keeps a little of its own.
    let slack = [0, 0, 4, 1024];
    let grown = before.iter().zip(&after).zip(slack).any(|((before, after), slack)| after > &(before + slack));
    assert!(!grown, "descriptors, threads, mappings, KiB after {count}: {before:?}, then {after:?}");
}
