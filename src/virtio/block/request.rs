//! What a driver asks a disk for (VIRTIO 1.3 §5.2.6), and whether it may.
//!
//! Invariant: what comes out lies within the disk, and nothing that writes comes out for one that is read-only.

use crate::virtio::Chain;

/// Bytes of a sector, by which drivers count whatever the block size is (§5.2.4).
pub const SECTOR: u64 = 512;
/// The most sectors of one discard, and of one write of zeroes: what is all the same if it has to be written.
pub const MOST_DISCARD: u32 = 1 << 21;
/// See [`MOST_DISCARD`].
pub const MOST_ZEROES: u32 = 1 << 16;
/// Bytes of the answer to "get id".
pub const ID: usize = 20;

/// How a request ended: the last byte that the device writes (§5.2.6).
pub mod status {
    /// Well.
    pub const OK: u8 = 0;
    /// The host could not, or the driver must not.
    pub const IOERR: u8 = 1;
    /// The device does not know it.
    pub const UNSUPP: u8 = 2;
}
use self::status::{IOERR, UNSUPP};

/// What a disk is, as far as requests have to fit it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Medium {
    /// Bytes.
    pub capacity: u64,
    /// Nothing is written.
    pub read_only: bool,
    /// What offsets and sizes are multiples of.
    pub block: u32,
    /// What the guest knows it by.
    pub serial: [u8; ID],
}

/// A request that may be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Read from here on what there is room for.
    Read(u64),
    /// Write from here on what there is.
    Write(u64),
    /// See that what was written stays.
    Flush,
    /// Say who it is.
    Id,
    /// Give up so many bytes there.
    Discard(u64, u64),
    /// Make zeroes of so many bytes there, perhaps without room for them.
    Zero(u64, u64, bool),
}

/// Takes in the head of a chain, and all of a discard; data is left. An error is the status to answer with; none where
/// the chain has no head.
pub fn parse(chain: &mut Chain, medium: &Medium) -> Option<Result<Request, u8>> {
    let mut head = [0; 16];
    if chain.read(&mut head) < head.len() {
        return None;
    }
    let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = head;
    let sector = u64::from_le_bytes(sector);
    let writes = |request: Result<Request, u8>| if medium.read_only { Err(IOERR) } else { request };
    Some(match u32::from_le_bytes([k0, k1, k2, k3]) {
        // The status is the last byte that can be written; what is before it is data.
        0 => within(medium, sector, (chain.left_to_write().saturating_sub(1)).into()).map(Request::Read),
        1 => writes(within(medium, sector, chain.left_to_read().into()).map(Request::Write)),
        4 => Ok(Request::Flush),
        8 => Ok(Request::Id),
        kind @ (11 | 13) => writes(range(chain, medium, kind == 13)),
        _ => Err(UNSUPP),
    })
}

/// Where the data of a request starts, in bytes.
fn within(medium: &Medium, sector: u64, size: u64) -> Result<u64, u8> {
    let start = sector.checked_mul(SECTOR).ok_or(IOERR)?;
    let end = start.checked_add(size).ok_or(IOERR)?;
    let block = u64::from(medium.block);
    let fits = end <= medium.capacity && start.is_multiple_of(block) && size.is_multiple_of(block);
    if fits { Ok(start) } else { Err(IOERR) }
}

/// The one segment of a discard or of a write of zeroes (§5.2.6: struct virtio_blk_discard_write_zeroes).
fn range(chain: &mut Chain, medium: &Medium, zero: bool) -> Result<Request, u8> {
    let mut segment = [0; 16];
    if chain.left_to_read() as usize != segment.len() || chain.read(&mut segment) != segment.len() {
        return Err(IOERR);
    }
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = segment;
    let (sectors, flags) = (u32::from_le_bytes([n0, n1, n2, n3]), u32::from_le_bytes(flags));
    if flags > u32::from(zero) {
        return Err(UNSUPP);
    }
    if sectors > if zero { MOST_ZEROES } else { MOST_DISCARD } {
        return Err(IOERR);
    }
    let size = u64::from(sectors) * SECTOR;
    let start = within(medium, u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]), size)?;
    Ok(if zero { Request::Zero(start, size, flags == 1) } else { Request::Discard(start, size) })
}
