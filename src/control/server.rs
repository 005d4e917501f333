//! The machine's end of its control socket, served by the event loop between other things.
//!
//! Everything is bounded: clients, bytes of a request, time for one, and work: so many reads in each [`WINDOW`], then
//! the socket is left alone until the next. Invariant: nothing here blocks.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::{Answer, Request, claim};
use crate::event::{Edge, Readiness};
use crate::host::socket;

/// Clients at once; one more takes the place of the one that has been silent longest.
const CLIENTS: usize = 16;
/// Bytes of one request.
const LONGEST: usize = 51_200;
/// How long a request may take to come, and an answer to be taken.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often an answer that was not taken whole is tried again.
const RETRY: Duration = Duration::from_millis(8);
const WINDOW: Duration = Duration::from_millis(50);
/// Units of work in each window: a read, a connection. An answer costs more.
const WORK: u32 = 100;
const ANSWER: u32 = 8;
const CHUNK: usize = 4096;

/// The socket's tokens in the event loop begin here: the listener's, then the clients'.
pub const TOKENS: u64 = 100;

struct Client {
    stream: UnixStream,
    request: Vec<u8>,
    answer: Vec<u8>,
    /// When its last request was answered, or it came; or when the request or answer that is under way began.
    since: Instant,
    /// It will send no more, or shall not: it goes once it has its answer.
    ending: bool,
    /// It is told later, and not listened to until then.
    deferred: bool,
}

/// A control socket that listens.
pub struct Server {
    path: PathBuf,
    listener: UnixListener,
    clients: [Option<Client>; CLIENTS],
    window: Instant,
    work: u32,
    /// Nothing is watched until the window ends.
    paused: bool,
    /// The client whose request is being carried out; until it has its answer nobody else's is looked at.
    waits: Option<usize>,
}

/// Answers a request; none where the answer comes by [`Server::answer`], as soon as the event loop has carried it out.
pub type Reply<'a> = &'a mut dyn FnMut(Request) -> Option<Answer>;

/// What a step of serving a client led to.
enum Step {
    /// It has nothing more for now.
    Wait,
    /// There may be more.
    Again,
    Gone,
}

fn token(slot: usize) -> u64 {
    TOKENS + 1 + slot as u64
}

impl Server {
    /// Takes the name; none where another start is taking one at this moment.
    ///
    /// # Errors
    /// The name is taken, or the folder cannot be used.
    pub fn new(name: &str) -> Result<Option<Self>> {
        let taken = claim(name)?;
        taken.iter().for_each(|(_, path)| socket::enter(path));
        Ok(taken.map(|(listener, path)| Self {
            path,
            listener,
            clients: [const { None }; CLIENTS],
            window: Instant::now(),
            work: 0,
            paused: false,
            waits: None,
        }))
    }

    /// Starts watching, with a new event loop.
    ///
    /// # Errors
    /// The host refuses.
    pub fn watch(&mut self, readiness: &Readiness) -> Result<()> {
        self.paused = false;
        readiness.watch(&self.listener, TOKENS, Edge::Level)?;
        for (slot, client) in self.clients.iter().enumerate() {
            if let Some(client) = client.as_ref().filter(|client| !client.deferred) {
                readiness.watch(&client.stream, token(slot), Edge::Level)?;
            }
        }
        Ok(())
    }

    fn pause(&mut self, readiness: &Readiness) {
        self.paused = true;
        readiness.forget(&self.listener);
        for client in self.clients.iter().flatten() {
            readiness.forget(&client.stream);
        }
    }

    /// When [`Server::serve`] wants to be called even if nothing comes.
    pub fn deadline(&self) -> Option<Instant> {
        let clients = self.clients.iter().flatten().filter(|client| !client.deferred);
        let times = clients.filter_map(|client| match (client.answer.is_empty(), client.request.is_empty()) {
            (false, _) => Some((Instant::now() + RETRY).min(client.since + PATIENCE)),
            // One that came with another, which had to be carried out first.
            (true, false) if client.has_request() && !self.paused => Some(Instant::now()),
            (true, false) => Some(client.since + PATIENCE),
            (true, true) => None,
        });
        times.chain(self.paused.then(|| self.window + WINDOW)).min()
    }

