//! RAM as a file: all mappings in the order of their addresses, each at the start of a block, holes where all is zeroes.
//!
//! Invariant: no byte of it reaches a guest that was not compared with its sum since the file last changed, and the file
//! cannot change as long as it is open here (where the host has leases).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::write::{Target, make};
use super::{Verify, broken, checked, sum};
use crate::error::Refusal;
use crate::host::sys;
use crate::memory::{Frozen, Memory, Span, pages};

/// Bytes of RAM with a sum of their own.
pub const BLOCK: u64 = 64 << 10;
/// How many blocks are worth a thread.
const WORTH: usize = 64;

/// RAM, as the manifest has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ram {
    pub bytes: u64,
    /// The number and the sum of each block that is not all zeroes.
    pub blocks: Vec<(u64, String)>,
}

impl Ram {
    /// Bytes that are not zeroes, in whole blocks.
    pub fn kept(&self) -> u64 {
        self.blocks.len() as u64 * BLOCK
    }
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

/// RAM at a moment, to be written.
pub struct Moment {
    memory: Memory,
    /// What may hold anything but zeroes, block by block: where it is in RAM, in ascending order, and in the file.
    blocks: Vec<(Span, u64)>,
    bytes: u64,
    /// None: nobody may write to it until it is written.
    frozen: Option<Frozen>,
}

impl Moment {
    /// Takes the RAM of a machine that stands still, and has to until it is written or frozen.
    pub fn new(memory: &Memory) -> Self {
        let (places, bytes) = places(spans(memory));
        let mut blocks = Vec::new();
        for (start, span) in places {
            // Parts may lie in one block, or in one another.
            let mut next = 0;
            for part in memory.touched(span) {
                let (first, end) = (part.start - span.start, part.last() - span.start);
                let part = next.max(first / BLOCK)..=end / BLOCK;
                blocks.extend(part.map(|block| {
                    let at = block * BLOCK;
                    (Span { start: span.start + at, size: BLOCK.min(span.size - at) }, start + at)
                }));
                next = next.max(end / BLOCK + 1);
            }
        }
        Self { memory: memory.clone(), blocks, bytes, frozen: None }
    }

    /// The machine may go on from now on.
    ///
    /// # Errors
    /// The host has no way to that; nothing has changed.
    pub fn freeze(&mut self) -> std::io::Result<()> {
        self.frozen = Some(self.memory.freeze(self.blocks.iter().map(|(span, _)| *span))?);
        Ok(())
    }

    /// Writes it, but for what is all zeroes.
    ///
    /// # Errors
    /// The host cannot, or it is `cancelled`.
    pub fn pour(self, path: &Path, target: &Target, cancelled: &AtomicBool) -> Result<Ram> {
        let (file, mut sums) = (make(path)?, BTreeMap::new());
        let mut done = vec![false; self.blocks.len()];
        let mut bytes = vec![0; BLOCK as usize];
        let mut keep = |number: usize| -> Result<()> {
            let (Some((span, at)), Some(done)) = (self.blocks.get(number), done.get_mut(number)) else { return Ok(()) };
            if std::mem::replace(done, true) {
                return Ok(());
            }
            // The last block of a mapping may be longer than the mapping.
            bytes.fill(0);
            self.memory.read(span.start, bytes.get_mut(..span.size as usize).unwrap_or_default())?;
            if !is_zero(&bytes) {
                file.write_all_at(&bytes, *at).with_context(|| format!("writing {}", path.display()))?;
                sums.insert(at / BLOCK, sum(&bytes));
            }
            Ok(())
        };
        for number in 0..self.blocks.len() {
            if cancelled.load(Ordering::Relaxed) {
                bail!("the machine has ended");
            }
            // Who waits comes first.
            while let Some(first) = self.frozen.as_ref().and_then(Frozen::waiting) {
                let number = self.blocks.partition_point(|(span, _)| span.last() < first);
                keep(number)?;
                self.let_go(number)?;
            }
            keep(number)?;
        }
        drop(self.frozen);
        file.set_len(self.bytes).with_context(|| format!("writing {}", path.display()))?;
        target.sync(&file, path)?;
        Ok(Ram { bytes: self.bytes, blocks: sums.into_iter().collect() })
    }

