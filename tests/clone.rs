//! Many machines of one.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use common::arch::SWEEP;
use common::counting::{counts, goes_on, swept, text};
use common::place::{Place, grows, size};
use common::{code, file, kvm};

impl Place {
    fn clone(&self, of: &Path, words: &str) -> common::Run {
        self.run("clone").arg(of).words(words).words("--timeout 60")
    }
}

#[test]
fn p28_many_clones_of_one_snapshot_all_go_on_each_by_itself() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), counts());
    let folder = place.kept(&guest, "");
    let before = text(&place.path("out"));
    let count = if common::host_is_emulated() { 8 } else { 64 };
    let out = place.path("{}.out");
    let words = format!("--count {count} --name c --serial file:{}", out.display());
    let started = place.clone(&folder, &words).start();
    let outs: Vec<_> = (1..=count).map(|number| place.path(&format!("{number}.out"))).collect();
    outs.iter().for_each(|out| grows(out, 20));
    // All at once, each with a name of its own.
    let listed = place.run("ps").run().expect(0).out();
    let names: BTreeSet<_> = listed.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect();
    let wanted: BTreeSet<_> = (1..=count).map(|number| format!("c-{number}")).collect();
    assert!(names.iter().copied().eq(wanted.iter().map(String::as_str)), "{listed}");
    // One that is stopped is none of the others' business; nor is one that is killed.
    place.tell("stop c-2");
    let second = size(&outs[1]);
    grows(&outs[0], size(&outs[0]));
    assert_eq!(size(&outs[1]), second);
    started.signal("TERM");
    started.wait().expect(143).said("clones ended with a status that is not 0; the first, 1, with 143");
    outs.iter().for_each(|out| goes_on(&before, &text(out)));
    let left = place.run("ps").run().expect(0).out();
    assert_eq!(left.lines().count(), 1, "{left}");
    // No page that they wrote is in the snapshot.
    place.clone(&folder, "--verify always --serial none --max-exits 200").run().expect(124);
}

#[test]
fn a_machine_that_runs_is_cloned_and_none_the_worse_for_it() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), counts());
    let started = place.counter(&guest, "");
    let words = format!("--count 2 --max-exits 2000 --serial file:{}", place.path("{}").display());
    place.clone(Path::new("one"), &words).run().expect(124);
    for out in ["1", "2"] {
        let out = text(&place.path(out));
        goes_on(&out[..1], &out[1..]);
    }
    let out = place.path("out");
    grows(&out, size(&out));
    place.tell("stop one");
    started.wait().expect(143);
    goes_on("0", &text(&out));
    place.clone(Path::new("one"), "").run().refused(125).said("no machine is called one");
    place.clone(Path::new("./one"), "").run().refused(125).said("./one: there is no such folder");
    place.clone(Path::new("one"), "--count 0").run().refused(2).said("--count");
}

/// A guest that writes to all of its RAM while that is kept, its own or that of a snapshot: what a snapshot holds is of one
/// moment.
#[test]
fn what_a_guest_writes_after_the_moment_is_not_in_the_snapshot() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), file(code::SWEEPS));
    let mut started = place.counter(&guest, SWEEP);
    let count = if common::host_is_emulated() { 4 } else { 20 };
    for of in ["run", "restore"] {
        let (mut whole, mut cut) = (0, 0);
        for number in 0..count {
            let folder = place.path(&format!("{number}.snapshot"));
            let told = place.tell(&format!("snapshot one {}", folder.display())).out();
            if told.contains("until all was written") {
                // A machine that came of a snapshot takes no more than a process that can be looked into.
                assert_eq!(of, "run", "{told}");
                common::skipped(&told);
                break;
            }
            match swept(&folder) {
                true => whole += 1,
                false => cut += 1,
            }
            std::fs::remove_dir_all(folder).unwrap();
        }
        eprintln!("{of}: {whole} between two rounds, {cut} in one");
        grows(&place.path("out"), size(&place.path("out")));
        let folder = place.path("kept");
        if of == "run" {
            place.tell(&format!("snapshot one {}", folder.display()));
        }
        place.tell("stop one");
        started.wait().expect(143);
        if of == "restore" {
            break;
        }
        std::fs::remove_file(place.path("out")).unwrap();
        let words = format!("--name one --serial file:{} --timeout 60", place.path("out").display());
        started = place.run("restore").arg(&folder).words(&words).start();
        grows(&place.path("out"), 0);
    }
}

