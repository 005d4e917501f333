//! The event loop of a running machine: signals, streams, limits, and CPUs that have halted for good.
//!
//! Invariant: the loop never blocks but in its one wait, so a signal is answered at once whatever the guest, the
//! terminal or a pipe does.

use std::cell::Cell;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::control::Wish;
use super::streams::{Ended, Streams};
use super::watchdog::Watchdog;
use super::{End, Lent, Life, Machine, Paused, Running};
use crate::arch;
use crate::board;
use crate::config::Config;
use crate::control::State;
use crate::error::lost;
use crate::event::{Edge, Readiness};
use crate::host::say::say;
use crate::host::sys::{self, lease};
use crate::memory::Memory;
use crate::vcpu::{Idle, Stop};

const SIGNALS: u64 = 10;
const BELL: u64 = 11;

/// How often idle CPUs are looked for: soon in a machine's life, so that a short guest is not waited for, then less and
/// less. Two looks show that a CPU is idle, a third takes its answer: at most half a second in all.
const FIRST_LOOK: Duration = Duration::from_millis(10);
const LAST_LOOK: Duration = Duration::from_millis(200);
/// The same for a machine that was stopped for a look, and could go on.
const LONGEST_LOOK: Duration = Duration::from_secs(10);
/// A machine that stood still for longer is looked at as if it had just begun.
const LONG: Duration = Duration::from_millis(100);
/// How long a kicked CPU is given to answer.
const ANSWER: Duration = Duration::from_millis(5);
/// A CPU that uses less than this part of the time is asked what it does: 5 %.
const IDLE_SHARE: u32 = 20;
/// How long the last output may wait for its reader when the guest ended by itself, and when a person ended it.
const PATIENCE: Duration = Duration::from_secs(1);
const IMPATIENCE: Duration = Duration::from_millis(30);
/// How long a guest has to take note of its power button, where it is not known whether it has a driver; and how long
/// then for somebody to act on it.
const TAKES_NOTE: Duration = Duration::from_millis(300);
const ACTS: Duration = Duration::from_secs(5);
/// How long a guest has to switch itself off.
const STOP_PATIENCE: Duration = Duration::from_secs(30);

impl Machine<Running> {
    /// Serves the machine until it ends, then takes its CPUs back.
    ///
    /// That all CPUs have halted for good is a suspicion, which the board confirms once they have stopped; a machine that
    /// can go on does, and is then looked at more and more seldom.
    ///
    /// # Errors
    /// The host refuses to wait, or the machine's RAM is not as it was written.
    pub fn wait(mut self, life: &Life, streams: &mut Streams) -> Result<(Machine<Paused>, End)> {
        let mut looks = Looks::new(&self.config);
        let readiness = match watching(life, streams) {
            Ok(readiness) => readiness,
            Err(e) => {
                self.pause()?;
                return Err(e);
            }
        };
        loop {
            streams.hold();
            let served = self.serve(&readiness, life, streams, &mut looks);
            streams.release();
            if self.memory.broken().is_some() {
                self.state.halt();
                return Err(self.abandon(streams));
            }
            let ended = self.state.ended.clone();
            let machine = self.pause()?;
            let served = served?;
            looks.after(&served);
            let stands = matches!(served, Served::Pause(_) | Served::Snapshot(_)).then(Instant::now);
            let end = match (served, ended.get()) {
                (Served::End(end), _) if end != End::AllHalted => Some(end),
                // A CPU may have ended the machine while it was being stopped.
                (_, Some((cpu, stop))) => Some(End::Guest(*cpu, stop.clone())),
                (served, None) => machine.see_to(served, &readiness, life, streams)?,
            };
            let Some(end) = end else {
                if stands.is_some_and(|since| since.elapsed() > LONG) {
                    // Nobody stalls who stands still.
                    looks = Looks::new(&machine.config);
                }
                self = machine.go_on(life, streams)?;
                streams.control.is(State::Running);
                continue;
            };
            if machine.memory.broken().is_some() {
                return Err(machine.abandon(streams));
            }
            machine.memory.note_touched();
            streams.control.has_ended();
            streams.finish(if matches!(end, End::Signal(_) | End::Quit) { IMPATIENCE } else { PATIENCE });
            return Ok((machine, end));
        }
    }

