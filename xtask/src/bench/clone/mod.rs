//! `cargo xtask bench clone`: what a clone, a restored machine and a snapshot of a machine that runs cost.
//!
//! Invariant: counts come first, and what is compared takes turns. All figures are of images whose sums were compared once
//! before. The floor is in `src/bin/clone`, in one process with the library; each clone that lives meanwhile has a process of its own.

mod place;

use std::collections::BTreeMap;
use std::fs;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::{NOT_COUNTED, Pair, SHORT, Series, about, calls, memory, subject, verdict};
use crate::arch::Arch;
use crate::sh;
use place::{Kept, Place, children, wait_for};

/// Words of `cargo xtask bench clone`.
#[derive(clap::Args)]
pub struct Words {
    /// How often each side runs (a clone in one process ten times as often); under 30 the table says that it is not to be quoted
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Measure these lines only, as in 1,5
    #[arg(long, value_name = "LINES", value_delimiter = ',', value_parser = clap::value_parser!(u8).range(1..=5))]
    lines: Vec<u8>,
    /// How many clones of the same snapshot live meanwhile; they stand still after their first exit
    #[arg(long, value_name = "COUNTS", value_delimiter = ',', default_values_t = [0, 1, 10, 100, 1000])]
    live: Vec<usize>,
}

/// KVM ioctls of one clone without an interrupt controller.
const IOCTLS: u64 = 14;
/// A clone beside the floor; and its 99th percentile beside its median.
const RATIO: f64 = 1.2;
const TAIL: f64 = 3.0;
/// A GiB of RAM beside 16 MiB, restored.
const GROWTH: f64 = 2.0;
/// KiB of an idle clone's own memory.
const OWN: u64 = 200;
/// How long a machine with 1 GiB stands still, and what each GiB adds: ms.
const PAUSE: f64 = 10.0;
const PAUSE_OF_GIB: f64 = 3.0;

/// MiB that a guest has written to.
const SIZES: [u32; 3] = [16, 256, 1024];
/// Machines that came of a snapshot.
const OF_ONE: [&str; 2] = ["shared", "again"];

/// In real mode, counts in RAM and prints the last three bits as a digit, again and again (docs/snapshots.md).
const COUNTS: [u8; 17] =
    [0xba, 0xf8, 0x03, 0xff, 0x06, 0x00, 0x20, 0xa0, 0x00, 0x20, 0x24, 0x07, 0x04, 0x30, 0xee, 0xeb, 0xf2];
/// In real mode, prints a byte and waits for interrupts: `mov dx,0x3f8; mov al,'.'; out dx,al; sti; L: hlt; jmp L`
const IDLE: [u8; 10] = [0xba, 0xf8, 0x03, 0xb0, b'.', 0xee, 0xfb, 0xf4, 0xeb, 0xfd];

/// In protected mode, writes a word to each page of so many MiB, then prints for ever: `mov edi,0x100000; mov ecx,pages;
/// L: mov [edi],edi; add edi,0x1000; dec ecx; jnz L; mov dx,0x3f8; mov al,'.'; M: out dx,al; jmp M`
fn touches(mib: u32) -> Vec<u8> {
    [touches_once(mib), vec![0xeb, 0xfd]].concat()
}

/// The same, and then again from the start, for ever.
fn touches_again(mib: u32) -> Vec<u8> {
    let once = touches_once(mib);
    let back = (once.len() as u8 + 2).wrapping_neg();
    [once, vec![0xeb, back]].concat()
}

fn touches_once(mib: u32) -> Vec<u8> {
    let head = [0xbf, 0, 0, 0x10, 0, 0xb9];
    let rest = [0x89, 0x3f, 0x81, 0xc7, 0, 0x10, 0, 0, 0x49, 0x75, 0xf5, 0x66, 0xba, 0xf8, 0x03, 0xb0, b'.', 0xee];
    [&head[..], &(mib * 256).to_le_bytes(), &rest].concat()
}

