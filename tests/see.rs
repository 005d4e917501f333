//! What `--explain` and `--trace` show of a machine. (Statistics: tests/stats.rs; the post-mortem: tests/crash.rs.)

#![allow(clippy::unwrap_used, missing_docs)]

mod common;
use common::{arch, bantam, kvm};

#[test]
fn explain_tells_the_life_of_a_machine_in_order() {
    if !kvm() {
        return;
    }
    let outcome = bantam("example add --explain").run();
    let text = &outcome.expect(0).printed("4\n").stderr;
    let mut from = 0;
    for call in [
        "open /dev/kvm",
        "KVM_GET_API_VERSION → 12",
        "KVM_CREATE_VM",
        "KVM_SET_USER_MEMORY_REGION slot 0, guest_phys_addr",
        "KVM_CREATE_VCPU id 0",
        "mmap kvm_run",
        arch::REGISTERS_TOLD,
        "KVM_RUN of vCPU 0",
        arch::ADD_TRACE[0],
        "close of the machine",
        "munmap, close of RAM",
    ] {
        let at = text[from..].find(call).unwrap_or_else(|| panic!("{call} is not told, or too early:\n{text}"));
        from += at + call.len();
    }
    // The lines are numbered without a gap, and each number stands once.
    let numbers: Vec<u32> = text.lines().filter_map(|l| l.strip_prefix('[')?.split_once(']')?.0.parse().ok()).collect();
    assert_eq!(numbers, (1..=u32::try_from(numbers.len()).unwrap()).collect::<Vec<_>>());
}

#[test]
fn explain_in_json_is_one_object_a_line() {
    if !kvm() {
        return;
    }
    let outcome = bantam("example add --explain=json").run();
    let steps: Vec<serde_json::Value> =
        outcome.expect(0).stderr.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for (at, step) in steps.iter().enumerate() {
        assert_eq!(step["number"], at + 1, "{step}");
        assert!(step["call"].is_string() && step["result"].is_string(), "{step}");
    }
    assert!(steps.iter().any(|step| step["call"] == "KVM_CREATE_VM" && step["nanoseconds"].is_u64()));
}

#[test]
fn a_trace_names_the_instruction_and_keeps_what_the_filter_wants() {
    if !kvm() {
        return;
    }
    let outcome = bantam("example add --trace --trace-insn").run();
    let first = outcome.expect(0).stderr.lines().next().unwrap();
    // The program counter is past the instruction or at it, as the host has it.
    assert!(first.contains(", pc 0x") && first.ends_with(&format!(": {}", arch::ADD_INSTRUCTION)), "{first}");
    assert!(first.contains(", guest ") && first.contains(" µs, vmm "), "{first}");
    let kept = bantam("example add --trace --trace-filter").arg(format!("write & {}", arch::ADD_ADDRESS)).run();
    assert_eq!(kept.expect(0).trace().len(), 2);
    assert_eq!(bantam("example add --trace --trace-filter vcpu=1").run().expect(0).trace().len(), 0);
    bantam("example add --trace --trace-filter nonsense").run().refused(2).said("--trace-filter");
}

#[test]
fn a_trace_for_a_viewer_has_a_track_for_each_cpu_and_the_set_up() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trace.json");
    bantam(&format!("example add --trace-insn --trace={}", path.display())).run().expect(0).printed("4\n");
    let trace: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let track =
        |name: &str| events.iter().find(|e| e["ph"] == "M" && e["args"]["name"] == name).unwrap()["tid"].clone();
    let slices = |tid: &serde_json::Value| events.iter().filter(|e| e["ph"] == "X" && e["tid"] == *tid).count();
    assert!(slices(&track("vcpu0")) >= 4 && slices(&track("set-up")) >= 5, "{trace}");
    assert!(events.iter().any(|e| e["args"]["instruction"] == arch::ADD_INSTRUCTION), "{trace}");
    assert_eq!(trace["otherData"]["dropped"], 0);
}

#[test]
fn a_trace_for_a_viewer_shows_how_long_a_cpu_was_halted() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trace.json");
    bantam(&format!("example timer --trace={}", path.display())).run().expect(7);
    let trace: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let slices = |name: &str| {
        let named = events.iter().filter(|e| e["ph"] == "X" && e["name"] == name);
        named.map(|e| (e["ts"].as_f64().unwrap(), e["dur"].as_f64().unwrap())).collect::<Vec<_>>()
    };
    let (guest, halted) = (slices("guest"), slices("halted"));
    // It sleeps between its ticks.
    assert!(halted.iter().map(|(_, dur)| dur).sum::<f64>() > 20_000.0, "{halted:?} of {guest:?}");
    // A slice that lies in no other would be drawn beside it.
    assert!(halted.iter().all(|(ts, dur)| guest.iter().any(|(from, long)| from == ts && dur <= long)), "{trace}");
}
