//! `cargo xtask test`: every test, in lanes, counted.
//!
//! Invariant: a test that could not run is never counted as one that passed. Such a test appends a line
//! `SKIPPED: name: why` to the file that BANTAM_SKIP_LOG names (libtest itself reports it as passed), and all of them
//! are listed at the end.
//!
//! The two test hosts run side by side: each keeps a little more than one processor busy, and all that is to come from the
//! second is shown when the first is done.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::thread::ScopedJoinHandle;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::arch::Arch;
use crate::{cross, drivers, lane, sh};

/// Words of `cargo xtask test`.
#[derive(clap::Args)]
pub struct Words {
    /// Run this lane only (repeatable) [default: all]
    #[arg(long, value_name = "LANE", value_parser = LANES.map(|lane| lane.name))]
    only: Vec<String>,
    /// Run only tests whose names contain this
    filter: Option<String>,
}

/// Takes the lines that a lane prints.
type Show<'a> = &'a mut dyn FnMut(&str);

/// Tests that run in the same place: here, or in a test host of `cargo xtask host`.
struct Lane {
    name: &'static str,
    what: &'static str,
    run: fn(filter: Option<&str>, show: Show<'_>) -> Result<Tally>,
    /// It has a host of its own.
    hosted: bool,
}

const LANES: [Lane; 4] = [
    Lane { name: "unit", what: "tests beside the code; they need no KVM", run: unit, hosted: false },
    Lane { name: "native", what: "whole machines on this host's /dev/kvm", run: native, hosted: false },
    Lane { name: "x86_64", what: "whole machines on the x86-64 test host", run: x86_64, hosted: true },
    Lane { name: "arm64", what: "all tests of the monitor on the arm64 test host", run: arm64, hosted: true },
];

/// Files under tests/ that start no machine.
const NEED_NO_MACHINE: [&str; 3] = ["fuzz_loaders", "fuzz_virtio", "layering"];

/// Files for which once is enough, here: one reads the repository and not the program, one needs a
/// debugger, one a guest for a PC that runs anywhere.
const NEED_NO_HOST: [&str; 3] = ["debugger", "drivers", "layering"];

/// Programs that tests call: the program and its Debian package.
const PROGRAMS: [(&str, &str); 2] = [("strace", "strace"), ("gdb", "gdb")];

/// What became of the tests of a lane.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: Vec<String>,
    skipped: Vec<(String, String)>,
    /// Failures that libtest counted.
    counted: u64,
}

impl Tally {
    /// Takes in one line that libtest printed.
    fn line(&mut self, line: &str) {
        if let Some(result) = line.strip_prefix("test result: ") {
            let before = |word: &str| -> u64 {
                let words: Vec<_> = result.split([' ', ';', '.']).filter(|w| !w.is_empty()).collect();
                let pair = words.windows(2).find(|pair| pair.get(1) == Some(&word));
                pair.and_then(|pair| pair.first()?.parse().ok()).unwrap_or(0)
            };
            self.passed += before("passed");
            self.counted += before("failed");
        } else if let Some((name, fate)) = line.strip_prefix("test ").and_then(|test| test.rsplit_once(" ... ")) {
            match fate.strip_prefix("ignored") {
                Some(why) => {
                    let why = why.trim_start_matches([',', ' ']);
                    self.skipped.push((name.into(), if why.is_empty() { "marked #[ignore]" } else { why }.into()));
                }
                None if fate == "FAILED" => self.failed.push(name.into()),
                None => {}
            }
        }
    }

    /// Takes in the skip log: libtest counted these tests as passed.
    fn skips(&mut self, log: &str) {
        let lines = log.lines().map(|line| line.strip_prefix("SKIPPED: ").unwrap_or(line));
        let skips: BTreeSet<_> =
            lines.filter(|l| !l.is_empty()).map(|l| l.split_once(": ").unwrap_or((l, ""))).collect();
        self.passed = self.passed.saturating_sub(skips.len() as u64);
        self.skipped.extend(skips.into_iter().map(|(name, why)| (name.into(), why.into())));
    }

    fn ran(&self) -> u64 {
        self.passed + self.failed.len() as u64
    }
}

