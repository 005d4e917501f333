//! What a thread of devices did, for a viewer: each time that it served one.
//!
//! Invariant: memory is bounded; the oldest services give way, and are counted.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::now;
use super::ring::{Entry, Ring, Room};

/// One time that a device was served.
#[derive(Debug, Clone, Copy)]
pub struct Service {
    /// The device's name, and its number among those of the thread.
    pub device: (&'static str, u32),
    /// What woke it: `queue` and which, or the like.
    pub woken: (&'static str, Option<usize>),
    /// When it began, and when it was done.
    pub begun: Duration,
    pub ended: Duration,
}

impl Entry for Service {}

/// The track of one thread. Clones are the same.
#[derive(Debug, Clone)]
pub struct Track {
    room: Room,
    ring: Arc<Mutex<Ring<Service>>>,
}

impl Track {
    /// One that takes so many bytes.
    pub fn new(memory: usize) -> Self {
        Self { room: Room::of::<Service>(memory), ring: Arc::default() }
    }

    /// Adds a service that ends now.
    pub fn served(&self, device: (&'static str, u32), woken: (&'static str, Option<usize>), begun: Duration) {
        let service = Service { device, woken, begun, ended: now() };
        self.ring.lock().unwrap_or_else(PoisonError::into_inner).push(service, self.room);
    }

    /// How many were dropped, and what is left.
    pub fn services(&self) -> (u64, Vec<Service>) {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        (ring.dropped, ring.events.iter().copied().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_track_is_bounded_and_counts_what_it_drops() {
        let track = Track::new(1 << 16);
        let most = (1 << 16) / 4 * 3 / size_of::<Service>();
        for number in 0..most + 10 {
            track.served(("rng", 0), ("queue", Some(number)), Duration::ZERO);
        }
        let (dropped, services) = track.services();
        assert_eq!((dropped, services.len()), (10, most));
        assert_eq!((services[0].woken.1, services[most - 1].woken.1), (Some(10), Some(most + 9)));
    }
}
