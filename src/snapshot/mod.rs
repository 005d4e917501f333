//! A machine as a folder: `manifest.json` says what it is, `state.json` what its CPUs and devices hold, `memory.bin` what its
//! RAM does (sparse).
//!
//! Invariants: the folder has its name once all that is in it is on the disk, and never changes afterwards; everything that
//! is read back is checked against a sum first, the manifest against `manifest.xxh64`.

mod checked;
mod diff;
mod lazy;
mod moment;
mod ram;
mod write;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde::de::{DeserializeOwned, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use twox_hash::XxHash64;

pub use self::diff::{Base, merge};
pub use self::lazy::NOTED;
use self::lazy::{Coming, Noting, WorkingSet};
pub use self::moment::{Moment, Watched};
use self::ram::{Image, Ram};
pub use self::write::{Taken, Target, Written};
use crate::arch::{self, SavedCpu};
use crate::board::SavedVm;
use crate::bus::Saved;
use crate::config::{Config, Size};
use crate::error::{Refusal, refuse};
use crate::host::output::Bell;
use crate::host::say::printable;
use crate::memory::{Memory, Span};

/// The version of all that is written here.
const FORMAT: u32 = 3;
/// The largest manifest, and the largest state.
const MOST: u64 = 256 << 20;

const MANIFEST: &str = "manifest.json";
const MANIFEST_SUM: &str = "manifest.xxh64";
const STATE: &str = "state.json";
const MEMORY: &str = "memory.bin";

/// What a machine holds besides its RAM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// When that was: nanoseconds since 1970.
    pub at: u64,
    /// In the order of their numbers.
    pub cpus: Vec<SavedCpu>,
    /// What KVM emulates besides.
    pub kvm: SavedVm,
    /// In the order in which the board makes them: the name and the state of each.
    pub devices: Vec<(String, Saved)>,
}

/// A 64-bit xxHash, written as its 16 hexadecimal digits. There is one for each 64 KiB of RAM, so nothing is allocated to
/// read it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Xxh64(u64);

impl std::fmt::Display for Xxh64 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl Serialize for Xxh64 {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Xxh64 {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Digits;
        impl Visitor<'_> for Digits {
            type Value = Xxh64;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("16 hexadecimal digits")
            }

            fn visit_str<E: serde::de::Error>(self, digits: &str) -> Result<Xxh64, E> {
                let right = digits.len() == 16 && !digits.starts_with('+');
                let value = u64::from_str_radix(digits, 16).ok().filter(|_| right);
                value.map(Xxh64).ok_or_else(|| E::invalid_value(Unexpected::Str(digits), &self))
            }
        }
        from.deserialize_str(Digits)
    }
}

/// How many bytes, and their sum.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sum {
    bytes: u64,
    xxh64: Xxh64,
}

/// A disk's file as it was: RAM knows what is on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Disk {
    path: PathBuf,
    bytes: u64,
    /// When it was last written to: seconds, and nanoseconds.
    modified: (i64, i64),
}

impl Disk {
    fn at(path: &Path) -> Result<Self> {
        let path = std::path::absolute(path).with_context(|| path.display().to_string())?;
        let file = path.metadata().map_err(|e| broken(&path, &e.to_string()))?;
        // The metadata of a block device do not say it.
        let size = || File::open(&path).and_then(|mut file| file.seek(SeekFrom::End(0)));
        let bytes = if file.file_type().is_block_device() { size().ok() } else { Some(file.len()) };
        Ok(Self { bytes: bytes.unwrap_or(0), modified: (file.mtime(), file.mtime_nsec()), path })
    }

    /// A machine that had this one can have that.
    fn check(&self, now: &Self) -> Result<(), Refusal> {
        if self.path == now.path && self != now {
            let why = "this disk has been written to since the snapshot was, and its machine would not know";
            let hint = "give it a copy of the disk as it was: --disk OLD=NEW";
            return Err(broken(&self.path, why).hint(hint));
        }
        if self.bytes != now.bytes {
            let why = format!("it has {} bytes, and {} had {}", now.bytes, self.path.display(), self.bytes);
            return Err(broken(&now.path, &why));
        }
        Ok(())
    }

    fn paths(config: &Config) -> impl Iterator<Item = PathBuf> {
        config.disk.iter().map(|words| words.split().0.into())
    }

    fn all(config: &Config) -> Result<Vec<Self>> {
        Self::paths(config).map(|path| Self::at(&path)).collect()
    }
}

/// What a snapshot is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: u32,
    bantam: String,
    architecture: String,
    /// What the machine ran.
    pub guest: String,
    /// The machine.
    pub config: Config,
    disks: Vec<Disk>,
    state: Sum,
    /// The moment that it is a difference from; none of a whole one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base: Option<Xxh64>,
    memory: Ram,
    /// The manifest's own.
    #[serde(skip)]
    own: Xxh64,
}

