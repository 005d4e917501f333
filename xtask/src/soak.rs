//! `cargo xtask soak`: seeded jobs with counts that take hours, cut into chunks.
//!
//! Invariant: the progress file is replaced whole after each chunk, so whatever ends a run loses at most one chunk. A
//! job is a test that takes BANTAM_SOAK_SEED and BANTAM_SOAK_COUNT and **whose case i uses the seed BANTAM_SOAK_SEED + i
//! and nothing else**, so that where a run is cut makes no difference.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime};

use anyhow::{Context, Result, bail};

use crate::{sh, test};

/// Words of `cargo xtask soak`.
#[derive(clap::Args)]
pub struct Words {
    /// Seed of the first case [default: that of the run to go on with, or a new one]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Run this job only (repeatable) [default: all]
    #[arg(long, value_name = "NAME", value_parser = JOBS.map(|job| job.name))]
    only: Vec<String>,
    /// Number of cases of each job [default: the job's own]
    #[arg(long, value_name = "N", conflicts_with = "sample")]
    count: Option<u64>,
    /// Run only one chunk of each job that CI takes a sample of, or of each that is named, from its first case
    #[arg(long)]
    sample: bool,
}

/// A job.
struct Job {
    name: &'static str,
    /// Cases of a full run.
    count: u64,
    /// Cases of one chunk: some ten seconds' worth, in a test host some minutes'.
    chunk: u64,
    /// CI takes a chunk of it.
    sample: bool,
    command: &'static [&'static str],
}

/// Every job there is.
const JOBS: [Job; 17] = [
    Job {
        name: "loaders",
        count: 10_000_000,
        chunk: 20_000,
        sample: true,
        command: &["cargo", "test", "--release", "--test", "fuzz_loaders"],
    },
    Job {
        name: "virtio",
        count: 3_000_000,
        chunk: 20_000,
        sample: true,
        command: &["cargo", "test", "--release", "--test", "fuzz_virtio"],
    },
    Job { name: "linux-x86_64", count: PAIRINGS, chunk: 3, sample: false, command: &hosted("x86_64", KERNELS) },
    Job { name: "linux-arm64", count: PAIRINGS, chunk: 9, sample: false, command: &hosted("arm64", KERNELS) },
    Job { name: "reboot-x86_64", count: 1000, chunk: 100, sample: false, command: &hosted("x86_64", LIVES) },
    Job { name: "reboot-arm64", count: 1000, chunk: 50, sample: false, command: &hosted("arm64", LIVES) },
    // Streams of 4 MiB, over tap each way: 1 GiB in all.
    Job { name: "tap", count: 256, chunk: 16, sample: false, command: &hosted("x86_64", STREAMS) },
    Job { name: "bridge", count: 256, chunk: 32, sample: false, command: &hosted("x86_64", BRIDGE) },
    Job { name: "power", count: 500, chunk: 50, sample: false, command: &hosted("x86_64", KILLS) },
    Job {
        name: "snapshot-kills",
        count: 1000,
        chunk: 20,
        sample: false,
        command: &["cargo", "test", "--release", "--test", "snapshot", "p24_"],
    },
    Job {
        name: "snapshot-states",
        count: 10_000,
        chunk: 200,
        sample: false,
        command: &["cargo", "test", "--release", "--test", "snapshot", "p26_"],
    },
    Job {
        name: "snapshot-moments",
        count: 1000,
        chunk: 50,
        sample: false,
        command: &["cargo", "test", "--release", "--test", "snapshot", "a_state_that_was_loaded"],
    },
    Job {
        name: "snapshot-bits",
        count: 100_000,
        chunk: 5_000,
        sample: false,
        command: &["cargo", "test", "--release", "--test", "snapshot", "p25_"],
    },
    Job { name: "busy-x86_64", count: 100, chunk: 25, sample: false, command: &hosted("x86_64", BUSY) },
    Job { name: "busy-arm64", count: 100, chunk: 25, sample: false, command: &hosted("arm64", BUSY) },
    Job {
        name: "clone-cycles",
        count: 10_000,
        chunk: 500,
        sample: false,
        command: &["cargo", "test", "--release", "--test", "cycles"],
    },
    Job {
        name: "console",
        count: 3,
        chunk: 1,
        sample: false,
        command: &["cargo", "test", "--release", "--test", "console"],
    },
];

/// Each of three kernels with each of three numbers of CPUs and three sizes of RAM, twice.
const PAIRINGS: u64 = 54;

