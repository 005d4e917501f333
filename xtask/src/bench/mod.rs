//! `cargo xtask bench`: Bantam beside the floor, taking turns in the same run.
//!
//! Invariant: no figure without the floor's beside it and no time without counts, since times drift with the load of
//! the machine and counts do not. The clock starts before a process does and stops when it has been waited for.

mod boot;
mod calls;
mod clone;
mod host;
mod io;
mod memory;
mod subject;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::arch::Arch;
use crate::{guest, sh};
use calls::Calls;
use memory::Own;
use subject::{Guest, Place, SIDES, Side};

/// Words of `cargo xtask bench`.
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Words {
    #[command(subcommand)]
    what: Option<What>,
    /// How often each side runs each guest (`add` ten times as often, in a host three times); under 30 the table says that it is not to be quoted
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Measure the floor against itself: how far the ratios are from 1 is what they are worth on this machine
    #[arg(long)]
    itself: bool,
    /// Measure these lines of the table only, as in 1,5 (6: what looking in costs)
    #[arg(long, value_name = "LINES", value_delimiter = ',', value_parser = clap::value_parser!(u8).range(1..=6))]
    lines: Vec<u8>,
    /// Measure inside a test host, where times mean nothing and ratios and counts do
    #[arg(long, value_name = "ARCH")]
    host: Option<Arch>,
    /// Exits of the guests of lines 2 and 3 [default: 100000; 2000 in a host, where each takes long]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(100..))]
    exits: Option<u32>,
    /// This is the inside of a host, and this folder has all that was built outside
    #[arg(long, value_name = "FOLDER", hide = true)]
    inside: Option<PathBuf>,
}

/// What else can be measured.
#[derive(clap::Subcommand)]
enum What {
    /// Boot a stock Linux kernel in a test host, where time is a count of instructions: how long until it runs, until
    /// its first process runs, and by which exits
    Boot(boot::Words),
    /// Virtio devices by themselves, with a driver in the same process: what they do for a request, and how fast, beside
    /// the floor
    Io(io::Words),
    /// Clones, restored machines and snapshots of machines that run: KVM ioctls, own memory, times beside the floor
    Clone(clone::Words),
}

impl Words {
    fn place(&self) -> Result<Place> {
        match &self.inside {
            Some(folder) => Place::inside(folder.clone(), self.itself, self.exits.unwrap_or(HOST_EXITS)),
            None => Place::here(self.itself, self.exits.unwrap_or(guest::EXITS)),
        }
    }

    /// How often each side runs `add`.
    fn short_runs(&self) -> u32 {
        self.runs.saturating_mul(if self.inside.is_some() { SHORT_IN_HOST } else { SHORT })
    }
}

/// An exit in a host takes a tenth of a millisecond.
const HOST_EXITS: u32 = 2000;

/// `add` takes milliseconds, where the others take a second: it runs this many times as often.
const SHORT: u32 = 10;
/// In a host it takes a tenth of a second, and the others half of one.
const SHORT_IN_HOST: u32 = 3;

/// What is said of a promise.
fn verdict(kept: bool) -> &'static str {
    if kept { "kept" } else { "**MISSED**" }
}

const NOT_COUNTED: &str = "n/a: no strace";

const HOST_REMARK: &str = "INSIDE A TEST HOST: its CPU is a program (QEMU's TCG), and a nanosecond is one of its \
    instructions, so times mean nothing; ratios and counts do. Lines 2 and 3 are CPU time: by the clock, the end of \
    a VM waits for ticks of the kernel. An exit is cheaper than on hardware, so what is added to it weighs more.
";

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

    /// The time of one exit, where each run made `exits` of them and `start` is what the rest of a run takes.
    fn per_exit(&self, start: f64, exits: u32) -> Self {
        Self(self.0.iter().map(|time| (time - start) / f64::from(exits)).collect())
    }
}

/// What both sides took for one guest, by the clock and of CPUs.
#[derive(Debug, Default)]
struct Turns {
    clock: Pair,
    cpu: Pair,
}

impl Turns {
    /// Runs one side; a turn that does not count warms caches.
    fn take(&mut self, side: Side, command: &mut Command, counts: bool) -> Result<()> {
        let (start, cpu) = (Instant::now(), sh::cpu_of_children());
        let status = command.status()?;
        let (time, cpu) = (start.elapsed(), sh::cpu_of_children().saturating_sub(cpu));
        ensure!(status.success(), "{}: {status}", sh::words(command));
        if counts {
            self.clock.of(side).0.push(time.as_nanos() as f64);
            self.cpu.of(side).0.push(cpu.as_nanos() as f64);
        }
        Ok(())
    }

