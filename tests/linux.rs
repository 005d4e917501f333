//! Stock Linux: Debian's own kernels boot to their userspace, which says what it finds (xtask/src/linux/init.sh).
//!
//! The kernels are in the folder that BANTAM_KERNELS names, as `cargo xtask kernels` makes it: NAME/vmlinuz for each,
//! 6.12/vmlinux where that is another file, and initrd.img. Without it every test here is skipped by name.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

/// What differs between the architectures.
#[cfg_attr(target_arch = "aarch64", path = "linux/aarch64.rs")]
#[cfg_attr(target_arch = "x86_64", path = "linux/x86_64.rs")]
mod own;

#[path = "linux/guest.rs"]
mod guest;

use std::time::Duration;

use guest::{Told, kernel, linux, note};

/// Debian's kernels.
const KERNELS: [&str; 3] = ["6.1", "6.12", "newest"];
/// Numbers of CPUs.
const CPUS: [u64; 3] = [1, 2, 4];
/// MiB of RAM: little, usual, and more than there is below 4 GiB.
const MEMORY: [u64; 3] = [2048, 128, 5120];

/// Case `n`: all 27 pairings in 27 cases in a row, from any first one.
fn case(n: u64) -> (&'static str, u64, u64) {
    let pick = |n: u64| usize::try_from(n % 3).unwrap();
    (KERNELS[pick(n)], CPUS[pick(n / 3)], MEMORY[pick(n / 9)])
}

/// What CI takes of them: each kernel, number and size once, and the newest in the least RAM. A soak takes them all
/// (BANTAM_SOAK_SEED, _COUNT).
const SAMPLE: [u64; 3] = [4, 11, 24];

#[test]
fn every_kernel_runs_with_every_number_of_cpus_and_size_of_ram() {
    let soak = common::soak();
    let cases = soak.map_or(SAMPLE.to_vec(), |(seed, count)| (0..count).map(|i| seed.wrapping_add(i)).collect());
    let busy = if soak.is_some() { 10 } else { 1 };
    for (kernel, cpus, memory) in cases.into_iter().map(case) {
        let what = format!("{kernel}, {cpus} CPUs, {memory} MiB");
        let words = format!("--cpus {cpus} --memory {memory}M");
        let Some(guest) = linux(&format!("{kernel}/vmlinuz"), &words, &format!("quiet bantam.busy={busy}")) else {
            return;
        };
        healthy(&guest.end(), cpus, memory, &what);
    }
}

/// What init found is as asked for, and nothing is amiss.
#[track_caller]
fn healthy(told: &Told, cpus: u64, memory: u64, what: &str) {
    note(&format!("{what}: {:.1} s", told.took.as_secs_f64()));
    told.expect(0);
    told.is("cpus", &cpus.to_string()).is("timer", "every cpu").is("random", "ready").is("stall", "none");
    told.is("hotplug", if cpus > 1 { "ok" } else { "one cpu" });
    let found: u64 = told.value("memory").strip_suffix(" MiB").unwrap().parse().unwrap();
    assert!(found.abs_diff(memory) * 100 <= memory * 3, "{what}: {found} MiB of RAM");
    let source = told.value("clocksource");
    assert!(own::CLOCKSOURCES.contains(&source), "{what}: {source}");
    for clock in ["rtc", "clock"] {
        let off = told.clock_off(clock);
        assert!(off < Duration::from_secs(2), "{what}: {clock} is wrong by {off:?}");
    }
    let complaints = told.complaints();
    assert!(complaints.is_empty(), "{what}:\n{}", complaints.join("\n"));
    told.value("done");
}

/// Also what a reset is without `--reboot`: the end, and a good one.
#[test]
fn an_uncompressed_kernel_runs_and_its_reboot_is_an_end() {
    let Some(guest) = linux(own::UNCOMPRESSED, "--memory 256M", "bantam.do=reboot") else { return };
    let told = guest.end();
    told.expect(0).is("cpus", "1");
    // Not asked to be quiet, the kernel tells its whole story, and on the right console.
    let always = ["Linux version 6.12", "Kernel command line: ", "Run /init as init process"];
    for text in always.into_iter().chain(own::found()) {
        assert!(told.text.contains(text), "{text:?} is not in:\n{}", told.text);
    }
}

#[test]
fn with_reboot_the_machine_starts_anew() {
    let lives = common::soak().map_or(2, |(_, count)| count);
    let words = "--memory 256M --reboot";
    let Some(mut guest) = linux("6.12/vmlinuz", words, "quiet bantam.checks=none bantam.do=asked") else { return };
    guest.until("check done");
    let first = guest.footprint();
    for _ in 1..lives {
        guest.keys("\n");
        guest.until("check done");
    }
    let last = guest.footprint();
    // Threads and descriptors exactly; a page or two of memory may settle in the first lives.
    assert_eq!(first.0, last.0, "threads and descriptors");
    assert!(last.1 < first.1 + 1024, "{} KiB grew to {} KiB in {lives} lives", first.1, last.1);
    guest.keys("\n");
    guest.signal("TERM");
    guest.end().expect(143);
}

