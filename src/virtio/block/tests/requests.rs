//! Requests as drivers make them, and as they must not.

use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::*;

#[test]
fn what_is_written_is_read_and_is_in_the_file() {
    for (mut rig, file) in disks(1 << 20) {
        let data: Vec<u8> = (0..8192u32).map(|n| (n * 7) as u8).collect();
        assert_eq!(rig.write(3, &data), status::OK);
        assert_eq!(rig.flush(), status::OK);
        assert_eq!(rig.read(3, 8192), data);
        assert_eq!(rig.read(2, 512), [0; 512]);
        let mut in_file = vec![0; 8192];
        file.read_exact_at(&mut in_file, 3 * 512).unwrap();
        assert_eq!(in_file, data);
    }
}

#[test]
fn discards_and_zeroes_leave_zeroes() {
    for (mut rig, file) in disks(1 << 20) {
        assert_eq!(rig.write(0, &[7; 65536]), status::OK);
        let segment = |sector: u64, sectors: u32, flags: u32| {
            let mut bytes = sector.to_le_bytes().to_vec();
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes
        };
        assert_eq!(rig.ask(13, 0, &segment(1, 1, 0), 0).0, status::OK);
        assert_eq!(rig.ask(13, 0, &segment(8, 8, 1), 0).0, status::OK);
        assert_eq!(rig.ask(11, 0, &segment(32, 32, 0), 0).0, status::OK);
        assert_eq!(rig.read(0, 512), [7; 512]);
        assert_eq!(rig.read(1, 512), [0; 512]);
        assert_eq!(rig.read(2, 512), [7; 512]);
        assert_eq!(rig.read(8, 4096), [0; 4096]);
        assert_eq!(rig.read(31, 512), [7; 512]);
        assert_eq!(rig.read(32, 512), [0; 512]);
        assert_eq!(file.metadata().unwrap().len(), 1 << 20);
        // Flags that are none, too many sectors, beyond the end, a segment and a half.
        for (kind, segment, wanted) in [
            (11, segment(0, 1, 1), status::UNSUPP),
            (13, segment(0, 1, 2), status::UNSUPP),
            (13, segment(0, MOST_ZEROES + 1, 0), status::IOERR),
            (11, segment(2048, 1, 0), status::IOERR),
            (11, segment(u64::MAX, 1, 0), status::IOERR),
            (11, [segment(0, 1, 0), vec![0; 8]].concat(), status::IOERR),
            (13, vec![], status::IOERR),
        ] {
            assert_eq!(rig.ask(kind, 0, &segment, 0).0, wanted, "{kind} {segment:?}");
        }
        assert_eq!(rig.flush(), status::OK);
    }
}

#[test]
fn zeroes_are_written_where_the_host_knows_no_shorter_way() {
    let (mut rig, host) = Fake::disk(1 << 20);
    let segment = [&8u64.to_le_bytes()[..], &8u32.to_le_bytes(), &1u32.to_le_bytes()].concat();
    rig.put(0, &[&header(13, 0), &segment], &[1]);
    rig.service();
    host.lock().unwrap().fails(libc::EOPNOTSUPP);
    rig.service();
    {
        let mut host = host.lock().unwrap();
        let job = &host.has[0].1;
        assert_eq!((job.work, job.offset, job.buffers.size()), (Work::Write { stable: false }, 4096, 4096));
        host.ends();
    }
    rig.service();
    assert_eq!(rig.used(0).unwrap().1, 1);
}

#[test]
fn the_disk_says_who_it_is() {
    let (mut rig, _) = Fake::disk(1 << 20);
    assert_eq!(rig.ask(8, 0, &[], 20), (status::OK, b"bantam-serial-number".to_vec()));
    // A driver with less or more room has it filled as far as there is something.
    let (head, at) = rig.put(0, &[&header(8, 0)], &[5]);
    assert_eq!(rig.wait(0), (head, 5));
    let mut out = [0; 5];
    rig.memory.read(at[0], &mut out).unwrap();
    assert_eq!(&out, b"bant\0");
}

