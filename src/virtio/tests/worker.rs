//! The thread: doorbells while it runs, resets while it serves, pauses that lose nothing.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::*;
use crate::bus::Saved;
use crate::irq::IrqLine;
use crate::trace::Track;
use crate::virtio::Kind;
use crate::virtio::link::{Lines, Link};
use crate::virtio::worker::Bench;

/// Agrees on everything but EVENT_IDX, sets up the queues of `drivers` and lets the device work.
pub fn bring_up(link: &mut Link, drivers: &[Driver], line: &Arc<dyn IrqLine>) {
    for (status, start) in [(0, false), (3, false)] {
        assert_eq!(link.set_status(status), start);
    }
    for (half, bits) in [(1, feature::VERSION_1 >> 32), (0, feature::INDIRECT_DESC)] {
        *link.accepted_select() = half;
        link.accept(bits as u32);
    }
    assert!(!link.set_status(0xb));
    for (at, driver) in (0..).zip(drivers) {
        *link.selected() = at;
        link.set_ring(|ring| *ring = Ring { next_available: 0, next_used: 0, ..driver.ring });
    }
    assert!(link.set_status(0xf));
    let queues = drivers.iter().map(|driver| driver.line.clone() as Arc<dyn IrqLine>).collect();
    link.start(Lines { queues, space: line.clone() });
}

pub fn drivers(memory: &Memory) -> Vec<Driver> {
    let features = feature::VERSION_1 | feature::INDIRECT_DESC;
    vec![Driver::new(memory, 0, 16, features), Driver::new(memory, SHARE, 8, features)]
}

/// Waits until it is so.
pub fn until(what: &str, mut so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !so() {
        assert!(begin.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_micros(50));
    }
}

fn link(device: impl VirtioDevice + 'static, bench: &Bench, memory: &Memory) -> Link {
    Link::new(Box::new(device), 0, bench.clone(), memory.clone()).unwrap()
}

fn wire() -> Arc<dyn IrqLine> {
    Arc::<TestWire>::default()
}

#[test]
fn doorbells_are_heard_while_the_thread_runs() {
    let (memory, bench) = (ram(), Bench::new().unwrap());
    let mut link = link(Echo::default(), &bench, &memory);
    let mut drivers = drivers(&memory);
    let working = bench.start().unwrap();
    bring_up(&mut link, &drivers, &wire());
    for turn in 0..2000u32 {
        let driver = &mut drivers[turn as usize % 2];
        driver.add(&[&turn.to_le_bytes()], &[4]);
        if driver.must_notify(1) {
            link.notify(u64::from(turn % 2));
        }
        let mut used = None;
        until("a request is lost", || {
            used = driver.used();
            used.is_some()
        });
        assert_eq!(used.unwrap().written, turn.to_le_bytes());
    }
    drop(working);
    assert_eq!(drivers.iter().map(|driver| driver.line.pulses()).sum::<u64>(), 2000);
}

#[test]
fn what_is_rung_while_the_thread_stands_still_is_served_when_it_goes_on() {
    let (memory, bench) = (ram(), Bench::new().unwrap());
    let mut link = link(Echo::default(), &bench, &memory);
    let mut drivers = drivers(&memory);
    bring_up(&mut link, &drivers, &wire());
    for turn in 0..200 {
        // By a doorbell, by one that came before the pause, and by none that KVM kept.
        let working = (turn % 3 == 1).then(|| bench.start().unwrap());
        drivers[0].add(&[b"ping"], &[4]);
        if turn % 3 < 2 {
            link.notify(0);
        }
        drop(working);
        if turn % 3 != 1 {
            assert!(drivers[0].used().is_none(), "a device of a machine that stands still wrote to RAM");
        }
        let working = bench.start().unwrap();
        let mut used = None;
        until("a notification is lost", || {
            used = drivers[0].used();
            used.is_some()
        });
        assert_eq!(used.unwrap().written, b"ping");
        drop(working);
    }
}

