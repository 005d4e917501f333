//! The device tree of an arm64 machine: what `bantam layout --fdt` writes is what `dtc` reads, and what the golden files say.
//! To renew a golden file: `bantam layout --fdt x.dtb …; dtc -I dtb -O dts x.dtb`.

#![cfg(target_arch = "aarch64")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::process::Command;

use common::{bantam, have};

/// What `dtc` makes of the tree of a machine with these words.
fn source(words: &str) -> Option<String> {
    if !have("dtc") {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("machine.dtb");
    bantam("layout --fdt").arg(&tree).words(words).run().expect(0).printed("").said_nothing();
    let dtc = Command::new("dtc").args(["-I", "dtb", "-O", "dts"]).arg(&tree).output().unwrap();
    assert!(dtc.status.success());
    assert_eq!(String::from_utf8_lossy(&dtc.stderr), "", "dtc has nothing to complain about");
    Some(String::from_utf8(dtc.stdout).unwrap())
}

fn assert_golden(words: &str, golden: &str) {
    if let Some(source) = source(words) {
        assert_eq!(source.trim(), golden.trim(), "{words}");
    }
}

#[test]
fn the_usual_machine() {
    assert_golden("", include_str!("golden/arm64.dts"));
}

#[test]
fn eight_cpus_of_gicv2() {
    assert_golden("--cpus 8 --gic 2 --memory 5G", include_str!("golden/arm64-gicv2.dts"));
}

#[test]
fn no_its_for_whom_it_is_not_to_be() {
    let Some(source) = source("--msi none") else { return };
    assert!(
        !source.contains("its") && source.contains("#address-cells = <0x00>;\n\t\treg = <0x00 0x8000000"),
        "{source}"
    );
}

#[test]
fn counters_are_named_where_they_are_asked_for() {
    let Some(source) = source("--cpu-features pmu,sve") else { return };
    let pmu = "pmu {\n\t\tcompatible = \"arm,armv8-pmuv3\";\n\t\tinterrupts = <0x01 0x07 0x04>;\n\t};";
    assert!(source.contains(pmu), "{source}");
}

#[test]
fn system_d() {
    let words = "--memory 4K --ram-base 0x10000 --debugcon mmio:0x996 --irqchip none";
    assert_golden(words, include_str!("golden/arm64-system-d.dts"));
}

#[test]
fn cpus_beyond_the_sixteenth_have_two_parts_of_affinity() {
    let Some(source) = source("--cpus 123") else { return };
    assert_eq!(source.matches("enable-method = \"psci\"").count(), 123);
    assert!(source.contains("cpu@f {") && source.contains("cpu@100 {") && source.contains("cpu@70a {"), "{source}");
    assert!(source.contains("0x80a0000 0x00 0xf60000"), "room for 123 redistributors");
}
