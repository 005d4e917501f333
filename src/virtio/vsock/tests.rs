//! The device between a driver that speaks the protocol and clients and servers of the host's.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixListener;

use proptest::prelude::*;

use super::packet::{NO_RECEIVE, NO_SEND};
use super::*;
use crate::virtio::tests::{Rig, host_is_emulated, send_with_descriptor};

const CID: u64 = 3;
const RX: usize = 0;
const TX: usize = 1;
const EVENTS: usize = 2;
const BOTH: u32 = NO_RECEIVE | NO_SEND;

/// A guest's driver, and the folder where its sockets are.
struct Guest {
    rig: Rig<Vsock>,
    folder: tempfile::TempDir,
    /// Size of its buffers, and how much it says that it takes.
    buffer: u32,
    credit: u32,
    came: VecDeque<(Header, Vec<u8>)>,
}

impl Guest {
    fn new(buffer: u32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let words = format!("cid={CID},path={}", folder.path().join("v").display());
        let rig = Rig::new(Vsock::new(&words.parse().unwrap()).unwrap());
        let mut guest = Self { rig, folder, buffer, credit: 1 << 20, came: VecDeque::new() };
        guest.turn();
        guest
    }

    fn path(&self, port: &str) -> PathBuf {
        self.folder.path().join(format!("v{port}"))
    }

    fn client(&self, line: &str) -> UnixStream {
        let mut client = UnixStream::connect(self.path("")).unwrap();
        client.write_all(line.as_bytes()).unwrap();
        client
    }

    /// Lets the device look at the host's side, and takes what it says.
    fn turn(&mut self) {
        self.rig.wake(Wake::Source(0));
        self.rig.hear();
        loop {
            while let Some(used) = self.rig.drivers[RX].used() {
                // What comes back is what the device reads.
                let mut own = crate::virtio::tests::Driver::new(&self.rig.memory, 8 << 20, 4, 0);
                own.add(&[&used.written], &[]);
                let header = Header::read(&mut own.queue().pop().unwrap()).unwrap();
                assert_eq!((header.src_cid, header.dst_cid), (HOST, CID));
                assert_eq!(used.written.len(), HEADER + header.len as usize);
                self.came.push_back((header, used.written[HEADER..].to_vec()));
            }
            // Its places are free again once none is out.
            if self.rig.drivers[RX].out() > 0 {
                return;
            }
            (0..64).for_each(|_| _ = self.rig.drivers[RX].add(&[], &[self.buffer]));
            self.rig.kick(RX);
        }
    }