#[test]
fn who_wants_to_see_it_sees_each_service_and_what_woke_the_device() {
    let (memory, bench, track) = (ram(), Bench::new().unwrap(), Track::new(1 << 20));
    let mut link = link(Echo::default(), &bench, &memory);
    let mut drivers = drivers(&memory);
    let turn = |link: &mut Link, driver: &mut Driver| {
        driver.add(&[b"ping"], &[4]);
        link.notify(0);
        bench.turn();
    };
    bring_up(&mut link, &drivers, &wire());
    turn(&mut link, &mut drivers[0]);
    bench.note(track.clone());
    turn(&mut link, &mut drivers[0]);
    drop(bench.start().unwrap());
    let (dropped, services) = track.services();
    let seen: Vec<_> = services.iter().map(|service| (service.device.0, service.woken)).collect();
    assert_eq!((dropped, seen), (0, vec![("echo", ("queue", Some(0))), ("echo", ("start", None))]));
    assert!(services.iter().all(|service| service.begun <= service.ended));
}

#[test]
fn a_reset_in_the_middle_leaves_nothing_in_flight_and_a_device_that_works() {
    let (memory, bench) = (ram(), Bench::new().unwrap());
    let mut link = link(Echo::default(), &bench, &memory);
    let working = bench.start().unwrap();
    for round in 0..200u32 {
        let mut drivers = drivers(&memory);
        drivers.iter().for_each(|driver| memory.write(driver.ring.descriptors, &[0; 0xc000]).unwrap());
        bring_up(&mut link, &drivers, &wire());
        for _ in 0..4 {
            drivers[1].add(&[&round.to_le_bytes()], &[4]);
            link.notify(1);
        }
        link.reset();
        // From here on nobody writes: what there is, is whole.
        let mut before = vec![0; SHARE as usize];
        memory.read(SHARE, &mut before).unwrap();
        link.notify(1);
        assert_eq!((link.status(), link.is_active()), (0, false));
        while let Some(used) = drivers[1].used() {
            assert_eq!(used.written, round.to_le_bytes());
        }
        let mut after = vec![0; SHARE as usize];
        memory.read(SHARE, &mut after).unwrap();
        assert!(before == after, "round {round}: a device wrote after its reset");
    }
    drop(working);
}

#[test]
fn others_look_at_a_device_while_it_works() {
    let (memory, bench) = (ram(), Bench::new().unwrap());
    let mut link = link(Echo::default(), &bench, &memory);
    let mut drivers = drivers(&memory);
    let working = bench.start().unwrap();
    bring_up(&mut link, &drivers, &wire());
    let other = std::thread::spawn({
        let bench = bench.clone();
        move || (0..500).all(|_| bench.with(|devices| devices.get(0).is_some()).unwrap())
    });
    for turn in 0..200u64 {
        drivers[0].add(&[b"x"], &[1]);
        link.notify(0);
        link.set_space(0, 4, turn);
        assert_eq!(link.space(0, 4), turn);
        until("a request is lost", || drivers[0].used().is_some());
    }
    assert!(other.join().unwrap());
    drop(working);
    // The bench has them back, and does it on the spot.
    assert_eq!(bench.with(|devices| devices.get(0).is_some()), Some(true));
}

/// Gives one chain of its first queue for each byte that comes in, and remembers why it was called.
struct Reader {
    source: OwnedFd,
    twice: bool,
    wakes: Arc<Mutex<Vec<Wake>>>,
    bytes: Arc<AtomicU64>,
}

impl VirtioDevice for Reader {
    fn kind(&self) -> Kind {
        Kind { name: "reader", id: 62, class: 0, queues: &[16, 8] }
    }
    fn features(&self) -> u64 {
        0
    }
    fn space(&self) -> Vec<u8> {
        Vec::new()
    }
    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.source.as_fd(); if self.twice { 2 } else { 1 }]
    }
    fn service(&mut self, wake: Wake, active: &mut Active) {
        self.wakes.lock().unwrap().push(wake);
        let mut bytes = [0; 64];
        while let Ok(size @ 1..) = rustix::io::read(&self.source, &mut bytes) {
            self.bytes.fetch_add(size as u64, Ordering::SeqCst);
        }
        while let Some(mut chain) = active.queues[0].pop() {
            chain.write(b"!");
            active.queues[0].push(chain);
        }
    }
    fn save(&self) -> Saved {
        crate::device::wrap(1, &())
    }
    fn load(&mut self, _saved: &Saved) -> anyhow::Result<()> {
        Ok(())
    }
}

