use std::os::unix::fs::FileExt;

use super::ram::BLOCK;
use super::write::begin;
use super::*;
use crate::config::Switch;

mod diff;

const PAGE: u64 = 0x1000;

/// RAM of three mappings.
fn spans() -> [Span; 3] {
    [(0, 16 * BLOCK), (1 << 24, PAGE), (1 << 32, 3 * BLOCK + PAGE)].map(|(start, size)| Span { start, size })
}

fn ram() -> Memory {
    Memory::new(&spans(), false).unwrap()
}

const COPY: How = How { verify: Verify::Always, copy: true, freeze_clock: true, note: None };
pub const LAZY: How = How { verify: Verify::Lazy, copy: false, freeze_clock: true, note: None };
/// Whatever takes long here.
const HOUR: Option<Duration> = Some(Duration::from_secs(3600));
const MAP: How = How { verify: Verify::Always, copy: false, freeze_clock: true, note: None };

fn bell() -> Bell {
    Bell::new().unwrap()
}

/// Some of it written.
fn written() -> Memory {
    let memory = ram();
    for at in [0, 5 * BLOCK - 2, 16 * BLOCK - 1, (1 << 24) + 7, (1 << 32) + 3 * BLOCK + PAGE - 1] {
        memory.write(at, &[at as u8 | 1]).unwrap();
    }
    memory.write(5 * BLOCK - 2, &[1, 2, 3, 4]).unwrap();
    // Touched, and all zeroes.
    memory.write(9 * BLOCK, &[0]).unwrap();
    memory
}

fn all(memory: &Memory) -> Vec<u8> {
    let mut bytes = Vec::new();
    for slot in memory.slots() {
        let mut part = vec![0; slot.span.size as usize];
        memory.read(slot.span.start, &mut part).unwrap();
        bytes.extend(part);
    }
    bytes
}

fn state() -> State {
    let text = if cfg!(target_arch = "x86_64") {
        r#"{"at":5,"cpus":[{"tsc_khz":null,"cpuid":[],"parts":[{"name":"regs","words":[1,2]}],"msrs":[[16,5]]}],"kvm":{"parts":[],"rates":[],"times":[],
            "clock":{"name":"clock","words":[]}},
            "devices":[["serial",{"version":1,"state":{"x":1}}]]}"#
    } else {
        r#"{"at":5,"cpus":[{"mp_state":0,"registers":[[6931039826524241920,[1,2]]],"serror":false,"syndrome":null}],
            "kvm":{"clock":{"hertz":1,"counters":[]},"gic":null},
            "devices":[["serial",{"version":1,"state":{"x":1}}]]}"#
    };
    serde_json::from_str(text).unwrap()
}

fn at(path: &Path) -> Target {
    Target { path: path.into(), keep: true, disks: None }
}

fn write(target: &Target, guest: &str, config: &Config, state: &State, memory: &Memory) -> Result<Written> {
    let never = std::sync::atomic::AtomicBool::new(false);
    let written = Taken::new(guest, config.clone(), state.clone())?.write(Moment::still(memory), target, &never)?;
    settled(&target.path);
    Ok(written)
}

/// A process that another test starts has what this one had open for a moment longer, to write to it.
fn settled(path: &Path) {
    let until = std::time::Instant::now() + Duration::from_secs(5);
    let is_open = || Snapshot::open(path, MAP).err().is_some_and(|e| e.to_string().contains("somebody has it open"));
    while is_open() && std::time::Instant::now() < until {}
}

/// A folder with a snapshot in it.
fn snapshot() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("one");
    let config = Config { rng: Some(Switch::On), ..Config::default() };
    let Written { memory, .. } = write(&at(&path), "guest", &config, &state(), &written()).unwrap();
    assert_eq!(memory, 6 * BLOCK);
    (folder, path)
}