    fn of(&self, cpu: bool) -> &Pair {
        if cpu { &self.cpu } else { &self.clock }
    }
}

/// A series of each side.
#[derive(Debug, Default)]
struct Pair {
    bantam: Series,
    floor: Series,
}

impl Pair {
    fn of(&mut self, side: Side) -> &mut Series {
        if side == Side::Bantam { &mut self.bantam } else { &mut self.floor }
    }

    fn per_exit(&self, start: &Self, exits: u32) -> Self {
        Self {
            bantam: self.bantam.per_exit(start.bantam.p50(), exits),
            floor: self.floor.per_exit(start.floor.p50(), exits),
        }
    }

    /// One line of the table, up to its counts.
    fn line(&self, name: &str, unit: f64, digits: usize, promised: Option<f64>) -> String {
        let (least, middle) = (self.bantam.min() / self.floor.min(), self.bantam.p50() / self.floor.p50());
        let promise = match promised {
            None => "reported".into(),
            Some(most) => {
                format!("≤ {most:.2} × at p50: {}", verdict(middle <= most))
            }
        };
        let (ours, floor) = (self.bantam.cell(unit, digits), self.floor.cell(unit, digits));
        format!("| {name} | {ours} | {floor} | {least:.3} / {middle:.3} | {promise}")
    }
}

/// Counts of a guest with many exits.
struct PerExit {
    calls: f64,
    allocations: Option<f64>,
}

impl PerExit {
    fn cell(&self) -> String {
        let kept = verdict(self.calls < 0.01);
        let allocations = match self.allocations {
            Some(n) => format!("{n:.5} ({})", verdict(n == 0.0)),
            None => "not measured".into(),
        };
        format!("calls but KVM_RUN an exit {:.5} (< 0.01: {kept}); allocations an exit {allocations}", self.calls)
    }
}

