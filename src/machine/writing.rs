//! A snapshot that is written while its machine goes on.
//!
//! Invariant: whoever asked for it gets one answer, once it is complete, or has failed, or the machine has ended.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::control::Answer;
use crate::event::Worker;
use crate::host::output::Bell;
use crate::snapshot::{Taken, Target, Written};

/// Since when a machine stands still for it, and how long it did.
#[derive(Debug, Clone, Copy)]
pub enum Stood {
    /// It still does.
    Since(Instant),
    /// It has gone on, or stands still for something else.
    For(Duration),
}

/// Such a snapshot.
pub struct Writing {
    worker: Worker<()>,
    outcome: Arc<OnceLock<Result<Written, String>>>,
    cancelled: Arc<AtomicBool>,
    stood: Stood,
}

/// What is told of a snapshot that is complete; why it was written while the machine stood still, if it was.
pub fn told(written: Written, stood: Duration, why: Option<&str>) -> String {
    let (memory, seconds) = (written.memory, stood.as_secs_f64());
    serde_json::json!({ "memory": memory, "seconds": seconds, "copied": why }).to_string()
}

impl Writing {
    /// Writes what was taken and frozen, on a thread of its own.
    ///
    /// # Errors
    /// The host has no thread left.
    pub fn start(taken: Taken, target: Target, stood: Stood, bell: Bell) -> Result<Self> {
        let (outcome, cancelled) = (Arc::new(OnceLock::new()), Arc::new(AtomicBool::new(false)));
        let (told, asked) = (outcome.clone(), cancelled.clone());
        let worker = Worker::start("snapshot".into(), move || {
            let _ = told.set(taken.write(&target, &asked).map_err(|e| format!("{e:#}")));
            bell.ring();
        })?;
        Ok(Self { worker, outcome, cancelled, stood })
    }

    /// The machine goes on.
    pub fn goes_on(&mut self) {
        if let Stood::Since(begun) = self.stood {
            self.stood = Stood::For(begun.elapsed());
        }
    }

    /// What became of it, once that is known.
    pub fn outcome(&self) -> Option<Answer> {
        let stood = match self.stood {
            Stood::Since(begun) => begun.elapsed(),
            Stood::For(time) => time,
        };
        self.outcome.get().map(|outcome| outcome.clone().map(|written| told(written, stood, None)))
    }

    /// Nobody waits for it any more; nothing is left of one that is not complete.
    pub fn cancel(self) {
        self.cancelled.store(true, Ordering::Relaxed);
        let _ = self.worker.join();
    }
}
