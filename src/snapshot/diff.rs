//! Differences: a snapshot that holds only what has changed since another, and how they become one again.
//!
//! Invariant: a difference is put on nothing but the moment that it differs from, and whatever is merged is compared with its
//! sums first, also what a later one has another of.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, LazyLock};

use anyhow::{Context, Result};

use super::ram::{self, Image, Ram, block};
use super::write::{Target, complete, describe};
use super::{MEMORY, Manifest, Xxh64, broken, sum};
use crate::error::Refusal;

/// The sum of a block of zeroes.
static ZEROES: LazyLock<Xxh64> = LazyLock::new(|| sum(&block()));

/// What a difference has for a block that held something and is all zeroes now, of which nothing is in its file.
pub fn zeroes() -> Xxh64 {
    *ZEROES
}

/// A moment of a machine that a later snapshot can be a difference from: its name, and what RAM held then.
#[derive(Debug, Clone)]
pub struct Base {
    /// Of the state, which has the time and all registers: no two moments have the same.
    pub(super) moment: Xxh64,
    pub(super) bytes: u64,
    /// By their numbers; what is not among them was all zeroes. All that this costs while nobody takes a snapshot.
    pub(super) blocks: Arc<Vec<(u64, Xxh64)>>,
}

impl Base {
    /// The moment of a snapshot that was written; of a difference `before` says the rest.
    pub(super) fn new(moment: Xxh64, memory: Ram, before: Option<&Self>) -> Self {
        let Ram { bytes, mut blocks } = memory;
        if let Some(before) = before {
            let mut all: BTreeMap<_, _> = before.blocks.iter().copied().chain(blocks).collect();
            all.retain(|_, xxh64| *xxh64 != zeroes());
            blocks = all.into_iter().collect();
        }
        Self { moment, bytes, blocks: Arc::new(blocks) }
    }

    /// The sum of a block then, if it was not all zeroes.
    pub(super) fn sum_of(&self, block: u64) -> Option<Xxh64> {
        ram::sum_of(&self.blocks, block)
    }
}

/// One of those that are merged.
struct Layer {
    folder: PathBuf,
    manifest: Manifest,
    state: Vec<u8>,
    image: Image,
}

impl Layer {
    fn open(folder: &Path) -> Result<Self> {
        let mut manifest = Manifest::open(folder)?;
        let state = manifest.state(folder)?;
        let image = Image::open(folder.join(MEMORY), &manifest.memory, manifest.own)?;
        // The file has them too.
        manifest.memory.blocks = Vec::new();
        Ok(Self { folder: folder.to_owned(), manifest, state, image })
    }

    /// This is what has changed since `before`.
    fn follows(&self, before: &Self) -> Result<(), Refusal> {
        let (from, is) = (self.manifest.base, before.manifest.moment());
        let Some(from) = from else {
            return Err(broken(&self.folder, "it is a whole snapshot, and no difference from any"));
        };
        if from != is {
            let why = format!("it differs from the moment {from}, and {} is of {is}", before.folder.display());
            return Err(broken(&self.folder, &why).hint("`bantam inspect FOLDER` shows the moments of a snapshot"));
        }
        if self.manifest.memory.bytes != before.manifest.memory.bytes {
            return Err(broken(&self.folder, &format!("it has not as much RAM as {}", before.folder.display())));
        }
        Ok(())
    }
}

/// Makes one snapshot of one and the differences that follow it, in their order: what the machine was at the moment of the
/// last. Where the first is a difference itself, so is what this makes.
///
/// # Errors
/// They do not follow one another, or one is not as it was written, or the host cannot write it; nothing is left then.
pub fn merge(first: &Path, differences: &[PathBuf], target: &Target) -> Result<Manifest> {
    let first = Layer::open(first)?;
    let base = first.manifest.base;
    let mut layers = vec![first];
    for folder in differences {
        let layer = Layer::open(folder)?;
        if let Some(before) = layers.last_mut() {
            layer.follows(before)?;
            // That of the last is kept.
            before.state = Vec::new();
        }
        layers.push(layer);
    }
    let images: Vec<&Image> = layers.iter().map(|layer| &layer.image).collect();
    // Nobody waits for this but who can end the process.
    complete(target, &AtomicBool::new(false), |folder| {
        let memory = ram::merge(&images, base.is_none(), &folder.join(MEMORY), target)?;
        let last = layers.last().context("nothing to merge")?;
        let manifest = Manifest { bantam: env!("CARGO_PKG_VERSION").into(), base, memory, ..last.manifest.clone() };
        describe(&manifest, &last.state, folder, target)?;
        Ok(manifest)
    })
}
