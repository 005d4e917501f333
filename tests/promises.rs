//! What happens when things go wrong: one test for each promised row (`pNN` in its name).

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;
mod random;
use std::time::Duration;

use common::code::SPIN;
use common::{Outcome, Run, arch, bantam, code, file, have, kvm, program, root, skipped, within};

fn example(name: &str) -> Run {
    bantam("example").arg(name)
}

/// A guest that only tests use, with its own words; its file lives as long as the returned value.
fn test_guest(name: &str) -> (Run, common::File) {
    let guest = guests::find(name).unwrap();
    let file = file((guest.image)());
    (bantam("run").arg(file.path()).words(&guest.words.join(" ")), file)
}

fn wrapped(by: &str, words: &str) -> Run {
    Run::of(by.as_ref(), words.split_whitespace().map(Into::into)).arg(program())
}

#[test]
fn p01_no_dev_kvm() {
    if !root() || !have("unshare") {
        return;
    }
    let script = format!("mount -t tmpfs none /dev && exec {} example add 2>&1 >&3", program().display());
    let words = ["-m", "sh", "-c", &format!("exec 3>&1; {script}")].map(Into::into);
    let outcome = Run::of("unshare".as_ref(), words).run();
    outcome.expect(125);
    assert!(
        outcome.out().contains("bantam: cannot open /dev/kvm: No such file") && outcome.out().contains(arch::NO_KVM),
        "{}",
        outcome.out()
    );
    assert!(outcome.took < within(2.0));
}

