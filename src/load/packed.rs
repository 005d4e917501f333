//! Packed kernels: gzip, zstd, and EFI zboot images, which hold either; unpacked as a stream, straight into guest RAM.
//!
//! Invariant: what is unpacked is never whole in memory but in guest RAM, and ends where its place ends, whatever the
//! file says of sizes. (A zstd frame refers back to what it has unpacked as far as its window goes; that much is kept
//! while it is read, never more than the place has, nor more than fits what a machine may use: its RAM and 64 MiB.)
//! Every refusal names a byte of the file.

use std::io::{self, BufRead, Chain, Read};

use anyhow::Result;
use flate2::bufread::GzDecoder;
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use super::image::{Image, at};
use super::linux::{foreign, pe_machine};
use crate::arch;
use crate::error::{Refusal, refuse};

/// What is read, and what is written, at once.
const PIECE: usize = 64 << 10;

/// How a kernel is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// RFC 1952.
    Gzip,
    /// RFC 8878.
    Zstd,
}

impl Method {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }
}

/// Where in a file the packed bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packed {
    /// How they are packed.
    pub method: Method,
    /// The first.
    pub at: u64,
    /// How many; the whole rest of the file, where nothing says.
    pub size: u64,
    /// They are in an EFI program that would unpack itself.
    pub zboot: bool,
}

/// The first bytes of what is packed in a way that no guest begins with.
const OTHERS: [(&str, &[u8]); 5] = [
    ("xz", b"\xfd7zXZ\0"),
    ("bzip2", b"BZh91AY&SY"),
    ("lz4", b"\x02\x21\x4c\x18"),
    ("lz4", b"\x04\x22\x4d\x18"),
    ("lzop", b"\x89LZO\0"),
];

/// A packing that Bantam does not know.
fn unknown(name: &str) -> Refusal {
    refuse(format!("it is packed with {name}; Bantam unpacks gzip and zstd")).hint("unpack it first")
}

impl Packed {
    /// How much of it can be looked through without RAM to put it into: a zstd frame keeps as much.
    pub fn scanned(&self) -> u64 {
        match self.method {
            Method::Gzip => u64::MAX,
            Method::Zstd => 32 << 20,
        }
    }

    /// What is packed in a file that begins with `head`; nothing in most.
    ///
    /// # Errors
    /// It is packed, but cut short or not in a way that Bantam knows.
    pub fn find(image: &Image, head: &[u8]) -> Result<Option<Self>, Refusal> {
        if let Some((name, _)) = OTHERS.iter().find(|(_, mark)| head.starts_with(mark)) {
            return Err(unknown(name));
        }
        // RFC 1952, 2.3: the mark, "deflate", and the flags that there are.
        let gzip = head.starts_with(&[0x1f, 0x8b, 8]) && head.get(3).is_none_or(|flags| flags & 0xe0 == 0);
        let zstd = head.starts_with(&MAGIC);
        let method = match (gzip, zstd) {
            (true, _) => Method::Gzip,
            (_, true) => Method::Zstd,
            _ => return zboot(image, head),
        };
        Ok(Some(Self { method, at: 0, size: image.len(), zboot: false }))
    }
}

/// The file, or what is packed in it, and the first bytes of that, at most `most`.
///
/// # Errors
/// It is packed, but cut short or not in a way that Bantam knows.
pub fn open(image: Image, most: usize) -> Result<(Image, Vec<u8>)> {
    let head = image.head(most)?;
    let Some(packed) = Packed::find(&image, &head)? else { return Ok((image, head)) };
    let image = image.unpacked(packed);
    let head = image.head(most)?;
    Ok((image, head))
}

