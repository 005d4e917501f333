//! `cargo xtask bench --host`: the same measurement inside a test host.
//!
//! Invariant: it is this very program, built for the host and started there, that measures. Nothing but its table
//! crosses the border. Time in the host is a count of instructions: the measurement repeats to a hundredth, whatever else
//! this machine does, where with a real clock one run differs from the next by a third.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Words, subject};
use crate::arch::Arch;
use crate::{cross, host, sh};

/// Where everything lies in the host.
const FOLDER: &str = "bench";

/// A host that takes longer than this hangs.
const LIMIT: Duration = Duration::from_secs(900);

/// Builds everything for the host, measures there and shows what is printed.
pub fn run(arch: Arch, words: &Words) -> Result<ExitCode> {
    let programs = ["build", "--quiet", "--release", "-p", "xtask", "--features", "inside"];
    sh::run(cross::cargo(arch, &programs)?)?;
    let built = cross::folder(arch);
    let mut files = vec![(format!("{FOLDER}/bantam"), cross::bantam(arch)?)];
    files.extend(["floor", "inside", "xtask"].map(|name| (format!("{FOLDER}/{name}"), built.join(name))));
    for (name, text) in [("when", subject::when()), ("crates", subject::crates(arch)?)] {
        files.push((format!("{FOLDER}/{name}"), note(arch, name, &text)?));
    }
    let job = host::Job { command: command(words), files, out: None, timeout: Some(LIMIT), memory: 2048, cpus: 1 };
    let show = |bytes: &[u8]| {
        let mut stdout = std::io::stdout().lock();
        Ok(stdout.write_all(bytes).and_then(|()| stdout.flush())?)
    };
    Ok(match host::enter_by(host::Clock::Instructions, arch, &job, show)? {
        Ok(status) => ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)),
        Err(trouble) => {
            eprintln!("xtask: {}", host::describe(&trouble, arch, job.timeout));
            ExitCode::FAILURE
        }
    })
}

/// A file with something that only this machine knows.
fn note(arch: Arch, name: &str, text: &str) -> Result<PathBuf> {
    let folder = sh::target().join("bench").join(arch.name());
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let file = folder.join(name);
    fs::write(&file, text).with_context(|| file.display().to_string())?;
    Ok(file)
}

/// This program's words in the host.
fn command(words: &Words) -> Vec<String> {
    let mut all = vec![format!("/{FOLDER}/xtask"), "bench".into(), "--inside".into(), format!("/{FOLDER}")];
    all.extend(["--runs".into(), words.runs.to_string()]);
    all.extend(words.exits.iter().flat_map(|exits| ["--exits".into(), exits.to_string()]));
    if words.itself {
        all.push("--itself".into());
    }
    if !words.lines.is_empty() {
        let lines: Vec<_> = words.lines.iter().map(u8::to_string).collect();
        all.extend(["--lines".into(), lines.join(",")]);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_the_measurement_go_with_it() {
        let (exits, host) = (Some(90), Some(Arch::Arm64));
        let words = Words { what: None, runs: 7, exits, itself: true, lines: vec![1, 5], host, inside: None };
        let text = command(&words).join(" ");
        assert_eq!(text, "/bench/xtask bench --inside /bench --runs 7 --exits 90 --itself --lines 1,5");
        let words = Words { exits: None, itself: false, lines: vec![], ..words };
        assert_eq!(command(&words).join(" "), "/bench/xtask bench --inside /bench --runs 7");
    }
}
