//! The layers of ARCHITECTURE.md, checked on the `use crate::` lines of the code: each module may name only what stands
//! to its right; modules of one layer may name one another.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::path::{Path, PathBuf};

const LAYERS: &[&[&str]] = &[
    &["main", "cli", "top", "clones"],
    &["machine"],
    &["snapshot", "gdb", "report", "load", "check"],
    &["board"],
    &["virtio", "device"],
    &["vcpu", "vm"],
    &["arch"],
    &["bus", "irq", "clock", "console", "memory", "event", "trace", "explain", "stats", "control", "config"],
    &["host"],
    &["error"],
];
/// What devices never name, though it stands to their right.
const NOT_FOR_DEVICES: &[&str] = &["board", "vm", "vcpu", "arch"];

fn rust_files(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push(path);
        }
    }
}

fn layer(module: &str) -> usize {
    LAYERS.iter().position(|l| l.contains(&module)).unwrap_or_else(|| panic!("module {module} has no layer"))
}

/// The modules that the code names after `crate::` (or `bantam::`, in main), test modules aside.
fn named(code: &str) -> Vec<String> {
    let code = code.split("#[cfg(test)]\nmod ").next().unwrap_or(code);
    let code: String = code.lines().filter(|l| !l.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let mut names = Vec::new();
    for (at, prefix) in code.match_indices("crate::").chain(code.match_indices("bantam::")) {
        let rest = &code[at + prefix.len()..];
        let group = rest.strip_prefix('{').map_or(rest, |r| r.split('}').next().unwrap_or(r));
        let words = if rest.starts_with('{') { group.split(',').collect() } else { vec![group] };
        for word in words {
            let name: String = word.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if name.chars().next().is_some_and(char::is_lowercase) && !code[..at].ends_with('$') {
                names.push(name);
            }
        }
    }
    names
}

#[test]
fn each_module_names_only_what_stands_to_its_right() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&src, &mut files);
    let mut wrong = Vec::new();
    for file in &files {
        let relative = file.strip_prefix(&src).unwrap();
        let module = relative.components().next().unwrap().as_os_str().to_str().unwrap().trim_end_matches(".rs");
        if module == "lib" {
            continue;
        }
        for name in named(&std::fs::read_to_string(file).unwrap()) {
            let device = ["device", "virtio"].contains(&module) && NOT_FOR_DEVICES.contains(&name.as_str());
            if device || (name != module && layer(&name) < layer(module)) {
                wrong.push(format!("{} names {name}", relative.display()));
            }
        }
    }
    assert!(files.len() > 20 && wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_reading_finds_names_in_every_form() {
    let code = "use crate::bus::{Bus};\nuse crate::{arch, load::{self}};\nlet x = crate::vm::kvm();\n// crate::cli\nbantam::host::x";
    let mut names = named(code);
    names.sort();
    assert_eq!(names, ["arch", "bus", "host", "load", "vm"]);
}
