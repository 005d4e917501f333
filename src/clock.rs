//! The clock a device is given, so that a test can stop time.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Wall-clock time as a device sees it.
pub trait Clock: Send {
    /// Time since 1970-01-01 00:00:00 UTC; zero where the host's clock is before that.
    fn now(&self) -> Duration;
}

/// The host's own wall clock.
#[derive(Debug, Default)]
pub struct HostClock;

impl Clock for HostClock {
    fn now(&self) -> Duration {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
    }
}

/// A clock that stands still, for tests.
#[derive(Debug, Default)]
pub struct StoppedClock(pub Duration);

impl Clock for StoppedClock {
    fn now(&self) -> Duration {
        self.0
    }
}