/// Measures and prints.
pub fn run(words: &Words) -> Result<ExitCode> {
    if Arch::native() != Arch::X86_64 {
        bail!("bench clone: its guests and its floor are written for x86-64, not for this machine");
    }
    let place = Place::new(words.runs)?;
    let wanted = |line: u8| words.lines.is_empty() || words.lines.contains(&line);
    let few = if words.runs < 30 { " (fewer than 30: not to be quoted)" } else { "" };
    println!("\n{}; {} runs{few}, sides taking turns.\n", about(&subject::when()), words.runs);
    place.snapshot("none", &COUNTS, "--memory 16M --irqchip none")?;
    place.snapshot("idle", &IDLE, "--memory 128M --irqchip kernel")?;
    if wanted(2) {
        counts(&place)?;
    }
    if wanted(4) {
        println!("{}", own_memory(&place)?);
    }
    if wanted(1) {
        first_exits(&place, &words.live)?;
    }
    if wanted(3) {
        restores(&place)?;
    }
    if wanted(5) {
        pauses(&place)?;
    }
    fs::remove_dir_all(&place.folder)?;
    Ok(ExitCode::SUCCESS)
}

/// The second line: what one more clone calls in one process, by strace, its end included.
fn counts(place: &Place) -> Result<()> {
    if !sh::require("strace", "strace") {
        println!("2. KVM ioctls of a clone: {NOT_COUNTED}\n");
        return Ok(());
    }
    place.snapshot("kernel", &COUNTS, "--memory 16M --irqchip kernel")?;
    place.snapshot("split", &COUNTS, "--memory 16M --irqchip split")?;
    println!("| 2. of one clone | KVM ioctls | promised | all system calls, its end included | the ioctls by kind |");
    println!("|---|---|---|---|---|");
    for (of, side) in
        [("none", "floor"), ("none", "alone"), ("none", "served"), ("kernel", "alone"), ("split", "alone")]
    {
        let traced = |count: &str| -> Result<calls::Calls> {
            let (command, log) = (place.program("clone"), place.folder.join("strace.txt"));
            let mut strace = Command::new("strace");
            strace.args(["-f", "-qq", "-X", "raw", "-s", "0", "-o"]).arg(&log).arg(command.get_program());
            strace.args(["count", &format!("{of}.snapshot"), side, count]);
            strace.env("XDG_RUNTIME_DIR", &place.folder).current_dir(&place.folder);
            sh::output(strace)?;
            calls::read(&log)
        };
        let (few, many) = (traced("2")?, traced("3")?);
        let kinds: BTreeMap<_, _> =
            many.kvm.iter().map(|(kind, count)| (*kind, count - few.kvm.get(kind).unwrap_or(&0))).collect();
        let all: u64 = kinds.values().sum();
        let promise = match (of, side) {
            ("none", "alone" | "served") => format!("≤ {IOCTLS}: {}", verdict(all <= IOCTLS)),
            _ => "reported".into(),
        };
        let calls = many.all - few.all;
        println!("| --irqchip {of}, {side} | {all} | {promise} | {calls} | {} |", calls::kinds(&kinds));
    }
    println!();
    Ok(())
}

/// The fourth line.
fn own_memory(place: &Place) -> Result<String> {
    let clones = place::Live(place.bantam("clone idle.snapshot --serial none --name idle --count 2").spawn()?);
    // The event loop, the CPU, and a control socket that comes a little later.
    let threads = |child: &u32| fs::read_dir(format!("/proc/{child}/task")).map_or(0, Iterator::count);
    wait_for("two clones", || children(clones.0.id()).iter().filter(|child| threads(child) > 1).count() == 2)?;
    std::thread::sleep(Duration::from_millis(300));
    let clone = *children(clones.0.id()).first().context("no clone")?;
    let maps = fs::read_to_string(format!("/proc/{clone}/smaps"));
    clones.end()?;
    let memory::Own { total, parts } = memory::read(&maps?);
    let parts: Vec<_> = parts.iter().map(|(name, size)| format!("{name} {size}")).collect();
    Ok(format!(
        "4. own memory of an idle clone with 128 MiB of RAM, without that, KiB: {total} (≤ {OWN}: {}); of it {}\n",
        verdict(total <= OWN),
        parts.join(", ")
    ))
}