#[test]
fn what_was_written_is_read() {
    let (folder, path) = snapshot();
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["one"], "nothing else is left");
    // Sparse: most of it is no block on the disk.
    let file = path.join(MEMORY).metadata().unwrap();
    assert!(file.len() == 21 * BLOCK && file.blocks() * 512 < 10 * BLOCK, "{} {}", file.len(), file.blocks());
    for how in [MAP, COPY] {
        let snapshot = Snapshot::open(&path, how).unwrap();
        assert_eq!((&snapshot.state, snapshot.manifest.config.rng), (&state(), Some(Switch::On)));
        let memory = snapshot.memory(&spans(), bell).unwrap();
        assert!(all(&memory) == all(&written()) && memory.is_of_an_image() != how.copy);
        // What came of a snapshot is one again.
        memory.write(12 * BLOCK, b"new").unwrap();
        let again = folder.path().join(format!("again-{}", how.copy));
        write(&at(&again), "guest", &Config::default(), &state(), &memory).unwrap();
        let after = Snapshot::open(&again, how).unwrap();
        assert!(all(&after.memory(&spans(), bell).unwrap()) == all(&memory));
        assert_eq!(after.manifest.memory.kept(), 7 * BLOCK);
        std::fs::remove_dir_all(again).unwrap();
    }
    let snapshot = Snapshot::open(&path, MAP).unwrap();
    let shown = snapshot.manifest.to_string();
    assert!(shown.contains("guest: guest") && shown.contains("384K that are not zeroes"), "{shown}");
}

/// RAM that was just made, and that is mapped from a snapshot.
#[test]
fn what_is_written_is_what_was_there_at_the_moment() {
    let (folder, path) = snapshot();
    let mapped = Snapshot::open(&path, MAP).unwrap().memory(&spans(), bell).unwrap();
    mapped.write(12 * BLOCK, b"own").unwrap();
    for memory in [written(), mapped] {
        let before = all(&memory);
        let (mut watched, now) = (Watched::new(&memory), bell());
        now.ring();
        watched.watch(&now).unwrap();
        let (moment, still) = watched.freeze().unwrap();
        if let Some(why) = still {
            crate::host::skipped(&why);
            continue;
        }
        // What was its own, what it shared, what was given back, and what nobody had touched.
        let guest = memory.clone();
        let writer = std::thread::spawn(move || {
            for block in 0..16 {
                guest.give_back(Span { start: (block + 1) % 16 * BLOCK, size: BLOCK });
                guest.write(block * BLOCK, &[0x55; 9]).unwrap();
            }
        });
        let (again, never) = (folder.path().join("again"), std::sync::atomic::AtomicBool::new(false));
        let taken = Taken::new("guest", Config::default(), state()).unwrap();
        if memory.is_of_an_image() {
            // Nobody waits.
            writer.join().unwrap();
            taken.write(moment, &at(&again), &never).unwrap();
        } else {
            taken.write(moment, &at(&again), &never).unwrap();
            writer.join().unwrap();
        }
        settled(&again);
        assert!(all(&Snapshot::open(&again, MAP).unwrap().memory(&spans(), bell).unwrap()) == before);
        assert!(all(&memory) != before);
        std::fs::remove_dir_all(again).unwrap();
    }
}

#[test]
fn a_snapshot_never_changes_and_nothing_is_left_of_one_that_failed() {
    let (folder, path) = snapshot();
    let again = write(&at(&path), "guest", &Config::default(), &state(), &written()).unwrap_err();
    assert!(again.to_string().contains("is there already"), "{again}");
    assert!(write(&at(&folder.path().join("none/two")), "", &Config::default(), &state(), &ram()).is_err());
    // One that was killed is no snapshot, and in nobody's way.
    let half = folder.path().join("three.partial");
    std::fs::create_dir(&half).unwrap();
    std::fs::write(half.join(MEMORY), "x").unwrap();
    assert!(Snapshot::open(&half, MAP).err().unwrap().to_string().contains("never completed"));
    write(&at(&folder.path().join("three")), "guest", &Config::default(), &state(), &written()).unwrap();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    // What somebody else has put there, or writes at this moment, is not touched.
    let half = folder.path().join("four.partial");
    std::fs::create_dir(&half).unwrap();
    std::fs::write(half.join("thesis"), "x").unwrap();
    let four =
        || write(&at(&folder.path().join("four")), "guest", &Config::default(), &state(), &written()).unwrap_err();
    assert!(four().to_string().contains("not all in it is a snapshot's"), "{:#}", four());
    std::fs::remove_file(half.join("thesis")).unwrap();
    let other = begin(&half).unwrap();
    assert!(four().to_string().contains("is being written by another"), "{:#}", four());
    drop(other);
    std::fs::remove_dir(&half).unwrap();
    std::os::unix::fs::symlink(folder.path(), &half).unwrap();
    four();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3);
}

/// What opening it and making RAM of it say: the same, mapped or copied.
fn looked_at(path: &Path) -> Result<()> {
    let told = [MAP, COPY].map(|how| Snapshot::open(path, how)?.memory(&spans(), bell).map(drop));
    let [mapped, copied] = &told;
    assert_eq!(mapped.is_err(), copied.is_err(), "{mapped:?} {copied:?}");
    let [told, _] = told;
    told
}

