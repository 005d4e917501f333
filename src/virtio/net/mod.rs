//! A network card (VIRTIO 1.3 §5.1): frames between the guest and a wire, which is a `tap` interface or a `stream`.
//!
//! A frame is taken from the wire only when the guest has a buffer for it, so what the guest does not take stays where it
//! can be held back. Invariant: at most one frame of an interface for each pair of queues is in our hands, that for which the
//! guest has had some buffers and not enough yet; a frame no guest can take is dropped, and never stops those behind it.

mod stream;
mod tap;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::str::FromStr;

use anyhow::{Result, ensure};
use rustix::fd::BorrowedFd;
use serde::{Deserialize, Serialize};

use self::stream::Stream;
use self::tap::Tap;
use super::{Active, Chain, Kind, Queue, VirtioDevice, Wake};
use crate::bus::Saved;
use crate::config::Words;
use crate::device::{unwrap, wrap};

/// Of the saved state.
const VERSION: u32 = 1;
/// Bytes of `struct virtio_net_hdr_v1` (§5.1.6).
const HEADER: usize = 12;
/// Where in it the number of buffers is.
const NUM_BUFFERS: usize = 10;
/// The longest frame, with that header: 64 KiB, and what wraps them.
const FRAME: usize = HEADER + (64 << 10) + 64;
/// The shortest: two addresses and a type.
const LEAST: usize = HEADER + 14;
/// Most buffers that a frame is spread over.
const SPREAD: usize = 128;
/// Most frames that a pair takes from the wire before others have their turn.
const TURNS: u32 = 512;
/// Most pairs of queues.
const MOST_PAIRS: usize = 8;

/// The longest that queues can be: pairs, and the one for control.
const SIZES: [u16; 2 * MOST_PAIRS + 1] = [256; 2 * MOST_PAIRS + 1];

/// Feature bits (§5.1.3).
mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const GUEST_ECN: u64 = 1 << 9;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const HOST_ECN: u64 = 1 << 13;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const CTRL_VQ: u64 = 1 << 17;
    pub const MQ: u64 = 1 << 22;
}

/// VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET (§5.1.6.5.6).
const SET_PAIRS: [u8; 2] = [4, 0];
/// VIRTIO_NET_OK, VIRTIO_NET_ERR
const OK: u8 = 0;
const ERR: u8 = 1;

/// What became of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    /// It was sent, or lost, as frames may be.
    Gone,
    /// There is no room for it: a source will tell when there is.
    Later,
}

/// What frames go to and come from, each with a header before it. It never waits.
trait Wire: Send {
    /// The descriptors that tell of it: one for all pairs, or one for each.
    fn sources(&self) -> Vec<BorrowedFd<'_>>;
    /// The features that it adds.
    fn offers(&self) -> u64;
    /// The driver takes these features, and uses so many pairs.
    fn begin(&mut self, features: u64, pairs: usize);
    /// A source has told of something, or of its other end's (`ended`): gives the pair that it belongs to.
    fn wake(&mut self, source: usize, ended: bool) -> usize;
    /// Its sources are not those that they were when this was asked last.
    fn has_other_sources(&mut self) -> bool {
        false
    }
    /// The next frame for a pair, with its header, the same until it is taken; none for now where a source will tell of
    /// more. One that is too short is none.
    fn receive(&mut self, pair: usize) -> Option<&mut [u8]>;
    /// The frame that was received is the guest's, or lost; false where there is no other for now, as for [`Wire::receive`].
    fn taken(&mut self, pair: usize) -> bool;
    /// A frame of a pair: a chain, of which at least [`LEAST`] bytes and at most [`FRAME`] can be read.
    fn send(&mut self, pair: usize, chain: &mut Chain) -> Sent;
    /// That was the last frame for now: what was kept to go together goes.
    fn finish(&mut self) {}
    /// There is another end.
    fn is_up(&self) -> bool;
}

/// A hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mac([u8; 6]);

impl FromStr for Mac {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORM: &str = "a hardware address is six pairs of hexadecimal digits, as 52:54:00:12:34:56";
        let parts: Vec<_> = text.split(':').collect();
        let byte = |part: &&str| if part.len() == 2 { u8::from_str_radix(part, 16).ok() } else { None };
        let bytes: Vec<u8> = parts.iter().map_while(byte).collect();
        let bytes: [u8; 6] = bytes.try_into().map_err(|_| FORM)?;
        match bytes {
            _ if parts.len() != 6 => Err(FORM),
            [first, ..] if first & 1 != 0 => Err("it is an address of many: the first byte is odd"),
            [0, 0, 0, 0, 0, 0] => Err("it is nobody's address"),
            _ => Ok(Self(bytes)),
        }
    }
}

