//! Snapshots of whole machines: written while they run, and gone on with.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;
#[path = "linux/guest.rs"]
mod guest;
mod random;
#[path = "linux/shell.rs"]
mod shell;

use std::collections::BTreeSet;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bantam::config::Config;
use bantam::machine::{Machine, Paused};
use bantam::snapshot::{How, Snapshot};
use common::arch::{PCI, follows_time, kept};
use common::counting::{connected, counts, goes_on, of, text};
use common::place::{Place, grows, size};
use common::{bantam, code, file, kvm, skipped};
use random::Random;
use serde_json::Value;
use shell::Shell;

#[test]
fn a_machine_goes_on_where_its_snapshot_was_written() {
    if !kvm() {
        return;
    }
    for words in kept() {
        let (place, guest) = (Place::new(), counts());
        let started = place.counter(&guest, &words);
        let folder = place.snapshot("first");
        let (out, before) = (place.path("out"), text(&place.path("out")));
        place.tell("resume one");
        grows(&out, before.len() as u64);
        // A second one, of a machine that runs.
        let told = place.tell(&format!("snapshot one {}", place.path("second").display()));
        assert!(told.out().contains(" of RAM; the machine stood still for "), "{}", told.out());
        place.tell("stop one");
        started.wait().expect(143);
        goes_on("0", &text(&out));
        for name in ["first", "second", "first"] {
            let again = place.path("again");
            let words = format!("--serial file:{} --max-exits 2000 --timeout 60", again.display());
            place.run("restore").arg(place.path(name)).words(&words).run().expect(124).said("--max-exits reached");
            let after = text(&again);
            if name == "first" {
                goes_on(&before, &after);
            } else {
                goes_on(&after[..1], &after[1..]);
            }
        }
        let shown = place.run("inspect").arg(&folder).run().expect(0).out();
        assert!(shown.starts_with(&format!("snapshot: of an {} machine", bantam::arch::NAME)), "{shown}");
    }
}

#[test]
fn what_is_typed_reaches_a_machine_that_was_restored() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let words = "example echo --name echo --memory 16M --timeout 60";
    let started = place.run(words).silent_stdin().start();
    started.up();
    place.tell(&format!("snapshot echo {}", place.path("one").display()));
    place.tell("stop echo");
    started.wait().expect(143);
    for typed in ["first\x04", "second\x04"] {
        let told = place.run("restore").arg(place.path("one")).words("--timeout 60").input(typed.as_bytes()).run();
        assert!(told.expect(0).out().contains(typed.trim_end_matches('\x04')), "{}", told.out());
    }
}

