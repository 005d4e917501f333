//! Files that want memory aligned, and drivers that have none.

use std::os::unix::fs::{FileExt, OpenOptionsExt};

use super::super::bounce::{Bounce, PIECE, ROOMS};
use super::*;

const ALIGN: u32 = 512;

/// A disk on such a host as [`Fake::disk`] has, with [`Bounce`] before it.
fn fake(size: u64) -> (Rig, Arc<Mutex<Host>>) {
    let (mut rig, host) = Fake::disk(size);
    let inner = std::mem::replace(&mut rig.device.engine, Fake::disk(size).0.device.engine);
    rig.device.engine = Box::new(Bounce::new(inner, ALIGN, SLOTS));
    (rig, host)
}

/// A file opened past the page cache, if its file system knows that, on threads and on io_uring.
fn direct(size: u64) -> Vec<(Rig, tempfile::NamedTempFile)> {
    let mut disks = Vec::new();
    for threads in [true, false] {
        let place = tempfile::NamedTempFile::new().unwrap();
        place.as_file().set_len(size).unwrap();
        let mut open = File::options();
        let Ok(file) = open.read(true).write(true).custom_flags(libc::O_DIRECT).open(place.path()) else {
            crate::host::skipped("no file system with O_DIRECT");
            return disks;
        };
        let inner: Box<dyn Engine> = match Ring::new(file.try_clone().unwrap(), SLOTS as u32) {
            Ok(ring) if !threads => Box::new(ring),
            _ => Box::new(Pool::new(Box::new(file)).unwrap()),
        };
        let engine = Box::new(Bounce::new(inner, 4096, SLOTS));
        let medium = Medium { block: 4096, ..medium(size) };
        disks.push((Rig::new(Block::with("test".into(), medium, 1, engine, None)), place));
    }
    disks
}

fn pattern(size: usize) -> Vec<u8> {
    (0..size).map(|n| (n / 7 % 251) as u8).collect()
}

/// Asks in pieces that lie where they lie; gives what was read.
fn ask(rig: &mut Rig, kind: u32, sector: u64, data: &[&[u8]], room: &[u32]) -> (u8, Vec<u8>) {
    let head = header(kind, sector);
    let readable: Vec<&[u8]> = std::iter::once(&head[..]).chain(data.iter().copied()).collect();
    let writable: Vec<u32> = room.iter().copied().chain([1]).collect();
    let (_, at) = rig.put(0, &readable, &writable);
    rig.wait(0);
    let mut out = Vec::new();
    for (at, size) in at.iter().zip(&writable) {
        let mut bytes = vec![0; *size as usize];
        rig.memory.read(*at, &mut bytes).unwrap();
        out.extend(bytes);
    }
    (out.pop().unwrap(), out)
}

#[test]
fn memory_in_any_places_and_pieces_reaches_a_file_without_a_cache() {
    let size = 1 << 20;
    for (mut rig, file) in direct(size) {
        let data = pattern(8192);
        // An odd address; an odd length amidst several parts; parts of a byte.
        for (sector, cuts) in [(0, vec![]), (64, vec![100, 4096, 4097]), (128, vec![1, 2, 8191]), (2032, vec![4096])] {
            rig.queues[0].data = 16 * (sector + 1);
            let ends = cuts.iter().copied().chain([data.len()]);
            let pieces: Vec<_> = std::iter::once(0).chain(cuts.iter().copied()).zip(ends).collect();
            let parts: Vec<&[u8]> = pieces.iter().map(|(from, to)| &data[*from..*to]).collect();
            assert_eq!(ask(&mut rig, 1, sector, &parts, &[]).0, status::OK, "{cuts:?}");
            let room: Vec<u32> = pieces.iter().map(|(from, to)| (to - from) as u32).collect();
            let (code, read) = ask(&mut rig, 0, sector, &[], &room);
            assert!(code == status::OK && read == data, "{cuts:?}: {code}");
        }
        assert_eq!(rig.flush(), status::OK);
        let mut end = vec![0; 8192];
        file.as_file().read_exact_at(&mut end, size - 8192).unwrap();
        assert!(end == data);
        // Behind the end there is nothing, and a file that has become shorter is an error of the host's.
        assert_eq!(ask(&mut rig, 0, 2040, &[], &[4000, 4192]).0, status::IOERR);
        file.as_file().set_len(size - 4096).unwrap();
        assert_eq!(ask(&mut rig, 0, 2032, &[], &[4000, 4192]).0, status::IOERR);
        assert_eq!(ask(&mut rig, 0, 2024, &[], &[4000, 96]).0, status::OK);
    }
}

