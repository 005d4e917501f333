//! The event loop of a running machine: signals, streams, limits, and CPUs that have halted for good.
//!
//! Invariant: the loop never blocks but in its one wait, so a signal is answered at once whatever the guest, the
//! terminal or a pipe does.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::streams::{Ended, Streams};
use super::{End, Lent, Life, Machine, Paused, Running};
use crate::arch;
use crate::board;
use crate::event::{Edge, Readiness};
use crate::host::sys;
use crate::vcpu::Idle;

const SIGNALS: u64 = 10;
const BELL: u64 = 11;

/// How often idle CPUs are looked for: soon in a machine's life, so that a short guest is not waited for, then less and
/// less. Two looks show that a CPU is idle, a third takes its answer: at most half a second in all.
const FIRST_LOOK: Duration = Duration::from_millis(10);
const LAST_LOOK: Duration = Duration::from_millis(200);
/// The same for a machine that was stopped for a look, and could go on.
const LONGEST_LOOK: Duration = Duration::from_secs(10);
/// How long a kicked CPU is given to answer.
const ANSWER: Duration = Duration::from_millis(5);
/// A CPU that uses less than this part of the time is asked what it does: 5 %.
const IDLE_SHARE: u32 = 20;
/// How long the last output may wait for its reader when the guest ended by itself, and when a person ended it.
const PATIENCE: Duration = Duration::from_secs(1);
const IMPATIENCE: Duration = Duration::from_millis(30);

impl Machine<Running> {
    /// Serves the machine until it ends, then takes its CPUs back.
    ///
    /// That all CPUs have halted for good is a suspicion, which the board confirms once they have stopped; a machine that
    /// can go on does, and is then looked at more and more seldom.
    ///
    /// # Errors
    /// The host refuses to wait.
    pub fn wait(mut self, life: &Life, streams: &mut Streams) -> Result<(Machine<Paused>, End)> {
        let mut pause = FIRST_LOOK;
        let readiness = match watching(life, streams) {
            Ok(readiness) => readiness,
            Err(e) => {
                self.pause()?;
                return Err(e);
            }
        };
        loop {
            streams.hold();
            let end = self.serve(&readiness, life, streams, pause);
            streams.release();
            let ended = self.state.ended.clone();
            let machine = self.pause()?;
            let mut end = end?;
            if end == End::AllHalted {
                // A CPU may have ended the machine while it was being stopped.
                if let Some((cpu, stop)) = ended.get() {
                    end = End::Guest(*cpu, stop.clone());
                } else if board::can_wake(&machine.board, &machine.state.vcpus, &machine.memory)? {
                    pause = LONGEST_LOOK.min(pause * 4);
                    self = machine.resume(life, streams)?;
                    continue;
                }
            }
            streams.finish(if matches!(end, End::Signal(_) | End::Quit) { IMPATIENCE } else { PATIENCE });
            return Ok((machine, end));
        }
    }

    /// Stops every CPU and takes it back.
    fn pause(self) -> Result<Machine<Paused>> {
        let Self { state, config, layout, memory, board, vm } = self;
        Ok(Machine { state: Paused { vcpus: state.stop()? }, config, layout, memory, board, vm })
    }