/// A stock kernel, its devices at work, twice from one snapshot.
#[test]
fn a_linux_goes_on_where_its_snapshot_was_written() {
    if !kvm() || guest::kernel(shell::KERNEL).is_none() {
        return;
    }
    let place = Place::new();
    let (name, disk, folder) = (format!("linux-{}", std::process::id()), place.path("disk"), place.path("one"));
    std::fs::write(&disk, [b"bantam".to_vec(), vec![0; 4090]].concat()).unwrap();
    let words = format!("--memory 256M --cpus 2 --name {name} --disk {},ro", disk.display());
    let Some(mut shell) = Shell::start(&words, "virtio_blk virtio-rng") else { return };
    shell.run("echo kept >/tmp/file; head -c 6 /dev/vda");
    // Of a CPU that has been busy a kernel says after 20 seconds that it is stuck, unless it knows that it stood still.
    shell.run("for cpu in 1 2; do taskset $cpu sh -c 'while :; do :; done' & done; sleep 5");
    let lockups = "dmesg | grep -c 'soft lockup'";
    let before = shell.ask(lockups);
    let told = bantam(&format!("snapshot {name} {}", folder.display())).run().expect(0).out();
    guest::note(&told);
    shell.is("cat /tmp/file", "kept");
    shell.leave("poweroff -f\n");
    std::thread::sleep(Duration::from_secs(25));
    let mut numbers = BTreeSet::new();
    let can_wait = bantam::host::sys::userfault::Guarded::first().is_ok();
    for verify in ["once", if can_wait { "lazy" } else { "always" }] {
        let mut shell = Shell::restore(&folder, verify);
        shell.run("sleep 1; kill $(jobs -p)");
        shell.is(lockups, &before);
        // It is told that it is another machine, and makes new random numbers.
        shell.is("dmesg | grep -c 'crng reseeded due to virtual machine fork'", "1");
        numbers.insert(shell.ask("head -c 16 /dev/urandom | md5sum"));
        shell.is("cat /tmp/file", "kept");
        // On arm64 its clocks go on from where they were.
        if cfg!(target_arch = "x86_64") {
            let now = || std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
            let (before, told) = (now(), shell.ask("date +%s").trim().parse::<u64>().unwrap());
            assert!((before.saturating_sub(3)..=now() + 3).contains(&told), "{before} {told}");
        }
        shell.is("echo 3 >/proc/sys/vm/drop_caches; head -c 6 /dev/vda; head -c 512 /dev/hwrng | wc -c", "bantam512");
        shell.run("for cpu in 1 2; do taskset $cpu sleep 0.2 || exit; done");
        // On an emulated host a clock may be read late, which a kernel says of any machine there.
        let complaints = shell.ask("dmesg -r | grep '^<[0-4]>' | grep -v clocksource | sed 's/^/check dmesg: /'");
        let told = shell.leave("poweroff -f\n");
        assert!(told.complaints().is_empty(), "{complaints}");
    }
    assert_eq!(numbers.len(), 2, "both have the same random numbers: {numbers:?}");
}

/// Where two states differ, as JSON pointers.
fn differences(at: &str, one: &Value, other: &Value, into: &mut Vec<String>) {
    match (one, other) {
        (Value::Object(a), Value::Object(b)) if a.keys().eq(b.keys()) => {
            a.iter().for_each(|(key, value)| differences(&format!("{at}/{key}"), value, &b[key], into));
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            let name = |value: &Value, index: usize| match (value["name"].as_str(), value[0].as_u64()) {
                (Some(name), _) => name.to_owned(),
                (None, Some(number)) if at.ends_with("/msrs") => format!("{number:#x}"),
                _ => index.to_string(),
            };
            let both = a.iter().zip(b).enumerate();
            both.for_each(|(i, (a, b))| differences(&format!("{at}/{}", name(a, i)), a, b, into));
        }
        _ if one == other => {}
        _ => into.push(format!("{at}: {one} {other}")),
    }
}

/// But for what follows time.
#[track_caller]
fn is_saved_the_same(snapshot: &Snapshot, machine: &Machine<Paused>, when: &str) {
    let json = |state| serde_json::to_value(state).unwrap();
    let mut found = Vec::new();
    differences("", &json(&snapshot.state), &json(&machine.save().unwrap()), &mut found);
    found.retain(|path| !follows_time(path) && !path.starts_with("/at: "));
    assert!(found.is_empty(), "{when}: {found:#?}");
}

