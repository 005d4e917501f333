//! The card between a driver and a wire: one of the test's own, sockets, and a tap interface where this host lets us have one.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::host::skipped;
use crate::virtio::tests::{Rig, host_is_emulated, send_with_descriptor};

const RX: usize = 0;
const TX: usize = 1;
const MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);

#[derive(Default)]
struct Ends {
    down: bool,
    full: bool,
    to_guest: VecDeque<Vec<u8>>,
    from_guest: Vec<(usize, Vec<u8>)>,
    begun: Vec<(u64, usize)>,
}

/// A wire of the test's own, and the frame that was not taken yet.
#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Ends>>, Vec<u8>);

impl Wire for Fake {
    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    fn offers(&self) -> u64 {
        feature::CSUM
    }

    fn begin(&mut self, features: u64, pairs: usize) {
        self.0.lock().unwrap().begun.push((features, pairs));
    }

    fn wake(&mut self, source: usize, _ended: bool) -> usize {
        source
    }

    fn receive(&mut self, _pair: usize) -> Option<&mut [u8]> {
        if self.1.is_empty() {
            self.1 = [vec![0xcc; HEADER], self.0.lock().unwrap().to_guest.pop_front()?].concat();
        }
        Some(&mut self.1)
    }

    fn taken(&mut self, _pair: usize) -> bool {
        self.1.clear();
        true
    }

    fn send(&mut self, pair: usize, chain: &mut Chain) -> Sent {
        let mut ends = self.0.lock().unwrap();
        if ends.full {
            return Sent::Later;
        }
        let mut frame = vec![0; chain.left_to_read() as usize];
        chain.read(&mut frame);
        ends.from_guest.push((pair, frame));
        Sent::Gone
    }

    fn is_up(&self) -> bool {
        !self.0.lock().unwrap().down
    }
}

fn fake(pairs: usize) -> (Fake, Rig<Net>) {
    let wire = Fake::default();
    let rig = Rig::new(Net::with(Box::new(wire.clone()), MAC, None, pairs));
    (wire, rig)
}

fn frame(size: usize) -> Vec<u8> {
    (0..size).map(|n| (n % 251) as u8).collect()
}

fn used<D: VirtioDevice>(rig: &mut Rig<D>, queue: usize) -> Vec<Vec<u8>> {
    std::iter::from_fn(|| rig.drivers[queue].used()).map(|used| used.written).collect()
}

#[test]
fn a_frame_is_spread_over_as_many_buffers_as_it_takes() {
    let (wire, mut rig) = fake(1);
    wire.0.lock().unwrap().to_guest.extend([frame(100), frame(4000)]);
    rig.wake(Wake::Source(0));
    // Without a buffer nothing is taken from the wire.
    assert_eq!(wire.0.lock().unwrap().to_guest.len(), 2);
    (0..3).for_each(|_| _ = rig.drivers[RX].add(&[], &[1500]));
    rig.kick(RX);
    let got = used(&mut rig, RX);
    assert_eq!((got.len(), &got[0][HEADER..]), (1, &frame(100)[..]));
    assert_eq!(got[0][NUM_BUFFERS..HEADER], [1, 0]);
    // The second waits for one more, and has the two there are again.
    assert_eq!(rig.drivers[RX].out(), 2);
    rig.drivers[RX].add(&[], &[600, 900]);
    rig.kick(RX);
    let got = used(&mut rig, RX);
    assert_eq!(got.iter().map(Vec::len).collect::<Vec<_>>(), [1500, 1500, 1012]);
    assert_eq!((&got.concat()[HEADER..], got[0][NUM_BUFFERS]), (&frame(4000)[..], 3));
    assert!(!rig.is_broken());
}

