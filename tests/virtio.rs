//! Virtio devices and their transports, as stock Linux drives them: Debian's own kernel and modules (see tests/linux.rs).

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

#[path = "linux/guest.rs"]
mod guest;
#[path = "linux/shell.rs"]
mod shell;

use std::time::{Duration, Instant};

use guest::note;
use shell::Shell;

/// MiB of RAM of every guest.
const MEMORY: u64 = 320;
const MIB: u64 = 1 << 20;

/// A guest with a shell on its console.
fn shell(words: &str, modules: &str) -> Option<Shell> {
    Shell::start(&format!("--memory {MEMORY}M {words}"), modules)
}

/// Random numbers come, by interrupts of the device's own.
fn random_numbers(shell: &mut Shell) {
    shell.is("cat /sys/class/misc/hw_random/rng_current", "virtio_rng.0");
    let interrupts =
        "awk '/virtio/ { for (i = 2; $i ~ /^[0-9]+$/; i++) n += $i } END { print n + 0 }' /proc/interrupts";
    let before: u64 = shell.ask(interrupts).parse().unwrap();
    let sums =
        shell.ask("for n in 1 2 3; do dd if=/dev/hwrng bs=512 count=8 2>/dev/null | md5sum; done | sort -u | wc -l");
    assert_eq!(sums, "3");
    let after: u64 = shell.ask(interrupts).parse().unwrap();
    assert!(after > before, "{before} interrupts, then {after}");
    note(&format!("{} interrupts for 12 KiB of random numbers", after - before));
}

/// Bytes of guest RAM that the host has made.
fn ram(shell: &Shell) -> u64 {
    let folder = format!("/proc/{}/fd", shell.guest.pid());
    let files = std::fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path());
    let ram = files.filter(|path| std::fs::read_link(path).is_ok_and(|to| to.to_string_lossy().contains("guest-ram")));
    use std::os::unix::fs::MetadataExt;
    ram.map(|path| std::fs::metadata(path).unwrap().blocks() * 512).max().unwrap()
}

/// Waits until there is less of it; gives how much.
#[track_caller]
fn ram_below(shell: &Shell, most: u64) -> u64 {
    let start = Instant::now();
    loop {
        let ram = ram(shell);
        if ram < most {
            return ram;
        }
        assert!(start.elapsed() < common::within(20.0), "{} MiB are not below {}", ram / MIB, most / MIB);
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn random_numbers_come_over_virtio_mmio_and_drivers_come_and_go() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("trace.json");
    let words = format!("--transport mmio --trace={} --trace-filter device=virtio-rng", file.display());
    let Some(mut shell) = shell(&words, "virtio_mmio virtio-rng") else { return };
    random_numbers(&mut shell);
    shell.rebind("virtio_rng", 100);
    random_numbers(&mut shell);
    shell.end();
    // A viewer sees when the device was served.
    let trace: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let track = &events.iter().find(|event| event["args"]["name"] == "virtio").unwrap()["tid"];
    let woken = |by: &str| {
        let of = |event: &&serde_json::Value| event["tid"] == *track && event["args"]["woken by"] == by;
        events.iter().filter(of).filter(|event| event["name"] == "virtio-rng").count()
    };
    assert!(woken("queue 0") > 20 && woken("start") > 5, "{} {}", woken("queue 0"), woken("start"));
}

#[test]
fn random_numbers_come_over_virtio_pci_and_doorbells_that_exit_are_in_the_trace() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let words = format!("--doorbell exit --trace={} --trace-filter device=virtio-rng", file.path().display());
    let Some(mut shell) = shell(&words, "virtio-rng") else { return };
    random_numbers(&mut shell);
    shell.end();
    let trace = std::fs::read_to_string(file.path()).unwrap();
    let rings = trace.lines().filter(|line| line.contains("write") && line.contains("virtio-rng.")).count();
    assert!(rings > 20, "{trace:.2000}");
}

