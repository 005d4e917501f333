//! RAM at a moment, to be written while the machine goes on.
//!
//! Invariant: what is written is what was there at the moment, whatever the machine has written since. RAM in a memory file is
//! guarded before (see [`Frozen`]); of RAM that is mapped privately another process keeps what was there (see [`Twin`]); with
//! neither, the machine stands still until all is written.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};

use super::diff::Base;
use super::ram::{BLOCK, Part, Pouring, Ram, part_of, parts_of, places, spans};
use super::write::{Target, check};
use crate::event::{Edge, Readiness};
use crate::host::sys::twin::Twin;
use crate::memory::{Frozen, Memory, Span, Waiting};

/// What [`Watched::watch`] waits for.
const WAITING: u64 = 0;
const NOW: u64 = 1;

/// How what was there at the moment is kept until it is written.
enum Hold {
    /// The machine stands still.
    Still,
    /// Who writes to it waits.
    Frozen(Frozen),
    /// Here.
    Twin(Twin),
}

/// RAM of a machine that goes on until it is to be kept.
pub enum Watched {
    /// What changes is known.
    Guarded(Moment),
    /// It is mapped privately.
    Private(Memory),
    /// The machine has to stand still until all is written, for this reason.
    Not(Memory, String),
}

impl Watched {
    /// Begins to watch.
    pub fn new(memory: &Memory) -> Self {
        if memory.is_of_an_image() {
            return Self::Private(memory.clone());
        }
        match Moment::guarded(memory) {
            Ok(moment) => Self::Guarded(moment),
            Err(e) => Self::Not(memory.clone(), e.to_string()),
        }
    }

    /// Lets the machine change what it likes until `now` is readable.
    ///
    /// # Errors
    /// The host refuses.
    pub fn watch(&mut self, now: impl AsFd) -> io::Result<()> {
        let (readiness, mut ready) = (Readiness::new()?, Vec::new());
        readiness.watch(now, NOW, Edge::Level)?;
        if let Self::Guarded(Moment { hold: Hold::Frozen(frozen), .. }) = self {
            readiness.watch(frozen, WAITING, Edge::Level)?;
        }
        while !ready.contains(&NOW) {
            self.answer()?;
            readiness.wait(None, &mut ready)?;
        }
        self.answer()
    }

    fn answer(&mut self) -> io::Result<()> {
        let Self::Guarded(Moment { hold: Hold::Frozen(frozen), places, changed, .. }) = self else { return Ok(()) };
        while let Some(waiting) = frozen.waiting() {
            let (Waiting::ToWrite(addr) | Waiting::ToBegin(addr)) = waiting;
            let Some(part) = part_of(places, addr) else { continue };
            changed.insert(part);
            match waiting {
                Waiting::ToWrite(_) => frozen.let_go(part.0)?,
                Waiting::ToBegin(_) => frozen.begin(addr)?,
            }
        }
        Ok(())
    }

    /// Now: the machine stands still, and may go on when this returns, unless it says why not.
    ///
    /// # Errors
    /// The host refuses.
    pub fn freeze(mut self) -> io::Result<(Moment, Option<String>)> {
        self.answer()?;
        Ok(match self {
            Self::Guarded(moment) => {
                if let Hold::Frozen(frozen) = &moment.hold {
                    frozen.guard(moment.changed.iter().map(|(span, _)| *span))?;
                }
                (moment, None)
            }
            Self::Private(memory) => match Twin::new() {
                Ok(twin) => (Moment::of(&memory, Hold::Twin(twin)), None),
                Err(e) => (Moment::still(&memory), Some(format!("its RAM is mapped from a snapshot, and fork: {e}"))),
            },
            Self::Not(memory, why) => (Moment::still(&memory), Some(why)),
        })
    }
}

/// RAM at a moment, to be written.
pub struct Moment {
    memory: Memory,
    places: Vec<(u64, Span)>,
    bytes: u64,
    /// What may hold anything but zeroes.
    parts: Vec<Part>,
    /// Those that changed, or began, since they were guarded; some are among them twice.
    changed: BTreeSet<Part>,
    hold: Hold,
    /// None: all of it is written.
    base: Option<Base>,
}

impl Moment {
    /// The RAM of a machine that stands still, and has to until this is written.
    pub fn still(memory: &Memory) -> Self {
        let mut moment = Self::of(memory, Hold::Still);
        moment.look();
        moment
    }

