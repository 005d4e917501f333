//! What the guest needs of its machine: memory, a serial port, an end.

use core::alloc::{GlobalAlloc, Layout};
use core::arch::asm;
use core::panic::PanicInfo;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicUsize, Ordering};

use virtio_drivers::{BufferDirection, Hal, PhysAddr};

const PAGE: usize = 4096;
const HEAP: usize = 1 << 20;

/// Memory that is given out and never taken back: the guest is short.
#[repr(align(4096))]
struct Heap(core::cell::UnsafeCell<[u8; HEAP]>);

// SAFETY: each byte is given out once.
unsafe impl Sync for Heap {}

static MEMORY: Heap = Heap(core::cell::UnsafeCell::new([0; HEAP]));
static TAKEN: AtomicUsize = AtomicUsize::new(0);

fn take(size: usize, align: usize) -> *mut u8 {
    let at = TAKEN.load(Ordering::Relaxed).next_multiple_of(align);
    let end = at.saturating_add(size);
    if end > HEAP {
        return core::ptr::null_mut();
    }
    TAKEN.store(end, Ordering::Relaxed);
    MEMORY.0.get().cast::<u8>().wrapping_add(at)
}

struct Allocator;

// SAFETY: `take` gives out each byte once, aligned as asked (the heap itself is aligned to a page).
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size(), layout.align())
    }

    unsafe fn dealloc(&self, _at: *mut u8, _layout: Layout) {}
}

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

/// Memory for devices: physical addresses are the guest's own.
pub struct Pages;

// SAFETY: addresses are identity-mapped, and pages are given out once and zero.
unsafe impl Hal for Pages {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        match NonNull::new(take(pages * PAGE, PAGE)) {
            Some(at) => (at.as_ptr() as PhysAddr, at),
            None => exit(2),
        }
    }

    unsafe fn dma_dealloc(_at: PhysAddr, _memory: NonNull<u8>, _pages: usize) -> i32 {
        0
    }

    unsafe fn mmio_phys_to_virt(at: PhysAddr, _size: usize) -> NonNull<u8> {
        NonNull::new(at as *mut u8).unwrap_or_else(|| exit(3))
    }

    unsafe fn share(buffer: NonNull<[u8]>, _direction: BufferDirection) -> PhysAddr {
        buffer.as_ptr().cast::<u8>() as PhysAddr
    }

    unsafe fn unshare(_at: PhysAddr, _buffer: NonNull<[u8]>, _direction: BufferDirection) {}
}

/// The serial port.
pub struct Serial;

impl core::fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        // SAFETY: port 0x3f8 takes bytes; the text is read only.
        unsafe {
            asm!("rep outsb", in("dx") 0x3f8u16, inout("rsi") text.as_ptr() => _, inout("rcx") text.len() => _);
        }
        Ok(())
    }
}

/// Ends the machine: its status is twice the code, plus one.
pub fn exit(code: u8) -> ! {
    // SAFETY: port 0xf4 ends the machine.
    unsafe { asm!("2: out dx, al", "hlt", "jmp 2b", in("dx") 0xf4u16, in("al") code, options(noreturn)) }
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    use core::fmt::Write as _;
    let _ = match info.location() {
        Some(at) => writeln!(Serial, "panic at {}:{}", at.file(), at.line()),
        None => writeln!(Serial, "panic"),
    };
    exit(4)
}

/// What the compiler calls to move memory: a target without an operating system has no C library. One instruction each,
/// since Bantam's CI runs on a host that emulates them one by one.
mod moves {
    use core::arch::asm;

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, size: usize) -> *mut u8 {
        // SAFETY: the caller's: both are `size` bytes long.
        unsafe { asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") size => _) };
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, size: usize) -> *mut u8 {
        if (to as usize).wrapping_sub(from as usize) >= size {
            // SAFETY: copying forwards reads each byte before it is written.
            return unsafe { memcpy(to, from, size) };
        }
        // SAFETY: the caller's; backwards, from the last byte on, and forwards again afterwards.
        unsafe {
            asm!("std", "rep movsb", "cld", inout("rdi") to.wrapping_add(size).wrapping_sub(1) => _,
                inout("rsi") from.wrapping_add(size).wrapping_sub(1) => _, inout("rcx") size => _);
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memset(to: *mut u8, value: i32, size: usize) -> *mut u8 {
        // SAFETY: the caller's: it is `size` bytes long.
        unsafe { asm!("rep stosb", inout("rdi") to => _, inout("rcx") size => _, in("al") value as u8) };
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcmp(one: *const u8, two: *const u8, size: usize) -> i32 {
        for at in 0..size {
            // SAFETY: the caller's: both are `size` bytes long.
            let (a, b) = unsafe { (one.add(at).read_volatile(), two.add(at).read_volatile()) };
            if a != b {
                return i32::from(a) - i32::from(b);
            }
        }
        0
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn bcmp(one: *const u8, two: *const u8, size: usize) -> i32 {
        // SAFETY: as memcmp.
        unsafe { memcmp(one, two, size) }
    }
}