/// Every bit of the small files, and one of every 997 bytes of RAM.
#[test]
fn a_bit_that_has_changed_is_found() {
    let (_folder, path) = snapshot();
    let memory = Snapshot::open(&path, MAP).unwrap().manifest.memory;
    for name in [MANIFEST, MANIFEST_SUM, STATE, MEMORY] {
        let file = File::options().read(true).write(true).open(path.join(name)).unwrap();
        let size = file.metadata().unwrap().len();
        // Two mappings end within a block.
        let there = |block: u64, at: u64| at / BLOCK == block && (at % BLOCK < PAGE || ![16, 20].contains(&block));
        let counts = |at: &u64| name != MEMORY || memory.blocks.iter().any(|(block, _)| there(*block, *at));
        for at in (0..size).step_by(if name == MEMORY { 997 } else { 1 }).filter(counts) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            for bit in if name == MEMORY { vec![at % 8] } else { vec![0, 3, 7] } {
                file.write_all_at(&[byte[0] ^ 1 << bit], at).unwrap();
                let told = looked_at(&path).err().map(|e| format!("{e:#}")).unwrap_or_default();
                assert!(told.contains(name) || told.contains("manifest"), "{name}, byte {at}: {told:?}");
            }
            file.write_all_at(&byte, at).unwrap();
        }
    }
    looked_at(&path).unwrap();
}

#[test]
fn a_file_that_is_shorter_missing_or_another_is_found() {
    let (_folder, path) = snapshot();
    for name in [MANIFEST, MANIFEST_SUM, STATE, MEMORY] {
        let bytes = std::fs::read(path.join(name)).unwrap();
        for size in (0..bytes.len()).step_by((bytes.len() / 50).max(1)) {
            std::fs::write(path.join(name), &bytes[..size]).unwrap();
            assert!(looked_at(&path).is_err(), "{name} with {size} bytes");
        }
        std::fs::remove_file(path.join(name)).unwrap();
        assert!(looked_at(&path).is_err(), "no {name}");
        std::fs::write(path.join(name), [&bytes[..], b" "].concat()).unwrap();
        assert!(looked_at(&path).is_err(), "{name} with a byte more");
        std::fs::write(path.join(name), &bytes).unwrap();
    }
    looked_at(&path).unwrap();
    std::fs::copy(path.join(STATE), path.join(MANIFEST)).unwrap();
    assert!(looked_at(&path).is_err());
}

/// With sums that are right, as somebody makes them who wants to do harm.
#[test]
fn hostile_manifests_are_refused() {
    let (_folder, path) = snapshot();
    let good: serde_json::Value = serde_json::from_slice(&std::fs::read(path.join(MANIFEST)).unwrap()).unwrap();
    let refused = |change: &dyn Fn(&mut serde_json::Value), why: &str| {
        let mut bad = good.clone();
        change(&mut bad);
        let bytes = serde_json::to_vec(&bad).unwrap();
        std::fs::write(path.join(MANIFEST), &bytes).unwrap();
        std::fs::write(path.join(MANIFEST_SUM), sum(&bytes).to_string()).unwrap();
        let told = looked_at(&path).err().map(|e| format!("{e:#}")).unwrap_or_default();
        assert!(told.contains(why), "{why}: {told:?}");
    };
    refused(&|m| m["format"] = 2.into(), "it has format 2; this Bantam knows format 3");
    refused(&|m| m["architecture"] = "vax".into(), "a machine of vax; this host is");
    refused(&|m| m["more"] = 1.into(), "unknown field `more`");
    refused(&|m| m["base"] = "0123456789abcdef".into(), "only what has changed since the moment 0123456789abcdef");
    refused(&|m| m["base"] = "moment".into(), "16 hexadecimal digits");
    refused(&|m| m["config"]["memory"] = "much".into(), "");
    refused(&|m| m["config"]["serial"] = "file:/tmp/x".into(), "more of the machine than a snapshot keeps");
    refused(&|m| m["config"]["core"] = "/tmp/x".into(), "more of the machine than a snapshot keeps");
    refused(&|m| m["config"]["disk"] = serde_json::json!(["/dev/null"]), "or other disks");
    refused(&|m| m["memory"]["bytes"] = 5.into(), "was written with 5");
    refused(&|m| m["memory"]["blocks"][0][0] = u64::MAX.into(), "not in their order");
    refused(&|m| m["memory"]["blocks"][5][0] = (1u64 << 40).into(), "or beyond its end");
    refused(&|m| m["memory"]["blocks"][1][0] = 0.into(), "not in their order");
    let swap = |m: &mut serde_json::Value| m["memory"]["blocks"][0][1] = m["memory"]["blocks"][1][1].clone();
    refused(&swap, "are not as they were written");
}