/// A snapshot that was opened: its manifest and its state are whole.
pub struct Snapshot {
    /// What it is.
    pub manifest: Manifest,
    /// What its CPUs and devices hold.
    pub state: State,
    image: Image,
    working_set: WorkingSet,
    way: Way,
    freeze_clock: bool,
    /// Its folder is there as long as its owner wants.
    stays: bool,
}

/// How its RAM becomes that of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Mapped,
    Copied,
    /// As it is touched.
    Lazy,
}

/// When the sums of RAM are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Verify {
    /// Before each machine.
    Always,
    /// Before the first one; a file that was compared and has not changed since is known.
    #[default]
    Once,
    /// Of each 64 KiB when they are touched first; RAM is the machine's own then.
    Lazy,
}

/// How a machine goes on from a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct How {
    /// When its sums are compared.
    pub verify: Verify,
    /// Its RAM is read at once, and the snapshot not needed any more.
    pub copy: bool,
    /// Its clocks go on from where they were, and not from what it is now.
    pub freeze_clock: bool,
    /// For how long it is noted what it touches, if that is not known, for those that go on from there later.
    pub note: Option<Duration>,
}

fn sum(bytes: &[u8]) -> Xxh64 {
    Xxh64(XxHash64::oneshot(0, bytes))
}

fn is_partial(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "partial")
}

/// Reads a whole file of a snapshot.
fn take(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(|e| broken(path, &e.to_string()))?;
    let size = file.metadata().map_or(0, |file| file.len().min(MOST));
    let mut bytes = Vec::with_capacity(size as usize + 1);
    let read = file.take(MOST + 1).read_to_end(&mut bytes);
    read.with_context(|| path.display().to_string())?;
    if bytes.len() as u64 > MOST {
        return Err(broken(path, "it is too large").into());
    }
    Ok(bytes)
}

fn broken(path: &Path, why: &str) -> Refusal {
    refuse(format!("{}: {why}", path.display()))
}

fn changed(path: &Path) -> Refusal {
    broken(path, "it is not as it was written (its sum is another)")
}

fn parse<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(bytes).map_err(|e| broken(path, &e.to_string()))
}

impl Manifest {
    /// Reads a manifest, and checks that it is one for this program.
    ///
    /// # Errors
    /// It is missing, not complete, changed, or of another version or architecture.
    pub fn open(folder: &Path) -> Result<Self> {
        if is_partial(folder) {
            return Err(broken(folder, "a snapshot that was never completed").into());
        }
        let path = folder.join(MANIFEST);
        if !path.exists() {
            return Err(broken(folder, &format!("no snapshot: there is no {MANIFEST} in it")).into());
        }
        let bytes = take(&path)?;
        let own = sum(&bytes);
        if take(&folder.join(MANIFEST_SUM))? != own.to_string().as_bytes() {
            return Err(changed(&path).into());
        }
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let Format { format } = parse(&path, &bytes)?;
        if format != FORMAT {
            let why = format!("it has format {format}; this Bantam knows format {FORMAT}");
            return Err(broken(&path, &why).into());
        }
        let manifest = Self { own, ..parse(&path, &bytes)? };
        // Whoever made it shall not choose what else its user's machine reads and writes.
        let disks = Disk::paths(&manifest.config);
        if manifest.config != manifest.config.of_a_snapshot()
            || !disks.eq(manifest.disks.iter().map(|disk| disk.path.clone()))
        {
            return Err(broken(&path, "it says more of the machine than a snapshot keeps, or other disks").into());
        }
        if manifest.architecture != arch::NAME {
            let why = format!("a machine of {}; this host is {}", manifest.architecture, arch::NAME);
            return Err(broken(&path, &why).into());
        }
        Ok(manifest)
    }

    /// The name of the moment that it is of.
    fn moment(&self) -> Xxh64 {
        self.state.xxh64
    }

    /// What is written of the state, compared with its sum.
    fn state(&self, folder: &Path) -> Result<Vec<u8>> {
        let path = folder.join(STATE);
        let bytes = take(&path)?;
        if (Sum { bytes: bytes.len() as u64, xxh64: sum(&bytes) }) != self.state {
            return Err(changed(&path).into());
        }
        Ok(bytes)
    }
}

impl std::fmt::Display for Manifest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { bantam, architecture, guest, config, memory, disks, base, .. } = self;
        writeln!(f, "snapshot: of an {architecture} machine, format {FORMAT}, by Bantam {bantam}")?;
        writeln!(f, "moment: {}", self.moment())?;
        if let Some(base) = base {
            writeln!(f, "difference: from the moment {base}; `bantam snapshot merge` puts the two together")?;
        }
        writeln!(f, "guest: {}", printable(guest).replace('\n', "\\n"))?;
        writeln!(f, "machine: {} CPUs, {} of RAM", config.cpus.count(), config.memory)?;
        let kept = Size(memory.kept());
        match (base, memory.zeroed()) {
            (None, _) => writeln!(f, "memory: {kept} that are not zeroes")?,
            (_, 0) => writeln!(f, "memory: {kept} that have changed")?,
            (_, zeroed) => writeln!(f, "memory: {kept} that have changed, and {} that are zeroes now", Size(zeroed))?,
        }
        let disk =
            |disk: &Disk| format!("disk: {}, {} bytes\n", printable(&disk.path.display().to_string()), disk.bytes);
        f.write_str(&disks.iter().map(disk).collect::<String>())
    }
}