/// The values of the lines that begin so, in nanoseconds.
fn series(text: &str, prefix: &str) -> Series {
    Series(text.lines().filter_map(|line| line.strip_prefix(prefix)?.trim().parse().ok()).collect())
}

/// The first line, and its parts.
fn first_exits(place: &Place, live: &[usize]) -> Result<()> {
    println!(
        "| 1. clone to its first exit, µs, min / p50 / p99 | alone | floor | ratio, min / p50 | promised | served |"
    );
    println!("|---|---|---|---|---|---|");
    let mut parts = String::new();
    for count in live {
        let kept = place.kept("none", *count)?;
        let mut command = place.program("clone");
        let times = sh::output({
            command.args(["time", "none.snapshot", &(place.runs * SHORT).to_string()]);
            command
        })?;
        kept.map_or(Ok(()), Kept::end)?;
        let [alone, served] = ["alone", "served"].map(|side| series(&times, &format!("time {side} ")));
        let pair = Pair { bantam: alone, floor: series(&times, "time floor ") };
        let tail = pair.bantam.rank(0.99) / pair.bantam.p50();
        let promise = format!("p99 ≤ {TAIL} × p50: {tail:.1}, {}", verdict(tail <= TAIL));
        let line = pair.line(&format!("{count} live"), 1e3, 0, Some(RATIO));
        println!("{line}; {promise} | {} |", served.cell(1e3, 0));
        let cells = ["streams", "spawn", "run"].map(|part| series(&times, &format!("part {part} ")).cell(1e3, 0));
        parts += &format!("| {count} live | {} |\n", cells.join(" | "));
    }
    println!("\n| of it, µs | `Streams::open` | `Machine::spawn` | KVM_RUN |\n|---|---|---|---|\n{parts}");
    Ok(())
}

/// The third line.
fn restores(place: &Place) -> Result<()> {
    let sizes = [16, 1024];
    for mib in sizes {
        place.snapshot(&format!("t{mib}"), &touches(mib), &touched(mib))?;
    }
    let mut pair = Pair::default();
    for round in 0..=place.runs {
        for (side, mib) in [(subject::Side::Floor, 16), (subject::Side::Bantam, 1024)] {
            let time = restored(place, mib, "once")?;
            if round > 0 {
                pair.of(side).0.push(time);
            }
        }
    }
    println!("| min / p50 / p99, ms | 1 GiB | 16 MiB | ratio, min / p50 | promised |\n|---|---|---|---|---|");
    println!("{} |\n", pair.line("3. `bantam restore`, process start to end after one exit", 1e6, 2, Some(GROWTH)));
    checks(place)?;
    for mib in sizes {
        fs::remove_dir_all(place.folder.join(format!("t{mib}.snapshot")))?;
    }
    Ok(())
}

/// How long a process takes that goes on from a snapshot to its first exit, in nanoseconds.
fn restored(place: &Place, mib: u32, when: &str) -> Result<f64> {
    let words = format!("restore t{mib}.snapshot --serial none --max-exits 1 --verify {when}");
    let mut command = place.bantam(&words);
    let start = Instant::now();
    let status = command.status()?;
    let time = start.elapsed();
    ensure!(status.code() == Some(124), "{}: {status}", sh::words(&command));
    Ok(time.as_nanos() as f64)
}

/// What comparing its sums costs a restore: it is the same machine each time.
fn checks(place: &Place) -> Result<()> {
    let mut all = ["once", "always", "lazy"].map(|when| (when, Series::default()));
    for round in 0..=place.runs {
        for (when, times) in &mut all {
            let time = restored(place, 1024, when)?;
            // The first one with `once` compares all.
            if round > 0 {
                times.0.push(time);
            }
        }
    }
    println!("| the same of 1 GiB, ms, min / p50 / p99 | |\n|---|---|");
    for (when, times) in all {
        println!("| --verify {when} | {} |", times.cell(1e6, 2));
    }
    println!();
    Ok(())
}