/// The header of an EFI program that unpacks itself (Linux include/linux/pe.h, drivers/firmware/efi/libstub/
/// zboot-header.S): "zimg" at byte 4, offset and size of what is packed at 8, the name of its packing at 24.
fn zboot(image: &Image, head: &[u8]) -> Result<Option<Packed>, Refusal> {
    if !head.starts_with(b"MZ") || at(head, 4) != Some(*b"zimg") {
        return Ok(None);
    }
    let word = |offset| at(head, offset).map(u32::from_le_bytes).map(u64::from);
    let (Some(start), Some(size), Some(name)) = (word(8), word(12), at::<32>(head, 24)) else {
        return Err(refuse(format!(
            "cut short: the zboot header ends at byte 0x38 of the file, which ends at {:#x}",
            image.len()
        )));
    };
    if let Some(name) = pe_machine(head).filter(|name| *name != arch::NAME) {
        return Err(foreign(name));
    }
    image.check("the packed kernel", start, size)?;
    let name: String = name.iter().take_while(|c| **c != 0).map(|c| char::from(*c)).collect();
    let method = match name.as_str() {
        "gzip" => Method::Gzip,
        // Its name was "zstd22" in Linux before 6.12.
        "zstd" | "zstd22" => Method::Zstd,
        "xzkern" => return Err(unknown("xz")),
        "lz4" | "lzo" | "lzma" | "bzip2" => return Err(unknown(&name)),
        _ => return Err(refuse(format!("what it is packed with, {name:?} at byte 0x18, is not known"))),
    };
    Ok(Some(Packed { method, at: start, size, zboot: true }))
}

/// The packed bytes of a file, a piece at a time.
struct Pieces<'a> {
    image: &'a Image,
    /// Where in the file the piece in `bytes` begins.
    start: u64,
    end: u64,
    bytes: Vec<u8>,
    used: usize,
}

impl<'a> Pieces<'a> {
    fn new(image: &'a Image, packed: Packed, from: u64) -> Self {
        let end = packed.at.saturating_add(packed.size).min(image.len());
        Self { image, start: packed.at.saturating_add(from).min(end), end, bytes: Vec::new(), used: 0 }
    }

    /// The next byte's offset in the file.
    fn at(&self) -> u64 {
        self.start.saturating_add(self.used as u64)
    }
}

impl BufRead for Pieces<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.used >= self.bytes.len() {
            self.start = self.at();
            let size = usize::try_from(self.end.saturating_sub(self.start)).map_or(PIECE, |left| left.min(PIECE));
            self.bytes.resize(size, 0);
            self.used = 0;
            self.image.read_at(self.start, &mut self.bytes).map_err(io::Error::other)?;
        }
        Ok(self.bytes.get(self.used..).unwrap_or_default())
    }

    fn consume(&mut self, amount: usize) {
        self.used = self.used.saturating_add(amount).min(self.bytes.len());
    }
}

impl Read for Pieces<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(into)?;
        self.consume(count);
        Ok(count)
    }
}

/// The magic number of a zstd frame (RFC 8878, 3.1.1).
const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// The largest window that is taken: the one of `zstd -22 --ultra`, with which kernels are packed; zstd itself takes no
/// larger one unasked.
const WINDOW: u64 = 128 << 20;

/// What may be kept besides guest RAM: of the 64 MiB that a machine may use in addition, what the monitor leaves.
pub const KEPT: u64 = 56 << 20;
/// What is kept beside a window: the block that is being unpacked, and what has not been taken yet.
const BESIDE: u64 = 256 << 10;

/// What a zstd frame's header says (RFC 8878, 3.1.1.1).
#[derive(Debug, PartialEq, Eq)]
struct Frame {
    /// Bytes of the header.
    size: u64,
    /// How far back it may refer.
    window: u64,
    checksum: bool,
}

impl Frame {
    fn read(header: &[u8]) -> Option<Result<Self, Refusal>> {
        let flags = *header.get(4)?;
        let single = flags & 0x20 != 0;
        let dictionary = match flags & 3 {
            3 => 4,
            bytes => usize::from(bytes),
        };
        let content = match (flags >> 6, single) {
            (0, single) => usize::from(single),
            (log, _) => 1 << log,
        };
        let before = if single { 5 } else { 6 };
        let fields = before + dictionary;
        let window = if single {
            let bytes = header.get(fields..fields + content)?;
            let value = bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
            if content == 2 { value + 256 } else { value }
        } else {
            let byte = u64::from(*header.get(5)?);
            let base = 1u64 << (10 + (byte >> 3));
            base + base / 8 * (byte & 7)
        };
        if header.get(before..fields)?.iter().any(|byte| *byte != 0) {
            return Some(Err(refuse("it wants a zstd dictionary, which Bantam has not")));
        }
        if window > WINDOW {
            let what = format!(
                "its zstd window of {window} bytes, said at byte 5, is more than the {WINDOW} that Bantam takes"
            );
            return Some(Err(refuse(what).hint("unpack it first")));
        }
        Some(Ok(Self { size: (fields + content) as u64, window, checksum: flags & 4 != 0 }))
    }