#[test]
fn a_frame_that_fits_nowhere_does_not_stop_the_next() {
    let wire = Fake::default();
    let device = Net::with(Box::new(wire.clone()), MAC, None, 1);
    let mut rig = Rig::with_features(device, 0);
    rig.drivers[RX].add(&[], &[1514 + HEADER as u32]);
    wire.0.lock().unwrap().to_guest.extend([frame(1515), frame(13), frame(1514)]);
    rig.wake(Wake::Source(0));
    let got = used(&mut rig, RX);
    assert_eq!((got.len(), &got[0][HEADER..], got[0][NUM_BUFFERS]), (1, &frame(1514)[..], 1));
    // With buffers of a byte each no number of them is enough for the largest.
    let (wire, mut rig) = fake(1);
    (0..256).for_each(|_| _ = rig.drivers[RX].add(&[], &[1]));
    wire.0.lock().unwrap().to_guest.extend([frame(65_000), frame(60)]);
    rig.wake(Wake::Source(0));
    assert_eq!(used(&mut rig, RX).concat()[HEADER..], frame(60));
    assert_eq!(rig.drivers[RX].out(), 256 - 60 - HEADER);
}

#[test]
fn a_wire_that_is_full_leaves_frames_with_the_driver() {
    let (wire, mut rig) = fake(1);
    wire.0.lock().unwrap().full = true;
    let sent = [vec![0; HEADER], frame(60)].concat();
    assert!(rig.ask(TX, &[&sent[..7], &sent[7..]], &[]).is_none());
    wire.0.lock().unwrap().full = false;
    rig.wake(Wake::Source(0));
    assert!(rig.drivers[TX].used().is_some());
    assert_eq!(wire.0.lock().unwrap().from_guest, [(0, sent)]);
    // Too short and too long ones come back, and go nowhere.
    for size in [0, 1, HEADER, LEAST - 1, FRAME + 1, 200_000] {
        assert!(rig.ask(TX, &[&vec![1; size]], &[]).is_some());
    }
    assert!(rig.ask(TX, &[&vec![1; FRAME]], &[]).is_some());
    assert_eq!(wire.0.lock().unwrap().from_guest.len(), 2);
}

#[test]
fn the_driver_says_how_many_queues_it_uses() {
    let (wire, mut rig) = fake(3);
    assert_eq!((rig.device.kind().queues.len(), rig.device.space()[8]), (7, 3));
    let mut ask = |command: &[u8]| rig.ask(6, &[command], &[1]).unwrap().written;
    for bad in [&[4, 0, 0, 0][..], &[4, 0, 4, 0], &[4, 0, 3], &[4, 1, 2, 0], &[0, 0, 1, 0], &[]] {
        assert_eq!(ask(bad), [ERR], "{bad:?}");
    }
    assert_eq!(ask(&[4, 0, 3, 0]), [OK]);
    let begun = wire.0.lock().unwrap().begun.iter().map(|(_, pairs)| *pairs).collect::<Vec<_>>();
    assert_eq!(begun, [1, 3]);
    let sent = [vec![0; HEADER], frame(60)].concat();
    assert!(rig.ask(5, &[&sent], &[]).is_some());
    assert_eq!(wire.0.lock().unwrap().from_guest[0].0, 2);
    // It is kept with the device, and forgotten when that is reset.
    let saved = rig.device.save();
    let mut fresh = Net::with(Box::new(Fake::default()), MAC, None, 3);
    fresh.load(&saved).unwrap();
    assert_eq!(fresh.used, 3);
    assert!(Net::with(Box::new(Fake::default()), MAC, None, 2).load(&saved).is_err());
}

#[test]
fn p39_the_guest_is_shown_a_link_that_goes() {
    let (wire, mut rig) = fake(1);
    assert_eq!(rig.device.space()[6], 1);
    wire.0.lock().unwrap().down = true;
    rig.wake(Wake::Source(0));
    assert!(std::mem::take(&mut rig.active.space_changed) && rig.device.space()[6] == 0);
    rig.wake(Wake::Source(0));
    assert!(!rig.active.space_changed);
    wire.0.lock().unwrap().down = false;
    rig.kick(TX);
    assert!(rig.active.space_changed && rig.device.space()[6] == 1);
}

