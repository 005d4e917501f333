//! The words of `--disk`, and files that are disks or not.

use std::path::Path;

use super::super::open::{Format, Options};
use super::*;
use crate::error::verdict;

fn options(text: &str) -> Options {
    Options::parse(&text.parse().unwrap()).unwrap()
}

/// For how long that is a reason.
const PATIENCE: Duration = Duration::from_secs(5);

/// Nobody else uses it: but a process that another test is starting has what this one had open for a moment longer, and its
/// locks.
fn free<T>(open: impl Fn() -> Result<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        match open() {
            Err(e) if e.to_string().contains("locked by") && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(1));
            }
            opened => return opened.unwrap(),
        }
    }
}

/// Why a disk is refused, the hint with it, and with which status.
fn refused(text: &str) -> (u8, String) {
    let error = match Options::parse(&text.parse().unwrap()) {
        Ok(options) => options.open().err().unwrap_or_else(|| panic!("{text} was opened")),
        Err(e) => e.into(),
    };
    let (status, hint) = verdict(&error);
    (status, format!("{error:#} ({})", hint.unwrap_or_default()))
}

#[track_caller]
fn says(text: &str, status: u8, words: &[&str]) {
    let until = Instant::now() + PATIENCE;
    let locked = |said: &str| said.contains("locked by") && !words.concat().contains("locked by");
    let (mut found, mut said) = refused(text);
    while locked(&said) && Instant::now() < until {
        (found, said) = refused(text);
    }
    assert_eq!(found, status, "{said}");
    assert!(words.iter().all(|word| said.contains(word)), "{said}");
}

fn file(folder: &Path, name: &str, size: u64) -> String {
    let path = folder.join(name);
    File::create(&path).unwrap().set_len(size).unwrap();
    path.display().to_string()
}

#[test]
fn words_say_what_a_disk_is() {
    let disk = options("a,,b.img,ro,format=qcow2,queues=4,serial=x1,rate=5iops,backing=base.img");
    assert_eq!((disk.path.to_str().unwrap(), disk.read_only, disk.queues), ("a,b.img", true, 4));
    assert_eq!((disk.format, disk.backing.unwrap().to_str().unwrap()), (Some(Format::Qcow2), "base.img"));
    let plain = options("d");
    assert!(!plain.direct && !plain.read_only && plain.format.is_none() && plain.rate.is_none() && plain.queues == 1);
    assert!(options("d,cache=none").direct);
    for (text, why) in [
        ("", "which file"),
        ("d,queues=0", "1 to 16"),
        ("d,queues=17", "1 to 16"),
        ("d,serial=123456789012345678901", "20 letters"),
        ("d,serial=a b", "no spaces"),
        ("d,format=vmdk", "raw, qcow2"),
        ("d,rate=0", "not 0"),
        ("d,backing=x", "qcow2"),
        ("d,wat", "wat"),
        ("d,overlay,copy", "which?"),
        ("d,ro,copy", "nothing is written"),
        ("d,overlay,cache=none", "without cache=none"),
    ] {
        says(text, 2, &[why]);
    }
}

#[test]
fn p11_what_is_no_disk_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    says(&path.join("none").display().to_string(), 125, &["No such file", "truncate"]);
    says(&path.display().to_string(), 125, &["irectory"]);
    says(&format!("{},ro", path.display()), 125, &["it is a directory"]);
    says(&file(path, "empty", 0), 125, &["empty"]);
    says(&file(path, "odd", 1000), 125, &["1000 bytes", "multiple of 512"]);
    says("/dev/null", 125, &["device for characters"]);
    rustix::fs::mkfifoat(rustix::fs::CWD, path.join("fifo"), rustix::fs::Mode::RUSR).unwrap();
    let start = Instant::now();
    for words in ["", ",ro"] {
        says(&format!("{}{words}", path.join("fifo").display()), 125, &["FIFO"]);
    }
    assert!(start.elapsed() < Duration::from_secs(1));
}

#[test]
fn p11_a_disk_of_another_machine_is_refused_by_its_owner() {
    let folder = tempfile::tempdir().unwrap();
    let disk = file(folder.path(), "disk", 4096);
    let shared = format!("{disk},ro");
    let pid = format!("process {}", std::process::id());
    let held = options(&disk).open().unwrap();
    says(&disk, 125, &["locked by", &pid]);
    says(&shared, 125, &["locked by", &pid]);
    drop(held);
    let first = free(|| options(&shared).open());
    let second = options(&shared).open().unwrap();
    says(&disk, 125, &["locked by", &pid]);
    drop((first, second));
    free(|| options(&disk).open());
    // The device itself holds it, whatever carries out its work.
    let device = free(|| Block::new(&disk.parse().unwrap()));
    says(&shared, 125, &["locked by"]);
    drop(device);
    free(|| options(&disk).open());
}

#[test]
fn a_format_is_never_guessed() {
    let folder = tempfile::tempdir().unwrap();
    let disk = file(folder.path(), "disk", 4096);
    std::fs::write(&disk, [b"QFI\xfb".to_vec(), vec![0; 1020]].concat()).unwrap();
    says(&disk, 125, &["qcow2", "format=qcow2"]);
    says(&format!("{disk},ro"), 125, &["qcow2", "format=qcow2"]);
    let (_, medium) = free(|| options(&format!("{disk},format=raw")).open());
    assert_eq!(medium.capacity, 1024);
}

#[test]
fn serial_numbers_are_as_said_or_of_the_path() {
    let folder = tempfile::tempdir().unwrap();
    let (disk, other) = (file(folder.path(), "disk", 4096), file(folder.path(), "other", 4096));
    let serial = |text: &str| free(|| options(text).open()).1.serial;
    assert_eq!(&serial(&format!("{disk},serial=me"))[..4], b"me\0\0");
    assert_eq!(serial(&disk), serial(&disk));
    assert_ne!(serial(&disk), serial(&other));
    assert!(serial(&disk).starts_with(b"bantam"));
}

#[test]
fn direct_access_works_or_is_refused_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let disk = file(folder.path(), "disk", 1 << 20);
    let words = format!("{disk},cache=none");
    match options(&words).open() {
        Err(e) if !e.to_string().contains("locked by") => return says(&words, 125, &["O_DIRECT", "cache=writeback"]),
        _ => {}
    }
    assert!(free(|| options(&words).open()).1.block >= 512);
    let mut rig = Rig::new(free(|| Block::new(&words.parse().unwrap())));
    let (head, data) = (header(1, 0), vec![5; 4096]);
    let at = ROOM / 2;
    rig.queues[0].data = at - 16 - DATA;
    let (_, room) = rig.put(0, &[&head, &data], &[1]);
    rig.wait(0);
    let mut status = [9];
    rig.memory.read(room[0], &mut status).unwrap();
    assert_eq!(status, [0]);
    drop(rig);
    assert_eq!(std::fs::read(&disk).unwrap()[..4096], data);
}
