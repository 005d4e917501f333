//! Hosts that fail (PROMISES rows 12 to 15).

use std::os::unix::fs::FileExt;

use super::super::limit::Rate;
use super::*;
use crate::host::sys::disk::perform;

/// One request on a host that fails it.
fn failing(rig: &mut Rig, host: &Mutex<Host>, kind: u32, code: i32) -> u8 {
    let room: &[u32] = if kind == 0 { &[512, 1] } else { &[1] };
    let data: &[u8] = if kind == 1 { &[1; 512] } else { &[] };
    let (_, at) = rig.put(0, &[&header(kind, 0), data], room);
    rig.service();
    host.lock().unwrap().fails(code);
    rig.service();
    assert!(rig.used(0).is_some());
    let mut status = [9];
    rig.memory.read(*at.last().unwrap(), &mut status).unwrap();
    status[0]
}

#[test]
fn p12_an_error_of_the_host_is_one_of_that_request_and_stays_for_flush() {
    for kind in [1, 4] {
        let (mut rig, host) = Fake::disk(1 << 20);
        assert_eq!(failing(&mut rig, &host, 0, libc::EIO), status::IOERR);
        assert!(!rig.device.failed, "what was read wrong can be read again");
        assert_eq!(failing(&mut rig, &host, kind, libc::EIO), status::IOERR);
        assert_eq!(rig.device.errors, 2);
        // Reads and writes go on.
        rig.put(0, &[&header(1, 0), &[1; 512]], &[1]);
        rig.service();
        host.lock().unwrap().ends();
        rig.service();
        assert!(rig.used(0).is_some());
        // No flush is well any more, and the host is not even asked; a reset of the device does not change that.
        assert_eq!(rig.flush(), status::IOERR);
        let fresh = rig.device.save();
        rig.device.load(&fresh).unwrap();
        assert_eq!(rig.flush(), status::IOERR);
        assert!(host.lock().unwrap().has.is_empty());
    }
}

#[test]
fn p12_a_flush_that_is_under_way_when_a_write_fails_is_no_success() {
    let (mut rig, host) = Fake::disk(1 << 20);
    rig.put(0, &[&header(1, 0), &[1; 512]], &[1]);
    let (_, at) = rig.put(0, &[&header(4, 0)], &[1]);
    rig.service();
    host.lock().unwrap().fails(libc::EIO);
    host.lock().unwrap().ends();
    rig.service();
    let mut status = [9];
    rig.memory.read(at[0], &mut status).unwrap();
    assert_eq!(status[0], status::IOERR);
}

#[test]
fn p13_a_full_host_is_an_error_and_not_the_end() {
    let (mut rig, host) = Fake::disk(1 << 20);
    for code in [libc::ENOSPC, libc::EFBIG, libc::EDQUOT] {
        assert_eq!(failing(&mut rig, &host, 1, code), status::IOERR);
    }
    rig.put(0, &[&header(0, 0)], &[512, 1]);
    rig.service();
    host.lock().unwrap().ends();
    rig.service();
    assert_eq!(rig.used(0).unwrap().1, 513);
}

#[test]
fn p14_a_disk_that_never_answers_is_given_up() {
    let (mut rig, host) = Fake::disk(1 << 20);
    rig.device.patience = Duration::from_millis(50);
    rig.put(0, &[&header(0, 0)], &[512, 1]);
    rig.service();
    let start = Instant::now();
    rig.device.drain(&mut rig.active);
    assert!((Duration::from_millis(50)..Duration::from_secs(5)).contains(&start.elapsed()));
    // The host may still write: that memory stays, without the machine that it was of.
    rig.memory.write(0x3000, b"there").unwrap();
    let (_, at) = rig.put(0, &[&header(0, 0)], &[512, 1]);
    rig.service();
    assert!(rig.used(0).is_none());
    host.lock().unwrap().ends();
    rig.service();
    assert!(rig.used(0).is_none(), "it answers nothing any more");
    let mut byte = [0];
    rig.memory.read(at[0], &mut byte).unwrap();
    assert_eq!(byte, [0xaa]);
    let start = Instant::now();
    rig.device.drain(&mut rig.active);
    assert!(start.elapsed() < Duration::from_millis(50), "it is given up once");
}

/// A disk that takes its time.
struct Slow(File, Duration);

impl super::super::engine::Image for Slow {
    fn perform(&self, job: &mut Job) -> io::Result<u32> {
        std::thread::sleep(self.1);
        perform(&self.0, job)
    }
}

#[test]
fn p14_a_slow_disk_is_waited_for_by_who_wants_it_back_and_by_nobody_else() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let pool = Pool::new(Box::new(Slow(file, Duration::from_millis(300)))).unwrap();
    let mut rig = Rig::new(Block::with("test".into(), medium(1 << 20), 1, Box::new(pool), None));
    for sector in 0..4 {
        rig.put(0, &[&header(0, sector)], &[512, 1]);
    }
    let start = Instant::now();
    rig.service();
    assert!(start.elapsed() < Duration::from_millis(200), "the thread of all devices does not wait");
    rig.device.drain(&mut rig.active);
    assert!(start.elapsed() >= Duration::from_millis(300));
    (0..4).for_each(|_| assert_eq!(rig.used(0).unwrap().1, 513));
}