    /// Stops every CPU and takes it back.
    fn pause(self) -> Result<Machine<Paused>> {
        let Self { state, config, layout, memory, board, vm } = self;
        Ok(Machine { state: Paused { vcpus: state.stop()? }, config, layout, memory, board, vm })
    }

    fn serve(&self, readiness: &Readiness, life: &Life, streams: &mut Streams, looks: &mut Looks) -> Result<Served> {
        let mut watch = Watch::new(self, looks.pause);
        let mut ready = Vec::new();
        loop {
            let ended = self.state.ended.get();
            let next =
                [life.deadline, life.telling.deadline(), streams.deadline(), streams.control.deadline(), watch.next]
                    .into_iter()
                    .chain([looks.watchdog.as_ref().map(|watchdog| watchdog.next), life.stopping.deadline()])
                    .flatten()
                    .min();
            let patience = next.map(|at| at.saturating_duration_since(Instant::now()));
            let patience = if ended.is_some() { Some(Duration::ZERO) } else { patience };
            readiness.wait(patience, &mut ready).context("epoll")?;
            if self.memory.broken().is_some() {
                return Ok(Served::End(End::Lost));
            }
            if ready.contains(&SIGNALS) {
                match signal(life, streams, &self.memory) {
                    Some(Served::End(End::Signal(sys::SIGTERM))) if !self.stops(&life.stopping) => {}
                    Some(served) => return Ok(served),
                    None => {}
                }
            }
            if let Some((cpu, stop)) = ended {
                return Ok(Served::End(End::Guest(*cpu, stop.clone())));
            }
            let asked = streams.control.serve(readiness, &ready, &life.telling, &self.memory)?;
            if let Some(served) = self.asked(&asked, life) {
                return Ok(served);
            }
            let wish = streams.serve(readiness, &ready)?;
            match wish.end {
                Some(Ended::Report) => {
                    // What was typed before it is still news to the guest.
                    if wish.input {
                        streams.tell_again();
                    }
                    return Ok(Served::Report);
                }
                Some(ended) => return Ok(Served::End(ended.into())),
                None => {}
            }
            if wish.input && !self.board.buses.service(self.board.serial) {
                streams.tell_again();
            }
            let now = Instant::now();
            if life.deadline.is_some_and(|at| at <= now) {
                return Ok(Served::End(End::Timeout));
            }
            if life.stopping.deadline().is_some_and(|at| at <= now) && self.is_deaf(&life.stopping) {
                return Ok(Served::End(End::Signal(sys::SIGTERM)));
            }
            life.telling.tell_due(now);
            if watch.all_halted(now) {
                return Ok(Served::End(End::AllHalted));
            }
            if let Some(served) = looks.watch(now, &self.state.cpus) {
                return Ok(served);
            }
        }
    }
}

impl<S> Machine<S> {
    /// What clients of the control socket want that the CPUs are to stop for.
    fn asked(&self, wish: &Wish, life: &Life) -> Option<Served> {
        if wish.stop && self.stops(&life.stopping) {
            return Some(Served::End(End::Signal(sys::SIGTERM)));
        }
        let stops = match (wish.state, wish.snapshot) {
            (Some(State::Paused), since) => Served::Pause(since),
            (_, Some(since)) => Served::Snapshot(since),
            _ => return wish.count.then_some(Served::Count),
        };
        // It goes on with whoever is to count.
        if wish.count {
            life.telling.start();
        }
        Some(stops)
    }

    /// Whether the machine ends now that someone wants it to. The first time its power button is pressed, if the guest may
    /// hear it, and the guest gets time.
    fn stops(&self, stopping: &Stopping) -> bool {
        let heard = self.board.hears_button();
        if stopping.is_on() || heard == Some(false) {
            return true;
        }
        let patience = match heard {
            Some(_) => self.config.stop_timeout.map_or(STOP_PATIENCE, |seconds| seconds.0),
            None => TAKES_NOTE,
        };
        stopping.begin(patience, heard.is_none());
        self.board.press_button();
        if heard.is_some() {
            self.tell_patience(patience);
        }
        false
    }

