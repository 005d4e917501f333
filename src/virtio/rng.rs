//! Entropy (VIRTIO 1.3 §5.4): random numbers of the host's for the guest's buffers.
//!
//! Invariant: a chain gets at most `MOST` bytes, whatever room it has.

use anyhow::Result;

use super::{Active, Kind, VirtioDevice, Wake};
use crate::bus::Saved;
use crate::device::{Stateless, unwrap, wrap};

/// Of the saved state.
const VERSION: u32 = 1;
/// What a chain gets at most: far more than any driver asks for at a time.
const MOST: usize = 4096;

const KIND: Kind = Kind { name: "virtio-rng", id: 4, class: 0xff_0000, queues: &[64] };

/// The device.
pub struct Rng;

impl VirtioDevice for Rng {
    fn kind(&self) -> Kind {
        KIND
    }

    fn features(&self) -> u64 {
        0
    }

    fn space(&self) -> Vec<u8> {
        Vec::new()
    }

    fn service(&mut self, _wake: Wake, active: &mut Active) {
        let Some(queue) = active.queues.first_mut() else { return };
        let mut bytes = [0; MOST];
        while let Some(mut chain) = queue.pop() {
            let size = MOST.min(chain.left_to_write() as usize);
            let room = bytes.get_mut(..size).unwrap_or_default();
            // A host that has none yet gives none: the guest asks again.
            let got = rustix::rand::getrandom(&mut *room, rustix::rand::GetRandomFlags::NONBLOCK).unwrap_or(0);
            chain.write(room.get(..got).unwrap_or_default());
            queue.push(chain);
        }
    }

    fn save(&self) -> Saved {
        let Self = self;
        wrap(VERSION, &Stateless {})
    }

    fn load(&mut self, saved: &Saved) -> Result<()> {
        unwrap(KIND.name, VERSION, saved).map(|Stateless {}| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::tests::Rig;

    #[test]
    fn room_is_filled_with_random_bytes() {
        let mut rig = Rig::new(Rng);
        let first = rig.ask(0, &[], &[7, 0, 25]).unwrap().written;
        let second = rig.ask(0, &[], &[32]).unwrap().written;
        assert_eq!((first.len(), second.len()), (32, 32));
        assert!(first != second && first != [0xee; 32]);
    }

    #[test]
    fn a_chain_gets_no_more_than_a_page_and_one_without_room_nothing() {
        let mut rig = Rig::new(Rng);
        assert_eq!(rig.ask(0, &[], &[1 << 20]).unwrap().written.len(), MOST);
        assert_eq!(rig.ask(0, &[b"seed"], &[]).unwrap().written.len(), 0);
        (0..64).for_each(|_| assert!(rig.drivers[0].add(&[], &[1]) < 64));
        rig.kick(0);
        assert_eq!((0..64).filter(|_| rig.drivers[0].used().is_some()).count(), 64);
        assert!(!rig.is_broken());
    }
}
