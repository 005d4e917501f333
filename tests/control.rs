//! Limits, signals, the terminal: how a person or a script keeps hold of a machine.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;
use std::time::{Duration, Instant};

use common::{Run, arch, bantam, code, file, have, kvm, program, within};

/// For `env`: who runs the tests may ignore signals (nohup, a shell in the background), and what is ignored stays so.
const DEFAULTS: &str = "--default-signal";

fn spin() -> Run {
    // The file must outlive the run's start; leaking it in a test is harmless.
    let guest = file(code::SPIN);
    let run = bantam("run").arg(guest.path());
    std::mem::forget(guest);
    run
}

#[test]
fn a_timeout_ends_with_124() {
    if !kvm() {
        return;
    }
    let outcome = spin().words("--timeout 0.3").run();
    outcome.expect(124).printed("").said("--timeout");
    assert!(outcome.took >= Duration::from_millis(300) && outcome.took < within(3.0));
}

#[test]
fn max_exits_counts_the_exits_of_all_cpus() {
    if !kvm() {
        return;
    }
    let outcome = bantam("example counter --max-exits 3").run();
    outcome.expect(124);
    assert_eq!(outcome.trace().len(), 3);
}

#[test]
fn max_exits_spans_reboots() {
    if !kvm() {
        return;
    }
    let guest = file(code::RESET);
    let outcome = bantam("run").arg(guest.path()).words("--reboot --max-exits 5 --trace --timeout 20").run();
    outcome.expect(124).said("--max-exits");
    assert_eq!(outcome.trace().len(), 5);
}

#[test]
fn until_ends_with_0_when_its_text_has_been_shown() {
    if !kvm() {
        return;
    }
    let ((name, _), (word, text)) = (arch::LINE, arch::UNTIL);
    bantam(&format!("example {name} --until {word}")).run().expect(0).printed(text);
    bantam("example add --until 9").run().expect(0).printed("4\n");
}

#[test]
fn signals_end_a_spinning_machine_at_once() {
    if !kvm() || !have("env") {
        return;
    }
    let guest = file(code::SPIN);
    for (name, status) in [("TERM", 143), ("INT", 130), ("HUP", 129), ("QUIT", 131)] {
        let run = Run::of("env".as_ref(), [DEFAULTS.into()]).arg(program()).arg("run").arg(guest.path()).start();
        run.up();
        let start = Instant::now();
        run.signal(name);
        run.wait().expect(status).printed("");
        assert!(start.elapsed() < within(0.5), "{name}: {:?}", start.elapsed());
    }
}

#[test]
fn a_parent_that_blocks_or_ignores_signals_does_no_harm() {
    if !kvm() || !have("env") {
        return;
    }
    let guest = file(code::SPIN);
    let under = |option: &str| {
        let run = Run::of("env".as_ref(), [option.into()]).arg(program()).arg("run").arg(guest.path());
        run.words("--timeout 0.4").start()
    };
    under("--block-signal=URG").wait().expect(124);
    let run = under("--ignore-signal=HUP");
    run.up().signal("HUP");
    run.wait().expect(124);
}

#[test]
fn a_machine_stopped_by_the_shell_goes_on() {
    if !kvm() {
        return;
    }
    let run = spin().words("--timeout 2").start();
    run.up().signal("TSTP");
    std::thread::sleep(Duration::from_millis(150));
    let state = std::fs::read_to_string(format!("/proc/{}/stat", run.pid())).unwrap();
    assert!(state.contains(") T "), "{state}");
    run.signal("CONT");
    run.wait().expect(124);
}

#[test]
fn vcpus_have_threads_with_names() {
    if !kvm() {
        return;
    }
    let guest = guests::find("smp-spin").unwrap();
    let image = file((guest.image)());
    let run = bantam("run").arg(image.path()).words(&guest.words.join(" ")).start();
    run.up();
    let names = || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", run.pid())).unwrap();
        let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).ok();
        let mut names: Vec<_> = tasks.flatten().filter_map(name).collect();
        // KVM's own worker, on some kernels.
        names.retain(|name| !name.starts_with("kvm-"));
        names.sort();
        names
    };
    // A thread that has just begun has its parent's name; on a slow host CPUs are stopped for a look now and then.
    let expected = ["bantam\n", "vcpu0\n", "vcpu1\n", "vcpu2\n", "vcpu3\n"];
    let begun = Instant::now();
    while names() != expected && begun.elapsed() < common::within(2.0) {
        std::thread::sleep(Duration::from_millis(50));
    }
    let found = names();
    run.signal("TERM");
    run.wait().expect(143);
    assert_eq!(found, expected);
}

/// A shell on a terminal of its own; `typed` is what a person types, each after a pause.
fn on_terminal(command: &str, typed: &[&str]) -> String {
    typing(command, typed, Duration::from_millis(700))
}

fn on_terminal_at_once(command: &str, typed: &str) -> String {
    typing(command, &[typed], Duration::ZERO)
}

