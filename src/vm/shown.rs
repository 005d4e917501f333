//! Guest addresses that are read without an exit and written with one (KVM api.rst 4.35, KVM_MEM_READONLY).
//!
//! Invariant: the slot is gone before the pages behind it are.

#![allow(unsafe_code)]

use std::io;
use std::sync::Arc;

use anyhow::{Context, Result};
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use super::Vm;
use crate::explain::call;
use crate::memory::Span;
use crate::memory::shown::Shown as Pages;

/// The number of the slot, far behind those of RAM.
const SLOT: u32 = 64;

/// What a guest reads there.
pub struct Shown {
    vm: Arc<VmFd>,
    start: u64,
    pages: Pages,
}

impl Vm {
    /// Shows the guest at `at` ones, and at these offsets pages that something can be put on. One place a machine.
    ///
    /// # Errors
    /// The host, or its KVM, does not do that.
    pub fn show(&self, at: Span, pages: &[u64]) -> Result<Shown> {
        let pages = Pages::new(at.size, pages).context("pages for PCI's configuration space")?;
        let shown = Shown { vm: self.fd.clone(), start: at.start, pages };
        shown.set(at.size).context("KVM_MEM_READONLY")?;
        Ok(shown)
    }
}

impl Shown {
    /// Puts bytes on the page at an offset, from its start.
    pub fn put(&self, page: u64, bytes: &[u8]) -> bool {
        self.pages.put(page, bytes)
    }

    fn set(&self, size: u64) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: SLOT,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: self.start,
            memory_size: size,
            userspace_addr: self.pages.host(),
        };
        let why = match size {
            0 => "From now on a read there exits.",
            _ => "What the guest reads there lies in memory of Bantam's, and makes no exit; a write does.",
        };
        let fields =
            || (format!("slot {SLOT}, read-only, guest_phys_addr {:#x}, memory_size {size:#x}", self.start), why);
        // SAFETY: `pages` keeps the mapping, and its Drop below takes the slot away before it goes.
        let set = || unsafe { self.vm.set_user_memory_region(region) };
        call("KVM_SET_USER_MEMORY_REGION", fields, set).map_err(io::Error::from)
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        // Fails only where there is no slot.
        let _ = self.set(0);
    }
}