/// What an overlay holds is nobody else's.
#[test]
fn a_machine_that_writes_to_an_overlay_has_no_snapshots() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), counts());
    std::fs::write(place.path("disk"), vec![1; 1 << 16]).unwrap();
    for own in ["overlay", "copy"] {
        let disk = format!("--disk {},{own} --irqchip kernel", place.path("disk").display());
        let started = place.counter(&guest, &disk);
        let told = place.run("snapshot one").arg(place.path("snapshot")).run();
        told.refused(125).said("what the machine has written there ends with it");
        assert!(!place.path("snapshot").exists() && !place.path("snapshot.partial").exists());
        grows(&place.path("out"), size(&place.path("out")));
        place.tell("stop one");
        started.wait().expect(143);
        std::fs::remove_file(place.path("out")).unwrap();
    }
}

/// Its clones have what was there when they were made, whatever it writes afterwards.
#[test]
fn a_machine_that_writes_to_a_disk_is_cloned_with_it() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), counts());
    let (disk, shared) = (place.path("disk"), place.path("shared"));
    std::fs::write(&disk, vec![1; 1 << 16]).unwrap();
    std::fs::write(&shared, vec![5; 1 << 16]).unwrap();
    let words = format!("--disk {},ro --disk {} --irqchip kernel", shared.display(), disk.display());
    let started = place.counter(&guest, &words);
    for mode in ["", "--disk-mode copy"] {
        std::fs::write(&disk, vec![1; 1 << 16]).unwrap();
        let words = format!("--count 2 {mode} --name c --serial file:{}", place.path("{}").display());
        let own = place.0.path().to_str().unwrap();
        let clones = place.clone(Path::new("one"), &words).env("TMPDIR", own).start();
        ["1", "2"].iter().for_each(|out| grows(&place.path(out), 10));
        std::fs::write(&disk, vec![2; 1 << 16]).unwrap();
        // Of the one that is read only there is no copy, and of the other one has no name.
        let copies = deleted(clones.pid());
        assert!(!copies.is_empty() && copies.iter().all(|copy| *copy == [1; 1 << 16]), "{}", copies.len());
        clones.signal("TERM");
        clones.wait().expect(143).said("one stood still for").said("until 1 of its disks were copied");
        ["1", "2"].iter().for_each(|out| std::fs::remove_file(place.path(out)).unwrap());
        assert!(!std::fs::read_dir(place.0.path()).unwrap().any(|entry| {
            let name = entry.unwrap().file_name();
            name.to_string_lossy().starts_with("bantam-clone-")
        }));
    }
    place.clone(Path::new("one"), "--disk-mode share-ro").run().refused(2).said("the machine writes to");
    // So has a snapshot, if it is asked to.
    let (folder, copies) = (place.path("folder"), place.path("copies"));
    place.run("snapshot one").arg(&folder).words("--disks").arg(&copies).run().expect(0);
    std::fs::write(&disk, vec![3; 1 << 16]).unwrap();
    assert!(std::fs::read(copies.join("1")).unwrap() == [2; 1 << 16] && !copies.join("0").exists());
    place.run("snapshot one").arg(place.path("again")).words("--disks").arg(&copies).run().refused(125).said("exists");
    let exchanged = format!("--disk {}={} --serial none --max-exits 50", disk.display(), copies.join("1").display());
    place.run("restore").arg(&folder).words(&exchanged).run().expect(124);
    // What comes to nothing leaves nothing; nobody else's file is taken for the disk.
    let told = |folder: &Path| place.run("snapshot one").arg(folder).words("--disks").arg(place.path("more")).run();
    told(&folder).refused(125).said("is there already");
    std::fs::rename(&disk, place.path("moved")).unwrap();
    std::fs::write(&disk, vec![3; 1 << 16]).unwrap();
    told(&place.path("again")).refused(125).said("another file has its name now");
    assert!(!place.path("more").exists() && !place.path("again").exists());
    place.clone(Path::new("one"), "").run().refused(125).said("another file has its name now");
    grows(&place.path("out"), size(&place.path("out")));
    place.tell("stop one");
    started.wait().expect(143);
}

