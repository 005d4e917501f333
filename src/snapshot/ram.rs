//! RAM as a file: all mappings in the order of their addresses, each at the start of a block, holes where all is zeroes.
//!
//! Invariant: no byte of it reaches a guest that was not compared with its sum since the file last changed, and the file
//! cannot change as long as it is open here (where the host has leases).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::num::NonZeroU64;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::diff::{Base, zeroes};
use super::write::{Target, check, make};
use super::{Verify, Xxh64, broken, checked, sum};
use crate::error::Refusal;
use crate::event::{Edge, Readiness};
use crate::host::sys;
use crate::memory::{Frozen, Memory, Span, Waiting, pages};

/// Bytes of RAM with a sum of their own.
pub const BLOCK: u64 = 64 << 10;
/// How many blocks are worth a thread.
const WORTH: usize = 64;

/// RAM, as the manifest has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ram {
    pub bytes: u64,
    /// The number and the sum of each block that is not all zeroes; of a difference, of each that is not as it was.
    pub blocks: Vec<(u64, Xxh64)>,
}

impl Ram {
    /// Bytes that are not zeroes, in whole blocks.
    pub fn kept(&self) -> u64 {
        self.blocks.len() as u64 * BLOCK - self.zeroed()
    }

    /// Of a difference: bytes that were not zeroes, and are now.
    pub fn zeroed(&self) -> u64 {
        self.blocks.iter().filter(|(_, xxh64)| *xxh64 == zeroes()).count() as u64 * BLOCK
    }
}

/// Room for a block; on a stack it would make all its pages there, in every machine.
pub fn block() -> Vec<u8> {
    vec![0; BLOCK as usize]
}

/// Where each mapping of RAM begins in the file, and how long that is: each begins a block.
fn places(spans: impl IntoIterator<Item = Span>) -> (Vec<(u64, Span)>, u64) {
    let mut end = 0;
    let place = |span: Span| {
        let start = end;
        end += span.size.next_multiple_of(BLOCK);
        (start, span)
    };
    let places = spans.into_iter().map(place).collect();
    (places, end)
}

fn spans(memory: &Memory) -> impl Iterator<Item = Span> {
    memory.slots().into_iter().map(|slot| slot.span)
}

/// A part of RAM, within one mapping: where it is in RAM, and in the file.
type Part = (Span, u64);

/// The part that an address lies in.
pub fn part_of(places: &[(u64, Span)], addr: u64) -> Option<Part> {
    let (start, span) = places.iter().find(|(_, span)| span.start <= addr && addr <= span.last())?;
    let at = (addr - span.start) / BLOCK * BLOCK;
    Some((Span { start: span.start + at, size: BLOCK.min(span.size - at) }, start + at))
}

/// Where a block of the file is in RAM.
pub fn span_of(places: &[(u64, Span)], block: u64) -> Option<Span> {
    let at = block.checked_mul(BLOCK)?;
    let (start, span) = places.iter().rev().find(|(start, span)| *start <= at && at - start < span.size)?;
    Some(part_of(places, span.start + (at - start))?.0)
}

/// The parts that `touched`, in ascending order, lie in: in ascending order, and once each.
pub fn parts_of(places: &[(u64, Span)], touched: impl IntoIterator<Item = Span>) -> Vec<Part> {
    let (mut parts, mut next) = (Vec::new(), 0);
    // They may lie in one block, or in one another.
    for touched in touched {
        let mut at = touched.start.max(next);
        while at <= touched.last()
            && let Some(part) = part_of(places, at)
        {
            parts.push(part);
            at = part.0.last().saturating_add(1);
        }
        next = next.max(at);
    }
    parts
}

/// The sum of a block that is among these, which are in the order of their numbers.
pub fn sum_of(blocks: &[(u64, Xxh64)], block: u64) -> Option<Xxh64> {
    let at = blocks.binary_search_by_key(&block, |(block, _)| *block).ok()?;
    blocks.get(at).map(|(_, xxh64)| *xxh64)
}

/// What [`Watched::watch`] waits for.
const WAITING: u64 = 0;
const NOW: u64 = 1;

/// RAM of a machine that goes on until it is to be kept: what changes meanwhile is known.
pub struct Watched {
    moment: Moment,
    frozen: Frozen,
}