/// The same of a stock kernel all of whose devices are at work.
#[test]
fn a_busy_linux_that_was_loaded_is_saved_the_same() {
    if !kvm() || guest::kernel(shell::KERNEL).is_none() {
        return;
    }
    let (first, count) = common::soak().unwrap_or((1, 2));
    let place = Place::new();
    let (name, disk, folder) = (format!("busy-{}", std::process::id()), place.path("disk"), place.path("one"));
    std::fs::write(&disk, vec![0x5a; 4 << 20]).unwrap();
    let path = |name: &str| place.path(name).display().to_string();
    let elsewhere = |number: u32| {
        let (net, vsock, console) =
            (path(&format!("n{number}")), path(&format!("v{number}")), path(&format!("c{number}")));
        format!("--net socket:{net},listen --vsock cid=3,path={vsock} --console file:{console}")
    };
    let words = format!("--memory 256M --cpus 2 --name {name} --disk {},ro --balloon {}", disk.display(), elsewhere(1));
    let modules = "virtio_blk failover net_failover virtio_net virtio_balloon virtio-rng \
        vsock vmw_vsock_virtio_transport_common vmw_vsock_virtio_transport";
    let Some(mut shell) = Shell::start(&words, modules) else { return };
    // Who takes what it sends.
    let mut wire = UnixStream::connect(path("n1")).unwrap();
    std::thread::spawn(move || while wire.read(&mut [0; 4096]).is_ok_and(|count| count > 0) {});
    shell.run("ip link set eth0 up && ip addr add 10.1.1.1/24 dev eth0");
    for busy in [
        "echo 3 >/proc/sys/vm/drop_caches; cat /dev/vda >/dev/null",
        "head -c 4096 /dev/hwrng >/dev/null",
        "ping -q -i 0.01 10.1.1.255 >/dev/null",
        "seq 1000 >/dev/hvc0",
    ] {
        shell.run(&format!("(while :; do {busy}; done) 2>/dev/null & true"));
    }
    for seed in first..first + count {
        std::thread::sleep(Duration::from_micros(seed.wrapping_mul(6151) % 500_000));
        bantam(&format!("snapshot {name} {}", folder.display())).run().expect(0);
        let snapshot = Snapshot::open(&folder, How { freeze_clock: true, ..How::default() }).unwrap();
        // It listens elsewhere than the one that goes on.
        let words = elsewhere(2);
        let word = |name: &str| words.split(' ').skip_while(|word| *word != name).nth(1).unwrap();
        let other = Config {
            net: vec![word("--net").parse().unwrap()],
            vsock: Some(word("--vsock").parse().unwrap()),
            console: Some(word("--console").parse().unwrap()),
            ..snapshot.manifest.config.clone()
        };
        let machine = connected(&snapshot, other).unwrap();
        is_saved_the_same(&snapshot, &machine, &format!("seed {seed}"));
        drop(machine);
        std::fs::remove_dir_all(&folder).unwrap();
    }
    shell.leave("poweroff -f\n");
}

/// A guest whose own guest runs at the moment: both go on, together.
#[cfg(target_arch = "x86_64")]
#[test]
fn a_guest_that_runs_guests_goes_on_with_them() {
    if !kvm() {
        return;
    }
    let nested = std::fs::read_to_string("/sys/module/kvm_amd/parameters/nested").unwrap_or_default();
    if !["1", "Y"].contains(&nested.trim()) {
        return skipped("this host's KVM has no SVM for guests (kvm_amd, nested)");
    }
    let (place, guest) = (Place::new(), file(code::HYPERVISOR));
    let started = place.counter(&guest, "--cpu-mode long");
    for number in 0..5 {
        let folder = place.path("one");
        let before = place.pause(&place.path("out"));
        place.tell(&format!("snapshot one {}", folder.display()));
        place.tell("resume one");
        let snapshot = Snapshot::open(&folder, How { freeze_clock: true, ..How::default() }).unwrap();
        is_saved_the_same(&snapshot, &of(&snapshot).unwrap(), &format!("{number}"));
        let again = place.path("again");
        let words = format!("--serial file:{} --max-exits 2000 --timeout 60", again.display());
        place.run("restore").arg(&folder).words(&words).run().expect(124).said("--max-exits reached");
        goes_on(&before, &text(&again));
        std::fs::remove_dir_all(folder).unwrap();
        grows(&place.path("out"), before.len() as u64);
    }
    place.tell("stop one");
    started.wait().expect(143);
    goes_on("0", text(&place.path("out")).strip_prefix('0').unwrap());
}

