//! Queues, seen from a driver that behaves, and from one that does not.

use super::*;
use crate::virtio::queue::{Chain, Part};

const EVENTS: u64 = feature::VERSION_1 | feature::INDIRECT_DESC | feature::EVENT_IDX;
const FLAGS: u64 = feature::VERSION_1 | feature::INDIRECT_DESC;

fn driver(size: u16, features: u64) -> Driver {
    Driver::new(&ram(), SHARE, size, features)
}

fn several(driver: &mut Driver, count: usize) {
    for _ in 0..count {
        driver.add(&[], &[1]);
    }
}

/// Takes out all there is and gives it back, as a device does in one call.
fn serve(queue: &mut Queue) -> usize {
    queue.refill();
    let mut count = 0;
    while let Some(mut chain) = queue.pop() {
        let mut bytes = vec![0; chain.left_to_read() as usize];
        chain.read(&mut bytes);
        chain.write(&bytes);
        queue.push(chain);
        count += 1;
    }
    queue.tell();
    count
}

#[test]
fn parts_are_walked_in_any_steps() {
    let mut driver = driver(8, FLAGS);
    driver.add(&[b"abc", b"", b"defg"], &[2, 3]);
    let mut queue = driver.queue();
    let mut chain = queue.pop().unwrap();
    assert_eq!((chain.readable().len(), chain.left_to_read(), chain.left_to_write()), (2, 7, 5));
    let mut two = [0; 2];
    assert_eq!((chain.read(&mut two), &two), (2, b"ab"));
    assert_eq!((chain.skip_read(2), chain.left_to_read()), (2, 3));
    let mut rest = [0; 9];
    assert_eq!((chain.read(&mut rest), &rest[..3], chain.read(&mut two)), (3, &b"efg"[..], 0));
    assert_eq!((chain.write(b"x"), chain.written()), (1, 1));
    let mut parts = Vec::new();
    assert_eq!((chain.take_write(3, &mut parts), chain.left_to_write()), (3, 1));
    let [first, second]: [Part; 2] = chain.writable().to_vec().try_into().unwrap();
    assert_eq!(parts, [Part { addr: first.addr + 1, size: 1 }, Part { addr: second.addr, size: 2 }]);
    assert_eq!((chain.write(b"yz"), chain.skip_write(1), chain.written()), (1, 0, 5));
    queue.push(chain);
    assert_eq!(driver.used().unwrap().written, [b'x', 0xee, 0xee, 0xee, b'y']);
}

#[test]
fn an_empty_buffer_is_none_wherever_it_is() {
    let mut driver = driver(8, FLAGS);
    driver.describe(0, Descriptor { addr: u64::MAX, size: 0, flags: NEXT, next: 1 });
    driver.describe(1, Descriptor { addr: RAM - 1, size: 1, flags: NEXT | WRITE, next: 2 });
    driver.describe(2, Descriptor { addr: 1 << 63, size: 0, flags: WRITE, next: 0 });
    driver.offer(0);
    let mut queue = driver.queue();
    let mut chain = queue.pop().unwrap();
    assert_eq!((chain.readable(), chain.writable()), (&[][..], &[Part { addr: RAM - 1, size: 1 }][..]));
    assert_eq!((chain.write(b"ab"), queue.is_broken()), (1, false));
}

#[test]
fn indices_wrap_around_for_both_ways_of_asking_for_silence() {
    for features in [EVENTS, FLAGS] {
        let mut driver = driver(4, features).aged(65_530);
        let mut queue = driver.queue();
        let mut heard = 0;
        for turn in 0..66_000u32 {
            // What it hears of must not depend on where the index is.
            driver.hear_from(65_530u16.wrapping_add((turn & 0xffff) as u16));
            driver.add(&[&turn.to_le_bytes()], &[4]);
            assert!(turn == 0 || driver.must_notify(1), "turn {turn}");
            assert_eq!(serve(&mut queue), 1, "turn {turn}");
            assert_eq!(driver.used().unwrap().written, turn.to_le_bytes());
            heard += 1;
            assert_eq!(driver.line.pulses(), heard, "turn {turn}");
        }
        assert!(!queue.is_broken());
    }
}