impl Watched {
    /// Begins to watch.
    ///
    /// # Errors
    /// The host has no way to that.
    pub fn new(memory: &Memory) -> io::Result<Self> {
        let frozen = memory.freeze()?;
        // What begins from here on is told of.
        let moment = Moment::still(memory);
        frozen.guard(moment.parts.iter().map(|(span, _)| *span))?;
        Ok(Self { moment, frozen })
    }

    /// Lets the machine change what it likes until `now` is readable.
    ///
    /// # Errors
    /// The host refuses.
    pub fn watch(&mut self, now: impl AsFd) -> io::Result<()> {
        let (readiness, mut ready) = (Readiness::new()?, Vec::new());
        readiness.watch(&self.frozen, WAITING, Edge::Level)?;
        readiness.watch(now, NOW, Edge::Level)?;
        while !ready.contains(&NOW) {
            self.answer()?;
            readiness.wait(None, &mut ready)?;
        }
        self.answer()
    }

    fn answer(&mut self) -> io::Result<()> {
        while let Some(waiting) = self.frozen.waiting() {
            let (Waiting::ToWrite(addr) | Waiting::ToBegin(addr)) = waiting;
            let Some(part) = part_of(&self.moment.places, addr) else { continue };
            self.moment.changed.insert(part);
            match waiting {
                Waiting::ToWrite(_) => self.frozen.let_go(part.0)?,
                Waiting::ToBegin(_) => self.frozen.begin(addr)?,
            }
        }
        Ok(())
    }

    /// Now: the machine stands still, and may go on when this returns.
    ///
    /// # Errors
    /// The host refuses.
    pub fn freeze(mut self) -> io::Result<Moment> {
        self.answer()?;
        self.frozen.guard(self.moment.changed.iter().map(|(span, _)| *span))?;
        Ok(Moment { frozen: Some(self.frozen), ..self.moment })
    }
}

/// RAM at a moment, to be written.
pub struct Moment {
    memory: Memory,
    places: Vec<(u64, Span)>,
    bytes: u64,
    parts: Vec<Part>,
    /// Those that changed, or began, since they were guarded; some are among them twice.
    changed: BTreeSet<Part>,
    /// None: the machine stands still until it is written.
    frozen: Option<Frozen>,
    /// None: all of it is written.
    base: Option<Base>,
}

impl Moment {
    /// The RAM of a machine that stands still, and has to until this is written.
    pub fn still(memory: &Memory) -> Self {
        let (places, bytes) = places(spans(memory));
        // What may hold anything but zeroes.
        let parts = parts_of(&places, places.iter().flat_map(|(_, span)| memory.touched(*span)));
        Self { memory: memory.clone(), places, bytes, parts, changed: BTreeSet::new(), frozen: None, base: None }
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
        self.parts.extend(std::mem::take(&mut self.changed));
        self.parts.sort_unstable();
        self.parts.dedup();
        let mut done = vec![false; self.parts.len()];
        for number in 0..self.parts.len() {
            check(cancelled)?;
            // Who waits comes first.
            while let Some((frozen, waiting)) = self.frozen.as_ref().and_then(|f| Some((f, f.waiting()?))) {
                let (Waiting::ToWrite(addr) | Waiting::ToBegin(addr)) = waiting;
                if let Some(part) = part_of(&self.places, addr) {
                    // What is not among them was empty, and nobody guards it.
                    if let Ok(number) = self.parts.binary_search(&part) {
                        pouring.keep(&self, number, &mut done)?;
                    }
                    frozen.let_go(part.0).context("letting a guest go on")?;
                }
                if let Waiting::ToBegin(addr) = waiting {
                    frozen.begin(addr).context("letting a guest go on")?;
                }
            }
            pouring.keep(&self, number, &mut done)?;
        }
        drop(self.frozen.take());
        pouring.sums.extend(self.given_back().map(|block| (block, zeroes())));
        check(cancelled)?;
        pouring.end(self.bytes, target)
    }
}

/// Writes the RAM that several files are when each is laid over those before it; all that is in them is compared with its sum.
/// Where the first is `whole`, so is what this makes, and zeroes need not be said.
///
/// # Errors
/// One is not as it was written, or the host cannot write.
pub fn merge(images: &[&Image], whole: bool, path: &Path, target: &Target) -> Result<Ram> {
    let mut pouring = Pouring::new(path)?;
    let said = images.iter().zip(0..).flat_map(|(image, number)| image.blocks.iter().map(move |(at, _)| (*at, number)));
    let last: BTreeMap<u64, usize> = said.collect();
    for (number, image) in images.iter().enumerate() {
        for block in image.there() {
            image.read(block, &mut pouring.bytes)?;
            if last.get(&block) == Some(&number) {
                let now = pouring.now();
                if now.is_some() || !whole {
                    pouring.put(block, now)?;
                }
            }
        }
    }
    pouring.end(images.first().map_or(0, |image| image.bytes), target)
}