#[test]
fn large_requests_go_piece_by_piece() {
    for (mut rig, _file) in direct(4 << 20) {
        let data = pattern(3 * PIECE);
        rig.queues[0].data = 16;
        assert_eq!(ask(&mut rig, 1, 8, &[&data], &[]).0, status::OK);
        let (code, read) = ask(&mut rig, 0, 8, &[], &[3 * PIECE as u32]);
        assert!(code == status::OK && read == data);
    }
}

#[test]
fn what_is_aligned_goes_without_a_copy() {
    let (mut rig, host) = fake(1 << 20);
    rig.queues[0].data = 512 - 16;
    // A head of 16 bytes, then data at a multiple of 512.
    rig.put(0, &[&header(1, 0), &[1; 1024]], &[1]);
    rig.service();
    let mut byte = [0];
    let job = |host: &Host| host.has[0].1.buffers.copy_out(&mut [0; 4096]);
    assert_eq!(job(&host.lock().unwrap()), 1024);
    // It is guest RAM: what the guest writes now is there.
    rig.memory.write(DATA + 512, &[9]).unwrap();
    host.lock().unwrap().has[0].1.buffers.copy_out(&mut byte);
    assert_eq!(byte, [9]);
    host.lock().unwrap().ends();
    rig.service();
    assert!(rig.used(0).is_some());
    // At an odd place it is a copy.
    rig.queues[0].data = 1024;
    rig.put(0, &[&header(1, 0), &[1; 1024]], &[1]);
    rig.service();
    rig.memory.write(DATA + 1024 + 16, &[9]).unwrap();
    host.lock().unwrap().has[0].1.buffers.copy_out(&mut byte);
    assert_eq!(byte, [1]);
}

#[test]
fn a_read_that_is_short_or_fails_leaves_the_rest_as_it_was() {
    let (mut rig, host) = fake(1 << 20);
    rig.queues[0].data = 16;
    let (_, at) = rig.put(0, &[&header(0, 0)], &[1024, 1]);
    rig.service();
    host.lock().unwrap().has[0].1.buffers.copy_in(&[5; 1024]);
    host.lock().unwrap().end(0, Ok(512));
    rig.service();
    let mut bytes = [0; 1024];
    rig.memory.read(at[0], &mut bytes).unwrap();
    assert_eq!((bytes[511], bytes[512]), (5, 0xaa));
    assert_eq!(host.lock().unwrap().has[0].1.offset, 512);
    host.lock().unwrap().has[0].1.buffers.copy_in(&[6; 512]);
    host.lock().unwrap().fails(libc::EIO);
    rig.service();
    rig.memory.read(at[0], &mut bytes).unwrap();
    assert_eq!((bytes[511], bytes[512], rig.used(0).unwrap().1), (5, 0xaa, 1025));
}

#[test]
fn rooms_are_few_and_kept_and_who_finds_none_waits() {
    let (mut rig, host) = fake(1 << 20);
    for round in 0..3 {
        rig.queues[0].data = 8;
        let requests = ROOMS + 4;
        for n in 0..requests {
            rig.put(0, &[&header(0, n as u64)], &[512, 1]);
        }
        rig.service();
        let mut done = 0;
        while done < requests {
            let ready = host.lock().unwrap().has.len();
            assert!((1..=ROOMS).contains(&ready), "{ready} at a time");
            assert!(done > 0 || ready == ROOMS);
            host.lock().unwrap().ends();
            rig.service();
            done += 1;
        }
        (0..requests).for_each(|n| assert!(rig.used(0).is_some(), "{n} in round {round}"));
        assert_eq!(rig.device.free.len(), SLOTS);
    }
}

#[test]
fn zeroes_that_have_to_be_written_are_aligned_too() {
    let (mut rig, host) = fake(1 << 20);
    let segment = [&8u64.to_le_bytes()[..], &8u32.to_le_bytes(), &1u32.to_le_bytes()].concat();
    rig.put(0, &[&header(13, 0), &segment], &[1]);
    rig.service();
    host.lock().unwrap().fails(libc::EOPNOTSUPP);
    rig.service();
    let mut bytes = [1; 4096];
    let host = host.lock().unwrap();
    let buffers = &host.has[0].1.buffers;
    assert!(buffers.is_aligned(ALIGN as usize) && buffers.copy_out(&mut bytes) == 4096 && bytes == [0; 4096]);
}
