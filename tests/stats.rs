//! Statistics, the control socket, `ps` and `top`, as a person or a script meets them.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::time::Duration;

use common::{File, Run, bantam, file, kvm};
use serde_json::Value;

/// Flat guests need 16-bit code, and ports: a PC's.
const PC: bool = cfg!(target_arch = "x86_64");

/// `mov cx,N; l: out 0x10,al; loop l; hlt`: N exits to a port without a device.
fn outs(count: u16) -> File {
    let [low, high] = count.to_le_bytes();
    file(&[0xb9, low, high, 0xe6, 0x10, 0xe2, 0xfc, 0xf4])
}

/// `l: out 0x10,al; jmp l`.
fn for_ever() -> File {
    file(&[0xe6, 0x10, 0xeb, 0xfc])
}

fn run(guest: &File, words: &str) -> Run {
    bantam("run").arg(guest.path()).words(words)
}

#[test]
fn the_table_counts_what_the_guest_did() {
    if !kvm() || !PC {
        return;
    }
    let outcome = run(&outs(5000), "--stats").run();
    outcome.expect(0).printed("").said("5,001 exits").said("io-out").said("halt").said("address").said("io 0x10");
    outcome.said("KVM_RUN").said("page faults").said("guest and KVM");
    let line = outcome.stderr.lines().find(|l| l.trim_start().starts_with("io-out")).unwrap().to_owned();
    assert!(line.contains("5,000") && line.contains("100.0 %"), "{line}");
}

#[test]
fn a_signal_that_comes_before_the_machine_runs_is_answered_once_it_does() {
    if !kvm() || !PC || !common::have("strace") {
        return;
    }
    let guest = outs(3000);
    let early = |words: &str| {
        // While it opens its guest.
        let fault =
            format!("-f -qq -o /dev/null -P {} -e inject=open,openat:signal=USR1:when=1", guest.path().display());
        let words = format!("{fault} {} run {} {words}", common::program().display(), guest.path().display());
        Run::of("strace".as_ref(), words.split_whitespace().map(Into::into)).run()
    };
    let told = early("--stats");
    assert_eq!(told.expect(0).stderr.matches("statistics after").count(), 2, "{}", told.stderr);
    // Without statistics nobody has asked for an answer.
    early("").expect(138);
}

#[test]
fn a_named_file_gets_json_and_stderr_nothing() {
    if !kvm() || !PC {
        return;
    }
    let to = tempfile::NamedTempFile::new().unwrap();
    run(&outs(300), &format!("--stats={}", to.path().display())).run().expect(0).never_said("statistics");
    let json: Value = serde_json::from_slice(&std::fs::read(to.path()).unwrap()).unwrap();
    assert_eq!(json["exits"]["total"], 301);
    let row = &json["exits"]["by"][0];
    assert_eq!(
        (&row["reason"], &row["device"], &row["vcpu"], &row["count"]),
        (&"io-out".into(), &Value::Null, &0.into(), &300.into())
    );
    let latency = |name: &str| row["latency_ns"][name].as_u64().unwrap();
    assert!(latency("p50") > 0 && latency("p50") <= latency("p90") && latency("p99") <= latency("max"), "{row}");
    assert!(json["time"]["cpus"][0]["guest_and_kvm_ns"].as_u64().unwrap() > 0, "{json}");
    assert!(
        json["memory"]["rss_kib"].as_u64().unwrap() > 0 && json["ioctls"]["kvm_run"].as_u64().unwrap() >= 301,
        "{json}"
    );
}

#[test]
fn sigusr1_and_the_interval_tell_while_the_guest_runs() {
    if !kvm() || !PC {
        return;
    }
    let guest = for_ever();
    let running = run(&guest, "--stats --timeout 1").start();
    std::thread::sleep(Duration::from_millis(400));
    running.signal("USR1");
    let outcome = running.wait();
    assert_eq!(outcome.expect(124).stderr.matches("bantam: statistics after").count(), 2, "{}", outcome.stderr);
    let outcome = run(&guest, "--stats-interval 0.3 --timeout 1").run();
    assert_eq!(outcome.expect(124).stderr.matches("bantam: statistics after").count(), 4, "{}", outcome.stderr);
    // Without statistics the signal still means what it always means.
    let running = run(&guest, "--timeout 5").start();
    std::thread::sleep(Duration::from_millis(200));
    running.signal("USR1");
    running.wait().expect(138);
}

#[test]
fn every_cpu_and_every_life_is_counted() {
    if !kvm() || !PC {
        return;
    }
    let to = tempfile::NamedTempFile::new().unwrap();
    let json = || serde_json::from_slice::<Value>(&std::fs::read(to.path()).unwrap()).unwrap();
    let words = format!("--stats={}", to.path().display());
    bantam("example smp").words(&words).run().expect(0);
    let cpus = json()["time"]["cpus"].as_array().unwrap().len();
    assert_eq!(cpus, 4);
    // mov al,0xfe; out 0x64,al: a reset.
    run(&file(&[0xb0, 0xfe, 0xe6, 0x64]), &format!("{words} --reboot --max-exits 5")).run().expect(124);
    assert_eq!(json()["exits"]["total"], 5);
    assert_eq!(json()["exits"]["by"][0]["device"], "i8042");
}

#[test]
fn statistics_that_could_not_be_told_are_refused_at_once() {
    let guest = outs(1);
    run(&guest, "--stats=/nowhere/x").run().refused(125).said("/nowhere/x");
    run(&guest, "--stats --stats-interval 0").run().refused(2).said("--stats-interval");
    run(&guest, "--stats-interval x").run().refused(2);
}

#[test]
fn a_trace_for_a_viewer_keeps_no_more_than_it_may() {
    if !kvm() || !PC {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.json");
    let words = format!("--trace-memory 1M --trace={}", path.display());
    run(&outs(9000), &words).run().expect(0).said("the trace is full: its oldest");
    let trace: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let kept = trace["traceEvents"].as_array().unwrap().iter().filter(|event| event["ph"] == "X").count();
    let dropped = trace["otherData"]["dropped"].as_u64().unwrap();
    assert!(dropped > 1000 && (1000..14_000).contains(&kept), "{kept} kept, {dropped} dropped");
}
