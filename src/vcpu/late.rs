//! Writes that KVM keeps for later: those to registers that do nothing by themselves, such as an index (KVM api.rst,
//! KVM_REGISTER_COALESCED_MMIO). They make no exit; each CPU carries them out at its next one, before it answers that.
//!
//! All CPUs share one ring. Invariant: a write leaves the ring only after the device has it, so that who finds the ring
//! empty finds the devices as they would be without it. Lock order: the ring's, then a device's.

use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
use kvm_ioctls::VcpuFd;

use crate::bus::{Buses, Space};
use crate::memory::page_size;

/// The ring of a machine.
pub struct Late {
    page: usize,
    size: usize,
    /// Held by who empties it.
    emptying: Mutex<()>,
}

impl Late {
    /// The ring of the machine that this CPU is of.
    pub(crate) fn new(fd: &VcpuFd) -> io::Result<Self> {
        let size = usize::try_from(page_size()).map_err(io::Error::other)?;
        let offset = i64::from(KVM_COALESCED_MMIO_PAGE_OFFSET) * page_size().cast_signed();
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: without MAP_FIXED the kernel takes free addresses only.
        let page = unsafe { libc::mmap(ptr::null_mut(), size, prot, libc::MAP_SHARED, fd.as_raw_fd(), offset) };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { page: page.expose_provenance(), size, emptying: Mutex::new(()) })
    }

    fn index(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: the ring's header lies at the start of the page, which lives as long as `self`; KVM and other CPUs write
        // to it as to an atomic.
        unsafe { AtomicU32::from_ptr(ptr::with_exposed_provenance_mut(self.page + offset)) }
    }

    /// The next to leave.
    fn first(&self) -> &AtomicU32 {
        self.index(offset_of!(kvm_coalesced_mmio_ring, first))
    }

    /// How many have room.
    fn room(&self) -> u32 {
        let room = (self.size - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>();
        u32::try_from(room).unwrap_or(0)
    }

    /// What waits at `first`; none where nothing does, or where the indices are none.
    fn at(&self, first: u32) -> Option<kvm_coalesced_mmio> {
        let last = self.index(offset_of!(kvm_coalesced_mmio_ring, last)).load(Ordering::Acquire);
        if first == last || first >= self.room() || last >= self.room() {
            return None;
        }
        let at = size_of::<kvm_coalesced_mmio_ring>() + first as usize * size_of::<kvm_coalesced_mmio>();
        // SAFETY: `first` was checked, so the entry lies in the page; KVM does not write to one that has not left.
        Some(unsafe { ptr::read_volatile(ptr::with_exposed_provenance(self.page + at)) })
    }

    /// Carries out what waits.
    pub fn carry_out(&self, buses: &Buses) {
        if self.at(self.first().load(Ordering::Acquire)).is_none() {
            return;
        }
        let _alone = self.emptying.lock().unwrap_or_else(PoisonError::into_inner);
        let mut first = self.first().load(Ordering::Acquire);
        // What this CPU has written before its exit is in the ring already; what others add meanwhile may wait.
        for _ in 0..self.room() {
            let Some(write) = self.at(first) else { break };
            let width = usize::try_from(write.len).map_or(8, |len| len.clamp(1, 8));
            // SAFETY: both members of the union are a number.
            let space = if unsafe { write.__bindgen_anon_1.pio } != 0 { Space::Pio } else { Space::Mmio };
            // Such a register has no effect on the machine.
            let _ = buses.write(space, write.phys_addr, width, write.data.get(..width).unwrap_or_default());
            first = (first + 1) % self.room();
            self.first().store(first, Ordering::Release);
        }
    }
}

impl Drop for Late {
    fn drop(&mut self) {
        // SAFETY: nothing else unmaps it, and nobody uses it any more.
        unsafe { libc::munmap(ptr::with_exposed_provenance_mut(self.page), self.size) };
    }
}

