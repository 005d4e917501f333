//! Virtio devices on both transports. A new device adds one line to the list below.
//!
//! Their guest's RAM holds queues with chains in them; scripts bring a driver up on them, so that devices have work.

use std::sync::atomic::{AtomicBool, AtomicU32};

use super::*;
use crate::device::pci::{ECAM, PORTS, PciHost};
use crate::irq::MessageLine;
use crate::memory::Memory;
use crate::virtio::balloon::{Balloon, Wish};
use crate::virtio::block::Block;
use crate::virtio::console::Console;
use crate::virtio::fuzz::Nobody;
use crate::virtio::link::Link;
use crate::virtio::mmio::Mmio;
use crate::virtio::net::Net;
use crate::virtio::pci::{Pci, Wires as Slot};
use crate::virtio::rng::Rng;
use crate::virtio::tests::{Descriptor, Echo, INDIRECT, NEXT, WRITE};
use crate::virtio::vsock::Vsock;
use crate::virtio::worker::Bench;
use crate::virtio::{VirtioDevice, feature};

macro_rules! conform_virtio {
    ($device:ident, $make:expr) => {
        mod $device {
            use super::*;
            conform!(mmio, registers(&$make()), |w: &Wires| w.page($make()));
            conform!(pci, functions(&$make()), |w: &Wires| w.slot($make()));
        }
    };
}

conform_virtio!(echo, Echo::default);
conform_virtio!(rng, || Rng);
conform_virtio!(block, block);
conform_virtio!(net, net);
conform_virtio!(vsock, vsock);
conform_virtio!(console, || Console::new(Box::new(Nobody::new().unwrap())));
conform_virtio!(balloon, || Balloon::new(Wish::new().unwrap()));

/// A disk of a file that nobody else has.
fn block() -> Block {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(RAM).unwrap();
    Block::new(&file.path().to_str().unwrap().parse().unwrap()).unwrap()
}

/// A network card whose far end never comes.
fn net() -> Net {
    let folder = tempfile::tempdir().unwrap();
    let words = format!("socket:{},listen", folder.path().join("wire").display());
    Net::new(&words.parse().unwrap(), None, 0).unwrap()
}

/// Sockets to which nobody connects.
fn vsock() -> Vsock {
    let folder = tempfile::tempdir().unwrap();
    Vsock::new(&format!("cid=3,path={}", folder.path().join("v").display()).parse().unwrap()).unwrap()
}

/// Bytes of RAM for each queue, and of RAM.
const SHARE: u64 = 0x1000;
const RAM: u64 = 16 * SHARE;
/// The queues are this long, with a chain less in them.
const LONG: u16 = 4;
/// Where the functions' BAR lies.
const BAR: u64 = 0xd000_0000;
/// ECAM of the one function.
const FUNCTION: u64 = ECAM + 0x8000;

/// RAM, and the place where devices work.
pub struct Guest {
    memory: Memory,
    bench: Bench,
    devices: AtomicU32,
    turned: AtomicBool,
}

impl Guest {
    fn new(bytes: &[u8]) -> Self {
        let memory = Memory::new(&[Span { start: 0, size: RAM }], false).unwrap();
        memory.write(0, bytes).unwrap();
        Self { memory, bench: Bench::new().unwrap(), devices: AtomicU32::new(0), turned: AtomicBool::new(false) }
    }

    pub fn twin(&self) -> Self {
        let mut bytes = vec![0; RAM as usize];
        self.memory.read(0, &mut bytes).unwrap();
        let twin = Self::new(&bytes);
        if self.turned.load(Ordering::SeqCst) {
            twin.turn();
        }
        twin
    }

    pub fn turn(&self) {
        self.turned.store(true, Ordering::SeqCst);
        self.bench.turn();
    }
}

