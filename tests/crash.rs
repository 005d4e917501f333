//! Each way to die of `bantam example crash-*` is named by its report.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;
use common::{Outcome, bantam, kvm};

/// How this architecture's guests die.
#[cfg_attr(target_arch = "aarch64", path = "crash/aarch64.rs")]
#[cfg_attr(target_arch = "x86_64", path = "crash/x86_64.rs")]
mod own;

fn example(name: &str) -> Outcome {
    bantam("example").arg(name).words("--timeout 20").run()
}

/// What is in the core file of a guest.
struct Core {
    guest: &'static str,
    /// Bytes of a CPU's note.
    note: usize,
    /// Some registers: their place in the note, and their value.
    registers: &'static [(usize, u64)],
    /// Instructions and where they are.
    code: (u64, &'static [u8]),
    /// Where there is memory besides RAM.
    besides: Option<u64>,
}

/// A note's kind and content; a span of RAM: its address, size and bytes.
type Parts = (Vec<(u64, Vec<u8>)>, Vec<(u64, u64, Vec<u8>)>);

/// The notes and the spans of RAM in the core file at `path`.
fn read_core(path: &std::path::Path) -> Parts {
    let bytes = std::fs::read(path).unwrap();
    let file = elf::ElfBytes::<elf::endian::LittleEndian>::minimal_parse(&bytes).unwrap();
    assert_eq!(file.ehdr.e_type, elf::abi::ET_CORE);
    let (mut notes, mut ram) = (Vec::new(), Vec::new());
    for segment in file.segments().unwrap().iter() {
        if segment.p_type == elf::abi::PT_NOTE {
            for note in file.segment_data_as_notes(&segment).unwrap() {
                let elf::note::Note::Unknown(note) = note else { panic!("{note:?}") };
                assert_eq!(note.name, b"CORE\0");
                notes.push((note.n_type, note.desc.to_vec()));
            }
        } else {
            ram.push((segment.p_paddr, segment.p_memsz, file.segment_data(&segment).unwrap().to_vec()));
        }
    }
    (notes, ram)
}

#[test]
fn the_core_file_has_ram_and_the_registers_of_every_cpu() {
    use std::os::unix::fs::MetadataExt;
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("core");
    let words = format!("--cpus 2 --irqchip kernel --memory 64M --timeout 20 --core {}", path.display());
    let wanted = own::CORE;
    bantam("example").arg(wanted.guest).words(&words).run().expect(126).said("the core file is");
    let (notes, ram) = read_core(&path);
    let kinds: Vec<_> = notes.iter().map(|(kind, desc)| (*kind, desc.len())).collect();
    assert_eq!(kinds, [(1, wanted.note), (1, wanted.note)]);
    if !own::loses_registers() {
        for (number, value) in wanted.registers {
            let at = 112 + 8 * number;
            assert_eq!(notes[0].1[at..at + 8], value.to_le_bytes(), "register {number}");
        }
    }
    let (address, code) = wanted.code;
    let (ram, besides): (Vec<_>, Vec<_>) = ram.into_iter().partition(|span| span.1 == 64 << 20);
    let at = usize::try_from(address - ram[0].0).unwrap();
    assert_eq!(&ram[0].2[at..at + code.len()], code);
    // What else is memory is there too, and what nobody touched takes no room.
    assert_eq!(besides.first().map(|span| span.0), wanted.besides);
    let blocks = std::fs::metadata(&path).unwrap().blocks();
    assert!(blocks * 512 < 1 << 20, "{blocks} blocks");
    bantam("example crash --core /nowhere/core").run().expect(126).said("no core file: --core /nowhere/core: No such");
}

#[test]
fn ctrl_a_r_reports_and_the_machine_goes_on() {
    use std::io::Write;
    if !kvm() || !common::have("script") {
        return;
    }
    let command = format!("{} example echo", common::program().display());
    let mut script = std::process::Command::new("script");
    script.args(["-qec", &command, "/dev/null"]).stdin(std::process::Stdio::piped());
    let mut child = script.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    for text in ["one", "\x01r", "\x01r", "two", "\x01x"] {
        std::thread::sleep(std::time::Duration::from_millis(700));
        stdin.write_all(text.as_bytes()).unwrap();
    }
    let shown = String::from_utf8_lossy(&child.wait_with_output().unwrap().stdout).into_owned();
    assert_eq!(shown.matches("the machine is stopped for this report").count(), 2, "{shown}");
    let last = shown.rfind(own::LAST_WALK).unwrap();
    assert!(shown[last..].contains("two") && shown.contains(own::ECHO_MODE), "{shown}");
}

#[test]
fn every_way_to_die_has_a_test() {
    let guests: Vec<_> = guests::all().iter().filter(|guest| guest.name.starts_with("crash")).collect();
    for guest in &guests {
        assert!(own::SOURCE.contains(&format!("\"{}\"", guest.name)), "{} is in no test", guest.name);
    }
    assert!(guests.len() >= own::AT_LEAST, "{}", guests.len());
}
