//! The ACPI tables of a PC: what `bantam layout --acpi` writes is what ACPICA's `iasl` takes without a word, and what the
//! golden files say. With BANTAM_GOLDEN=write the files are made anew.

#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{bantam, have};

/// Where the tables lie; the first is the RSDP.
const AT: u64 = 0xe_0000;

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().unwrap())
}

/// A table of these by its address.
fn table(all: &[u8], at: u64) -> &[u8] {
    let table = &all[usize::try_from(at - AT).unwrap()..];
    &table[..u32::from_le_bytes(*table[4..].first_chunk().unwrap()) as usize]
}

/// The tables of a machine with these words, by name: those that the XSDT names, and the one that the FADT does.
fn tables(words: &str) -> Vec<(String, Vec<u8>)> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tables");
    bantam("layout --acpi").arg(&file).words(words).run().expect(0).printed("").said_nothing();
    let all = std::fs::read(file).unwrap();
    let xsdt = table(&all, long(&all, 24));
    let named = |bytes: &[u8]| (String::from_utf8_lossy(&bytes[..4]).to_lowercase(), bytes.to_vec());
    let mut found = vec![named(xsdt)];
    for at in xsdt[36..].chunks(8).map(|entry| long(entry, 0)) {
        found.push(named(table(&all, at)));
        if table(&all, at).starts_with(b"FACP") {
            found.push(named(table(&all, long(table(&all, at), 140))));
        }
    }
    found
}

/// Runs iasl on a file, next to which it leaves what it makes; no error, no warning, no remark that it counts.
fn iasl(words: &[&str], file: &Path) -> String {
    let output = Command::new("iasl").args(words).arg(file).current_dir(file.parent().unwrap()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let mut lower = said.to_lowercase();
    // How it says that there were none.
    lower = lower.replace("0 errors", "").replace("0 warnings", "");
    assert!(output.status.success() && !lower.contains("error") && !lower.contains("warning"), "{said}");
    said
}

/// What iasl makes of a table, without what depends on its version: its comments, the place of each field, the raw bytes.
fn source(name: &str, bytes: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(format!("{name}.dat"));
    std::fs::write(&file, bytes).unwrap();
    iasl(&["-d"], &file);
    let text = std::fs::read_to_string(file.with_extension("dsl")).unwrap();
    if name == "dsdt" {
        // What it reads out of the machine's code is code: it makes a table of it again.
        iasl(&["-p", "again"], &file.with_extension("dsl"));
    }
    let text = text.split("*/").skip(1).collect::<Vec<_>>().join("*/");
    let text = text.split("Raw Table Data").next().unwrap();
    let lines = text.lines().map(|line| match line.split_once(']') {
        Some((place, field)) if place.starts_with('[') => field.trim_end(),
        _ => line.trim_end(),
    });
    let mut text = lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join("\n");
    text.push('\n');
    text
}

fn assert_golden(words: &str, machine: &str) {
    if !have("iasl") {
        return;
    }
    let found: String =
        tables(words).iter().map(|(name, bytes)| format!("== {name}\n{}", source(name, bytes))).collect();
    let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/acpi-{machine}.txt"));
    if std::env::var_os("BANTAM_GOLDEN").is_some_and(|word| word == "write") {
        std::fs::write(&golden, &found).unwrap();
    }
    let expected = std::fs::read_to_string(&golden).unwrap();
    let differs = found.lines().zip(expected.lines()).find(|(a, b)| a != b);
    assert!(found == expected, "{words}: the first difference: {differs:?}; all:\n{found}");
}

#[test]
fn the_usual_machine() {
    assert_golden("", "usual");
}

#[test]
fn three_cpus_with_an_io_apic_of_ours() {
    assert_golden("--cpus 3 --irqchip split", "split");
}

#[test]
fn no_interrupts() {
    assert_golden("--irqchip none", "none");
}

#[test]
fn who_has_no_tables_is_told() {
    bantam("layout --acpi /dev/null --platform legacy").run().refused(2).said("--acpi");
    bantam("layout --acpi x --fdt y").run().expect(2);
}