#[test]
fn a_panic_of_the_kernel_is_reported() {
    // A kernel that has nobody to tell starts anew, since it is told to; else it would stand for ever.
    let restarts = if own::HAS_PVPANIC { "" } else { " panic=-1" };
    let words = format!("quiet bantam.checks=none bantam.do=panic{restarts}");
    let Some(guest) = linux("6.12/vmlinuz", "--memory 256M", &words) else { return };
    let told = guest.end();
    assert!(told.text.contains("Kernel panic - not syncing: sysrq triggered crash"), "{}", told.text);
    if !own::HAS_PVPANIC {
        told.expect(0);
        return common::skipped("Debian's arm64 cloud kernels have no driver for pvpanic");
    }
    told.expect(126);
    for text in ["panic", "sysrq triggered crash"] {
        assert!(told.stderr.contains(text), "{text:?} is not in:\n{}", told.stderr);
    }
}

#[test]
fn sigterm_presses_the_power_button_where_the_guest_has_a_driver_for_it() {
    let words = "quiet bantam.checks=none bantam.do=stay";
    let Some(mut guest) = linux("6.12/vmlinuz", "--memory 256M", words) else { return };
    guest.until("check button: ");
    let ready = guest.line().contains("ready");
    assert_eq!(ready, own::HAS_BUTTON, "{}", guest.line());
    guest.signal("TERM");
    let told = guest.end();
    if ready {
        told.expect(0);
        assert!(told.text.contains("the power button was pressed"), "{}", told.text);
    } else {
        told.expect(143);
    }
}

#[test]
fn the_built_in_example_shows_linux() {
    let Some(kernel) = kernel("6.12/vmlinuz") else { return };
    let words = "example linux --cmdline quiet --memory 256M --timeout 400 --kernel";
    let outcome = common::bantam(words).arg(&kernel).run();
    let out = outcome.expect(0).out();
    assert!(out.contains("Hello from the first process of Linux 6.12."), "{out}");
}

#[test]
fn a_shell_on_the_console_is_one() {
    let words = "quiet bantam.checks=none bantam.do=shell";
    let Some(mut guest) = linux("6.12/vmlinuz", "--memory 256M", words) else { return };
    guest.until("# ");
    // The terminal's own line editing: the x is rubbed out.
    guest.keys("echo one t\x7f\x7f  twx\x7fo\n");
    guest.until("\none two");
    // A command that would stay is interrupted, and the shell is not.
    guest.keys("sleep 1000\n");
    guest.until("sleep 1000");
    std::thread::sleep(common::within(0.5));
    guest.keys("\x03");
    guest.until("# ");
    // Bytes pasted in arrive; a line of a terminal has at most 4095.
    let line = "0123456789abcdef".repeat(128);
    guest.keys("stty -echo; cat >/tmp/in; wc -c </tmp/in; uniq /tmp/in | wc -l; stty echo\n");
    guest.until("\n");
    std::thread::sleep(common::within(0.5));
    (0..4).for_each(|_| guest.keys(&format!("{line}\n")));
    guest.keys("\x04");
    guest.until("8196");
    guest.until("1");
    // And so do those printed.
    guest.keys("seq 1 3000 | tr '\\n' ,; echo end of \\it\n");
    guest.until("end of it");
    let all: String = (1..=3000).map(|n| format!("{n},")).collect();
    assert!(guest.text().contains(&all), "{}", guest.text());
    // The machine stood still for a while; its clocks may not have, and nothing complains.
    guest.signal("STOP");
    std::thread::sleep(Duration::from_secs(3));
    guest.signal("CONT");
    guest.keys("sleep 1; echo check clock: $(date -u +%s); dmesg | grep -iE 'stall|lockup|unstable'; exit\n");
    let told = guest.end();
    told.expect(0);
    note(&format!("after 3 s of a stopped monitor the guest's clock is off by {:?}", told.clock_off("clock")));
    for complaint in ["rcu: INFO", "soft lockup", "clocksource: "] {
        assert!(!told.text.contains(complaint), "{}", told.text);
    }
}

#[test]
fn what_is_allowed_to_be_in_dmesg_has_its_reason() {
    let rules = guest::allowed();
    assert!(!rules.is_empty());
    for (place, text, reason) in rules {
        assert!(["any", "x86_64", "arm64", "tcg"].contains(&place), "{place}");
        assert!(text.len() > 8 && reason.len() > 20, "{text:?}: {reason:?}");
    }
}