    /// As far as it has to refer back when there are no more than `limit` bytes. At least a block's 128 KiB.
    fn narrow(&self, limit: u64) -> u64 {
        self.window.min(limit).clamp(128 << 10, WINDOW).next_power_of_two()
    }

    /// What is kept while `limit` bytes are unpacked is at most `spare`.
    fn check(&self, limit: u64, spare: u64) -> Result<(), Refusal> {
        let kept = self.narrow(limit) + BESIDE;
        if kept <= spare {
            return Ok(());
        }
        let what = format!(
            "its zstd window of {} bytes, said at byte 5, takes {kept} bytes of memory to unpack, where {spare} are left of \
             RAM and 64 MiB",
            self.window
        );
        Err(refuse(what).hint("unpack it first, or give the machine more --memory"))
    }

    /// A header for the same blocks that keeps no more than `limit` bytes to refer to, since there are no more: it says
    /// the window only.
    fn narrowed(&self, limit: u64) -> [u8; 6] {
        let window = self.narrow(limit);
        let exponent = u8::try_from(window.ilog2().saturating_sub(10)).unwrap_or(7);
        let [a, b, c, d] = MAGIC;
        [a, b, c, d, if self.checksum { 4 } else { 0 }, exponent << 3]
    }
}

/// A zstd frame, a block at a time.
struct Zstd<'a> {
    decoder: FrameDecoder,
    source: Chain<io::Cursor<[u8; 6]>, Pieces<'a>>,
    checksum: bool,
}

impl<'a> Zstd<'a> {
    fn new(image: &'a Image, packed: Packed, limit: u64, spare: u64) -> Result<Self> {
        let mut header = Vec::new();
        Pieces::new(image, packed, 0).take(32).read_to_end(&mut header)?;
        let frame = Frame::read(&header).unwrap_or_else(|| Err(cut_short(packed.at + header.len() as u64)))?;
        frame.check(limit, spare)?;
        let mut source = io::Cursor::new(frame.narrowed(limit)).chain(Pieces::new(image, packed, frame.size));
        let mut decoder = FrameDecoder::new();
        decoder.init(&mut source).map_err(|e| refuse(format!("its zstd frame is broken: {e}")))?;
        Ok(Self { decoder, source, checksum: frame.checksum })
    }

    fn pieces(&self) -> &Pieces<'a> {
        self.source.get_ref().1
    }
}

impl Read for Zstd<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        // All that is asked for at once: what has been taken can no longer be referred to, but as far as the window goes.
        while self.decoder.can_collect() < into.len() && !self.decoder.is_finished() {
            let one = BlockDecodingStrategy::UptoBlocks(1);
            self.decoder.decode_blocks(&mut self.source, one).map_err(io::Error::other)?;
        }
        let count = self.decoder.read(into)?;
        let sums = (self.decoder.get_checksum_from_data(), self.decoder.get_calculated_checksum());
        if count == 0 && !into.is_empty() && self.checksum && sums.0 != sums.1 {
            return Err(io::Error::other("its checksum is wrong"));
        }
        Ok(count)
    }
}