    /// The next packet of the device.
    fn next(&mut self) -> (Header, Vec<u8>) {
        for _ in 0..2000 {
            if let Some(packet) = self.came.pop_front() {
                return packet;
            }
            self.turn();
            if self.came.is_empty() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        panic!("the device says nothing");
    }

    fn silent(&mut self) {
        self.turn();
        assert!(self.came.is_empty(), "{:?}", self.came);
    }

    #[track_caller]
    fn expect(&mut self, op: u16) -> Header {
        let (header, _) = self.next();
        assert_eq!(header.op, op, "{header:?}");
        header
    }

    fn say(&mut self, ports: Key, op: u16, data: &[u8]) {
        self.say_with(ports, op, 0, data);
    }

    fn say_with(&mut self, (src_port, dst_port): Key, op: u16, flags: u32, data: &[u8]) {
        let len = data.len() as u32;
        let ours =
            Header { src_cid: CID, dst_cid: HOST, src_port, dst_port, len, kind: STREAM, op, ..Header::default() };
        self.raw(Header { flags, buf_alloc: self.credit, ..ours }, data);
    }

    fn raw(&mut self, header: Header, data: &[u8]) {
        assert!(self.rig.ask(TX, &[&header.bytes(), data], &[]).is_some());
    }

    /// A connection that a client of the host's began.
    fn open_by_host(&mut self) -> (Key, UnixStream) {
        let mut client = self.client("CONNECT 52\n");
        let asked = self.expect(op::REQUEST);
        assert_eq!(asked.dst_port, 52);
        let key = (52, asked.src_port);
        self.say(key, op::RESPONSE, b"");
        let mut line = [0; 14];
        client.read_exact(&mut line).unwrap();
        assert_eq!(String::from_utf8_lossy(&line), format!("OK {}\n", asked.src_port));
        (key, client)
    }

    /// A connection that the guest began.
    fn open_by_guest(&mut self, guest: u32, server: &UnixListener) -> (Key, UnixStream) {
        self.say((guest, 7), op::REQUEST, b"");
        assert_eq!(self.expect(op::RESPONSE).dst_port, guest);
        ((guest, 7), server.accept().unwrap().0)
    }

    fn server(&self) -> UnixListener {
        UnixListener::bind(self.path("_7")).unwrap()
    }
}

fn read(stream: &mut UnixStream, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// Nothing comes any more: the other end was closed, and not only forgotten.
/// Soon: a process that another test starts has what this one had open for a moment longer.
fn is_closed(stream: &mut UnixStream) -> bool {
    stream.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
    match stream.read(&mut [0; 16]) {
        Ok(count) => count == 0,
        Err(e) => e.kind() == ErrorKind::ConnectionReset,
    }
}

#[test]
fn a_client_reaches_a_port_of_the_guests() {
    let mut guest = Guest::new(4096);
    let (key, mut client) = guest.open_by_host();
    // The line and no byte more was taken; what follows it is data.
    client.write_all(b"ping").unwrap();
    let (header, data) = guest.next();
    assert_eq!((header.op, data.as_slice()), (op::RW, &b"ping"[..]));
    guest.say(key, op::RW, b"pong");
    assert_eq!(read(&mut client, 4), b"pong");
    // One direction ends, the other goes on.
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.expect(op::SHUTDOWN).flags, NO_SEND);
    guest.say(key, op::RW, b"more");
    assert_eq!(read(&mut client, 4), b"more");
    guest.say_with(key, op::SHUTDOWN, BOTH, b"");
    guest.expect(op::RST);
    assert!(is_closed(&mut client) && guest.rig.device.connections.is_empty());
    guest.silent();
}

#[test]
fn the_guest_reaches_a_server_and_nobody_is_reset() {
    let mut guest = Guest::new(4096);
    guest.say((1000, 7), op::REQUEST, b"");
    guest.expect(op::RST);
    let server = guest.server();
    let (key, mut stream) = guest.open_by_guest(1000, &server);
    guest.say(key, op::RW, b"a question");
    assert_eq!(read(&mut stream, 10), b"a question");
    guest.say_with(key, op::SHUTDOWN, NO_SEND, b"");
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    stream.write_all(b"an answer").unwrap();
    drop(stream);
    assert_eq!(guest.next().1, b"an answer");
    assert_eq!(guest.expect(op::SHUTDOWN).flags, BOTH);
    guest.say(key, op::RST, b"");
    assert!(guest.rig.device.connections.is_empty());
    guest.silent();
}

#[test]
fn a_client_that_asks_for_nothing_sensible_is_turned_away() {
    let mut guest = Guest::new(4096);
    let long = "CONNECT ".to_owned() + &"1".repeat(40);
    for line in ["\n", "CONNECT\n", "CONNECT x\n", "CONNECT 4294967295\n", "connect 1\n", "GET / HTTP/1.1\r\n", &long] {
        let mut client = guest.client(line);
        guest.silent();
        assert!(is_closed(&mut client), "{line:?}");
    }
    // A port where nobody listens; and a client that hangs up before the guest has heard of it, and one before it answers.
    let mut client = guest.client("CONNECT 5\n");
    let asked = guest.expect(op::REQUEST);
    guest.say((5, asked.src_port), op::RST, b"");
    assert!(is_closed(&mut client));
    drop(guest.client("CONNECT 6\n"));
    guest.silent();
    let client = guest.client("CONNECT 7\n");
    guest.expect(op::REQUEST);
    drop(client);
    guest.expect(op::RST);
    assert!(guest.rig.device.connections.is_empty());
    // And one that says half of what it wants, and that it will say no more.
    let mut client = guest.client("CONNECT");
    client.shutdown(std::net::Shutdown::Write).unwrap();
    guest.silent();
    assert!(is_closed(&mut client) && guest.rig.device.newcomers.is_empty());
    // A line may come in pieces.
    let mut client = guest.client("CONN");
    guest.silent();
    client.write_all(b"ECT 9\nrest").unwrap();
    assert_eq!(guest.expect(op::REQUEST).dst_port, 9);
}

#[test]
fn no_more_is_sent_than_the_guest_takes() {
    let mut guest = Guest::new(4096);
    guest.credit = 1000;
    let (key, mut client) = guest.open_by_host();
    client.write_all(&[7; 5000]).unwrap();
    let mut taken = guest.next().1.len();
    assert_eq!(taken, 1000);
    // It is asked once.
    guest.expect(op::CREDIT_REQUEST);
    guest.silent();
    while taken < 5000 {
        let header = Header { src_cid: CID, dst_cid: HOST, src_port: key.0, dst_port: key.1, ..Header::default() };
        let told = Header { kind: STREAM, op: op::CREDIT_UPDATE, buf_alloc: 1000, fwd_cnt: taken as u32, ..header };
        guest.raw(told, b"");
        let (header, data) = guest.next();
        assert!(header.op == op::RW && data.iter().all(|byte| *byte == 7));
        taken += data.len();
        assert!(data.len() <= 1000);
        // Only where there is more that it does not take.
        if taken < 5000 {
            guest.expect(op::CREDIT_REQUEST);
        }
    }
    guest.silent();
    // The guest asks, and is told.
    guest.say(key, op::CREDIT_REQUEST, b"");
    assert_eq!(guest.expect(op::CREDIT_UPDATE).buf_alloc, connection::BUFFER);
}

#[test]
fn p40_a_slow_reader_holds_its_own_connection_back_only() {
    let mut guest = Guest::new(4096);
    let (slow, mut reader) = guest.open_by_host();
    let (fast, mut other) = guest.open_by_host();
    // A driver that keeps to its credit comes to a halt.
    let (mut sent, mut freed) = (0u32, 0);
    while sent - freed < connection::BUFFER {
        guest.say(slow, op::RW, &[sent.to_le_bytes()[1]; 256]);
        sent += 256;
        guest.turn();
        freed = guest.came.drain(..).map(|(header, _)| header.fwd_cnt).next_back().unwrap_or(freed);
    }
    guest.silent();
    // It may not have been told yet of the last that left.
    let waiting = guest.rig.device.waiting as u32;
    assert!((connection::BUFFER - connection::BUFFER / 2..=connection::BUFFER).contains(&waiting), "{waiting}");
    guest.say(fast, op::RW, b"quick");
    assert_eq!(read(&mut other, 5), b"quick");
    // The reader wakes up: all comes, in its order, and the driver is told of room.
    let mut got = Vec::new();
    while got.len() < sent as usize {
        got.extend(read(&mut reader, 256));
        guest.turn();
    }
    assert!(got.chunks(256).zip(0u32..).all(|(piece, n)| piece.iter().all(|byte| *byte == (n * 256).to_le_bytes()[1])));
    assert_eq!(guest.came.back().unwrap().0.op, op::CREDIT_UPDATE);
    assert_eq!(guest.rig.device.waiting, 0);
    // One that sends beyond its credit is reset, and only it.
    guest.came.clear();
    for _ in 0..10_000 {
        guest.say(slow, op::RW, &[0; 1024]);
        if guest.rig.device.connections.len() == 1 {
            break;
        }
    }
    while guest.next().0.op != op::RST {}
    assert_eq!(guest.rig.device.waiting, 0);
    guest.say(fast, op::RW, b"still here");
    assert_eq!(read(&mut other, 10), b"still here");
}

/// The kernel gives what was sent with a descriptor by itself, however much follows.
#[test]
fn descriptors_that_come_along_hold_nothing_up() {
    let mut guest = Guest::new(4096);
    let (_, mut client) = guest.open_by_host();
    send_with_descriptor(&client, b"head");
    client.write_all(b"body").unwrap();
    let mut got = Vec::new();
    while got.len() < 8 {
        got.extend(guest.next().1);
    }
    assert_eq!(got, b"headbody");
    guest.silent();
}

/// Few may keep much, and only while they live: what all are promised stays bounded.
#[test]
fn p40_a_connection_whose_host_reads_fast_may_keep_more() {
    let mut guest = Guest::new(128);
    let server = guest.server();
    let few = EXTRA / (LARGE - connection::BUFFER) as usize;
    let alloc = |guest: &mut Guest, n: u32, stream: &mut UnixStream| {
        for _ in 0..9 {
            guest.say((n, 7), op::RW, &[1; PACKET]);
            assert_eq!(read(stream, PACKET), [1; PACKET]);
        }
        guest.say((n, 7), op::CREDIT_REQUEST, b"");
        guest.turn();
        let told = guest.came.drain(..).rfind(|(header, _)| header.dst_port == n).unwrap();
        assert_eq!(guest.rig.device.waiting, 0);
        told.0.buf_alloc
    };
    let mut open = Vec::new();
    for n in 0..few as u32 + 1 {
        let (_, mut stream) = guest.open_by_guest(n, &server);
        // A driver that has sent all that it may waits until it is told of more.
        let (mut sent, mut may) = (0u32, connection::BUFFER);
        while sent < 3 * LARGE {
            assert!(sent < may, "{n}: {sent}");
            guest.say((n, 7), op::RW, &[1; 4096]);
            sent += read(&mut stream, 4096).len() as u32;
            guest.turn();
            guest.came.drain(..).for_each(|(header, _)| may = header.buf_alloc + header.fwd_cnt);
        }
        let wanted = if n < few as u32 { LARGE } else { connection::BUFFER };
        assert_eq!(alloc(&mut guest, n, &mut stream), wanted, "{n}");
        open.push(stream);
    }
    guest.say((0, 7), op::RST, b"");
    assert_eq!(alloc(&mut guest, few as u32, &mut open[few]), LARGE);
    // So much it may send, and no more.
    for sent in 0..100 {
        guest.say((1, 7), op::RW, &[1; PACKET]);
        if !guest.rig.device.connections.contains_key(&(1, 7)) {
            assert!(sent * PACKET > LARGE as usize, "{sent}");
            break;
        }
        assert!(guest.rig.device.waiting <= LARGE as usize);
    }
    assert_eq!(guest.expect(op::RST).dst_port, 1);
    guest.rig.device.forget();
    assert_eq!((guest.rig.device.promised, guest.rig.device.sources.len()), (0, 0));
}

/// Linux since 6.19 has no more in flight than it would keep itself, however much it is allowed.
#[test]
fn p40_a_driver_that_does_not_use_all_it_may_is_told_in_time() {
    let mut guest = Guest::new(128);
    let server = guest.server();
    for (n, own) in (0..).zip([0, 1, 100, 5000, 64 << 10, 256 << 10, 1 << 20, u32::MAX]) {
        guest.credit = own;
        let (_, mut stream) = guest.open_by_guest(n, &server);
        let (mut sent, mut alloc, mut passed) = (0u32, connection::BUFFER, 0);
        while sent < 3 * LARGE {
            assert!(sent - passed < alloc.min(own.max(1)), "{own}: {sent}");
            let size = (alloc.min(own.max(4096)) - (sent - passed)).min(4096);
            guest.say((n, 7), op::RW, &vec![1; size as usize]);
            sent += read(&mut stream, size as usize).len() as u32;
            guest.turn();
            // Of its last connection it may still hear.
            let told = guest.came.drain(..).rfind(|(header, _)| header.dst_port == n);
            told.into_iter().for_each(|(header, _)| (alloc, passed) = (header.buf_alloc, header.fwd_cnt));
        }
    }
}

#[test]
fn p40_a_dead_peer_is_told_of_and_keeps_no_descriptor() {
    let mut guest = Guest::new(4096);
    let (key, client) = guest.open_by_host();
    guest.say(key, op::RW, &[1; 1000]);
    drop(client);
    assert_eq!(guest.expect(op::SHUTDOWN).flags, BOTH);
    // The guest has not answered, and may never.
    assert!(guest.rig.device.connections[&key].socket().is_none());
    guest.say(key, op::RW, b"into the void");
    guest.say_with(key, op::SHUTDOWN, BOTH, b"");
    guest.expect(op::RST);
    assert!(guest.rig.device.connections.is_empty() && guest.rig.device.waiting == 0);
    // It may say what it likes to one that is gone.
    guest.say(key, op::RW, b"?");
    guest.expect(op::RST);
}

#[test]
fn p40_ten_thousand_connections_both_ways() {
    const WAVE: u32 = 250;
    let mut guest = Guest::new(128);
    let server = guest.server();
    // A host that is emulated takes a second for a hundred.
    let waves = if host_is_emulated() { 4 } else { 40 };
    for wave in 0..waves {
        let mut open = Vec::new();
        for n in 0..WAVE {
            open.push(guest.open_by_guest(wave * WAVE + n, &server));
            open.push(guest.open_by_host());
        }
        assert_eq!(guest.rig.device.connections.len(), 2 * WAVE as usize);
        for (key, stream) in &mut open {
            stream.write_all(&key.1.to_le_bytes()).unwrap();
            let (header, data) = guest.next();
            assert_eq!((header.op, header.dst_port, data), (op::RW, key.0, key.1.to_le_bytes().to_vec()));
            guest.say(*key, op::RW, &key.0.to_le_bytes());
            assert_eq!(read(stream, 4), key.0.to_le_bytes());
        }
        // Either side ends it.
        for (n, (key, mut stream)) in open.into_iter().enumerate() {
            if n % 3 == 0 {
                drop(stream);
                assert_eq!(guest.expect(op::SHUTDOWN).flags, BOTH);
                guest.say(key, op::RST, b"");
            } else {
                guest.say_with(key, op::SHUTDOWN, BOTH, b"");
                guest.expect(op::RST);
                assert!(is_closed(&mut stream));
            }
        }
        assert!(guest.rig.device.connections.is_empty() && guest.rig.device.queue.is_empty());
    }
    guest.silent();
}

#[test]
fn p40_more_connections_than_there_may_be_are_reset_and_a_reset_ends_all() {
    let mut guest = Guest::new(128);
    guest.rig.device.most = 40;
    let server = guest.server();
    let mut open: Vec<_> = (0..40).map(|n| guest.open_by_guest(n, &server)).collect();
    for n in 40..100 {
        guest.say((n, 7), op::REQUEST, b"");
        assert_eq!(guest.expect(op::RST).dst_port, n);
        let mut client = guest.client("CONNECT 1\n");
        guest.silent();
        assert!(is_closed(&mut client));
    }
    // One that ends makes room for one.
    let (key, _) = open.pop().unwrap();
    guest.say(key, op::RST, b"");
    open.push(guest.open_by_guest(100, &server));
    // Clients that never say what they want wait outside, and do not keep others out for long.
    let mut idle: Vec<_> = (0..NEWCOMERS + 20).map(|_| UnixStream::connect(guest.path("")).unwrap()).collect();
    guest.silent();
    assert_eq!(guest.rig.device.newcomers.len(), NEWCOMERS);
    guest.rig.device.newcomers.iter_mut().for_each(|newcomer| newcomer.since -= 2 * PATIENCE);
    guest.silent();
    assert!(is_closed(&mut idle[0]) && guest.rig.device.newcomers.len() == NEWCOMERS);
    // The driver resets the device.
    let fresh = guest.rig.device.save();
    guest.rig.device.load(&fresh).unwrap();
    assert!(open.iter_mut().all(|(_, stream)| is_closed(stream)));
    let kept = guest.rig.device.connections.len() + guest.rig.device.newcomers.len() + guest.rig.device.resets.len();
    assert_eq!(kept, 0);
    guest.open_by_guest(1, &server);
}

/// Whoever waits for an answer of the host's would wait for ever in a machine that goes on elsewhere.
#[test]
fn a_guest_that_goes_on_hears_that_its_connections_are_gone_once() {
    let mut guest = Guest::new(128);
    let server = guest.server();
    let (_, mut stream) = guest.open_by_guest(1, &server);
    let told = |guest: &mut Guest| guest.rig.drivers[EVENTS].used().map(|used| used.written);
    assert!(told(&mut guest).is_none());
    let saved = guest.rig.device.save();
    guest.rig.device.load(&saved).unwrap();
    guest.rig.active.moved = true;
    assert!(is_closed(&mut stream));
    // It has no buffer for it yet.
    guest.rig.wake(Wake::Start);
    guest.silent();
    assert!(told(&mut guest).is_none());
    (0..2).for_each(|_| _ = guest.rig.drivers[EVENTS].add(&[], &[4]));
    guest.rig.kick(EVENTS);
    assert_eq!((told(&mut guest), told(&mut guest)), (Some(vec![0; 4]), None));
    guest.open_by_guest(1, &server);
    assert!(told(&mut guest).is_none());
}

#[test]
fn what_the_guest_cannot_take_yet_is_bounded() {
    let mut guest = Guest::new(128);
    // All its buffers are used up, and it sends things to be answered.
    while guest.rig.drivers[RX].out() > 0 {
        guest.rig.ask(TX, &[&nonsense(1).bytes()], &[]);
        while guest.rig.drivers[RX].used().is_some() {}
    }
    let (mut taken, mut left) = (0, 0);
    for n in 0..RESETS as u32 + 300 {
        let got = guest.rig.ask(TX, &[&nonsense(n).bytes()], &[]).is_some();
        (taken, left) = (taken + usize::from(got), left + usize::from(!got));
        if left == 200 {
            break;
        }
    }
    assert_eq!((guest.rig.device.resets.len(), taken, left), (RESETS, RESETS, 200));
    // It takes them after all: then everything goes on where it was.
    let mut answers = 0;
    while answers < RESETS + 200 {
        guest.expect(op::RST);
        answers += 1;
    }
    guest.silent();
}

fn nonsense(src_port: u32) -> Header {
    Header { src_cid: CID, dst_cid: HOST, src_port, dst_port: 9, kind: STREAM, op: op::RW, ..Header::default() }
}

#[test]
fn words_are_checked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("v");
    let new = |words: String| Vsock::new(&words.parse().unwrap()).err().map(|e| format!("{e:#}"));
    let refused = |words: String| new(words.clone()).unwrap_or_else(|| panic!("{words} is taken"));
    for words in
        ["cid=3", "path=x", "x", "", "cid=2,path=x", "cid=4294967295,path=x", "cid=3,path=x,y", "cid=-1,path=x"]
    {
        assert!(refused(words.into()).contains("--vsock"), "{words}");
        assert!(!Path::new("x").exists(), "{words}");
    }
    assert!(refused(format!("cid=3,path={}", "x".repeat(98))).contains("1 to 96 bytes"));
    let first = Vsock::new(&format!("cid=3,path={}", path.display()).parse().unwrap()).unwrap();
    assert!(refused(format!("cid=4,path={}", path.display())).contains("somebody listens"));
    drop(first);
    assert!(!path.exists());
}

