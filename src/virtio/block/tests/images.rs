//! qcow2 images.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use imago::FormatCreateBuilder;
use imago::qcow2::Qcow2;
use proptest::prelude::*;

use super::*;
use crate::error::verdict;

type Storage = imago::file::File;

fn new(path: &Path) -> Storage {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
    Storage::try_from(file).unwrap()
}

/// An image of 1 MiB, perhaps on another one.
fn image(folder: &Path, name: &str, on: Option<&str>) -> String {
    let path = folder.join(name);
    let builder = Qcow2::<Storage>::create_builder(new(&path)).size(1 << 20);
    let builder = match on {
        Some(on) => builder.backing(on.into(), "raw".into()),
        None => builder,
    };
    builder.create().unwrap();
    format!("{},format=qcow2", path.display())
}

fn open(words: &str) -> Result<Rig> {
    // A program that another test is just starting has a copy of all our descriptors, locks too, until it is loaded.
    let forked = |error: &anyhow::Error| format!("{error:#}").contains("locked by another process");
    for _ in 0..100 {
        match Block::new(&words.parse().unwrap()) {
            Err(error) if forked(&error) => std::thread::sleep(Duration::from_millis(10)),
            result => return result.map(Rig::new),
        }
    }
    Block::new(&words.parse().unwrap()).map(Rig::new)
}

#[track_caller]
fn says(words: &str, why: &[&str]) {
    let error = open(words).err().unwrap();
    let said = format!("{error:#} {:?}", verdict(&error).1);
    assert!(verdict(&error).0 == 125 && why.iter().all(|why| said.contains(why)), "{said}");
}

#[test]
fn an_image_keeps_what_was_flushed() {
    let folder = tempfile::tempdir().unwrap();
    let words = image(folder.path(), "disk", None);
    let data: Vec<u8> = (0..300_000u32).map(|n| (n / 7) as u8).collect();
    let data = &data[..585 * 512];
    let mut rig = open(&words).unwrap();
    assert_eq!(rig.device.space()[..8], 2048u64.to_le_bytes());
    assert_eq!(rig.read(0, 512), [0; 512]);
    assert_eq!(rig.write(100, data), status::OK);
    assert_eq!(rig.flush(), status::OK);
    says(&words, &["locked by process"]);
    // Without a chance to put anything in order.
    std::mem::forget(std::mem::replace(
        &mut rig.device.engine,
        Box::new(Pool::new(Box::new(tempfile::tempfile().unwrap())).unwrap()),
    ));
    let copy = folder.path().join("copy");
    std::fs::copy(folder.path().join("disk"), &copy).unwrap();
    let mut rig = open(&format!("{},format=qcow2", copy.display())).unwrap();
    assert_eq!(rig.read(100, data.len() as u32), data);
    let segment = [&100u64.to_le_bytes()[..], &8u32.to_le_bytes(), &0u32.to_le_bytes()].concat();
    assert_eq!(rig.ask(13, 0, &segment, 0).0, status::OK);
    assert_eq!(rig.ask(11, 0, &segment, 0).0, status::OK);
    assert_eq!(rig.read(100, 4096), [0; 4096]);
    assert_eq!(rig.read(108, 512), data[4096..4608]);
}

/// What is written is there, its file as it was; for the next machine nothing of it is left.
#[test]
fn what_is_written_to_an_overlay_or_a_copy_ends_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let plain = folder.path().join("raw");
    let bytes: Vec<u8> = (0..1 << 20u32).map(|n| (n / 4096) as u8).collect();
    std::fs::write(&plain, &bytes).unwrap();
    let packed = image(folder.path(), "packed", None);
    let mut rig = open(&packed).unwrap();
    assert_eq!((rig.write(0, &bytes[..1 << 19]), rig.flush()), (status::OK, status::OK));
    drop(rig);
    let before = std::fs::read(folder.path().join("packed")).unwrap();
    for base in [plain.display().to_string(), packed] {
        for own in ["overlay", "copy"] {
            let words = format!("{base},{own}");
            let (mut one, mut other) = (open(&words).unwrap(), open(&words).unwrap());
            assert_eq!(one.device.space()[..8], 2048u64.to_le_bytes(), "{words}");
            assert_eq!((one.write(9, &[0xaa; 512]), one.flush()), (status::OK, status::OK));
            assert_eq!((one.read(9, 512), other.read(9, 512)), (vec![0xaa; 512], bytes[9 * 512..10 * 512].to_vec()));
            assert_eq!((one.read(8, 512), one.read(10, 512)), (vec![1; 512], vec![1; 512]));
            drop(one);
            assert_eq!(open(&words).unwrap().read(9, 512), bytes[9 * 512..10 * 512]);
        }
    }
    assert!(std::fs::read(&plain).unwrap() == bytes && std::fs::read(folder.path().join("packed")).unwrap() == before);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
}