#[test]
fn with_event_idx_a_driver_hears_from_where_it_asked_to() {
    let mut driver = driver(8, EVENTS).aged(65_534);
    let mut queue = driver.queue();
    driver.hear_from(65_534 + 1);
    let mut pulses = Vec::new();
    for _ in 0..4 {
        driver.add(&[], &[1]);
        serve(&mut queue);
        pulses.push(driver.line.pulses());
    }
    assert_eq!(pulses, [0, 1, 1, 1]);
    // Several at once: once, if the one is among them.
    driver.hear_from(3);
    several(&mut driver, 4);
    serve(&mut queue);
    assert_eq!(driver.line.pulses(), 2);
}

#[test]
fn with_flags_a_driver_that_wants_silence_has_it() {
    let mut driver = driver(8, FLAGS);
    let mut queue = driver.queue();
    driver.hear_nothing(true);
    driver.add(&[], &[1]);
    serve(&mut queue);
    assert_eq!(driver.line.pulses(), 0);
    driver.hear_nothing(false);
    serve(&mut queue);
    assert_eq!(driver.line.pulses(), 0, "what it had been told of in silence is said again");
    driver.add(&[], &[1]);
    serve(&mut queue);
    assert_eq!(driver.line.pulses(), 1);
}

#[test]
fn while_chains_come_the_device_asks_for_silence_and_at_the_end_no_more() {
    for features in [EVENTS, FLAGS] {
        let mut driver = driver(8, features);
        let mut queue = driver.queue();
        assert!(queue.pop().is_none() && driver.must_notify(0) == (features == FLAGS));
        several(&mut driver, 3);
        assert!(driver.must_notify(3));
        let first = queue.pop().unwrap();
        driver.add(&[], &[1]);
        assert!(!driver.must_notify(1), "it has not seen the end");
        while queue.pop().is_some() {}
        driver.add(&[], &[1]);
        assert!(driver.must_notify(1));
        queue.push(first);
    }
}

#[test]
fn a_queue_that_was_handed_over_in_the_middle_goes_on() {
    for features in [EVENTS, FLAGS] {
        let mut driver = driver(8, features);
        let mut queue = driver.queue();
        assert!(queue.pop().is_none());
        several(&mut driver, 3);
        let chain = queue.pop().unwrap();
        queue.push(chain);
        queue.tell();
        assert_eq!(driver.line.pulses(), 1);
        // The device has not seen the end, and the driver is asked to be silent: it stays so over the change.
        driver.ring = queue.ring();
        let mut queue = driver.queue();
        queue.tell();
        assert_eq!(driver.line.pulses(), 1, "it was told already");
        driver.hear_from(1);
        assert_eq!(serve(&mut queue), 2);
        assert_eq!(driver.line.pulses(), 2);
        driver.add(&[], &[1]);
        assert!(driver.must_notify(1), "nobody would ever hear of it");
    }
}

#[test]
fn as_many_chains_come_out_in_a_call_as_the_queue_is_long() {
    let mut driver = driver(4, EVENTS);
    let mut queue = driver.queue();
    driver.add(&[], &[1]);
    for _ in 0..4 {
        let chain = queue.pop().unwrap();
        queue.push(chain);
        driver.used().unwrap();
        // A driver that is always faster.
        driver.add(&[], &[1]);
    }
    assert!(queue.pop().is_none() && queue.is_starved());
    queue.refill();
    assert!(!queue.is_starved() && queue.pop().is_some() && queue.pop().is_none() && !queue.is_starved());
}

#[test]
fn a_chain_may_be_as_long_as_the_queue_and_a_table_longer() {
    let mut driver = driver(4, EVENTS);
    driver.add(&[b"a", b"b"], &[1, 1]);
    driver.queue().pop().unwrap();
    let mut driver = self::driver(4, EVENTS);
    driver.add_indirect(&[&b"x"[..]; 1000], &[1; 24]);
    let mut queue = driver.queue();
    let chain = queue.pop().unwrap();
    assert_eq!((chain.readable().len(), chain.writable().len()), (1000, 24));
    queue.push(chain);
    assert_eq!(queue.ring().next_used, 1);
}