/// Measures and prints.
pub fn run(words: &Words) -> Result<ExitCode> {
    match &words.what {
        Some(What::Boot(words)) => return boot::run(words),
        Some(What::Io(words)) => return io::run(words),
        Some(What::Clone(words)) => return clone::run(words),
        None => {}
    }
    if let Some(arch) = words.host {
        return host::run(arch, words);
    }
    let place = words.place()?;
    let wanted = |line: u8| words.lines.is_empty() || words.lines.contains(&line);
    for (line, guest) in [(1, Guest::Add), (2, Guest::None), (3, Guest::Serial)] {
        for side in SIDES.into_iter().filter(|_| wanted(line)) {
            place.verify(side, guest).context("before any timing")?;
        }
    }
    let counted = if sh::require("strace", "strace") { Some(count(&place)?) } else { None };
    let inside = if wanted(2) || wanted(3) || wanted(4) { place.measure_inside()? } else { String::new() };
    println!("\n{}\n", machine(words, &place));
    println!("| min / p50 / p99 | Bantam | floor | ratio, min / p50 | promised | counted |\n|---|---|---|---|---|---|");
    let add = interleaved(&place, Guest::Add, words.short_runs())?;
    if wanted(1) {
        let calls = counted.as_ref().map_or(NOT_COUNTED.into(), Counted::run);
        let name = format!("1. `{}`, process start to process end, ms", guest::ADD_NAME);
        println!("{} | {calls} |", add.clock.line(&name, 1e6, 3, Some(1.10)));
        let cpu = add.cpu.line("1. of it CPU time, ms", 1e6, 3, None);
        println!("{cpu} | without waits, such as for the kernel to close the VM |");
    }
    for (line, guest, to, key) in
        [(2, Guest::None, "no device", "allocations-none"), (3, Guest::Serial, guest::UART, "allocations-serial")]
    {
        if !wanted(line) {
            continue;
        }
        let pair =
            interleaved(&place, guest, words.runs)?.of(place.in_host).per_exit(add.of(place.in_host), place.exits);
        let calls = counted.as_ref().map(|c| if line == 2 { c.none } else { c.serial });
        let cell = calls.map(|calls| PerExit { calls, allocations: value(&inside, key) }.cell());
        let name = format!("{line}. one of {} {} to {to}, µs", place.exits, guest::EXIT);
        println!("{} | {} |", pair.line(&name, 1e3, 3, Some(1.05)), cell.as_deref().unwrap_or(NOT_COUNTED));
    }
    if wanted(4) {
        println!("| 4. `dispatch` through the full bus, ns | {} | — | — | reported | |", dispatch(&inside));
    }
    if wanted(5) {
        println!("{}", memory_line(&place)?);
    }
    if wanted(6) && !words.itself {
        println!("{}", looks(&place, words.runs, &add.of(place.in_host).bantam)?);
    }
    if let Some(counted) = counted.filter(|_| wanted(1)) {
        explain_line_1(&counted, &place, words.short_runs())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints what the difference of the first line is made of.
fn explain_line_1(counted: &Counted, place: &Place, runs: u32) -> Result<()> {
    let (table, unjustified) = calls::table(&counted.add, &counted.floor);
    println!("\n{table}\n{unjustified} KVM ioctls without a justification");
    let price = thread_price(place, runs)?;
    println!("\n| min / p50 / p99, ms | with | without | ratio, min / p50 | the promise for `add` |");
    println!("|---|---|---|---|---|\n{price} |");
    Ok(())
}

/// Both sides in turns; the first turn of each warms caches and does not count.
fn interleaved(place: &Place, guest: Guest, runs: u32) -> Result<Turns> {
    let mut turns = Turns::default();
    for round in 0..=runs {
        for side in SIDES {
            turns.take(side, &mut place.command(side, guest), round > 0)?;
        }
    }
    Ok(turns)
}

/// The floor against itself with its vCPU on a named thread: how near to the floor a monitor with such threads can come.
fn thread_price(place: &Place, runs: u32) -> Result<String> {
    let mut pair = Pair::default();
    for round in 0..=runs {
        for (side, word) in [(Side::Floor, "add"), (Side::Bantam, "thread")] {
            let mut command = Command::new(place.program(Side::Floor));
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
    Ok(pair.line("the floor, its vCPU on a named thread of its own", 1e6, 3, Some(1.10)))
}

/// Ways of looking in, and what each may cost an exit. The first is every machine's; `--core` keeps more of an exit, as
/// `--trace=FILE.json` does.
const LOOKS: [(&str, &str, f64); 4] = [
    ("the last 32 exits", "--last-exits=on", 1.00 + NOISE),
    ("--stats", "--stats=looks.txt", 1.02),
    ("a ring of exits", "--core=looks.core", 1.05),
    ("--trace to a file", "--trace=looks.txt", 1.25),
];
/// How far from 1.00 a ratio of equals may be; `--itself` shows what it is.
const NOISE: f64 = 0.01;
/// Nobody looks in.
const BLIND: &str = "--last-exits=off";

/// Bantam against itself, looking in and not, in turns: what that costs an exit.
fn looks(place: &Place, runs: u32, start: &Series) -> Result<String> {
    let mut turns = LOOKS.map(|_| Turns::default());
    for round in 0..=runs {
        for (turns, (_, word, _)) in turns.iter_mut().zip(LOOKS) {
            for (side, word) in [(Side::Floor, BLIND), (Side::Bantam, word)] {
                let mut command = place.command(Side::Bantam, Guest::None);
                turns.take(side, command.arg(word).current_dir(&place.guests), round > 0)?;
            }
        }
    }
    let alike = Pair { bantam: start.clone(), floor: start.clone() };
    let lines = turns.iter().zip(LOOKS).map(|(turns, (name, _, promise))| {
        let name = format!("6. {name}: one of {} {} to no device, µs", place.exits, guest::EXIT);
        let pair = turns.of(place.in_host).per_exit(&alike, place.exits);
        pair.line(&name, 1e3, 3, Some(promise)) + " | with it : without |"
    });
    Ok(lines.collect::<Vec<_>>().join("\n"))
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

fn count(place: &Place) -> Result<Counted> {
    let of = |guest, only| calls::count(&place.command(Side::Bantam, guest), only, &place.guests);
    let add = of(Guest::Add, None)?;
    // A traced KVM_RUN takes ten times as long, and whatever Bantam does by the clock would count ten times. So
    // all calls but ioctl are counted at full speed, and ioctls in a shorter run. What every run makes is no exit's.
    let start = of(Guest::Add, Some("!ioctl"))?.all;
    let an_exit = |many, few| -> Result<f64> {
        let exits = f64::from(place.exits);
        let ioctls = of(few, Some("ioctl"))?.kvm_setup().saturating_sub(add.kvm_setup());
        let others = of(many, Some("!ioctl"))?.all.saturating_sub(start);
        Ok((others + 10 * ioctls) as f64 / exits)
    };
    let (none, serial) = (an_exit(Guest::None, Guest::FewNone)?, an_exit(Guest::Serial, Guest::FewSerial)?);
    let floor = calls::count(&place.command(Side::Floor, Guest::Add), None, &place.guests)?;
    Ok(Counted { add, floor, none, serial })
}

fn value(inside: &str, key: &str) -> Option<f64> {
    inside.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok())
}

fn dispatch(inside: &str) -> String {
    let lines: Vec<_> = inside.lines().filter_map(|line| line.strip_prefix("dispatch ")).collect();
    if lines.is_empty() { "not measured".into() } else { lines.join("; ") }
}

/// The fifth line: memory, size, dependencies.
fn memory_line(place: &Place) -> Result<String> {
    let (ours, floor) = (memory::own(place, Side::Bantam)?, memory::own(place, Side::Floor)?);
    let kept = verdict(ours.total <= 2048);
    let size = |side: Side| -> Result<u64> { Ok(fs::metadata(place.program(side))?.len() / 1024) };
    let Own { total, parts } = &ours;
    let parts: Vec<_> = parts.iter().map(|(name, size)| format!("{name} {size}")).collect();
    Ok(format!(
        "| 5. the monitor's own memory with 512 MiB of RAM, KiB | {total} | {} | {:.2} | ≤ 2048: {kept} | \
         of it: {}; binary {} KiB (floor {}); {} |",
        floor.total,
        *total as f64 / floor.total as f64,
        parts.join(", "),
        size(Side::Bantam)?,
        size(Side::Floor)?,
        place.crates,
    ))
}

/// The machine, and `when`.
fn about(when: &str) -> String {
    let first = |file: &str, key: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap_or("");
        line.trim_start_matches(['\t', ' ', ':']).to_string()
    };
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    // arm64 kernels give numbers instead of a name.
    let cpu = Some(first("/proc/cpuinfo", "model name")).filter(|name| !name.is_empty());
    let module = ["kvm_intel", "kvm_amd", "kvm_pvm"]
        .into_iter()
        .find(|name| fs::exists(format!("/sys/module/{name}")).unwrap_or(false));
    format!(
        "{cpus} × {}, Linux {}, {}, load {}; {when}",
        cpu.as_deref().unwrap_or(std::env::consts::ARCH),
        first("/proc/sys/kernel/osrelease", ""),
        module.unwrap_or("KVM built in"),
        first("/proc/loadavg", "").split(' ').next().unwrap_or(""),
    )
}

/// Where and when this was measured.
fn machine(words: &Words, place: &Place) -> String {
    let few = if words.runs < 30 { " (fewer than 30: not to be quoted)" } else { "" };
    let itself = if place.itself { "; THE FLOOR AGAINST ITSELF" } else { "" };
    let host = if place.in_host { HOST_REMARK } else { "" };
    format!(
        "{host}{}; {} runs{few} ({} of `{}`), sides taking turns{itself}. {}",
        about(&place.when),
        words.runs,
        words.short_runs(),
        guest::ADD_NAME,
        guest::REMARK,
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
        assert!(pair(110.0).line("x", 1.0, 0, Some(1.10)).ends_with("kept"));
        assert!(pair(111.0).line("x", 1.0, 0, Some(1.10)).ends_with("**MISSED**"));
        assert!(pair(f64::NAN).line("x", 1.0, 0, Some(1.10)).ends_with("**MISSED**"));
        assert!(pair(200.0).line("x", 1.0, 0, None).ends_with("2.000 / 2.000 | reported"));
    }

    #[test]
    fn the_time_of_an_exit_leaves_the_start_out() {
        let start = Pair { bantam: Series(vec![3e6]), floor: Series(vec![2e6]) };
        let total = Pair { bantam: Series(vec![1.003e9]), floor: Series(vec![1.002e9]) };
        let exit = total.per_exit(&start, 100_000);
        assert_eq!((exit.bantam.p50(), exit.floor.p50()), (1e4, 1e4));
    }

    #[test]
    fn what_inside_says_is_found_by_its_key() {
        let text = "allocations-none 0.5\ndispatch out no device 1 / 2 / 3\n";
        assert_eq!((value(text, "allocations-none"), value(text, "allocations-serial")), (Some(0.5), None));
        assert_eq!(dispatch(text), "out no device 1 / 2 / 3");
    }
}
