//! Whether a CPU gets on: what a look at it finds, for `--watchdog`.
//!
//! Invariant: nothing here is touched between two exits. That there was an exit is read from the page that KVM fills
//! for it: a look leaves a mark there, which the next exit overwrites.

use kvm_bindings::kvm_run;

/// A CPU whose program counter stays this near to where it was is in a loop.
const NEAR: u64 = 4096;
/// No exit begins with it: neither an address that a guest reaches, nor a direction and a size of port I/O.
const MARK: u64 = 0xb5b5_b5b5_b5b5_b5b5;

/// A CPU's progress, as far as looks have seen.
#[derive(Debug, Default)]
pub struct Progress {
    /// Where it was when it last got on.
    anchor: Option<u64>,
    /// Looks that found that it had got on.
    moved: u32,
    /// What the last looks found it trapped in, and how many of them in a row.
    trap: Option<[u64; 2]>,
    trapped: u32,
}

impl Progress {
    /// Takes in a look: the program counter, and whether the CPU has made an exit since the last one or waits for an
    /// interrupt. Gives how often it got on.
    pub fn note(&mut self, pc: u64, active: bool) -> u32 {
        if active || self.anchor.is_none_or(|anchor| anchor.abs_diff(pc) >= NEAR) {
            self.anchor = Some(pc);
            self.moved = self.moved.wrapping_add(1);
        }
        self.moved
    }

    /// Takes in what the same look found the CPU trapped in. Gives how many looks in a row found that, and no exit.
    pub fn trap(&mut self, trap: Option<[u64; 2]>, active: bool) -> u32 {
        let same = trap.is_some() && trap == self.trap && !active;
        self.trapped = if same { self.trapped.saturating_add(1) } else { u32::from(trap.is_some()) };
        self.trap = trap;
        self.trapped
    }

    /// The last look found the CPU trapped in this.
    pub fn is_in(&self, trap: [u64; 2]) -> bool {
        self.trap == Some(trap)
    }
}

/// Whether KVM has filled in an exit for Bantam since the last call. What it overwrites is the beginning of the last exit,
/// which has been answered; the data that KVM may still take from it lies behind.
pub fn made_exit(run: &mut kvm_run) -> bool {
    // SAFETY: all bit patterns of this member of the union are valid.
    let first = unsafe { &mut run.__bindgen_anon_1.mmio.phys_addr };
    std::mem::replace(first, MARK) != MARK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_gets_on_by_an_exit_or_by_going_elsewhere() {
        let mut progress = Progress::default();
        let moved: Vec<_> = [(0x1000, false), (0x1ffc, false), (0x10, false), (0x1000, true), (0x2000, false)]
            .map(|(pc, active)| progress.note(pc, active))
            .into();
        assert_eq!(moved, [1, 1, 1, 2, 3]);
    }

    #[test]
    fn looks_in_a_row_at_the_same_trap_are_counted() {
        let mut progress = Progress::default();
        let looks = [(None, false), (Some([1, 2]), false), (Some([1, 2]), false), (Some([1, 2]), true)];
        let more = [(Some([1, 2]), false), (Some([1, 3]), false), (None, false), (Some([1, 3]), true)];
        let found: Vec<_> = looks.into_iter().chain(more).map(|(trap, active)| progress.trap(trap, active)).collect();
        assert_eq!(found, [0, 1, 2, 1, 2, 1, 0, 1]);
        assert!(progress.is_in([1, 3]) && !progress.is_in([1, 2]));
    }

    #[test]
    fn an_exit_overwrites_the_mark() {
        let mut run = kvm_run::default();
        assert_eq!([made_exit(&mut run), made_exit(&mut run)], [true, false]);
        run.__bindgen_anon_1.io.size = 1;
        assert_eq!([made_exit(&mut run), made_exit(&mut run)], [true, false]);
    }
}
