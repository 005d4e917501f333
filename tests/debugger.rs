//! What gdb makes of a core file. It takes the file as it is, whichever host wrote it: this machine's is enough.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::{bantam, have, kvm};

/// A guest that dies, and registers that tell where and of what.
const DEAD: (&str, [&str; 3]) = match cfg!(target_arch = "x86_64") {
    true => ("crash-idt", ["rip", "rax", "rdi"]),
    false => ("crash-translation", ["pc", "x1", "x9"]),
};

fn number(text: &str) -> u64 {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap()
}

#[test]
fn gdb_reads_from_a_core_file_what_the_report_says() {
    if !kvm() || !have("gdb") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("core");
    let (guest, names) = DEAD;
    let words = format!("example {guest} --cpus 2 --irqchip kernel --timeout 20 --core {}", path.display());
    let report = bantam(&words).run().expect(126).stderr.clone();
    // The first CPU of the report is the one that died.
    let after = |name: &str| number(report.split_whitespace().skip_while(|word| *word != name).nth(1).unwrap());
    let there: Vec<u64> = {
        let (_, bytes) = report.split_once("bytes there: ").unwrap();
        bytes.lines().next().unwrap().split(' ').map(number).collect()
    };
    let mut gdb = std::process::Command::new("gdb");
    gdb.args(["-nx", "-batch", "-core"]).arg(&path).args(["-ex", "info threads", "-ex", "thread 1"]);
    for name in names {
        gdb.args(["-ex", &format!("printf \"register {name} %lx\\n\", ${name}")]);
    }
    let said = gdb.args(["-ex", &format!("x/{}xb ${}", there.len(), names[0])]).output().unwrap();
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert_eq!(said.lines().filter(|line| line.contains("LWP ") && !line.starts_with('[')).count(), 2, "{said}");
    for name in names {
        let line = said.lines().find_map(|line| line.strip_prefix(&format!("register {name} "))).unwrap();
        assert_eq!(number(line), after(name), "{name}: {said}\n{report}");
    }
    let memory = said.lines().filter_map(|line| line.split_once(":\t"));
    let memory: Vec<u64> = memory.flat_map(|(_, bytes)| bytes.split('\t').map(number)).collect();
    assert_eq!(memory, there, "{said}");
}