#[test]
fn a_disk_that_has_changed_since_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    std::fs::write(&disk, [0; 512]).unwrap();
    let config = Config { disk: vec![disk.display().to_string().parse().unwrap()], ..Config::default() };
    let path = folder.path().join("one");
    write(&at(&path), "guest", &config, &state(), &written()).unwrap();
    Snapshot::open(&path, MAP).unwrap();
    std::fs::write(&disk, [1; 512]).unwrap();
    let told = Snapshot::open(&path, MAP).err().unwrap().to_string();
    assert!(told.contains("has been written to since"), "{told}");
    std::fs::remove_file(&disk).unwrap();
    assert!(Snapshot::open(&path, MAP).is_err());
    assert!(write(&at(&folder.path().join("two.partial")), "guest", &config, &state(), &ram()).is_err());
}

/// Whether this host has what it takes to compare RAM when it is touched; said where it has not.
fn can_wait() -> bool {
    let can = crate::host::sys::userfault::Guarded::first();
    if let Err(e) = &can {
        crate::host::skipped(&format!("no userfaultfd here: {e}"));
    }
    can.is_ok()
}

/// Bytes of RAM that are there.
fn there(file: &str) -> u64 {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mapping = maps.split_once(&format!("{file}-")).map_or("", |(_, rest)| rest);
    let line = mapping.lines().find(|line| line.starts_with("Rss:")).unwrap_or_default();
    line.split_whitespace().nth(1).map_or(0, |count| count.parse::<u64>().unwrap() << 10)
}

#[test]
fn ram_comes_when_it_is_touched_and_the_next_time_before() {
    if !can_wait() {
        return;
    }
    let (folder, path) = snapshot();
    let lazy = || {
        let how = How { note: HOUR, ..LAZY };
        let memory = Snapshot::open(&path, how).unwrap().memory(&spans(), bell).unwrap();
        let place = format!("{:x}", memory.slots()[0].host);
        (memory, move || there(&place))
    };
    let (memory, here) = lazy();
    assert_eq!((here(), memory.is_of_an_image()), (0, false));
    let mut byte = [9];
    // What is zeroes comes too, and what is given back comes again.
    for (at, value, blocks) in [(15 * BLOCK + 5, 0, 1), (5 * BLOCK - 2, 1, 2), (4 * BLOCK, 0, 2)] {
        memory.read(at, &mut byte).unwrap();
        assert_eq!((byte[0], here()), (value, blocks * BLOCK), "{at:#x}");
    }
    memory.write(5 * BLOCK - 2, &[7]).unwrap();
    assert_eq!(memory.give_back(Span { start: 5 * BLOCK - PAGE, size: PAGE }), PAGE);
    memory.read(5 * BLOCK - 2, &mut byte).unwrap();
    assert_eq!((byte, here()), ([1], 2 * BLOCK));
    memory.note_touched();
    // It is a snapshot's again, in whole.
    memory.write(12 * BLOCK, b"new").unwrap();
    let again = folder.path().join("again");
    write(&at(&again), "guest", &Config::default(), &state(), &memory).unwrap();
    let after = Snapshot::open(&again, COPY).unwrap();
    assert!(all(&after.memory(&spans(), bell).unwrap()) == all(&memory));
    assert_eq!((after.manifest.memory.kept(), memory.broken()), (7 * BLOCK, None));
    let (memory, here) = lazy();
    let until = std::time::Instant::now() + Duration::from_secs(10);
    while here() < 2 * BLOCK && std::time::Instant::now() < until {
        std::thread::yield_now();
    }
    assert_eq!(here(), 2 * BLOCK);
    assert!(all(&memory) == all(&written()));
    // What was noted of another snapshot, or is not as it was noted, is nothing.
    let noted = || WorkingSet::new(&path, Manifest::open(&path).unwrap().own, None).blocks;
    assert_eq!(noted(), [15, 4]);
    assert!(WorkingSet::new(&path, Xxh64(5), None).blocks.is_empty());
    let beside = folder.path().join("one.working-set");
    let bytes = std::fs::read(&beside).unwrap();
    for (at, bit) in (0..bytes.len()).flat_map(|at| (0..8).map(move |bit| (at, bit))) {
        let mut bytes = bytes.clone();
        bytes[at] ^= 1 << bit;
        std::fs::write(&beside, bytes).unwrap();
        assert!(noted().is_empty(), "{at} {bit}");
    }
}

