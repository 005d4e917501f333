//! A kick is never lost, whatever a vCPU is doing when it comes: 10,000 stops of a guest that never exits.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;
#[path = "../examples/parts/mod.rs"]
mod parts;
use std::os::unix::thread::JoinHandleExt;
use std::sync::mpsc::channel;
use std::time::Duration;

use bantam::bus::Builder;
use bantam::host::sys;
use bantam::memory::{Memory, Span};
use bantam::trace::Off;
use bantam::vcpu::{Flag, Stop, run_loop};
use bantam::vm::Vm;

#[test]
fn ten_thousand_stops_lose_no_kick() {
    if !common::kvm() {
        return;
    }
    let memory = Memory::new(&[Span { start: parts::RAM, size: 0x1000 }], false).unwrap();
    memory.write(parts::RAM, parts::SPIN).unwrap();
    let vm = Vm::new(0).unwrap();
    vm.map(&memory).unwrap();
    let mut vcpu = parts::cpu(&vm).unwrap();
    sys::handle_kicks().unwrap();
    let (go, wait) = channel::<std::sync::Arc<Flag>>();
    let (done, stopped) = channel();
    let buses = Builder::default().finish();
    let thread = std::thread::spawn(move || {
        for flag in wait {
            vcpu.adopt(&flag);
            done.send(run_loop(&mut vcpu, &buses, &flag, &mut Off)).unwrap();
            vcpu.release();
        }
    });
    // Seeded: the moments differ within a run and repeat over runs.
    let mut random = 1u64;
    // Where a host has one CPU, each stop waits for the scheduler.
    let stops = if common::host_is_emulated() { 500 } else { 10_000 };
    for stop in 0..stops {
        let flag = Flag::new(None, None);
        go.send(flag.clone()).unwrap();
        // The thread says who it is before it can be kicked.
        while flag.thread().is_none() {
            std::hint::spin_loop();
        }
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        for _ in 0..(random >> 54) {
            std::hint::spin_loop();
        }
        flag.stop();
        sys::kick(thread.as_pthread_t());
        let ended = stopped.recv_timeout(Duration::from_secs(5));
        assert_eq!(ended, Ok(Stop::Asked), "stop {stop} was lost");
    }
    drop(go);
    thread.join().unwrap();
}
