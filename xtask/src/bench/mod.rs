//! `cargo xtask bench`: Bantam beside the floor, taking turns in the same run.
//!
//! Invariant: no figure without the floor's beside it and no time without counts, since times drift with the load of
//! the machine and counts do not. The clock starts before a process does and stops when it has been waited for.

mod calls;
mod memory;
mod subject;

use std::fs;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::{guest, sh, stats};
use calls::Calls;
use memory::Own;
use subject::{Guest, SIDES, Side};

/// Words of `cargo xtask bench`.
#[derive(clap::Args)]
pub struct Words {
    /// How often each side runs each guest (`add` ten times as often); under 30 the table says that it is not to be quoted
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Measure the floor against itself: how far the ratios are from 1 is what they are worth on this machine
    #[arg(long)]
    itself: bool,
    /// Measure these lines of the table only, as in 1,5
    #[arg(long, value_name = "LINES", value_delimiter = ',', value_parser = clap::value_parser!(u8).range(1..=5))]
    lines: Vec<u8>,
}

/// `add` takes milliseconds, where the others take a second: it runs this many times as often.
const SHORT: u32 = 10;

const NOT_COUNTED: &str = "no strace: nothing counted";

/// Times of one side, in nanoseconds.
#[derive(Debug, Default, Clone)]
struct Series(Vec<f64>);

impl Series {
    /// The value that a part of `share` is at most (nearest rank).
    fn rank(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (share * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
    }

    fn min(&self) -> f64 {
        self.rank(0.0)
    }

    fn p50(&self) -> f64 {
        self.rank(0.5)
    }

    fn cell(&self, unit: f64, digits: usize) -> String {
        let show = |share| format!("{:.digits$}", self.rank(share) / unit);
        format!("{} / {} / {}", show(0.0), show(0.5), show(0.99))
    }

    /// The time of one exit, where each run made `guest::EXITS` of them and `start` is what the rest of a run takes.
    fn per_exit(&self, start: f64) -> Self {
        Self(self.0.iter().map(|time| (time - start) / f64::from(guest::EXITS)).collect())
    }
}

/// What both sides took for one guest.
#[derive(Debug, Default)]
struct Pair {
    bantam: Series,
    floor: Series,
}

impl Pair {
    fn of(&mut self, side: Side) -> &mut Series {
        if side == Side::Bantam { &mut self.bantam } else { &mut self.floor }
    }

    fn per_exit(&self, start: &Self) -> Self {
        Self { bantam: self.bantam.per_exit(start.bantam.p50()), floor: self.floor.per_exit(start.floor.p50()) }
    }