/// While its disk is copied it stands still, and hears who wants to know, or to end it.
#[test]
fn a_machine_whose_disk_is_copied_is_not_deaf() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), counts());
    let (disk, copies) = (place.path("disk"), place.path("copies"));
    let large = if common::host_is_emulated() { 48 << 20 } else { 192 << 20 };
    std::fs::write(&disk, vec![1; large]).unwrap();
    let started = place.counter(&guest, &format!("--disk {} --irqchip kernel", disk.display()));
    let keeps = place.run("snapshot one").arg(place.path("folder")).words("--disks").arg(&copies).start();
    grows(&copies.join("0"), 0);
    let copy = std::fs::File::open(copies.join("0")).unwrap();
    let stream = UnixStream::connect(place.path("bantam/one.sock")).unwrap();
    let mut answers = BufReader::new(&stream);
    let mut ask = |request: &str| {
        (&stream).write_all(request.as_bytes()).unwrap();
        let mut line = String::new();
        answers.read_line(&mut line).unwrap();
        line
    };
    let is_copied = || {
        let mut last = [0];
        copy.read_exact_at(&mut last, large as u64 - 1).unwrap();
        last == [1]
    };
    let state = |told: String| told.split("\"state\":\"").nth(1).unwrap_or(&told).split('"').next().unwrap().to_owned();
    assert_eq!(state(ask("{\"ping\":{}}\n")), "running");
    for (request, then) in [("pause", "paused"), ("resume", "running"), ("pause", "paused")] {
        assert_eq!(ask(&format!("{{\"{request}\":{{}}}}\n")), "{\"ok\":null}\n");
        assert_eq!(state(ask("{\"ping\":{}}\n")), then);
    }
    let early = !is_copied();
    assert_eq!(ask("{\"stop\":{}}\n"), "{\"ok\":null}\n");
    started.wait().expect(143);
    let told = keeps.wait();
    if early && told.status != 0 {
        told.refused(125).said("the machine");
        assert!(!place.path("folder").exists() && !copies.exists());
    } else {
        common::skipped("the disk was copied before anybody could ask");
    }
}

/// What is in the files without a name, of disks, that a process has.
fn deleted(pid: i32) -> Vec<Vec<u8>> {
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|entry| entry.unwrap().path());
    let name = |fd: &Path| std::fs::read_link(fd).unwrap_or_default().display().to_string();
    let copies = open.filter(|fd| name(fd).contains("/disks/") && name(fd).ends_with("(deleted)"));
    copies.map(|copy| std::fs::read(copy).unwrap()).collect()
}

/// Whoever asks for what, and when: each gets one answer, and the machine goes on.
#[test]
fn p34_those_who_pause_and_those_who_keep_a_machine_do_not_meet() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), counts());
    let started = place.counter(&guest, "");
    meet(&place);
    place.tell(&format!("snapshot one {}", place.path("kept").display()));
    place.tell("stop one");
    started.wait().expect(143);
    // One whose RAM another process keeps.
    let words = format!("--name one --timeout 60 --serial file:{}", place.path("out").display());
    std::fs::remove_file(place.path("out")).unwrap();
    let started = place.run("restore").arg(place.path("kept")).words(&words).start();
    grows(&place.path("out"), 0);
    meet(&place);
    place.tell("stop one");
    started.wait().expect(143);
}

