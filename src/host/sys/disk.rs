//! Input and output between a file and memory that others use at the same time, as a guest's RAM; and file locks.
//!
//! Invariant: what a [`Buffers`] describes stays mapped as long as it lives, since it holds what keeps it so; no Rust
//! reference to that memory is ever made.

use std::any::Any;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;

/// The most pieces in one system call (IOV_MAX).
pub const MOST_PIECES: usize = 1024;
/// What zeroes are written from. Nobody changes it; that somebody could keeps it out of the program's file.
static ZEROES: [AtomicU8; 64 << 10] = [const { AtomicU8::new(0) }; 64 << 10];
/// The most zeroes that [`Buffers::zeroes`] can stand for.
pub const MOST_ZEROES: u64 = (MOST_PIECES * ZEROES.len()) as u64;

/// Memory in pieces, for the kernel to read from or to write to.
#[derive(Default)]
pub struct Buffers {
    pieces: Vec<libc::iovec>,
    keep: Option<Arc<dyn Any + Send + Sync>>,
}

// SAFETY: addresses of memory that any thread may use, as `push` was promised, and that `keep`, which is Send, keeps there.
unsafe impl Send for Buffers {}

impl Buffers {
    /// Describes nothing.
    pub fn clear(&mut self) {
        self.pieces.clear();
        self.keep = None;
    }

    /// What keeps the pieces where they are. Whatever was described before is described no longer.
    pub fn keep(&mut self, keep: Arc<dyn Any + Send + Sync>) {
        self.clear();
        self.keep = Some(keep);
    }

    /// One more piece.
    ///
    /// # Safety
    /// The piece is memory that may be read and written at any time, by any thread and by the kernel, as long as what
    /// [`Buffers::keep`] was given is not dropped; no reference to it is made meanwhile.
    pub unsafe fn push(&mut self, start: *mut u8, size: usize) {
        self.pieces.push(libc::iovec { iov_base: start.cast(), iov_len: size });
    }

    /// So many zeroes, to be read only; at most [`MOST_ZEROES`].
    pub fn zeroes(&mut self, mut size: u64) {
        self.clear();
        while size > 0 && self.pieces.len() < MOST_PIECES {
            let piece = size.min(ZEROES.len() as u64);
            let start = (&raw const ZEROES).cast_mut().cast();
            self.pieces.push(libc::iovec { iov_base: start, iov_len: piece as usize });
            size -= piece;
        }
    }

