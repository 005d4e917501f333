//! Memory of ours that the kernel reads and writes while nobody waits, aligned as disks without a cache want it.
//!
//! Invariant: no reference to it is ever made, and it stays as long as anything that describes it.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::Arc;

use super::disk::Buffers;

/// What it is aligned to: no disk wants more.
pub const ALIGN: usize = 4096;

/// So many bytes.
pub struct Room {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: an address and a size; who uses the bytes copies them in and out, as the kernel does.
unsafe impl Send for Room {}
// SAFETY: as above.
unsafe impl Sync for Room {}

impl Room {
    /// Room for `size` bytes, rounded up to [`ALIGN`].
    pub fn new(size: usize) -> Arc<Self> {
        let size = size.clamp(1, usize::MAX / 4).next_multiple_of(ALIGN);
        // Neither a power of two nor a size like these makes a layout that is none.
        let Ok(layout) = Layout::from_size_align(size, ALIGN) else { handle_alloc_error(Layout::new::<u8>()) };
        // SAFETY: the size is not 0.
        let Some(start) = NonNull::new(unsafe { alloc_zeroed(layout) }) else { handle_alloc_error(layout) };
        Arc::new(Self { start, layout })
    }

    /// Bytes.
    pub fn size(&self) -> usize {
        self.layout.size()
    }

    /// Describes the first `size` bytes, or as many as there are.
    pub fn lend(self: &Arc<Self>, size: usize, into: &mut Buffers) {
        into.keep(self.clone());
        // SAFETY: `into` keeps the room, to which no reference is made; it is all bytes, of which anyone may be read or
        // written.
        unsafe { into.push(self.start.as_ptr(), size.min(self.size())) };
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // SAFETY: it was allocated with this layout, and who described it is gone.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_room_is_aligned_and_lives_as_long_as_who_describes_it() {
        let room = Room::new(5000);
        let mut buffers = Buffers::default();
        room.lend(4096, &mut buffers);
        assert_eq!((room.size(), buffers.size()), (8192, 4096));
        assert!(buffers.is_aligned(ALIGN));
        drop(room);
        assert_eq!(buffers.copy_in(b"still there"), 11);
        let mut back = [0; 11];
        assert_eq!((buffers.copy_out(&mut back), &back), (11, b"still there"));
        buffers.advance(1);
        assert!(!buffers.is_aligned(512));
    }
}
