//! `cargo xtask stats`: how large the code is, and where it breaks the rules of size (DESIGN rules 21, 22 and 11).
//!
//! Invariant: it counts code, not text: comments, blank lines and the tests at the end of a file are left out.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::arch::Arch;
use crate::{costs, sh};

/// Limits of rule 22, and the places of rule 21.
const FILE_LINES: usize = 500;
const FUNCTION_LINES: usize = 60;
const TRAIT_METHODS: usize = 9;
const UNSAFE_PLACES: [&str; 4] = ["src/memory", "src/vm.rs", "src/vcpu", "src/host/sys"];

/// What is worth knowing of one file.
#[derive(Debug, Default, PartialEq, Eq)]
struct File {
    lines: usize,
    tests: usize,
    unsafes: usize,
    arch: usize,
    /// Functions over the limit, in lines.
    long: Over,
    /// Traits over the limit, in methods.
    wide: Over,
}

/// Prints the figures.
pub fn run() -> Result<ExitCode> {
    let mut files = BTreeMap::new();
    for folder in ["src", "guests", "xtask", "tests", "examples", "benches"] {
        collect(&sh::root().join(folder), &mut files)?;
    }
    modules(&files);
    let (mut over, mut unsafes) = (Vec::new(), Vec::new());
    for (path, file) in &files {
        if file.lines > FILE_LINES {
            over.push(format!("{path}: {} lines of code (limit {FILE_LINES})", file.lines));
        }
        over.extend(file.long.iter().map(|(name, n)| format!("{path}: fn {name}: {n} lines (limit {FUNCTION_LINES})")));
        over.extend(
            file.wide.iter().map(|(name, n)| format!("{path}: trait {name}: {n} methods (limit {TRAIT_METHODS})")),
        );
        if file.unsafes > 0 {
            let odd = path.starts_with("src/") && !UNSAFE_PLACES.iter().any(|place| path.starts_with(place));
            unsafes.push(format!("{path}: {}{}", file.unsafes, if odd { "  OUTSIDE THE FOUR PLACES" } else { "" }));
        }
    }
    list("over the limits", &over);
    let mut largest: Vec<_> = files.iter().map(|(path, file)| (file.lines, path)).collect();
    largest.sort_by(|a, b| b.cmp(a));
    list("largest files", &largest.iter().take(5).map(|(lines, path)| format!("{path}: {lines}")).collect::<Vec<_>>());
    list("unsafe blocks", &unsafes);
    let elsewhere = files.iter().filter(|(path, _)| {
        path.starts_with("src/") && !path.starts_with("src/arch/") && !path.starts_with("src/board/")
    });
    let (arch, lines) = elsewhere.fold((0, 0), |(arch, lines), (_, file)| (arch + file.arch, lines + file.lines));
    println!(
        "\ncfg(target_arch) outside arch/ and board/: {arch} lines, {:.1} per thousand",
        1e3 * arch as f64 / lines.max(1) as f64
    );
    let read = |path: &String| fs::read_to_string(sh::root().join(path)).with_context(|| path.clone());
    let texts = files.keys().map(read).collect::<Result<Vec<_>>>()?;
    let sources: Vec<_> = files.keys().map(String::as_str).zip(texts.iter().map(String::as_str)).collect();
    println!("{}", costs::table(&sources));
    let (linked, macros) = dependencies(Arch::native())?;
    println!(
        "\ndependencies of bantam: {linked} crates linked, {macros} more to compile (procedural macros and theirs)"
    );
    Ok(ExitCode::SUCCESS)
}

/// One line for each module: a file or folder directly under src, and the other folders whole.
fn modules(files: &BTreeMap<String, File>) {
    let mut sums = BTreeMap::<&str, (usize, usize)>::new();
    for (path, file) in files {
        let depth = if path.starts_with("src/") { 2 } else { 1 };
        let end = path.match_indices('/').nth(depth - 1).map_or(path.len(), |(at, _)| at);
        let sum = sums.entry(path.get(..end).unwrap_or(path)).or_default();
        *sum = (sum.0 + file.lines, sum.1 + file.tests);
    }
    println!("{:24}{:>7}{:>7}", "lines of", "code", "tests");
    for (module, (lines, tests)) in &sums {
        println!("{module:24}{lines:7}{tests:7}");
    }
    let total = |f: fn(&File) -> usize| files.values().map(f).sum::<usize>();
    println!("{:24}{:7}{:7}", "all", total(|f| f.lines), total(|f| f.tests));
}