    fn serve(&self, readiness: &Readiness, life: &Life, streams: &mut Streams, pause: Duration) -> Result<End> {
        let mut watch = Watch::new(self, pause);
        let mut ready = Vec::new();
        loop {
            let ended = self.state.ended.get();
            let next = [life.deadline, streams.deadline(), watch.next].into_iter().flatten().min();
            let patience = next.map(|at| at.saturating_duration_since(Instant::now()));
            let patience = if ended.is_some() { Some(Duration::ZERO) } else { patience };
            readiness.wait(patience, &mut ready).context("epoll")?;
            if ready.contains(&SIGNALS)
                && let Some(end) = signal(life, streams)
            {
                return Ok(end);
            }
            if let Some((cpu, stop)) = ended {
                return Ok(End::Guest(*cpu, stop.clone()));
            }
            let wish = streams.serve(readiness, &ready)?;
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

/// Everything that the event loop waits for.
fn watching(life: &Life, streams: &mut Streams) -> Result<Readiness> {
    let readiness = Readiness::new().context("epoll")?;
    readiness.watch(life.signals()?, SIGNALS, Edge::Level)?;
    readiness.watch(&*streams, BELL, Edge::Edge)?;
    streams.watch(&readiness)?;
    Ok(readiness)
}

/// The end that a signal asks for; none for one that only stops the process for a while.
fn signal(life: &Life, streams: &Streams) -> Option<End> {
    let mut info = [0; sys::SIGNAL_INFO];
    let count = rustix::io::read(life.signals().ok()?, &mut info).unwrap_or(0);
    match sys::signal_number(info.get(..count)?)? {
        sys::SIGTSTP => {
            streams.suspend();
            None
        }
        sys::SIGCONT => {
            streams.go_on();
            None
        }
        number => Some(End::Signal(number)),
    }
}

/// Finds a machine whose CPUs are all halted with interrupts off. A CPU that halts inside KVM makes no exit; so one
/// that has hardly used CPU time since the last look is kicked and looks at itself. (Hardly: a timer that nobody hears
/// still wakes its thread for some microseconds.) One that has used none since its answer is left alone.
///
/// Where a guest can be lost without an exit, busy CPUs look at themselves too, five times a second.
///
/// An answer may be old news by the time the last CPU gives its own; so when all say "for good", all are asked again,
/// and only the second round counts.
struct Watch<'a> {
    cpus: Vec<Watched<'a>>,
    /// When to look; never for a machine whose CPUs halt with an exit.
    next: Option<Instant>,
    pause: Duration,
    last: Instant,
    /// The second round is on.
    confirming: bool,
}

struct Watched<'a> {
    lent: &'a Lent,
    asked: Instant,
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
    fn new(machine: &'a Machine<Running>, pause: Duration) -> Self {
        let now = Instant::now();
        let watched = |lent| Watched { lent, asked: now, used: None, state: Seen::Busy };
        let cpus = machine.state.cpus.iter().map(watched).collect();
        let next = machine.halts_in_kvm().then(|| now + pause);
        Self { cpus, next, pause, last: now, confirming: false }
    }

    /// Looks, if it is time to.
    fn all_halted(&mut self, now: Instant) -> bool {
        if self.next.is_none_or(|at| at > now) {
            return false;
        }
        let since = now.saturating_duration_since(std::mem::replace(&mut self.last, now));
        for cpu in &mut self.cpus {
            cpu.look(since);
        }
        let any = |state| self.cpus.iter().any(|cpu| cpu.state == state);
        let all = self.cpus.iter().all(|cpu| cpu.state == Seen::Is(Idle::ForGood));
        if all && self.confirming {
            return true;
        }
        if all {
            self.confirming = true;
            for cpu in &mut self.cpus {
                cpu.ask();
            }
        } else if any(Seen::Busy) || any(Seen::Is(Idle::No)) {
            self.confirming = false;
        }
        self.pause = LAST_LOOK.min(self.pause * 2).max(self.pause);
        let asked = self.cpus.iter().any(|cpu| cpu.state == Seen::Asked);
        self.next = Some(now + if asked { ANSWER } else { self.pause });
        false
    }
}

impl Watched<'_> {
    fn ask(&mut self) {
        self.lent.flag.look();
        self.lent.worker.kick();
        self.asked = Instant::now();
        self.state = Seen::Asked;
    }

    fn look(&mut self, since: Duration) {
        let used = self.lent.flag.thread().and_then(sys::thread_cpu_time);
        let spent = match (used, std::mem::replace(&mut self.used, used)) {
            (Some(now), Some(before)) => now.saturating_sub(before),
            _ => Duration::MAX,
        };
        match (self.state, self.lent.flag.seen()) {
            (Seen::Asked, Idle::Unknown) => {}
            (Seen::Asked, seen) => self.state = Seen::Is(seen),
            (Seen::Is(_), _) if spent.is_zero() => {}
            _ if spent < since / IDLE_SHARE => self.ask(),
            _ if arch::CAN_BE_LOST && self.asked.elapsed() >= LAST_LOOK => self.ask(),
            _ => self.state = Seen::Busy,
        }
    }
}