/// A lane's name, what became of its tests, and how many seconds it took.
type Run = (&'static str, Tally, u64);

/// How many tests passed, by what libtest printed.
pub fn passed(text: &str) -> u64 {
    let mut tally = Tally::default();
    text.lines().for_each(|line| tally.line(line));
    tally.passed
}

/// Runs the lanes.
pub fn run(words: &Words) -> Result<ExitCode> {
    for (name, package) in PROGRAMS {
        sh::require(name, package);
    }
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
        eprintln!("xtask: /dev/kvm: {error}: tests of whole machines will be skipped");
    }
    let chosen = |lane: &&Lane| words.only.is_empty() || words.only.iter().any(|name| name == lane.name);
    let (hosts, here): (Vec<_>, Vec<_>) = LANES.iter().filter(chosen).partition(|lane| lane.hosted);
    let filter = words.filter.as_deref();
    let print = |line: &str| println!("{line}");
    let mut tallies = here.into_iter().map(|lane| lane.go(filter, print)).collect::<Result<Vec<_>>>()?;
    tallies.extend(side_by_side(&hosts, filter, print)?);
    Ok(verdict(&tallies, std::env::var("BANTAM_REQUIRE_KVM").is_ok_and(|v| v == "1")))
}

impl Lane {
    /// Runs it: its name, what became of its tests, and how many seconds it took.
    fn go(&self, filter: Option<&str>, mut show: impl FnMut(&str)) -> Result<Run> {
        show(&format!("== {}: {}", self.name, self.what));
        let start = Instant::now();
        let mut tally = (self.run)(filter, &mut show)?;
        // Of a lane that ran nothing, nobody knows that it works.
        if filter.is_none() && tally.ran() == 0 && tally.skipped.is_empty() {
            tally.failed.push(format!("{}: there was no test to run", self.name));
        }
        Ok((self.name, tally, start.elapsed().as_secs()))
    }
}

/// Runs lanes at the same time; what they print is shown lane by lane.
fn side_by_side(lanes: &[&'static Lane], filter: Option<&str>, mut show: impl FnMut(&str)) -> Result<Vec<Run>> {
    std::thread::scope(|scope| {
        let start = |lane: &&'static Lane| {
            let (lane, (sender, lines)) = (*lane, mpsc::channel::<String>());
            // Nobody hears it only where another lane could not even begin.
            (lines, scope.spawn(move || lane.go(filter, |line| _ = sender.send(line.into()))))
        };
        let running: Vec<_> = lanes.iter().map(start).collect();
        let finish = |(lines, run): (mpsc::Receiver<String>, ScopedJoinHandle<'_, Result<Run>>)| {
            lines.into_iter().for_each(|line| show(&line));
            run.join().unwrap_or_else(|_| bail!("a lane panicked"))
        };
        running.into_iter().map(finish).collect()
    })
}

/// Says what happened; the last line is `N passed, N failed, N skipped`.
fn verdict(tallies: &[Run], require_kvm: bool) -> ExitCode {
    println!();
    for (lane, tally, seconds) in tallies {
        let (failed, skipped) = (tally.failed.len(), tally.skipped.len());
        println!(
            "{lane:8} {} run, {} passed, {failed} failed, {skipped} SKIPPED, {seconds} s",
            tally.ran(),
            tally.passed
        );
    }
    // Not each that has KVM in its reason: some tests are of hosts whose KVM is another one.
    let wanted = |why: &str| require_kvm && why.contains("/dev/kvm");
    let skips = tallies.iter().flat_map(|(_, tally, _)| &tally.skipped);
    let (missed, skipped): (Vec<_>, Vec<_>) = skips.partition(|(_, why)| wanted(why));
    let mut failed: Vec<_> = tallies.iter().flat_map(|(_, tally, _)| tally.failed.clone()).collect();
    failed.extend(missed.iter().map(|(name, why)| format!("{name}: skipped ({why}), and BANTAM_REQUIRE_KVM=1")));
    skipped.iter().for_each(|(name, why)| println!("SKIPPED: {name}: {why}"));
    failed.iter().for_each(|name| println!("FAILED: {name}"));
    let passed: u64 = tallies.iter().map(|(_, tally, _)| tally.passed).sum();
    println!("{passed} passed, {} failed, {} skipped", failed.len(), skipped.len());
    ExitCode::from(u8::from(!failed.is_empty()))
}