/// Queues with a chain of two, one in a table, and one to write only.
fn queues() -> Vec<u8> {
    let mut ram = vec![0; RAM as usize];
    let mut put = |at: u64, bytes: &[u8]| ram[at as usize..][..bytes.len()].copy_from_slice(bytes);
    for at in (0..16).map(|queue| queue * SHARE) {
        let (from, to) = (at + 0x400, at + 0x800);
        let all = [
            Descriptor { addr: from, size: 64, flags: NEXT, next: 1 },
            Descriptor { addr: to, size: 64, flags: WRITE, next: 0 },
            Descriptor { addr: at + 0x300, size: 32, flags: INDIRECT, next: 0 },
            Descriptor { addr: to + 128, size: 100, flags: WRITE, next: 0 },
        ];
        all.iter().zip((at..).step_by(16)).for_each(|(descriptor, at)| put(at, &descriptor.bytes()));
        put(at + 0x300, &Descriptor { addr: from, size: 16, flags: NEXT, next: 1 }.bytes());
        put(at + 0x310, &Descriptor { addr: to + 64, size: 64, flags: WRITE, next: 0 }.bytes());
        // Flags, index, and the heads.
        put(at + 0x100, &[0, 0, 3, 0, 0, 0, 3, 0, 2, 0]);
    }
    ram
}

/// A message that counts as a pulse of the one line there is.
struct Message(Arc<TestWire>);

impl IrqLine for Message {
    fn pulse(&self) {
        self.0.pulse();
    }
    fn set(&self, _high: bool) {}
}

impl MessageLine for Message {
    fn route(&self, _address: u64, _data: u32) {}
}

impl Wires {
    fn link(&self, device: impl VirtioDevice + 'static) -> Link {
        let guest = self.guest.get_or_init(|| Guest::new(&queues()));
        let number = guest.devices.fetch_add(1, Ordering::SeqCst);
        Link::new(Box::new(device), number, guest.bench.clone(), guest.memory.clone()).unwrap()
    }

    fn page(&self, device: impl VirtioDevice + 'static) -> Mmio {
        Mmio::new(self.link(device), self.line())
    }

    fn slot(&self, device: impl VirtioDevice + 'static) -> PciHost {
        let message = || Box::new(Message(self.line.clone())) as _;
        let messages = (0..=device.kind().queues.len()).map(|_| message()).collect();
        let wires = Slot { intx: Some(self.line()), intx_number: 5, messages, doorbells: None, answers: true };
        PciHost::new(vec![Box::new(Pci::new(self.link(device), BAR as u32, wires))]).unwrap()
    }
}

fn write(offset: u64, width: usize, value: u64) -> Step {
    Step::Write { offset, width, value }
}

const ADDRESSES: [u64; 3] = [0, 0x100, 0x200];
/// With event indices, and without.
const FEATURES: [u64; 2] = [feature::INDIRECT_DESC | feature::EVENT_IDX, feature::INDIRECT_DESC];

fn registers(device: &impl VirtioDevice) -> Shape {
    let queues = 0..device.kind().queues.len() as u64;
    let bring_up = |features: u64| {
        let status = |value| write(0x70, 4, value);
        let mut script = vec![status(0), status(3), write(0x24, 4, 1), write(0x20, 4, feature::VERSION_1 >> 32)];
        script.extend([write(0x24, 4, 0), write(0x20, 4, features), status(0xb)]);
        for queue in queues.clone() {
            script.extend([write(0x30, 4, queue), write(0x38, 4, LONG.into())]);
            let areas = [0x80, 0x90, 0xa0].into_iter().zip(ADDRESSES);
            script.extend(areas.flat_map(|(at, part)| [write(at, 4, queue * SHARE + part), write(at + 4, 4, 0)]));
            script.push(write(0x44, 4, 1));
        }
        script.extend([status(0xf), Step::Service]);
        script
    };
    let notify = queues.clone().map(|queue| vec![write(0x50, 4, queue), Step::Service]);
    let mut scripts: Vec<_> = FEATURES.into_iter().map(bring_up).chain(notify).collect();
    scripts.extend([vec![write(0x70, 4, 0)], vec![write(0x64, 4, 3)], vec![Step::Read { offset: 0x60, width: 4 }]]);
    Shape { areas: vec![(0, 0x110)], scripts }
}