    /// Whether a guest whose time is up gets no more: one that has taken note of the button may have somebody who acts.
    fn is_deaf(&self, stopping: &Stopping) -> bool {
        if stopping.asks() && self.board.saw_button() {
            let patience = self.config.stop_timeout.map_or(ACTS, |seconds| seconds.0.min(ACTS));
            stopping.begin(patience, false);
            self.tell_patience(patience);
            return false;
        }
        true
    }

    fn tell_patience(&self, patience: Duration) {
        say(&format!(
            "bantam: pressed the power button; the guest has {} s to switch itself off, another signal ends it at once",
            patience.as_secs_f64()
        ));
    }
}

impl Machine<Paused> {
    /// Does what the CPUs were stopped for; how the machine ends, or none where it goes on.
    fn see_to(&self, served: Served, readiness: &Readiness, life: &Life, streams: &mut Streams) -> Result<Option<End>> {
        let story = || self.scene(&life.last_exits(self.buses())).life();
        match served {
            Served::Report => say(&story()),
            Served::Stalled(what) => say(&format!("{what}\n{}", story())),
            Served::Trapped(cpu) => {
                let found = self.state.vcpus.iter().find(|vcpu| vcpu.id() == cpu);
                let fault = found.and_then(|vcpu| vcpu.trap(&self.memory));
                return Ok(fault.map(|fault| End::Guest(cpu, Stop::Died(fault))));
            }
            Served::Continued => {}
            Served::Count => life.telling.start(),
            Served::Pause(since) => {
                streams.control.is(State::Paused);
                if let Some(since) = since {
                    self.snapshot(since, streams);
                }
                return self.stand(readiness, life, streams);
            }
            Served::Snapshot(since) => {
                self.snapshot(since, streams);
                return self.stand(readiness, life, streams);
            }
            Served::End(end) => {
                let goes_on = board::can_wake(&self.board, &self.state.vcpus, &self.memory)?;
                return Ok((!goes_on).then_some(end));
            }
        }
        Ok(None)
    }

    /// Serves a machine that stands still, until nobody wants that any more, and no snapshot, or it is to end. What is typed
    /// waits. While it is paused nobody is there to hear its power button; while a snapshot holds it no time passes for that.
    fn stand(&self, readiness: &Readiness, life: &Life, streams: &mut Streams) -> Result<Option<End>> {
        let (mut ready, mut typed, mut paused) = (Vec::new(), false, streams.control.is_paused());
        let begun = Instant::now();
        loop {
            if !paused && !streams.control.holds() {
                if typed {
                    streams.tell_again();
                }
                life.stopping.stood(begun.elapsed());
                return Ok(None);
            }
            let own = [life.deadline, life.telling.deadline(), life.stopping.deadline().filter(|_| paused)];
            let next = own.into_iter().chain([streams.deadline(), streams.control.deadline()]).flatten().min();
            let patience = next.map(|at| at.saturating_duration_since(Instant::now()));
            readiness.wait(patience, &mut ready).context("epoll")?;
            if self.memory.broken().is_some() {
                return Ok(Some(End::Lost));
            }
            let signal = ready.contains(&SIGNALS).then(|| signal(life, streams, &self.memory)).flatten();
            let asked = streams.control.serve(readiness, &ready, &life.telling, &self.memory)?;
            let stop = asked.stop.then_some(End::Signal(sys::SIGTERM));
            let end = if let Some(Served::End(end)) = signal { Some(end) } else { stop };
            if let Some(end) = end {
                let hears = end == End::Signal(sys::SIGTERM) && !paused && !self.stops(&life.stopping);
                if !hears {
                    return Ok(Some(end));
                }
                // It has to run to hear its power button.
                streams.control.give_up();
            }
            if asked.count {
                life.telling.start();
            }
            if let Some(since) = asked.snapshot {
                self.snapshot(since, streams);
            }
            let wish = streams.serve(readiness, &ready)?;
            typed |= wish.input;
            match wish.end {
                // Who looks at RAM that is guarded may have to wait for it.
                Some(Ended::Report) if streams.control.holds() => {}
                Some(Ended::Report) => say(&self.scene(&life.last_exits(self.buses())).life()),
                Some(ended) => return Ok(Some(ended.into())),
                None => {}
            }
            let now = Instant::now();
            if life.deadline.is_some_and(|at| at <= now) {
                return Ok(Some(End::Timeout));
            }
            // Its power button was pressed before it was paused.
            if paused && life.stopping.deadline().is_some_and(|at| at <= now) {
                return Ok(Some(End::Signal(sys::SIGTERM)));
            }
            life.telling.tell_due(now);
            if let Some(state) = asked.state {
                paused = state == State::Paused;
                streams.control.is(state);
            }
        }
    }

