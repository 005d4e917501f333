//! RAM as a file: all mappings in the order of their addresses, each at the start of a block, holes where all is zeroes.
//!
//! Invariant: no byte of it reaches a guest that was not compared with its sum since the file last changed, and the file
//! cannot change as long as it is open here (where the host has leases).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::ErrorKind;
use std::num::NonZeroU64;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::diff::zeroes;
use super::write::{Target, make};
use super::{Verify, Xxh64, broken, checked, sum};
use crate::error::Refusal;
use crate::host::sys;
use crate::memory::{Memory, Span, pages};

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
pub fn places(spans: impl IntoIterator<Item = Span>) -> (Vec<(u64, Span)>, u64) {
    let mut end = 0;
    let place = |span: Span| {
        let start = end;
        end += span.size.next_multiple_of(BLOCK);
        (start, span)
    };
    let places = spans.into_iter().map(place).collect();
    (places, end)
}

pub fn spans(memory: &Memory) -> impl Iterator<Item = Span> {
    memory.slots().into_iter().map(|slot| slot.span)
}

/// A part of RAM, within one mapping: where it is in RAM, and in the file.
pub type Part = (Span, u64);

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
pub struct Pouring<'a> {
    path: &'a Path,
    file: File,
    sums: BTreeMap<u64, Xxh64>,
    bytes: Vec<u8>,
}

impl<'a> Pouring<'a> {
    pub fn new(path: &'a Path) -> Result<Self> {
        Ok(Self { path, file: make(path)?, sums: BTreeMap::new(), bytes: block() })
    }

    /// Writes a block as `read` gives it, unless that was its sum `before`.
    pub fn keep(
        &mut self,
        block: u64,
        size: u64,
        before: Option<Xxh64>,
        read: impl FnOnce(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        // The last block of a mapping may be longer than the mapping.
        self.bytes.fill(0);
        read(self.bytes.get_mut(..size as usize).unwrap_or_default())?;
        let now = self.now();
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

    /// A block that was not zeroes, and is now.
    pub fn is_zeroes(&mut self, block: u64) {
        self.sums.insert(block, zeroes());
    }

    pub fn end(self, bytes: u64, target: &Target) -> Result<Ram> {
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