#[test]
fn memory_outlives_the_machine_while_threads_use_it() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let pool = Pool::new(Box::new(Slow(file, Duration::from_millis(200)))).unwrap();
    let mut rig = Rig::new(Block::with("test".into(), medium(1 << 20), 1, Box::new(pool), None));
    rig.put(0, &[&header(0, 0)], &[512, 1]);
    rig.service();
    drop(rig);
    std::thread::sleep(Duration::from_millis(400));
}

#[test]
fn p15_a_file_that_became_shorter_is_an_error_where_it_lacks_something() {
    for (mut rig, file) in disks(1 << 20) {
        assert_eq!(rig.write(0, &[3; 4096]), status::OK);
        file.set_len(2048).unwrap();
        assert_eq!(rig.read(0, 2048), [3; 2048]);
        assert_eq!(rig.ask(0, 2, &[], 2048).0, status::IOERR);
        assert_eq!(rig.ask(0, 1024, &[], 512).0, status::IOERR);
        assert_eq!(rig.read(0, 512), [3; 512]);
    }
}

#[test]
fn what_is_done_in_part_is_done_in_full() {
    let (mut rig, host) = Fake::disk(1 << 20);
    rig.put(0, &[&header(1, 2), &[1; 300], &[2; 724]], &[1]);
    rig.service();
    host.lock().unwrap().end(0, Ok(500));
    rig.service();
    {
        let mut host = host.lock().unwrap();
        let job = &host.has[0].1;
        let mut rest = [0; 1024];
        assert_eq!((job.offset, job.buffers.copy_out(&mut rest)), (1524, 524));
        assert_eq!(rest[..524], [2; 524]);
        host.fails(libc::EINTR);
    }
    rig.service();
    host.lock().unwrap().fails(libc::ECANCELED);
    rig.service();
    host.lock().unwrap().ends();
    rig.service();
    assert_eq!(rig.used(0).unwrap().1, 1);
    assert!(!rig.device.failed);
}

#[test]
fn a_host_that_says_again_for_ever_is_an_error() {
    let (mut rig, host) = Fake::disk(1 << 20);
    rig.put(0, &[&header(0, 2)], &[512, 1]);
    rig.service();
    for _ in 0..TRIES {
        host.lock().unwrap().fails(libc::EAGAIN);
        rig.service();
        assert!(rig.used(0).is_none());
    }
    host.lock().unwrap().fails(libc::EAGAIN);
    rig.service();
    assert!(rig.used(0).is_some());
}

#[test]
fn more_requests_than_slots_wait_for_their_turn() {
    let (mut rig, host) = Fake::disk(1 << 20);
    rig.device.free.truncate(4);
    for sector in 0..10 {
        rig.put(0, &[&header(0, sector)], &[512, 1]);
    }
    for left in [4, 4, 2] {
        rig.service();
        assert_eq!(host.lock().unwrap().has.len(), left);
        (0..left).for_each(|_| host.lock().unwrap().ends());
    }
    rig.service();
    (0..10).for_each(|_| assert!(rig.used(0).is_some()));
}

#[test]
fn a_limit_holds_requests_back_and_lets_them_through() {
    let (mut rig, host) = Fake::disk(1 << 20);
    rig.device.limit = Some(Limit::new(Rate::Requests(20)).unwrap());
    for sector in 0..8 {
        rig.put(0, &[&header(0, sector)], &[512, 1]);
    }
    rig.service();
    let first = host.lock().unwrap().has.len();
    assert!((2..=4).contains(&first), "{first}");
    let start = Instant::now();
    while host.lock().unwrap().has.len() < 8 {
        let limit = rig.device.limit.as_ref().unwrap();
        let timer = limit.timer();
        let patience = Timespec { tv_sec: 20, tv_nsec: 0 };
        assert_eq!(poll(&mut [PollFd::new(&timer, PollFlags::IN)], Some(&patience)).unwrap(), 1);
        rig.service();
    }
    assert!(start.elapsed() > Duration::from_millis(150));
}

#[test]
fn a_driver_that_knows_no_flush_has_every_write_on_the_disk() {
    let (mut rig, host) = Fake::disk(1 << 20);
    rig.active.features = 0;
    rig.put(0, &[&header(1, 0), &[1; 512]], &[1]);
    rig.service();
    assert_eq!(host.lock().unwrap().has[0].1.work, Work::Write { stable: true });
    let (mut rig, file) = disks(1 << 20).pop().unwrap();
    rig.active.features = 0;
    assert_eq!(rig.write(9, &[4; 512]), status::OK);
    let mut bytes = [0; 512];
    file.read_exact_at(&mut bytes, 9 * 512).unwrap();
    assert_eq!(bytes, [4; 512]);
}
