//! Sockets between guest and host (VIRTIO 1.3 §5.10): on the host's side they are Unix sockets.
//!
//! Who wants a port of the guest's connects to the socket at `path`, writes `CONNECT port\n` and gets `OK port\n`, the port
//! on the host's side; who waits for the guest's connections to port P of the host listens at `path_P`. Firecracker,
//! Cloud Hypervisor and others have the same. Invariant: connections, what they keep and answers owed are bounded, and a
//! connection keeps no descriptor once the host's side is through.

mod connection;
mod packet;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::ffi::OsString;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::net::RecvFlags;

use self::connection::{BUFFER, Connection, Fate, LARGE, Landing};
use self::packet::{HEADER, HOST, Header, STREAM, op};
use super::queue::lend;
use super::{Active, Chain, Kind, Part, Queue, VirtioDevice, Wake, Watcher};
use crate::bus::Saved;
use crate::config::Words;
use crate::device::{Stateless, unwrap, wrap};
use crate::host::socket::{Listener, check_path, connect};
use crate::host::sys::disk::{Buffers, MOST_PIECES};

/// Of the saved state.
const VERSION: u32 = 1;
/// Connections at a time; whoever wants another is reset.
const MOST: usize = 4096;
/// Bytes of the guest's that wait for the host's side, in all connections; one that would keep more is reset.
const POOL: usize = 32 << 20;
/// More of them, in at most 16 connections that may keep more than others: as much as those are promised.
const EXTRA: usize = 16 * (LARGE - BUFFER) as usize;
/// Resets that the guest has not taken yet; with so many, what it sends is looked at no further.
const RESETS: usize = 1024;
/// Clients that have not said yet which port they want.
const NEWCOMERS: usize = 256;
/// How long one of them may stand in the way of others.
const PATIENCE: Duration = Duration::from_secs(1);
/// The longest thing that such a client can say.
const LINE: usize = "CONNECT 4294967295\n".len();
/// Most data of one packet.
const PACKET: usize = 64 << 10;
/// Ports on the host's side of connections that the host began, from here on.
const FIRST_PORT: u32 = 1 << 30;
/// VIRTIO_VSOCK_F_STREAM
const F_STREAM: u64 = 1;

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (§5.10.6.7): all connections are gone, and the guest's cid may be another.
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

/// Queues: to the guest, from it, and for events, of which there is one.
const KIND: Kind = Kind { name: "virtio-vsock", id: 19, class: 0x07_8000, queues: &[256, 256, 64] };

/// A connection's ports: the guest's, the host's.
type Key = (u32, u32);

/// No port has this number (VMADDR_PORT_ANY).
const NO_PORT: u32 = u32::MAX;
/// The numbers by which descriptors are watched: the listener's, and the first of those that come and go.
const LISTENER: usize = 0;
const FIRST_SOURCE: u32 = 1;
/// There are no more numbers than this.
const SOURCES: u32 = 1 << 31;

/// A client that has not said yet which port it wants.
struct Newcomer {
    source: u32,
    since: Instant,
    socket: UnixStream,
}

/// The device.
pub struct Vsock {
    // Configuration
    cid: u64,
    path: PathBuf,
    /// [`MOST`], but for tests.
    most: usize,
    // Wires
    listener: Listener,
    /// Somebody may wait there.
    knocking: bool,
    /// Watches what else there is.
    watcher: Option<Watcher>,
    // State
    newcomers: VecDeque<Newcomer>,
    next_source: u32,
    next_port: u32,
    connections: HashMap<Key, Connection>,
    /// Each of them by the number by which it is watched.
    sources: HashMap<u32, Key>,
    /// Those that have something for the guest, in turn, each once.
    queue: VecDeque<Key>,
    /// Resets for the guest, each with the type of the packet that it answers.
    resets: VecDeque<(Key, u16)>,
    /// Bytes that wait in all connections.
    waiting: usize,
    /// What connections are promised beyond what all are.
    promised: usize,
    /// Data that goes on to one connection together: the last header of it, and so many bytes, which `parts` describes, of
    /// the chains `gathered`.
    batch: Option<(Header, usize)>,
    gathered: Vec<Chain>,
    /// The guest's chains that are to be filled next.
    chains: Vec<Chain>,
    // Kept so that nothing is allocated
    parts: Vec<Part>,
    buffers: Buffers,
}