    /// How many pieces.
    pub fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// Bytes in all.
    pub fn size(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.iov_len as u64).sum()
    }

    /// Passes over the first bytes.
    pub fn advance(&mut self, mut size: u64) {
        let whole = self.pieces.iter().take_while(|piece| {
            let fits = piece.iov_len as u64 <= size;
            size -= if fits { piece.iov_len as u64 } else { 0 };
            fits
        });
        let whole = whole.count();
        self.pieces.drain(..whole);
        if let Some(piece) = self.pieces.first_mut() {
            piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(size as usize).cast();
            piece.iov_len -= size as usize;
        }
    }

    /// The first bytes, as many as there are.
    pub fn copy_out(&self, into: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in &self.pieces {
            let Some(into) = into.get_mut(done..) else { break };
            let size = piece.iov_len.min(into.len());
            // SAFETY: the piece is readable and as long as that, and `into`, which is ours, is too.
            unsafe { ptr::copy_nonoverlapping(piece.iov_base.cast::<u8>().cast_const(), into.as_mut_ptr(), size) };
            done += size;
        }
        done
    }

    /// Puts bytes at the start, as many as there is room for. Not for zeroes.
    pub fn copy_in(&self, mut from: &[u8]) -> usize {
        let all = from.len();
        if self.keep.is_none() {
            return 0;
        }
        for piece in &self.pieces {
            let size = piece.iov_len.min(from.len());
            let Some((now, later)) = from.split_at_checked(size) else { break };
            // SAFETY: the piece is writable (it has a keeper, so it is not the zeroes) and as long as that.
            unsafe { ptr::copy_nonoverlapping(now.as_ptr(), piece.iov_base.cast::<u8>(), size) };
            from = later;
        }
        all - from.len()
    }

    /// Copies to `other` as much as there is in both; gives how much that was. Not to zeroes. Where the two are the same
    /// memory the bytes are what they are in a guest that lends one place twice: anything.
    pub fn copy_to(&self, other: &Self) -> u64 {
        if other.keep.is_none() {
            return 0;
        }
        let (mut from, mut into) = (self.pieces.iter().copied(), other.pieces.iter().copied());
        let (mut source, mut target) = (from.next(), into.next());
        let mut done = 0;
        while let (Some(one), Some(two)) = (&mut source, &mut target) {
            let size = one.iov_len.min(two.iov_len);
            // SAFETY: the first is readable and the second writable (it has a keeper, so it is not the zeroes), both as
            // long as that; they may overlap.
            unsafe { ptr::copy(one.iov_base.cast::<u8>().cast_const(), two.iov_base.cast::<u8>(), size) };
            done += size as u64;
            let pass = |piece: &mut libc::iovec| {
                piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(size).cast();
                piece.iov_len -= size;
                piece.iov_len == 0
            };
            let ends = (pass(one), pass(two));
            source = if ends.0 { from.next() } else { source };
            target = if ends.1 { into.next() } else { target };
        }
        done
    }

    /// Reads what a socket has into the first [`MOST_PIECES`] - 1 pieces, and one byte more, by which one sees that there was
    /// more. Descriptors that come with it are closed.
    ///
    /// # Errors
    /// The host's.
    pub fn read_from(&mut self, socket: impl AsFd) -> io::Result<Came> {
        let mut byte = 0;
        self.pieces.truncate(MOST_PIECES - 1);
        if !self.is_writable() {
            return Err(io::Error::from_raw_os_error(libc::EFAULT));
        }
        let room = self.size() as usize;
        self.pieces.push(libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 });
        // SAFETY: all zeroes is a valid message: no address, no pieces, nothing beside them.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        (message.msg_iov, message.msg_iovlen) = (self.pieces.as_mut_ptr(), self.pieces.len() as _);
        // SAFETY: each piece may be written to, as `push` was promised; the last is `byte`, which is ours.
        let result = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut message, 0) };
        self.pieces.pop();
        let all = usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
        let cut = message.msg_flags & libc::MSG_CTRUNC != 0;
        Ok(Came { count: all.min(room), more: (all > room).then_some(byte), cut })
    }

    /// Writes what is in the first [`MOST_PIECES`] pieces to `fd`; gives how many bytes it took.
    ///
    /// # Errors
    /// The host's.
    pub fn write_to(&self, fd: impl AsFd) -> io::Result<usize> {
        let (pieces, count) = self.raw();
        // SAFETY: each piece may be read, as `push` was promised, while it is borrowed.
        let result = unsafe { libc::writev(fd.as_fd().as_raw_fd(), pieces, count as i32) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// All pieces begin and end at multiples of `align`, a power of two: what a file without a cache wants.
    pub fn is_aligned(&self, align: usize) -> bool {
        let odd = |piece: &libc::iovec| (piece.iov_base.addr() | piece.iov_len) & align.saturating_sub(1) != 0;
        !self.pieces.iter().any(odd)
    }

    /// As the kernel wants them: valid as long as nothing is changed here.
    pub(super) fn raw(&self) -> (*const libc::iovec, u32) {
        (self.pieces.as_ptr(), self.pieces.len().min(MOST_PIECES) as u32)
    }

    /// The one piece that there is, where there is one.
    pub(super) fn single(&self) -> Option<(*mut u8, u32)> {
        let [piece] = self.pieces.as_slice() else { return None };
        Some((piece.iov_base.cast(), u32::try_from(piece.iov_len).ok()?))
    }

    /// May be written to: the zeroes may not.
    pub(super) fn is_writable(&self) -> bool {
        self.keep.is_some()
    }
}

/// What [`Buffers::read_from`] has read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Came {
    /// Bytes in the pieces.
    pub count: usize,
    /// The byte behind them.
    pub more: Option<u8>,
    /// The kernel stopped behind a message with descriptors: there may be more all the same.
    pub cut: bool,
}