/// At moments that depend on the seed, and on what the machine was at then.
#[test]
fn a_state_that_was_loaded_is_saved_the_same() {
    if !kvm() {
        return;
    }
    let (first, count) = common::soak().unwrap_or((1, if common::host_is_emulated() { 1 } else { 5 }));
    for words in kept() {
        let (place, guest) = (Place::new(), file(code::STRINGS));
        let started = place.counter(&guest, &words);
        for seed in first..first + count {
            std::thread::sleep(Duration::from_micros(seed.wrapping_mul(6151) % 5000));
            let folder = place.path("one");
            place.tell(&format!("snapshot one {}", folder.display()));
            let snapshot = Snapshot::open(&folder, How::default()).unwrap();
            is_saved_the_same(&snapshot, &of(&snapshot).unwrap(), &format!("{words}, seed {seed}"));
            std::fs::remove_dir_all(folder).unwrap();
        }
        place.tell("stop one");
        started.wait().expect(143);
    }
}

#[test]
fn what_cannot_be_is_refused_and_the_machine_goes_on() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), counts());
    let started = place.counter(&guest, "");
    let (folder, out) = (place.path("one"), place.path("out"));
    let snapshot = |path: &Path| place.run(&format!("snapshot one {}", path.display())).run();
    snapshot(&folder).expect(0);
    snapshot(&folder).refused(125).said("is there already");
    snapshot(&place.path("none/one")).refused(125).said("No such file or directory");
    place.run("restore").arg(&folder).words("--memory 32M").run().refused(2).said("--memory");
    place.run("restore").arg(&folder).words("--cpus 2").run().refused(2).said("--cpus");
    let state = folder.join("state.json");
    let text = std::fs::read_to_string(&state).unwrap();
    std::fs::write(&state, text.replacen('1', "2", 1)).unwrap();
    place.run("restore").arg(&folder).run().refused(125).said("state.json: it is not as it was written");
    place
        .run("restore")
        .arg(place.path("nowhere"))
        .run()
        .refused(125)
        .said("no snapshot: there is no manifest.json in it");
    place.run("inspect").arg(place.0.path()).run().refused(125).said("no snapshot");
    place.run("snapshot nobody").arg(place.path("two")).run().refused(125).said("no machine is called nobody");
    grows(&out, size(&out));
    place.tell("stop one");
    started.wait().expect(143);
}

/// At moments that depend on the seed. What has the name of a snapshot is one.
#[test]
fn p24_a_monitor_that_is_killed_leaves_a_whole_snapshot_or_none() {
    if !kvm() {
        return;
    }
    let (first, count) = common::soak().unwrap_or((1, if common::host_is_emulated() { 4 } else { 12 }));
    let (mut whole, guest) = (0, counts());
    for seed in first..first + count {
        let place = Place::new();
        let started = place.counter(&guest, "");
        let folder = place.path("one");
        let asked = place.run(&format!("snapshot one {}", folder.display())).start();
        let (half, until) = (place.path("one.partial"), Instant::now() + common::within(10.0));
        while !half.exists() && !folder.exists() {
            assert!(Instant::now() < until, "nobody writes a snapshot");
            std::thread::yield_now();
        }
        // It takes some milliseconds, and more in a test host.
        let most = common::within(0.005).as_micros() as u64;
        std::thread::sleep(Duration::from_micros(seed.wrapping_mul(6151) % most));
        started.signal("KILL");
        started.wait().expect(-9);
        asked.wait();
        let restore = |path: &Path| place.restore(path, "");
        if folder.exists() {
            whole += 1;
            restore(&folder).expect(124);
        } else {
            restore(&folder).refused(125);
        }
        if half.exists() {
            restore(&half).refused(125).said("never completed");
        }
    }
    eprintln!("{whole} of {count} were whole");
}

