//! Both transports as a driver has them, and what a snapshot and a hostile driver do to them.

use std::collections::BTreeMap;
use std::sync::Mutex;

use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::bus::Device;
use crate::device::pci::msix::tests::TestMessages;
use crate::device::pci::{ECAM, Mirror, PORTS, PciHost};
use crate::irq::Doorbells;
use crate::virtio::link::Link;
use crate::virtio::mmio::Mmio;
use crate::virtio::pci::{Pci, Wires};
use crate::virtio::worker::Bench;

const BAR: u64 = 0xd000_0000;
const FUNCTION: u64 = ECAM + 0x8000;
/// The capability for access without a BAR.
const WINDOW: u64 = FUNCTION + 0x40 + 3 * 16 + 20;
/// MSI-X message control.
const CONTROL: u64 = FUNCTION + 0x40 + 3 * 16 + 2 * 20 + 2;

/// A machine with one device.
struct Machine {
    device: Box<dyn Device>,
    pci: bool,
    memory: Memory,
    bench: Bench,
    line: Arc<TestWire>,
    messages: Vec<TestMessages>,
    bells: Bells,
    pages: Pages,
    drivers: Vec<Driver>,
}

/// The pages of configuration space that a guest reads without an exit; none since it has to exit.
#[derive(Clone, Default)]
struct Pages(Arc<Mutex<Option<Contents>>>);

/// What is on a page.
type Contents = BTreeMap<u64, Vec<u8>>;

struct Shown(Pages);

impl Mirror for Shown {
    fn show(&self, page: u64, bytes: &[u8]) {
        let mut whole = bytes.to_vec();
        whole.resize(0x1000, 0);
        self.0.0.lock().unwrap().get_or_insert_default().insert(page, whole);
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        *self.0.0.lock().unwrap() = None;
    }
}

/// Addresses where bells are.
#[derive(Clone, Default)]
struct Bells(Arc<Mutex<Vec<u64>>>);

impl Doorbells for Bells {
    fn connect(&self, address: u64, _bell: &EventFd, on: bool) {
        let mut bells = self.0.lock().unwrap();
        if on {
            bells.push(address);
        } else {
            bells.retain(|bell| *bell != address);
        }
    }
}

impl Machine {
    fn new(pci: bool) -> Self {
        Self::with_ram(pci, ram())
    }

    fn with_ram(pci: bool, memory: Memory) -> Self {
        let (bench, line) = (Bench::new().unwrap(), Arc::<TestWire>::default());
        let (messages, bells) = ((0..3).map(|_| TestMessages::default()).collect::<Vec<_>>(), Bells::default());
        let link = Link::new(Box::new(Echo::default()), 0, bench.clone(), memory.clone()).unwrap();
        let pages = Pages::default();
        let device: Box<dyn Device> = if pci {
            let wires = Wires {
                intx: Some(Box::new(line.clone())),
                intx_number: 5,
                messages: messages.iter().map(|message| Box::new(message.clone()) as _).collect(),
                doorbells: Some(Box::new(bells.clone())),
                answers: true,
            };
            let host = PciHost::new(vec![Box::new(Pci::new(link, BAR as u32, wires))]).unwrap();
            Box::new(host.mirrored(Some(Box::new(Shown(pages.clone())))))
        } else {
            Box::new(Mmio::new(link, Box::new(line.clone())))
        };
        let features = feature::VERSION_1 | feature::INDIRECT_DESC;
        let drivers = vec![Driver::new(&memory, 0, 16, features), Driver::new(&memory, SHARE, 8, features)];
        Self { device, pci, memory, bench, line, messages, bells, pages, drivers }
    }

    /// Writes a register of either transport: its offset in pages of registers, and in the BAR with its width.
    fn set(&mut self, page: u64, (bar, width): (u64, usize), value: u64) {
        match self.pci {
            true => self.device.write(BAR + bar, width, value),
            false => self.device.write(page, 4, value),
        };
    }

    fn set_status(&mut self, value: u64) {
        self.set(0x70, (0x14, 1), value);
    }

    fn status(&mut self) -> u64 {
        if self.pci { self.device.read(BAR + 0x14, 1) } else { self.device.read(0x70, 4) }
    }