/// Packed bytes, unpacked as they are read.
enum Stream<'a> {
    Gzip(Box<GzDecoder<Pieces<'a>>>),
    Zstd(Box<Zstd<'a>>),
}

fn cut_short(end: u64) -> Refusal {
    refuse(format!("cut short: what is packed in it goes on beyond byte {end:#x}, where it ends"))
}

impl<'a> Stream<'a> {
    /// Of which at most `limit` bytes will be asked for, with `spare` bytes of memory to do it.
    fn new(image: &'a Image, packed: Packed, limit: u64, spare: u64) -> Result<Self> {
        Ok(match packed.method {
            Method::Gzip => Self::Gzip(Box::new(GzDecoder::new(Pieces::new(image, packed, 0)))),
            Method::Zstd => Self::Zstd(Box::new(Zstd::new(image, packed, limit, spare)?)),
        })
    }

    /// Reads until `into` is full or nothing is left.
    fn fill(&mut self, into: &mut [u8]) -> Result<usize, Refusal> {
        let mut done = 0;
        while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let read = match self {
                Self::Gzip(stream) => stream.read(rest),
                Self::Zstd(stream) => stream.read(rest),
            };
            match read {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(e) => return Err(self.broken(&e)),
            }
        }
        Ok(done)
    }

    /// Why it cannot go on, and where in the file.
    fn broken(&self, error: &io::Error) -> Refusal {
        let (name, pieces) = match self {
            Self::Gzip(stream) => (Method::Gzip.name(), stream.get_ref()),
            Self::Zstd(stream) => (Method::Zstd.name(), stream.pieces()),
        };
        let text = error.to_string();
        // All was there, but is not what it was.
        let whole = text.contains("checksum is wrong") || text.contains("matching checksum");
        if pieces.at() >= pieces.end && !whole {
            return cut_short(pieces.end);
        }
        let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        refuse(format!("broken: what is packed in it ({name}) makes no sense at byte {:#x}: {text}", pieces.at()))
    }
}

/// The first bytes of what is packed in `image`, at most `most`.
///
/// # Errors
/// It is broken or cut short before.
pub fn head(image: &Image, packed: Packed, most: usize) -> Result<Vec<u8>> {
    let mut head = vec![0; most];
    let count = Stream::new(image, packed, most as u64, KEPT)?.fill(&mut head)?;
    head.truncate(count);
    Ok(head)
}