impl Vsock {
    /// The device that `--vsock` asks for.
    ///
    /// # Errors
    /// Words that make no sense, or a path that cannot be had.
    pub fn new(words: &Words) -> Result<Self> {
        let mut taken = words.take("--vsock").without_first();
        let (cid, path) = (taken.value::<u32>("cid")?, taken.value::<PathBuf>("path")?);
        let Some((cid, path)) = cid.zip(path).filter(|_| taken.first().is_empty()) else {
            return Err(taken.refuse("it wants cid=N,path=SOCKET").into());
        };
        // 0 and 1 are reserved, 2 is the host, the last is anyone (§5.10.4).
        if !(3..u32::MAX).contains(&cid) {
            return Err(taken.refuse("a guest's cid is 3 to 4294967294").into());
        }
        taken.end()?;
        // Room for the port behind it.
        check_path(&path, "_4294967295".len()).context("--vsock")?;
        allow_descriptors();
        let listener = Listener::new(&path).context("--vsock")?;
        Ok(Self {
            cid: cid.into(),
            path,
            most: MOST,
            listener,
            knocking: true,
            watcher: None,
            newcomers: VecDeque::new(),
            next_source: FIRST_SOURCE,
            next_port: 0,
            connections: HashMap::new(),
            sources: HashMap::new(),
            queue: VecDeque::new(),
            resets: VecDeque::new(),
            waiting: 0,
            promised: 0,
            batch: None,
            gathered: Vec::new(),
            chains: Vec::new(),
            parts: Vec::new(),
            buffers: Buffers::default(),
        })
    }

    /// Looks at what has happened on the host's side.
    fn hear(&mut self, wake: Wake) {
        match wake {
            Wake::Queue(_) => {}
            Wake::Start | Wake::Source(LISTENER) | Wake::Ended(LISTENER) => self.knocking = true,
            Wake::Source(source) | Wake::Ended(source) => {
                let (source, ended) = (source as u32, matches!(wake, Wake::Ended(_)));
                if !self.sources.contains_key(&source) {
                    self.listen_to(source, ended);
                }
                if let Some(key) = self.sources.get(&source) {
                    self.change(*key, |connection| connection.wake(ended));
                }
            }
        }
        self.welcome();
    }

    /// A number that nothing is watched by.
    fn source(&mut self) -> u32 {
        loop {
            let source = self.next_source;
            self.next_source = (source + 1) % SOURCES;
            let taken = self.sources.contains_key(&source) || self.newcomers.iter().any(|one| one.source == source);
            if source >= FIRST_SOURCE && !taken {
                return source;
            }
        }
    }

    fn watch(&self, socket: &UnixStream, source: u32) -> bool {
        self.watcher.as_ref().is_some_and(|watcher| watcher.watch(socket, source))
    }

    /// Lets clients in, while there is room for them. It is tried after every event: the first that ends makes room.
    fn welcome(&mut self) {
        while self.knocking {
            let full = self.newcomers.len() >= NEWCOMERS;
            if full && self.newcomers.front().is_none_or(|oldest| oldest.since.elapsed() < PATIENCE) {
                return;
            }
            let Ok(next) = self.listener.accept() else { return };
            self.knocking = next.is_some();
            let Some(socket) = next else { return };
            if full {
                self.newcomers.pop_front();
            }
            let source = self.source();
            // What it has written already makes an event at once.
            if self.watch(&socket, source) {
                self.newcomers.push_back(Newcomer { source, since: Instant::now(), socket });
            }
        }
    }