/// What is to be done with a part of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Read it into memory.
    Read,
    /// Write it from memory; `stable`: and it is on the disk when that is done.
    Write {
        /// Whether it is to be.
        stable: bool,
    },
    /// What was written is on the disk when that is done.
    Sync,
    /// Give up what is there.
    Discard,
    /// Make it zeroes; `unmap`: that take no room, where that is possible.
    Zero {
        /// Whether it is.
        unmap: bool,
    },
}

/// A piece of work.
pub struct Job {
    /// What.
    pub work: Work,
    /// Where in the file.
    pub offset: u64,
    /// Bytes, where no memory says how many.
    pub size: u64,
    /// The memory.
    pub buffers: Buffers,
}

impl Work {
    /// The mode for fallocate(2), of those that are its business.
    pub(super) fn mode(self) -> Option<i32> {
        match self {
            Self::Discard | Self::Zero { unmap: true } => Some(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE),
            Self::Zero { unmap: false } => Some(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE),
            _ => None,
        }
    }
}

/// A position in a file, as the kernel counts.
pub(super) fn position(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Does it, and waits; how many bytes were transferred, fewer than asked for where the host felt like it.
///
/// # Errors
/// The host's.
pub fn perform(file: &File, job: &Job) -> io::Result<u32> {
    let (fd, offset): (RawFd, _) = (file.as_raw_fd(), position(job.offset)?);
    let (pieces, count) = job.buffers.raw();
    let count = count as i32;
    let result = match job.work {
        Work::Read if !job.buffers.is_writable() => 0,
        // SAFETY: each piece may be written to, as `push` was promised, while `job.buffers` is borrowed.
        Work::Read => unsafe { libc::preadv(fd, pieces, count, offset) },
        Work::Write { stable } => {
            let flags = if stable { libc::RWF_DSYNC } else { 0 };
            // SAFETY: each piece may be read, as `push` was promised, while `job.buffers` is borrowed.
            unsafe { libc::pwritev2(fd, pieces, count, offset, flags) }
        }
        // SAFETY: a call without memory.
        Work::Sync => unsafe { libc::fdatasync(fd) as isize },
        Work::Discard | Work::Zero { .. } => {
            let mode = job.work.mode().unwrap_or_default();
            // SAFETY: a call without memory.
            unsafe { libc::fallocate(fd, mode, offset, position(job.size)?) as isize }
        }
    };
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Locks all of a file for this opening of it alone (`exclusive`), or for all who do not write. Locks of this kind (OFD)
/// end when the last descriptor of this opening is closed.
///
/// # Errors
/// WouldBlock: somebody else has locked it. Others are the host's, as where its file system knows no locks.
pub fn lock(file: &File, exclusive: bool) -> io::Result<()> {
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    // Zeroes: from the start to whatever end. OFD locks want a process id of 0.
    let whole = libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
    // SAFETY: the structure is valid for the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const whole) } {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::EACCES) => Err(io::ErrorKind::WouldBlock.into()),
            e => Err(e),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::UnsafeCell;
    use std::os::unix::fs::FileExt;

    /// Memory for tests: nobody makes a reference to it.
    struct Room(UnsafeCell<[u8; 64]>);
    // SAFETY: only addresses of it are given out.
    unsafe impl Sync for Room {}

    fn buffers(pieces: &[(usize, usize)]) -> Buffers {
        let room = Arc::new(Room(UnsafeCell::new([0; 64])));
        let start = room.0.get().cast::<u8>();
        let mut buffers = Buffers::default();
        buffers.keep(room);
        for (at, size) in pieces {
            assert!(at + size <= 64);
            // SAFETY: within the room, which the buffers keep.
            unsafe { buffers.push(start.wrapping_add(*at), *size) };
        }
        buffers
    }

    #[test]
    fn bytes_go_through_all_pieces_and_only_what_is_left_of_them() {
        let mut buffers = buffers(&[(0, 3), (10, 0), (20, 5)]);
        assert_eq!((buffers.size(), buffers.copy_in(b"abcdefghij")), (8, 8));
        let mut out = [0; 16];
        assert_eq!((buffers.copy_out(&mut out), &out[..8]), (8, &b"abcdefgh"[..]));
        buffers.advance(4);
        assert_eq!((buffers.copy_out(&mut out), &out[..4]), (4, &b"efgh"[..]));
        buffers.advance(4);
        assert_eq!((buffers.size(), buffers.pieces()), (0, 0));
    }

    #[test]
    fn bytes_go_from_pieces_to_pieces() {
        let from = buffers(&[(1, 3), (10, 0), (20, 6)]);
        from.copy_in(b"abcdefghi");
        for (pieces, wanted) in [(&[(0, 1), (9, 2), (30, 34)][..], 9), (&[(5, 4)], 4), (&[], 0)] {
            let into = buffers(pieces);
            assert_eq!(from.copy_to(&into), wanted);
            let mut out = [0; 9];
            into.copy_out(&mut out);
            assert_eq!(out[..wanted as usize], b"abcdefghi"[..wanted as usize]);
        }
        let mut zeroes = Buffers::default();
        zeroes.zeroes(70_000);
        assert_eq!((from.copy_to(&zeroes), zeroes.copy_to(&from)), (0, 9));
        let mut out = [1; 9];
        from.copy_out(&mut out);
        assert_eq!(out, [0; 9]);
    }

    #[test]
    fn work_is_done_on_a_file() {
        let file = tempfile::tempfile().unwrap();
        let mut job =
            Job { work: Work::Write { stable: true }, offset: 2, size: 0, buffers: buffers(&[(0, 4), (8, 4)]) };
        job.buffers.copy_in(b"12345678");
        assert_eq!(perform(&file, &job).unwrap(), 8);
        job.buffers.copy_in(b"--------");
        (job.work, job.offset) = (Work::Read, 4);
        assert_eq!(perform(&file, &job).unwrap(), 6);
        let mut out = [0; 8];
        job.buffers.copy_out(&mut out);
        assert_eq!(&out, b"345678--");
        (job.work, job.offset, job.size) = (Work::Zero { unmap: true }, 0, 4);
        assert_eq!(perform(&file, &job).unwrap(), 0);
        let mut all = [9; 10];
        file.read_exact_at(&mut all, 0).unwrap();
        assert_eq!(&all, b"\0\0\0\x00345678");
        (job.work, job.offset) = (Work::Write { stable: false }, 0);
        job.buffers.zeroes(200_000);
        assert_eq!((job.buffers.size(), perform(&file, &job).unwrap()), (200_000, 200_000));
        assert_eq!(job.buffers.copy_in(b"never"), 0);
        job.offset = u64::MAX;
        assert!(perform(&file, &job).is_err());
    }

    #[test]
    fn a_lock_is_held_by_one_opening_of_a_file() {
        let place = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(place.path()).unwrap();
        let (first, second) = (open(), open());
        lock(&first, true).unwrap();
        assert_eq!(lock(&second, false).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let copy = first.try_clone().unwrap();
        drop(first);
        assert_eq!(lock(&second, true).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        lock(&copy, false).unwrap();
        lock(&second, false).unwrap();
        assert_eq!(lock(&second, true).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(copy);
        lock(&second, true).unwrap();
    }
}
