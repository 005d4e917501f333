//! qcow2 images, by way of the `imago` crate, for the threads of a disk.
//!
//! Invariant: no file is opened because an image names it: an image on another one is refused unless that one is named by
//! the user, and one that keeps its data elsewhere is refused always.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use anyhow::Result;
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder};

use super::engine::Image;
use super::open::{Format, Options, open};
use super::qcow2::check;
use super::request::{Medium, SECTOR};
use crate::error::{Refusal, refuse};
use crate::host::sys::disk::{Job, Work};

/// Bytes that are copied at once: what a request is cut into.
const PIECE: usize = 256 << 10;

type Access = FormatAccess<imago::file::File>;

/// An image. Data is copied once, since others use guest RAM while it is read or written.
pub struct Packed {
    image: Access,
    /// Room for what is copied, so that none is asked for with each request.
    rooms: Mutex<Vec<Vec<u8>>>,
}

impl Packed {
    /// What is written to a new image that ends with this process; `file`, which is open and locked, is only read.
    ///
    /// # Errors
    /// It is not what it is said to be, or there is no room for another.
    pub fn overlay(options: &Options, file: File, capacity: &mut u64) -> Result<Self> {
        let below = if options.format == Some(Format::Qcow2) { packed(file)? } else { raw(file)? };
        *capacity = below.size();
        let own = tempfile::tempfile()?;
        let new = Qcow2::<imago::file::File>::create_builder(imago::file::File::try_from(own.try_clone()?)?);
        new.size(*capacity).create()?;
        let mut image = layer(own, true)?;
        image.set_backing(Some(below));
        Ok(Self { image: FormatAccess::new(image), rooms: Mutex::default() })
    }

    /// The image in a file that is open and locked; its size goes into `medium`.
    ///
    /// # Errors
    /// It is none, it is broken, or it needs a file that it may not have.
    pub fn new(options: &Options, file: File, medium: &mut Medium) -> Result<Self> {
        let say = |path: &Path, e: &dyn std::fmt::Display| refuse(format!("--disk {}: {e}", path.display()));
        let backing = match &options.backing {
            None => None,
            // Two that say ro can share it, and nobody can write to it meanwhile.
            Some(path) => Some(backing(path).map_err(|e| say(path, &format_args!("{e:#}")))?),
        };
        check(&file).map_err(|why| say(&options.path, &why))?;
        let mut image = layer(file, !options.read_only).map_err(|e| say(&options.path, &e))?;
        if let (Some(name), None) = (image.implicit_backing_file(), &backing) {
            let refusal =
                say(&options.path, &format_args!("it stands on another image, {name:?}, which it may not open"));
            return Err(refusal.hint("if it may: --disk FILE,format=qcow2,backing=PATH").into());
        }
        image.set_backing(backing);
        let image = FormatAccess::new(image);
        medium.capacity = image.size();
        if medium.capacity == 0 || !medium.capacity.is_multiple_of(SECTOR) {
            let size = medium.capacity;
            return Err(say(&options.path, &format_args!("a disk of {size} bytes is not one of whole sectors")).into());
        }
        Ok(Self { image, rooms: Mutex::default() })
    }

    fn rooms(&self) -> std::sync::MutexGuard<'_, Vec<Vec<u8>>> {
        self.rooms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One piece of a transfer; the device asks for what is left.
    fn transfer(&self, job: &Job, room: &mut [u8]) -> io::Result<u32> {
        let size = usize::try_from(job.buffers.size()).unwrap_or(usize::MAX).min(room.len());
        let room = room.get_mut(..size).unwrap_or_default();
        if job.work == Work::Read {
            self.image.read(&mut *room, job.offset)?;
            job.buffers.copy_in(room);
        } else {
            job.buffers.copy_out(room);
            self.image.write(&*room, job.offset)?;
        }
        Ok(size as u32)
    }

    /// What is in imago's own caches goes into the file, and the file to the disk.
    fn sync(&self) -> io::Result<u32> {
        self.image.flush()?;
        self.image.sync()?;
        Ok(0)
    }
}

/// The file that an image stands on, which is only read: qcow2 if it says so, and then on nothing; else raw.
fn backing(path: &Path) -> Result<Access> {
    use std::os::unix::fs::FileExt;
    let file = open(path, true)?;
    let mut magic = [0; 4];
    // Who names a file here has read it as what it is; nobody writes to it.
    if file.read_exact_at(&mut magic, 0).is_ok() && magic == *b"QFI\xfb" {
        return packed(file);
    }
    raw(file)
}

/// A qcow2 image that is only read, and stands on nothing.
fn packed(file: File) -> Result<Access> {
    check(&file).map_err(refuse)?;
    let image = layer(file, false)?;
    if let Some(name) = image.implicit_backing_file() {
        return Err(refusal_of(name).into());
    }
    Ok(FormatAccess::new(image))
}

fn raw(file: File) -> Result<Access> {
    let storage = imago::file::File::try_from(file)?;
    Ok(FormatAccess::new(imago::raw::Raw::builder(storage).open(DenyImplicitOpenGate::default())?))
}

fn refusal_of(name: &str) -> Refusal {
    refuse(format!("it stands on a third image, {name:?}; two are all"))
}

fn layer(file: File, write: bool) -> io::Result<Qcow2<imago::file::File>> {
    let storage = imago::file::File::try_from(file)?;
    let builder = Qcow2::<imago::file::File>::builder(storage).write(write);
    builder.backing(None).data_file(None).open(DenyImplicitOpenGate::default())
}

impl Image for Packed {
    fn perform(&self, job: &mut Job) -> io::Result<u32> {
        match job.work {
            Work::Read | Work::Write { .. } => {
                let mut room = self.rooms().pop().unwrap_or_else(|| vec![0; PIECE]);
                let done = self.transfer(job, &mut room);
                self.rooms().push(room);
                if job.work == (Work::Write { stable: true }) {
                    self.sync()?;
                }
                done
            }
            Work::Sync => self.sync(),
            // Only a hint, and one that would need the image for itself alone.
            Work::Discard => Ok(0),
            Work::Zero { .. } => self.image.write_zeroes(job.offset, job.size).map(|()| 0),
        }
    }

    /// imago keeps its tables to itself until then.
    fn settle(&self) -> io::Result<()> {
        self.image.flush()
    }
}
