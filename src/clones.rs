//! Several machines at once, each in a process of its own: nothing that one does reaches another.
//!
//! Invariant: they end no later than this process, which waits for all of them and passes on what it is told.

use anyhow::{Context, Result};

use crate::config::Config;
use crate::event::{Edge, Readiness};
use crate::host::say::say;
use crate::host::sys::{self, process};
use crate::vm::kvm;

/// Runs a process for each of these, and waits until the last has ended. `run` gives the status of one. The status of all
/// is that of the first that is not 0.
///
/// # Errors
/// The host has no more processes, or no KVM.
pub fn run(configs: &[Config], run: impl Fn(&Config) -> u8) -> Result<u8> {
    if let [config] = configs {
        return Ok(run(config));
    }
    // Found once, and before there are any.
    kvm()?;
    let signals = sys::control_signals(Some(process::ENDED)).context("taking over the process's signals")?;
    process::hear_of_ends();
    let mut all = Vec::with_capacity(configs.len());
    for config in configs {
        let started = process::fork(|| run(config)).with_context(|| format!("process {} of them", all.len() + 1));
        match started {
            Ok(process) => all.push((process, None)),
            Err(e) => {
                all.iter().for_each(|(process, _)| process.signal(sys::SIGTERM));
                return Err(e);
            }
        }
    }
    let (readiness, mut ready) = (Readiness::new().context("epoll")?, Vec::new());
    readiness.watch(&signals, 0, Edge::Level).context("epoll")?;
    while all.iter().any(|(_, status)| status.is_none()) {
        readiness.wait(None, &mut ready).context("epoll")?;
        while let Some(signal) = sys::next_signal(&signals) {
            if signal != process::ENDED {
                let live = || all.iter().filter(|(_, status)| status.is_none());
                live().for_each(|(process, _)| process.signal(signal));
                match signal {
                    sys::SIGTSTP => sys::stop_self(),
                    // Who was stopped hears of nothing else.
                    _ => live().for_each(|(process, _)| process.signal(sys::SIGCONT)),
                }
            }
        }
        for (process, status) in all.iter_mut().filter(|(_, status)| status.is_none()) {
            *status = process.status();
        }
    }
    let wrong = |status: &Option<u8>| status.filter(|status| *status != 0);
    let Some((number, status)) = (1..).zip(&all).find_map(|(number, (_, status))| Some((number, wrong(status)?)))
    else {
        return Ok(0);
    };
    let count = all.iter().filter(|(_, status)| wrong(status).is_some()).count();
    say(&format!(
        "bantam: {count} of {} clones ended with a status that is not 0; the first, {number}, with {status}",
        all.len()
    ));
    Ok(status)
}