#[test]
fn heads_and_data_may_be_in_any_pieces() {
    for (mut rig, _) in disks(1 << 20) {
        let head = header(1, 5);
        let data = vec![9; 1024];
        let (at, written) = {
            let pieces = [&head[..3], &head[3..16], &data[..100], &data[100..]];
            let (_, at) = rig.put(0, &pieces, &[1]);
            (at, rig.wait(0).1)
        };
        let mut status = [9];
        rig.memory.read(at[0], &mut status).unwrap();
        assert_eq!((written, status), (1, [0]));
        // A head and its data in one; the status in one piece with the data.
        let both = [&header(1, 7)[..], &[8; 512]].concat();
        rig.put(0, &[&both], &[1]);
        rig.wait(0);
        let (_, at) = rig.put(0, &[&header(0, 5)], &[300, 0, 1024 + 213]);
        assert_eq!(rig.wait(0).1, 1537);
        let mut out = [0xaa; 1237];
        rig.memory.read(at[2], &mut out).unwrap();
        assert_eq!((out[0], out[723], out[724], out[1235], out[1236]), (9, 9, 8, 8, 0));
    }
}

#[test]
fn a_chain_that_is_too_short_comes_back_with_nothing_in_it() {
    let (mut rig, host) = Fake::disk(1 << 20);
    let head = header(1, 0);
    for (readable, writable) in [(&[&head[..15]][..], &[1][..]), (&[&head[..], &[1; 512]], &[]), (&[], &[512, 1])] {
        let (head, _) = rig.put(0, readable, writable);
        assert_eq!(rig.wait(0), (head, 0));
    }
    assert!(host.lock().unwrap().has.is_empty());
    // The queue works on.
    assert_eq!(rig.ask(8, 0, &[], 20).0, status::OK);
}

#[test]
fn what_does_not_fit_the_disk_is_an_error() {
    let (mut rig, host) = Fake::disk(1 << 20);
    for (kind, sector, data, room, wanted) in [
        (0, 2048, 0, 512, status::IOERR),
        (0, 2047, 0, 1024, status::IOERR),
        (0, u64::MAX, 0, 512, status::IOERR),
        (0, u64::MAX / 512 + 1, 0, 512, status::IOERR),
        (0, 0, 0, 511, status::IOERR),
        (1, 2047, 513, 0, status::IOERR),
        (1, 2048, 512, 0, status::IOERR),
        (0, 0, 0, 0, status::OK),
        (1, 2048, 0, 0, status::OK),
        (2, 0, 0, 0, status::UNSUPP),
        (14, 0, 16, 0, status::UNSUPP),
        (u32::MAX, 0, 0, 0, status::UNSUPP),
    ] {
        let (status, _) = rig.ask(kind, sector, &vec![0; data], room);
        assert_eq!(status, wanted, "{kind} {sector:#x} {data} {room}");
    }
    assert!(host.lock().unwrap().has.is_empty());
}

#[test]
fn a_disk_that_is_only_read_is_only_read() {
    let (mut rig, host) = Fake::disk(1 << 20);
    rig.device.medium.read_only = true;
    for kind in [1, 11, 13] {
        assert_eq!(rig.ask(kind, 0, &[0; 512], 0).0, status::IOERR, "{kind}");
    }
    assert_eq!(rig.flush(), status::OK);
    assert!(host.lock().unwrap().has.is_empty());
    let features = rig.device.features();
    assert_ne!(features & feature::RO, 0);
    assert_eq!(features & (feature::DISCARD | feature::WRITE_ZEROES), 0);
}

