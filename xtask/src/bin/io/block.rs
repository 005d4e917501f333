//! A disk: reads of 4 KiB at places without order, from a file that the host's page cache holds.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use bantam::virtio::block::Block;
use io_uring::{IoUring, opcode, types};

use crate::Subject;
use crate::driver::DEPTH;
use crate::stage::Stage;

const BLOCK: usize = 4096;
/// Of the file.
const BLOCKS: u64 = 1 << 13;
/// In a slot's buffers: the head, the data, the status.
const DATA: usize = 64;
const STATUS: usize = DATA + BLOCK;

/// The place of the next read.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) % BLOCKS
}

/// The device.
pub struct Disk {
    stage: Stage,
    random: u64,
    wanted: [u64; DEPTH as usize],
}

/// Makes the file: each block begins with its number.
pub fn make(path: &Path) -> Result<()> {
    let mut block = [0x5a; BLOCK];
    let mut all = Vec::new();
    for number in 0..BLOCKS {
        block.iter_mut().zip(number.to_le_bytes()).for_each(|(to, from)| *to = from);
        all.extend(block);
    }
    std::fs::write(path, &all).with_context(|| path.display().to_string())
}

impl Disk {
    pub fn new(path: &Path, thread: bool) -> Result<Self> {
        let device = Block::new(&format!("{},ro", path.display()).parse()?)?;
        let stage = Stage::new(Box::new(device), thread)?;
        let driver = stage.drivers.first().context("a queue")?;
        (0..DEPTH).try_for_each(|slot| driver.shape(slot, &[16], &[BLOCK as u32, 1]))?;
        Ok(Self { stage, random: 1, wanted: [0; DEPTH as usize] })
    }
}

impl Subject for Disk {
    fn run(&mut self, requests: u64) -> Result<()> {
        let (mut begun, mut done) = (0, 0);
        while done < requests {
            let driver = self.stage.drivers.first_mut().context("a queue")?;
            while begun < requests
                && let Some(slot) = driver.free()
            {
                let block = next(&mut self.random);
                self.wanted.get_mut(usize::from(slot)).into_iter().for_each(|place| *place = block);
                // VIRTIO_BLK_T_IN at a sector.
                driver.put(slot, 0, 0u64.to_le_bytes());
                driver.put(slot, 8, (block * 8).to_le_bytes());
                driver.put(slot, STATUS, [0xff]);
                driver.offer(slot);
                begun += 1;
            }
            self.stage.kick(0);
            let mut any = false;
            let driver = self.stage.drivers.first_mut().context("a queue")?;
            while let Some((slot, size)) = driver.used() {
                let found = u64::from_le_bytes(driver.get(slot, DATA));
                let right = self.wanted.get(usize::from(slot)) == Some(&found);
                ensure!(right && size as usize == BLOCK + 1 && driver.get(slot, STATUS) == [0], "a read went wrong");
                (any, done) = (true, done + 1);
            }
            if !any {
                self.stage.wait();
            }
        }
        Ok(())
    }

    fn stage(&self) -> &Stage {
        &self.stage
    }
}

/// The floor: the same reads by a bare io_uring, as many at a time.
pub struct Floor {
    ring: IoUring,
    file: File,
    room: Vec<u8>,
    random: u64,
}

impl Floor {
    pub fn new(path: &Path) -> Result<Self> {
        let room = vec![0; BLOCK * usize::from(DEPTH)];
        Ok(Self { ring: IoUring::new(DEPTH.into())?, file: File::open(path)?, room, random: 1 })
    }

    pub fn run(&mut self, requests: u64) -> Result<()> {
        let mut wanted = [0; DEPTH as usize];
        let mut left = requests;
        while left > 0 {
            let count = left.min(DEPTH.into());
            for (slot, (place, wanted)) in self.room.chunks_mut(BLOCK).zip(&mut wanted).take(count as usize).enumerate()
            {
                *wanted = next(&mut self.random);
                let fd = types::Fd(self.file.as_raw_fd());
                let entry = opcode::Read::new(fd, place.as_mut_ptr(), BLOCK as u32).offset(*wanted * BLOCK as u64);
                // SAFETY: the place stays, and nobody looks at it before the kernel has answered.
                #[allow(unsafe_code)]
                unsafe { self.ring.submission().push(&entry.build().user_data(slot as u64)) }?;
            }
            self.ring.submit_and_wait(count as usize)?;
            for entry in self.ring.completion() {
                let slot = entry.user_data() as usize;
                let found = self.room.get(slot * BLOCK..).and_then(|place| place.first_chunk());
                let right = found.map(|bytes| u64::from_le_bytes(*bytes)) == wanted.get(slot).copied();
                ensure!(right && entry.result() == BLOCK as i32, "a read of the floor went wrong");
                left -= 1;
            }
        }
        Ok(())
    }
}
