//! Disks of whole machines: what is refused before a guest starts, and a stock kernel with a file system on one.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;
#[path = "linux/guest.rs"]
mod guest;
#[path = "linux/shell.rs"]
mod shell;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::{bantam, kvm};
use guest::{beside, linux};
use shell::{KERNEL, Shell};

fn disk(folder: &Path, name: &str, size: u64) -> String {
    let path = folder.join(name);
    File::create(&path).unwrap().set_len(size).unwrap();
    path.display().to_string()
}

#[test]
fn p11_what_is_no_disk_ends_before_the_guest_begins() {
    if !kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for (words, why) in [
        (disk(folder.path(), "empty", 0), "empty"),
        (disk(folder.path(), "odd", 1000), "multiple of 512"),
        (folder.path().display().to_string(), "directory"),
        (folder.path().join("none").display().to_string(), "No such file"),
    ] {
        bantam(&format!("example add --disk {words}")).run().refused(125).said(why);
    }
    let good = disk(folder.path(), "good", 4096);
    bantam(&format!("example add --disk {good},wat")).run().refused(2).said("wat");
    bantam(&format!("example add --disk {good}")).run().expect(0).printed("4\n");
    // One disk twice in one machine is two machines on one disk.
    bantam(&format!("example add --disk {good} --disk {good}")).run().refused(125).said("locked by process");
}

#[test]
fn a_stock_kernel_makes_a_file_system_and_finds_again_what_it_put_there() {
    let folder = tempfile::tempdir().unwrap();
    for transport in ["pci", "mmio"] {
        let (first, second) = (disk(folder.path(), "first", 48 << 20), disk(folder.path(), "second", 4096));
        std::fs::write(&second, [b"bantam".to_vec(), vec![0; 4090]].concat()).unwrap();
        let words = format!("--memory 256M --transport {transport} --disk {first},serial=one --disk {second},ro");
        let Some(guest) = linux("6.12/vmlinuz", &words, "quiet bantam.do=disk bantam.checks=none") else { return };
        let told = guest.end();
        told.expect(0).is("disk", "the same").is("disk size", "98304").is("disk serial", "one");
        told.is("disk cache", "write back").is("second disk", "bantam, read-only 1").is("disk errors", "0");
        // An ext2 file system's magic number, in the file itself.
        let mut magic = [0; 2];
        File::open(&first).unwrap().read_exact_at(&mut magic, 1080).unwrap();
        assert_eq!(magic, [0x53, 0xef]);
    }
}

/// A kill of the monitor is a power cut to its guest, at a moment that depends on the seed.
#[test]
fn what_was_flushed_is_there_after_the_monitor_was_killed() {
    const SIZE: usize = 4096;
    let folder = tempfile::tempdir().unwrap();
    let (first, count) = common::soak().unwrap_or((1, 1));
    for seed in first..first + count {
        let path = disk(folder.path(), "disk", 16 << 20);
        let Some(mut shell) = Shell::start(&format!("--memory 256M --disk {path}"), "virtio_blk") else { return };
        let write = format!("yes record $n | head -c {SIZE} | dd of=/dev/vda bs={SIZE} seek=$n conv=fsync 2>/dev/null");
        shell.begin(&format!("n=0; while {write}; do echo kept $n.; n=$((n + 1)); done"));
        shell.until(&format!("kept {}.", 3 + seed % 17));
        std::thread::sleep(Duration::from_micros(seed.wrapping_mul(7919) % 50_000));
        shell.guest.signal("KILL");
        let told = shell.guest.end();
        told.expect(128 + 9);
        let kept = told.text.rsplit("kept ").find_map(|rest| rest.split_once('.')?.0.parse::<u64>().ok()).unwrap();
        let file = File::open(&path).unwrap();
        for number in 0..=kept {
            let mut record = [0; SIZE];
            file.read_exact_at(&mut record, number * SIZE as u64).unwrap();
            let line = format!("record {number}\n");
            assert!(record.iter().eq(line.as_bytes().iter().cycle().take(SIZE)), "seed {seed}: {number} of {kept}");
        }
    }
}

/// What `cargo xtask bench io --host` shows: the same fio on the same kind of file, in the guest and beside it.
#[test]
fn a_disk_beside_the_hosts_own_speed() {
    const SIZE: u64 = 32 << 20;
    if guest::kernel(KERNEL).is_none() {
        return;
    }
    let Some(tools) = guest::tools() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = disk(folder.path(), "disk", SIZE);
    let Some(mut shell) = Shell::start(&format!("--memory 512M --disk {path} {tools}"), "virtio_blk") else { return };
    shell.run(guest::TOOLS);
    // The disk is the guest's; the host's own file is another.
    let file = disk(folder.path(), "file", SIZE);
    // KiB a second is the 7th number of what is read, and the 48th is of what is written (fio's manual, terse output).
    for (what, words, number) in [
        ("written in 64 KiB, and flushed", "--rw=write --bs=64k --ioengine=psync --end_fsync=1", 48),
        ("read in 64 KiB", "--rw=read --bs=64k --ioengine=psync", 7),
        ("read in 4 KiB anywhere, 32 at a time", "--rw=randread --bs=4k --ioengine=libaio --iodepth=32 --direct=1", 7),
    ] {
        let command = |file: &str| {
            let fio = format!("/tools/run fio --name=one --thread --filename={file} --size=32M {words}");
            format!(
                "{fio} --output-format=terse --terse-version=3 | awk -F';' '$1 == 3 && $5 == 0 {{ print ${number} * 1024 }}'"
            )
        };
        let own = Command::new("busybox").args(["sh", "-c", &command(&file)]).output().unwrap();
        let guests = shell.ask(&command("/dev/vda"));
        beside(&format!("disk, fio: {what}"), &String::from_utf8_lossy(&own.stdout), &guests);
    }
    shell.leave("poweroff -f\n");
}