#[test]
fn p02_no_permission() {
    if !kvm() || !root() || !have("setpriv") {
        return;
    }
    use std::os::unix::fs::PermissionsExt;
    if std::fs::metadata("/dev/kvm").unwrap().permissions().mode() & 0o006 == 0o006 {
        return skipped("everyone may open /dev/kvm here");
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let copy = dir.path().join("bantam");
    common::copy_program(&copy);
    for command in ["example add", "check"] {
        let words = ["--reuid=65534", "--regid=65534", "--clear-groups"].map(Into::into);
        let outcome = Run::of("setpriv".as_ref(), words).arg(&copy).words(command).run();
        outcome.refused(125).said("Permission denied").said("group").said("mode 0");
    }
}

/// The calls of one run of `add`, as strace prints them, of all threads.
fn calls(filter: &str) -> Vec<String> {
    let log = tempfile::NamedTempFile::new().unwrap();
    let words = format!("-f -qq -e trace={filter} -o {}", log.path().display());
    wrapped("strace", &words).words("example add").run().expect(0);
    std::fs::read_to_string(log.path()).unwrap().lines().map(str::to_owned).collect()
}

/// Which `ioctl` of the main thread is the first one named `name`, counted from 1.
fn ioctl_number(name: &str) -> usize {
    let calls = calls("ioctl");
    let main = calls.first().and_then(|l| l.split_whitespace().next()).unwrap().to_owned();
    calls
        .iter()
        .filter(|l| l.starts_with(&main))
        .position(|l| l.contains(name))
        .unwrap_or_else(|| panic!("no {name} in {calls:?}"))
        + 1
}

/// `add` with a fault put into its system calls.
fn injected(fault: &str) -> Outcome {
    wrapped("strace", &format!("-f -qq -o /dev/null -e inject={fault}")).words("example add").run()
}

#[test]
fn p03_another_api_version_or_a_missing_capability() {
    if !kvm() || !have("strace") {
        return;
    }
    let number = ioctl_number("KVM_GET_API_VERSION");
    injected(&format!("ioctl:retval=11:when={number}")).refused(125).said("API version 11");
    injected(&format!("ioctl:error=ENOTTY:when={number}")).refused(125).said("API version");
    let number = ioctl_number("KVM_CAP_USER_MEMORY");
    injected(&format!("ioctl:retval=0:when={number}")).refused(125).said("KVM_CAP_USER_MEMORY");
    let number = ioctl_number(arch::OPTIONAL);
    injected(&format!("ioctl:retval=0:when={number}")).expect(0).printed("4\n");
}

#[test]
fn p04_create_vm_is_interrupted_or_refused() {
    if !kvm() || !have("strace") {
        return;
    }
    let number = ioctl_number("KVM_CREATE_VM");
    injected(&format!("ioctl:error=EINTR:when={number}..{}", number + 2)).expect(0).printed("4\n");
    injected(&format!("ioctl:error=EINTR:when={number}..{}", number + 9)).refused(125).said("KVM_CREATE_VM");
    for error in ["EBUSY", "ENOMEM"] {
        injected(&format!("ioctl:error={error}:when={number}")).refused(125).said("KVM_CREATE_VM");
    }
}

#[test]
fn p05_kvm_run_fails() {
    if !kvm() || !have("strace") {
        return;
    }
    // strace counts per thread: only the vCPU's own thread makes 500 calls on the vCPU's descriptor, one per character. It
    // may be another thread after a while: beside strace a CPU uses so little time that it is stopped and looked at, each
    // time after four times as long.
    let guest = guests::find("print-1m").unwrap();
    let image = file((guest.image)());
    let lines = format!("{} --reg {}=40", guest.words.join(" "), arch::LINES);
    let run = |error: &str, when: &str| {
        let fault = format!("inject=ioctl:error={error}:when={when}");
        let words = format!("-f -qq -o /dev/null -P anon_inode:kvm-vcpu:0 -e {fault}");
        wrapped("strace", &words).arg("run").arg(image.path()).words(&lines).run()
    };
    for error in ["EINTR", "EAGAIN"] {
        let outcome = run(error, "500..502");
        assert_eq!(outcome.expect(0).stdout.len(), 40 * 64);
    }
    for error in ["EFAULT", "EINVAL", "ENOSYS"] {
        run(error, "500+").expect(126).said("KVM_RUN").said(arch::PC);
    }
}

const ERRORS: &[&str] = &["EINTR", "EAGAIN", "EIO", "ENOMEM", "ENOSPC", "EMFILE"];

/// They know no errors: an injected one is a state that no kernel makes.
const NEVER_FAIL: &[&str] = &["brk", "getpid", "gettid", "getuid", "geteuid"];

/// Each system call of a run fails once, with each of these errors: all of them in the soak, a sample in CI.
#[test]
fn p06_any_system_call_fails() {
    if !kvm() || !have("strace") {
        return;
    }
    let (seed, mut count) = random::sample(u64::MAX);
    let mut random = random::Random(seed);
    let calls = calls("all");
    let word = |line: &str, n| line.split_whitespace().nth(n).unwrap_or_default().to_owned();
    let main = word(&calls[0], 0);
    // Ours is the first handler of SIGSYS; what fails before it is the C library's or the runtime's to answer.
    let ours = calls.iter().position(|l| l.contains("rt_sigaction(SIGSYS")).unwrap();
    let mut counts = std::collections::BTreeMap::<(String, String), u32>::new();
    let mut cases = std::collections::BTreeMap::new();
    for (at, line) in calls.iter().enumerate() {
        let name = word(line, 1).split('(').next().unwrap_or_default().to_owned();
        let is_a_name = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        if !is_a_name || NEVER_FAIL.contains(&name.as_str()) {
            continue;
        }
        let count = counts.entry((word(line, 0), name.clone())).or_default();
        *count += 1;
        let before = word(line, 0) == main && at < ours;
        *cases.entry((name, *count)).or_insert(before) |= before;
    }
    // Each takes seconds there.
    if common::host_is_emulated() {
        count = count.min(25);
    }
    let cases = cases.into_iter().filter(|(case, before)| !before && !case.0.starts_with("exit"));
    let mut cases: Vec<_> = cases
        .flat_map(|((name, when), _)| {
            // The C library aborts on an error that a futex never gives, the runtime on one that getrandom does not.
            let errors = match name.as_str() {
                "futex" => &ERRORS[..2],
                "getrandom" => &ERRORS[..1],
                _ => ERRORS,
            };
            errors.iter().map(move |error| format!("{name}:error={error}:when={when}"))
        })
        .collect();
    assert!(cases.len() > 200, "{cases:?}");
    for _ in 0..count.min(cases.len() as u64) {
        let case = cases.swap_remove(random.index(cases.len()));
        println!("{case}");
        let outcome = injected(&case);
        let honest = match outcome.status {
            0 => outcome.out() == "4\n" || !outcome.stderr.is_empty(),
            124..=126 => outcome.stderr.starts_with("bantam: ") || outcome.stderr.starts_with("vCPU"),
            _ => false,
        };
        assert!(honest, "{case}: {outcome:?}");
    }
}

#[test]
fn p07_few_descriptors_or_little_address_space() {
    if !kvm() || !have("prlimit") {
        return;
    }
    for limit in (3..=24).chain([32, 48, 64]) {
        let outcome = wrapped("prlimit", &format!("--nofile={limit}")).words("example add").run();
        match outcome.status {
            0 => outcome.printed("4\n"),
            _ => outcome.refused(125),
        };
    }
    // Into less the program itself does not go where it is built without optimisation.
    for megabytes in [24, 32, 64, 128, 256] {
        let words = format!("--as={}", megabytes << 20);
        let outcome = wrapped("prlimit", &words).words("example add").run();
        match outcome.status {
            0 => outcome.printed("4\n"),
            _ => outcome.expect(125),
        };
    }
}

#[test]
fn p08_no_memory_for_the_guest() {
    if !kvm() || !have("prlimit") {
        return;
    }
    wrapped("prlimit", "--as=300000000").words("example add --memory 1G").run().refused(125).said("RAM");
}

#[test]
fn p16_a_death_reports_every_cpu() {
    if !kvm() {
        return;
    }
    let outcome = example("crash").words("--cpus 2 --irqchip kernel").run();
    outcome.expect(126).said("vCPU 0").said("\nvCPU 1");
    for text in arch::death() {
        outcome.said(text);
    }
}

#[test]
fn p17_an_instruction_that_kvm_cannot_emulate() {
    if !kvm() {
        return;
    }
    for (name, words, reasons) in arch::UNEMULATED {
        let (run, _file) = test_guest(name);
        let outcome = run.words(words).run();
        outcome.expect(126);
        for reason in reasons.iter().filter(|_| arch::must_emulate()) {
            outcome.said(reason);
        }
    }
}

#[test]
fn p18_a_guest_that_spins_is_stopped_where_no_signal_can_queue() {
    if !kvm() || !have("prlimit") {
        return;
    }
    let file = file(SPIN);
    wrapped("prlimit", "--sigpending=0").words("run --timeout 0.2").arg(file.path()).run().expect(124);
}

#[test]
fn p18_a_guest_that_spins_answers_to_a_signal() {
    if !kvm() {
        return;
    }
    for name in arch::SPINNERS {
        let (run, _file) = test_guest(name);
        let run = run.start();
        run.up();
        let start = std::time::Instant::now();
        run.signal("TERM");
        run.wait().expect(143);
        assert!(start.elapsed() < within(1.0));
    }
}

#[test]
fn p20_accesses_that_nobody_answers() {
    if !kvm() {
        return;
    }
    let (run, _file) = test_guest("mmio-edge");
    run.run().expect(1).said("no device answers");
    for name in arch::SWEEPS {
        let (run, _file) = test_guest(name);
        let outcome = run.run();
        assert!(outcome.expect(0).stdout.ends_with(b"swept\n"));
        assert!(outcome.stderr.lines().count() <= 1, "{}", outcome.stderr);
    }
    for name in arch::STORMS {
        let (run, _file) = test_guest(name);
        let run = run.start();
        std::thread::sleep(Duration::from_millis(300));
        run.up().signal("TERM");
        let outcome = run.wait();
        outcome.expect(143);
        assert!(outcome.took < within(3.0), "{name}");
    }
}

/// `print-1m`, and a pipe for what it prints that holds no more than a page.
fn print_into_a_page(lines: usize) -> (std::process::Child, common::File) {
    let (run, file) = test_guest("print-1m");
    let mut run = run.words(&format!("--reg {}={lines}", arch::LINES));
    let child = run.command().spawn().unwrap();
    rustix::pipe::fcntl_setpipe_size(child.stdout.as_ref().unwrap(), 4096).unwrap();
    (child, file)
}

/// More lines of 64 bytes than that page and our buffers hold.
const MANY: usize = 1200;

#[test]
fn p30_a_reader_that_does_not_read_or_has_gone() {
    use std::io::Read;
    if !kvm() {
        return;
    }
    let (mut child, _file) = print_into_a_page(MANY);
    let status = child.wait().unwrap();
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(status.success() && said.contains("bytes of output were lost"), "{status} {said}");
    // A reader that has gone.
    let (mut child, _file) = print_into_a_page(20);
    drop(child.stdout.take());
    let status = child.wait().unwrap();
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(status.success() && said.contains("1280 bytes of output were lost"), "{status} {said}");
}

#[test]
fn p30_a_slow_reader_loses_nothing() {
    use std::io::Read;
    if !kvm() {
        return;
    }
    let (mut child, _file) = print_into_a_page(MANY);
    let mut out = child.stdout.take().unwrap();
    let mut all = Vec::new();
    let mut part = [0; 16 << 10];
    loop {
        // 10 KB/s: each of our buffers takes longer than anyone's patience with a reader that does not move.
        std::thread::sleep(Duration::from_millis(400));
        match out.read(&mut part).unwrap() {
            0 => break,
            count => all.extend_from_slice(&part[..count]),
        }
    }
    assert!(child.wait().unwrap().success());
    assert_eq!(all.len(), MANY * 64);
    assert!(all.chunks(64).all(|line| line == &all[..64]));
}

#[test]
fn p30_every_life_of_a_machine_waits_for_its_reader() {
    use std::io::Read;
    if !kvm() {
        return;
    }
    let guest = file(code::CHATTY_LIFE);
    let mut run = bantam("run").arg(guest.path()).words("--reboot --trace --max-exits 20000");
    let mut child = run.command().spawn().unwrap();
    let mut err = child.stderr.take().unwrap();
    let mut all = Vec::new();
    let mut part = [0; 32 << 10];
    loop {
        std::thread::sleep(Duration::from_millis(20));
        match err.read(&mut part).unwrap() {
            0 => break,
            count => all.extend_from_slice(&part[..count]),
        }
    }
    assert_eq!(child.wait().unwrap().code(), Some(124));
    let text = String::from_utf8(all).unwrap();
    assert_eq!(text.lines().filter(|l| l.contains("cpu0 ")).count(), 20_000, "{}", &text[text.len() - 300..]);
}

#[test]
fn p31_a_flood_on_stdin_stays_with_its_sender() {
    if !kvm() {
        return;
    }
    let (run, _file) = test_guest("serial-flood-read");
    let mut run = run;
    run.command().stdin(std::fs::File::open("/dev/zero").unwrap());
    let run = run.start();
    std::thread::sleep(Duration::from_millis(800));
    let before = run.proc_status("VmRSS");
    std::thread::sleep(Duration::from_millis(800));
    let after = run.proc_status("VmRSS");
    let io = std::fs::read_to_string(format!("/proc/{}/io", run.pid())).unwrap();
    let read: u64 = io.lines().find_map(|l| l.strip_prefix("rchar: ")).unwrap().parse().unwrap();
    run.signal("TERM");
    run.wait().expect(143);
    assert!(after < before + 1024, "{before} kB, then {after} kB");
    assert!(read < 4 << 20, "{read} bytes were read for a guest that took a few thousand");
}

#[test]
fn p36_a_bug_ends_the_process_and_says_so() {
    if !kvm() {
        return;
    }
    if !cfg!(debug_assertions) {
        return skipped("faults on purpose are in debug builds only");
    }
    let outcome = example("add").env("BANTAM_TEST_FAULT", "vcpu:panic").run();
    outcome.expect(101).said("bantam: this is a bug in Bantam: asked for");
    let outcome = example("add").env("BANTAM_TEST_FAULT", "vcpu:overflow").run();
    outcome.expect(139).said("bantam: killed by signal 11");
}

#[test]
fn p36_a_crash_signal_is_reported() {
    if !kvm() {
        return;
    }
    let guest = file(SPIN);
    for (name, number) in [("SEGV", 11), ("BUS", 7), ("ILL", 4), ("SYS", 31)] {
        let run = bantam("run").arg(guest.path()).start();
        run.up().signal(name);
        run.wait().expect(128 + number).said(&format!("bantam: killed by signal {number:02}"));
    }
}

#[test]
fn p37_a_broken_pipe_signal_is_ignored() {
    if !kvm() {
        return;
    }
    let guest = file(SPIN);
    let run = bantam("run").arg(guest.path()).words("--timeout 0.5").start();
    run.up().signal("PIPE");
    run.wait().expect(124);
}

/// A control group of the test's own, removed at its end.
struct Group(std::path::PathBuf);

impl Group {
    /// With `limit` written to the controller's file, whichever version of control groups this host has.
    fn new(controller: &str, files: [&str; 2], limit: &str) -> Option<Self> {
        let root = std::path::Path::new("/sys/fs/cgroup");
        let old = root.join(controller);
        let (parent, file) = if old.exists() { (old, files[0]) } else { (root.to_owned(), files[1]) };
        let group = Self(parent.join(format!("bantam-test-{controller}-{}", std::process::id())));
        let made = std::fs::create_dir(&group.0).and_then(|()| std::fs::write(group.0.join(file), limit));
        if let Err(e) = made {
            skipped(&format!("no {controller} control group can be made: {e}"));
            return None;
        }
        Some(group)
    }

    fn run(&self, words: &str) -> Outcome {
        let script = format!("echo $$ > {}/cgroup.procs && exec {} {words}", self.0.display(), program().display());
        Run::of("sh".as_ref(), ["-c".into(), script.into()]).run()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for _ in 0..100 {
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn p07_no_thread_is_left() {
    if !kvm() || !root() {
        return;
    }
    let Some(group) = Group::new("pids", ["pids.max", "pids.max"], "2") else { return };
    group.run("example smp").refused_after_warnings(125).said("cannot start thread vcpu");
}

/// The kernel ends this machine only: whoever started it sees a kill, and another machine runs on.
#[test]
fn p08_the_host_runs_out_of_memory_while_the_guest_runs() {
    if !kvm() || !root() {
        return;
    }
    let Some(group) = Group::new("memory", ["memory.limit_in_bytes", "memory.max"], "16777216") else { return };
    let fill = file(code::FILL);
    let other = file(SPIN);
    let other = bantam("run").arg(other.path()).words("--timeout 2").start();
    let words = format!("run {} --memory 512M {}", fill.path().display(), arch::FILL);
    group.run(&words).expect(-9);
    other.wait().expect(124);
}