/// A card that listens, and the other end.
fn listening() -> (tempfile::TempDir, PathBuf, Rig<Net>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wire");
    let words = format!("socket:{},listen,mtu=9000", path.display());
    let rig = Rig::new(Net::new(&words.parse().unwrap(), Some("a"), 0).unwrap());
    (folder, path, rig)
}

fn wrapped(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes()[..], frame].concat()
}

/// A process that is being started has for a moment what this one had open: who looks whether a peer is gone waits for it.
static STARTING: RwLock<()> = RwLock::new(());

fn nobody_starts() -> RwLockReadGuard<'static, ()> {
    STARTING.read().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn two_cards_are_joined_by_a_socket() {
    let _nobody = nobody_starts();
    let (_folder, path, mut left) = listening();
    assert_eq!((left.device.space()[6], &left.device.space()[10..]), (0, &9000u16.to_le_bytes()[..]));
    // While nobody is there frames are lost.
    let sent = |n: usize| [vec![0; HEADER], frame(60 + n)].concat();
    assert!(left.ask(TX, &[&sent(0)], &[]).is_some());
    let words = format!("socket:{}", path.display());
    let mut right = Rig::new(Net::new(&words.parse().unwrap(), Some("b"), 0).unwrap());
    left.wake(Wake::Source(0));
    assert!(left.device.space()[6] == 1 && right.device.space()[6] == 1);
    for n in 0..1000 {
        let (from, to) = if n % 2 == 0 { (&mut left, &mut right) } else { (&mut right, &mut left) };
        assert!(from.ask(TX, &[&sent(n)], &[]).is_some());
        to.drivers[RX].add(&[], &[2048]);
        to.wake(Wake::Source(0));
        to.kick(RX);
        assert_eq!(used(to, RX).concat()[HEADER..], frame(60 + n));
    }
    // One ends; the other's link is down, and up again with the next one.
    drop(right);
    left.wake(Wake::Source(0));
    left.drivers[RX].add(&[], &[2048]);
    left.kick(RX);
    assert_eq!(left.device.space()[6], 0);
    let _next = UnixStream::connect(&path).unwrap();
    left.wake(Wake::Source(0));
    assert_eq!(left.device.space()[6], 1);
}

#[test]
fn p39_a_peer_that_leaves_is_missed_once_all_that_it_said_was_heard() {
    let _nobody = nobody_starts();
    let (_folder, path, mut rig) = listening();
    (0..6).for_each(|_| _ = rig.drivers[RX].add(&[], &[2048]));
    // It leaves before anybody looks, or after: then there is another event.
    for (event, up) in [(Wake::Ended(1), 0), (Wake::Source(1), 1)] {
        let mut peer = UnixStream::connect(&path).unwrap();
        rig.wake(Wake::Source(0));
        assert!(rig.device.space()[6] == 1 && std::mem::take(&mut rig.active.sources_changed));
        peer.write_all(&[wrapped(&frame(60)), wrapped(&frame(70))].concat()).unwrap();
        let kept = (up == 1).then_some(peer);
        rig.wake(event);
        let got: Vec<_> = used(&mut rig, RX).iter().map(|frame| frame.len() - HEADER).collect();
        assert_eq!((got, rig.device.space()[6]), (vec![60, 70], up));
        drop(kept);
        rig.wake(Wake::Ended(1));
        assert_eq!(rig.device.space()[6], 0);
    }
}

/// The kernel gives what was sent with a descriptor by itself, however much follows.
#[test]
fn descriptors_that_come_along_hold_nothing_up() {
    let (_folder, path, mut rig) = listening();
    (0..4).for_each(|_| _ = rig.drivers[RX].add(&[], &[2048]));
    let mut peer = UnixStream::connect(&path).unwrap();
    rig.wake(Wake::Source(0));
    send_with_descriptor(&peer, &wrapped(&frame(60)));
    peer.write_all(&wrapped(&frame(70))).unwrap();
    rig.wake(Wake::Source(1));
    let got: Vec<_> = used(&mut rig, RX).iter().map(|frame| frame.len() - HEADER).collect();
    assert_eq!(got, [60, 70]);
}