#[test]
fn the_configuration_space_describes_the_disk() {
    let (rig, _) = Fake::disk(1 << 20);
    let mut device = rig.device;
    device.queues = 4;
    let space = device.space();
    let at =
        |offset: usize, size: usize| space[offset..offset + size].iter().rev().fold(0, |v, b| v << 8 | u64::from(*b));
    assert_eq!(space.len(), 60);
    // capacity, size_max, seg_max, blk_size, exponent of the physical block, min_io_size
    let fields = [at(0, 8), at(8, 4), at(12, 4), at(20, 4), at(24, 1), at(26, 2)];
    assert_eq!(fields, [2048, 0, 254, 512, 3, 8]);
    // writeback, num_queues, discard: sectors, segments, alignment; zeroes: sectors, segments, unmap
    let fields = [at(32, 1), at(34, 2), at(36, 4), at(40, 4), at(44, 4), at(48, 4), at(52, 4), at(56, 1)];
    assert_eq!(fields, [1, 4, MOST_DISCARD.into(), 1, 1, MOST_ZEROES.into(), 1, 1]);
    assert_eq!((device.kind().queues.len(), device.features() & feature::MQ), (4, feature::MQ));
    assert!(u64::from(MOST_ZEROES) * SECTOR <= crate::host::sys::disk::MOST_ZEROES);
}

#[test]
fn all_that_one_kick_brings_is_one_submission() {
    let (mut rig, host) = Fake::disk(1 << 20);
    for sector in 0..16 {
        rig.put(0, &[&header(0, sector)], &[512, 1]);
    }
    rig.service();
    let host = host.lock().unwrap();
    assert_eq!((host.has.len(), host.submissions), (16, 1));
}

#[test]
fn many_queues_share_the_engine() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let pool = Pool::new(Box::new(file)).unwrap();
    let mut rig = Rig::new(Block::with("test".into(), medium(1 << 20), 4, Box::new(pool), None));
    for round in 0..40u64 {
        for queue in 0..4 {
            let data = [(round as u8) ^ queue as u8; 512];
            rig.on = queue;
            assert_eq!(rig.ask(1, round * 4 + queue as u64, &data, 0).0, status::OK);
        }
    }
    for round in 0..40u64 {
        for queue in 0..4 {
            rig.on = 3 - queue;
            let (_, data) = rig.ask(0, round * 4 + queue as u64, &[], 512);
            assert_eq!(data, [(round as u8) ^ queue as u8; 512]);
        }
    }
}

#[test]
fn a_request_allocates_nothing_once_there_is_room() {
    let (mut rig, host) = Fake::disk(1 << 20);
    let round = |rig: &mut Rig| {
        for sector in 0..8 {
            rig.put(0, &[&header(0, sector)], &[512, 1]);
        }
        rig.service();
        (0..8).for_each(|_| host.lock().unwrap().ends());
        rig.service();
        (0..8).for_each(|_| assert!(rig.used(0).is_some()));
        (rig.device.spare.len(), rig.device.free.len(), rig.device.parts.capacity())
    };
    let first = round(&mut rig);
    assert_eq!((first.0, first.1), (8, SLOTS));
    (0..20).for_each(|_| assert_eq!(round(&mut rig), first));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever a driver puts into its chains, each comes back once and no byte outside their room is written.
    #[test]
    fn any_chains_come_back(chains in prop::collection::vec(
        (0u32..16, 0u64..2100, 0usize..40, prop::collection::vec(0u32..1100, 0..4)), 1..8))
    {
        let (mut rig, _file) = disks(1 << 20).pop().unwrap();
        for (kind, sector, head, room) in &chains {
            let mut bytes = header(*kind, *sector).to_vec();
            bytes.resize(*head, 1);
            let (head, _) = rig.put(0, &[&bytes], room);
            let after = rig.room(0, 16);
            rig.memory.write(after, &[0x66; 16]).unwrap();
            let (used, written) = rig.wait(0);
            prop_assert_eq!(used, head);
            prop_assert!(written <= room.iter().sum());
            let mut canary = [0; 16];
            rig.memory.read(after, &mut canary).unwrap();
            prop_assert_eq!(canary, [0x66; 16]);
        }
        rig.device.drain(&mut rig.active);
        prop_assert_eq!(rig.device.free.len(), SLOTS);
    }
}
