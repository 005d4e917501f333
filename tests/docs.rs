//! What the documentation shows is what the program prints: each capture of a built-in example, and those of README.md that
//! need nothing but this machine, are run again.
//!
//! A capture is an indented block that begins with `$`. Its lines must come in what is printed, in their order; times count
//! as equal, in statistics all numbers do, and `…` stands for the rest of a line or for lines.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::path::Path;

use common::{Run, host_is_emulated, kvm, program, skipped};

const README: &str = include_str!("../README.md");
const PAGES: [(&str, &str); 3] = [
    ("docs/post-mortem.md", include_str!("../docs/post-mortem.md")),
    ("docs/statistics.md", include_str!("../docs/statistics.md")),
    ("docs/tracing.md", include_str!("../docs/tracing.md")),
];

/// A command and what it is said to print.
#[derive(Debug, Default)]
struct Capture {
    arm64: bool,
    command: String,
    printed: Vec<String>,
}

/// The captures of a page. One is arm64's if the heading above it says so, or the paragraph just before it.
fn captures(page: &str) -> Vec<Capture> {
    let mut all = Vec::<Capture>::new();
    let (mut heading, mut paragraph) = (String::new(), String::new());
    let (mut block, mut apart) = (false, false);
    for line in page.lines() {
        let Some(text) = line.strip_prefix("    ") else {
            match line {
                "" => {}
                _ if line.starts_with('#') => (heading, paragraph) = (line.into(), String::new()),
                _ if apart => paragraph = line.into(),
                _ => paragraph += line,
            }
            (apart, block) = (line.is_empty(), block && line.is_empty());
            continue;
        };
        let command = text.strip_prefix("$ ");
        if let Some(command) = command {
            let arm64 = heading.contains("arm64") || paragraph.contains("arm64");
            all.push(Capture { arm64, command: command.into(), printed: Vec::new() });
        } else if let Some(last) = all.last_mut().filter(|_| block) {
            let goes_on = last.command.ends_with('\\') || last.command.matches('\'').count() % 2 == 1;
            match goes_on && last.printed.is_empty() {
                true => last.command += &format!("\n{text}"),
                false => last.printed.push(text.into()),
            }
        }
        (apart, block) = (true, true);
    }
    all
}

/// A line with one blank where there are several, and with what differs from run to run left out.
fn plain(line: &str, numbers: bool) -> String {
    let mut words: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
    let is_time = |unit: &str| ["ns", "µs", "ms", "s"].contains(&unit.trim_end_matches([',', ';', ':']));
    for at in 1..words.len() {
        let number = words[at - 1].chars().all(|c| c.is_ascii_digit() || ".,".contains(c));
        if number && is_time(&words[at]) {
            (words[at - 1], words[at]) = ("#".into(), "#".into());
        }
    }
    let mut text = words.join(" ");
    if numbers {
        text = text.chars().map(|c| if c.is_ascii_digit() { '#' } else { c }).filter(|c| !",.".contains(*c)).collect();
        while text.contains("##") {
            text = text.replace("##", "#");
        }
    }
    text
}

/// The first line of the capture that is on neither stream behind those before it. The streams are looked at one by one: on
/// a terminal a slow guest's half line may have a line of stderr behind it.
fn missing<'a>(capture: &'a Capture, streams: [&str; 2]) -> Option<&'a str> {
    let numbers = capture.command.contains("--stats");
    let mut rests = streams.map(str::lines);
    capture.printed.iter().map(String::as_str).find(|line| {
        let (beginning, whole) = line.split_once('…').map_or((*line, true), |(beginning, _)| (beginning, false));
        let wanted = plain(beginning, numbers);
        let said_in_words = line.trim().starts_with('(');
        let is_it = |line: &str| {
            let line = plain(line, numbers);
            if whole { line == wanted } else { line.starts_with(&wanted) }
        };
        let found = |rest: &mut std::str::Lines| {
            let mut ahead = rest.clone();
            let found = ahead.any(is_it);
            if found {
                *rest = ahead;
            }
            found
        };
        !said_in_words && !wanted.is_empty() && !rests.iter_mut().any(found)
    })
}

/// Runs the captures of a page that are `wanted`, in one folder; gives how many there were.
fn hold(name: &str, page: &str, wanted: impl Fn(&str) -> bool) -> usize {
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(program(), folder.path().join("bantam")).unwrap();
    let paths = std::env::var("PATH").unwrap_or_default();
    let mut count = 0;
    for capture in captures(page) {
        if capture.arm64 != cfg!(target_arch = "aarch64") || !wanted(&capture.command) {
            continue;
        }
        // The sh of many systems has a printf that knows no \\x.
        let (shell, applet) =
            if Path::new("/bin/bash").exists() { ("bash", None) } else { ("busybox", Some("sh".into())) };
        let words = applet.into_iter().chain(["-c".into(), capture.command.clone().into()]);
        let mut run = Run::of(Path::new(shell), words);
        run.command().current_dir(folder.path()).env("PATH", format!("{}:{paths}", folder.path().display()));
        let ended = run.run();
        let missing = missing(&capture, [&ended.out(), &ended.stderr]);
        assert!(missing.is_none(), "{name}: {}: {missing:?} is not in what it prints: {ended:#?}", capture.command);
        count += 1;
    }
    count
}

/// Captures of x86-64 are of a host whose KVM emulates the guest, those of arm64 of the test host; elsewhere KVM says other
/// things of a guest that dies.
fn is_their_host() -> bool {
    let theirs = if cfg!(target_arch = "x86_64") { !common::arch::runs_linux() } else { host_is_emulated() };
    if !theirs {
        skipped("the captures are of another kind of host");
    }
    theirs && kvm()
}

#[test]
fn the_readme_shows_what_is_printed() {
    if is_their_host() {
        let own = [
            "printf ",
            "bantam run add.bin",
            "bantam run counter.bin",
            "bantam run hello.bin",
            "echo hello",
            "bantam example ",
        ];
        let wanted = |command: &str| own.iter().any(|own| command.starts_with(own)) && !command.contains("linux");
        assert!(hold("README.md", README, wanted) >= 3);
    }
}

#[test]
fn the_pages_show_what_is_printed() {
    if is_their_host() {
        let wanted = |command: &str| command.starts_with("bantam example ");
        for (name, page) in PAGES {
            assert!(hold(name, page, wanted) > 0, "{name} has no capture of this architecture");
        }
    }
}

#[test]
fn captures_are_found_and_compared() {
    let page = "# One\n\nOn\narm64:\n\n    $ a 'b\n    c'\n    one 5 ms\n\n    $ d\n\nOn arm64.\n\nText.\n\n    $ e --stats\n    2,1 x 3.5 µs\n    …\n    q…\n";
    let all = captures(page);
    let seen: Vec<_> = all.iter().map(|c| (c.arm64, c.command.as_str(), c.printed.len())).collect();
    assert_eq!(seen, [(true, "a 'b\nc'", 1), (true, "d", 0), (false, "e --stats", 3)]);
    assert_eq!(missing(&all[0], ["zero\none  7.25 s\n", ""]), None);
    assert_eq!(missing(&all[0], ["one 7 bytes\n", "two\n"]), Some("one 5 ms"));
    assert_eq!(missing(&all[2], ["9 x 1 ns\nmore\nquite\n", ""]), None);
    assert_eq!(missing(&all[2], ["quite\n9 x 1 ns\n", ""]), Some("q…"));
    assert_eq!(missing(&all[2], ["quite\n", "9 x 1 ns\n"]), None, "another stream has its own order");
}