#[test]
fn p39_a_peer_that_does_not_read_holds_back_and_one_that_lies_is_hung_up_on() {
    let (_folder, path, mut rig) = listening();
    let mut peer = UnixStream::connect(&path).unwrap();
    rig.wake(Wake::Source(0));
    let sent = [vec![0; HEADER], frame(60_000)].concat();
    let mut count = 0;
    while rig.ask(TX, &[&sent], &[]).is_some() {
        count += 1;
        assert!(count < 1000, "it takes without end");
    }
    // All that was taken arrives whole, and in its order, and then the one that was left.
    peer.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    for _ in 0..=count {
        let mut bytes = vec![0; 60_004];
        let (first, rest) = bytes.split_at_mut(30_000);
        peer.read_exact(first).unwrap();
        rig.wake(Wake::Source(0));
        peer.read_exact(rest).unwrap();
        assert!(bytes == wrapped(&frame(60_000)));
        rig.wake(Wake::Source(0));
    }
    assert!(rig.drivers[TX].used().is_some());
    // Frames in pieces, and several at once.
    let bytes = [wrapped(&frame(60)), wrapped(&frame(70)), wrapped(&frame(65_535))].concat();
    (0..40).for_each(|_| _ = rig.drivers[RX].add(&[], &[4096]));
    let mut got = Vec::new();
    for piece in bytes.chunks(1000) {
        peer.write_all(piece).unwrap();
        rig.wake(Wake::Source(0));
        got.extend(used(&mut rig, RX));
    }
    assert_eq!((&got[0][HEADER..], &got[1][HEADER..]), (&frame(60)[..], &frame(70)[..]));
    assert!(got[2..].concat()[HEADER..] == frame(65_535));
    // A length that no frame has.
    for size in [u32::MAX, 0, 13, FRAME as u32] {
        peer.write_all(&size.to_be_bytes()).unwrap();
        rig.wake(Wake::Source(0));
        assert_eq!((rig.device.space()[6], peer.read(&mut [0]).unwrap_or(0)), (0, 0), "{size}");
        peer = UnixStream::connect(&path).unwrap();
        rig.wake(Wake::Source(0));
        assert_eq!(rig.device.space()[6], 1);
    }
}

/// An interface of the test's own, as long as it lasts.
struct Interface(String);

impl Interface {
    fn new() -> Option<Self> {
        let own = Self(format!("bt{}", std::process::id()));
        ip(&format!("tuntap add {} mode tap multi_queue", own.0)).then_some(own)
    }
}

impl Drop for Interface {
    fn drop(&mut self) {
        ip(&format!("link del {}", self.0));
    }
}

fn ip(words: &str) -> bool {
    let _alone = STARTING.write().unwrap_or_else(PoisonError::into_inner);
    let status = std::process::Command::new("ip").args(words.split(' ')).output();
    status.is_ok_and(|output| output.status.success())
}