fn meet(place: &Place) {
    for number in 0..if common::host_is_emulated() { 3 } else { 12 } {
        let folder = place.path(&number.to_string());
        let keeps = place.run("snapshot one").arg(&folder).start();
        std::thread::sleep(std::time::Duration::from_micros(number * 300));
        let pauses = place.run("pause one").start();
        let again = place.run("snapshot one").arg(place.path("again")).run();
        let first = keeps.wait();
        // Of two that meet one is refused.
        let late = |told: &common::Outcome| told.status == 125 && told.stderr.contains("is being written");
        assert!(first.status == 0 && (again.status == 0 || late(&again)) || late(&first) && again.status == 0);
        let folder = if first.status == 0 { folder } else { place.path("again") };
        pauses.wait().expect(0);
        let before = size(&place.path("out"));
        place.tell("resume one");
        grows(&place.path("out"), before);
        place.clone(&folder, "--serial none --max-exits 50").run().expect(124);
        let _ = std::fs::remove_dir_all(place.path("again"));
        let _ = std::fs::remove_dir_all(place.path(&number.to_string()));
    }
}

#[test]
fn clones_end_with_who_made_them() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), counts());
    let folder = place.kept(&guest, "");
    let words = format!("--count 2 --name c --serial file:{}", place.path("{}").display());
    let started = place.clone(&folder, &words).start();
    ["1", "2"].iter().for_each(|out| grows(&place.path(out), 10));
    started.signal("KILL");
    started.wait().expect(-9);
    let until = std::time::Instant::now() + common::within(10.0);
    while place.run("ps").run().out().lines().count() > 1 {
        assert!(std::time::Instant::now() < until, "they go on");
    }
}

#[test]
fn a_clone_has_sockets_and_disks_of_its_own() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), counts());
    let (disk, copy) = (place.path("disk"), place.path("copy"));
    std::fs::write(&disk, vec![1; 1 << 16]).unwrap();
    std::fs::copy(&disk, &copy).unwrap();
    let vsock = place.path("v");
    let words = format!("--irqchip kernel --disk {} --vsock cid=3,path={}", disk.display(), vsock.display());
    let folder = place.kept(&guest, &words);
    let shown = place.run("inspect").arg(&folder).run().expect(0).out();
    assert!(shown.contains(&format!("disk: {}, 65536 bytes", disk.display())), "{shown}");
    // Two that write to one disk cannot be; two that write beside it can.
    let sockets = || {
        let names = std::fs::read_dir(place.0.path()).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| name.to_string_lossy().starts_with("v-")).count()
    };
    for mode in ["", "--disk-mode copy"] {
        let words = format!("--count 2 {mode} --serial file:{}", place.path("{}").display());
        let started = place.clone(&folder, &words).start();
        ["1", "2"].iter().for_each(|out| grows(&place.path(out), 10));
        assert_eq!(sockets(), 2);
        started.signal("TERM");
        started.wait().expect(143);
        assert_eq!(sockets(), 0);
        ["1", "2"].iter().for_each(|out| std::fs::remove_file(place.path(out)).unwrap());
    }
    place.clone(&folder, "--disk-mode share-ro").run().refused(2).said("the machine writes to");
    // Another file for a disk, if it is as long.
    let restore = |words: &str| place.restore(&folder, words);
    restore(&format!("--disk {}={}", disk.display(), copy.display())).expect(124);
    restore(&format!("--disk {}", copy.display())).refused(2).said("has the disks of its snapshot");
    restore("--net user").refused(2).said("the machine had 0 of them, and 1 are named");
    restore(&format!("--vsock path={}", place.path("w").display())).expect(124);
    std::fs::write(&disk, vec![2; 1 << 16]).unwrap();
    restore("").refused(125).said("has been written to since");
    restore(&format!("--disk {}={}", disk.display(), copy.display())).expect(124);
    std::fs::write(&copy, vec![2; 1 << 15]).unwrap();
    restore(&format!("--disk {}={}", disk.display(), copy.display())).refused(125).said("it has 32768 bytes");
}
