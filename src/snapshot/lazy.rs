//! RAM of a snapshot that is read, and compared with its sums, when it is touched; and what was touched soon the last time.
//!
//! Invariant: what was noted is no part of the snapshot: it lies beside it, and where it is not as it was written, or of
//! another moment, there is none.

use std::collections::HashSet;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::geteuid;
use serde::{Deserialize, Serialize};

use super::ram::{BLOCK, Image, block, part_of, parts_of, span_of};
use super::{Xxh64, sum};
use crate::event::{Edge, Readiness, Worker};
use crate::host::file;
use crate::host::output::Bell;
use crate::memory::{Memory, Source, Span};

/// How many blocks are read ahead at most.
const MOST: usize = 1 << 16;
/// The largest file that says so: each number has at most 20 digits, and a comma.
const LARGEST: u64 = (MOST as u64 + 8) * 21;
/// For how long it is noted what a machine touches.
pub const NOTED: Duration = Duration::from_secs(1);

/// The blocks of RAM that a machine touched soon, in that order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Noted {
    /// The sum of the manifest of the snapshot.
    of: Xxh64,
    blocks: Vec<u64>,
}

/// What machines of a snapshot touch soon.
#[derive(Debug, Clone)]
pub struct WorkingSet {
    /// Where that is noted. None where the folder has no place beside it.
    path: Option<PathBuf>,
    of: Xxh64,
    /// None where none were noted.
    pub blocks: Vec<u64>,
    /// For how long it is to be found out.
    pub notes: Option<Duration>,
}

impl WorkingSet {
    /// That of a snapshot, whose manifest has this sum; where nobody knows, it is to be found out for so long.
    pub fn new(folder: &Path, of: Xxh64, notes: Option<Duration>) -> Self {
        let beside = |folder: PathBuf| {
            let mut name = folder.file_name()?.to_owned();
            name.push(".working-set");
            Some(folder.with_file_name(name))
        };
        let path = folder.canonicalize().ok().and_then(beside);
        let mut own = Self { path, of, blocks: Vec::new(), notes: None };
        own.blocks = own.noted().unwrap_or_default();
        own.notes = notes.filter(|_| own.blocks.is_empty());
        own
    }

    /// What is there, if it is of the size and the owner that it should be: anybody may be able to write beside the folder.
    fn read(&self) -> Option<Vec<u8>> {
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = File::options().read(true).custom_flags(flags).open(self.path.as_ref()?).ok()?;
        let told = file.metadata().ok()?;
        let good = told.is_file() && told.uid() == geteuid().as_raw() && told.len() <= LARGEST;
        let mut bytes = Vec::new();
        good.then(|| file.take(LARGEST).read_to_end(&mut bytes).ok())??;
        Some(bytes)
    }

    fn noted(&self) -> Option<Vec<u64>> {
        let bytes = self.read()?;
        let (digits, noted) = bytes.split_at_checked(16)?;
        (digits == sum(noted).to_string().as_bytes()).then_some(())?;
        let Noted { of, mut blocks } = serde_json::from_slice(noted).ok()?;
        blocks.truncate(MOST);
        (of == self.of).then_some(blocks)
    }

    /// Notes the first of these. Who cannot has none the next time.
    pub fn note(&self, mut blocks: Vec<u64>) {
        blocks.truncate(MOST);
        let write = |mut file: File| {
            let noted = serde_json::to_vec(&Noted { of: self.of, blocks })?;
            file.write_all(sum(&noted).to_string().as_bytes())?;
            Ok(file.write_all(&noted)?)
        };
        let _ = self.path.as_ref().map(|path| file::replace(path, None, write));
    }
}

/// When it is looked at what a machine has touched that shares its RAM with the file: milliseconds after its start, and at last
/// when no more is to be noted.
const LOOKS: [u64; 5] = [3, 10, 30, 100, 300];
/// More RAM than that takes too long to look at.
const TOO_MUCH: u64 = 16 << 30;

/// A thread that looks at what a machine touches soon, to the machine's end at most.
pub struct Noting {
    worker: Option<Worker<()>>,
    end: Bell,
}

impl Noting {
    /// Begins. None where it cannot.
    pub fn start(working_set: WorkingSet, places: Vec<(u64, Span)>, memory: Memory, long: Duration) -> Option<Self> {
        let size = places.iter().map(|(_, span)| span.size).sum::<u64>();
        let end = Bell::new().ok().filter(|_| size <= TOO_MUCH)?;
        let readiness = Readiness::new().ok()?;
        readiness.watch(&end, 0, Edge::Level).ok()?;
        let worker = Worker::start("working set".into(), move || {
            let (begun, mut ready) = (Instant::now(), Vec::new());
            let (mut blocks, mut once) = (Vec::new(), HashSet::new());
            for look in LOOKS.map(Duration::from_millis).into_iter().chain([long]) {
                while ready.is_empty() && begun.elapsed() < look {
                    let left = look.saturating_sub(begun.elapsed());
                    if readiness.wait(Some(left), &mut ready).is_err() {
                        return;
                    }
                }
                let parts = parts_of(&places, memory.mapped()).into_iter();
                blocks.extend(parts.map(|(_, at)| at / BLOCK).filter(|block| once.insert(*block)));
                if !ready.is_empty() {
                    break;
                }
            }
            working_set.note(blocks);
        });
        Some(Self { worker: Some(worker.ok()?), end })
    }
}

impl Drop for Noting {
    fn drop(&mut self) {
        self.end.ring();
        let _ = self.worker.take().map(Worker::join);
    }
}

/// RAM as it comes.
pub struct Coming {
    image: Image,
    places: Vec<(u64, Span)>,
    working_set: WorkingSet,
}

impl Coming {
    /// That of a machine whose mappings these are.
    ///
    /// # Errors
    /// The machine is another.
    pub fn new(image: &Image, spans: &[Span], working_set: &WorkingSet) -> Result<Self> {
        let places = image.places(spans.iter().copied())?;
        Ok(Self { image: image.clone(), places, working_set: working_set.clone() })
    }
}

impl Source for Coming {
    fn part(&self, addr: u64) -> Option<Span> {
        Some(part_of(&self.places, addr)?.0)
    }

    fn read(&self, part: Span, into: &mut [u8]) -> Result<()> {
        let (_, at) = part_of(&self.places, part.start).context("it is not RAM")?;
        if into.len() as u64 == BLOCK {
            return self.image.read(at / BLOCK, into);
        }
        // The last of a mapping.
        let mut bytes = block();
        self.image.read(at / BLOCK, &mut bytes)?;
        let bytes = bytes.get(..into.len()).context("more than a block")?;
        into.copy_from_slice(bytes);
        Ok(())
    }

    fn parts(&self) -> Vec<Span> {
        self.image.there().into_iter().filter_map(|block| span_of(&self.places, block)).collect()
    }

    fn ahead(&self) -> Vec<Span> {
        let mut once = HashSet::new();
        let blocks = self.working_set.blocks.iter();
        blocks.filter_map(|block| span_of(&self.places, *block)).filter(|span| once.insert(*span)).collect()
    }

    fn notes(&self) -> Option<Duration> {
        self.working_set.notes
    }

    fn note(&self, parts: &[Span]) {
        let block = |part: &Span| part_of(&self.places, part.start).map(|(_, at)| at / BLOCK);
        self.working_set.note(parts.iter().filter_map(block).collect());
    }
}