impl Snapshot {
    /// Opens a snapshot, and checks that it is as it was written. From now on this process gets SIGIO where somebody is about to
    /// change its file; it is blocked, for who runs a machine to find.
    ///
    /// # Errors
    /// It is not complete, or not as it was written; the file that is not is named.
    pub fn open(folder: &Path, how: How) -> Result<Self> {
        let snapshot = Self::of(folder, Manifest::open(folder)?, how)?;
        snapshot.check_disks(&snapshot.manifest.config)?;
        Ok(snapshot)
    }

    /// A machine that is connected as `config` says has disks as they were.
    ///
    /// # Errors
    /// One has been written to since, or is of another size.
    pub fn check_disks(&self, config: &Config) -> Result<()> {
        let disks = self.manifest.disks.iter().zip(Disk::all(config)?);
        Ok(disks.into_iter().try_for_each(|(disk, now)| disk.check(&now))?)
    }

    /// As [`Snapshot::open`], with the manifest that was read from there, but for its disks.
    ///
    /// # Errors
    /// The same.
    pub fn of(folder: &Path, manifest: Manifest, how: How) -> Result<Self> {
        if let Some(base) = manifest.base {
            let why = format!("it holds only what has changed since the moment {base}, and a machine needs all");
            let hint = format!("make a whole one first: bantam snapshot merge BASE {} INTO", folder.display());
            return Err(broken(folder, &why).hint(hint).into());
        }
        let state = parse(&folder.join(STATE), &manifest.state(folder)?)?;
        let image = Image::open(folder.join(MEMORY), &manifest.memory, manifest.own)?;
        // Huge pages are no file's.
        let way = match how.verify {
            _ if how.copy || manifest.config.hugepages => Way::Copied,
            Verify::Lazy => Way::Lazy,
            _ => Way::Mapped,
        };
        let working_set = WorkingSet::new(folder, manifest.own, how.note);
        // The others compare what they read.
        if way == Way::Mapped {
            image.keep()?;
            image.check(how.verify)?;
            image.want(&working_set.blocks);
        }
        Ok(Self { manifest, state, image, working_set, way, freeze_clock: how.freeze_clock, stays: true })
    }

    /// Its folder is about to be gone: nobody is to make a difference from it.
    pub fn passes(&mut self) {
        self.stays = false;
    }

    /// What a snapshot of a machine that goes on from here can be a difference from.
    pub fn base(&self) -> Option<Base> {
        let Manifest { memory, .. } = &self.manifest;
        let base = || Base { moment: self.manifest.moment(), bytes: memory.bytes, blocks: self.image.blocks().clone() };
        self.stays.then(base)
    }

    /// How much later it is by now, as far as its guest is to know. A host whose clock was set back says nothing.
    pub fn passed(&self) -> Duration {
        let then = UNIX_EPOCH.checked_add(Duration::from_nanos(self.state.at)).filter(|_| !self.freeze_clock);
        then.and_then(|then| then.elapsed().ok()).unwrap_or_default()
    }

    /// What a process has to keep that was started since this was opened, so that nobody changes the RAM of its machine; none
    /// where it has a copy.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn keep(&self) -> Result<Option<File>> {
        (self.way == Way::Mapped).then(|| self.image.keep_too()).transpose()
    }

    /// Has what a machine with this RAM touches soon noted, if it is to be, as long as what it gives lives.
    pub fn note(&self, memory: &Memory) -> Option<Noting> {
        let long = self.working_set.notes.filter(|_| self.way == Way::Mapped)?;
        let spans = memory.slots().into_iter().map(|slot| slot.span);
        Noting::start(self.working_set.clone(), self.image.places(spans).ok()?, memory.clone(), long)
    }

    /// The RAM of a machine that goes on from here, whose mappings these are; they are shared with the file, which never
    /// changes, and what the machine writes is its own. `bell` is rung where RAM that is compared when it is touched turns out
    /// not to be as it was written.
    ///
    /// # Errors
    /// The file is not as it was written, or somebody writes to it, or the machine is another.
    pub fn memory(&self, spans: &[Span], bell: impl FnOnce() -> Bell) -> Result<Memory> {
        match self.way {
            Way::Mapped => self.image.map(spans),
            Way::Copied => {
                let memory = Memory::new(spans, self.manifest.config.hugepages)?;
                self.image.fill(&memory)?;
                Ok(memory)
            }
            Way::Lazy => {
                let coming = Coming::new(&self.image, spans, &self.working_set)?;
                Memory::lazy(spans, Arc::new(coming), bell())
            }
        }
    }
}

#[cfg(test)]
mod tests;
