//! Writing a snapshot: at first to a folder that is called `.partial`.
//!
//! Invariant: whatever happens, there is a whole snapshot under its name or none, and nothing that was there is lost.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};

use super::diff::Base;
use super::moment::Moment;
use super::{Disk, FORMAT, MANIFEST, MANIFEST_SUM, MEMORY, MOST, Manifest, STATE, State, Sum, Xxh64, is_partial, sum};
use crate::arch;
use crate::config::Config;
use crate::error::refuse;
use crate::virtio::block::{Options, copy, open_own, serial};

/// Where a snapshot is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// A folder that is not there yet.
    pub path: PathBuf,
    /// It is to be there after whatever happens to the host.
    pub keep: bool,
    /// A folder that is there, for copies of the disks that the machine writes to, as they are at the moment: each is named by
    /// its number, from 0 on.
    pub disks: Option<PathBuf>,
}

impl Target {
    /// There can be a snapshot.
    fn check(&self) -> Result<()> {
        let path = &self.path;
        if path.symlink_metadata().is_ok() {
            let why = format!("{} is there already, and a snapshot never changes", path.display());
            return Err(refuse(why).hint("name a folder that is not there").into());
        }
        if is_partial(path) {
            let why = format!("{}: that is what a snapshot is called that is not complete", path.display());
            return Err(refuse(why).hint("give it another name").into());
        }
        Ok(())
    }

    pub(super) fn sync(&self, file: &File, path: &Path) -> Result<()> {
        if self.keep {
            file.sync_all().with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(())
    }
}

/// What was written.
#[derive(Debug, Clone)]
pub struct Written {
    /// Bytes of RAM that are in it, in whole blocks.
    pub memory: u64,
    /// What a later one can be a difference from.
    pub base: Base,
}

/// Nobody waits for it any more.
pub(super) fn check(cancelled: &AtomicBool) -> Result<()> {
    anyhow::ensure!(!cancelled.load(Ordering::Relaxed), "the machine has ended");
    Ok(())
}

pub(super) fn make(path: &Path) -> Result<File> {
    let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(path);
    file.with_context(|| format!("cannot make {}", path.display()))
}

fn put(path: &Path, bytes: &[u8], target: &Target) -> Result<()> {
    let mut file = make(path)?;
    file.write_all(bytes).with_context(|| format!("writing {}", path.display()))?;
    target.sync(&file, path)
}

/// Where a snapshot is while it is not complete.
fn partial(path: &Path) -> PathBuf {
    // Without a slash at its end.
    let mut name = path.components().as_path().as_os_str().to_owned();
    name.push(".partial");
    name.into()
}

/// Copies of disks, which go with the snapshot that comes to nothing.
#[derive(Default)]
struct Copies {
    made: Vec<(File, PathBuf)>,
    kept: bool,
}

impl Drop for Copies {
    fn drop(&mut self) {
        if !self.kept {
            self.made.iter().for_each(|(_, path)| drop(std::fs::remove_file(path)));
        }
    }
}

/// What a machine is at a moment, besides its RAM.
pub struct Taken {
    guest: String,
    config: Config,
    disks: Vec<Disk>,
    state: State,
    copies: Copies,
}

impl Taken {
    /// Takes it of a machine that stands still.
    ///
    /// # Errors
    /// A disk of it is gone, or is not there for others.
    pub fn new(guest: &str, mut config: Config, state: State) -> Result<Self> {
        for words in &mut config.disk {
            let options = Options::parse(words)?;
            if options.own.is_some() {
                let why = format!(
                    "--disk {words}: what the machine has written there ends with it, and no snapshot keeps it"
                );
                return Err(refuse(why).into());
            }
            // That of the file's name, by which the guest knows it also where it goes on with another.
            if options.serial.is_none() {
                *words = words.and(&format!("serial={}", serial(&options.path)?));
            }
        }
        let disks = Disk::all(&config)?;
        Ok(Self { guest: guest.into(), config, disks, state, copies: Copies::default() })
    }

    /// Copies the disks that the machine writes to, while it stands still, where `target` asks for that.
    ///
    /// # Errors
    /// The snapshot or a copy is there already, the host cannot read or write, or it is `cancelled`.
    pub fn copy_disks(&mut self, target: &Target, cancelled: &AtomicBool) -> Result<()> {
        let Some(into) = &target.disks else { return Ok(()) };
        target.check()?;
        for (number, words) in self.config.disk.iter().enumerate() {
            let options = Options::parse(words)?;
            if !options.read_only {
                let what = || format!("copying {}", options.path.display());
                let (from, path) = (open_own(&options.path).with_context(what)?, into.join(number.to_string()));
                let to = make(&path)?;
                let copied = copy(&from, &to, || !cancelled.load(Ordering::Relaxed));
                self.copies.made.push((to, path));
                copied.with_context(what)?;
            }
        }
        Ok(())
    }