#[test]
fn an_image_stands_on_another_only_where_the_user_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    std::fs::write(&base, vec![6; 1 << 20]).unwrap();
    let words = image(folder.path(), "disk", Some("base"));
    says(&words, &["\"base\"", "backing=PATH"]);
    let words = format!("{words},backing={}", base.display());
    let mut rig = open(&words).unwrap();
    assert_eq!(rig.read(7, 512), [6; 512]);
    assert_eq!(rig.write(7, &[1; 512]), status::OK);
    assert_eq!((rig.read(7, 512), rig.read(8, 512)), (vec![1; 512], vec![6; 512]));
    // Nobody may write to what others stand on.
    says(&base.display().to_string(), &["locked by process"]);
    drop(rig);
    let mut byte = [0];
    File::open(&base).unwrap().read_exact_at(&mut byte, 7 * 512).unwrap();
    assert_eq!(byte, [6]);
    says(&format!("{words}x"), &["basex", "No such file"]);
}

#[test]
fn an_image_whose_data_is_elsewhere_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (path, data) = (folder.path().join("disk"), folder.path().join("data"));
    let builder = Qcow2::<Storage>::create_builder(new(&path)).size(1 << 20);
    builder.data_file("data".into(), new(&data)).create().unwrap();
    says(&format!("{},format=qcow2", path.display()), &["another file"]);
}

#[test]
fn an_image_whose_tables_do_not_hold_together_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let words = image(folder.path(), "disk", None);
    let mut rig = open(&words).unwrap();
    assert_eq!((rig.write(100, &[7; 4096]), rig.flush()), (status::OK, status::OK));
    drop(rig);
    let path = folder.path().join("disk");
    let good = std::fs::read(&path).unwrap();
    let number = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().unwrap());
    let (l1, table) = (number(40) as usize, number(48) as usize);
    let block = number(table) as usize;
    let l2 = (number(l1) & 0xff_ffff_ffff) as usize;
    let entry = |value: u64| value.to_be_bytes().to_vec();
    for (at, bytes, why) in [
        (0, vec![1], "no qcow2"),
        (7, vec![4], "kind"),
        (20, vec![0, 0, 0, 40], "kind"),
        (36, vec![0, 0, 0, 0], "too small"),
        (79, vec![1], "closed properly"),
        (48, entry(1 << 40), "has nothing"),
        (40, entry(512), "has nothing"),
        (40, entry(0), "twice"),
        (table, entry(0), "not count"),
        (block, vec![0, 0], "at 0x0, but does not count"),
        (block + 2 * (l2 >> 16), vec![0, 0], "not count"),
        (l1, entry(1 << 63 | table as u64), "twice"),
        (l2 + 8, entry(1 << 63 | l2 as u64), "twice"),
        (l2 + 8, entry(1 << 63 | 1 << 40), "has nothing"),
        (l2 + 8, entry(1 << 62 | 1 << 40), "not count"),
    ] {
        std::fs::write(&path, &good).unwrap();
        File::options().write(true).open(&path).unwrap().write_all_at(&bytes, at as u64).unwrap();
        says(&words, &[why]);
    }
    std::fs::write(&path, &good).unwrap();
    assert_eq!(open(&words).unwrap().read(100, 4096), [7; 4096]);
}

#[test]
fn an_image_that_is_only_read_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let words = image(folder.path(), "disk", None);
    let before = std::fs::read(folder.path().join("disk")).unwrap();
    let mut rig = open(&format!("{words},ro")).unwrap();
    assert_eq!(rig.write(0, &[1; 512]), status::IOERR);
    assert_eq!((rig.read(0, 512), rig.flush()), (vec![0; 512], status::OK));
    drop(rig);
    assert_eq!(std::fs::read(folder.path().join("disk")).unwrap(), before);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is wrong in an image's tables is a refusal, or an error of the disk.
    #[test]
    fn a_broken_image_harms_nobody(
        at in prop_oneof![0u64..120, 0x1_0000u64..0x1_0010, 0x2_0000u64..0x2_0020, 0x3_0000u64..0x3_0010, 0x4_0000u64..0x4_0010],
        byte: u8,
        size in prop::option::of(0u64..0x6_0000),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let words = image(folder.path(), "disk", None);
        let mut rig = open(&words).unwrap();
        rig.write(100, &[7; 4096]);
        rig.flush();
        drop(rig);
        let file = File::options().write(true).open(folder.path().join("disk")).unwrap();
        file.write_all_at(&[byte], at).unwrap();
        if let Some(size) = size {
            file.set_len(size).unwrap();
        }
        match open(&words) {
            Err(error) => prop_assert_eq!(verdict(&error).0, 125),
            Ok(mut rig) => {
                rig.ask(0, 0, &[], 4096);
                rig.ask(1, 1000, &[1; 512], 0);
                rig.flush();
            }
        }
    }
}