    /// Starts a machine again that was running before.
    fn go_on(self, life: &Life, streams: &Streams) -> Result<Machine<Running>> {
        self.state.vcpus.iter().for_each(|vcpu| arch::was_stopped(vcpu.fd()));
        self.resume(life, streams)
    }
}

impl<S> Machine<S> {
    /// Leaves a machine whose RAM is not what it should be to the end of the process: its threads may wait for RAM for ever,
    /// and nobody may wait for them.
    fn abandon(self, streams: &mut Streams) -> anyhow::Error {
        let why = self.memory.broken().unwrap_or_default().to_owned();
        std::mem::forget(self);
        streams.control.has_ended();
        streams.finish(PATIENCE);
        lost(why).into()
    }
}

impl From<Ended> for End {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::Quit | Ended::Report => Self::Quit,
            Ended::Interrupt => Self::Signal(sys::SIGINT),
            Ended::Until => Self::Guest(0, Stop::Until),
        }
    }
}

/// Why the event loop stopped serving.
enum Served {
    End(End),
    /// Statistics were asked for: the CPUs stop, and go on with someone who counts. So none of them looks for such a
    /// wish between two exits.
    Count,
    /// Somebody wants the machine to stand still; and it was to stop for a snapshot since then.
    Pause(Option<Instant>),
    /// A snapshot is to be written.
    Snapshot(Instant),
    /// The process was stopped for a while: the CPUs stop once more, and are told.
    Continued,
    /// `ctrl-a r`: the CPUs stop, a report shows them, and they go on.
    Report,
    /// `--watchdog` found what is said here; then the same.
    Stalled(String),
    /// It found a CPU that is lost in an exception.
    Trapped(u32),
}

/// A machine that somebody wants to end, and whose guest was asked to: what is known of it in all its lives.
#[derive(Default)]
pub struct Stopping {
    deadline: Cell<Option<Instant>>,
    on: Cell<bool>,
    /// Until the deadline it shows whether the guest takes note of the button at all.
    asks: Cell<bool>,
}

impl Stopping {
    fn begin(&self, patience: Duration, asks: bool) {
        self.deadline.set(Instant::now().checked_add(patience));
        self.asks.set(asks);
        self.on.set(true);
    }

    /// The guest has stood still for so long, and could do nothing.
    fn stood(&self, time: Duration) {
        self.deadline.set(self.deadline().and_then(|at| at.checked_add(time)));
    }

    /// The guest was asked.
    pub fn is_on(&self) -> bool {
        self.on.get()
    }

    fn asks(&self) -> bool {
        self.asks.get()
    }

    fn deadline(&self) -> Option<Instant> {
        self.deadline.get()
    }
}

/// Looks at CPUs that no one else asked for.
struct Looks {
    /// How long until the first one at idle CPUs.
    pause: Duration,
    watchdog: Option<Watchdog>,
}

impl Looks {
    fn new(config: &Config) -> Self {
        Self { pause: FIRST_LOOK, watchdog: Watchdog::new(config) }
    }

    /// The CPUs have stopped for this.
    fn after(&mut self, served: &Served) {
        if let Served::End(End::AllHalted) = served {
            self.pause = LONGEST_LOOK.min(self.pause * 4);
        }
    }

