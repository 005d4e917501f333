//! The state an arm64 CPU is entered in: EL1, MMU and caches off, all interrupts masked, as after a reset (Arm ARM D1.9)
//! and as Linux's booting.rst wants it.
//!
//! A `BootRegs` is data; [`crate::vcpu::Vcpu::enter`] applies it. Invariant: PSTATE names AArch64 at EL1, which is what
//! a CPU without EL2 and EL3 can be entered in.

use anyhow::Result;
use kvm_ioctls::{Kvm, VcpuFd};

use super::registers::{self, PC, PSTATE, SP_EL1, x};
use crate::memory::Span;

/// PSTATE after a reset: EL1 with its own stack pointer; debug, SError, IRQ and FIQ masked (Arm ARM C5.2.19, SPSR_EL1).
pub const EL1H_MASKED: u64 = 0x3c5;

/// The registers a CPU starts with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BootRegs {
    /// x0 to x30.
    pub x: [u64; 31],
    /// The stack pointer of EL1.
    pub sp: u64,
    /// The first instruction.
    pub pc: u64,
    /// Flags, interrupt masks, exception level.
    pub pstate: u64,
}

impl Default for BootRegs {
    fn default() -> Self {
        Self { x: [0; 31], sp: 0, pc: 0, pstate: EL1H_MASKED }
    }
}

impl BootRegs {
    /// The address of the first instruction.
    pub fn entry(&self) -> u64 {
        self.pc
    }

    /// Tells the guest of its device tree in x0 (booting.rst); a tree at the end of RAM has the stack below it.
    pub fn hand_over(&mut self, tree: Option<Span>) {
        let Some(tree) = tree else { return };
        self.x[0] = tree.start;
        if self.sp.checked_sub(tree.last()).is_some_and(|gap| gap <= 16) {
            self.sp = tree.start & !15;
        }
    }

    /// Sets a CPU's registers: those that differ from what KVM_ARM_VCPU_INIT left.
    ///
    /// # Errors
    /// KVM refuses one.
    pub fn apply(&self, fd: &mut VcpuFd, _kvm: &Kvm) -> Result<()> {
        let fresh = Self::default();
        let general = (0..).zip(self.x.iter().zip(fresh.x)).map(|(i, (value, old))| (x(i), *value, old));
        let special = [(PC, self.pc, fresh.pc), (SP_EL1, self.sp, fresh.sp), (PSTATE, self.pstate, fresh.pstate)];
        general
            .chain(special)
            .filter(|(_, value, old)| value != old)
            .try_for_each(|(id, value, _)| registers::set(fd, id, value))
    }
}

#[cfg(test)]
#[allow(missing_docs)]
pub mod tests {
    use super::*;

    /// Arm ARM D1.6.4, illegal return events: what a CPU of EL1 and EL0 cannot be put into.
    pub fn assert_enterable(boot: &BootRegs) {
        assert_eq!(boot.pstate & 0x1f, 5, "EL1h, AArch64: {:#x}", boot.pstate);
        assert_eq!(boot.pstate & !0xf000_03df, 0, "flags that are no masks or conditions: {:#x}", boot.pstate);
        assert_eq!((boot.pc % 4, boot.sp % 16), (0, 0), "alignment: {boot:x?}");
    }

    #[test]
    fn a_tree_at_the_end_of_ram_has_the_stack_below_it() {
        let mut boot = BootRegs { sp: 0x5000, ..BootRegs::default() };
        boot.hand_over(Some(Span { start: 0x4800, size: 0x7f8 }));
        assert_eq!((boot.x[0], boot.sp), (0x4800, 0x4800));
        let mut boot = BootRegs { sp: 0x5000, ..BootRegs::default() };
        boot.hand_over(Some(Span { start: 0x4000, size: 0x7f8 }));
        assert_eq!((boot.x[0], boot.sp), (0x4000, 0x5000));
        boot.hand_over(None);
        assert_eq!(boot.x[0], 0x4000);
        assert_enterable(&boot);
    }

    #[test]
    #[should_panic(expected = "EL1h")]
    fn the_checks_can_fail() {
        assert_enterable(&BootRegs { pstate: 0, ..BootRegs::default() });
    }
}