#[test]
fn a_table_may_end_a_chain_of_descriptors() {
    let mut driver = driver(4, EVENTS);
    let table = driver.take(16);
    driver.memory.write(table, &Descriptor { addr: 0, size: 8, flags: WRITE, next: 9 }.bytes()).unwrap();
    driver.describe(2, Descriptor { addr: 0, size: 4, flags: NEXT, next: 1 });
    // Whether it can be written is of no account (§2.7.5.3.2).
    driver.describe(1, Descriptor { addr: table, size: 16, flags: INDIRECT | WRITE, next: 0 });
    driver.offer(2);
    let chain = driver.queue().pop().unwrap();
    assert_eq!((chain.head(), chain.left_to_read(), chain.left_to_write()), (2, 4, 8));
}

/// What a driver must never do, each with what it does.
type Malice = (&'static str, fn(&mut Driver));

fn table_of(driver: &mut Driver, descriptors: &[Descriptor], size: u32) {
    let table = driver.take(16 * descriptors.len() as u32);
    let bytes: Vec<u8> = descriptors.iter().flat_map(Descriptor::bytes).collect();
    driver.memory.write(table, &bytes).unwrap();
    driver.describe(0, Descriptor { addr: table, size, flags: INDIRECT, next: 0 });
    driver.offer(0);
}

fn one(driver: &mut Driver, addr: u64, size: u32, flags: u16, next: u16) {
    driver.describe(0, Descriptor { addr, size, flags, next });
    driver.offer(0);
}

const MALICE: &[Malice] = &[
    ("a head outside the table", |d| d.offer(8)),
    ("a head far outside", |d| d.offer(u16::MAX)),
    ("a next outside the table", |d| one(d, 0, 1, NEXT, 8)),
    ("a chain that is its own next", |d| one(d, 0, 1, NEXT, 0)),
    ("an empty chain that is its own next", |d| one(d, 0, 0, NEXT, 0)),
    ("a loop of two", |d| {
        d.describe(1, Descriptor { addr: 0, size: 1, flags: NEXT, next: 0 });
        one(d, 0, 1, NEXT, 1);
    }),
    ("a buffer that begins in RAM", |d| one(d, RAM - 1, 2, WRITE, 0)),
    ("a buffer that ends in RAM", |d| one(d, u64::MAX, 2, WRITE, 0)),
    ("a buffer that wraps around", |d| one(d, u64::MAX - 7, 16, 0, 0)),
    ("a buffer in MMIO", |d| one(d, 0xfee0_0000, 4, WRITE, 0)),
    ("to read behind to write", |d| {
        d.describe(1, Descriptor { addr: 0, size: 1, flags: 0, next: 0 });
        one(d, 0, 1, WRITE | NEXT, 1);
    }),
    ("more bytes than 32 bits count", |d| {
        let whole = Descriptor { addr: 0, size: RAM as u32, flags: NEXT, next: 0 };
        let all: Vec<_> = (1..=300).map(|next| Descriptor { next, ..whole }).collect();
        table_of(d, &all, 16 * 300);
    }),
    ("an index that jumps", |d| d.put16(d.ring.available + 2, 9)),
    ("an index that goes back", |d| d.put16(d.ring.available + 2, u16::MAX)),
    ("a table that is empty", |d| table_of(d, &[], 0)),
    ("a table of half a descriptor", |d| table_of(d, &[Descriptor::default(); 2], 24)),
    ("a table that is longer than any", |d| one(d, 0, 16 * 1025, INDIRECT, 0)),
    ("a table outside RAM", |d| one(d, RAM, 16, INDIRECT, 0)),
    ("a table that has a next", |d| one(d, 0, 16, INDIRECT | NEXT, 1)),
    ("a table in a table", |d| {
        let inner = Descriptor { addr: d.ring.descriptors, size: 16, flags: INDIRECT, next: 0 };
        table_of(d, &[inner], 16);
    }),
    ("a table that is itself", |d| one(d, d.ring.descriptors, 16, INDIRECT, 0)),
    ("a next outside of the table of a chain", |d| {
        table_of(d, &[Descriptor { addr: 0, size: 1, flags: NEXT, next: 1 }], 16);
    }),
    ("a loop in a table", |d| table_of(d, &[Descriptor { addr: 0, size: 1, flags: NEXT, next: 0 }], 16)),
];

#[test]
fn p21_what_a_driver_must_never_do_breaks_the_queue_and_nothing_else() {
    for (what, malice) in MALICE {
        let mut driver = driver(8, EVENTS);
        malice(&mut driver);
        let before = everything(&driver.memory);
        let mut queue = driver.queue();
        assert!(queue.pop().is_none() && queue.is_broken(), "{what}");
        let used = queue.ring().next_used;
        // It stays so, however often it is asked.
        assert!(queue.pop().is_none() && queue.pop().is_none() && queue.ring().next_used == used, "{what}");
        queue.tell();
        assert!(everything(&driver.memory) == before && driver.line.pulses() == 0, "{what}: RAM has changed");
        // A queue set up anew is as good as ever.
        let mut driver = Driver::new(&driver.memory, SHARE, 8, EVENTS).aged(0);
        driver.hear_from(0);
        driver.add(&[b"again"], &[5]);
        assert_eq!(serve(&mut driver.queue()), 1, "{what}");
        assert_eq!(driver.used().unwrap().written, b"again", "{what}");
    }
}

fn everything(memory: &Memory) -> Vec<u8> {
    let mut all = vec![0; RAM as usize];
    memory.read(0, &mut all).unwrap();
    all
}

#[test]
fn tables_that_were_not_agreed_on_are_malice() {
    let mut driver = driver(8, feature::VERSION_1);
    driver.add_indirect(&[b"x"], &[]);
    let mut queue = driver.queue();
    assert!(queue.pop().is_none() && queue.is_broken());
}

#[test]
fn rings_where_none_can_be_are_broken_from_the_start() {
    let good = driver(8, EVENTS).ring;
    let memory = ram();
    let bad = [
        Ring { size: 0, ..good },
        Ring { size: 3, ..good },
        Ring { size: 2 * MAX_SIZE, ..good },
        Ring { descriptors: 8, ..good },
        Ring { available: 1, ..good },
        Ring { used: 2, ..good },
        Ring { descriptors: RAM - 16, ..good },
        Ring { available: RAM - 16, ..good },
        Ring { used: RAM - 8, ..good },
        Ring { used: 0xfee0_0000, ..good },
        Ring { descriptors: !15, ..good },
        Ring { available: !1, ..good },
    ];
    for ring in bad {
        let mut queue = Queue::new(&memory, ring, [true; 2], Arc::<TestWire>::default());
        assert!(queue.is_broken() && queue.pop().is_none(), "{ring:?}");
        queue.tell();
        // One that is not used is not looked at.
        let mut queue = Queue::new(&memory, Ring { ready: false, ..ring }, [true; 2], Arc::<TestWire>::default());
        assert!(!queue.is_broken() && queue.pop().is_none(), "{ring:?}");
        queue.tell();
    }
}

#[test]
fn rings_inside_each_other_are_the_drivers_own_trouble() {
    let memory = ram();
    for at in [0, 16, 64] {
        let ring = Ring { size: 8, ready: true, descriptors: 0, available: at, used: at, ..Ring::default() };
        memory.write(0, &[1; 256]).unwrap();
        let mut queue = Queue::new(&memory, ring, [true; 2], Arc::<TestWire>::default());
        for _ in 0..100 {
            serve(&mut queue);
        }
        let mut behind = vec![0; 64 << 10];
        memory.read(256, &mut behind).unwrap();
        assert!(behind.iter().all(|byte| *byte == 0), "rings at {at}");
    }
}

#[test]
fn a_chain_of_a_queue_that_broke_goes_nowhere() {
    let mut driver = driver(8, EVENTS);
    driver.add(&[], &[1]);
    let mut queue = driver.queue();
    let chain: Chain = queue.pop().unwrap();
    driver.offer(99);
    assert!(queue.pop().is_none() && queue.is_broken());
    queue.push(chain);
    queue.tell();
    assert_eq!((driver.used(), driver.line.pulses()), (None, 0));
}

#[test]
fn a_request_allocates_no_list_of_parts() {
    let mut driver = driver(8, EVENTS);
    let mut queue = driver.queue();
    let mut lists = std::collections::BTreeSet::new();
    for _ in 0..100 {
        driver.add(&[b"a", b"b"], &[1]);
        queue.refill();
        let chain = queue.pop().unwrap();
        lists.insert(chain.readable().as_ptr() as usize);
        queue.push(chain);
        driver.used().unwrap();
    }
    assert_eq!(lists.len(), 1);
}