    /// Does what there is to do; `ready`: the tokens that are.
    ///
    /// # Errors
    /// The host refuses to watch.
    pub fn serve(&mut self, readiness: &Readiness, ready: &[u64], reply: Reply<'_>) -> Result<()> {
        let now = Instant::now();
        if now.saturating_duration_since(self.window) >= WINDOW {
            (self.window, self.work) = (now, 0);
            if self.paused {
                self.watch(readiness)?;
            }
        }
        for slot in 0..CLIENTS {
            let readable = !self.paused && ready.contains(&token(slot));
            self.attend(slot, readable, now, reply);
        }
        if !self.paused && self.waits.is_none() && ready.contains(&TOKENS) {
            self.accept(readiness, now)?;
        }
        if self.work >= WORK && !self.paused {
            self.pause(readiness);
        }
        Ok(())
    }

    /// What became of the request that was carried out, if there was one.
    pub fn answer(&mut self, answer: &Answer) {
        let client = self.waits.take().and_then(|slot| self.clients.get_mut(slot)?.as_mut());
        if let Some(client) = client {
            // What it does not take now it is offered again, as ever.
            let _ = client.give(answer, Instant::now());
        }
    }

    /// Whoever waits for what became of a request is told later, by [`Server::deliver`]: others are served meanwhile.
    pub fn defer(&mut self, readiness: &Readiness) {
        if let Some(client) = self.waits.take().and_then(|slot| self.clients.get_mut(slot)?.as_mut()) {
            readiness.forget(&client.stream);
            client.deferred = true;
        }
    }

    /// What became of the request that was deferred, if there was one. Without `readiness` it is the last answer.
    ///
    /// # Errors
    /// The host refuses to watch.
    pub fn deliver(&mut self, answer: &Answer, readiness: Option<&Readiness>) -> Result<()> {
        let mut clients = self.clients.iter_mut().enumerate();
        let found = clients.find_map(|(slot, client)| Some((slot, client.as_mut().filter(|client| client.deferred)?)));
        let Some((slot, client)) = found else { return Ok(()) };
        client.deferred = false;
        let _ = client.give(answer, Instant::now());
        if let Some(readiness) = readiness.filter(|_| !self.paused) {
            readiness.watch(&client.stream, token(slot), Edge::Level)?;
        }
        Ok(())
    }

    /// Serves one client for as long as there is something to do and work left.
    fn attend(&mut self, slot: usize, readable: bool, now: Instant, reply: Reply<'_>) {
        if self.waits.is_some() {
            return;
        }
        let Some(place) = self.clients.get_mut(slot) else { return };
        let Some(client) = place.as_mut().filter(|client| !client.deferred) else { return };
        // Even if it is not read from now: who sends and does not take its answers is heard of again and again.
        self.work += u32::from(readable);
        let mut step = client.write(now);
        while matches!(step, Step::Again) && client.answer.is_empty() {
            // What is left for the next window is found then.
            step = match if self.work < WORK { client.next_request() } else { None } {
                Some(line) => {
                    self.work += ANSWER;
                    match client.answer(&line, now, reply) {
                        Some(step) => step,
                        None => {
                            self.waits = Some(slot);
                            return;
                        }
                    }
                }
                None if client.ending && self.work < WORK => Step::Gone,
                None if readable && self.work < WORK => {
                    self.work += 1;
                    client.read(now)
                }
                None => Step::Wait,
            };
        }
        let busy = !client.request.is_empty() || !client.answer.is_empty();
        let late = busy && now.saturating_duration_since(client.since) >= PATIENCE;
        if late || matches!(step, Step::Gone) {
            // Closing it makes the event loop forget it.
            *place = None;
        }
    }