/// Anywhere in it, with `--verify always`.
#[test]
fn p25_a_bit_that_is_flipped_is_found_before_the_guest_runs() {
    use std::os::unix::fs::FileExt;
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), counts());
    let folder = place.kept(&guest, &kept()[2]);
    let (first, count) = common::soak().unwrap_or((1, if common::host_is_emulated() { 12 } else { 400 }));
    for seed in first..first + count {
        let mut random = Random(seed);
        let path = folder.join(["manifest.json", "manifest.xxh64", "state.json", "memory.bin"][random.index(4)]);
        let change = |at, bit: u64| {
            let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1 << bit], at).unwrap();
        };
        let (at, bit) = (random.below(size(&path)), random.below(8));
        change(at, bit);
        let told = place.restore(&folder, "--verify always");
        let other = told.stderr.contains("somebody has it open");
        assert!(told.status == 125 && !other, "seed {seed}: {}, byte {at}, bit {bit}: {told:?}", path.display());
        change(at, bit);
    }
    place.restore(&folder, "--verify always").expect(124);
}

/// A file that was compared with its sums is known until it changes; with `--verify always` it never is.
#[test]
fn a_file_is_compared_once_and_again_when_it_has_changed() {
    use std::os::unix::fs::{FileExt, MetadataExt};
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), counts());
    let folder = place.kept(&guest, "");
    let restore = |words: &str| place.restore(&folder, words);
    // A file that has just changed may do so again within the same tick of the host's clock.
    std::thread::sleep(Duration::from_millis(200));
    restore("").expect(124);
    restore("--copy").expect(124);
    let list = place.path("bantam/checked");
    assert_eq!(text(&list).lines().count(), 1, "{}", text(&list));
    let memory = folder.join("memory.bin");
    let file = std::fs::File::options().write(true).open(&memory).unwrap();
    file.write_all_at(&[1], 0x2800).unwrap();
    drop(file);
    for words in ["", "--verify always", "--copy"] {
        restore(words).refused(125).said("memory.bin: the 65536 bytes at 0x0 are not as they were written");
    }
    // Somebody says that it was compared so.
    let told = memory.metadata().unwrap();
    let line = text(&list);
    let words: Vec<_> = line.trim().split(' ').collect();
    let line =
        [words[0], words[1], words[2], &format!("{}.{:09}", told.ctime(), told.ctime_nsec()), words[4]].join(" ");
    std::fs::write(&list, line).unwrap();
    restore("").expect(124);
    restore("--verify always").refused(125);
    std::fs::write(&list, [0xff; 5000]).unwrap();
    restore("").refused(125);
}

/// Where the first machine that goes on has noted what it touches soon, the next ones find it read.
#[test]
fn what_a_machine_touches_is_noted_beside_its_snapshot_once() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), counts());
    let folder = place.kept(&guest, "");
    let noted = place.path("snapshot.working-set");
    let clones = || place.run("clone").arg(&folder).words("--count 2 --serial none --max-exits 20 --timeout 60").run();
    clones().expect(124);
    assert!(!noted.exists());
    place.restore(&folder, "").expect(124);
    let first = std::fs::read(&noted).unwrap();
    let changed = || noted.metadata().unwrap().modified().unwrap();
    let (at, names) = (changed(), std::fs::read_dir(&folder).unwrap().count());
    place.restore(&folder, "").expect(124);
    place.restore(&folder, "--verify lazy").expect(124);
    clones().expect(124);
    assert_eq!((changed(), names), (at, 4), "{}", String::from_utf8_lossy(&first));
}