#[cfg(test)]
mod tests {
    use std::mem::ManuallyDrop;

    use kvm_bindings::kvm_coalesced_mmio__bindgen_ty_1;

    use super::*;
    use crate::bus::{Builder, Device, Effect, Saved};
    use crate::memory::Span;

    /// Remembers what is written.
    struct Register(std::sync::Arc<Mutex<Vec<(u64, u64)>>>);

    impl Device for Register {
        fn name(&self) -> &'static str {
            "register"
        }
        fn register(&self, _offset: u64, _write: bool) -> &'static str {
            "R"
        }
        fn read(&mut self, _offset: u64, _width: usize) -> u64 {
            0
        }
        fn write(&mut self, offset: u64, _width: usize, value: u64) -> Effect {
            self.0.lock().unwrap().push((offset, value));
            Effect::None
        }
        fn reset(&mut self) {}
        fn save(&self) -> Saved {
            crate::device::wrap(1, &())
        }
        fn load(&mut self, _saved: &Saved) -> anyhow::Result<()> {
            Ok(())
        }
    }

    /// A ring in memory of the test's, and what KVM does with it.
    struct Ring(ManuallyDrop<Late>);

    impl Ring {
        fn new() -> Self {
            let page = Box::leak(vec![0u64; 512].into_boxed_slice()).as_mut_ptr().expose_provenance();
            Self(ManuallyDrop::new(Late { page, size: 4096, emptying: Mutex::new(()) }))
        }

        fn last(&self) -> &AtomicU32 {
            self.0.index(offset_of!(kvm_coalesced_mmio_ring, last))
        }

        fn push(&self, phys_addr: u64, value: u8) {
            let last = self.last().load(Ordering::Relaxed);
            let entry = kvm_coalesced_mmio {
                phys_addr,
                len: 1,
                __bindgen_anon_1: kvm_coalesced_mmio__bindgen_ty_1 { pio: 1 },
                data: [value, 0, 0, 0, 0, 0, 0, 0],
            };
            let at = size_of::<kvm_coalesced_mmio_ring>() + last as usize * size_of::<kvm_coalesced_mmio>();
            // SAFETY: the entry lies in the page that `new` made.
            unsafe { ptr::write_volatile(ptr::with_exposed_provenance_mut(self.0.page + at), entry) };
            self.last().store((last + 1) % self.0.room(), Ordering::Release);
        }
    }

    #[test]
    fn late_writes_come_in_their_order_and_all_round_the_ring() {
        let seen = std::sync::Arc::<Mutex<Vec<_>>>::default();
        let mut devices = Builder::default();
        devices.place(Space::Pio, Span { start: 0x70, size: 2 }, Register(seen.clone())).unwrap();
        let (ring, buses) = (Ring::new(), devices.finish());
        assert_eq!(ring.0.room(), 170);
        for round in 0..100u8 {
            (0..3).for_each(|n| ring.push(0x70 + u64::from(n & 1), round.wrapping_mul(3).wrapping_add(n)));
            ring.0.carry_out(&buses);
            ring.0.carry_out(&buses);
        }
        let all = seen.lock().unwrap().clone();
        let expected = (0..100u64).flat_map(|round| (0..3).map(move |n| (n & 1, (round * 3 + n) & 0xff)));
        assert!(all.into_iter().eq(expected));
    }

    #[test]
    fn indices_that_are_none_move_nothing() {
        let buses = Builder::default().finish();
        let ring = Ring::new();
        for (first, last) in [(0, 170), (0, u32::MAX), (170, 0), (u32::MAX, 3), (512, 512)] {
            ring.0.first().store(first, Ordering::Relaxed);
            ring.last().store(last, Ordering::Relaxed);
            ring.0.carry_out(&buses);
            assert_eq!((ring.0.first().load(Ordering::Relaxed), buses.misses().0), (first, 0));
        }
    }
}