    /// Writes it to a folder that is not there yet.
    ///
    /// # Errors
    /// The folder is there, or the host cannot write it, or it is `cancelled`; nothing is left behind then.
    pub fn write(self, ram: Moment, target: &Target, cancelled: &AtomicBool) -> Result<Written> {
        let Self { guest, config, disks, state, mut copies } = self;
        let written = complete(target, cancelled, |folder| {
            let before = ram.base().cloned();
            // First: a guest may wait for it.
            let memory = ram.pour(&folder.join(MEMORY), target, cancelled)?;
            for (copy, path) in &copies.made {
                check(cancelled)?;
                target.sync(copy, path)?;
            }
            if let Some(into) = &target.disks {
                target.sync(&File::open(into).with_context(|| into.display().to_string())?, into)?;
            }
            check(cancelled)?;
            let state = serde_json::to_vec(&state)?;
            let manifest = Manifest {
                format: FORMAT,
                bantam: env!("CARGO_PKG_VERSION").into(),
                architecture: arch::NAME.into(),
                guest,
                config,
                disks,
                state: Sum { bytes: state.len() as u64, xxh64: sum(&state) },
                base: before.as_ref().map(|before| before.moment),
                memory,
                own: Xxh64::default(),
            };
            describe(&manifest, &state, folder, target)?;
            let (moment, memory) = (manifest.moment(), manifest.memory);
            Ok(Written { memory: memory.kept(), base: Base::new(moment, memory, before.as_ref()) })
        });
        copies.kept = written.is_ok();
        written
    }
}

/// Makes a folder that is not there yet; `fill` puts a snapshot into it.
///
/// # Errors
/// The folder is there, or the host cannot write it, or it is `cancelled`; nothing is left behind then.
pub(super) fn complete<T>(target: &Target, cancelled: &AtomicBool, fill: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    target.check()?;
    let path = &target.path;
    let folder = partial(path);
    let _own = begin(&folder)?;
    let written = fill(&folder).and_then(|written| {
        check(cancelled)?;
        // Not over one that has come in the meantime.
        renameat_with(CWD, &folder, CWD, path, RenameFlags::NOREPLACE)
            .with_context(|| format!("giving {} its name", path.display()))?;
        let above = path.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
        target.sync(&File::open(above).with_context(|| above.display().to_string())?, above)?;
        Ok(written)
    });
    if written.is_err() {
        let _ = clear(&folder);
    }
    written
}

/// Writes what is in a snapshot besides its RAM.
pub(super) fn describe(manifest: &Manifest, state: &[u8], folder: &Path, target: &Target) -> Result<()> {
    put(&folder.join(STATE), state, target)?;
    let manifest = serde_json::to_vec(manifest)?;
    anyhow::ensure!(manifest.len() as u64 <= MOST, "the machine has more RAM than a snapshot can describe");
    put(&folder.join(MANIFEST), &manifest, target)?;
    put(&folder.join(MANIFEST_SUM), sum(&manifest).to_string().as_bytes(), target)?;
    target.sync(&File::open(folder).with_context(|| folder.display().to_string())?, folder)
}

/// Makes the folder of a snapshot that is not complete, in the place of one whose writer was killed. It is this writer's as
/// long as what it gives is open.
pub(super) fn begin(folder: &Path) -> Result<File> {
    let what = || format!("cannot make {}", folder.display());
    let make = || std::fs::DirBuilder::new().mode(0o700).create(folder);
    let held = |file: &File| flock(file, FlockOperation::NonBlockingLockExclusive);
    match make() {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            let old = File::options().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(folder);
            let old = old.with_context(what)?;
            if held(&old).is_err() {
                return Err(refuse(format!("{} is being written by another", folder.display())).into());
            }
            clear(folder)
                .with_context(|| format!("{} is there, and not all in it is a snapshot's", folder.display()))?;
            make().with_context(what)?;
        }
        made => made.with_context(what)?,
    }
    let own = File::open(folder).with_context(what)?;
    held(&own).with_context(what)?;
    Ok(own)
}

/// Removes a snapshot that is not complete, and nothing else.
fn clear(folder: &Path) -> std::io::Result<()> {
    for name in [MEMORY, STATE, MANIFEST, MANIFEST_SUM] {
        match std::fs::remove_file(folder.join(name)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    std::fs::remove_dir(folder)
}