/// The names of the files under tests/ that do, or do not, start machines.
fn files(machines: bool) -> Result<Vec<String>> {
    let Ok(folder) = fs::read_dir(sh::root().join("tests")) else { return Ok(Vec::new()) };
    let mut names = Vec::new();
    for entry in folder {
        let path = entry?.path();
        let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        if path.extension().is_some_and(|e| e == "rs") && NEED_NO_MACHINE.contains(&stem.as_str()) != machines {
            names.push(stem);
        }
    }
    names.sort();
    Ok(names)
}

/// Cargo for tests on this machine, of the programs that its test host runs too: they are built once.
fn here(words: &[&str]) -> Result<Command> {
    let mut command = cross::cargo(Arch::native(), words)?;
    command.args(["--profile", lane::PROFILE]);
    Ok(command)
}

fn unit(filter: Option<&str>, show: Show<'_>) -> Result<Tally> {
    // Not --bins: the floor has no runtime for tests to run in.
    let mut code = here(&["test", "--no-fail-fast", "--workspace", "--lib", "--bin", "bantam", "--bin", "xtask"])?;
    code.args(files(false)?.iter().flat_map(|name| ["--test", name]));
    libtest("unit", [code, here(&["test", "--no-fail-fast", "--workspace", "--doc"])?], filter, show)
}

fn native(filter: Option<&str>, show: Show<'_>) -> Result<Tally> {
    // One test runs the programs of examples/.
    sh::run(here(&["build", "--quiet", "--examples"])?)?;
    let mut command = here(&["test", "--no-fail-fast"])?;
    command.env("BANTAM_VIRTIO_GUEST", drivers::build()?);
    let files = files(true)?;
    command.args(files.iter().flat_map(|name| ["--test", name]));
    libtest("native", (!files.is_empty()).then_some(command), filter, show)
}

fn x86_64(filter: Option<&str>, show: Show<'_>) -> Result<Tally> {
    let mut all = files(true)?;
    all.retain(|file| !NEED_NO_HOST.contains(&file.as_str()));
    hosted(Arch::X86_64, &lane::Tests { files: &all, unit: false, filter }, show)
}

/// What is beside the code runs there too: on x86-64 the parts for arm64 are not even compiled.
fn arm64(filter: Option<&str>, show: Show<'_>) -> Result<Tally> {
    let mut all = [files(true)?, files(false)?].concat();
    all.retain(|file| !NEED_NO_HOST.contains(&file.as_str()));
    hosted(Arch::Arm64, &lane::Tests { files: &all, unit: true, filter }, show)
}

/// Runs a lane in a test host.
fn hosted(arch: Arch, tests: &lane::Tests, show: Show<'_>) -> Result<Tally> {
    let mut tally = Tally::default();
    let mut counted = 0;
    let take = |line: &str| {
        show(line);
        tally.line(line);
        if let Some((name, status)) = lane::ended(line) {
            // A test program that was killed counts nothing itself.
            if status != 0 && tally.counted == counted {
                tally.failed.push(format!("{name}: status {status}"));
                tally.counted += 1;
            }
            counted = tally.counted;
        }
    };
    let ran = lane::run(arch, tests, take);
    match ran {
        Ok(log) => tally.skips(&log),
        // What could not run to its end did not pass.
        Err(error) => tally.failed.push(format!("{error:#}")),
    }
    Ok(tally)
}