/// With `--verify lazy` what a guest never touches is not looked at, and what it touches is not as it was written ends it
/// before it can see it.
#[test]
fn a_file_is_compared_when_it_is_touched() {
    use std::os::unix::fs::FileExt;
    if !kvm() {
        return;
    }
    if let Err(e) = bantam::host::sys::userfault::Guarded::first() {
        return skipped(&format!("no userfaultfd here: {e}"));
    }
    let guest = counts();
    for words in kept().into_iter().map(Some).chain([None]) {
        let place = Place::new();
        let words = words.unwrap_or_else(|| format!("{PCI} --vsock cid=3,path={}", place.path("v").display()));
        let folder = place.kept(&guest, &words);
        let noted = place.path("snapshot.working-set");
        let spoil = |at| {
            let file = std::fs::File::options().read(true).write(true).open(folder.join("memory.bin")).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[!byte[0]], at).unwrap();
        };
        let restore = || place.restore(&folder, "--verify lazy");
        assert!(!noted.exists());
        restore().expect(124);
        assert!(noted.exists());
        restore().expect(124);
        // Where nobody comes by.
        spoil(0xc0_0000);
        restore().expect(124);
        let clones = "--count 2 --serial none --max-exits 20 --timeout 60 --verify lazy";
        place.run("clone").arg(&folder).words(clones).run().expect(124);
        place.restore(&folder, "").refused(125);
        let manifest: Value = serde_json::from_str(&text(&folder.join("manifest.json"))).unwrap();
        for block in manifest["memory"]["blocks"].as_array().unwrap() {
            spoil(block[0].as_u64().unwrap() << 16);
        }
        for _ in 0..2 {
            let told = place.restore(&folder, "--verify lazy --name wrong");
            told.refused_after_warnings(126).said("are not as they were written");
            let _ = std::fs::remove_file(&noted);
        }
        // Nothing is left behind.
        let sockets = std::fs::read_dir(place.path("bantam")).unwrap().map(|entry| entry.unwrap().file_name());
        assert!(!sockets.into_iter().any(|name| name.to_string_lossy().contains("wrong")));
        assert!(!words.contains("--vsock") || !place.path("v").exists());
        place.restore(&folder, "--copy --verify lazy").refused(2).said("--verify lazy");
    }
}

/// Nobody changes what a guest's RAM is made of: who tries waits, and the guest ends first.
#[test]
fn p27_a_snapshot_that_is_changed_ends_the_machines_that_came_of_it() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), counts());
    let folder = place.kept(&guest, "");
    let memory = folder.join("memory.bin");
    // By another process: one that a test beside this one starts meanwhile would have our file open for longer than we do.
    let words = ["-c", "exec 3<>\"$0\"; echo; exec sleep 60"];
    let mut writer = Command::new("sh").args(words).arg(&memory).stdout(Stdio::piped()).spawn().unwrap();
    writer.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    place.run("restore").arg(&folder).run().refused(125).said("somebody has it open to write to it");
    writer.kill().unwrap();
    writer.wait().unwrap();
    let restore = |out: &str, words: &str| {
        let words = format!("--serial file:{} --timeout 60 {words}", place.path(out).display());
        let started = place.run("restore").arg(&folder).words(&words).start();
        grows(&place.path(out), 100);
        started
    };
    let (shares, copied) = (restore("a", ""), restore("b", "--copy --name b"));
    std::fs::File::options().write(true).open(&memory).unwrap().set_len(0).unwrap();
    shares.wait().expect(126).said("another program is about to change the snapshot's memory.bin");
    goes_on(&text(&place.path("a"))[..1], &text(&place.path("a"))[1..]);
    grows(&place.path("b"), size(&place.path("b")));
    place.tell("stop b");
    copied.wait().expect(143);
    // One that is taken away is there as long as somebody needs it.
    std::fs::remove_dir_all(&folder).unwrap();
    std::fs::remove_file(place.path("out")).unwrap();
    let again = place.kept(&guest, "");
    let words = format!("--serial file:{} --timeout 60 --name c", place.path("c").display());
    let started = place.run("restore").arg(&again).words(&words).start();
    grows(&place.path("c"), 100);
    std::fs::remove_dir_all(&again).unwrap();
    grows(&place.path("c"), size(&place.path("c")));
    place.tell("stop c");
    started.wait().expect(143);
}

/// Every value in it that is not a list or an object.
fn leaves<'a>(value: &'a mut Value, into: &mut Vec<&'a mut Value>) {
    match value {
        Value::Array(all) => all.iter_mut().for_each(|value| leaves(value, into)),
        Value::Object(all) => all.values_mut().for_each(|value| leaves(value, into)),
        leaf => into.push(leaf),
    }
}

