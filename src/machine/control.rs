//! The machine behind its control socket.
//!
//! A machine with a name of its own takes its socket before it is built. Any other makes one once it has lived for
//! [`LATE`]: to make it takes longer than a small guest runs, and nobody asks a machine of two milliseconds anything.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::telling::Telling;
use super::writing::Writing;
use crate::config::Config;
use crate::control::{Answer, Info, Request, Server, State, check_name};
use crate::error::refuse;
use crate::event::Readiness;
use crate::host::output::Bell;
use crate::host::say::say;
use crate::memory::Memory;
use crate::snapshot::{Base, Taken, Target};

const LATE: Duration = Duration::from_millis(50);
/// How long a machine with a name waits for others that are starting.
const TRIES: u32 = 200;
const TRY: Duration = Duration::from_millis(5);
const FIRST: &str = "this machine has no snapshot yet that there could be a difference from; take a whole one first";

/// The control socket, or what it takes to make one.
pub struct Control {
    info: Info,
    started: Instant,
    server: Option<Server>,
    /// When to make it.
    due: Option<Instant>,
    wish: Wish,
    /// A snapshot that is written meanwhile.
    writing: Option<Writing>,
    /// What the next one can be a difference from: the last that was kept of this machine, in all its lives.
    base: Option<Base>,
    /// Rung for the event loop.
    bell: Bell,
    /// The machine's balloon, in all its lives.
    pub balloon: crate::virtio::balloon::Remote,
}

/// What clients want of the machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wish {
    /// To begin to count: somebody asked for statistics that nobody keeps.
    pub count: bool,
    /// To end.
    pub stop: bool,
    /// To be in this state from now on; whoever wants it waits for [`Control::is`].
    pub state: Option<State>,
    /// To write a snapshot, which is seen to here; whether only what has changed.
    target: Option<(Target, bool)>,
    /// To stop for a snapshot, since then; [`Control::keeps`] is to be called then.
    pub snapshot: Option<Instant>,
}

impl Control {
    /// Takes the name that `config` asks for, or none yet.
    ///
    /// # Errors
    /// The name is no name or taken, or there is no place for the socket.
    pub fn open(config: &Config, bell: Bell) -> Result<Self> {
        let started = Instant::now();
        let mut server = None;
        if let Some(name) = &config.name {
            check_name(name)?;
            for _ in 0..TRIES {
                server = Server::new(name)?;
                if server.is_some() {
                    break;
                }
                std::thread::sleep(TRY);
            }
            if server.is_none() {
                return Err(refuse("the control sockets' folder stays locked by another process").into());
            }
        }
        let pid = std::process::id();
        let info = Info {
            name: config.name.clone().unwrap_or_else(|| format!("bantam-{pid}")),
            pid,
            cpus: config.cpus.count(),
            memory: config.memory.0,
            ..Info::default()
        };
        let balloon = crate::virtio::balloon::Remote::new(config.balloon)?;
        let due = server.is_none().then(|| started + LATE);
        Ok(Self { info, started, server, due, wish: Wish::default(), writing: None, base: None, bell, balloon })
    }

    /// What the machine runs.
    pub fn guest(&self) -> &str {
        &self.info.guest
    }

    /// Says what the machine runs, and of which moment it came, if of any.
    pub fn describe(&mut self, guest: &str, base: Option<Base>) {
        guest.clone_into(&mut self.info.guest);
        self.base = base;
    }

    /// Starts watching.
    ///
    /// # Errors
    /// The host refuses.
    pub fn watch(&mut self, readiness: &Readiness) -> Result<()> {
        self.server.as_mut().map_or(Ok(()), |server| server.watch(readiness))
    }

    /// When [`Control::serve`] wants to be called.
    pub fn deadline(&self) -> Option<Instant> {
        self.due.into_iter().chain(self.server.as_ref().and_then(Server::deadline)).min()
    }