fn typing(command: &str, typed: &[&str], pause: Duration) -> String {
    use std::io::Write;
    let mut child = std::process::Command::new("env")
        .args([DEFAULTS, "script", "-qec", command, "/dev/null"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    for text in typed {
        std::thread::sleep(pause);
        stdin.write_all(text.as_bytes()).unwrap();
    }
    let output = child.wait_with_output().unwrap();
    drop(stdin);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn the_console_keys_work_and_the_terminal_is_restored() {
    if !kvm() || !have("script") {
        return;
    }
    let bantam = program().display().to_string();
    let command = format!("stty -a; {bantam} example echo; echo status=$?; stty -a");
    let shown = on_terminal(&command, &["hi", "\x01h", "\x01x"]);
    assert!(shown.contains("hi") && shown.contains("ctrl-a x") && shown.contains("status=0"), "{shown}");
    let flags: Vec<_> = shown.lines().filter(|l| l.contains("isig")).collect();
    assert_eq!(flags.len(), 2, "{shown}");
    assert!(flags[0] == flags[1] && !flags[0].contains("-isig"), "{flags:?}");
}

#[test]
fn ctrl_a_x_leaves_a_guest_that_never_listens() {
    if !kvm() || !have("script") {
        return;
    }
    let guest = file(code::SPIN);
    let command = format!("{} run {}; echo status=$?", program().display(), guest.path().display());
    let shown = on_terminal(&command, &["\x01x"]);
    assert!(shown.contains("status=0"), "{shown}");
}

#[test]
fn ctrl_a_x_is_heard_behind_a_paste_that_nobody_reads() {
    if !kvm() || !have("script") {
        return;
    }
    let guest = file(code::LISTEN_ONCE);
    let command = format!("{} run {}; echo status=$?", program().display(), guest.path().display());
    let paste = "x".repeat(4000);
    let shown = on_terminal(&command, &[&paste, &paste, "\x01x"]);
    assert!(shown.contains("status=0"), "{shown}");
}

#[test]
fn a_short_guest_leaves_what_was_typed_to_the_shell() {
    if !kvm() || !have("script") {
        return;
    }
    let command = format!("{} example add; read line; echo \"got <$line>\"", program().display());
    // Typed before the guest ends: `script` hands it to the terminal at once.
    let shown = on_terminal_at_once(&command, "next command\n");
    assert!(shown.contains("got <next command>"), "{shown}");
}

#[test]
fn the_terminal_is_restored_after_a_bug_a_crash_and_a_signal() {
    if !kvm() || !have("script") {
        return;
    }
    let bantam = program().display().to_string();
    let dir = tempfile::tempdir().unwrap();
    let pid = dir.path().join("pid").display().to_string();
    let ways = [
        ("BANTAM_TEST_FAULT=terminal:panic BANTAM example echo", "status=101"),
        ("BANTAM_TEST_FAULT=terminal:overflow BANTAM example echo", "status=139"),
        ("(sleep 0.5; kill -SEGV $(cat PID)) & sh -c 'echo $$ > PID; exec BANTAM example echo'", "status=139"),
        ("(sleep 0.5; kill -TERM $(cat PID)) & sh -c 'echo $$ > PID; exec BANTAM example echo'", "status=143"),
        ("BANTAM example echo --timeout 0.3", "status=124"),
    ];
    for (way, status) in ways {
        let run = way.replace("BANTAM example", &format!("{bantam} example")).replace("PID", &pid);
        let shown = on_terminal(&format!("stty -a; {run}; echo status=$?; stty -a"), &["", ""]);
        let flags: Vec<_> = shown.lines().filter(|l| l.contains("isig")).collect();
        assert!(shown.contains(status), "{way}: {shown}");
        assert!(flags.len() == 2 && flags[0] == flags[1] && !flags[0].contains("-isig"), "{way}: {shown}");
    }
}

#[test]
fn ctrl_c_ends_a_machine_that_does_not_listen() {
    if !kvm() || !have("script") {
        return;
    }
    let guest = file(code::SPIN);
    let command = format!("{} run {}; echo status=$?", program().display(), guest.path().display());
    let shown = on_terminal(&command, &["\x03"]);
    assert!(shown.contains("status=130"), "{shown}");
}

#[test]
fn a_trace_goes_to_a_file_if_asked() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trace");
    bantam(&format!("example add --trace={}", path.display())).run().expect(0).said_nothing();
    let text = std::fs::read_to_string(path).unwrap();
    let first = format!("     1 cpu0 {}  at ", arch::ADD_TRACE[0]);
    assert!(text.lines().count() == arch::ADD_TRACE.len() && text.contains(&first), "{text}");
}

#[test]
fn a_config_file_makes_the_same_machine() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("machine.toml");
    std::fs::write(&path, arch::ADD_CONFIG).unwrap();
    let guest = file((guests::find("add").unwrap().image)());
    bantam(&format!("run --config {}", path.display())).arg(guest.path()).run().expect(0).printed("5\n");
}

#[test]
fn layout_prints_the_map() {
    for (words, golden) in arch::LAYOUTS {
        let map = bantam(&format!("layout {words}")).run();
        map.expect(0).said_nothing();
        assert_eq!(map.out(), *golden);
    }
}

#[test]
fn help_version_completions_and_manual_are_there() {
    for words in ["--help", "run --help", "--version", "completions bash", "man", "example --help"] {
        let outcome = bantam(words).run();
        outcome.expect(0).said_nothing();
        assert!(outcome.out().len() > 10, "{words}");
        assert!(words == "man" || !outcome.out().contains('\x1b'), "{words}: colours without a terminal");
    }
    assert!(bantam("run --help").run().out().contains("ctrl-a x"));
}