#[test]
fn p39_a_tap_interface_that_goes_away_is_a_link_that_is_down() {
    let Some(interface) = Interface::new() else {
        return skipped("no tap interface can be made here, or there is no ip");
    };
    let name = interface.0.as_str();
    let start = |words: String| Net::new(&words.parse().unwrap(), None, 0);
    let said = start(format!("tap:{name}x")).err().unwrap().to_string();
    assert!(said.contains("no such interface"), "{said}");
    let mut rig = Rig::new(start(format!("tap:{name},queues=2")).unwrap());
    assert!(rig.device.features() & feature::GUEST_TSO4 != 0);
    assert!(start(format!("tap:{name}")).is_err(), "a second machine, with one queue");
    let sent = [vec![0; HEADER], vec![0xff; 12], vec![8, 6], vec![0; 46]].concat();
    // It is not switched on: what is sent is lost, and the guest sees why.
    assert!(rig.ask(TX, &[&sent], &[]).is_some());
    assert_eq!(rig.device.space()[6], 0);
    assert!(ip(&format!("link set {name} up")));
    rig.wake(Wake::Source(0));
    assert!(rig.ask(TX, &[&sent], &[]).is_some());
    assert_eq!(rig.device.space()[6], 1);
    // The host sends something of its own when an interface comes up (IPv6), or when it is asked to.
    (0..8).for_each(|_| _ = rig.drivers[RX].add(&[], &[2048]));
    ip(&format!("neigh add 192.0.2.2 lladdr 02:00:00:00:00:02 dev {name}"));
    ip(&format!("addr add 192.0.2.1/24 dev {name}"));
    let socket = std::net::UdpSocket::bind("192.0.2.1:0").unwrap();
    // It takes the host a moment to use an interface that has come up; whose frame comes first is not ours to say.
    let mut frames = Vec::new();
    let heard = (0..100).any(|_| {
        socket.send_to(b"hello", "192.0.2.2:9").unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        rig.wake(Wake::Source(0));
        let new = used(&mut rig, RX);
        new.iter().for_each(|_| _ = rig.drivers[RX].add(&[], &[2048]));
        frames.extend(new);
        frames.iter().any(|frame: &Vec<u8>| frame.len() > HEADER + 14)
    });
    assert!(heard, "{frames:x?}");
    // Both queues, then one again.
    assert_eq!(rig.ask(4, &[&[4, 0, 2, 0]], &[1]).unwrap().written, [OK]);
    assert!(rig.ask(3, &[&sent], &[]).is_some());
    assert_eq!(rig.ask(4, &[&[4, 0, 1, 0]], &[1]).unwrap().written, [OK]);
    rig.wake(Wake::Source(1));
    assert_eq!(rig.device.space()[6], 1);
    (0..8).for_each(|_| _ = rig.drivers[RX].add(&[], &[2048]));
    assert!(ip(&format!("link del {name}")));
    rig.wake(Wake::Source(0));
    assert_eq!(rig.device.space()[6], 0);
    for _ in 0..100 {
        assert!(rig.ask(TX, &[&sent], &[]).is_some());
        rig.wake(Wake::Source(0));
    }
    assert_eq!(rig.device.space()[6], 0);
}

/// Where passt is installed: it answers for any address of its network.
#[test]
fn passt_answers_and_its_end_is_a_link_that_is_down() {
    if host_is_emulated() {
        return skipped("a test host has no way out that passt could show; tests/net.rs makes one there");
    }
    let Ok(device) = Net::new(&"user".parse().unwrap(), None, 0) else { return skipped("there is no passt") };
    let mut rig = Rig::new(device);
    let mac = rig.device.mac.0;
    let [who, ours, nobody, theirs]: [&[u8]; 4] =
        [&[0, 1, 8, 0, 6, 4, 0, 1], &[10, 0, 0, 1], &[0; 6], &[10, 99, 99, 99]];
    let asked = [&[0; HEADER][..], &[0xff; 6], &mac, &[8, 6], who, &mac, ours, nobody, theirs, &[0; 18]].concat();
    let mut answer = Vec::new();
    for _ in 0..200 {
        assert!(rig.ask(TX, &[&asked], &[]).is_some());
        rig.drivers[RX].add(&[], &[2048]);
        rig.kick(RX);
        std::thread::sleep(Duration::from_millis(20));
        rig.wake(Wake::Source(0));
        answer.extend(used(&mut rig, RX).into_iter().filter(|frame| frame[HEADER + 12..].starts_with(&[8, 6])));
        if !answer.is_empty() {
            break;
        }
    }
    assert!(answer[0][HEADER..].starts_with(&mac) && answer[0][HEADER + 28..].starts_with(theirs), "{answer:?}");
    drop(rig);
    // Whom this thread has started, and not waited for.
    assert_eq!(std::fs::read_to_string("/proc/thread-self/children").unwrap_or_default(), "");
}