    fn accept(&mut self, readiness: &Readiness, now: Instant) -> Result<()> {
        // Few at a time, so that those who are there have their turn.
        for _ in 0..4 {
            self.work += 1;
            let Ok((stream, _)) = self.listener.accept() else { return Ok(()) };
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            let free = self.clients.iter().position(Option::is_none);
            let silent = || {
                let clients = self.clients.iter().enumerate().filter_map(|(slot, c)| Some((slot, c.as_ref()?)));
                clients.filter(|(_, client)| !client.deferred).min_by_key(|(_, client)| client.since)
            };
            let slot = free.or_else(|| silent().map(|(slot, _)| slot)).unwrap_or(0);
            readiness.watch(&stream, token(slot), Edge::Level)?;
            if let Some(place) = self.clients.get_mut(slot) {
                *place = Some(Client {
                    stream,
                    request: Vec::new(),
                    answer: Vec::new(),
                    since: now,
                    ending: false,
                    deferred: false,
                });
            }
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Before the listener closes: after that another machine may take the name.
        let _ = std::fs::remove_file(&self.path);
        socket::leave(&self.path);
    }
}

impl Client {
    /// Takes what is left of an answer.
    fn write(&mut self, now: Instant) -> Step {
        while !self.answer.is_empty() {
            match self.stream.write(&self.answer) {
                Ok(0) => return Step::Gone,
                Ok(count) => drop(self.answer.drain(..count)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Step::Wait,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Step::Gone,
            }
            self.since = now;
        }
        Step::Again
    }

    fn has_request(&self) -> bool {
        self.ending || self.request.contains(&b'\n')
    }

    /// A whole request, if there is one. The last one needs no line end.
    fn next_request(&mut self) -> Option<Vec<u8>> {
        match self.request.iter().position(|byte| *byte == b'\n') {
            Some(end) => Some(self.request.drain(..=end).collect()),
            None if self.ending && !self.request.is_empty() => Some(std::mem::take(&mut self.request)),
            None => None,
        }
    }

    /// Answers a request; none where it is to be carried out first.
    fn answer(&mut self, line: &[u8], now: Instant, reply: Reply<'_>) -> Option<Step> {
        let Ok(request) = serde_json::from_slice(line) else {
            self.refuse(
                "not a request; there are ping, stats, balloon, pause, resume, snapshot and stop: {\"ping\":{}}",
            );
            self.since = now;
            return Some(self.write(now));
        };
        self.since = now;
        reply(request).map(|answer| self.give(&answer, now))
    }

    fn give(&mut self, answer: &Answer, now: Instant) -> Step {
        match answer {
            Ok(json) => self.say("ok", json),
            Err(why) => self.error(why),
        }
        self.since = now;
        self.write(now)
    }

    fn say(&mut self, what: &str, json: &str) {
        self.answer = format!("{{\"{what}\":{json}}}\n").into_bytes();
    }

    fn error(&mut self, why: &str) {
        self.say("error", &serde_json::to_string(why).unwrap_or_default());
    }

    /// Who does not keep to the rules is told, and leaves.
    fn refuse(&mut self, why: &str) {
        self.ending = true;
        self.request.clear();
        self.error(why);
    }

    fn read(&mut self, now: Instant) -> Step {
        let mut bytes = [0; CHUNK];
        match self.stream.read(&mut bytes) {
            Ok(0) => self.ending = true,
            Ok(count) => {
                if self.request.is_empty() {
                    self.since = now;
                }
                self.request.extend_from_slice(bytes.get(..count).unwrap_or_default());
                if self.request.len() > LONGEST {
                    self.refuse("a request has at most 51200 bytes");
                    return self.write(now);
                }
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Step::Wait,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(_) => return Step::Gone,
        }
        Step::Again
    }
}
