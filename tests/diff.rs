//! Snapshots that hold only what has changed since another, and what they make together.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::arch::SWEEP;
use common::counting::{counts, goes_on, swept, text};
use common::place::{Place, grows};
use common::{code, file, kvm};

/// A machine that has much RAM of which it changes little: a counter, and behind it 512 KiB that nobody touches.
fn heavy() -> common::File {
    file(&[code::COUNTS, &vec![0xa5; 512 << 10]].concat())
}

/// How many KiB of RAM it says that it holds.
fn kib(told: &str) -> u64 {
    told.split_once("K of RAM").and_then(|(size, _)| size.parse().ok()).unwrap_or_else(|| panic!("{told}"))
}

/// What a counter changes, and on arm64 what an interrupt controller keeps in RAM and the generation id.
const LITTLE: u64 = if cfg!(target_arch = "x86_64") { 64 } else { 192 };

/// How many bytes a file takes on the disk.
fn held(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(path).unwrap()) * 512
}

/// Each goes on behind what the machine had printed when the last of them was written.
#[test]
fn differences_hold_what_has_changed_and_become_a_whole_one() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), heavy());
    let started = place.counter(&guest, "");
    let snapshot = |name: &str, words: &str| {
        let printed = place.pause(&place.path("out"));
        let told = place.tell(&format!("snapshot one {} {words}", place.path(name).display())).out();
        place.tell("resume one");
        grows(&place.path("out"), printed.len() as u64);
        (printed, told)
    };
    let early = place.run(&format!("snapshot one {} --diff", place.path("early").display())).run();
    early.refused(125).said("no snapshot yet that there could be a difference from; take a whole one first");
    assert!(!place.path("early").exists());
    let (_, told) = snapshot("0", "");
    assert!((576..=768).contains(&kib(&told)), "{told}");
    let mut printed = Vec::new();
    for name in ["1", "2", "3"] {
        let (so_far, told) = snapshot(name, "--diff");
        assert!(kib(&told) <= LITTLE, "{told}");
        assert!(held(&place.path(name).join("memory.bin")) <= LITTLE << 10);
        printed.push(so_far);
    }
    assert!(held(&place.path("0/memory.bin")) > 500 << 10);
    place.tell("stop one");
    started.wait().expect(143);
    let all = ["0", "1", "2", "3"].map(|name| place.path(name));
    let merge = |from: &[&Path], into: &str| {
        let words = from.iter().fold(place.run("snapshot merge"), |run, path| run.arg(path));
        words.arg(place.path(into)).run()
    };
    let [whole, one, two, three] = &all;
    for (from, into) in [(vec![whole, one], "01"), (vec![two, three], "23")] {
        merge(&from.iter().map(|path| path.as_path()).collect::<Vec<_>>(), into).expect(0).said_nothing();
    }
    merge(&[&place.path("01"), &place.path("23")], "0123").expect(0);
    merge(&[&place.path("01"), two], "012").expect(0);
    let last = |so_far: &str| so_far[so_far.len() - 1..].to_owned();
    for (name, so_far) in [("01", &printed[0]), ("012", &printed[1]), ("0123", &printed[2])] {
        let again = place.path("again");
        let words = format!("--serial file:{} --max-exits 2000 --timeout 60", again.display());
        place.run("restore").arg(place.path(name)).words(&words).run().expect(124).said("--max-exits reached");
        goes_on(&last(so_far), &text(&again));
    }
    let needs = "only what has changed since the moment";
    place.restore(three, "").refused(125).said(needs).said("hint: make a whole one first: bantam snapshot merge BASE ");
    place.run("clone").arg(place.path("23")).run().refused(125).said(needs);
    merge(&[whole, two], "wrong").refused(125).said("2: it differs from the moment");
    let shown = |path: &Path| place.run("inspect").arg(path).run().expect(0).out();
    let moment = |path: &Path| shown(path).lines().find_map(|l| l.strip_prefix("moment: ")).unwrap().to_owned();
    assert!(shown(two).contains(&format!("difference: from the moment {}", moment(one))), "{}", shown(two));
    assert_eq!(moment(&place.path("0123")), moment(three));
}