/// Hands what is packed in `image` to `take`, piece by piece with their offsets, until that answers false; no more than
/// `limit` bytes, with at most `spare` bytes of memory besides. Says how many they were.
///
/// # Errors
/// It is broken, cut short or longer than that, or `take` refuses.
pub fn unpack(
    image: &Image,
    packed: Packed,
    limit: u64,
    spare: u64,
    mut take: impl FnMut(u64, &[u8]) -> Result<bool>,
) -> Result<u64> {
    let mut stream = Stream::new(image, packed, limit, spare)?;
    let (mut done, mut piece) = (0u64, vec![0; PIECE]);
    loop {
        let count = stream.fill(&mut piece)?;
        if count == 0 {
            return Ok(done);
        }
        let end = done.saturating_add(count as u64);
        if end > limit {
            return Err(
                refuse(format!("what is packed in it has more than the {limit} bytes that it says it needs")).into()
            );
        }
        let more = take(done, piece.get(..count).unwrap_or_default())?;
        done = end;
        if !more {
            return Ok(done);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::tests::samples::{gzip, zboot, zstd, zstd_plain};

    fn open_bytes(bytes: &[u8]) -> Result<Image> {
        open(Image::from_bytes("x", bytes.to_vec()), 1 << 10).map(|(image, _head)| image)
    }

    /// All that comes out, in pieces; at most `limit` bytes.
    fn all(bytes: &[u8], limit: u64) -> Result<Vec<u8>> {
        let image = open_bytes(bytes)?;
        let mut whole = Vec::new();
        image.scan(limit, |offset, piece| {
            assert_eq!(offset, whole.len() as u64);
            whole.extend_from_slice(piece);
            true
        })?;
        Ok(whole)
    }

    fn text() -> Vec<u8> {
        (0..80_000u32).flat_map(|i| (i / 7 * (i % 5)).to_le_bytes()).collect()
    }

    fn why(bytes: &[u8], limit: u64) -> String {
        format!("{:#}", all(bytes, limit).unwrap_err())
    }

    #[test]
    fn what_is_packed_comes_out_as_it_went_in() {
        let text = text();
        for bytes in [gzip(&text), zstd(&text), zboot("gzip", &gzip(&text)), zboot("zstd", &zstd(&text))] {
            assert!(bytes.len() < text.len());
            assert!(all(&bytes, text.len() as u64).unwrap() == text);
            let image = open_bytes(&bytes).unwrap();
            for most in [1, 64, 65536, 300_000] {
                assert!(image.head(most).unwrap() == text[..most], "{most}");
            }
            assert!(image.head(text.len() + 9).unwrap() == text);
        }
        assert!(open_bytes(b"MZ no zboot").unwrap().packed().is_none());
    }

    #[test]
    fn a_bomb_ends_where_its_place_ends() {
        let zeros = vec![0; 8 << 20];
        for bytes in [gzip(&zeros), zstd(&zeros), zboot("zstd", &zstd(&zeros))] {
            assert!(bytes.len() < 64 << 10);
            for limit in [0, 1, 1 << 20, (8 << 20) - 1] {
                let text = why(&bytes, limit);
                assert!(text.contains(&format!("more than the {limit} bytes")), "{limit}: {text}");
            }
            assert_eq!(all(&bytes, 8 << 20).unwrap().len(), 8 << 20);
        }
    }

    #[test]
    fn a_stream_that_is_cut_short_is_refused_with_its_end() {
        let text = text();
        for bytes in [gzip(&text), zstd(&text)] {
            for cut in (4..40).chain((40..bytes.len()).step_by(4096)).chain(bytes.len() - 9..bytes.len()) {
                let text = why(&bytes[..cut], 1 << 30);
                assert!(text.contains("cut short") && text.contains(&format!("{cut:#x}")), "{cut}: {text}");
            }
        }
        let bytes = zboot("gzip", &gzip(&text));
        for cut in 8..bytes.len().min(600) {
            assert!(why(&bytes[..cut], 1 << 30).contains("cut short"), "{cut}");
        }
    }

    #[test]
    fn a_broken_stream_is_refused_with_the_place() {
        let text = text();
        for bytes in [gzip(&text), zstd(&text)] {
            for at in (4..60).chain((60..bytes.len()).step_by(997)).chain(bytes.len() - 8..bytes.len()) {
                let mut broken = bytes.clone();
                broken[at] ^= 0x55;
                match all(&broken, text.len() as u64) {
                    // A name or a time in the header, or the length that it does not need.
                    Ok(whole) => assert!(whole == text, "{at:#x}: something else came out"),
                    Err(e) => assert!(!format!("{e:#}").contains(char::is_control), "{e:#}"),
                }
            }
        }
        let mut broken = gzip(&text);
        broken[5000] ^= 0xff;
        assert!(why(&broken, 1 << 30).contains("broken: what is packed in it (gzip) makes no sense at byte 0x"));
        let mut broken = zstd(&text);
        let end = broken.len();
        broken[end - 1] ^= 1;
        assert!(why(&broken, 1 << 30).contains("checksum"), "{}", why(&broken, 1 << 30));
    }

    #[test]
    fn what_bantam_cannot_unpack_is_named() {
        for (name, bytes) in [
            ("xz", &b"\xfd7zXZ\0\0"[..]),
            ("bzip2", b"BZh91AY&SY"),
            ("lz4", b"\x02\x21\x4c\x18"),
            ("lzop", b"\x89LZO\0\r"),
        ] {
            assert!(why(bytes, 9).contains(&format!("packed with {name};")), "{name}");
        }
        for (word, name) in [("xzkern", "xz"), ("lz4", "lz4"), ("lzma", "lzma"), ("lzo", "lzo")] {
            assert!(why(&zboot(word, b"packed"), 9).contains(&format!("packed with {name};")), "{word}");
        }
        assert!(why(&zboot("a\x1bb", b"packed"), 9).contains(r#""a\u{1b}b""#));
    }

    #[test]
    fn an_efi_program_of_another_architecture_is_foreign() {
        let other = if arch::NAME == "arm64" { b"PE\0\0\x64\x86" } else { b"PE\0\0\x64\xaa" };
        let mut bytes = zboot("lz4", b"packed");
        bytes[0x40..0x46].copy_from_slice(other);
        assert!(why(&bytes, 9).contains("guest; this host is"), "{}", why(&bytes, 9));
    }

    #[test]
    fn a_zstd_header_that_asks_for_too_much_is_refused() {
        // Its window, 2^(10 + 18): 256 MiB.
        let mut bytes = MAGIC.to_vec();
        bytes.extend([0, 18 << 3, 1, 0, 0]);
        assert!(why(&bytes, 9).contains("window of 268435456 bytes"));
        // A dictionary.
        let mut bytes = MAGIC.to_vec();
        bytes.extend([1, 0, 7, 1, 0, 0]);
        assert!(why(&bytes, 9).contains("dictionary"));
        let frame = |header: &[u8]| Frame::read(&[&MAGIC, header].concat()).unwrap().unwrap();
        assert_eq!(frame(&[0, 0]), Frame { size: 6, window: 1024, checksum: false });
        assert_eq!(frame(&[0x24, 9]), Frame { size: 6, window: 9, checksum: true });
        assert_eq!(frame(&[0x60, 1, 1]), Frame { size: 7, window: 513, checksum: false });
        assert_eq!(frame(&[0x40, 0x39, 1, 1]), Frame { size: 8, window: (128 << 10) * 9 / 8, checksum: false });
        assert_eq!(frame(&[0x80, 17 << 3, 0, 0, 0, 1]), Frame { size: 10, window: 128 << 20, checksum: false });
        assert_eq!(frame(&[0; 6]).narrowed(1 << 40), [0x28, 0xb5, 0x2f, 0xfd, 0, 7 << 3]);
        let wide = Frame { size: 6, window: 100 << 20, checksum: true };
        assert_eq!(wide.narrowed(1 << 40)[4..], [4, 17 << 3]);
        assert_eq!(wide.narrowed(40 << 20)[4..], [4, 16 << 3]);
        assert_eq!(wide.narrowed(0)[4..], [4, 7 << 3]);
    }

    /// A frame that says a window of 2^27 bytes, as `zstd -22 --ultra` does of what comes by a pipe (Linux
    /// scripts/Makefile.lib), and one block of zeroes.
    fn wide() -> Vec<u8> {
        let block = (100_000u32 << 3 | 1 << 1 | 1).to_le_bytes();
        [&MAGIC, &[0, 17 << 3][..], &block[..3], &[0]].concat()
    }

    #[test]
    fn a_window_that_memory_has_no_room_for_is_refused_and_no_other() {
        let image = open_bytes(&wide()).unwrap();
        let packed = image.packed().unwrap();
        let file = Image::from_bytes("x", wide());
        let tried = |limit, spare| unpack(&file, packed, limit, spare, |_, _| Ok(true));
        // What a machine may use in addition holds a window of 32 MiB, for whatever comes out.
        assert_eq!(tried(32 << 20, KEPT).unwrap(), 100_000);
        for limit in [(32 << 20) + 1, 1 << 40] {
            let refusal = tried(limit, KEPT).unwrap_err();
            let text = refusal.to_string();
            assert!(text.contains("window of 134217728 bytes, said at byte 5") && text.contains("64 MiB"), "{text}");
            assert_eq!(crate::error::verdict(&refusal).0, 125, "{text}");
        }
        // What RAM does not use, it may.
        assert_eq!(tried(1 << 40, (128 << 20) + BESIDE).unwrap(), 100_000);
        assert!(tried(1 << 40, (128 << 20) + BESIDE - 1).is_err());
        assert_eq!(tried(60 << 20, (64 << 20) + BESIDE).unwrap(), 100_000);
        // The head never needs much, and a kernel is looked through as far as may be.
        assert_eq!(image.head(1 << 10).unwrap(), vec![0; 1 << 10]);
        let mut shown = 0;
        image
            .scan(1 << 40, |_, piece| {
                shown += piece.len();
                true
            })
            .unwrap();
        assert_eq!(shown, 100_000);
    }

    #[test]
    fn a_frame_without_checksum_is_taken() {
        assert_eq!(all(&zstd_plain(b"as it is"), 100).unwrap(), b"as it is");
    }
}