/// Tests of tests/linux.rs.
const KERNELS: &str = "every_kernel_runs_with_every_number_of_cpus_and_size_of_ram";
const LIVES: &str = "with_reboot_the_machine_starts_anew";
/// Of tests/net.rs.
const STREAMS: &str = "a_guest_and_its_host_send_each_other_a_stream_over_tap";
const BRIDGE: &str = "two_guests_on_a_bridge_send_each_other_a_stream";

/// Of tests/snapshot.rs.
const BUSY: &str = "a_busy_linux_that_was_loaded_is_saved_the_same";

/// Of tests/disk.rs.
const KILLS: &str = "what_was_flushed_is_there_after_the_monitor_was_killed";

/// Runs a test in a test host.
const fn hosted(lane: &'static str, test: &'static str) -> [&'static str; 6] {
    ["cargo", "xtask", "test", "--only", lane, test]
}

/// How far a run is.
#[derive(Debug, Clone, PartialEq)]
struct Progress {
    seed: u64,
    done: u64,
    seconds: f64,
    commit: String,
}

impl Progress {
    fn text(&self) -> String {
        format!("seed {}\ndone {}\nseconds {:.1}\ncommit {}\n", self.seed, self.done, self.seconds, self.commit)
    }

    fn parse(text: &str) -> Option<Self> {
        let field = |name| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Some(Self {
            seed: field("seed")?.parse().ok()?,
            done: field("done")?.parse().ok()?,
            seconds: field("seconds")?.parse().ok()?,
            commit: field("commit")?.into(),
        })
    }

    fn store(&self, path: &Path) -> Result<()> {
        let new = path.with_extension("new");
        fs::write(&new, self.text()).with_context(|| new.display().to_string())?;
        fs::rename(&new, path).with_context(|| path.display().to_string())
    }
}

