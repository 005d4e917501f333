//! Disks of whole machines: what is refused before a guest starts, and a stock kernel with a file system on one.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;
#[path = "linux/guest.rs"]
mod guest;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::{bantam, kvm};
use guest::linux;

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
