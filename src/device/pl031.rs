//! The clock of Arm machines: a PrimeCell RTC PL031, as ARM DDI 0224C describes it; 32 bits that count seconds.
//!
//! The count is the seconds since 1970 of the clock wire, in UTC, until the guest loads another (LR); the difference to
//! the clock is kept. After 2106-02-07 06:28:15 it goes on with 0, as the chip's does. The chip waits for bit 0 of CR;
//! this one has been started by firmware, and cannot be stopped again (§3.3.4), so CR always reads 1.
//!
//! **There is no interrupt line**: nothing here wakes up when the count reaches the match register (MR). That it has is
//! found out when the guest next accesses a register, and stays in RIS and MIS until ICR is written. So a guest can
//! poll for its alarm; a device tree must not promise it an interrupt. (Linux's driver does without: then it has no
//! alarms, and `hwclock` does not wait in vain for one.) Any value written to ICR clears (§2.1), as with QEMU.
//! Reset is power-on: the count is the clock's again.
//!
//! Invariant: at second `due` of the clock the count is what MR holds, for the first time since the last look.

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::{primecell, unwrap, wrap};
use crate::bus::{Device, Effect, Saved};
use crate::clock::Clock;

/// Of the saved state.
const VERSION: u32 = 1;

/// PeriphID0 to 3: part 0x031, designer 0x41 (Arm), revision 0.
pub const PERIPHERAL: [u8; 4] = [0x31, 0x10, 0x04, 0x00];

// Offsets of the registers (§3.2).
const DR: u64 = 0x00;
const MR: u64 = 0x04;
const LR: u64 = 0x08;
const CR: u64 = 0x0c;
const IMSC: u64 = 0x10;
const RIS: u64 = 0x14;
const MIS: u64 = 0x18;
const ICR: u64 = 0x1c;

/// CR: the counter runs.
const CR_STARTED: u32 = 1;

/// After how many seconds the count comes round.
const ROUND: u64 = 1 << 32;

/// A PL031.
pub struct Pl031 {
    // Wires
    clock: Box<dyn Clock>,

    // State
    /// From the clock's seconds to the count.
    offset: u32,
    /// MR.
    alarm: u32,
    /// LR.
    loaded: u32,
    /// IMSC.
    enabled: bool,
    /// RIS.
    matched: bool,
    due: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    offset: u32,
    alarm: u32,
    loaded: u32,
    enabled: bool,
    matched: bool,
    due: u64,
}

/// The count at a second of the clock.
fn count(second: u64, offset: u32) -> u32 {
    let [a, b, c, d, ..] = second.to_le_bytes();
    u32::from_le_bytes([a, b, c, d]).wrapping_add(offset)
}

impl Pl031 {
    /// A clock that shows the time of `clock`.
    pub fn new(clock: Box<dyn Clock>) -> Self {
        let mut device = Self { clock, offset: 0, alarm: 0, loaded: 0, enabled: false, matched: false, due: 0 };
        device.reset();
        device
    }

    fn now(&self) -> u64 {
        self.clock.now().as_secs()
    }

    /// Finds the first second after `now` at which the count is what MR holds.
    fn arm(&mut self, now: u64) {
        let ahead = match self.alarm.wrapping_sub(count(now, self.offset)) {
            0 => ROUND,
            seconds => seconds.into(),
        };
        self.due = now.saturating_add(ahead);
    }

    /// Looks at the clock: has the count been what MR holds since the last look?
    fn look(&mut self) -> u64 {
        let now = self.now();
        if now >= self.due {
            self.matched = true;
            self.arm(now);
        }
        now
    }

    /// MR or the count has been written; the two may be equal at once.
    fn compare(&mut self, now: u64) {
        self.matched |= count(now, self.offset) == self.alarm;
        self.arm(now);
    }
}

