//! Drivers that do anything to a ring and to both transports, and images that are broken: nothing panics, loops or writes
//! where it must not.
//!
//! Case `i` depends on `BANTAM_SOAK_SEED + i` alone; `cargo xtask soak` runs them by the million.

#![allow(clippy::unwrap_used, missing_docs)]

mod random;

use bantam::device::pci::{ECAM, PORTS};
use bantam::virtio::balloon::{Balloon, Wish};
use bantam::virtio::block::Block;
use bantam::virtio::console::Console;
use bantam::virtio::fuzz::{BAR, Nobody, RAM, Touch, fuzz_ring, fuzz_transport};
use bantam::virtio::net::Net;
use bantam::virtio::rng::Rng;
use bantam::virtio::vsock::Vsock;
use bantam::virtio::{Ring, VirtioDevice};
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder};
use random::Random;

type Storage = imago::file::File;

/// Values that break arithmetic.
const EDGES: [u64; 10] = [0, 1, 2, 0xff, 0x7fff, 0xffff, RAM - 8, 0xffff_ffff, 0xffff_ffff_ffff_fff0, u64::MAX];
/// The areas of a ring that is as it should be.
const AREAS: [u64; 3] = [0, 0x1000, 0x2000];

fn put(ram: &mut [u8], at: u64, bytes: &[u8]) {
    let at = usize::try_from(at).unwrap();
    ram[at..at + bytes.len()].copy_from_slice(bytes);
}

fn descriptor(random: &mut Random, indirect: u64) -> [u8; 16] {
    let edge = random.rarely(40);
    let addr = if edge { random.one(&EDGES) } else { 0x4000 + random.below(0x4000) };
    let size = if random.rarely(40) { random.one(&EDGES) } else { random.below(256) };
    let flags = random.one(&[0, 0, 2, 2, 2, 1, 1, 3, 4]);
    let (addr, size) = if flags & 4 != 0 { (indirect, 16 * (1 + random.below(8))) } else { (addr, size) };
    let next = if random.rarely(40) { random.next() } else { random.below(8) };
    let whole = u128::from(addr) | u128::from(size as u32) << 64 | u128::from(flags) << 96;
    (whole | u128::from(next as u16) << 112).to_le_bytes()
}

/// RAM with a ring of eight in it, most of whose chains are chains.
fn rings(random: &mut Random) -> Vec<u8> {
    let mut ram = vec![0xc5; usize::try_from(RAM).unwrap()];
    for at in 0..8 {
        put(&mut ram, AREAS[0] + 16 * at, &descriptor(random, 0x3000));
        put(&mut ram, 0x3000 + 16 * at, &descriptor(random, 0x3000));
        put(&mut ram, AREAS[1] + 4 + 2 * at, &(random.below(8) as u16).to_le_bytes());
    }
    // Heads of requests: small words, so that many are such as the devices know.
    for at in (0x4000..0x8000).step_by(4).filter(|at| at % 256 < 48) {
        let word =
            if random.rarely(20) { random.next() } else { random.one(&[0, 0, 0, 1, 2, 3, 4, 8, 11, 13, 1 << 16 | 5]) };
        put(&mut ram, at, &(word as u32).to_le_bytes());
    }
    let index = if random.rarely(20) { random.next() } else { random.below(9) };
    put(&mut ram, AREAS[1], &[&[0, 0], &(index as u16).to_le_bytes()[..]].concat());
    for _ in 0..random.below(3) {
        let (at, value) = (random.below(RAM - 8), random.next());
        put(&mut ram, at, &value.to_le_bytes());
    }
    ram
}

fn bring_up(random: &mut Random, pci: bool) -> Vec<Touch> {
    // In a page of registers, in the BAR, and how wide there.
    let at = |page: u64, bar: u64, width: usize, value: u64| match pci {
        true => Touch::Write(BAR + bar, width, value),
        false => Touch::Write(page, 4, value),
    };
    let features = random.one(&[1 << 28 | 1 << 29, 1 << 28, 0]);
    let mut touches = vec![at(0x70, 0x14, 1, 0), at(0x70, 0x14, 1, 3), at(0x24, 8, 4, 1), at(0x20, 0xc, 4, 1)];
    touches.extend([at(0x24, 8, 4, 0), at(0x20, 0xc, 4, features), at(0x70, 0x14, 1, 0xb)]);
    // The queues lie upon each other, or there is one.
    let queues = 1 + random.below(3);
    for queue in 0..queues {
        touches.extend([at(0x30, 0x16, 2, queue), at(0x38, 0x18, 2, 8)]);
        let areas = [(0x80, 0x20), (0x90, 0x28), (0xa0, 0x30)].into_iter().zip(AREAS);
        touches.extend(areas.flat_map(|((page, bar), area)| [at(page, bar, 4, area), at(page + 4, bar + 4, 4, 0)]));
        touches.push(at(0x44, 0x1c, 2, 1));
    }
    touches.extend([at(0x70, 0x14, 1, 0xf), Touch::Turn]);
    touches.extend((0..queues).flat_map(|queue| [at(0x50, 0x3000 + 4 * queue, 2, queue), Touch::Turn]));
    touches
}