fn list(title: &str, lines: &[String]) {
    println!("\n{title}: {}", if lines.is_empty() { "none" } else { "" });
    lines.iter().for_each(|line| println!("  {line}"));
}

/// Crates that Bantam links on an architecture, and further ones that only its compilation needs.
pub fn dependencies(arch: Arch) -> Result<(usize, usize)> {
    let count = |edges| -> Result<usize> {
        let tree = sh::output(sh::cargo(&[
            "tree",
            "--quiet",
            "-p",
            "bantam",
            "-e",
            edges,
            "--prefix",
            "none",
            "--format",
            "{p}",
            "--target",
            arch.triple(),
        ]))?;
        let ours = |line: &&str| line.contains("(/") || line.trim().is_empty();
        let crates: BTreeSet<_> = tree.lines().map(|line| line.trim_end_matches(" (*)")).filter(|l| !ours(l)).collect();
        Ok(crates.iter().map(|line| line.trim_end_matches(" (proc-macro)")).collect::<BTreeSet<_>>().len())
    };
    let linked = count("normal,no-proc-macro")?;
    Ok((linked, count("normal")?.saturating_sub(linked)))
}

fn collect(path: &Path, files: &mut BTreeMap<String, File>) -> Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path).with_context(|| path.display().to_string())? {
            collect(&entry?.path(), files)?;
        }
    } else if path.extension().is_some_and(|e| e == "rs") {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let name = path.strip_prefix(sh::root()).unwrap_or(path).display().to_string();
        let whole = ["tests/", "examples/", "benches/"].iter().any(|folder| name.starts_with(folder));
        files.insert(name, measure(&text, whole));
    }
    Ok(())
}

/// Measures one file; `test` says that all of it is a test.
fn measure(text: &str, test: bool) -> File {
    let bare = scrub(text);
    let lines: Vec<&str> = bare.lines().collect();
    // Strings are blanked, so the names in an attribute are looked for in the text itself.
    let arch = |(code, text): (&&str, &str)| code.contains("cfg") && text.contains("target_arch");
    let end = if test { 0 } else { lines.iter().position(|l| l.trim() == "#[cfg(test)]").unwrap_or(lines.len()) };
    let (code, tests) = lines.split_at(end);
    let full = |lines: &[&str]| lines.iter().filter(|line| !line.trim().is_empty()).count();
    let words = |line: &&str| line.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|w| *w == "unsafe").count();
    let (long, wide) = items(code);
    File {
        lines: full(code),
        tests: full(tests),
        // A lint's name is `unsafe_code`, one word; so what counts is a block, a function or an implementation.
        unsafes: code.iter().map(words).sum(),
        arch: code.iter().zip(text.lines()).filter(|&line| arch(line)).count(),
        long,
        wide,
    }
}

/// Items over a limit: their names and sizes.
type Over = Vec<(String, usize)>;

/// Functions and traits over the limits.
fn items(lines: &[&str]) -> (Over, Over) {
    let (mut long, mut wide) = (Vec::new(), Vec::new());
    for (at, line) in lines.iter().enumerate() {
        let words: Vec<_> = line.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|w| !w.is_empty()).collect();
        let item = words.windows(2).find_map(|pair| match pair {
            ["fn", name] => Some((true, *name)),
            ["trait", name] => Some((false, *name)),
            _ => None,
        });
        let (Some((function, name)), Some(rest)) = (item, lines.get(at..)) else { continue };
        let body = body(rest);
        if function && body.len() > FUNCTION_LINES {
            long.push((name.into(), body.len()));
        }
        let methods = body.iter().filter(|line| line.trim_start().starts_with("fn ")).count();
        if !function && methods > TRAIT_METHODS {
            wide.push((name.into(), methods));
        }
    }
    (long, wide)
}

