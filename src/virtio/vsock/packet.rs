//! The header of a packet (VIRTIO 1.3 §5.10.6).

use crate::virtio::Chain;

/// Bytes of a header.
pub const HEADER: usize = 44;
/// VIRTIO_VSOCK_TYPE_STREAM
pub const STREAM: u16 = 1;
/// The host's address.
pub const HOST: u64 = 2;

/// VIRTIO_VSOCK_OP_…
pub mod op {
    /// Asks for a connection.
    pub const REQUEST: u16 = 1;
    /// Grants it.
    pub const RESPONSE: u16 = 2;
    /// Ends it, or says that there is none.
    pub const RST: u16 = 3;
    /// The sender will not receive, or not send, any more.
    pub const SHUTDOWN: u16 = 4;
    /// Data.
    pub const RW: u16 = 5;
    /// Says how much the sender can take.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for that.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE
pub const NO_RECEIVE: u32 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_SEND
pub const NO_SEND: u32 = 2;

/// A header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    /// The sender's address.
    pub src_cid: u64,
    /// The receiver's address.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's port.
    pub dst_port: u32,
    /// Bytes of data that follow.
    pub len: u32,
    /// What kind of socket it is for.
    pub kind: u16,
    /// What it says.
    pub op: u16,
    /// More of that.
    pub flags: u32,
    /// The sender's buffer, in bytes.
    pub buf_alloc: u32,
    /// Bytes that have left that buffer, in all (modulo 2^32).
    pub fwd_cnt: u32,
}

impl Header {
    /// The connection that it belongs to, by its sender, who is the guest.
    pub fn key(&self) -> super::Key {
        (self.src_port, self.dst_port)
    }

    /// Reads one from the start of a chain.
    pub fn read(chain: &mut Chain) -> Option<Self> {
        let mut bytes = [0; HEADER];
        if chain.read(&mut bytes) < HEADER {
            return None;
        }
        let mut rest = bytes.as_slice();
        Some(Self {
            src_cid: u64::from_le_bytes(take(&mut rest)?),
            dst_cid: u64::from_le_bytes(take(&mut rest)?),
            src_port: u32::from_le_bytes(take(&mut rest)?),
            dst_port: u32::from_le_bytes(take(&mut rest)?),
            len: u32::from_le_bytes(take(&mut rest)?),
            kind: u16::from_le_bytes(take(&mut rest)?),
            op: u16::from_le_bytes(take(&mut rest)?),
            flags: u32::from_le_bytes(take(&mut rest)?),
            buf_alloc: u32::from_le_bytes(take(&mut rest)?),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)?),
        })
    }

    /// As it is in memory.
    pub fn bytes(&self) -> [u8; HEADER] {
        let Self { src_cid, dst_cid, src_port, dst_port, len, kind, op, flags, buf_alloc, fwd_cnt } = *self;
        let mut bytes = [0; HEADER];
        let mut rest = bytes.as_mut_slice();
        put(&mut rest, src_cid.to_le_bytes());
        put(&mut rest, dst_cid.to_le_bytes());
        put(&mut rest, src_port.to_le_bytes());
        put(&mut rest, dst_port.to_le_bytes());
        put(&mut rest, len.to_le_bytes());
        put(&mut rest, kind.to_le_bytes());
        put(&mut rest, op.to_le_bytes());
        put(&mut rest, flags.to_le_bytes());
        put(&mut rest, buf_alloc.to_le_bytes());
        put(&mut rest, fwd_cnt.to_le_bytes());
        bytes
    }
}

/// Puts bytes down, and what is left of the place.
fn put<const N: usize>(rest: &mut &mut [u8], bytes: [u8; N]) {
    if let Some((first, after)) = std::mem::take(rest).split_first_chunk_mut::<N>() {
        *first = bytes;
        *rest = after;
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (first, after) = rest.split_first_chunk::<N>()?;
    *rest = after;
    Some(*first)
}