    fn guarded(memory: &Memory) -> io::Result<Self> {
        let mut moment = Self::of(memory, Hold::Frozen(memory.freeze()?));
        // What begins from here on is told of.
        moment.look();
        if let Hold::Frozen(frozen) = &moment.hold {
            frozen.guard(moment.parts.iter().map(|(span, _)| *span))?;
        }
        Ok(moment)
    }

    fn of(memory: &Memory, hold: Hold) -> Self {
        let (places, bytes) = places(spans(memory));
        let (memory, changed) = (memory.clone(), BTreeSet::new());
        Self { memory, places, bytes, parts: Vec::new(), changed, hold, base: None }
    }

    fn look(&mut self) {
        let touched = self.places.iter().flat_map(|(_, span)| match &self.hold {
            Hold::Twin(twin) => self.memory.touched_in(*span, Some(&twin.pagemap)),
            _ => self.memory.touched(*span),
        });
        self.parts = parts_of(&self.places, touched);
    }

    /// Only what is not as it was then is to be written.
    #[must_use]
    pub fn since(self, base: Option<Base>) -> Self {
        Self { base, ..self }
    }

    /// What it is a difference from, if it is one.
    pub(super) fn base(&self) -> Option<&Base> {
        self.base.as_ref()
    }

    /// Blocks that held something then, and are not among the parts that anybody touched: they were given back to the host.
    fn given_back(&self) -> impl Iterator<Item = u64> {
        let then = self.base.iter().flat_map(|base| base.blocks.iter().map(|(block, _)| *block));
        // Parts are in the order of their places too.
        then.filter(|block| self.parts.binary_search_by_key(&(block * BLOCK), |(_, at)| *at).is_err())
    }

    /// Writes it, but for what is all zeroes, or as it was.
    ///
    /// # Errors
    /// The host cannot, or it is `cancelled`.
    pub fn pour(mut self, path: &Path, target: &Target, cancelled: &AtomicBool) -> Result<Ram> {
        let of_another = self.base.as_ref().is_some_and(|base| base.bytes != self.bytes);
        anyhow::ensure!(!of_another, "a difference from a machine of other RAM");
        let mut pouring = Pouring::new(path)?;
        if matches!(self.hold, Hold::Twin(_)) {
            // Only now: the machine goes on meanwhile.
            self.look();
        }
        self.parts.extend(std::mem::take(&mut self.changed));
        self.parts.sort_unstable();
        self.parts.dedup();
        let mut done = vec![false; self.parts.len()];
        for number in 0..self.parts.len() {
            check(cancelled)?;
            self.keep_waited_for(&mut pouring, &mut done)?;
            self.keep(&mut pouring, number, &mut done)?;
        }
        // Whoever waits goes on.
        self.hold = Hold::Still;
        for block in self.given_back() {
            pouring.is_zeroes(block);
        }
        check(cancelled)?;
        pouring.end(self.bytes, target)
    }

    /// Who waits comes first.
    fn keep_waited_for(&self, pouring: &mut Pouring, done: &mut [bool]) -> Result<()> {
        let Hold::Frozen(frozen) = &self.hold else { return Ok(()) };
        while let Some(waiting) = frozen.waiting() {
            let (Waiting::ToWrite(addr) | Waiting::ToBegin(addr)) = waiting;
            if let Some(part) = part_of(&self.places, addr) {
                // What is not among them was empty, and nobody guards it.
                if let Ok(number) = self.parts.binary_search(&part) {
                    self.keep(pouring, number, done)?;
                }
                frozen.let_go(part.0).context("letting a guest go on")?;
            }
            if let Waiting::ToBegin(addr) = waiting {
                frozen.begin(addr).context("letting a guest go on")?;
            }
        }
        Ok(())
    }

    /// Writes one part, the first time that it is asked for.
    fn keep(&self, pouring: &mut Pouring, number: usize, done: &mut [bool]) -> Result<()> {
        let (Some((span, at)), Some(done)) = (self.parts.get(number), done.get_mut(number)) else { return Ok(()) };
        if std::mem::replace(done, true) {
            return Ok(());
        }
        let block = at / BLOCK;
        let before = self.base.as_ref().and_then(|base| base.sum_of(block));
        pouring.keep(block, span.size, before, |place| match &self.hold {
            Hold::Still => self.memory.read(span.start, place),
            Hold::Frozen(_) => Ok(self.memory.peek(span.start, place)?),
            Hold::Twin(twin) => {
                let (start, _) = self.memory.place(*span).context("it is not RAM")?;
                twin.read(start, place).context("reading the RAM that was there")
            }
        })
    }
}