/// How a run ended.
#[derive(Debug, PartialEq)]
enum Outcome {
    Done,
    /// By ctrl-c.
    Cut,
    Failed(String),
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_interrupt(_signal: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// Runs the jobs.
pub fn run(words: &Words) -> Result<ExitCode> {
    // The terminal interrupts the job as well; we wait for its end and say how to go on.
    // SAFETY: the handler only stores to an atomic.
    #[allow(unsafe_code)]
    unsafe {
        libc::signal(libc::SIGINT, on_interrupt as extern "C" fn(libc::c_int) as libc::sighandler_t)
    };
    let folder = sh::target().join("soak");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let (mut lines, mut good) = (Vec::new(), true);
    let all = words.only.is_empty();
    let chosen = |job: &&Job| all && (job.sample || !words.sample) || words.only.iter().any(|name| name == job.name);
    for job in JOBS.iter().filter(chosen) {
        let count = if words.sample { job.chunk } else { words.count.unwrap_or(job.count) };
        let path =
            folder.join(if words.sample { format!("{}-sample.txt", job.name) } else { format!("{}.txt", job.name) });
        if words.sample {
            let _ = fs::remove_file(&path);
        }
        let mut progress = start(&path, words.seed, count);
        println!("soak: {}: {count} cases from seed {}, {} done", job.name, progress.seed, progress.done);
        let outcome = work(job, count, &path, &mut progress)?;
        lines.push(line(job, &progress, &outcome));
        good &= outcome == Outcome::Done;
        if outcome == Outcome::Cut {
            println!("soak: interrupted; the same command goes on from case {}", progress.done);
            break;
        }
    }
    println!("\n| job | cases | seed | commit | date | duration | outcome |\n|---|---|---|---|---|---|---|");
    lines.iter().for_each(|line| println!("{line}"));
    Ok(ExitCode::from(u8::from(!good)))
}

/// The progress to go on with: the one in the file, if it is of this commit and seed and not yet at its end.
fn start(path: &PathBuf, seed: Option<u64>, count: u64) -> Progress {
    let commit = sh::commit();
    let old = fs::read_to_string(path).ok().and_then(|text| Progress::parse(&text));
    let fits = |p: &Progress| p.commit == commit && seed.is_none_or(|seed| seed == p.seed) && p.done < count;
    old.filter(fits).unwrap_or_else(|| {
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let seed = seed.unwrap_or(now.as_secs() ^ u64::from(now.subsec_nanos()) << 32);
        Progress { seed, done: 0, seconds: 0.0, commit }
    })
}

/// Runs chunks until the job's end.
fn work(job: &Job, count: u64, path: &Path, progress: &mut Progress) -> Result<Outcome> {
    let Some((program, words)) = job.command.split_first() else { bail!("{}: no command", job.name) };
    while progress.done < count {
        let seed = progress.seed.wrapping_add(progress.done);
        let chunk = job.chunk.clamp(1, count - progress.done);
        let mut command = if *program == "cargo" { sh::cargo(words) } else { sh::program(program, words) };
        let log = path.with_extension("log");
        let out = fs::File::create(&log).with_context(|| log.display().to_string())?;
        command.env("BANTAM_SOAK_SEED", seed.to_string()).env("BANTAM_SOAK_COUNT", chunk.to_string());
        command.stdout(out.try_clone()?).stderr(out);
        let start = Instant::now();
        let status = status(&mut command)?;
        progress.seconds += start.elapsed().as_secs_f64();
        let interrupted = INTERRUPTED.load(Ordering::Relaxed);
        if !status.success() {
            if interrupted {
                return Ok(Outcome::Cut);
            }
            print!("{}", fs::read_to_string(&log).unwrap_or_default());
            let again = format!("BANTAM_SOAK_SEED={seed} BANTAM_SOAK_COUNT={chunk} {}", job.command.join(" "));
            println!("soak: {}: {status}; to see it again: {again}", job.name);
            return Ok(Outcome::Failed(format!("{status}: `{again}`")));
        }
        if *program == "cargo" && test::passed(&fs::read_to_string(&log)?) == 0 {
            return Ok(Outcome::Failed(format!("`{}` ran no test", job.command.join(" "))));
        }
        progress.done += chunk;
        progress.store(path)?;
        println!("soak: {}: {} of {count}, {:.0} s", job.name, progress.done, progress.seconds);
        if interrupted && progress.done < count {
            return Ok(Outcome::Cut);
        }
    }
    Ok(Outcome::Done)
}

fn status(command: &mut Command) -> Result<std::process::ExitStatus> {
    command.status().with_context(|| sh::words(command))
}

/// The line for docs/soak.md.
fn line(job: &Job, progress: &Progress, outcome: &Outcome) -> String {
    let outcome = match outcome {
        Outcome::Done => "passed",
        Outcome::Cut => "cut short",
        Outcome::Failed(why) => &format!("FAILED: {why}"),
    };
    let Progress { seed, done, seconds, commit } = progress;
    format!("| {} | {done} | {seed} | {commit} | {} | {seconds:.0} s | {outcome} |", job.name, sh::date())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOY: Job =
        Job { name: "toy", count: 0, chunk: 10, sample: true, command: &["sh", "-c", "echo $BANTAM_SOAK_SEED"] };

    fn progress(path: &Path) -> Progress {
        Progress::parse(&fs::read_to_string(path).unwrap()).unwrap()
    }

    fn place(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("bantam-soak-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        folder.join("toy.txt")
    }

    #[test]
    fn a_job_runs_in_chunks_to_its_exact_end() {
        let path = place("end");
        let mut state = start(&path, Some(7), 25);
        assert_eq!(work(&TOY, 25, &path, &mut state).unwrap(), Outcome::Done);
        assert_eq!((progress(&path).done, progress(&path).seed), (25, 7));
        assert_eq!(fs::read_to_string(path.with_extension("log")).unwrap(), "27\n");
        fs::remove_dir_all(path.parent().unwrap()).unwrap();
    }

    #[test]
    fn a_run_that_was_cut_goes_on_and_a_finished_or_other_one_starts_anew() {
        let path = place("cut");
        Progress { seed: 7, done: 20, seconds: 1.0, commit: sh::commit() }.store(&path).unwrap();
        assert_eq!((start(&path, None, 30).done, start(&path, None, 30).seed), (20, 7));
        assert_eq!(start(&path, Some(8), 30).done, 0);
        assert_eq!(start(&path, None, 20).done, 0);
        Progress { seed: 7, done: 20, seconds: 1.0, commit: "other".into() }.store(&path).unwrap();
        assert_eq!(start(&path, Some(7), 30).done, 0);
        fs::remove_dir_all(path.parent().unwrap()).unwrap();
    }

    #[test]
    fn a_failure_stops_the_job_keeps_the_progress_and_says_how_to_see_it_again() {
        let path = place("bad");
        let job = Job { command: &["sh", "-c", "test $BANTAM_SOAK_SEED != 17"], ..TOY };
        let mut state = start(&path, Some(7), 30);
        let Outcome::Failed(why) = work(&job, 30, &path, &mut state).unwrap() else { panic!("it passed") };
        assert!(why.contains("BANTAM_SOAK_SEED=17 BANTAM_SOAK_COUNT=10 sh -c"), "{why}");
        assert_eq!(progress(&path).done, 10);
        fs::remove_dir_all(path.parent().unwrap()).unwrap();
    }
}
