//! `cargo xtask order`: writes `start.ld`, by which the linker lays side by side what the start of a machine executes.
//!
//! The host's kernel maps sixteen pages around each page of a program that is touched. What runs is a fifth of the
//! program: scattered, it has nearly all of it mapped. Invariant: what is written has no hash of a compiler's in it, so
//! that it holds for the next compiler and for another architecture; what it does not name stays where it was.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};

use crate::{guest, sh};

/// What is run: a built-in guest that ends at once, and one of a file, in this folder, that has to be ended.
const RUNS: [&[&str]; 2] = [&["example", guest::ADD_NAME], &["run", "spin", "--memory", "512M", "--timeout", "1"]];

/// Builds Bantam, runs it under callgrind, and writes what the linker is to be told; or all is as it was.
pub fn run() -> Result<ExitCode> {
    let to = sh::root().join("xtask/start.ld");
    let before = fs::read(&to).with_context(|| to.display().to_string())?;
    write(&to).inspect_err(|_| {
        let _ = fs::write(&to, before);
    })
}

fn write(to: &Path) -> Result<ExitCode> {
    if !sh::require("valgrind", "valgrind") {
        bail!("without valgrind nobody knows what is executed");
    }
    let folder = sh::target().join("order");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    fs::write(folder.join("spin"), guest::SPIN).with_context(|| folder.display().to_string())?;
    // Valgrind knows one section of code. And cargo links anew only what other words ask for.
    fs::write(to, "").with_context(|| to.display().to_string())?;
    let map = folder.join(format!("map-{}", std::process::id()));
    let link = format!("link-arg=-Wl,-Map={}", map.display());
    sh::run(sh::cargo(&["rustc", "--quiet", "--release", "-p", "bantam", "--bin", "bantam", "--", "-C", &link]))?;
    let mut executed = BTreeSet::new();
    for words in RUNS {
        executed.extend(addresses(&folder, words)?);
    }
    let patterns: BTreeSet<_> = fs::read_to_string(&map)?
        .lines()
        .filter_map(Section::read)
        .filter(|section| executed.range(section.start..section.end).next().is_some())
        .flat_map(|section| section.patterns())
        .collect();
    let lines: String = patterns.iter().map(|pattern| format!("    {pattern}\n")).collect();
    let head = "/* Written by `cargo xtask order`: what the start of a machine executes. */\n";
    fs::write(to, format!("{head}SECTIONS\n{{\n  .text.start :\n  {{\n{lines}  }}\n}}\nINSERT BEFORE .text;\n"))?;
    println!("{}: {} patterns, from {} instructions", to.display(), patterns.len(), executed.len());
    Ok(ExitCode::SUCCESS)
}

/// The addresses of the instructions that a run executes.
fn addresses(folder: &Path, words: &[&str]) -> Result<BTreeSet<u64>> {
    let counts = folder.join("counts");
    let mut command = Command::new("valgrind");
    command.args(["--quiet", "--tool=callgrind", "--dump-instr=yes", "--compress-pos=no"]);
    command.arg(format!("--callgrind-out-file={}", counts.display()));
    command.arg(sh::target().join("release/bantam")).args(words).current_dir(folder);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().context("valgrind")?;
    let text = fs::read_to_string(&counts).with_context(|| format!("{}: no counts", sh::words(&command)))?;
    Ok(text.lines().filter_map(|line| hex(line.split_once(' ')?.0.strip_prefix("0x")?)).collect())
}

fn hex(digits: &str) -> Option<u64> {
    u64::from_str_radix(digits, 16).ok()
}

/// A section of code that went into the program.
struct Section<'a> {
    start: u64,
    end: u64,
    file: &'a str,
    name: &'a str,
}

impl<'a> Section<'a> {
    /// A line of the map that LLD writes: address, address, size, alignment, FILE:(SECTION).
    fn read(line: &'a str) -> Option<Self> {
        let mut words = line.split_whitespace();
        let (start, size) = (hex(words.next()?)?, hex(words.nth(1)?)?);
        let (file, name) = words.nth(1)?.strip_suffix(')')?.split_once(":(")?;
        name.starts_with(".text").then_some(Self { start, end: start + size, file, name })
    }

    /// What finds it again. A part of an archive has a name of its own; that of a Rust function has a hash at its end, or
    /// its crate's inside.
    fn patterns(&self) -> Vec<String> {
        if let Some((archive, part)) = self.file.strip_suffix(')').and_then(|file| file.rsplit_once('(')) {
            let archive = archive.rsplit('/').next().unwrap_or(archive);
            // What callgrind's CPU chooses is not what every CPU does.
            return match part.split_once("-avx") {
                Some((part, _)) => ["avx", "evex"].map(|cpu| format!("*{archive}:{part}-{cpu}*.o(.text*)")).into(),
                None => vec![format!("*{archive}:{part}(.text*)")],
            };
        }
        let name = match self.name.rsplit_once("17h") {
            Some((name, _)) => format!("{name}*"),
            None => without_crates(self.name),
        };
        // The start files of C have one without a name of its own.
        if name == ".text" { Vec::new() } else { vec![format!("*({name})")] }
    }
}

/// A name as in `_RNvNtCs5iDl6y_3std3foo` without the hashes of crates.
fn without_crates(name: &str) -> String {
    let mut parts = name.split("Cs");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |all, part| match part.split_once('_') {
        Some((hash, rest)) if !hash.is_empty() && hash.bytes().all(|b| b.is_ascii_alphanumeric()) => all + "*" + rest,
        _ => all + "Cs" + part,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_have_no_hashes() {
        let patterns = |text: &str| Section::read(text).map(|section| section.patterns().join(" "));
        let of = |file: &str| patterns(&format!("  fec00 fdc00 10 16         {file}")).unwrap_or_default();
        assert_eq!(of("/t/b.o:(.text._ZN6bantam3cli5parse17h0123456789abcdefE)"), "*(.text._ZN6bantam3cli5parse*)");
        assert_eq!(of("/t/b.o:(.text._RNvNtCs5iDl6y_3std3foo)"), "*(.text._RNvNt*3std3foo)");
        assert_eq!(of("/usr/lib/libc.a(malloc.o):(.text)"), "*libc.a:malloc.o(.text*)");
        let both = "*libc.a:strlen-avx*.o(.text*) *libc.a:strlen-evex*.o(.text*)";
        assert_eq!(of("/usr/lib/libc.a(strlen-avx2.o):(.text.avx)"), both);
        assert_eq!(of("/usr/lib/crt1.o:(.text)"), "");
        assert!(patterns("  fec00 fdc00 10 16         /t/b.o:(.rodata)").is_none());
        assert!(patterns("  fec00 fdc00 10 1                 main").is_none());
    }
}