/// A file that RAM is written to.
struct Pouring<'a> {
    path: &'a Path,
    file: File,
    sums: BTreeMap<u64, Xxh64>,
    bytes: Vec<u8>,
}

impl<'a> Pouring<'a> {
    fn new(path: &'a Path) -> Result<Self> {
        Ok(Self { path, file: make(path)?, sums: BTreeMap::new(), bytes: block() })
    }

    /// Writes one part, the first time that it is asked for.
    fn keep(&mut self, moment: &Moment, number: usize, done: &mut [bool]) -> Result<()> {
        let (Some((span, at)), Some(done)) = (moment.parts.get(number), done.get_mut(number)) else { return Ok(()) };
        if std::mem::replace(done, true) {
            return Ok(());
        }
        // The last block of a mapping may be longer than the mapping.
        self.bytes.fill(0);
        let place = self.bytes.get_mut(..span.size as usize).unwrap_or_default();
        match moment.frozen {
            Some(_) => moment.memory.peek(span.start, place)?,
            None => moment.memory.read(span.start, place)?,
        }
        let (block, now) = (at / BLOCK, self.now());
        let before = moment.base.as_ref().and_then(|base| base.sum_of(block));
        if now == before { Ok(()) } else { self.put(block, now) }
    }

    /// The sum of what is to be written, if it is not all zeroes.
    fn now(&self) -> Option<Xxh64> {
        (!is_zero(&self.bytes)).then(|| sum(&self.bytes))
    }

    /// Writes a block, of which there is nothing in the file where it is all zeroes.
    fn put(&mut self, block: u64, now: Option<Xxh64>) -> Result<()> {
        if now.is_some() {
            let written = self.file.write_all_at(&self.bytes, block * BLOCK);
            written.with_context(|| format!("writing {}", self.path.display()))?;
        }
        self.sums.insert(block, now.unwrap_or_else(zeroes));
        Ok(())
    }

    fn end(self, bytes: u64, target: &Target) -> Result<Ram> {
        self.file.set_len(bytes).with_context(|| format!("writing {}", self.path.display()))?;
        target.sync(&self.file, self.path)?;
        Ok(Ram { bytes, blocks: self.sums.into_iter().collect() })
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// The file of a snapshot's RAM.
#[derive(Clone)]
pub struct Image {
    path: PathBuf,
    file: Arc<File>,
    /// By their numbers; the machines that go on from here share them.
    blocks: Arc<Vec<(u64, Xxh64)>>,
    bytes: u64,
    /// Of the manifest that they are in.
    told: Xxh64,
}

impl Image {
    /// Opens it.
    ///
    /// # Errors
    /// It is not there, or has another size.
    pub fn open(path: PathBuf, ram: &Ram, told: Xxh64) -> Result<Self> {
        let file = File::open(&path).map_err(|e| broken(&path, &e.to_string()))?;
        let size = file.metadata().with_context(|| path.display().to_string())?.len();
        if size != ram.bytes || !size.is_multiple_of(BLOCK) {
            return Err(broken(&path, &format!("it has {size} bytes and was written with {}", ram.bytes)).into());
        }
        let blocks = Arc::new(ram.blocks.clone());
        let in_order = blocks.is_sorted_by(|(block, _), (next, _)| block < next);
        if !in_order || blocks.iter().any(|(block, _)| block.checked_mul(BLOCK).is_none_or(|at| at >= size)) {
            bail!("the blocks of RAM are not in their order, or beyond its end");
        }
        Ok(Self { path, file: Arc::new(file), blocks, bytes: size, told })
    }

    /// The number and the sum of each block that it holds.
    pub fn blocks(&self) -> &Arc<Vec<(u64, Xxh64)>> {
        &self.blocks
    }

    /// Has whoever wants to write to it wait until nobody uses it any more, where the host can.
    ///
    /// # Errors
    /// Somebody writes to it at this moment.
    pub fn keep(&self) -> Result<(), Refusal> {
        self.lease(&self.file)
    }

    /// The same for a process that was started since, as long as what it gives lives.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn keep_too(&self) -> Result<File> {
        let file = File::open(format!("/proc/self/fd/{}", self.file.as_raw_fd()));
        let file = file.with_context(|| self.path.display().to_string())?;
        self.lease(&file)?;
        Ok(file)
    }

    fn lease(&self, file: &File) -> Result<(), Refusal> {
        match sys::lease::take(file) {
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                Err(broken(&self.path, "somebody has it open to write to it"))
            }
            _ => Ok(()),
        }
    }