    /// A client says which port it wants, or has gone; `ended`: it will say no more.
    fn listen_to(&mut self, source: u32, ended: bool) {
        let Some(at) = self.newcomers.iter().position(|newcomer| newcomer.source == source) else { return };
        let Some(newcomer) = self.newcomers.get(at) else { return };
        let said = wanted(&newcomer.socket);
        if matches!(said, Said::NotYet) && !ended {
            return;
        }
        let Some(Newcomer { socket, .. }) = self.newcomers.remove(at) else { return };
        if let Said::Port(guest) = said {
            self.begin(guest, socket, source);
        }
    }

    /// Asks the guest for a connection; where there can be none the client's ends.
    fn begin(&mut self, guest: u32, socket: UnixStream, source: u32) {
        let mut ports = (0..=MOST as u32).map(|n| FIRST_PORT + (self.next_port.wrapping_add(n) & (FIRST_PORT - 1)));
        let Some(host) = ports.find(|host| !self.connections.contains_key(&(guest, *host))) else { return };
        self.next_port = (host - FIRST_PORT).wrapping_add(1);
        self.add((guest, host), Connection::of_host(socket, source));
    }

    /// Takes a connection in, whose socket is watched.
    fn add(&mut self, key: Key, connection: Connection) {
        if self.connections.len() < self.most {
            self.sources.insert(connection.source, key);
            self.connections.insert(key, connection);
            self.change(key, |_| Fate::Stays);
        }
    }