/// hvc0 is the console that a person has, and what the guest does not need goes back to the host.
#[test]
fn a_virtio_console_and_a_balloon() {
    let name = format!("virtio-{}", std::process::id());
    let Some(mut shell) =
        shell(&format!("--console stdio --balloon --until the_last_word --name {name}"), "virtio_balloon")
    else {
        return;
    };
    shell.is("tty", "/dev/hvc0");
    shell.is("cat /sys/class/tty/console/active", "hvc0");
    assert_eq!(shell.ask_with("read -s word; echo \"it was $word\"", "secret\n"), "it was secret");
    // Bytes arrive both ways, more than any buffer holds.
    let all: String = (1..=4000).map(|n| format!("{n},")).collect();
    shell.is("seq 1 4000 | tr '\\n' ,", &all);
    let line = "0123456789abcdef".repeat(128);
    let lines = format!("{line}\n").repeat(16) + "\x04";
    assert_eq!(shell.ask_with("cat >/tmp/in; wc -c </tmp/in; uniq /tmp/in | wc -l", &lines), "32784\n1");
    // The memory that a file had is given back once it is gone: free pages are reported.
    shell.is("dd if=/dev/zero of=/tmp/file bs=1M count=80 2>/dev/null; wc -c </tmp/file", "83886080");
    let full = ram(&shell);
    shell.ask("rm /tmp/file");
    let free = ram_below(&shell, full - 50 * MIB);
    note(&format!("{} MiB of {MEMORY}, {} MiB after a file of 80 MiB was removed", full / MIB, free / MIB));
    // What a balloon takes the guest has not, and the host has.
    let available = "awk '/^MemAvailable/ { print int($2 / 1024) }' /proc/meminfo";
    let before: u64 = shell.ask(available).parse().unwrap();
    let told = common::bantam(&format!("balloon {name} 32M")).run();
    let out = told.expect(0).out();
    assert!(out.contains("in the balloon"), "{out}");
    let actual = || common::bantam(&format!("balloon {name}")).run().out();
    let start = Instant::now();
    while !actual().starts_with("32M in the balloon") {
        assert!(start.elapsed() < common::within(20.0), "{}", actual());
    }
    assert!(common::bantam("ps").run().out().contains(" 32M "));
    let after: u64 = shell.ask(available).parse().unwrap();
    let small = ram(&shell);
    note(&format!(
        "32 MiB in the balloon: {before} MiB available, then {after}; the host has made {} MiB",
        small / MIB
    ));
    // What is available moves by ten MiB by itself while a kernel settles.
    assert!(after + 16 < before && small < free + 16 * MIB, "{before}, {after}, {}", small / MIB);
    common::bantam(&format!("balloon {name} 0")).run().expect(0);
    let start = Instant::now();
    while !actual().starts_with("0 in the balloon") {
        assert!(start.elapsed() < common::within(20.0), "{}", actual());
    }
    shell.is("dd if=/dev/zero of=/tmp/file bs=1M count=80 2>/dev/null; wc -c </tmp/file", "83886080");
    common::bantam(&format!("balloon {name} 1G")).run().refused(125);
    // What ends the machine is the last that is shown.
    let told = shell.end_by("echo the_''last_''word; echo more\n");
    assert!(told.text.ends_with("the_last_word"), "{}", told.text);
}

/// And works again. That of random numbers is the first test's, over the other transport.
#[test]
fn every_driver_lets_go_of_its_device_a_hundred_times() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).display().to_string();
    let (disk, console) = (file("disk"), file("console"));
    std::fs::write(&disk, [b"bantam".to_vec(), vec![0; 4090]].concat()).unwrap();
    let words = format!(
        "--disk {disk} --net socket:{},listen --vsock cid=7,path={} --balloon --console file:{console}",
        file("wire"),
        file("v")
    );
    let modules = "virtio_blk failover net_failover virtio_net virtio_balloon \
        vsock vmw_vsock_virtio_transport_common vmw_vsock_virtio_transport";
    let Some(mut shell) = shell(&words, modules) else { return };
    let drivers = ["virtio_blk", "virtio_net", "virtio_balloon", "virtio_console", "vmw_vsock_virtio_transport"];
    drivers.into_iter().for_each(|driver| shell.rebind(driver, 100));
    shell.is("head -c 6 /dev/vda; readlink /sys/class/net/eth0/device/driver | grep -c virtio_net", "bantam1");
    shell.run("echo still there >/dev/hvc0");
    shell.end();
    assert_eq!(std::fs::read_to_string(console).unwrap().trim(), "still there");
}