#[test]
fn what_a_machine_touches_soon_is_known_the_next_time() {
    let (_folder, path) = snapshot();
    let open = || Snapshot::open(&path, How { note: HOUR, ..MAP }).unwrap();
    let noted = || WorkingSet::new(&path, Manifest::open(&path).unwrap().own, None).blocks;
    let snapshot = open();
    let memory = snapshot.memory(&spans(), bell).unwrap();
    let noting = snapshot.note(&memory).unwrap();
    memory.read(15 * BLOCK + 5, &mut [0]).unwrap();
    // After some looks.
    std::thread::sleep(Duration::from_millis(200));
    memory.read((1 << 32) + 3 * BLOCK, &mut [0]).unwrap();
    assert!(noted().is_empty());
    // The machine ends.
    drop(noting);
    let (blocks, last) = (noted(), 20);
    assert!(blocks.contains(&15) && blocks.last() == Some(&last), "{blocks:?}");
    assert!(blocks.len() <= 4 && open().note(&memory).is_none(), "{blocks:?}");
    // Nobody asked for it.
    std::fs::remove_file(path.with_extension("working-set")).unwrap();
    assert!(Snapshot::open(&path, MAP).unwrap().note(&memory).is_none());
}

/// And a list that somebody else can have put there.
#[test]
fn a_note_is_read_only_if_it_is_a_small_file() {
    let (_folder, path) = snapshot();
    let beside = path.with_extension("working-set");
    let noted = |name: &Path| WorkingSet::new(name, Xxh64(5), None).blocks;
    rustix::fs::mkfifoat(rustix::fs::CWD, &beside, rustix::fs::Mode::RUSR).unwrap();
    assert!(noted(&path).is_empty());
    std::fs::remove_file(&beside).unwrap();
    // Also where the folder is named by a way to it.
    WorkingSet::new(&path.join("../one/."), Xxh64(5), None).note((0..1 << 16).collect());
    assert_eq!((noted(&path).len(), std::fs::read_dir(&path).unwrap().count()), (1 << 16, 4));
    // Of more than are read ahead the first are noted.
    WorkingSet::new(&path, Xxh64(5), None).note((0..1 << 20).collect());
    assert_eq!(noted(&path), (0..1 << 16).collect::<Vec<_>>());
    let list = serde_json::to_vec(&(0..3 << 17).collect::<Vec<_>>()).unwrap();
    let text = [br#"{"of":"0000000000000005","blocks":"#.as_slice(), &list, b"}"].concat();
    std::fs::write(&beside, [sum(&text).to_string().as_bytes(), &text].concat()).unwrap();
    assert!(noted(&path).is_empty());
}

#[test]
fn who_touches_what_is_not_as_it_was_written_never_goes_on() {
    if !can_wait() {
        return;
    }
    let (_folder, path) = snapshot();
    let file = File::options().write(true).open(path.join(MEMORY)).unwrap();
    // One block has another byte, one was zeroes.
    for wrong in [4 * BLOCK, 2 * BLOCK] {
        file.write_all_at(&[1], wrong).unwrap();
        let memory = Snapshot::open(&path, LAZY).unwrap().memory(&spans(), bell).unwrap();
        let mut byte = [0];
        memory.read(0, &mut byte).unwrap();
        assert_eq!((byte, memory.broken()), ([1], None));
        let (reader, (went_on, goes_on)) = (memory.clone(), std::sync::mpsc::channel());
        std::thread::spawn(move || {
            let _ = reader.read(wrong + 100, &mut [0]);
            let _ = went_on.send(());
        });
        let why = loop {
            match memory.broken() {
                Some(why) => break why,
                None => std::thread::yield_now(),
            }
        };
        assert!(why.ends_with(&format!("the 65536 bytes at {wrong:#x} are not as they were written")), "{why}");
        assert!(goes_on.recv_timeout(Duration::from_millis(50)).is_err());
        // They wait to the end of this process.
        std::mem::forget(memory);
        file.write_all_at(&[0], wrong).unwrap();
    }
}