    /// Lets something happen to a connection, and sees to what follows from it.
    fn change(&mut self, key: Key, change: impl FnOnce(&mut Connection) -> Fate) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        let before = connection.waiting();
        let mut fate = change(connection);
        if fate == Fate::Stays {
            fate = connection.settle();
        }
        self.waiting = self.waiting - before + connection.waiting();
        if fate == Fate::Stays && self.waiting > POOL + self.promised && connection.waiting() > before {
            fate = Fate::Resets;
        }
        if fate == Fate::Stays {
            if connection.deserves_more() && self.promised < EXTRA {
                connection.grow();
                self.promised += connection.more();
            }
            if connection.wants() && !connection.queued {
                connection.queued = true;
                self.queue.push_back(key);
            }
            if connection.needs_watch()
                && let (Some(watcher), Some(socket)) = (&self.watcher, connection.socket())
            {
                watcher.watch_room(socket, connection.source);
            }
            return;
        }
        self.waiting -= connection.waiting();
        self.promised -= connection.more();
        self.sources.remove(&connection.source);
        if connection.queued {
            self.queue.retain(|queued| *queued != key);
        }
        self.connections.remove(&key);
        if fate == Fate::Resets {
            self.resets.push_back((key, STREAM));
        }
    }

    /// Takes what the guest sends.
    fn take(&mut self, queue: &mut Queue) {
        while self.resets.len() < RESETS
            && let Some(mut chain) = queue.pop()
        {
            let header = Header::read(&mut chain);
            let header = header.filter(|header| (header.src_cid, header.dst_cid) == (self.cid, HOST));
            let other = match &header {
                Some(header) => self.gather(header, chain, queue),
                None => Some(chain),
            };
            let Some(chain) = other else { continue };
            self.pass_on(queue);
            header.iter().for_each(|header| self.receive(header));
            queue.push(chain);
        }
        self.pass_on(queue);
    }

    /// Takes a packet of data to a connection that there is to those that go on together; gives back any other.
    fn gather(&mut self, header: &Header, mut chain: Chain, queue: &mut Queue) -> Option<Chain> {
        let (key, size) = (header.key(), header.len as usize);
        if (header.kind, header.op) != (STREAM, op::RW) || size > PACKET || header.len > chain.left_to_read() {
            return Some(chain);
        }
        let room = self.parts.len() < MOST_PIECES;
        let goes_on = |(last, done): (Header, usize)| last.key() == key && done + size <= PACKET && room;
        if !self.batch.is_some_and(goes_on) {
            self.pass_on(queue);
            if !self.connections.contains_key(&key) {
                return Some(chain);
            }
        }
        let (_, done) = self.batch.unwrap_or((*header, 0));
        self.batch = Some((*header, done + chain.take_read(size, &mut self.parts)));
        self.gathered.push(chain);
        None
    }

    /// Hands what was gathered to its connection, and its chains back.
    fn pass_on(&mut self, queue: &mut Queue) {
        let Some((last, _)) = self.batch.take() else { return };
        let mut buffers = std::mem::take(&mut self.buffers);
        let lent = lend(queue.memory(), &mut self.parts, &mut buffers);
        self.change(last.key(), |connection| {
            connection.credit(&last);
            if lent.is_ok() { connection.data(&mut buffers) } else { Fate::Resets }
        });
        buffers.clear();
        self.buffers = buffers;
        queue.push_all(self.gathered.drain(..));
    }

    fn receive(&mut self, header: &Header) {
        let key = header.key();
        let known = header.kind == STREAM && self.connections.contains_key(&key);
        if !known {
            let begun = header.kind == STREAM && header.op == op::REQUEST && self.admit(key, header);
            if !begun && header.op != op::RST {
                self.resets.push_back((key, header.kind));
            }
            return;
        }
        self.change(key, |connection| {
            connection.credit(header);
            match header.op {
                op::RESPONSE => connection.grant(&format!("OK {}\n", header.dst_port)),
                op::RST => Fate::Ends,
                op::SHUTDOWN => {
                    connection.shut(header.flags);
                    Fate::Stays
                }
                op::CREDIT_UPDATE => Fate::Stays,
                op::CREDIT_REQUEST => {
                    connection.ask();
                    Fate::Stays
                }
                // Data of which there is less than is said, or more than a packet holds, is none.
                _ => Fate::Resets,
            }
        });
    }

    /// The guest asks for a port of the host's; false where nobody is there.
    fn admit(&mut self, key: Key, header: &Header) -> bool {
        if key.1 == NO_PORT || self.connections.len() >= self.most {
            return false;
        }
        let Ok(socket) = connect(&of_port(&self.path, key.1)) else { return false };
        let source = self.source();
        let watched = self.watch(&socket, source);
        if watched {
            self.add(key, Connection::of_guest(socket, source, header));
        }
        watched
    }

    /// Gives the guest what there is for it.
    fn give(&mut self, queue: &mut Queue) {
        while !self.resets.is_empty() || !self.queue.is_empty() {
            // What a connection has is read at once, if it had so much before, and is spread over chains.
            let wanted = self.queue.front().and_then(|key| self.connections.get(key)).map_or(1, Connection::wanted);
            while self.chains.len() < wanted
                && let Some(chain) = queue.pop()
            {
                match chain.left_to_write() as usize > HEADER {
                    true => self.chains.push(chain),
                    // One that holds a header and nothing else would never do.
                    false if self.chains.is_empty() => queue.push(chain),
                    false => {
                        queue.undo(chain);
                        break;
                    }
                }
            }
            if self.chains.is_empty() {
                return;
            }
            let filled = self.fill();
            queue.push_all(self.chains.drain(..filled));
        }
        self.chains.drain(..).rev().for_each(|chain| queue.undo(chain));
    }

    /// Fills chains with what is next; gives how many, none where there was nothing after all.
    fn fill(&mut self) -> usize {
        let addressed = |(guest, host): Key, header| Header {
            src_cid: HOST,
            dst_cid: self.cid,
            src_port: host,
            dst_port: guest,
            ..header
        };
        if let Some((key, kind)) = self.resets.pop_front() {
            let header = Header { op: op::RST, kind, ..Header::default() };
            self.chains.first_mut().into_iter().for_each(|chain| _ = chain.write(&addressed(key, header).bytes()));
            return 1;
        }
        let Some(key) = self.queue.pop_front() else { return 0 };
        let Some(connection) = self.connections.get_mut(&key) else { return 0 };
        connection.queued = false;
        let (parts, buffers) = (&mut self.parts, &mut self.buffers);
        let mut landing = Landing { chains: &self.chains, parts, buffers, first: None };
        let packet = connection.next(&mut landing);
        let (mut first, mut filled) = (landing.first, 0);
        if let Some(header) = packet {
            let mut rest = header.len as usize;
            for chain in &mut self.chains {
                let now = rest.min(Landing::room(chain));
                let header = Header { kind: STREAM, len: now as u32, ..header };
                chain.write(&addressed(key, header).bytes());
                // What was read is there already.
                let before = first.take().map_or(0, |byte| chain.write(&[byte]));
                chain.skip_write(now - before);
                (rest, filled) = (rest - now, filled + 1);
                if rest == 0 {
                    break;
                }
            }
        }
        self.change(key, |_| Fate::Stays);
        filled
    }

    /// Ends all connections.
    fn forget(&mut self) {
        self.connections.clear();
        self.sources.clear();
        self.newcomers.clear();
        self.queue.clear();
        self.resets.clear();
        (self.waiting, self.promised) = (0, 0);
    }
}