    /// One line of the table, up to its counts.
    fn line(&self, name: &str, unit: f64, digits: usize, promised: f64) -> String {
        let (least, middle) = (self.bantam.min() / self.floor.min(), self.bantam.p50() / self.floor.p50());
        let kept = if middle <= promised { "kept" } else { "**MISSED**" };
        let (ours, floor) = (self.bantam.cell(unit, digits), self.floor.cell(unit, digits));
        format!("| {name} | {ours} | {floor} | {least:.3} / {middle:.3} | ≤ {promised:.2} × at p50: {kept}")
    }
}

/// Counts of a guest with many exits.
struct PerExit {
    calls: f64,
    allocations: Option<f64>,
}

impl PerExit {
    fn cell(&self) -> String {
        let kept = if self.calls < 0.01 { "kept" } else { "**MISSED**" };
        let allocations = match self.allocations {
            Some(n) => format!("{n:.5} ({})", if n == 0.0 { "kept" } else { "**MISSED**" }),
            None => "not measured".into(),
        };
        format!("calls but KVM_RUN an exit {:.5} (< 0.01: {kept}); allocations an exit {allocations}", self.calls)
    }
}

/// Measures and prints.
pub fn run(words: &Words) -> Result<ExitCode> {
    subject::prepare(words.itself)?;
    let wanted = |line: u8| words.lines.is_empty() || words.lines.contains(&line);
    for (line, guest) in [(1, Guest::Add), (2, Guest::None), (3, Guest::Serial)] {
        for side in SIDES.into_iter().filter(|_| wanted(line)) {
            side.verify(guest, words.itself).context("before any timing")?;
        }
    }
    let counted = if sh::require("strace", "strace") { Some(count(words.itself)?) } else { None };
    let inside = if wanted(2) || wanted(3) || wanted(4) { inside(words.itself)? } else { String::new() };
    println!("\n{}\n", machine(words));
    println!("| min / p50 / p99 | Bantam | floor | ratio, min / p50 | promised | counted |\n|---|---|---|---|---|---|");
    let add = interleaved(Guest::Add, words.runs.saturating_mul(SHORT), words.itself)?;
    if wanted(1) {
        let calls = counted.as_ref().map_or(NOT_COUNTED.into(), Counted::run);
        println!("{} | {calls} |", add.line("1. `add`, process start to process end, ms", 1e6, 3, 1.10));
    }
    let exits = [
        (2, Guest::None, "2. one of 100,000 `out` to no device, µs", "allocations-none"),
        (3, Guest::Serial, "3. one of 100,000 `out` to the 16550, µs", "allocations-serial"),
    ];
    for (line, guest, name, key) in exits.into_iter().filter(|(line, ..)| wanted(*line)) {
        let pair = interleaved(guest, words.runs, words.itself)?.per_exit(&add);
        let calls = counted.as_ref().map(|c| if line == 2 { c.none } else { c.serial });
        let cell = calls.map(|calls| PerExit { calls, allocations: value(&inside, key) }.cell());
        println!("{} | {} |", pair.line(name, 1e3, 3, 1.05), cell.as_deref().unwrap_or(NOT_COUNTED));
    }
    if wanted(4) {
        println!("| 4. `dispatch` through the full bus, ns | {} | — | — | reported | |", dispatch(&inside));
    }
    if wanted(5) {
        println!("{}", memory_line(words.itself)?);
    }
    if let Some(counted) = counted.filter(|_| wanted(1)) {
        let (table, unjustified) = calls::table(&counted.add, &counted.floor);
        println!("\n{table}\n{unjustified} KVM ioctls without a justification");
        let price = thread_price(words.runs.saturating_mul(SHORT))?;
        println!(
            "\n| min / p50 / p99, ms | with | without | ratio, min / p50 | the promise for `add` |\n|---|---|---|---|---|"
        );
        println!("{price} |");
    }
    Ok(ExitCode::SUCCESS)
}

/// Both sides in turns; the first turn of each warms caches and does not count.
fn interleaved(guest: Guest, runs: u32, itself: bool) -> Result<Pair> {
    let mut pair = Pair::default();
    for round in 0..=runs {
        for side in SIDES {
            let mut command = side.command(guest, itself);
            let start = Instant::now();
            let status = command.status()?;
            let time = start.elapsed();
            ensure!(status.success(), "{}: {status}", sh::words(&command));
            if round > 0 {
                pair.of(side).0.push(time.as_nanos() as f64);
            }
        }
    }
    Ok(pair)
}

/// The floor against itself with its vCPU on a named thread: how near to the floor a monitor with such threads can come.
fn thread_price(runs: u32) -> Result<String> {
    let mut pair = Pair::default();
    for round in 0..=runs {
        for (side, word) in [(Side::Floor, "add"), (Side::Bantam, "thread")] {
            let mut command = Command::new(Side::Floor.file(false));
            command.arg(word).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            let start = Instant::now();
            let status = command.status()?;
            let time = start.elapsed();
            ensure!(status.success(), "floor {word}: {status}");
            if round > 0 {
                pair.of(side).0.push(time.as_nanos() as f64);
            }
        }
    }
    Ok(pair.line("the floor, its vCPU on a named thread of its own", 1e6, 3, 1.10))
}

/// System calls: of a run of `add`, and those other than KVM_RUN of one exit.
struct Counted {
    add: Calls,
    floor: Calls,
    none: f64,
    serial: f64,
}

impl Counted {
    /// The calls of one run, both sides.
    fn run(&self) -> String {
        let sides = |f: fn(&Calls) -> u64| format!("{} (floor {})", f(&self.add), f(&self.floor));
        format!("system calls {}; KVM ioctls {}", sides(|c| c.all), sides(|c| c.kvm.values().sum()))
    }
}

fn count(itself: bool) -> Result<Counted> {
    let of = |guest, only| calls::count(&Side::Bantam.command(guest, itself), only);
    let add = of(Guest::Add, None)?;
    // A traced KVM_RUN takes ten times as long, and whatever Bantam does by the clock would count ten times. So
    // all calls but ioctl are counted at full speed, and ioctls in a shorter run.
    let an_exit = |many, few| -> Result<f64> {
        let exits = f64::from(guest::EXITS);
        let ioctls = of(few, Some("ioctl"))?.kvm_setup().saturating_sub(add.kvm_setup());
        Ok(of(many, Some("!ioctl"))?.all as f64 / exits + 10.0 * ioctls as f64 / exits)
    };
    let (none, serial) = (an_exit(Guest::None, Guest::FewNone)?, an_exit(Guest::Serial, Guest::FewSerial)?);
    let floor = calls::count(&Side::Floor.command(Guest::Add, itself), None)?;
    Ok(Counted { add, floor, none, serial })
}

/// What the program `inside` prints: lines of a key and values. Nothing where the floor stands in for Bantam.
fn inside(itself: bool) -> Result<String> {
    if itself {
        return Ok(String::new());
    }
    let words = ["run", "--quiet", "--release", "-p", "xtask", "--features", "inside", "--bin", "inside"];
    sh::output(sh::cargo(&words))
}

fn value(inside: &str, key: &str) -> Option<f64> {
    inside.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok())
}