    /// The interrupt status, which a PCI driver reads to clear it.
    fn isr(&mut self) -> u64 {
        if self.pci {
            return self.device.read(BAR + 0x1000, 1);
        }
        let bits = self.device.read(0x60, 4);
        self.device.write(0x64, 4, bits);
        bits
    }

    fn accept(&mut self, features: u64) {
        for (half, bits) in [(1, features >> 32), (0, features & 0xffff_ffff)] {
            self.set(0x24, (0x08, 4), half);
            self.set(0x20, (0x0c, 4), bits);
        }
    }

    fn set_up(&mut self, queue: u64, ring: Ring) {
        self.set(0x30, (0x16, 2), queue);
        self.set(0x38, (0x18, 2), ring.size.into());
        let areas = [(0x80, 0x20, ring.descriptors), (0x90, 0x28, ring.available), (0xa0, 0x30, ring.used)];
        for (page, bar, at) in areas {
            self.set(page, (bar, 4), at & 0xffff_ffff);
            self.set(page + 4, (bar + 4, 4), at >> 32);
        }
        self.set(0x44, (0x1c, 2), 1);
    }

    fn bring_up(&mut self) {
        for driver in &mut self.drivers {
            self.memory.write(driver.ring.descriptors, &vec![0; HEAP as usize]).unwrap();
            *driver = Driver::new(&self.memory, driver.ring.descriptors, driver.ring.size, driver.features);
        }
        self.set_status(0);
        self.set_status(3);
        self.accept(feature::VERSION_1 | feature::INDIRECT_DESC);
        self.set_status(0xb);
        for (queue, ring) in [self.drivers[0].ring, self.drivers[1].ring].into_iter().enumerate() {
            self.set_up(queue as u64, ring);
        }
        self.set_status(0xf);
    }

    fn notify(&mut self, queue: u64) {
        self.set(0x50, (0x3000 + 4 * queue, 2), queue);
        self.bench.turn();
    }

    fn ping(&mut self, queue: usize) -> bool {
        self.drivers[queue].add(&[b"ping"], &[4]);
        self.notify(queue as u64);
        self.drivers[queue].used().is_some_and(|used| used.written == b"ping")
    }

    /// Whether the guest is shown something, which then is what it would read.
    fn is_shown(&mut self) -> bool {
        let pages = self.pages.0.lock().unwrap().clone();
        for (page, bytes) in pages.iter().flatten() {
            for at in (0..0x110).chain([0xffc]).step_by(4) {
                let shown = u32::from_le_bytes(*bytes[at as usize..].first_chunk().unwrap());
                assert_eq!(self.device.read(ECAM + page + at, 4), u64::from(shown), "{page:#x} {at:#x}");
            }
        }
        pages.is_some()
    }

    /// MSI-X with three open vectors, whose data are 0x40 and so on.
    fn open_vectors(&mut self) {
        for vector in 0..3 {
            let at = BAR + 0x4000 + 16 * vector;
            for (field, value) in [(0, 0xfee0_0000), (8, 0x40 + vector), (12, 0)] {
                self.device.write(at + field, 4, value);
            }
        }
        self.device.write(CONTROL, 2, 0x8000);
    }

    /// What each of the vectors has sent.
    fn sent(&self) -> [Vec<u32>; 3] {
        let data = |message: &TestMessages| message.sent().iter().map(|(_, data)| *data).collect();
        self.messages.iter().map(data).collect::<Vec<_>>().try_into().unwrap()
    }

    fn set_vector(&mut self, queue: u64, vector: u64) {
        self.device.write(BAR + 0x16, 2, queue);
        self.device.write(BAR + 0x1a, 2, vector);
    }
}

fn both(test: impl Fn(Machine)) {
    [false, true].into_iter().for_each(|pci| test(Machine::new(pci)));
}

#[test]
fn a_device_answers_and_interrupts_by_a_level_that_falls_when_it_is_seen() {
    both(|mut machine| {
        machine.bring_up();
        for _ in 0..3 {
            assert!(machine.ping(0) && machine.ping(1) && machine.line.level());
            assert_eq!((machine.isr(), machine.line.level(), machine.isr()), (1, false, 0));
        }
    });
}