/// A guest that writes to all of its RAM while what has changed is written: that is of one moment too, each time.
#[test]
fn a_difference_is_of_one_moment() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), file(code::SWEEPS));
    let started = place.counter(&guest, SWEEP);
    let folder = |name: &str, number: u32| place.path(&format!("{name}{number}"));
    place.tell(&format!("snapshot one {}", folder("merged", 0).display()));
    let (mut whole, count) = (0, if common::host_is_emulated() { 4 } else { 15 });
    for number in 1..=count {
        let (before, diff, merged) = (folder("merged", number - 1), folder("diff", number), folder("merged", number));
        let told = place.tell(&format!("snapshot one {} --diff", diff.display())).out();
        if told.contains("until all was written") {
            common::skipped(&told);
            break;
        }
        place.run("snapshot merge").arg(&before).arg(&diff).arg(&merged).run().expect(0);
        whole += u32::from(swept(&merged));
        [before, diff].iter().for_each(|folder| std::fs::remove_dir_all(folder).unwrap());
    }
    eprintln!("{whole} of {count} between two rounds");
    place.tell("stop one");
    started.wait().expect(143);
}

/// What came of a snapshot, its RAM shared or copied, has one that later ones differ from; a clone of a machine that runs has not.
#[test]
fn a_machine_that_was_restored_differs_from_its_snapshot() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), heavy());
    let folder = place.kept(&guest, "");
    let last = text(&place.path("out"));
    let lazy = bantam::host::sys::userfault::Guarded::first().is_ok();
    for words in ["", "--copy", "--verify lazy"].into_iter().take(if lazy { 3 } else { 2 }) {
        let out = place.path(&format!("out{}", words.len()));
        std::fs::remove_file(&out).unwrap_or_default();
        let words = format!("--name one --serial file:{} --timeout 60 {words}", out.display());
        let started = place.run("restore").arg(&folder).words(&words).start();
        grows(&out, 100);
        let printed = place.pause(&out);
        goes_on(&last[last.len() - 1..], &printed);
        let told = place.tell(&format!("snapshot one {} --diff", place.path("1").display())).out();
        assert!(kib(&told) <= LITTLE, "{told}");
        place.tell("stop one");
        started.wait().expect(143);
        place.run("snapshot merge").arg(&folder).arg(place.path("1")).arg(place.path("2")).run().expect(0);
        let again = place.path("again");
        let words = format!("--serial file:{} --max-exits 2000 --timeout 60", again.display());
        place.run("restore").arg(place.path("2")).words(&words).run().expect(124);
        goes_on(&printed[printed.len() - 1..], &text(&again));
        ["1", "2"].iter().for_each(|name| std::fs::remove_dir_all(place.path(name)).unwrap());
    }
}

/// Of a machine that is being cloned a snapshot is taken that is gone soon: nothing is a difference from it.
#[test]
fn a_snapshot_that_is_not_kept_is_nothing_to_differ_from() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), counts());
    let started = place.counter(&guest, "");
    let diff = |of: &str, name: &str| place.run(&format!("snapshot {of} {} --diff", place.path(name).display())).run();
    place.tell(&format!("snapshot one {}", place.path("0").display()));
    let words = format!("--name two --serial file:{} --timeout 60", place.path("two").display());
    let cloned = place.run("clone one").words(&words).start();
    grows(&place.path("two"), 0);
    diff("two", "1").refused(125).said("take a whole one first");
    place.tell("stop two");
    cloned.wait().expect(143);
    diff("one", "1").expect(0);
    place.tell("stop one");
    started.wait().expect(143);
    place.run("snapshot merge").arg(place.path("0")).arg(place.path("1")).arg(place.path("2")).run().expect(0);
}

/// At moments that depend on the seed: what has the name of what was merged is a whole snapshot, and what it was made of stays.
#[test]
fn a_merge_that_is_killed_leaves_a_whole_snapshot_or_none() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), heavy());
    let started = place.counter(&guest, "");
    let folders = ["0", "1"].map(|name| place.path(name));
    place.tell(&format!("snapshot one {}", folders[0].display()));
    place.tell(&format!("snapshot one {} --diff", folders[1].display()));
    place.tell("stop one");
    started.wait().expect(143);
    let merge = || place.run("snapshot merge").arg(&folders[0]).arg(&folders[1]).arg(place.path("2"));
    let begun = Instant::now();
    merge().run().expect(0);
    let most = begun.elapsed().as_micros() as u64;
    let (first, count) = common::soak().unwrap_or((1, if common::host_is_emulated() { 6 } else { 24 }));
    let (mut whole, mut half) = (0, 0);
    for seed in first..first + count {
        let _ = std::fs::remove_dir_all(place.path("2"));
        let merging = merge().start();
        std::thread::sleep(Duration::from_micros(seed.wrapping_mul(6151) % most));
        merging.signal("KILL");
        merging.wait();
        half += usize::from(place.path("2.partial").exists());
        if place.path("2").exists() {
            whole += 1;
            place.restore(&place.path("2"), "").expect(124);
        }
    }
    eprintln!("{whole} of {count} were whole, {half} were begun");
    let _ = std::fs::remove_dir_all(place.path("2"));
    merge().run().expect(0);
    assert!(!place.path("2.partial").exists());
}