/// Runs `cargo test` commands, shows what they print, and counts.
fn libtest(
    lane: &str,
    commands: impl IntoIterator<Item = Command>,
    filter: Option<&str>,
    show: Show<'_>,
) -> Result<Tally> {
    let folder = sh::target().join("xtask");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let log = folder.join(format!("skipped-{lane}.txt"));
    fs::write(&log, "").with_context(|| log.display().to_string())?;
    let mut tally = Tally::default();
    for mut command in commands {
        command.args(filter).env("BANTAM_SKIP_LOG", &log).stdout(Stdio::piped());
        let words = sh::words(&command);
        show(&format!("-- {words}"));
        let counted = tally.counted;
        let mut child = command.spawn().with_context(|| words.clone())?;
        for line in child.stdout.take().map(BufReader::new).into_iter().flat_map(BufRead::lines) {
            let line = line?;
            show(&line);
            tally.line(&line);
        }
        let status = child.wait()?;
        // A test program that was killed, or did not compile, counts nothing itself.
        if !status.success() && tally.counted == counted {
            tally.failed.push(format!("{words}: {status}"));
        }
    }
    let nameless = tally.counted.saturating_sub(tally.failed.len() as u64);
    tally.failed.extend((0..nameless).map(|_| format!("{lane}: a test without a name")));
    tally.skips(&fs::read_to_string(&log)?);
    Ok(tally)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_libtest_prints_is_counted() {
        let mut tally = Tally::default();
        let text = "running 5 tests\ntest a::b ... ok\ntest it ... FAILED\ntest slow ... ignored, takes an hour\n\
                    test odd ... ignored\n\
                    test result: FAILED. 3 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.1s";
        text.lines().for_each(|line| tally.line(line));
        assert_eq!((tally.passed, tally.counted, tally.ran()), (3, 1, 4));
        assert_eq!(tally.failed, ["it"]);
        assert_eq!(tally.skipped, [("slow".into(), "takes an hour".into()), ("odd".into(), "marked #[ignore]".into())]);
    }

    #[test]
    fn lanes_side_by_side_are_shown_one_after_the_other() {
        fn run(filter: Option<&str>, show: Show<'_>) -> Result<Tally> {
            std::thread::sleep(std::time::Duration::from_millis(if filter.is_some() { 1 } else { 50 }));
            show("it runs");
            Ok(Tally { passed: 1, ..Tally::default() })
        }
        fn slow(_: Option<&str>, show: Show<'_>) -> Result<Tally> {
            run(None, show)
        }
        static TWO: [Lane; 2] = [
            Lane { name: "one", what: "slow", run: slow, hosted: true },
            Lane { name: "two", what: "quick", run, hosted: true },
        ];
        let mut shown = Vec::new();
        let ran = side_by_side(&[&TWO[0], &TWO[1]], Some("it"), |line| shown.push(line.to_owned())).unwrap();
        assert_eq!(shown, ["== one: slow", "it runs", "== two: quick", "it runs"]);
        assert!(ran.iter().map(|(name, tally, _)| (*name, tally.passed)).eq([("one", 1), ("two", 1)]));
    }

    #[test]
    fn a_skipped_test_did_not_pass_and_counts_once() {
        let mut tally = Tally { passed: 3, ..Tally::default() };
        tally.skips("SKIPPED: boots: no /dev/kvm: No such file\nSKIPPED: boots: no /dev/kvm: No such file\n");
        assert_eq!((tally.passed, tally.skipped.len()), (2, 1));
        assert_eq!(tally.skipped[0].1, "no /dev/kvm: No such file");
    }

    #[test]
    fn a_failure_fails_and_so_does_a_skip_where_kvm_is_required() {
        let tally = |failed: &[&str], why: &str| Tally {
            passed: 1,
            failed: failed.iter().map(ToString::to_string).collect(),
            skipped: vec![("boots".into(), why.into())],
            counted: 0,
        };
        let code = |tally, require| format!("{:?}", verdict(&[("unit", tally, 0)], require));
        let (good, bad) = (format!("{:?}", ExitCode::SUCCESS), format!("{:?}", ExitCode::FAILURE));
        assert_eq!(code(tally(&[], "no /dev/kvm"), false), good);
        assert_eq!(code(tally(&[], "no strace"), true), good);
        assert_eq!(code(tally(&[], "this host's KVM emulates nothing"), true), good);
        assert_eq!(code(tally(&[], "no /dev/kvm"), true), bad);
        assert_eq!(code(tally(&["it"], "no strace"), false), bad);
    }
}