fn anything(random: &mut Random, pci: bool) -> Touch {
    let width = random.one(&[1, 2, 4, 4]) as usize;
    let offset = match random.below(if pci { 10 } else { 1 }) {
        _ if !pci => random.below(0x44) * 4,
        0..3 => BAR + random.below(0x40),
        3..5 => BAR + random.one(&[0x1000, 0x2000, 0x3000, 0x4000, 0x5000]) + random.below(0x40),
        5..8 => ECAM + 0x8000 + random.below(0x100),
        8 => PORTS + random.below(8),
        _ => ECAM + random.below(1 << 20),
    };
    let value = match random.below(3) {
        0 => random.one(&EDGES),
        1 => random.below(0x100),
        _ => random.next(),
    } & (u64::MAX >> (64 - 8 * width));
    match random.below(8) {
        0..4 => Touch::Write(offset, width, value),
        4 => Touch::Read(offset, width),
        5 => Touch::Poke(random.below(0x3100), random.next()),
        6 => Touch::Turn,
        _ => Touch::Restore,
    }
}

fn touches(random: &mut Random, pci: bool) -> Vec<Touch> {
    let mut all = Vec::new();
    for _ in 0..=random.below(3) {
        let mut up = bring_up(random, pci);
        for _ in 0..random.below(8) {
            let at = random.index(up.len());
            let touch = anything(random, pci);
            if random.rarely(2) { up.insert(at, touch) } else { up.push(touch) }
        }
        all.extend(up);
    }
    all
}

/// Runs a case for each number; gives how many it was that came through the first door.
fn cases(each: impl Fn(Random) -> bool + std::panic::RefUnwindSafe) {
    let (seed, count) = random::sample(1000);
    let mut good = 0;
    for case in seed..seed.saturating_add(count) {
        let outcome = std::panic::catch_unwind(|| each(Random(case)));
        assert!(outcome.is_ok(), "case {case}");
        good += u64::from(outcome.unwrap());
    }
    // Most must be turned down late, or the test is worth nothing.
    assert!(count < 500 || good > count / 10, "{good} of {count}");
}

#[test]
fn no_ring_breaks_a_queue() {
    cases(|mut random| {
        let ram = rings(&mut random);
        let mut area = |good: u64| if random.rarely(20) { random.next() & 0xfff0 } else { good };
        let [descriptors, available, used] = AREAS.map(&mut area);
        let next_used = if random.rarely(4) { 65_530 } else { 0 };
        let size = random.one(&[8, 8, 8, 8, 4, 0, 16, 0xffff]) as u16;
        let ring = Ring { size, ready: true, descriptors, available, used, next_available: 0, next_used };
        let options = [random.rarely(2), !random.rarely(8)];
        fuzz_ring(&ram, ring, options).unwrap() > 0
    });
}

/// One of the devices, with far ends of its own.
fn device(kind: u64) -> Box<dyn VirtioDevice> {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let words = |text: String| text.parse().unwrap();
    match kind {
        0 => Box::new(Rng),
        1 => {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(RAM).unwrap();
            Box::new(Block::new(&words(file.path().display().to_string())).unwrap())
        }
        2 => {
            let words = words(format!("socket:{},listen", path("wire")));
            Box::new(Net::new(&words, None, 0).unwrap())
        }
        3 => Box::new(Vsock::new(&words(format!("cid=3,path={}", path("v")))).unwrap()),
        4 => Box::new(Console::new(Box::new(Nobody::new().unwrap()))),
        _ => Box::new(Balloon::new(Wish::new().unwrap())),
    }
}

fn transport(mut random: Random, pci: bool) -> bool {
    let kind = random.below(6);
    let (ram, touches) = (rings(&mut random), touches(&mut random, pci));
    fuzz_transport(&|| device(kind), pci, &ram, &touches).unwrap()
}

#[test]
fn no_driver_breaks_a_page_of_registers() {
    cases(|random| transport(random, false));
}

#[test]
fn no_driver_breaks_a_pci_function() {
    cases(|random| transport(random, true));
}

/// An image of 1 MiB of which a little was written, as bytes.
fn image(path: &std::path::Path) -> Vec<u8> {
    let file = std::fs::File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
    let storage = Storage::try_from(file.try_clone().unwrap()).unwrap();
    Qcow2::<Storage>::create_builder(storage).size(1 << 20).create().unwrap();
    let storage = Storage::try_from(file).unwrap();
    let image = Qcow2::<Storage>::builder(storage).write(true).open(DenyImplicitOpenGate::default()).unwrap();
    let image = FormatAccess::new(image);
    image.write(&[7u8; 4096][..], 0x3000).unwrap();
    image.flush().unwrap();
    drop(image);
    std::fs::read(path).unwrap()
}

#[test]
fn no_image_breaks_a_disk() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let good = image(&path);
    let used: Vec<usize> = (0..good.len()).filter(|at| good[*at] != 0).collect();
    cases(|mut random| {
        let mut bytes = good.clone();
        for _ in 0..random.below(4) {
            // Beside what means something: fields are of up to eight bytes, the highest first.
            let at = used[random.index(used.len())].saturating_sub(random.index(8)).min(bytes.len() - 8);
            let edge = random.one(&EDGES) << random.below(40);
            let size = [1, 2, 4, 8][random.index(4)];
            bytes[at..at + size].copy_from_slice(&edge.to_be_bytes()[8 - size..]);
        }
        if random.rarely(8) {
            bytes.truncate(random.index(bytes.len()));
        }
        std::fs::write(&path, &bytes).unwrap();
        let Ok(disk) = Block::new(&format!("{},format=qcow2", path.display()).parse().unwrap()) else { return false };
        // What is read and written then is a property beside the code.
        let capacity = disk.space().first_chunk().copied().map_or(0, u64::from_le_bytes);
        assert!(capacity > 0);
        true
    });
}
