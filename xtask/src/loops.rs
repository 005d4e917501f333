//! "Off costs nothing", read from the instructions: the run loop that nobody watches beside the same loop written without
//! a word of traces (`src/vcpu/bare.rs`), as the compiler makes both for a release, before it links.

use std::fs;

use crate::sh;

/// The instructions of a function in an assembly listing: what is indented and no directive.
fn instructions<'a>(listing: &'a str, name: &str) -> Vec<&'a str> {
    let (label, end) = (format!("{name}:"), format!(".size\t{name},"));
    let lines = listing.lines().skip_while(|line| *line != label).skip(1);
    let body = lines.take_while(|line| !line.trim_start().starts_with(&end));
    body.filter(|line| line.starts_with('\t') && !line.starts_with("\t.")).map(str::trim).collect()
}

/// The functions that it calls.
fn calls(code: &[&str]) -> Vec<String> {
    let symbol = |line: &&str| {
        Some(
            line.split(|c: char| !c.is_alphanumeric() && c != '_')
                .find(|w| w.starts_with("_ZN") || w.starts_with("_R"))?
                .to_owned(),
        )
    };
    let mut all: Vec<_> = code.iter().filter_map(symbol).collect();
    all.sort();
    all
}

#[test]
fn the_loop_that_nobody_watches_has_no_instruction_more() {
    let file = sh::target().join("loops.s");
    let emit = format!("asm={}", file.display());
    let words = ["rustc", "--locked", "--quiet", "--release", "-p", "bantam", "--lib", "--features", "loops", "--"];
    sh::run(sh::cargo(&[&words[..], &["--emit", &emit]].concat())).unwrap();
    let listing = fs::read_to_string(&file).unwrap();
    let bare = instructions(&listing, "bantam_loop_bare");
    // The loop may be a function of its own, or in place.
    let mut off = instructions(&listing, "bantam_loop_off");
    if let [run_loop] = calls(&off).as_slice() {
        assert!(run_loop.contains("run_loop"), "{off:#?}");
        off = instructions(&listing, run_loop);
    }
    assert!(bare.len() > 20, "no loop is this short: {bare:#?}");
    assert_eq!((off.len(), calls(&off)), (bare.len(), calls(&bare)), "{off:#?}\n{bare:#?}");
}

#[test]
fn instructions_are_counted_and_directives_are_not() {
    let listing = "other:\n\tnop\nf:\n\t.cfi_startproc\n\tpush\trax\n.L1:\n\tcall\t*_ZN1a1bE@GOT(%rip)\n\tbl _ZN1c1dE\n\t.size\tf, 1\n\tret\n";
    let code = instructions(listing, "f");
    assert_eq!(code, ["push\trax", "call\t*_ZN1a1bE@GOT(%rip)", "bl _ZN1c1dE"]);
    assert_eq!(calls(&code), ["_ZN1a1bE", "_ZN1c1dE"]);
}