fn functions(device: &impl VirtioDevice) -> Shape {
    let queues = 0..device.kind().queues.len() as u64;
    let bring_up = |features: u64| {
        let common = |at, width, value| write(BAR + at, width, value);
        let status = |value| common(0x14, 1, value);
        let mut script = vec![status(0), status(3), common(8, 4, 1), common(0xc, 4, feature::VERSION_1 >> 32)];
        script.extend([common(8, 4, 0), common(0xc, 4, features), status(0xb), common(0x10, 2, 0)]);
        for queue in queues.clone() {
            script.extend([common(0x16, 2, queue), common(0x18, 2, LONG.into()), common(0x1a, 2, queue + 1)]);
            let areas = [0x20, 0x28, 0x30].into_iter().zip(ADDRESSES);
            script.extend(areas.flat_map(|(at, part)| [common(at, 4, queue * SHARE + part), common(at + 4, 4, 0)]));
            script.push(common(0x1c, 2, 1));
        }
        script.extend([status(0xf), Step::Service]);
        script
    };
    let notify = queues.clone().map(|queue| vec![write(BAR + 0x3000 + 4 * queue, 2, queue), Step::Service]);
    let mut scripts: Vec<_> = FEATURES.into_iter().map(bring_up).chain(notify).collect();
    // MSI-X is the last capability; its entries are unmasked, it is enabled, masked, disabled.
    let control = FUNCTION + 0x40 + 3 * 16 + 20 + 20 + 2;
    let unmask = (0..=queues.end).flat_map(|entry| {
        let at = BAR + 0x4000 + 16 * entry;
        [write(at, 4, 0xfee0_0000), write(at + 8, 4, 0x40 + entry), write(at + 12, 4, 0)]
    });
    scripts.push(unmask.chain([write(control, 2, 0x8000)]).collect());
    scripts.extend([0x8000, 0xc000, 0].map(|value| vec![write(control, 2, value)]));
    // It answers no more, answers elsewhere, comes back; without INTx, and with; reached by the ports.
    scripts.push(vec![write(FUNCTION + 4, 2, 0)]);
    scripts.push(vec![write(FUNCTION + 0x10, 4, BAR + 0x8000)]);
    scripts.push(vec![write(FUNCTION + 0x10, 4, BAR), write(FUNCTION + 4, 2, 6)]);
    scripts.push(vec![write(FUNCTION + 4, 2, 0x406)]);
    scripts.push(vec![write(PORTS, 4, 0x8000_0804), write(PORTS + 4, 2, 6)]);
    // The status by the window in configuration space.
    let window = FUNCTION + 0x40 + 3 * 16 + 20;
    scripts.push(vec![write(window + 4, 1, 0), write(window + 8, 4, 0x14), write(window + 12, 4, 1)]);
    scripts.push(vec![Step::Read { offset: window + 16, width: 1 }]);
    let bar = [(0, 0x40), (0x1000, 4), (0x2000, 8), (0x3000, 8), (0x4000, 0x40), (0x5000, 4)];
    let mut areas = vec![(ECAM, 0x40), (FUNCTION, 0x100), (FUNCTION + 0x1000, 4), (PORTS, 8)];
    areas.extend(bar.map(|(at, size)| (BAR + at, size)));
    Shape { areas, scripts }
}

#[test]
fn the_scripts_reach_what_they_mean() {
    for features in 0..2 {
        let wires = Wires::default();
        let (mut page, shape) = (wires.page(Echo::default()), registers(&Echo::default()));
        play(&mut page, &wires, &shape.scripts[features]);
        assert_eq!((page.read(0x70, 4), page.read(0x60, 4), wires.line.level()), (0xf, 1, true));
        let wires = Wires::default();
        let (mut host, shape) = (wires.slot(Echo::default()), functions(&Echo::default()));
        play(&mut host, &wires, &[&shape.scripts[4][..], &shape.scripts[features]].concat());
        assert_eq!((host.read(BAR + 0x14, 1), wires.line.level(), wires.line.pulses()), (0xf, false, 2));
        play(&mut host, &wires, shape.scripts.iter().rev().nth(1).unwrap());
        let status = Step::Read { offset: FUNCTION + 0x40 + 3 * 16 + 20 + 16, width: 1 };
        assert_eq!(play(&mut host, &wires, &[status]).answers, [0xf]);
        let bytes = &wires.guest.get().unwrap().memory;
        assert_eq!((bytes.load_u16(0x202).unwrap(), bytes.load_u16(SHARE + 0x202).unwrap()), (3, 3));
    }
}
