//! A bare-metal guest that drives each virtio device it finds, on PCI and on pages of registers, with drivers that are not
//! Bantam's. It prints a line for each and ends with the debug exit: 0 if all did what they should.
//!
//! It polls: interrupts are Linux's to test. It is entered in 64-bit mode with a stack, and has no MMU of its own to set up.

#![no_std]
#![no_main]

extern crate alloc;

mod platform;

use alloc::vec;
use core::fmt::Write as _;
use core::ptr::NonNull;

use virtio_drivers::device::blk::{SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::device::console::VirtIOConsole;
use virtio_drivers::device::net::VirtIONet;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::device::socket::{VirtIOSocket, VsockAddr, VsockConnectionManager, VsockEventType};
use virtio_drivers::transport::mmio::{MmioTransport, VirtIOHeader};
use virtio_drivers::transport::pci::bus::{Cam, Command, MmioCam, PciRoot};
use virtio_drivers::transport::pci::{PciTransport, virtio_device_type};
use virtio_drivers::transport::{DeviceType, Transport};

use crate::platform::{Pages, Serial, exit};

/// Where Bantam's x86-64 machine has ECAM, and its pages of registers.
const ECAM: usize = 0xc000_0000;
const PAGES: usize = 0xc800_0000;
const PAGE: usize = 0x1000;

/// How long a frame can be.
const FRAME: usize = 2048;
/// What the test's far end listens on.
const PORT: u32 = 1234;

#[unsafe(no_mangle)]
extern "C" fn _start() -> ! {
    let found = on_pages() + on_pci();
    let _ = writeln!(Serial, "devices: {found}");
    exit(u8::from(found == 0))
}

/// Fails with a line that says where.
fn check(what: &str, right: bool) {
    if !right {
        let _ = writeln!(Serial, "WRONG: {what}");
        exit(1);
    }
}

fn on_pages() -> usize {
    let mut found = 0;
    for at in (PAGES..).step_by(PAGE) {
        let Some(header) = NonNull::new(at as *mut VirtIOHeader) else { break };
        // SAFETY: a page of registers, or the empty bus, which reads all ones.
        match unsafe { MmioTransport::new(header, PAGE) } {
            Ok(transport) => drive(transport),
            Err(_) => break,
        }
        found += 1;
    }
    found
}

fn on_pci() -> usize {
    // SAFETY: ECAM, or the empty bus.
    let mut root = PciRoot::new(unsafe { MmioCam::new(ECAM as *mut u8, Cam::Ecam) });
    let functions: vec::Vec<_> =
        root.enumerate_bus(0).filter(|(_, info)| virtio_device_type(info).is_some()).map(|(at, _)| at).collect();
    for at in &functions {
        root.set_command(*at, Command::MEMORY_SPACE | Command::BUS_MASTER);
        match PciTransport::new::<Pages, _>(&mut root, *at) {
            Ok(transport) => drive(transport),
            Err(_) => check("the PCI transport", false),
        }
    }
    functions.len()
}

fn drive(transport: impl Transport) {
    match transport.device_type() {
        DeviceType::EntropySource => entropy(transport),
        DeviceType::Block => block(transport),
        DeviceType::Console => console(transport),
        DeviceType::Network => network(transport),
        DeviceType::Socket => socket(transport),
        other => {
            let _ = writeln!(Serial, "no driver for {}", other as u32);
        }
    }
}

fn entropy(transport: impl Transport) {
    let Ok(mut device) = VirtIORng::<Pages, _>::new(transport) else { return check("rng", false) };
    let (mut one, mut two) = ([0; 32], [0; 32]);
    let sizes = (device.request_entropy(&mut one).ok(), device.request_entropy(&mut two).ok());
    check("rng gives as much as there is room for", sizes == (Some(32), Some(32)));
    check("rng gives something else each time", one != two && one != [0; 32]);
    let _ = writeln!(Serial, "rng: ok");
}

fn block(transport: impl Transport) {
    let Ok(mut device) = VirtIOBlk::<Pages, _>::new(transport) else { return check("block", false) };
    let mut first = [0; SECTOR_SIZE];
    check("block reads", device.read_blocks(0, &mut first).is_ok());
    if !device.readonly() {
        let pattern: vec::Vec<u8> = (0..8 * SECTOR_SIZE).map(|at| (at / SECTOR_SIZE) as u8 ^ at as u8).collect();
        let mut back = vec![0; pattern.len()];
        check("block writes", device.write_blocks(3, &pattern).is_ok() && device.flush().is_ok());
        check("block reads again", device.read_blocks(3, &mut back).is_ok() && back == pattern);
    } else {
        check("block refuses to write", device.write_blocks(0, &first).is_err());
    }
    let capacity = device.capacity() as usize;
    check("block ends at its end", device.read_blocks(capacity, &mut first).is_err());
    let mut id = [0; 20];
    let size = device.device_id(&mut id).unwrap_or(0);
    let id = core::str::from_utf8(id.get(..size).unwrap_or_default()).unwrap_or("?");
    let _ = writeln!(Serial, "block: ok, {capacity} sectors, id {id}, begins with {:?}", first[0] as char);
}

fn console(transport: impl Transport) {
    let Ok(mut device) = VirtIOConsole::<Pages, _>::new(transport) else { return check("console", false) };
    check("console sends", device.send_bytes(b"who is there?\n").is_ok());
    let mut line = vec![];
    while line.last() != Some(&b'\n') {
        match device.recv(true) {
            Ok(Some(byte)) => line.push(byte),
            Ok(None) => core::hint::spin_loop(),
            Err(_) => return check("console receives", false),
        }
    }
    check("console sends back", device.send_bytes(&line).is_ok());
    let _ = writeln!(Serial, "console: ok");
}

fn network(transport: impl Transport) {
    let Ok(mut device) = VirtIONet::<Pages, _, 16>::new(transport, FRAME) else { return check("net", false) };
    let mac = device.mac_address();
    for round in 0..20u8 {
        let mut frame = device.new_tx_buffer(64 + usize::from(round) * 70);
        let bytes = frame.packet_mut();
        bytes.iter_mut().enumerate().for_each(|(at, byte)| *byte = at as u8 ^ round);
        bytes[..6].fill(0xff);
        bytes[6..12].copy_from_slice(&mac);
        let sent = bytes.to_vec();
        check("net sends", device.send(frame).is_ok());
        let back = loop {
            match device.receive() {
                Ok(buffer) => break buffer,
                Err(virtio_drivers::Error::NotReady) => core::hint::spin_loop(),
                Err(_) => return check("net receives", false),
            }
        };
        check("net gives back what was sent", back.packet() == sent);
        check("net takes its buffer back", device.recycle_rx_buffer(back).is_ok());
    }
    let _ = writeln!(Serial, "net: ok");
}

fn socket(transport: impl Transport) {
    let Ok(device) = VirtIOSocket::<Pages, _, 4096>::new(transport) else { return check("vsock", false) };
    let mut manager = VsockConnectionManager::new(device);
    let host = VsockAddr { cid: 2, port: PORT };
    check("vsock connects", manager.connect(host, 99).is_ok());
    let mut answer = vec![];
    while answer.len() < 4 {
        match manager.wait_for_event().map(|event| event.event_type) {
            Ok(VsockEventType::Connected) => check("vsock sends", manager.send(host, 99, b"ping").is_ok()),
            Ok(VsockEventType::Received { .. }) => {
                let mut buffer = [0; 64];
                let size = manager.recv(host, 99, &mut buffer).unwrap_or(0);
                answer.extend_from_slice(&buffer[..size]);
            }
            Ok(VsockEventType::CreditUpdate) => {}
            _ => return check("vsock is answered", false),
        }
    }
    check("vsock receives", answer == b"pong");
    check("vsock closes", manager.shutdown(host, 99).is_ok());
    let _ = writeln!(Serial, "vsock: ok");
}
