//! KVM's own counters of one CPU, read from the descriptor that KVM_GET_STATS_FD gives (KVM api.rst, 4.133).
//!
//! They cost nothing: KVM keeps them anyway. Reading them takes no lock that KVM_RUN holds.

use rustix::fd::OwnedFd;
use rustix::io::pread;

/// What is read, where this kernel counts it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counters {
    /// Nanoseconds spent halted, from the halt to the wake-up.
    pub halted_ns: Option<u64>,
    /// Exits to KVM, most of which KVM answers by itself.
    pub exits: Option<u64>,
    /// Interrupts that KVM injected.
    pub injected: Option<u64>,
    /// Page faults of the guest that KVM answered.
    pub faults: Option<u64>,
}

/// The names that each counter is the sum of.
const NAMES: [(&str, Which); 6] = [
    ("halt_wait_ns", |c| &mut c.halted_ns),
    ("halt_poll_success_ns", |c| &mut c.halted_ns),
    ("halt_poll_fail_ns", |c| &mut c.halted_ns),
    ("exits", |c| &mut c.exits),
    ("irq_injections", |c| &mut c.injected),
    ("pf_taken", |c| &mut c.faults),
];

type Which = fn(&mut Counters) -> &mut Option<u64>;

fn plus(sum: &mut Option<u64>, more: Option<u64>) {
    if let Some(more) = more {
        *sum = Some(sum.unwrap_or(0).wrapping_add(more));
    }
}

fn minus(sum: &mut Option<u64>, less: Option<u64>) {
    if let Some(less) = less {
        *sum = Some(sum.unwrap_or(0).wrapping_sub(less));
    }
}

impl Counters {
    /// What is new since the other.
    pub fn since(&mut self, other: Self) {
        minus(&mut self.halted_ns, other.halted_ns);
        minus(&mut self.exits, other.exits);
        minus(&mut self.injected, other.injected);
        minus(&mut self.faults, other.faults);
    }

    /// The two together.
    pub fn merge(&mut self, other: Self) {
        plus(&mut self.halted_ns, other.halted_ns);
        plus(&mut self.exits, other.exits);
        plus(&mut self.injected, other.injected);
        plus(&mut self.faults, other.faults);
    }
}

/// The descriptor, and where in it what lies.
pub struct KvmStats {
    fd: OwnedFd,
    places: Vec<(u64, Which)>,
}

/// How long one CPU has been halted, asked again and again.
pub struct Halts {
    fd: KvmStats,
    before: u64,
}

impl Halts {
    /// From the descriptor that KVM gives; none where this kernel does not count it.
    pub fn new(fd: OwnedFd) -> Option<Self> {
        let mut fd = KvmStats::new(fd)?;
        // To be read often: the others are left out.
        fd.places.retain(|(_, which)| {
            let mut counters = Counters::default();
            *which(&mut counters) = Some(0);
            counters.halted_ns.is_some()
        });
        let before = fd.read().halted_ns?;
        Some(Self { fd, before })
    }

    /// Nanoseconds since this was last asked.
    pub fn since(&mut self) -> u64 {
        let now = self.fd.read().halted_ns.unwrap_or(self.before);
        now.saturating_sub(std::mem::replace(&mut self.before, now))
    }
}

/// Sizes that no kernel has; they bound what is read.
const MOST: u32 = 1024;

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

impl KvmStats {
    /// Finds the counters; none where the descriptor does not have the documented form.
    pub fn new(fd: OwnedFd) -> Option<Self> {
        let mut header = [0; 24];
        (pread(&fd, &mut header, 0).ok()? == header.len()).then_some(())?;
        let (name, count) = (word(&header, 4)?, word(&header, 8)?);
        let (descriptors, data) = (word(&header, 16)?, word(&header, 20)?);
        if name > MOST || count > MOST {
            return None;
        }
        let size = 16 + usize::try_from(name).ok()?;
        let mut bytes = vec![0; size * usize::try_from(count).ok()?];
        (pread(&fd, &mut bytes, u64::from(descriptors)).ok()? == bytes.len()).then_some(())?;
        let places = bytes.chunks_exact(size).filter_map(|descriptor| {
            let name = descriptor.get(16..)?.split(|byte| *byte == 0).next()?;
            let (_, which) = NAMES.into_iter().find(|(known, _)| known.as_bytes() == name)?;
            Some((u64::from(data) + u64::from(word(descriptor, 8)?), which))
        });
        let places = places.collect();
        Some(Self { fd, places })
    }

    /// The counters now.
    pub fn read(&self) -> Counters {
        let mut counters = Counters::default();
        for (at, which) in &self.places {
            if let Some(value) = self.value(*at) {
                plus(which(&mut counters), Some(value));
            }
        }
        counters
    }

    fn value(&self, at: u64) -> Option<u64> {
        let mut value = [0; 8];
        (pread(&self.fd, &mut value, at) == Ok(8)).then(|| u64::from_ne_bytes(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// A descriptor as api.rst describes it, with these counters.
    fn sample(counters: &[(&str, u64)]) -> OwnedFd {
        let (name, count) = (32u32, u32::try_from(counters.len()).unwrap());
        let data = 24 + 48 * count;
        let mut bytes: Vec<u8> = [0, name, count, 24, 24, data].into_iter().flat_map(u32::to_ne_bytes).collect();
        for (i, (name, _)) in counters.iter().enumerate() {
            let offset = 8 * u32::try_from(i).unwrap();
            bytes.extend([0, 1 << 16, offset, 0].into_iter().flat_map(u32::to_ne_bytes));
            let mut text = name.as_bytes().to_vec();
            text.resize(32, 0);
            bytes.extend(text);
        }
        bytes.extend(counters.iter().flat_map(|(_, value)| value.to_ne_bytes()));
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file.into()
    }

    #[test]
    fn counters_are_found_by_name_and_halts_are_summed() {
        let fd = sample(&[("exits", 7), ("halt_wait_ns", 100), ("other", 1), ("halt_poll_fail_ns", 20)]);
        let mut counters = KvmStats::new(fd).unwrap().read();
        assert_eq!(counters, Counters { halted_ns: Some(120), exits: Some(7), injected: None, faults: None });
        counters.merge(Counters { exits: Some(3), injected: Some(2), ..Counters::default() });
        assert_eq!((counters.exits, counters.injected), (Some(10), Some(2)));
        // A CPU that goes on: what its old descriptor said is in, what the new one begins with is not counted again.
        counters.since(Counters { exits: Some(10), ..Counters::default() });
        counters.merge(Counters { exits: Some(12), ..Counters::default() });
        assert_eq!((counters.exits, counters.injected), (Some(12), Some(2)));
    }

    #[test]
    fn halts_are_told_since_the_last_time() {
        let fd = sample(&[("exits", 7), ("halt_wait_ns", 100), ("halt_poll_fail_ns", 20)]);
        let writer = rustix::io::dup(&fd).unwrap();
        let mut halts = Halts::new(fd).unwrap();
        assert_eq!((halts.fd.places.len(), halts.since()), (2, 0));
        rustix::io::pwrite(&writer, &150u64.to_ne_bytes(), 24 + 48 * 3 + 8).unwrap();
        assert_eq!((halts.since(), halts.since()), (50, 0));
        assert!(Halts::new(sample(&[("exits", 7)])).is_none());
    }

    #[test]
    fn nonsense_is_no_counters() {
        assert!(KvmStats::new(tempfile::tempfile().unwrap().into()).is_none());
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0xff; 100]).unwrap();
        assert!(KvmStats::new(file.into()).is_none());
    }
}
