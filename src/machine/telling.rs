//! When and where a machine's statistics are told: at the end, on SIGUSR1, every so often.

use std::cell::Cell;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::config::Config;
use crate::error::{refuse, usage};
use crate::host::file;
use crate::host::say::say;
use crate::host::sys;
use crate::stats::Stats;

/// Telling more often would be all that the machine does.
const LEAST: Duration = Duration::from_millis(100);

fn asked(config: &Config) -> bool {
    config.stats.is_some() || config.stats_interval.is_some()
}

/// Whoever sends SIGUSR1 to a machine that shall tell its statistics need not know whether it runs already. Call this
/// before anything that takes time: the signal would end the process.
///
/// # Errors
/// The host refuses.
pub fn hold_signal(config: &Config) -> Result<()> {
    if asked(config) {
        sys::hold(sys::SIGUSR1)?;
    }
    Ok(())
}

/// A machine's statistics, if there are any, and where they go.
pub struct Telling {
    stats: OnceLock<Stats>,
    /// Where the JSON goes; without one a table goes to stderr.
    file: Option<PathBuf>,
    every: Option<Duration>,
    next: Cell<Option<Instant>>,
    /// They were asked for on the command line, and not by way of the control socket.
    asked: bool,
}

impl Telling {
    /// What `config` asks for.
    pub fn new(config: &Config) -> Self {
        let asked = asked(config);
        let stats = OnceLock::new();
        if asked {
            let _ = stats.set(Stats::default());
        }
        let every = config.stats_interval.map(|seconds| seconds.0);
        let next = Cell::new(every.and_then(|every| Instant::now().checked_add(every)));
        let file = config.stats.clone().filter(|path| path.as_os_str() != "-");
        Self { stats, file, every, next, asked }
    }

    /// Refuses what could not be told later.
    ///
    /// # Errors
    /// An interval that is too short, a file that cannot be written.
    pub fn check(&self) -> Result<()> {
        if self.every.is_some_and(|every| every < LEAST) {
            return Err(usage(format!("--stats-interval: less than {} s", LEAST.as_secs_f64())).into());
        }
        if let Some(path) = &self.file {
            let opened = File::options().append(true).create(true).custom_flags(libc::O_NONBLOCK).open(path);
            opened.map_err(|e| refuse(format!("--stats={}: {e}", path.display())))?;
        }
        Ok(())
    }

    /// The statistics, if they are on.
    pub fn stats(&self) -> Option<&Stats> {
        self.stats.get()
    }

    /// Switches them on; CPUs that are resumed from now on are counted.
    pub fn start(&self) {
        let _ = self.stats.set(Stats::default());
    }

    /// The signal that asks for them, if it does.
    pub fn signal(&self) -> Option<i32> {
        self.asked.then_some(sys::SIGUSR1)
    }

    /// When they are to be told next.
    pub fn deadline(&self) -> Option<Instant> {
        self.next.get()
    }

    /// Tells them if it is time to.
    pub fn tell_due(&self, now: Instant) {
        if self.next.get().is_some_and(|at| at <= now) {
            self.next.set(self.every.and_then(|every| now.checked_add(every)));
            self.tell();
        }
    }

    /// Tells them, if they were asked for.
    pub fn tell(&self) {
        let Some(stats) = self.stats().filter(|_| self.asked) else { return };
        let report = stats.report();
        let Some(path) = &self.file else { return say(&report.table()) };
        let json = serde_json::to_string(&report).unwrap_or_default() + "\n";
        if let Err(e) = put(path, json.as_bytes()) {
            say(&format!("bantam: warning: the statistics are lost: --stats={}: {e}", path.display()));
        }
    }
}

/// Puts `bytes` where a file was, at once, so that a reader finds the old or the new ones; into what is no file (a pipe,
/// a terminal) they are written.
fn put(path: &Path, bytes: &[u8]) -> Result<()> {
    match std::fs::symlink_metadata(path) {
        // Who may read them is for whoever made the file to say.
        Ok(old) if old.is_file() => file::replace(path, Some(old.permissions()), |mut new| Ok(new.write_all(bytes)?)),
        _ => {
            // A pipe that nobody reads must not hold the machine up.
            let mut options = File::options();
            Ok(options.write(true).custom_flags(libc::O_NONBLOCK).open(path)?.write_all(bytes)?)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_leaves_nothing_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stats.json");
        let config = Config { stats: Some(path.clone()), ..Config::default() };
        let telling = Telling::new(&config);
        telling.check().unwrap();
        telling.tell();
        let json: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(json["exits"]["total"], 0);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        // Whoever closed it to others, or opened it, finds it so.
        use std::os::unix::fs::PermissionsExt;
        for mode in [0o600, 0o664] {
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
            telling.tell();
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, mode);
        }
    }

    #[test]
    fn what_cannot_be_told_is_refused_before_the_machine_runs() {
        let refused = |stats: Option<&str>, interval: Option<&str>| {
            let (stats, interval) = (stats.map(Into::into), interval.map(|s| s.parse().unwrap()));
            let config = Config { stats, stats_interval: interval, ..Config::default() };
            Telling::new(&config).check().is_err()
        };
        assert!(refused(Some("/nowhere/x"), None) && refused(None, Some("0")) && refused(None, Some("0.01")));
        assert!(!refused(Some("-"), Some("1")) && !refused(None, None));
    }

    #[test]
    fn nobody_is_told_what_nobody_asked_for() {
        let telling = Telling::new(&Config::default());
        assert!(telling.stats().is_none() && telling.signal().is_none() && telling.deadline().is_none());
        telling.tell();
    }
}
