//! `cargo xtask bench io`: virtio devices by themselves, with a driver of the bench's own: no guest, no KVM.
//!
//! Invariant: counts come first, and no time without the floor's beside it, of the same run, in turns. The floor moves the
//! same bytes with the fewest copies and system calls that there are: `src/bin/io` says how.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};

use super::{Series, about, calls, subject, value, verdict};
use crate::arch::Arch;
use crate::host::packages::{HOSTS, Set};
use crate::sh;

/// Words of `cargo xtask bench io`.
#[derive(clap::Args)]
pub struct Words {
    /// How often each side runs; under 30 the table says that it is not to be quoted
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Requests of a run
    #[arg(long, value_name = "N", default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1000..))]
    requests: u32,
    /// In a test host instead: a Linux guest's disk and card, beside what the host's own programs do with theirs
    #[arg(long, value_name = "ARCH", conflicts_with_all = ["runs", "requests"])]
    host: Option<Arch>,
}

/// Two tests say so.
const BESIDE: &str = "beside_the_hosts_own_speed";

/// Runs a program of the folder that it lies in, the same in a host and in a guest, which has no other libraries.
const RUN: &str = "#!/bin/busybox sh
cd /tools || exit 1
lib=$(echo lib/*-linux-gnu) usr=$(echo usr/lib/*-linux-gnu) program=$1
shift
exec $lib/ld-linux-* --library-path $lib:$usr:$usr/ceph usr/bin/$program \"$@\"
";

/// fio and iperf3 and all that they need, as an archive.
fn tools(arch: Arch) -> Result<PathBuf> {
    let packages = ["fio", "iperf3", "zlib1g"].map(String::from).to_vec();
    let set = Set { name: "measuring", suite: HOSTS, arch, packages, only: "lib", finish: |_| Ok(()) };
    let (programs, folder) = (set.folder()?, sh::target().join("bench").join(arch.name()));
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let run = folder.join("run");
    fs::write(&run, RUN).with_context(|| run.display().to_string())?;
    fs::set_permissions(&run, PermissionsExt::from_mode(0o755))?;
    let (tar, mut command) = (folder.join("tools.tar"), sh::program("tar", &["--owner=0", "--group=0", "-cf"]));
    command
        .arg(&tar)
        .arg("-C")
        .arg(&folder)
        .arg("run")
        .arg("-C")
        .arg(&programs)
        .args(["usr/bin/fio", "usr/bin/iperf3"]);
    let libraries = ["lib", "usr/lib"].map(|lib| format!("{lib}/{}", arch.libraries()));
    command.args(libraries.iter().filter(|lib| programs.join(lib).exists()));
    sh::run(command)?;
    Ok(tar)
}

/// Shows what those tests say.
fn beside(arch: Arch) -> Result<ExitCode> {
    let itself = std::env::current_exe().context("this program")?;
    let mut test = Command::new(itself);
    test.args(["test", "--only", arch.name(), BESIDE]).env("BANTAM_TOOLS", tools(arch)?);
    test.stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = test.spawn().context("cargo xtask test")?;
    let told = BufReader::new(child.stderr.take().context("no stderr")?);
    let mut rows = Vec::new();
    for line in told.lines() {
        let line = line?;
        match line.strip_prefix("-- linux: beside ") {
            Some(row) => rows.push(row.to_owned()),
            None => eprintln!("{line}"),
        }
    }
    if !child.wait()?.success() || rows.is_empty() {
        bail!("`cargo xtask test --only {} {BESIDE}` says why", arch.name());
    }
    println!("\n{}\n", about(&subject::when()));
    println!(
        "| {} test host, MiB a second | the host's own | a Linux guest's | ratio |\n|---|---|---|---|",
        arch.name()
    );
    rows.iter().for_each(|row| println!("{row}"));
    Ok(ExitCode::SUCCESS)
}

/// What is measured: its key, what it is, and the part of the floor's rate that is promised.
const SUBJECTS: [(&str, &str, f64); 5] = [
    ("block-read", "disk: 4 KiB read from the page cache", 0.8),
    ("net-out", "card on a socket: frame of 1514 bytes sent", 0.6),
    ("net-in", "the same, received", 0.6),
    ("vsock-out", "vsock: 2 KiB sent", 0.6),
    ("vsock-in", "vsock: 4 KiB received", 0.6),
];

/// What is counted for each request, and how much is promised.
const COUNTS: [(&str, f64); 4] = [("kicks", 0.2), ("interrupts", 0.2), ("calls", 0.1), ("allocations", 0.0)];

/// Measures and prints.
pub fn run(words: &Words) -> Result<ExitCode> {
    if let Some(arch) = words.host {
        return beside(arch);
    }
    sh::run(sh::cargo(&["build", "--quiet", "--release", "-p", "xtask", "--features", "inside", "--bin", "io"]))?;
    let folder = sh::target().join("bench").join("io");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let few = if words.runs < 30 { " (fewer than 30: not to be quoted)" } else { "" };
    let (runs, requests) = (words.runs, words.requests);
    println!(
        "\n{}; {runs} runs{few} of {requests} requests, 32 at a time, sides taking turns.\n",
        about(&subject::when())
    );
    println!("| for each request, the device on its thread | kicks | interrupts | system calls | allocations |");
    println!("|---|---|---|---|---|");
    for (key, name, _) in SUBJECTS {
        let counted = count(key, requests, &folder)?;
        let cells = COUNTS.map(|(what, most)| cell(value(&counted, what), f64::from(requests), most));
        println!("| {name} | {} |", cells.join(" | "));
    }
    let times = sh::output(io(&["time", &runs.to_string(), &requests.to_string()], &folder))?;
    println!(
        "\n| min / p50 / p99, ns a request | floor | device alone | rate, of the floor's | promised | on its thread |"
    );
    println!("|---|---|---|---|---|---|");
    for (key, name, promised) in SUBJECTS {
        println!("{}", line(&times, key, name, promised));
    }
    fs::remove_dir_all(&folder)?;
    Ok(ExitCode::SUCCESS)
}

fn io(words: &[&str], folder: &Path) -> Command {
    let mut command = Command::new(sh::target().join("release").join("io"));
    command.args(words).arg(folder);
    command
}

/// What the program counts itself, and `calls`: system calls of the device, where strace is there to count them.
fn count(key: &str, requests: u32, folder: &Path) -> Result<String> {
    let mut said = sh::output(io(&["count", key, &requests.to_string()], folder))?;
    if sh::require("strace", "strace") {
        let traced = |requests: u32| -> Result<f64> {
            let (command, log) = (io(&["count", key, &requests.to_string()], folder), folder.join("strace.txt"));
            let mut strace = Command::new("strace");
            strace.args(["-f", "-qq", "-X", "raw", "-s", "0", "-o"]).arg(&log);
            let said = sh::output({
                strace.arg(command.get_program()).args(command.get_args());
                strace
            })?;
            // The driver's own, and those of the other ends, are nobody's.
            Ok(calls::read(&log)?.all as f64 - value(&said, "own").unwrap_or(0.0))
        };
        // What the start takes is no request's.
        let (least, most) = (traced(requests)?, traced(2 * requests)?);
        said += &format!("calls {}\n", most - least);
    }
    Ok(said)
}

fn cell(count: Option<f64>, requests: f64, most: f64) -> String {
    let Some(each) = count.map(|count| count / requests) else { return "not measured".into() };
    let kept = verdict(each <= most);
    format!("{each:.3} (≤ {most}: {kept})")
}

/// One line of the table of times.
fn line(times: &str, key: &str, name: &str, promised: f64) -> String {
    let series = |side: &str| {
        let prefix = format!("time {key} {side} ");
        Series(times.lines().filter_map(|line| line.strip_prefix(&prefix)?.parse().ok()).collect())
    };
    let (floor, alone, thread) = (series("floor"), series("alone"), series("thread"));
    let (best, middle) = (floor.min() / alone.min(), floor.p50() / alone.p50());
    let kept = verdict(middle >= promised);
    let [floor, alone, thread] = [floor, alone, thread].map(|series| series.cell(1.0, 0));
    format!("| {name} | {floor} | {alone} | {best:.2} / {middle:.2} | ≥ {promised} at p50: {kept} | {thread} |")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_the_floors_time_by_the_devices() {
        let times = "time x floor 80\ntime x alone 100\ntime x thread 200\ntime y alone 1\n";
        assert_eq!(
            line(times, "x", "X", 0.8),
            "| X | 80 / 80 / 80 | 100 / 100 / 100 | 0.80 / 0.80 | ≥ 0.8 at p50: kept | 200 / 200 / 200 |"
        );
        assert!(line(times, "x", "X", 0.81).contains("MISSED") && line(times, "z", "Z", 0.1).contains("MISSED"));
    }

    #[test]
    fn counts_are_of_one_request() {
        assert_eq!(cell(Some(100.0), 1000.0, 0.1), "0.100 (≤ 0.1: kept)");
        assert_eq!(cell(Some(1.0), 1000.0, 0.0), "0.001 (≤ 0: **MISSED**)");
        assert_eq!(cell(None, 1.0, 1.0), "not measured");
    }
}