fn dispatch(inside: &str) -> String {
    let lines: Vec<_> = inside.lines().filter_map(|line| line.strip_prefix("dispatch ")).collect();
    if lines.is_empty() { "not measured".into() } else { lines.join("; ") }
}

/// The fifth line: memory, size, dependencies.
fn memory_line(itself: bool) -> Result<String> {
    let (ours, floor) = (memory::own(Side::Bantam, itself)?, memory::own(Side::Floor, itself)?);
    let kept = if ours.total <= 2048 { "kept" } else { "**MISSED**" };
    let size = |side: Side| -> Result<u64> { Ok(fs::metadata(side.file(itself))?.len() / 1024) };
    let (linked, macros) = stats::dependencies()?;
    let Own { total, parts } = &ours;
    let parts: Vec<_> = parts.iter().map(|(name, size)| format!("{name} {size}")).collect();
    Ok(format!(
        "| 5. the monitor's own memory with 512 MiB of RAM, KiB | {total} | {} | {:.2} | ≤ 2048: {kept} | \
         of it: {}; binary {} KiB (floor {}); {linked} crates linked, {macros} more to compile |",
        floor.total,
        *total as f64 / floor.total as f64,
        parts.join(", "),
        size(Side::Bantam)?,
        size(Side::Floor)?,
    ))
}

/// Where and when this was measured.
fn machine(words: &Words) -> String {
    let first = |file: &str, key: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        text.lines()
            .find_map(|line| line.strip_prefix(key))
            .unwrap_or("")
            .trim_start_matches(['\t', ' ', ':'])
            .to_string()
    };
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let (cpu, kernel) = (first("/proc/cpuinfo", "model name"), first("/proc/sys/kernel/osrelease", ""));
    let module = ["kvm_intel", "kvm_amd", "kvm_pvm"]
        .into_iter()
        .find(|name| fs::exists(format!("/sys/module/{name}")).unwrap_or(false));
    let few = if words.runs < 30 { " (fewer than 30: not to be quoted)" } else { "" };
    let itself = if words.itself { "; THE FLOOR AGAINST ITSELF" } else { "" };
    format!(
        "{cpus} × {cpu}, Linux {kernel}, {}, load {}; {}, commit {}; {} runs{few} ({} of `add`), sides taking turns{itself}.",
        module.unwrap_or("KVM built in"),
        first("/proc/loadavg", "").split(' ').next().unwrap_or(""),
        sh::date(),
        sh::commit(),
        words.runs,
        words.runs.saturating_mul(SHORT),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_values_that_were_measured() {
        let series = Series((1..=100).rev().map(f64::from).collect());
        assert_eq!((series.min(), series.p50(), series.rank(0.99)), (1.0, 50.0, 99.0));
        assert_eq!(Series(vec![7.0]).rank(0.99), 7.0);
        assert!(Series::default().p50().is_nan());
    }

    #[test]
    fn a_promise_that_nobody_kept_is_called_missed() {
        let pair = |ours: f64| Pair { bantam: Series(vec![ours]), floor: Series(vec![100.0]) };
        assert!(pair(110.0).line("x", 1.0, 0, 1.10).ends_with("kept"));
        assert!(pair(111.0).line("x", 1.0, 0, 1.10).ends_with("**MISSED**"));
        assert!(pair(f64::NAN).line("x", 1.0, 0, 1.10).ends_with("**MISSED**"));
    }

    #[test]
    fn the_time_of_an_exit_leaves_the_start_out() {
        let start = Pair { bantam: Series(vec![3e6]), floor: Series(vec![2e6]) };
        let total = Pair { bantam: Series(vec![1.003e9]), floor: Series(vec![1.002e9]) };
        let exit = total.per_exit(&start);
        assert_eq!((exit.bantam.p50(), exit.floor.p50()), (1e4, 1e4));
    }

    #[test]
    fn what_inside_says_is_found_by_its_key() {
        let text = "allocations-none 0.5\ndispatch out no device 1 / 2 / 3\n";
        assert_eq!((value(text, "allocations-none"), value(text, "allocations-serial")), (Some(0.5), None));
        assert_eq!(dispatch(text), "out no device 1 / 2 / 3");
    }
}