#[test]
fn p21_what_is_changed_after_driver_ok_changes_nothing() {
    both(|mut machine| {
        machine.bring_up();
        let other = Ring { descriptors: 0x40_0000, available: 0x41_0000, used: 0x42_0000, size: 4, ..Ring::default() };
        let before = machine.device.save();
        for queue in [0, 1] {
            machine.set_up(queue, other);
            // In a page of registers a queue may be closed at work (§4.2.2.2).
            if machine.pci {
                machine.device.write(BAR + 0x1c, 2, 0);
            }
        }
        machine.accept(0);
        machine.set_status(0xf);
        machine.set_status(0x4);
        assert_eq!(machine.device.save(), before);
        assert!(machine.ping(0) && machine.ping(1));
        assert_eq!(machine.status(), 0xf);
    });
}

#[test]
fn features_that_were_not_offered_are_not_agreed_on() {
    both(|mut machine| {
        for (features, agreed) in [(1 << 33, 3), (1, 3), (feature::VERSION_1 | 1 << 5, 3), (feature::VERSION_1, 0xb)] {
            machine.set_status(0);
            machine.set_status(3);
            machine.accept(features);
            machine.set_status(0xb);
            assert_eq!(machine.status(), agreed, "{features:#x}");
            machine.set_status(0xf);
            assert_eq!(machine.status() & 4, agreed >> 1 & 4, "{features:#x}");
        }
    });
}

#[test]
fn p21_a_broken_queue_says_so_once_and_a_reset_mends_it() {
    both(|mut machine| {
        for round in 0..3 {
            machine.bring_up();
            assert!(machine.ping(0));
            machine.isr();
            machine.drivers[0].offer(999);
            machine.notify(0);
            assert_eq!((machine.status(), machine.isr()), (0x4f, 2), "round {round}");
            machine.notify(0);
            machine.notify(1);
            assert_eq!((machine.status(), machine.isr()), (0x4f, 0), "round {round}");
            // Only a reset helps.
            machine.set_status(0xf);
            assert_eq!(machine.status(), 0x4f);
        }
        machine.set_status(0);
        assert_eq!((machine.status(), machine.line.level()), (0, false));
        machine.bring_up();
        assert!(machine.ping(0) && machine.ping(1));
    });
}

#[test]
fn p21_no_number_of_the_drivers_is_an_index() {
    both(|mut machine| {
        machine.bring_up();
        for number in [2, 3, 0x7fff, 0xffff, 0x1_0000, 0xffff_ffff] {
            machine.set(0x30, (0x16, 2), number);
            machine.set(0x38, (0x18, 2), 8);
            machine.set(0x44, (0x1c, 2), 1);
            machine.set(0x50, (0x3000 + 4 * (number & 0x3ff), 2), number);
            if machine.pci {
                machine.device.write(BAR + 0x1a, 2, number & 0xffff);
                machine.device.write(BAR + 0x10, 2, number & 0xffff);
                machine.device.read(BAR + 0x18, 2);
            } else {
                assert_eq!((machine.device.read(0x34, 4), machine.device.read(0x44, 4)), (0, 0));
            }
        }
        assert!(machine.ping(0));
    });
}

#[test]
fn what_is_restored_does_nothing_before_the_machine_goes_on() {
    both(|mut machine| {
        machine.bring_up();
        assert!(machine.ping(0) && machine.line.level());
        // Made available while the machine is stopped: the driver's notification is still on its way.
        machine.drivers[0].add(&[b"late"], &[4]);
        let saved = machine.device.save();
        let mut twin = Machine::with_ram(machine.pci, machine.memory.clone());
        let mut before = vec![0; RAM as usize];
        machine.memory.read(0, &mut before).unwrap();
        twin.device.load(&saved).unwrap();
        let mut after = vec![0; RAM as usize];
        machine.memory.read(0, &mut after).unwrap();
        assert!(before == after, "a device that was restored wrote to RAM");
        assert_eq!((twin.device.save(), twin.line.level()), (saved, true));
        twin.bench.turn();
        assert_eq!(machine.drivers[0].used().unwrap().written, b"late");
        std::mem::swap(&mut twin.drivers, &mut machine.drivers);
        assert!(twin.ping(0) && twin.ping(1));
    });
}

