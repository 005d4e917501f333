//! The event loop of a running machine: signals, streams, limits, and CPUs that have halted for good.
//!
//! Invariant: the loop never blocks but in its one wait, so a signal is answered at once whatever the guest, the
//! terminal or a pipe does.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::streams::{Ended, Streams};
use super::{End, Life, Machine, Paused, Running};
use crate::event::{Edge, Readiness, Worker};
use crate::host::sys;
use crate::vcpu::{Flag, Idle, Vcpu};

const SIGNALS: u64 = 10;
const BELL: u64 = 11;

/// How often idle CPUs are looked for: soon in a machine's life, so that a short guest is not waited for, then less and
/// less. Two looks show that a CPU is idle, a third takes its answer: at most half a second in all.
const FIRST_LOOK: Duration = Duration::from_millis(10);
const LAST_LOOK: Duration = Duration::from_millis(200);
/// How long a kicked CPU is given to answer.
const ANSWER: Duration = Duration::from_millis(5);
/// How long the last output may wait for its reader when the guest ended by itself, and when a person ended it.
const PATIENCE: Duration = Duration::from_secs(1);
const IMPATIENCE: Duration = Duration::from_millis(30);

impl Machine<Running> {
    /// Serves the machine until it ends, then takes its CPUs back.
    ///
    /// # Errors
    /// The host refuses to wait.
    pub fn wait(self, life: &Life, streams: &mut Streams) -> Result<(Machine<Paused>, End)> {
        let end = self.serve(life, streams);
        streams.release();
        let Self { state, config, layout, memory, board, vm } = self;
        let vcpus = state.stop()?;
        let end = end?;
        let patience = if matches!(end, End::Signal(_) | End::Quit) { IMPATIENCE } else { PATIENCE };
        streams.finish(patience);
        crate::host::terminal::restore();
        Ok((Machine { state: Paused { vcpus }, config, layout, memory, board, vm }, end))
    }

    fn serve(&self, life: &Life, streams: &mut Streams) -> Result<End> {
        let readiness = Readiness::new().context("epoll")?;
        readiness.watch(&life.signals, SIGNALS, Edge::Level)?;
        readiness.watch(&*streams, BELL, Edge::Edge)?;
        streams.watch(&readiness)?;
        let mut watch = Watch::new(self);
        let mut ready = Vec::new();
        loop {
            if let Some((cpu, stop)) = self.state.ended.get() {
                return Ok(End::Guest(*cpu, stop.clone()));
            }
            let next = [life.deadline, streams.deadline(), watch.next].into_iter().flatten().min();
            let patience = next.map(|at| at.saturating_duration_since(Instant::now()));
            readiness.wait(patience, &mut ready).context("epoll")?;
            if ready.contains(&SIGNALS)
                && let Some(end) = signal(life, streams)
            {
                return Ok(end);
            }
            let wish = streams.serve(&readiness, &ready)?;
            match wish.end {
                Some(Ended::Quit) => return Ok(End::Quit),
                Some(Ended::Interrupt) => return Ok(End::Signal(sys::SIGINT)),
                None => {}
            }
            if wish.input && !self.board.buses.service(self.board.serial) {
                streams.tell_again();
            }
            let now = Instant::now();
            if life.deadline.is_some_and(|at| at <= now) {
                return Ok(End::Timeout);
            }
            if watch.all_halted(now) {
                return Ok(End::AllHalted);
            }
        }
    }
}

/// The end that a signal asks for; none for one that only stops the process for a while.
fn signal(life: &Life, streams: &Streams) -> Option<End> {
    let mut info = [0; sys::SIGNAL_INFO];
    let count = rustix::io::read(&life.signals, &mut info).unwrap_or(0);
    match sys::signal_number(info.get(..count)?)? {
        sys::SIGTSTP => {
            streams.suspend();
            None
        }
        number => Some(End::Signal(number)),
    }
}

/// Finds a machine whose CPUs are all halted with interrupts off. A CPU that halts inside KVM makes no exit; so one
/// that has used no CPU time since the last look is kicked, once, and looks at itself.
struct Watch<'a> {
    cpus: Vec<Watched<'a>>,
    /// When to look; never for a machine whose CPUs halt with an exit.
    next: Option<Instant>,
    pause: Duration,
}

struct Watched<'a> {
    worker: &'a Worker<Vcpu>,
    flag: &'a Arc<Flag>,
    used: Option<Duration>,
    state: Seen,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    Busy,
    Asked,
    Is(Idle),
}

impl<'a> Watch<'a> {
    fn new(machine: &'a Machine<Running>) -> Self {
        let pairs = machine.state.workers.iter().zip(&machine.state.flags);
        let cpus = pairs.map(|(worker, flag)| Watched { worker, flag, used: None, state: Seen::Busy }).collect();
        let next = machine.halts_in_kvm().then(|| Instant::now() + FIRST_LOOK);
        Self { cpus, next, pause: FIRST_LOOK }
    }

    /// Looks, if it is time to.
    fn all_halted(&mut self, now: Instant) -> bool {
        if self.next.is_none_or(|at| at > now) {
            return false;
        }
        // Every CPU is looked at, whatever the others do.
        let halted = self.cpus.iter_mut().filter_map(|cpu| cpu.is_halted().then_some(())).count();
        let all = halted == self.cpus.len();
        self.pause = LAST_LOOK.min(self.pause * 2);
        let asked = self.cpus.iter().any(|cpu| cpu.state == Seen::Asked);
        self.next = Some(now + if asked { ANSWER } else { self.pause });
        all
    }
}

impl Watched<'_> {
    fn is_halted(&mut self) -> bool {
        let used = self.flag.thread().and_then(sys::thread_cpu_time);
        let idle = used.is_some() && used == self.used;
        self.used = used;
        self.state = match self.state {
            Seen::Busy if idle => {
                self.flag.look();
                self.worker.kick();
                Seen::Asked
            }
            Seen::Asked => match self.flag.seen() {
                Idle::Unknown => Seen::Asked,
                seen => Seen::Is(seen),
            },
            Seen::Is(seen) if idle => Seen::Is(seen),
            Seen::Busy | Seen::Is(_) => Seen::Busy,
        };
        self.state == Seen::Is(Idle::ForGood)
    }
}