/// The lines between an item's opening brace and its closing one, blank ones left out.
fn body<'a>(lines: &[&'a str]) -> Vec<&'a str> {
    let (mut depth, mut inside) = (0_i32, Vec::new());
    for line in lines {
        let before = depth;
        let opened = line.matches('{').count();
        depth += i32::try_from(opened).unwrap_or(0) - i32::try_from(line.matches('}').count()).unwrap_or(0);
        // A declaration without a body, or the body's end.
        if depth <= 0 && (before > 0 || opened > 0 || line.trim_end().ends_with(';')) {
            break;
        }
        if before > 0 && !line.trim().is_empty() {
            inside.push(*line);
        }
    }
    inside
}

/// The text with comments gone and the insides of strings and characters blanked; lines stay lines.
pub fn scrub(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let (len, keep) = token(rest, out.chars().next_back());
        let (taken, left) = rest.split_at_checked(len).unwrap_or((rest, ""));
        if keep {
            out.push_str(taken);
        } else {
            // What opened a string stays to be seen as code.
            out.extend((c != '/').then_some('"'));
            out.extend(taken.chars().filter(|c| *c == '\n'));
        }
        rest = left;
    }
    out
}

/// The length of the token that `text` starts with, and whether it is code.
fn token(text: &str, before: Option<char>) -> (usize, bool) {
    let word = before.is_some_and(|c| c.is_alphanumeric() || c == '_');
    let first = text.chars().next().map_or(1, char::len_utf8);
    if text.starts_with("//") {
        return (text.find('\n').unwrap_or(text.len()), false);
    }
    if text.starts_with("/*") {
        return (text.find("*/").map_or(text.len(), |end| end + 2), false);
    }
    let hashes = text.strip_prefix('r').map(|t| t.len() - t.trim_start_matches('#').len());
    if let Some(hashes) = hashes.filter(|n| !word && text.get(1 + n..).is_some_and(|t| t.starts_with('"'))) {
        let close = format!("\"{}", "#".repeat(hashes));
        let start = hashes + 2;
        return (
            text.get(start..).and_then(|t| t.find(&close)).map_or(text.len(), |end| start + end + close.len()),
            false,
        );
    }
    if text.starts_with('"') {
        return (quoted(text, '"').unwrap_or(text.len()), false);
    }
    // A lifetime has no closing quote two characters on; a character has.
    let character = text.starts_with("'\\") || text.chars().nth(2) == Some('\'');
    if text.starts_with('\'') && character {
        return (quoted(text, '\'').unwrap_or(1), false);
    }
    (first, true)
}

/// The length of a quoted text, quotes included.
fn quoted(text: &str, quote: char) -> Option<usize> {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return Some(at + 1),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_strings_and_characters_are_no_code() {
        let text = "a // fn b() {\nlet c = \"{ // \\\" }\"; /* {\n{ */ d('{', '\\'', b'}') e::<'a>(r#\"{\"#)\n";
        let bare = scrub(text);
        assert!(!bare.contains(['{', '}', '/']), "{bare}");
        assert!(bare.contains("e::<'a>("), "{bare}");
        assert_eq!(bare.lines().count(), text.lines().count());
    }

    #[test]
    fn code_ends_where_the_tests_begin() {
        let text = "//! x\n\nfn a() {\n    unsafe { b() }\n}\n#[allow(unsafe_code)]\n#[cfg(target_arch = \"x86_64\")]\nmod c;\n\
                    #[cfg(test)]\nmod tests {\n    unsafe {}\n}\n";
        let file = measure(text, false);
        assert_eq!((file.lines, file.tests, file.unsafes, file.arch), (6, 4, 1, 1));
        assert_eq!(measure(text, true).lines, 0);
    }

    #[test]
    fn long_functions_and_wide_traits_are_found() {
        let text = |n: usize| {
            format!(
                "trait A {{\n{}}}\npub fn long(\n    a: u8,\n) -> u8 {{\n{}}}\nfn short() {{}}\n",
                "    fn m();\n".repeat(n),
                "    x();\n\n".repeat(n)
            )
        };
        assert_eq!(measure(&text(61), false).long, [("long".into(), 61)]);
        assert_eq!(measure(&text(10), false).wide, [("A".into(), 10)]);
        let small = measure(&text(9), false);
        assert!(small.long.is_empty() && small.wide.is_empty());
    }
}