#[test]
fn an_interrupt_goes_where_the_registers_say_when_it_is_raised() {
    let mut machine = Machine::new(true);
    machine.bring_up();
    machine.open_vectors();
    machine.set_vector(0, 1);
    assert!(machine.ping(0));
    assert_eq!(machine.sent(), [vec![], vec![0x41], vec![]]);
    machine.set_vector(0, 2);
    assert!(machine.ping(0));
    assert_eq!(machine.sent(), [vec![], vec![0x41], vec![0x42]]);
    // None; and the line is not for those who use messages.
    machine.set_vector(0, 0xffff);
    assert!(machine.ping(0));
    assert_eq!((machine.sent(), machine.line.level()), ([vec![], vec![0x41], vec![0x42]], false));
    machine.device.write(CONTROL, 2, 0);
    assert!(machine.ping(0) && machine.line.level());
    // INTx switched off: the register says it, the line does not.
    machine.device.write(FUNCTION + 4, 2, 0x402);
    assert!(!machine.line.level());
    machine.device.write(FUNCTION + 4, 2, 2);
    assert!(machine.line.level());
    assert_eq!((machine.isr(), machine.line.level()), (1, false));
}

#[test]
fn what_an_open_entry_says_is_what_is_sent() {
    let mut machine = Machine::new(true);
    machine.bring_up();
    machine.open_vectors();
    machine.set_vector(0, 0);
    machine.device.write(BAR + 0x4008, 4, 0x77);
    assert!(machine.ping(0));
    assert_eq!(machine.messages[0].sent(), [(0xfee0_0000, 0x77)]);
}

#[test]
fn doorbells_are_where_the_bar_is_while_it_answers() {
    let mut machine = Machine::new(true);
    let bells = |machine: &Machine| machine.bells.0.lock().unwrap().clone();
    assert_eq!(bells(&machine), [BAR + 0x3000, BAR + 0x3004]);
    machine.device.write(FUNCTION + 4, 2, 0);
    assert!(bells(&machine).is_empty());
    machine.device.write(FUNCTION + 0x10, 4, BAR + 0x8000);
    machine.device.write(FUNCTION + 4, 2, 2);
    assert_eq!(bells(&machine), [BAR + 0xb000, BAR + 0xb004]);
    let saved = machine.device.save();
    machine.device.reset();
    assert_eq!(bells(&machine), [BAR + 0x3000, BAR + 0x3004]);
    machine.device.load(&saved).unwrap();
    assert_eq!(bells(&machine), [BAR + 0xb000, BAR + 0xb004]);
}

#[test]
fn what_a_guest_reads_without_an_exit_is_what_it_would_read_with_one() {
    let mut machine = Machine::new(true);
    assert!(machine.is_shown());
    assert_eq!(machine.pages.0.lock().unwrap().clone().unwrap().into_keys().collect::<Vec<_>>(), [0, 0x8000]);
    // All but the capability that would end it.
    const { assert!(WINDOW >= FUNCTION + 0x7f + 4) };
    let (mut random, mut saved) = (1u64, machine.device.save());
    for _ in 0..3000 {
        random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        let [at, width, value] = [random >> 33 & 0x7f, 1 << ((random >> 41) % 3), random >> 43];
        let page = if random >> 40 & 7 == 0 { ECAM } else { FUNCTION };
        match random >> 60 {
            0 => machine.device.reset(),
            1 => machine.device.load(&saved).unwrap(),
            2 => saved = machine.device.save(),
            3 => drop(machine.device.write(PORTS, 4, 0x8000_0800 | at)),
            4..6 => drop(machine.device.write(PORTS + 4 + (at & 3), width as usize, value)),
            _ => drop(machine.device.write(page + at, width as usize, value)),
        }
        assert!(machine.is_shown());
    }
}

#[test]
fn a_read_that_does_something_is_shown_to_no_guest() {
    let arm = [(4, 1, 0), (8, 4, 0x14), (12, 4, 1)];
    let mut machine = Machine::new(true);
    machine.set_status(3);
    for (at, width, value) in arm {
        assert!(machine.is_shown());
        machine.device.write(WINDOW + at, width, value);
    }
    assert!(!machine.is_shown());
    assert_eq!(machine.device.read(WINDOW + 16, 1), 3);
    // Nor after it was restored so.
    let saved = machine.device.save();
    let mut other = Machine::new(true);
    other.device.load(&saved).unwrap();
    assert!(!other.is_shown());
    // What it means is no access: nothing happens.
    let mut machine = Machine::new(true);
    machine.device.write(WINDOW + 12, 4, 3);
    assert!(machine.is_shown());
}