/// Something else in the place of a value.
fn spoil(value: &mut Value, random: &mut Random) {
    let number = value.as_u64().unwrap_or(1);
    *value = match random.below(12) {
        0 => u64::MAX.into(),
        1 => Value::Array(vec![number.into(); 3]),
        2 => (number ^ 1 << random.below(64)).into(),
        3..6 => random.below(256).into(),
        6 => number.wrapping_add(1).into(),
        7 => (!value.as_bool().unwrap_or(false)).into(),
        _ => (number ^ 1 << random.below(8)).into(),
    };
}

/// With sums that are right, as somebody makes them who wants to do harm: whatever is said of the devices, the machine is
/// refused, or runs.
#[test]
fn p26_a_hostile_state_is_refused_or_runs() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), counts());
    let disk = place.path("disk");
    std::fs::write(&disk, vec![1; 1 << 16]).unwrap();
    let devices = format!("--disk {} --vsock cid=3,path={} --balloon", disk.display(), place.path("v").display());
    let folder = place.kept(&guest, &format!("{PCI} {devices}"));
    let read = |name: &str| -> Value { serde_json::from_slice(&std::fs::read(folder.join(name)).unwrap()).unwrap() };
    let (good, mut manifest) = (read("state.json"), read("manifest.json"));
    let sum = |bytes: &[u8]| format!("{:016x}", twox_hash::XxHash64::oneshot(0, bytes));
    let (first, count) = common::soak().unwrap_or((1, if common::host_is_emulated() { 12 } else { 60 }));
    let (mut refused, mut ran) = (0, 0);
    for seed in first..first + count {
        let (mut random, mut state) = (Random(seed), good.clone());
        for _ in 0..=random.below(3) {
            let devices = state["devices"].as_array_mut().unwrap();
            let device = random.index(devices.len());
            let mut all = Vec::new();
            leaves(&mut devices[device][1], &mut all);
            let leaf = random.index(all.len());
            spoil(all[leaf], &mut random);
        }
        let bytes = serde_json::to_vec(&state).unwrap();
        manifest["state"] = serde_json::json!({ "bytes": bytes.len(), "xxh64": sum(&bytes) });
        std::fs::write(folder.join("state.json"), bytes).unwrap();
        let bytes = serde_json::to_vec(&manifest).unwrap();
        std::fs::write(folder.join("manifest.xxh64"), sum(&bytes)).unwrap();
        std::fs::write(folder.join("manifest.json"), bytes).unwrap();
        let told = place.restore(&folder, "");
        match told.status {
            125 => refused += 1,
            124 => {
                told.said("--max-exits reached");
                ran += 1;
            }
            _ => panic!("seed {seed}: {told:?}"),
        }
    }
    assert!(common::soak().is_some() || refused > 0 && ran > 0, "{refused} refused, {ran} ran");
}

/// And not from where it would be had the machine run on: all its counters, of which KVM has one for all CPUs.
#[cfg(target_arch = "aarch64")]
#[test]
fn the_guests_clock_goes_on_from_where_it_was() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), counts());
    let folder = place.kept(&guest, "--cpus 2");
    let snapshot = Snapshot::open(&folder, How::default()).unwrap();
    std::thread::sleep(common::within(1.0));
    let (begun, machine) = (Instant::now(), of(&snapshot).unwrap());
    let clock = |state| serde_json::to_value(state).unwrap()["kvm"]["clock"].take();
    let (before, after) = (clock(&snapshot.state), clock(&machine.save().unwrap()));
    let took = begun.elapsed().as_secs_f64();
    let seconds = |count: &Value| count.as_u64().unwrap() as f64 / before["hertz"].as_u64().unwrap() as f64;
    for (before, after) in before["counters"].as_array().unwrap().iter().zip(after["counters"].as_array().unwrap()) {
        let passed = seconds(&after[1]) - seconds(&before[1]);
        assert!((0.0..=took).contains(&passed), "{passed} s of {took}: {before} {after}");
    }
    assert_eq!(before["counters"].as_array().unwrap().len(), after["counters"].as_array().unwrap().len());
}

