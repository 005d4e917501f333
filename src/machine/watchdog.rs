//! `--watchdog`: finds CPUs that stall.
//!
//! Several times in the span that a CPU may stall, it is kicked and looks at itself; so a machine that is watched makes some
//! more exits, and the run loop costs the same. A CPU is stalled when in that span it has used CPU time, and each look found
//! that it has made no exit, waits for no interrupt and is still in the same small piece of code. Each stall is told once.
//!
//! Invariant: of what stalls this only reports, and the machine goes on. A CPU that for the whole span does not leave its own
//! exception vectors, always with the same exception, is no such CPU: it is lost (arm64; a PC's shuts down).

use std::time::{Duration, Instant};

use anyhow::Result;

use super::Lent;
use crate::config::Config;
use crate::error::usage;
use crate::host::sys;
use crate::vcpu::Seen;

/// A shorter span would find CPUs stalled that merely were not run.
const LEAST: Duration = Duration::from_millis(200);
/// Looks in a span, and how many of them must have been answered.
const LOOKS: u32 = 8;
const ANSWERS: u32 = 4;
/// How rarely is often enough.
const LONGEST: Duration = Duration::from_secs(1);
/// A CPU that used less than this part of the time did not run.
const SHARE: u32 = 20;

/// What `--watchdog` knows of a machine's CPUs; it outlives their being stopped.
pub struct Watchdog {
    span: Duration,
    /// When to look.
    pub next: Instant,
    cpus: Vec<Still>,
}

/// What a look found.
#[derive(Debug, Default)]
pub struct Found {
    /// CPUs that have stalled since the last look.
    pub stalled: Vec<u32>,
    /// A CPU that is in the same exception for the whole span.
    pub trapped: Option<u32>,
}

impl Watchdog {
    /// What `config` asks for.
    pub fn new(config: &Config) -> Option<Self> {
        let span = config.watchdog?.0;
        let cpus = (0..config.cpus.count()).map(|_| Still::default()).collect();
        Some(Self { span, next: Instant::now(), cpus })
    }

    /// Refuses a span that is too short.
    ///
    /// # Errors
    /// It is.
    pub fn check(config: &Config) -> Result<()> {
        match config.watchdog {
            Some(span) if span.0 < LEAST => {
                Err(usage(format!("--watchdog: less than {} s", LEAST.as_secs_f64())).into())
            }
            _ => Ok(()),
        }
    }

    /// Looks, if it is time to: what has been found since the last look.
    pub(super) fn look(&mut self, now: Instant, cpus: &[Lent]) -> Found {
        let mut found = Found::default();
        if self.next > now {
            return found;
        }
        let pause = LONGEST.min(self.span / LOOKS);
        self.next = now + pause;
        for (lent, still) in cpus.iter().zip(&mut self.cpus) {
            let (used, seen) = (lent.flag.thread().and_then(sys::thread_cpu_time), lent.flag.progress());
            if still.judge(now, seen.zip(used), self.span) {
                found.stalled.push(lent.id);
            }
            // So many looks in a row take the span.
            if seen.is_some_and(|seen| pause * seen.trapped >= self.span) {
                found.trapped = Some(lent.id);
            }
            lent.flag.watch();
            lent.worker.kick();
        }
        found
    }

    /// What is said of CPUs that have stalled.
    pub(super) fn story(&self, stalled: &[u32]) -> String {
        let names: Vec<_> = stalled.iter().map(u32::to_string).collect();
        format!(
            "bantam: --watchdog: vCPU {} is stalled: no exit and no progress for {} s",
            names.join(", "),
            self.span.as_secs_f64()
        )
    }
}

/// A CPU, since it last got on.
#[derive(Debug, Default)]
struct Still {
    /// When that was, what it had been seen to do, and the CPU time that it had used.
    since: Option<(Instant, Seen, Duration)>,
    told: bool,
}

impl Still {
    /// Whether a stall is to be told, after what was seen of the CPU and the CPU time that it has used.
    fn judge(&mut self, now: Instant, seen: Option<(Seen, Duration)>, span: Duration) -> bool {
        // The CPU has not answered yet.
        let Some((seen, used)) = seen else { return false };
        let Some((since, first, before)) = self.since else {
            self.since = Some((now, seen, used));
            return false;
        };
        if first.moved != seen.moved || seen.looks < first.looks {
            // One that was stopped and goes on counts its looks anew; its stall is the same one.
            *self = Self { since: Some((now, seen, used)), told: self.told && first.moved == seen.moved };
            return false;
        }
        let elapsed = now.saturating_duration_since(since);
        if elapsed < span || self.told || seen.looks - first.looks < ANSWERS {
            return false;
        }
        self.told = used.saturating_sub(before) >= elapsed / SHARE;
        self.told
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPAN: Duration = Duration::from_secs(2);
    const NEVER: [usize; 0] = [];

    /// Judges looks that are a quarter of a second apart; each is (moved, looks, CPU time in ms). Gives the numbers of
    /// those at which a stall was told.
    fn told(looks: impl IntoIterator<Item = (u32, u32, u64)>) -> Vec<usize> {
        let (mut still, start) = (Still::default(), Instant::now());
        let judge = |(number, (moved, looks, used)): (usize, (u32, u32, u64))| {
            let now = start + Duration::from_millis(250) * u32::try_from(number).unwrap();
            let seen = (Seen { moved, looks, trapped: 0 }, Duration::from_millis(used));
            still.judge(now, Some(seen), SPAN).then_some(number)
        };
        looks.into_iter().enumerate().filter_map(judge).collect()
    }

    #[test]
    fn a_stall_is_told_once() {
        assert_eq!(told((0..40).map(|n| (1, n, u64::from(n) * 250))), [8]);
    }

    #[test]
    fn a_cpu_that_gets_on_has_not_stalled_and_may_stall_again() {
        assert_eq!(told((0..40).map(|n| (n / 4, n, u64::from(n) * 250))), NEVER);
        assert_eq!(told((0..40).map(|n| (n / 20, n, u64::from(n) * 250))), [8, 28]);
    }

    #[test]
    fn a_cpu_that_uses_no_time_or_does_not_answer_has_not_stalled() {
        assert_eq!(told((0..40).map(|n| (1, n, u64::from(n)))), NEVER);
        assert_eq!(told((0..40).map(|n| (1, n / 20, u64::from(n) * 250))), NEVER);
    }

    #[test]
    fn a_stall_that_was_told_is_not_told_again_after_the_cpu_was_stopped() {
        assert_eq!(told((0..40).map(|n| (1, n % 9, u64::from(n % 9) * 250))), [8]);
        let mut still = Still { since: None, told: false };
        assert!(!still.judge(Instant::now(), None, SPAN));
    }

    #[test]
    fn a_span_that_is_too_short_is_refused() {
        let config = |text: &str| Config { watchdog: Some(text.parse().unwrap()), ..Config::default() };
        assert!(Watchdog::check(&config("0.1")).is_err() && Watchdog::check(&config("2")).is_ok());
        assert!(Watchdog::check(&Config::default()).is_ok() && Watchdog::new(&Config::default()).is_none());
    }
}