impl Mac {
    /// The address of the card `number` of the machine called `name`: always the same, and administered locally (FNV-1a).
    fn of(name: &str, number: usize) -> Self {
        let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        let words = name.bytes().chain((number as u64).to_le_bytes());
        let [_, _, mut bytes @ ..] = words.fold(0xcbf2_9ce4_8422_2325, mix).to_be_bytes();
        let [first, ..] = &mut bytes;
        *first = *first & 0xfc | 2;
        Self(bytes)
    }
}

/// The device.
pub struct Net {
    // Configuration
    mac: Mac,
    mtu: Option<u16>,
    // Wires
    wire: Box<dyn Wire>,
    // State
    /// For each pair of queues that the driver may use: the wire may have a frame.
    pairs: Vec<bool>,
    /// As many as it does.
    used: usize,
    up: bool,
    chains: Vec<Chain>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    used: usize,
}

impl Net {
    /// The card that `--net` asks for, the `number`th of the machine called `name`.
    ///
    /// # Errors
    /// Words that make no sense, or a wire that is not to be had.
    pub fn new(words: &Words, name: Option<&str>, number: usize) -> Result<Self> {
        let mut taken = words.take("--net");
        let mac = taken.value("mac")?;
        let mtu = taken.value::<u16>("mtu")?;
        if mtu.is_some_and(|mtu| mtu < 68) {
            return Err(taken.refuse("an mtu is 68 to 65535").into());
        }
        let what = taken.first().to_owned();
        let (queues, listen) = match what.split_once(':') {
            Some(("tap", _)) => (taken.value("queues")?, false),
            Some(("socket", _)) => (None, taken.flag("listen")?),
            _ => (None, false),
        };
        let queues = queues.unwrap_or(1);
        if !(1..=MOST_PAIRS).contains(&queues) {
            return Err(taken.refuse(format_args!("queues is 1 to {MOST_PAIRS}")).into());
        }
        let kinds = "it is user, tap:NAME or socket:PATH";
        let refusal = taken.refuse(kinds);
        taken.end()?;
        let wire: Box<dyn Wire> = match what.split_once(':') {
            None if what == "user" => Box::new(Stream::passt()?),
            Some(("tap", name)) if !name.is_empty() => Box::new(Tap::new(name, queues)?),
            Some(("socket", path)) if listen => Box::new(Stream::listen(Path::new(path))?),
            Some(("socket", path)) => Box::new(Stream::connect(Path::new(path))?),
            _ => return Err(refusal.into()),
        };
        let own = || format!("bantam-{}", std::process::id());
        let mac = mac.unwrap_or_else(|| Mac::of(&name.map_or_else(own, str::to_owned), number));
        Ok(Self::with(wire, mac, mtu, queues))
    }

    fn with(wire: Box<dyn Wire>, mac: Mac, mtu: Option<u16>, pairs: usize) -> Self {
        let up = wire.is_up();
        Self { mac, mtu, wire, pairs: vec![false; pairs], used: 1, up, chains: Vec::new() }
    }

    fn has_control(&self) -> bool {
        self.pairs.len() > 1
    }

    /// Gives the driver of a pair what comes from the wire, while there is something and it has buffers.
    fn receive(&mut self, at: usize, queue: &mut Queue, merge: bool) {
        let Some(ready) = self.pairs.get_mut(at) else { return };
        let mut turns = 0;
        while *ready {
            turns += 1;
            if turns > TURNS {
                // Others first.
                return queue.again();
            }
            let Some(first) = queue.pop() else { return };
            let Some(frame) = self.wire.receive(at) else {
                *ready = false;
                return queue.undo(first);
            };
            self.chains.push(first);
            if !deliver(frame, queue, merge, &mut self.chains) {
                return;
            }
            // Where nothing is left the driver need not say when it has buffers again.
            *ready = self.wire.taken(at);
        }
    }

    /// Sends what the driver of a pair has, while the wire takes it.
    fn transmit(&mut self, pair: usize, queue: &mut Queue) {
        while let Some(mut chain) = queue.pop() {
            let fits = (LEAST..=FRAME).contains(&(chain.left_to_read() as usize));
            if fits && self.wire.send(pair, &mut chain) == Sent::Later {
                queue.undo(chain);
                break;
            }
            queue.push(chain);
        }
        self.wire.finish();
    }