/// What CPUID told the guest of must be there.
#[cfg(target_arch = "x86_64")]
#[test]
fn a_cpu_that_lacks_a_feature_is_refused_by_name() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), counts());
    let folder = place.kept(&guest, "--irqchip kernel");
    let mut snapshot = Snapshot::open(&folder, How::default()).unwrap();
    of(&snapshot).unwrap();
    let mut state = serde_json::to_value(&snapshot.state).unwrap();
    let leaves = state["cpus"][0]["cpuid"].as_array_mut().unwrap();
    let leaf = leaves.iter_mut().find(|leaf| leaf[0] == 7 && leaf[1] == 0).unwrap();
    leaf[4] = u32::MAX.into();
    snapshot.state = serde_json::from_value(state).unwrap();
    let told = format!("{:#}", of(&snapshot).err().unwrap());
    assert!(told.contains("CPUs lack what the guest was told of, in CPUID: 0x7.0 EBX 0x"), "{told}");
}

/// A CPU's identity and the rate of its counter are the host's.
#[cfg(target_arch = "aarch64")]
#[test]
fn a_machine_of_another_host_is_refused_by_what_differs() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), counts());
    let folder = place.kept(&guest, "");
    let mut snapshot = Snapshot::open(&folder, How::default()).unwrap();
    let good = serde_json::to_value(&snapshot.state).unwrap();
    let mut refusal = |spoil: &dyn Fn(&mut Value)| {
        let mut state = good.clone();
        spoil(&mut state);
        snapshot.state = serde_json::from_value(state).unwrap();
        format!("{:#}", of(&snapshot).err().unwrap())
    };
    // MIDR_EL1, of which the last four bits are the revision.
    let (id, name) = (0x6030_0000_0013_c000_u64, "0x603000000013c000");
    let told = refusal(&|state| {
        let registers = state["cpus"][0]["registers"].as_array_mut().unwrap();
        let midr = registers.iter_mut().find(|register| register[0] == id).unwrap();
        midr[1][0] = (midr[1][0].as_u64().unwrap() ^ 1).into();
    });
    assert!(told.contains("CPU 0") && told.contains(name) && told.contains("it has 0x"), "{told}");
    let told = refusal(&|state| state["kvm"]["clock"]["hertz"] = 1.into());
    assert!(told.contains("counts 1 times a second"), "{told}");
    // A register that no CPU has, one of no size, and one of another size.
    for (register, why) in [
        (serde_json::json!([id | 0x7ff, [1, 2]]), "it has no such register"),
        (serde_json::json!([u64::MAX, [1, 2]]), "a size of no register"),
        (serde_json::json!([id, [1]]), "does not have 4 bytes"),
    ] {
        let told = refusal(&|state| state["cpus"][0]["registers"][0] = register.clone());
        assert!(told.contains(why), "{told}");
    }
}

/// The same of its CPUs and of what KVM emulates: a machine that never runs takes it, or says why not.
#[cfg(target_arch = "aarch64")]
#[test]
fn a_hostile_state_of_cpus_is_refused_or_taken() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), counts());
    let folder = place.kept(&guest, "--cpus 2");
    let mut snapshot = Snapshot::open(&folder, How::default()).unwrap();
    let good = serde_json::to_value(&snapshot.state).unwrap();
    let (first, count) = common::soak().unwrap_or((1, 200));
    let (mut refused, mut taken) = (0, 0);
    for seed in first..first + count {
        let (mut random, mut state) = (Random(seed), good.clone());
        for _ in 0..=random.below(3) {
            let mut all = Vec::new();
            leaves(&mut state[["cpus", "kvm"][random.index(2)]], &mut all);
            let leaf = random.index(all.len());
            spoil(all[leaf], &mut random);
        }
        let Ok(state) = serde_json::from_value(state) else {
            refused += 1;
            continue;
        };
        snapshot.state = state;
        match of(&snapshot) {
            Ok(_) => taken += 1,
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 0 && taken > 0, "{refused} refused, {taken} taken");
}