fn touched(mib: u32) -> String {
    format!("--cpu-mode protected --memory {}M", mib + 16)
}

/// The fifth line: how long `bantam snapshot` says that a machine stood still. Only one runs at a time.
fn pauses(place: &Place) -> Result<()> {
    let mut machines = Vec::new();
    for mib in SIZES {
        let name = format!("p{mib}");
        let machine = place.start(&name, &touches(mib), &touched(mib))?;
        place.tell(&format!("pause {name}"))?;
        machines.push((name, machine, Series::default()));
    }
    // Those that came of a snapshot themselves.
    for (name, code) in OF_ONE.into_iter().zip([touches(1024), touches_again(1024)]) {
        place.snapshot(name, &code, &touched(1024))?;
        let machine = place.restored(name)?;
        place.tell(&format!("pause {name}"))?;
        machines.push((name.to_owned(), machine, Series::default()));
    }
    for round in 0..=place.runs {
        for (name, _, times) in &mut machines {
            place.tell(&format!("resume {name}"))?;
            let told = place.tell(&format!("snapshot {name} pause.snapshot"))?;
            place.tell(&format!("pause {name}"))?;
            fs::remove_dir_all(place.folder.join("pause.snapshot"))?;
            if round > 0 {
                times.0.push(stood_still(&told)?);
            }
        }
    }
    println!(
        "| 5. a snapshot of a machine that runs: it stands still, ms, min / p50 / p99 | | promised |\n|---|---|---|"
    );
    let mut least = None;
    let mut machines = machines.into_iter();
    for (mib, (_, machine, times)) in SIZES.into_iter().zip(&mut machines) {
        machine.end()?;
        let (middle, gib) = (times.p50(), f64::from(mib) / 1024.0);
        let (first, first_gib) = *least.get_or_insert((middle, gib));
        let growth = (middle - first) / (gib - first_gib);
        let promise = match mib {
            1024 => format!(
                "≤ {PAUSE} at p50: {}; ≤ {PAUSE_OF_GIB} more a GiB: {growth:.1}, {}",
                verdict(middle <= PAUSE),
                verdict(growth <= PAUSE_OF_GIB)
            ),
            _ => "reported".into(),
        };
        println!("| {mib} MiB that the guest has written to | {} | {promise} |", times.cell(1.0, 1));
    }
    for (what, (_, machine, times)) in ["shares with it", "has written to since"].into_iter().zip(machines) {
        machine.end()?;
        println!("| came of a snapshot: 1024 MiB that it {what} | {} | reported |", times.cell(1.0, 1));
    }
    Ok(())
}

/// Milliseconds.
fn stood_still(told: &str) -> Result<f64> {
    ensure!(!told.contains("until all was written"), "this host cannot keep RAM while its machine goes on: {told}");
    let (_, time) = told.split_once("stood still for ").context("`bantam snapshot` does not say how long")?;
    time.split(' ').next().unwrap_or("").parse().with_context(|| told.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_that_a_machine_stood_still_is_read() {
        assert_eq!(stood_still("64K of RAM; the machine stood still for 2.5 ms\n").unwrap(), 2.5);
        assert!(stood_still("64K of RAM; the machine stood still for 2.5 ms, until all was written (why)").is_err());
    }

    #[test]
    fn each_page_is_touched_once() {
        let code = touches(1024);
        assert_eq!(code[6..10], 262_144_u32.to_le_bytes());
        // The loop begins behind the two moves.
        assert_eq!((19 + 2_usize).wrapping_add_signed(isize::from(code[20].cast_signed())), 10);
    }

    #[test]
    fn a_series_is_that_of_its_key() {
        let text = "time floor 10\npart run 5\ntime alone 20\ntime floor 30\n";
        assert_eq!(series(text, "time floor ").0, [10.0, 30.0]);
    }
}