    /// Carries out what the driver asks for by the control queue (§5.1.6.5).
    fn control(&mut self, queue: &mut Queue, features: u64) {
        while let Some(mut chain) = queue.pop() {
            let mut command = [0; 4];
            let size = chain.read(&mut command);
            let [class, what, low, high] = command;
            let pairs = usize::from(u16::from_le_bytes([low, high]));
            let known = size == command.len() && [class, what] == SET_PAIRS && features & feature::MQ != 0;
            let fine = known && (1..=self.pairs.len()).contains(&pairs);
            if fine {
                self.used = pairs;
                self.begin(features);
            }
            chain.write(&[if fine { OK } else { ERR }]);
            queue.push(chain);
        }
    }

    fn begin(&mut self, features: u64) {
        self.wire.begin(features, self.used);
        self.pairs.fill(true);
    }

    /// Does all there is to do for a pair.
    fn serve(&mut self, pair: usize, active: &mut Active) {
        let merge = active.features & feature::MRG_RXBUF != 0;
        if pair < self.used
            && let Some([rx, tx, ..]) = active.queues.get_mut(2 * pair..)
        {
            self.receive(pair, rx, merge);
            self.transmit(pair, tx);
        }
    }
}

/// Puts a frame into the driver's buffers, of which the first is in `chains`; false where they are too few for now. A frame
/// for which there never will be enough is dropped. No chain is kept.
fn deliver(frame: &mut [u8], queue: &mut Queue, merge: bool, chains: &mut Vec<Chain>) -> bool {
    let most = if merge { SPREAD.min(queue.ring().size.into()) } else { 1 };
    let room = |chains: &[Chain]| chains.iter().map(|chain| chain.left_to_write() as usize).sum::<usize>();
    while room(chains) < frame.len() && chains.len() < most {
        match queue.pop() {
            Some(chain) => chains.push(chain),
            None => break,
        }
    }
    let enough = room(chains) >= frame.len();
    let dropped = frame.len() < LEAST || !enough && chains.len() >= most;
    if !enough || dropped {
        chains.drain(..).rev().for_each(|chain| queue.undo(chain));
        return dropped;
    }
    let count = (chains.len() as u16).to_le_bytes();
    frame.iter_mut().skip(NUM_BUFFERS).zip(count).for_each(|(to, from)| *to = from);
    let mut done = 0;
    for chain in chains.iter_mut() {
        done += chain.write(frame.get(done..).unwrap_or_default());
    }
    queue.push_all(chains.drain(..));
    true
}

impl VirtioDevice for Net {
    fn kind(&self) -> Kind {
        let queues = 2 * self.pairs.len() + usize::from(self.has_control());
        Kind { name: "virtio-net", id: 1, class: 0x02_0000, queues: SIZES.get(..queues).unwrap_or(&SIZES) }
    }

    fn features(&self) -> u64 {
        let several = if self.has_control() { feature::CTRL_VQ | feature::MQ } else { 0 };
        let mtu = if self.mtu.is_some() { feature::MTU } else { 0 };
        feature::MAC | feature::MRG_RXBUF | feature::STATUS | mtu | several | self.wire.offers()
    }

    fn space(&self) -> Vec<u8> {
        // mac, status, max_virtqueue_pairs, mtu (§5.1.4)
        let words = [u16::from(self.up), self.pairs.len() as u16, self.mtu.unwrap_or(0)];
        self.mac.0.into_iter().chain(words.into_iter().flat_map(u16::to_le_bytes)).collect()
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        self.wire.sources()
    }

    fn service(&mut self, wake: Wake, active: &mut Active) {
        let control = if active.features & feature::MQ != 0 { 2 * self.pairs.len() } else { 2 };
        match wake {
            Wake::Start => {
                self.begin(active.features);
                (0..self.pairs.len()).for_each(|pair| self.serve(pair, active));
            }
            Wake::Queue(at) if at == control && self.has_control() => {
                let features = active.features;
                active.queues.get_mut(at).into_iter().for_each(|queue| self.control(queue, features));
                (0..self.pairs.len()).for_each(|pair| self.serve(pair, active));
            }
            Wake::Queue(at) => self.serve(at / 2, active),
            Wake::Source(source) | Wake::Ended(source) => {
                let pair = self.wire.wake(source, matches!(wake, Wake::Ended(_)));
                self.pairs.get_mut(pair).into_iter().for_each(|ready| *ready = true);
                self.serve(pair, active);
            }
        }
        active.sources_changed |= self.wire.has_other_sources();
        let up = self.wire.is_up();
        active.space_changed |= up != self.up;
        self.up = up;
    }

    fn save(&self) -> Saved {
        wrap(VERSION, &State { used: self.used })
    }

    fn load(&mut self, saved: &Saved) -> Result<()> {
        let State { used } = unwrap("virtio-net", VERSION, saved)?;
        ensure!((1..=self.pairs.len()).contains(&used), "virtio-net: {used} pairs of queues, of {}", self.pairs.len());
        self.used = used;
        Ok(())
    }
}