fn reader(twice: bool) -> (Reader, OwnedFd) {
    let (source, far) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
    (Reader { source, twice, wakes: Arc::default(), bytes: Arc::default() }, far)
}

#[test]
fn sources_wake_a_device_and_a_pause_starts_it_again() {
    let (memory, bench) = (ram(), Bench::new().unwrap());
    let (device, far) = reader(false);
    let (wakes, bytes) = (device.wakes.clone(), device.bytes.clone());
    let mut link = link(device, &bench, &memory);
    bring_up(&mut link, &drivers(&memory), &wire());
    assert!(wakes.lock().unwrap().is_empty());
    for pause in 0..50 {
        rustix::io::write(&far, b"abc").unwrap();
        let working = bench.start().unwrap();
        until("what came during the pause is lost", || bytes.load(Ordering::SeqCst) == pause * 4 + 3);
        rustix::io::write(&far, b"d").unwrap();
        until("what came is lost", || bytes.load(Ordering::SeqCst) == pause * 4 + 4);
        drop(working);
        let wakes = std::mem::take(&mut *wakes.lock().unwrap());
        assert_eq!(wakes.first(), Some(&Wake::Start));
        assert!(wakes[1..].iter().all(|wake| *wake == Wake::Source(0)), "{wakes:?}");
    }
    link.reset();
    let working = bench.start().unwrap();
    rustix::io::write(&far, b"e").unwrap();
    bench.with(|_| ()).unwrap();
    drop(working);
    assert!(wakes.lock().unwrap().is_empty(), "a device was called after its reset");
}

#[test]
fn a_device_whose_descriptor_cannot_be_waited_for_is_not_lost() {
    let (memory, bench) = (ram(), Bench::new().unwrap());
    // Epoll takes a descriptor once: the second time is an error of the host's.
    let (device, _far) = reader(true);
    let mut link = link(device, &bench, &memory);
    let mut drivers = drivers(&memory);
    bring_up(&mut link, &drivers, &wire());
    drivers[0].add(&[], &[1]);
    let working = bench.start().unwrap();
    until("it does nothing at all", || drivers[0].used().is_some());
    drop(working);
    link.reset();
    assert!(!link.is_active(), "it never came back");
    link.save();
}

#[test]
fn a_queue_that_has_always_more_does_not_starve_another_device() {
    /// Serves its first queue without end: what it gives back is made available again.
    struct Greedy(Arc<AtomicU64>, Memory);
    impl VirtioDevice for Greedy {
        fn kind(&self) -> Kind {
            Kind { name: "greedy", id: 61, class: 0, queues: &[16, 8] }
        }
        fn features(&self) -> u64 {
            0
        }
        fn space(&self) -> Vec<u8> {
            Vec::new()
        }
        fn service(&mut self, _wake: Wake, active: &mut Active) {
            let queue = &mut active.queues[0];
            while let Some(chain) = queue.pop() {
                queue.push(chain);
                let ring = queue.ring();
                self.1.store_u16(ring.available + 2, ring.next_available.wrapping_add(1)).unwrap();
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        fn save(&self) -> Saved {
            crate::device::wrap(1, &())
        }
        fn load(&mut self, _saved: &Saved) -> anyhow::Result<()> {
            Ok(())
        }
    }
    let (memory, bench) = (ram(), Bench::new().unwrap());
    let (count, mut drivers) = (Arc::<AtomicU64>::default(), drivers(&memory));
    let mut greedy = link(Greedy(count.clone(), memory.clone()), &bench, &memory);
    let mut modest = Link::new(Box::new(Echo::default()), 1, bench.clone(), memory.clone()).unwrap();
    let features = feature::VERSION_1 | feature::INDIRECT_DESC;
    let mut others: Vec<_> = [2, 3].into_iter().map(|share| Driver::new(&memory, share * SHARE, 8, features)).collect();
    drivers[0].add(&[], &[1]);
    let working = bench.start().unwrap();
    bring_up(&mut greedy, &drivers, &wire());
    bring_up(&mut modest, &others, &wire());
    until("the greedy one is served", || count.load(Ordering::SeqCst) > 1000);
    for _ in 0..100 {
        others[0].add(&[b"x"], &[1]);
        modest.notify(0);
        until("the modest one is starved", || others[0].used().is_some());
    }
    greedy.reset();
    drop(working);
}