impl Device for Pl031 {
    fn name(&self) -> &'static str {
        "pl031"
    }

    fn register(&self, offset: u64, _write: bool) -> &'static str {
        match primecell::read_from(offset) {
            DR => "DR",
            MR => "MR",
            LR => "LR",
            CR => "CR",
            IMSC => "IMSC",
            RIS => "RIS",
            MIS => "MIS",
            ICR => "ICR",
            _ => primecell::identity_name(offset),
        }
    }

    fn width(&self) -> usize {
        4
    }

    fn read(&mut self, offset: u64, _width: usize) -> u64 {
        let now = self.look();
        let value = match primecell::read_from(offset) {
            DR => count(now, self.offset),
            MR => self.alarm,
            LR => self.loaded,
            CR => CR_STARTED,
            IMSC => self.enabled.into(),
            RIS => self.matched.into(),
            MIS => (self.matched && self.enabled).into(),
            // ICR can only be written; it reads as what is not there, 0.
            register => primecell::identity(PERIPHERAL, register),
        };
        primecell::lanes(offset, value)
    }

    fn write(&mut self, offset: u64, _width: usize, value: u64) -> Effect {
        let now = self.look();
        let value = count(value, 0);
        match primecell::written_to(offset) {
            Some(MR) => {
                self.alarm = value;
                self.compare(now);
            }
            Some(LR) => {
                self.loaded = value;
                self.offset = value.wrapping_sub(count(now, 0));
                self.compare(now);
            }
            Some(IMSC) => self.enabled = value & 1 != 0,
            Some(ICR) => self.matched = false,
            _ => {}
        }
        Effect::None
    }

    fn reset(&mut self) {
        (self.offset, self.alarm, self.loaded, self.enabled, self.matched) = (0, 0, 0, false, false);
        self.arm(self.now());
    }

    fn save(&self) -> Saved {
        let &Self { clock: _, offset, alarm, loaded, enabled, matched, due } = self;
        wrap(VERSION, &State { offset, alarm, loaded, enabled, matched, due })
    }

    fn load(&mut self, saved: &Saved) -> Result<()> {
        let State { offset, alarm, loaded, enabled, matched, due } = unwrap(self.name(), VERSION, saved)?;
        if count(due, offset) != alarm {
            bail!("{}: its alarm is due at second {due}, when the count is not {alarm}", self.name());
        }
        (self.offset, self.alarm, self.loaded) = (offset, alarm, loaded);
        (self.enabled, self.matched, self.due) = (enabled, matched, due);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    /// 2024-02-29 13:05:09 UTC.
    const NOW: u64 = 1_709_211_909;

    /// A clock that a test moves.
    #[derive(Clone)]
    struct Hand(Arc<AtomicU64>);

    impl Clock for Hand {
        fn now(&self) -> Duration {
            Duration::new(self.0.load(Ordering::SeqCst), 999_999_999)
        }
    }

    struct Rig {
        device: Pl031,
        hand: Hand,
    }

    impl Rig {
        fn at(second: u64) -> Self {
            let hand = Hand(Arc::new(second.into()));
            Self { device: Pl031::new(Box::new(hand.clone())), hand }
        }

        fn get(&mut self, register: u64) -> u64 {
            self.device.read(register, 4)
        }

        fn set(&mut self, register: u64, value: u64) {
            assert_eq!(self.device.write(register, 4, value), Effect::None);
        }

        fn time(&mut self, second: u64) {
            self.hand.0.store(second, Ordering::SeqCst);
        }
    }

    #[test]
    fn after_reset_it_runs_with_the_clock_and_is_known_by_its_numbers() {
        let mut rig = Rig::at(NOW);
        assert_eq!([DR, MR, LR, CR, IMSC, RIS, MIS, ICR].map(|r| rig.get(r)), [NOW, 0, 0, 1, 0, 0, 0, 0]);
        let numbers: Vec<_> = (0xfe0..0x1000).step_by(4).map(|register| rig.get(register)).collect();
        assert_eq!(numbers, [0x31, 0x10, 0x04, 0x00, 0x0d, 0xf0, 0x05, 0xb1]);
        rig.time(NOW + 5);
        rig.set(DR, 1);
        rig.set(CR, 0);
        assert_eq!((rig.get(DR), rig.get(CR)), (NOW + 5, 1));
    }

    #[test]
    fn a_time_loaded_goes_on_with_the_clock_and_ends_with_a_reset() {
        for loaded in [0, 1, 1_000_000_000, NOW, 0xffff_fff0] {
            let mut rig = Rig::at(NOW);
            rig.set(LR, loaded);
            assert_eq!((rig.get(DR), rig.get(LR)), (loaded, loaded));
            rig.time(NOW + 10);
            assert_eq!((rig.get(DR), rig.get(LR)), (loaded + 10, loaded));
            rig.device.reset();
            assert_eq!((rig.get(DR), rig.get(LR)), (NOW + 10, 0));
        }
    }

    #[test]
    fn in_2106_it_goes_on_with_0() {
        let mut rig = Rig::at(0xffff_ffff);
        assert_eq!(rig.get(DR), 0xffff_ffff);
        assert_eq!(rig.get(RIS), 0);
        rig.time(0x1_0000_0000);
        assert_eq!(rig.get(DR), 0);
        assert_eq!(rig.get(RIS), 1, "MR is 0 after reset");
        rig.set(LR, 0xffff_ffff);
        rig.time(0x1_0000_0003);
        assert_eq!(rig.get(DR), 2);
        for second in [u64::MAX - 1, u64::MAX] {
            let mut rig = Rig::at(second);
            rig.set(MR, 0);
            rig.set(LR, 7);
            assert_eq!(rig.get(DR), 7);
        }
    }

    #[test]
    fn an_alarm_is_seen_from_its_second_on_until_it_is_cleared() {
        let mut rig = Rig::at(NOW);
        rig.set(MR, NOW + 10);
        rig.time(NOW + 9);
        assert_eq!(rig.get(RIS), 0);
        // Nobody looked in that very second.
        rig.time(NOW + 20);
        assert_eq!((rig.get(RIS), rig.get(MIS)), (1, 0));
        rig.set(IMSC, 0xff);
        assert_eq!((rig.get(IMSC), rig.get(MIS)), (1, 1));
        rig.set(ICR, 1);
        assert_eq!((rig.get(RIS), rig.get(MIS)), (0, 0));
        rig.time(NOW + 30);
        assert_eq!(rig.get(RIS), 0, "it comes once");
        rig.time(NOW + 10 + ROUND);
        assert_eq!(rig.get(RIS), 1, "until the count comes round");
        rig.set(ICR, 0);
        assert_eq!(rig.get(RIS), 0, "whatever is written");
    }

    #[test]
    fn an_alarm_that_was_due_before_it_is_moved_is_not_lost() {
        let mut rig = Rig::at(NOW);
        rig.set(MR, NOW + 1);
        rig.time(NOW + 2);
        rig.set(MR, NOW + 100);
        assert_eq!(rig.get(RIS), 1);
    }

    #[test]
    fn an_alarm_for_now_is_due_at_once_and_one_for_the_past_is_not() {
        let mut rig = Rig::at(NOW);
        rig.set(MR, NOW - 1);
        assert_eq!(rig.get(RIS), 0);
        rig.set(MR, NOW);
        assert_eq!(rig.get(RIS), 1);
        rig.set(ICR, 1);
        rig.set(MR, 500);
        rig.set(LR, 500);
        assert_eq!(rig.get(RIS), 1);
    }

    #[test]
    fn an_alarm_moves_with_the_count() {
        let mut rig = Rig::at(NOW);
        rig.set(MR, 1010);
        rig.set(LR, 1000);
        rig.time(NOW + 9);
        assert_eq!(rig.get(RIS), 0);
        rig.time(NOW + 10);
        assert_eq!(rig.get(RIS), 1);
    }

    #[test]
    fn a_host_clock_set_back_makes_no_alarm() {
        let mut rig = Rig::at(NOW);
        rig.set(MR, NOW + 10);
        rig.time(NOW - 1000);
        assert_eq!((rig.get(DR), rig.get(RIS)), (NOW - 1000, 0));
        rig.time(NOW + 10);
        assert_eq!(rig.get(RIS), 1);
    }

    #[test]
    fn time_goes_on_while_a_machine_is_saved() {
        let mut rig = Rig::at(NOW);
        rig.set(LR, 1000);
        rig.set(MR, 1010);
        let saved = rig.device.save();
        let mut later = Rig::at(NOW + 3600);
        later.device.load(&saved).unwrap();
        assert_eq!((later.get(DR), later.get(RIS)), (4600, 1));
    }

    #[test]
    fn bytes_are_read_out_of_a_register_and_written_only_to_its_first() {
        let mut rig = Rig::at(0x4433_2211);
        let bytes: Vec<_> = (0..4).map(|offset| rig.device.read(offset, 1) & 0xff).collect();
        assert_eq!(bytes, [0x11, 0x22, 0x33, 0x44]);
        rig.device.write(MR, 1, 0x12);
        rig.device.write(MR + 1, 1, 0x34);
        assert_eq!(rig.get(MR), 0x12);
    }

    #[test]
    fn an_alarm_due_at_another_second_than_its_own_is_refused() {
        let mut rig = Rig::at(NOW);
        rig.set(MR, NOW + 10);
        for (field, taken) in [("due", false), ("alarm", false), ("offset", false), ("loaded", true)] {
            let mut saved = rig.device.save();
            saved.state[field] = 1.into();
            assert_eq!(Rig::at(NOW).device.load(&saved).is_ok(), taken, "{field}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_written_the_alarm_stays_where_the_count_is_its_own(
            steps in proptest::collection::vec((0..0x20u64, any::<u64>(), any::<u32>()), 0..40)
        ) {
            let mut rig = Rig::at(NOW);
            for (offset, value, wait) in steps {
                rig.set(offset, value & 0xffff_ffff);
                let Pl031 { offset, alarm, due, .. } = rig.device;
                prop_assert_eq!(count(due, offset), alarm);
                let now = rig.hand.0.fetch_add(wait.into(), Ordering::SeqCst);
                prop_assert!(due > now && due - now <= ROUND);
                prop_assert!(rig.get(DR) <= 0xffff_ffff);
            }
        }
    }
}