/// What a hostile driver sends: headers near to good ones, in chains that may be too short for them.
fn hostile() -> impl Strategy<Value = (Header, u32, usize)> {
    let cid = prop_oneof![8 => Just(CID), 1 => Just(HOST), 1 => any::<u64>()];
    let host = prop_oneof![8 => Just(HOST), 1 => any::<u64>()];
    let port = || prop_oneof![6 => 0u32..3, 3 => Just(7u32), 1 => any::<u32>(), 1 => Just(FIRST_PORT)];
    let len = prop_oneof![4 => 0u32..300, 1 => any::<u32>(), 1 => Just(PACKET as u32), 1 => Just(PACKET as u32 + 1)];
    let kind = prop_oneof![8 => Just(STREAM), 1 => any::<u16>()];
    let credit = prop_oneof![3 => Just(1u32 << 20), 1 => any::<u32>(), 1 => Just(0u32)];
    let what = (cid, host, port(), port(), len, kind);
    let rest =
        (prop_oneof![9 => 0u16..9, 1 => any::<u16>()], any::<u32>(), credit, any::<u32>(), 0u32..400, 0usize..46);
    (what, rest).prop_map(|((src_cid, dst_cid, src_port, dst_port, len, kind), rest)| {
        let (op, flags, buf_alloc, fwd_cnt, data, size) = rest;
        let header = Header { src_cid, dst_cid, src_port, dst_port, len, kind, op, flags, buf_alloc, fwd_cnt };
        (header, data, size)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn every_byte_comes_once_and_in_its_order(
        buffer in prop_oneof![Just(45u32), 46u32..300, Just(4096)],
        acts in prop::collection::vec((any::<bool>(), 1usize..3000, 0u32..2000), 1..40),
        hangs_up in any::<bool>(),
    ) {
        let mut guest = Guest::new(buffer);
        let (key, mut client) = guest.open_by_host();
        client.set_nonblocking(true).unwrap();
        let byte = |n: usize| (n * 7 + n / 251) as u8;
        let (mut written, mut taken, mut sent, mut got) = (0, 0, 0, Vec::<u8>::new());
        let come = |guest: &mut Guest, taken: &mut usize| {
            for (header, data) in guest.came.drain(..) {
                assert!([op::RW, op::CREDIT_REQUEST, op::CREDIT_UPDATE, op::SHUTDOWN].contains(&header.op), "{header:?}");
                assert!(data.iter().all(|got| { *taken += 1; *got == byte(*taken - 1) }));
            }
        };
        for (in_to, size, credit) in acts {
            if in_to {
                written += client.write(&(written..written + size).map(byte).collect::<Vec<_>>()).unwrap_or(0);
            } else {
                guest.say(key, op::RW, &(sent..sent + size).map(byte).collect::<Vec<_>>());
                sent += size;
            }
            let header = Header { src_cid: CID, dst_cid: HOST, src_port: key.0, dst_port: key.1, ..Header::default() };
            let header = Header { kind: STREAM, op: op::CREDIT_UPDATE, buf_alloc: credit, ..header };
            guest.raw(Header { fwd_cnt: taken as u32, ..header }, b"");
            guest.turn();
            come(&mut guest, &mut taken);
            let mut bytes = [0; 2048];
            let count = (&client).read(&mut bytes).unwrap_or(0);
            got.extend(&bytes[..count]);
        }
        if hangs_up {
            client.shutdown(std::net::Shutdown::Write).unwrap();
        }
        // All that is left, with credit for all.
        guest.say(key, op::CREDIT_UPDATE, b"");
        while taken < written {
            guest.turn();
            prop_assert!(!guest.came.is_empty(), "{} of {}", taken, written);
            come(&mut guest, &mut taken);
        }
        while got.len() < sent {
            let mut bytes = [0; 4096];
            let count = (&client).read(&mut bytes).unwrap();
            got.extend(&bytes[..count]);
            guest.turn();
        }
        prop_assert!(got.len() == sent && got.iter().enumerate().all(|(n, got)| *got == byte(n)));
        guest.came.clear();
        prop_assert_eq!(guest.rig.device.waiting, 0);
    }

    #[test]
    fn a_hostile_driver_breaks_nothing(packets in prop::collection::vec((hostile(), 0u8..8), 1..120)) {
        let mut guest = Guest::new(200);
        let server = guest.server();
        server.set_nonblocking(true).unwrap();
        let mut peers = VecDeque::new();
        for ((header, data, size), act) in packets {
            let size = if size > 40 { HEADER } else { size };
            guest.rig.ask(TX, &[&header.bytes()[..size], &vec![1; data as usize]], &[]);
            match act {
                0 => peers.push_back(guest.client("CONNECT 1\nhello")),
                1 => drop(peers.pop_front()),
                2 => peers.extend(server.accept().ok().map(|(stream, _)| stream)),
                3 => peers.iter_mut().for_each(|peer| {
                    peer.set_nonblocking(true).unwrap();
                    let _ = peer.read(&mut [0; 4096]);
                    let _ = peer.write(&[2; 4096]);
                }),
                _ => {}
            }
            guest.turn();
            let device = &guest.rig.device;
            let waiting: usize = device.connections.values().map(Connection::waiting).sum();
            prop_assert_eq!(waiting, device.waiting);
            let queued = device.connections.values().filter(|connection| connection.queued).count();
            prop_assert_eq!(queued, device.queue.len());
            prop_assert!(!guest.rig.is_broken());
        }
        // It still works for one who behaves.
        guest.rig.device.forget();
        guest.came.clear();
        guest.turn();
        guest.came.clear();
        guest.credit = 1 << 20;
        while server.accept().is_ok() {}
        server.set_nonblocking(false).unwrap();
        let (key, mut stream) = guest.open_by_guest(77, &server);
        guest.say(key, op::RW, b"fine");
        prop_assert_eq!(read(&mut stream, 4), b"fine");
    }
}