    /// What `--watchdog` finds, if it is time to look.
    fn watch(&mut self, now: Instant, cpus: &[Lent]) -> Option<Served> {
        let watchdog = self.watchdog.as_mut()?;
        let found = watchdog.look(now, cpus);
        let stalled = (!found.stalled.is_empty()).then(|| Served::Stalled(watchdog.story(&found.stalled)));
        found.trapped.map(Served::Trapped).or(stalled)
    }
}

/// Everything that the event loop waits for.
fn watching(life: &Life, streams: &mut Streams) -> Result<Readiness> {
    let readiness = Readiness::new().context("epoll")?;
    readiness.watch(life.signals()?, SIGNALS, Edge::Level)?;
    readiness.watch(&*streams, BELL, Edge::Edge)?;
    streams.watch(&readiness)?;
    streams.control.watch(&readiness)?;
    Ok(readiness)
}

/// What a signal asks for, if it is for the machine.
fn signal(life: &Life, streams: &Streams, memory: &Memory) -> Option<Served> {
    match sys::next_signal(life.signals().ok()?)? {
        sys::SIGTSTP => {
            streams.suspend();
            None
        }
        sys::SIGCONT => {
            streams.go_on();
            Some(Served::Continued)
        }
        sys::SIGUSR1 => {
            life.telling.tell();
            None
        }
        sys::SIGWINCH => {
            streams.resized();
            None
        }
        lease::LOST if memory.is_of_an_image() => Some(Served::End(End::Lost)),
        number => Some(Served::End(End::Signal(number))),
    }
}

/// Finds a machine whose CPUs are all halted with interrupts off. A CPU that halts inside KVM makes no exit; so one
/// that has hardly used CPU time since the last look is kicked and looks at itself. (Hardly: a timer that nobody hears
/// still wakes its thread for some microseconds.) One that has used none since its answer was seen is left alone, but not for
/// ever: it may have answered, and then halted for good, before that was seen.
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
        let answer = self.lent.flag.seen();
        match self.state.then(answer, spent < since / IDLE_SHARE, (spent.is_zero(), self.asked.elapsed())) {
            Some(state) => self.state = state,
            None => self.ask(),
        }
    }
}

impl Seen {
    /// What a CPU is at the next look, which `rests` now, or does nothing at all and was asked so long ago; none where it is to
    /// be asked.
    fn then(self, answer: Idle, rests: bool, (nothing, asked): (bool, Duration)) -> Option<Self> {
        match (self, answer) {
            // The kick may have been refused.
            (Self::Asked, Idle::Unknown) => (asked < LAST_LOOK).then_some(self),
            (Self::Asked, seen) => Some(Self::Is(seen)),
            (Self::Is(_), _) if nothing && asked < LONGEST_LOOK => Some(self),
            _ if rests || arch::CAN_BE_LOST && asked >= LAST_LOOK => None,
            _ => Some(Self::Busy),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_answered_before_it_halted_is_asked_again() {
        let (soon, late) = (Duration::from_millis(5), LONGEST_LOOK);
        let is = |idle| Seen::Is(idle);
        assert_eq!(Seen::Busy.then(Idle::Unknown, true, (true, soon)), None);
        assert_eq!(Seen::Asked.then(Idle::Unknown, true, (true, soon)), Some(Seen::Asked));
        assert_eq!(Seen::Asked.then(Idle::Unknown, true, (true, LAST_LOOK)), None);
        assert_eq!(Seen::Asked.then(Idle::No, true, (false, soon)), Some(is(Idle::No)));
        for idle in [Idle::No, Idle::ForGood] {
            assert_eq!(is(idle).then(idle, true, (true, soon)), Some(is(idle)));
            assert_eq!(is(idle).then(idle, true, (true, late)), None);
            assert_eq!(is(idle).then(idle, true, (false, soon)), None);
            assert_eq!(is(idle).then(idle, false, (false, soon)), Some(Seen::Busy));
        }
    }
}