    fn let_go(&self, number: usize) -> Result<()> {
        match (&self.frozen, self.blocks.get(number)) {
            (Some(frozen), Some((span, _))) => frozen.let_go(*span).context("letting a guest go on"),
            _ => Ok(()),
        }
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// The file of a snapshot's RAM.
pub struct Image {
    path: PathBuf,
    file: Arc<File>,
    /// By their numbers.
    blocks: BTreeMap<u64, String>,
    bytes: u64,
}

impl Image {
    /// Opens it.
    ///
    /// # Errors
    /// It is not there, or has another size.
    pub fn open(path: PathBuf, ram: &Ram) -> Result<Self> {
        let file = File::open(&path).map_err(|e| broken(&path, &e.to_string()))?;
        let size = file.metadata().with_context(|| path.display().to_string())?.len();
        if size != ram.bytes || !size.is_multiple_of(BLOCK) {
            return Err(broken(&path, &format!("it has {size} bytes and was written with {}", ram.bytes)).into());
        }
        let blocks: BTreeMap<_, _> = ram.blocks.iter().cloned().collect();
        let in_order = ram.blocks.iter().map(|(block, _)| block).eq(blocks.keys());
        if !in_order || blocks.keys().any(|block| block.checked_mul(BLOCK).is_none_or(|at| at >= size)) {
            bail!("the blocks of RAM are not in their order, or beyond its end");
        }
        Ok(Self { path, file: Arc::new(file), blocks, bytes: size })
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
        let known = checked::Known::of(&self.file, &self.blocks)?;
        if verify == Verify::Once && known.is_checked() {
            return Ok(());
        }
        let all = self.there();
        let threads = thread::available_parallelism().map_or(1, usize::from).min(all.len().div_ceil(WORTH)).max(1);
        let one = |blocks: &[u64]| -> Result<()> {
            let mut bytes = [0; BLOCK as usize];
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

    /// The blocks that hold anything. What is not in the manifest reads as zeroes, or somebody else has written it.
    fn there(&self) -> Vec<u64> {
        let parts = pages::data(&self.file, 0, self.bytes).into_iter();
        let there = parts.flat_map(|(at, size)| at / BLOCK..(at + size).div_ceil(BLOCK));
        let mut all: Vec<u64> = self.blocks.keys().copied().chain(there).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Reads a block, and compares it with its sum.
    fn read(&self, block: u64, bytes: &mut [u8; BLOCK as usize]) -> Result<()> {
        let at = block * BLOCK;
        self.file.read_exact_at(bytes, at).with_context(|| format!("reading {}", self.path.display()))?;
        let right = self.blocks.get(&block).map_or_else(|| is_zero(bytes), |xxh64| sum(bytes) == *xxh64);
        if !right {
            let why = format!("the {BLOCK} bytes at {at:#x} are not as they were written");
            return Err(broken(&self.path, &why).into());
        }
        Ok(())
    }

    /// Where the mappings of a machine are in the file.
    fn places(&self, spans: impl IntoIterator<Item = Span>) -> Result<Vec<(u64, Span)>> {
        let (places, bytes) = places(spans);
        anyhow::ensure!(bytes == self.bytes, "there is RAM that the machine has not, or less than it has");
        Ok(places)
    }

    /// Puts it into the RAM of a machine, which is all zeroes.
    ///
    /// # Errors
    /// It is not as it was written, or the machine is another.
    pub fn fill(&self, memory: &Memory) -> Result<()> {
        let (places, mut bytes) = (self.places(spans(memory))?, [0; BLOCK as usize]);
        for block in self.there() {
            let at = block * BLOCK;
            let place = places.iter().rev().find(|(start, span)| *start <= at && at - start < span.size);
            let Some((start, span)) = place else { bail!("there is RAM that the machine has not") };
            self.read(block, &mut bytes)?;
            let size = BLOCK.min(span.size - (at - start));
            memory.write(span.start + (at - start), bytes.get(..size as usize).unwrap_or_default())?;
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