    /// Compares all that is no hole with its sum.
    ///
    /// # Errors
    /// It is not as it was written.
    pub fn check(&self, verify: Verify) -> Result<()> {
        let known = checked::Known::of(&self.file, self.told)?;
        if verify == Verify::Once && known.is_checked() {
            return Ok(());
        }
        let all = self.there();
        let threads = thread::available_parallelism().map_or(1, usize::from).min(all.len().div_ceil(WORTH)).max(1);
        let one = |blocks: &[u64]| -> Result<()> {
            let mut bytes = block();
            blocks.iter().try_for_each(|block| self.read(*block, &mut bytes))
        };
        let share = all.len().div_ceil(threads).max(1);
        thread::scope(|scope| {
            let mut shares = all.chunks(share);
            let own = shares.next().unwrap_or_default();
            let others: Vec<_> = shares.map(|share| scope.spawn(move || one(share))).collect();
            one(own)?;
            others
                .into_iter()
                .try_for_each(|other| other.join().unwrap_or_else(|_| bail!("a thread that compares sums died")))
        })?;
        known.remember();
        Ok(())
    }

    /// Has the host read these blocks ahead, if it has not already; nobody waits for it.
    pub fn want(&self, blocks: &[u64]) {
        use rustix::fs::{Advice, fadvise};
        for block in blocks {
            let at = block.saturating_mul(BLOCK);
            let _ = fadvise(&*self.file, at, NonZeroU64::new(BLOCK), Advice::WillNeed);
        }
    }

    /// The blocks that hold anything. What is not in the manifest reads as zeroes, or somebody else has written it.
    pub fn there(&self) -> Vec<u64> {
        let parts = pages::data(&self.file, 0, self.bytes).into_iter();
        let there = parts.flat_map(|(at, size)| at / BLOCK..(at + size).div_ceil(BLOCK));
        let mut all: Vec<u64> = self.blocks.iter().map(|(block, _)| *block).chain(there).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Reads a block, into as many bytes, and compares it with its sum.
    pub fn read(&self, block: u64, bytes: &mut [u8]) -> Result<()> {
        let at = block * BLOCK;
        self.file.read_exact_at(bytes, at).with_context(|| format!("reading {}", self.path.display()))?;
        let known = sum_of(&self.blocks, block);
        let right = known.map_or_else(|| is_zero(bytes), |xxh64| sum(bytes) == xxh64);
        if !right {
            let why = format!("the {BLOCK} bytes at {at:#x} are not as they were written");
            return Err(broken(&self.path, &why).into());
        }
        Ok(())
    }

    /// Where the mappings of a machine are in the file.
    pub fn places(&self, spans: impl IntoIterator<Item = Span>) -> Result<Vec<(u64, Span)>> {
        let (places, bytes) = places(spans);
        anyhow::ensure!(bytes == self.bytes, "there is RAM that the machine has not, or less than it has");
        Ok(places)
    }

    /// Puts it into the RAM of a machine, which is all zeroes.
    ///
    /// # Errors
    /// It is not as it was written, or the machine is another.
    pub fn fill(&self, memory: &Memory) -> Result<()> {
        let (places, mut bytes) = (self.places(spans(memory))?, block());
        for block in self.there() {
            let Some(span) = span_of(&places, block) else { bail!("there is RAM that the machine has not") };
            self.read(block, &mut bytes)?;
            memory.write(span.start, bytes.get(..span.size as usize).unwrap_or_default())?;
        }
        Ok(())
    }

    /// The RAM of a machine that shares it.
    ///
    /// # Errors
    /// The machine is another, or the host cannot map it.
    pub fn map(&self, spans: &[Span]) -> Result<Memory> {
        Memory::of_image(&self.file, &self.places(spans.iter().copied())?)
    }
}