    /// Serves who asks; gives what they want.
    ///
    /// # Errors
    /// The host refuses to watch.
    pub fn serve(&mut self, readiness: &Readiness, ready: &[u64], telling: &Telling, memory: &Memory) -> Result<Wish> {
        if self.due.is_some_and(|at| at <= Instant::now()) {
            self.make(readiness)?;
        }
        let Self { info, started, server, wish, writing, base, balloon, bell, .. } = self;
        let Some(server) = server else { return Ok(Wish::default()) };
        info.age = started.elapsed().as_secs_f64();
        info.balloon = balloon.actual();
        if let Some(outcome) = writing.as_ref().and_then(Writing::outcome) {
            *base = writing.take().and_then(|writing| writing.kept()).or(base.take());
            server.deliver(&outcome, Some(readiness))?;
        }
        let (busy, first) = (writing.is_some(), base.is_none());
        server.serve(readiness, ready, &mut |request| match request {
            Request::Snapshot { .. } if busy => Some(Err("a snapshot of this machine is being written".into())),
            Request::Snapshot { diff: true, .. } if first => Some(Err(FIRST.into())),
            Request::Snapshot { path, keep, diff, disks } => aim(Target { path, keep, disks }, diff, wish),
            Request::Ping {} => Some(ping(info, telling)),
            Request::Stats { start } => Some(stats(start, telling, wish)),
            Request::Balloon { size } => Some(balloon.ask(size, info.memory)),
            Request::Pause {} => be(State::Paused, info, wish),
            Request::Resume {} => be(State::Running, info, wish),
            Request::Stop {} => {
                wish.stop = true;
                Some(Ok("null".into()))
            }
        })?;
        if let Some((target, diff)) = wish.target.take() {
            match Writing::start(memory, target, base.clone().filter(|_| diff), bell.clone()) {
                Ok(started) => {
                    *writing = Some(started);
                    // Others are served meanwhile.
                    server.defer(readiness);
                }
                Err(e) => server.answer(&Err(format!("{e:#}"))),
            }
        }
        wish.snapshot = writing.as_mut().is_some_and(Writing::wants_the_machine).then(Instant::now);
        Ok(std::mem::take(wish))
    }

    /// What the machine is that stopped for a snapshot; it may go on once nothing [`Control::holds`] it.
    pub fn keeps(&mut self, taken: Result<Taken>, since: Instant) {
        if let Some(writing) = &mut self.writing {
            writing.take(taken, since);
            // One that stands still for something else does not stand still for this any more.
            if self.info.state == State::Paused {
                writing.goes_on();
            }
        }
    }

    /// A snapshot wants the machine to stand still.
    pub fn holds(&self) -> bool {
        self.writing.as_ref().is_some_and(Writing::holds)
    }

    /// The machine is not to stand still for it any longer.
    pub fn give_up(&self) {
        self.writing.iter().for_each(Writing::give_up);
    }

    /// Somebody wants the machine to stand still.
    pub fn is_paused(&self) -> bool {
        self.info.state == State::Paused
    }

    /// The machine is in this state now: whoever wanted that has its answer.
    pub fn is(&mut self, state: State) {
        self.info.state = state;
        self.writing.iter_mut().for_each(Writing::goes_on);
        self.answer(&Ok("null".into()));
    }

    /// The machine has ended, whatever else was wanted of it.
    pub fn has_ended(&mut self) {
        self.answer(&Err("the machine has ended".into()));
        if let Some(mut writing) = self.writing.take() {
            let answer = writing.end();
            // It may live again.
            self.base = writing.kept().or(self.base.take());
            let _ = self.server.as_mut().map(|server| server.deliver(&answer, None));
        }
    }

    /// What became of the request that was carried out.
    pub fn answer(&mut self, answer: &Answer) {
        self.server.iter_mut().for_each(|server| server.answer(answer));
    }

    /// A machine that nobody gave a name does without a socket if it must.
    fn make(&mut self, readiness: &Readiness) -> Result<()> {
        self.due = None;
        match Server::new(&self.info.name) {
            Ok(None) => self.due = Some(Instant::now() + LATE),
            Ok(Some(server)) => {
                self.server = Some(server);
                self.watch(readiness)?;
            }
            Err(e) => say(&format!("bantam: warning: `bantam ps` and `top` will not see this machine: {e:#}")),
        }
        Ok(())
    }
}

/// Has the machine be in a state, unless it is.
fn be(state: State, info: &Info, wish: &mut Wish) -> Option<Answer> {
    if info.state == state {
        return Some(Ok("null".into()));
    }
    wish.state = Some(state);
    None
}

/// Has a snapshot written, if it can be there.
fn aim(target: Target, diff: bool, wish: &mut Wish) -> Option<Answer> {
    if !target.path.is_absolute() || target.disks.as_ref().is_some_and(|disks| !disks.is_absolute()) {
        return Some(Err("the folder is to be named by its whole path".into()));
    }
    wish.target = Some((target, diff));
    None
}

fn ping(info: &Info, telling: &Telling) -> Answer {
    let exits_per_second = telling.stats().map(|stats| stats.report().per_second());
    serde_json::to_string(&Info { exits_per_second, ..info.clone() }).map_err(|e| e.to_string())
}

/// The statistics, where there are any, or once somebody wants them to be counted.
fn stats(start: bool, telling: &Telling, wish: &mut Wish) -> Answer {
    match telling.stats() {
        Some(stats) => {
            let report = stats.report();
            let table = serde_json::to_string(&report.table()).unwrap_or_default();
            let report = serde_json::to_string(&report).map_err(|e| e.to_string())?;
            Ok(format!("{{\"table\":{table},\"report\":{report}}}"))
        }
        None if start => {
            wish.count = true;
            Ok("null".into())
        }
        None => Err("this machine keeps no statistics; start it with --stats".into()),
    }
}