/// What a client has said.
enum Said {
    NotYet,
    Port(u32),
    Nonsense,
}

/// Takes a client's first line off its socket, and no byte of what follows.
fn wanted(socket: &UnixStream) -> Said {
    let mut line = [0; LINE];
    let count = match rustix::net::recv(socket, &mut line, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((_, count @ 1..)) => count,
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Said::NotYet,
        Ok(_) | Err(_) => return Said::Nonsense,
    };
    let said = line.get(..count).unwrap_or_default();
    let Some(end) = said.iter().position(|byte| *byte == b'\n') else {
        return if count < LINE { Said::NotYet } else { Said::Nonsense };
    };
    let port = said.get(..end).and_then(|line| std::str::from_utf8(line).ok()?.strip_prefix("CONNECT ")?.parse().ok());
    let taken = line.get_mut(..=end).is_some_and(|line| {
        let size = line.len();
        rustix::io::read(socket, line) == Ok(size)
    });
    port.filter(|port| taken && *port != NO_PORT).map_or(Said::Nonsense, Said::Port)
}

/// Where the guest's connections to a port of the host's go.
fn of_port(path: &Path, port: u32) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(format!("_{port}"));
    name.into()
}

/// Each connection takes a descriptor; what a shell allows is far fewer than the system does.
fn allow_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Nofile);
    let wanted = (2 * MOST) as u64;
    if now.current.is_some_and(|current| current < wanted) {
        let current = Some(now.maximum.map_or(wanted, |most| most.min(wanted)));
        // Where it is refused there are fewer connections.
        let _ = setrlimit(Resource::Nofile, Rlimit { current, maximum: now.maximum });
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> Kind {
        KIND
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn space(&self) -> Vec<u8> {
        self.cid.to_le_bytes().into()
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.listener.as_fd()]
    }

    fn service(&mut self, wake: Wake, active: &mut Active) {
        if wake == Wake::Start {
            self.watcher = active.watcher.clone();
        }
        self.hear(wake);
        let [rx, tx, events] = active.queues.as_mut_slice() else { return };
        if active.moved
            && let Some(mut chain) = events.pop()
        {
            // Told before anything else, lest a connection that is new be taken for one that is gone.
            chain.write(&TRANSPORT_RESET);
            events.push(chain);
            events.tell();
            active.moved = false;
        }
        loop {
            self.take(tx);
            let stopped = self.resets.len() >= RESETS;
            self.give(rx);
            if !stopped || self.resets.len() >= RESETS {
                return;
            }
        }
    }

    fn save(&self) -> Saved {
        // Connections do not outlive a machine that is saved.
        wrap(VERSION, &Stateless {})
    }

    fn load(&mut self, saved: &Saved) -> Result<()> {
        unwrap(KIND.name, VERSION, saved).map(|Stateless {}| self.forget())
    }
}
