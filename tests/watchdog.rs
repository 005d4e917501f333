//! `--watchdog` tells of CPUs that stall, of no others, and lets them go on.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;
use common::{Outcome, arch, kvm, run_bytes, within};

/// A built-in guest, with its own words or without.
fn run(name: &str, own: bool, words: &str) -> Outcome {
    let guest = guests::find(name).unwrap();
    let own = if own { guest.words.join(" ") } else { String::new() };
    run_bytes((guest.image)(), &format!("{own} {words}"))
}

fn stalls(outcome: &Outcome, cpu: u32) -> usize {
    outcome.stderr.matches(&format!("--watchdog: vCPU {cpu} is stalled")).count()
}

/// A span that a slow host keeps, and the time that all is over in.
fn words() -> String {
    format!("--watchdog {} --timeout {}", within(0.4).as_secs_f64(), within(2.0).as_secs_f64())
}

#[test]
fn a_cpu_that_spins_is_told_once_and_goes_on() {
    if !kvm() {
        return;
    }
    for name in arch::SPINNERS.iter().filter(|name| !name.starts_with("smp")) {
        let outcome = run(name, true, &words());
        assert_eq!(stalls(&outcome, 0), 1, "{name}: {}", outcome.stderr);
        outcome.expect(124).said("no exit and no progress for").said("the machine is stopped for this report");
        outcome.said(arch::PC).said("page walk of");
    }
}

#[test]
fn of_several_cpus_each_that_spins_is_told() {
    if !kvm() {
        return;
    }
    let outcome = run("smp-spin", true, &words());
    let told = outcome.stderr.matches("is stalled").count();
    assert!((1..=4).contains(&told), "{}", outcome.stderr);
    outcome.expect(124).said("\nvCPU 0: ").said("\nvCPU 3: ");
}

#[test]
fn a_cpu_that_makes_exits_or_sleeps_has_not_stalled() {
    if !kvm() {
        return;
    }
    for (name, more) in [("counter", ""), ("halt-if-on", "--irqchip kernel"), ("timer", "--irqchip kernel")] {
        let outcome = run(name, false, &format!("{more} {}", words()));
        assert!(!outcome.stderr.contains("stalled"), "{name}: {}", outcome.stderr);
    }
}

#[test]
fn a_span_of_nothing_is_refused() {
    for span in ["0", "0.1", "x", "-1"] {
        common::bantam("example add").words(&format!("--watchdog {span}")).run().refused(2).said("--watchdog");
    }
}