#[test]
fn words_are_checked() {
    let new = |words: &str| Net::new(&words.parse().unwrap(), None, 0).err().map(|e| format!("{e:#}"));
    let long = format!("socket:{}", "x".repeat(120));
    let bad = ["", "tap", "tap:", "socket", "users", "user:x", "user,queues=2", "socket:/nobody/there", &long];
    let more = ["user,mac=1", "user,mac=03:00:00:00:00:01", "user,mac=00:00:00:00:00:00", "user,mtu=67", "user,x"];
    for words in bad.into_iter().chain(more).chain(["tap:x,queues=9", "tap:x,queues=0", "tap:x,listen"]) {
        let said = new(words).unwrap_or_else(|| panic!("{words} is taken"));
        assert!(said.contains("--net"), "{said}");
    }
}

#[test]
fn a_machines_address_is_its_own_and_always_the_same() {
    assert_eq!(Mac::of("web", 0), Mac([0xda, 0x6c, 0xa0, 0xa6, 0xa7, 0x11]));
    let mut all: Vec<_> = ["web", "db", "weC"].iter().flat_map(|name| [0, 1].map(|n| Mac::of(name, n).0)).collect();
    assert!(all.iter().all(|mac| mac[0] & 3 == 2));
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 6);
    assert_eq!("52:54:00:12:34:5f".parse(), Ok(Mac([0x52, 0x54, 0, 0x12, 0x34, 0x5f])));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_hostile_driver_breaks_nothing(
        acts in prop::collection::vec((0u8..5, prop::collection::vec(0usize..70_000, 0..3), any::<[u8; 6]>()), 1..60),
        merge in any::<bool>(),
    ) {
        let wire = Fake::default();
        let device = Net::with(Box::new(wire.clone()), MAC, None, 2);
        let features = device.features() & !if merge { 0 } else { feature::MRG_RXBUF };
        let mut rig = Rig::with_features(device, features);
        let mut room = 0;
        for (act, sizes, bytes) in acts {
            match act {
                0 if rig.drivers[TX].out() == 0 && !sizes.is_empty() => {
                    let parts: Vec<_> = sizes.iter().map(|size| vec![bytes[0]; *size]).collect();
                    let parts: Vec<_> = parts.iter().map(Vec::as_slice).collect();
                    rig.drivers[TX].add(&parts, &[]);
                    rig.kick(TX);
                }
                1 if room + sizes.iter().sum::<usize>() < 1_500_000 && !sizes.is_empty() => {
                    let sizes: Vec<_> = sizes.iter().map(|size| if bytes[0] < 128 { size % 2000 } else { *size } as u32).collect();
                    room += sizes.iter().map(|size| *size as usize + 16).sum::<usize>();
                    rig.drivers[RX].add(&[], &sizes);
                    rig.kick(RX);
                }
                2 => _ = rig.ask(4, &[&bytes], &[u32::from(bytes[5] & 1)]),
                3 => wire.0.lock().unwrap().to_guest.extend(sizes.iter().map(|size| frame(size % (FRAME - HEADER)))),
                _ => rig.wake(Wake::Source(usize::from(bytes[1]))),
            }
            while rig.drivers[TX].used().is_some() || rig.drivers[4].used().is_some() {}
            let got = used(&mut rig, RX);
            let mut rest = got.as_slice();
            while !rest.is_empty() {
                let bytes = rest.concat();
                let count = usize::from(u16::from_le_bytes([bytes[NUM_BUFFERS], bytes[NUM_BUFFERS + 1]]));
                let (own, others) = rest.split_at(count);
                let whole = own.concat();
                prop_assert!(whole[HEADER..] == frame(whole.len() - HEADER));
                rest = others;
            }
            if rig.drivers[RX].out() == 0 {
                room = 0;
            }
            prop_assert!(!rig.is_broken());
        }
    }
}
