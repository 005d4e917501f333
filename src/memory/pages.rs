//! Which parts of guest RAM hold anything: of a file those that are no holes, of a private mapping those that are its own.
//!
//! Invariant: nothing is made by looking: no page is read, and none mapped.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// How many pages are asked for at once.
const AT_ONCE: usize = 8192;
/// Of a page in /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst): it is the file's, it is on a swap device, it is
/// there.
const OF_FILE: u64 = 1 << 61;
const SWAPPED: u64 = 1 << 62;
const PRESENT: u64 = 1 << 63;

/// Those of the `size` bytes at `start` of a file that are no holes: where each begins, from `start` on, and its size.
pub fn data(file: &File, start: u64, size: u64) -> Vec<(u64, u64)> {
    let (mut parts, mut at) = (Vec::new(), start);
    let end = start.saturating_add(size);
    loop {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) if data < end => data,
            // Who does not know of holes has none.
            Err(e) if e != Errno::NXIO => {
                parts.push((at - start, end - at));
                break;
            }
            _ => break,
        };
        at = seek(file, SeekFrom::Hole(data)).unwrap_or(end).min(end);
        if at <= data {
            break;
        }
        parts.push((data - start, at - data));
    }
    parts
}

/// Those of the `size` bytes that are privately mapped at `host` that were written to, whole pages: the same. In this process,
/// or in that of `map`.
///
/// # Errors
/// The host does not say.
pub fn own(map: Option<&File>, host: usize, size: u64) -> io::Result<Vec<(u64, u64)>> {
    let is = |page| page & (PRESENT | SWAPPED) != 0 && page & OF_FILE == 0;
    map.map_or_else(|| which(&of_this()?, host, size, is), |map| which(map, host, size, is))
}

/// Those of the `size` bytes that are mapped at `host` that this process has touched, or the host with what lay beside.
///
/// # Errors
/// The host does not say.
pub fn touched(host: usize, size: u64) -> io::Result<Vec<(u64, u64)>> {
    which(&of_this()?, host, size, |page| page & (PRESENT | SWAPPED) != 0)
}

fn of_this() -> io::Result<File> {
    File::open("/proc/self/pagemap")
}

fn which(map: &File, host: usize, size: u64, is: impl Fn(u64) -> bool) -> io::Result<Vec<(u64, u64)>> {
    let page = super::page_size();
    let mut parts: Vec<(u64, u64)> = Vec::new();
    let mut bytes = vec![0; 8 * AT_ONCE];
    let mut at = 0;
    while at < size {
        let left = usize::try_from((size - at).div_ceil(page)).map_err(io::Error::other)?;
        let (words, _) = bytes.get_mut(..8 * left.min(AT_ONCE)).unwrap_or_default().as_chunks_mut::<8>();
        map.read_exact_at(words.as_flattened_mut(), (host as u64 + at) / page * 8)?;
        for word in words {
            if is(u64::from_ne_bytes(*word)) {
                match parts.last_mut() {
                    Some((start, long)) if *start + *long == at => *long += page,
                    _ => parts.push((at, page)),
                }
            }
            at += page;
        }
    }
    Ok(parts)
}
