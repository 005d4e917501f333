//! A network interface of the host's (tap), whose frames come and go with virtio's own header: the host's kernel does what
//! the guest leaves undone, and the other way round.
//!
//! Invariant: an interface that was taken away, or is down, is a link that is down, and costs nothing.

use anyhow::Result;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;

use super::{Chain, FRAME, Sent, Wire, feature};
use crate::error::{Refusal, refuse};
use crate::host::sys::tap::{self, offload};

/// The offloads: those that the guest can take, as virtio and tap call them.
const OFFLOADS: [(u64, u32); 4] = [
    (feature::GUEST_CSUM, offload::CSUM),
    (feature::GUEST_TSO4, offload::TSO4),
    (feature::GUEST_TSO6, offload::TSO6),
    (feature::GUEST_ECN, offload::ECN),
];
/// Those that it may leave to us.
const HOST: u64 = feature::CSUM | feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_ECN;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Up,
    /// It was switched off, and may be switched on again.
    Down,
    /// It was taken away.
    Gone,
}

/// One of its queues.
struct Queue {
    fd: OwnedFd,
    attached: bool,
    /// The frame that was read and not taken: its first bytes are in the buffer.
    held: usize,
    buffer: Vec<u8>,
}

/// The interface.
pub struct Tap {
    queues: Vec<Queue>,
    offers: u64,
    state: State,
    /// A frame in one piece.
    frame: Vec<u8>,
}

impl Tap {
    /// Opens so many queues of the interface `name`.
    ///
    /// # Errors
    /// There is no such interface, or it is not for us.
    pub fn new(name: &str, queues: usize) -> Result<Self> {
        let more = if queues > 1 { " multi_queue" } else { "" };
        let make = format!("sudo ip tuntap add {name} mode tap user $USER{more} && sudo ip link set {name} up");
        let fail = |why: &dyn std::fmt::Display| -> Refusal { refuse(format!("--net tap:{name}: {why}")) };
        if !std::path::Path::new("/dev/net/tun").exists() {
            return Err(fail(&"this host has no /dev/net/tun").hint("sudo modprobe tun").into());
        }
        // Else the kernel would make one, which leads nowhere.
        if rustix::net::netdevice::name_to_index(probe()?, name).is_err() {
            return Err(fail(&"there is no such interface").hint(make).into());
        }
        let open = |_| tap::open(name, queues > 1).map(|fd| Queue { fd, attached: true, held: 0, buffer: Vec::new() });
        let queues: Vec<_> = (0..queues).map(open).collect::<Result<_, _>>().map_err(|e| {
            let hint = match Errno::from_io_error(&e) {
                Some(Errno::BUSY) => "another machine has it; each wants its own".into(),
                Some(Errno::PERM | Errno::ACCESS) => format!("make it for this user: {make}"),
                Some(Errno::INVAL) => format!("it is no tap interface, or not one for that many queues: {make}"),
                _ => make,
            };
            fail(&e).hint(hint)
        })?;
        let all = OFFLOADS.iter().fold(0, |all, (_, bit)| all | bit);
        let able = queues.first().is_some_and(|queue| tap::set_offloads(&queue.fd, all).is_ok());
        let offers = if able { OFFLOADS.iter().fold(HOST, |all, (bit, _)| all | bit) } else { 0 };
        Ok(Self { queues, offers, state: State::Up, frame: Vec::new() })
    }

    /// What an error says of the interface.
    fn note(&mut self, error: Errno) {
        match error {
            Errno::BADFD => self.state = State::Gone,
            Errno::IO if self.state == State::Up => self.state = State::Down,
            _ => {}
        }
    }
}

/// Any socket will do to ask for an interface's number.
fn probe() -> Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketType, socket};
    Ok(socket(AddressFamily::UNIX, SocketType::DGRAM, None)?)
}

impl Wire for Tap {
    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        self.queues.iter().map(|queue| queue.fd.as_fd()).collect()
    }

    fn offers(&self) -> u64 {
        self.offers
    }

    fn begin(&mut self, features: u64, pairs: usize) {
        let wanted = OFFLOADS.iter().filter(|(bit, _)| features & bit != 0).fold(0, |all, (_, bit)| all | bit);
        if let Some(queue) = self.queues.first() {
            let _ = tap::set_offloads(&queue.fd, wanted);
        }
        for (at, queue) in self.queues.iter_mut().enumerate() {
            let on = at < pairs.max(1);
            if on != queue.attached && tap::attach(&queue.fd, on).is_ok() {
                queue.attached = on;
            }
            // It may be as this driver does not want it.
            queue.held = 0;
        }
    }

    fn wake(&mut self, source: usize, _ended: bool) -> usize {
        // It says so when it is switched on; whether it was, the next frame shows.
        if self.state == State::Down {
            self.state = State::Up;
        }
        source
    }

    fn receive(&mut self, pair: usize) -> Option<&mut [u8]> {
        let queue = self.queues.get_mut(pair).filter(|_| self.state != State::Gone)?;
        queue.buffer.resize(FRAME, 0);
        while queue.held == 0 {
            match rustix::io::read(&queue.fd, &mut queue.buffer) {
                Ok(0) => return None,
                Ok(size) => queue.held = size,
                Err(Errno::INTR) => {}
                Err(error) => {
                    self.note(error);
                    return None;
                }
            }
        }
        self.queues.get_mut(pair).and_then(|queue| queue.buffer.get_mut(..queue.held))
    }

    fn taken(&mut self, pair: usize) -> bool {
        self.queues.get_mut(pair).into_iter().for_each(|queue| queue.held = 0);
        true
    }

    fn send(&mut self, pair: usize, chain: &mut Chain) -> Sent {
        let Some(queue) = self.queues.get(pair).filter(|_| self.state == State::Up) else { return Sent::Gone };
        self.frame.resize(FRAME, 0);
        let size = chain.read(&mut self.frame);
        match rustix::io::write(&queue.fd, self.frame.get(..size).unwrap_or_default()) {
            Ok(_) => Sent::Gone,
            Err(Errno::AGAIN) => Sent::Later,
            // No memory, or a header that makes no sense: a frame may be lost.
            Err(error) => {
                self.note(error);
                Sent::Gone
            }
        }
    }

    fn is_up(&self) -> bool {
        self.state == State::Up
    }
}
