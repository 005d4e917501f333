//! How fast a disk may be: a bucket that fills at a rate, and gives a wake when there is something in it again.
//!
//! The bucket is kept as the time at which it will be full. Invariant: over any time t no more passes than t × rate, what
//! the bucket holds ([`BURST`]), and one request.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::str::FromStr;

use anyhow::{Context, Result};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

use crate::config::Size;

const SECOND: u64 = 1_000_000_000;
/// What the bucket holds: a tenth of a second's worth. It is enough for the requests that a guest sends together, and
/// short enough that a minute's average is the rate.
pub const BURST: u64 = SECOND / 10;

/// A rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rate {
    /// Bytes of data a second.
    Bytes(u64),
    /// Requests a second.
    Requests(u64),
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.strip_suffix("/s").unwrap_or(text);
        let (number, make): (_, fn(u64) -> Self) = match number.strip_suffix("iops") {
            Some(number) => (number, Self::Requests),
            None => (number, Self::Bytes),
        };
        let Size(rate) = number.parse()?;
        if rate == 0 { Err("a rate is not 0".into()) } else { Ok(make(rate)) }
    }
}

/// The bucket.
pub struct Limit {
    rate: Rate,
    timer: OwnedFd,
    /// When it will be full, in nanoseconds of the clock that its user goes by.
    full: u64,
}

impl Limit {
    /// A full one.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn new(rate: Rate) -> Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer =
            rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags).context("timerfd for --disk rate=")?;
        Ok(Self { rate, timer, full: 0 })
    }

    /// Something is in it. Else it wakes its user when there is.
    pub fn is_open(&self, now: u64) -> bool {
        let empty = self.full.saturating_sub(BURST);
        if empty <= now {
            return true;
        }
        let wait = empty - now;
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let value = Timespec { tv_sec: (wait / SECOND) as i64, tv_nsec: (wait % SECOND) as i64 };
        let _ = rustix::time::timerfd_settime(
            &self.timer,
            TimerfdTimerFlags::empty(),
            &Itimerspec { it_interval: zero, it_value: value },
        );
        false
    }

    /// A request with so much data passes. It may take more than there is: what follows it waits the longer.
    pub fn pass(&mut self, now: u64, bytes: u64) {
        let (amount, rate) = match self.rate {
            Rate::Bytes(rate) => (bytes, rate),
            Rate::Requests(rate) => (1, rate),
        };
        let takes = u128::from(amount) * u128::from(SECOND) / u128::from(rate);
        self.full = self.full.max(now).saturating_add(u64::try_from(takes).unwrap_or(u64::MAX));
    }

    /// Becomes readable.
    pub fn timer(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read() {
        assert_eq!("10M/s".parse(), Ok(Rate::Bytes(10 << 20)));
        assert_eq!("4096".parse(), Ok(Rate::Bytes(4096)));
        assert_eq!("2Kiops".parse(), Ok(Rate::Requests(2048)));
        assert_eq!("500iops/s".parse(), Ok(Rate::Requests(500)));
        for wrong in ["", "0", "0iops", "iops", "-1", "fast", "1/m"] {
            assert!(wrong.parse::<Rate>().is_err(), "{wrong}");
        }
    }

    /// How many requests of a size pass in ten seconds, when each is tried every millisecond.
    fn passed(rate: Rate, bytes: u64) -> u64 {
        let mut limit = Limit::new(rate).unwrap();
        let tries = (0..10_000).map(|tick| tick * SECOND / 1000);
        let mut count = 0;
        for now in tries {
            if limit.is_open(now) {
                limit.pass(now, bytes);
                count += 1;
            }
        }
        count
    }

    #[test]
    fn what_passes_is_the_rate_and_one_bucket() {
        assert!((1000..=1012).contains(&passed(Rate::Requests(100), 1 << 30)));
        assert!((100..=102).contains(&(passed(Rate::Bytes(1 << 20), 4096) * 4096 / 104_858)));
        // Larger than the bucket: one at a time, on the average as fast.
        assert!((10..=11).contains(&passed(Rate::Bytes(1 << 20), 1 << 20)));
        assert!(passed(Rate::Bytes(1), u64::MAX) == 1);
    }

    #[test]
    fn the_timer_fires_when_there_is_something_again() {
        let mut limit = Limit::new(Rate::Requests(1000)).unwrap();
        let now = crate::host::sys::monotonic();
        while limit.is_open(now) {
            limit.pass(now, 0);
        }
        let timer = limit.timer();
        let mut ready = [rustix::event::PollFd::new(&timer, rustix::event::PollFlags::IN)];
        let patience = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut ready, Some(&patience)).unwrap(), 1);
        assert!(limit.is_open(crate::host::sys::monotonic()));
    }
}
