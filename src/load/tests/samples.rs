//! Guests for tests, made byte by byte, and a start of them without KVM.

use std::fmt;

use clap::{Args, FromArgMatches};

use crate::arch::{self, BootRegs};
use crate::config::{Config, Size};
use crate::error::verdict;
use crate::load::{Guest, Image, identify, load, settle};
use crate::memory::Memory;

/// A configuration from command-line words; 4 MiB of RAM unless they say otherwise.
pub fn config(words: &[&str]) -> Config {
    let command = Config::augment_args_for_update(clap::Command::new("test").no_binary_name(true));
    let mut config = Config { memory: Size(4 << 20), ..Config::default() };
    config.update_from_arg_matches(&command.try_get_matches_from(words).unwrap()).unwrap();
    config
}

/// A guest in RAM.
pub struct Started {
    pub config: Config,
    pub boot: BootRegs,
    pub memory: Memory,
    pub guest: Guest,
}

impl fmt::Debug for Started {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "started {}", self.guest)
    }
}

impl Started {
    pub fn read(&self, at: u64, size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size];
        self.memory.read(at, &mut bytes).unwrap();
        bytes
    }

    pub fn word(&self, at: u64) -> u64 {
        u32::from_le_bytes(self.read(at, 4).try_into().unwrap()).into()
    }

    pub fn long(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.read(at, 8).try_into().unwrap())
    }

    /// A text up to its NUL.
    pub fn text(&self, at: u64) -> String {
        (at..).map(|at| char::from(self.read(at, 1)[0])).take_while(|c| *c != '\0').collect()
    }
}

/// Status and words of a refusal, hint included.
#[derive(Debug)]
pub struct Refused {
    pub status: u8,
    pub text: String,
}

fn all(config: &Config, image: Image) -> anyhow::Result<Started> {
    let guest = identify(image)?;
    let config = settle(config, &guest)?;
    let layout = arch::layout(&config)?;
    let memory = Memory::new(&layout.memory(), false)?;
    let boot = load(&config, &guest, &memory, &layout)?;
    Ok(Started { config, boot, memory, guest })
}

/// All that comes before KVM.
pub fn start(config: &Config, image: Image) -> Result<Started, Refused> {
    all(config, image).inspect(|s| arch::boot::tests::assert_enterable(&s.boot)).map_err(|e| {
        let (status, hint) = verdict(&e);
        let text = format!("{e:#} / {}", hint.unwrap_or_default());
        assert!(!text.contains(char::is_control), "{text:?}");
        Refused { status, text }
    })
}

/// The same for bytes.
pub fn run(words: &[&str], bytes: &[u8]) -> Result<Started, Refused> {
    start(&config(words), Image::from_bytes("guest", bytes.to_vec()))
}

/// A program header and the bytes it speaks of.
#[derive(Debug, Clone)]
pub struct Part {
    pub kind: u32,
    pub vaddr: u64,
    pub paddr: u64,
    pub bytes: Vec<u8>,
    pub memory: u64,
}

/// A PT_LOAD with equal virtual and physical addresses.
pub fn part(at: u64, bytes: &[u8]) -> Part {
    Part { kind: 1, vaddr: at, paddr: at, bytes: bytes.to_vec(), memory: bytes.len() as u64 }
}

/// A section that no segment has: its type and bytes.
pub type Section = (u32, Vec<u8>);

/// An ELF file to be.
#[derive(Debug, Clone)]
pub struct Elf {
    pub wide: bool,
    pub machine: u16,
    pub kind: u16,
    pub entry: u64,
    pub parts: Vec<Part>,
    pub sections: Vec<Section>,
}

/// Sixteen bytes that no other part of a file has.
pub const CODE: &[u8] = b"\xfa\xf4CODE of a guest";

impl Elf {
    /// One that runs: code, and data with bss.
    pub fn new(wide: bool) -> Self {
        let data = Part { memory: 0x100, ..part(0x10_2000, b"data") };
        let machine = if wide { 62 } else { 3 };
        Self { wide, machine, kind: 2, entry: 0x10_0001, parts: vec![part(0x10_0000, CODE), data], sections: vec![] }
    }

    /// The same with `bytes` as its first part.
    pub fn with(wide: bool, bytes: &[u8]) -> Self {
        let mut elf = Self::new(wide);
        elf.parts[0] = part(0x10_0000, bytes);
        elf
    }

    fn address(&self, value: u64) -> Vec<u8> {
        if self.wide { value.to_le_bytes().to_vec() } else { (value as u32).to_le_bytes().to_vec() }
    }

    fn program_header(&self, part: &Part, offset: u64) -> Vec<u8> {
        let size = part.bytes.len() as u64;
        let fields: Vec<u8> =
            [offset, part.vaddr, part.paddr, size, part.memory].iter().flat_map(|v| self.address(*v)).collect();
        let (kind, flags) = (part.kind.to_le_bytes().to_vec(), 5u32.to_le_bytes().to_vec());
        let align = self.address(4);
        if self.wide { [kind, flags, fields, align].concat() } else { [kind, fields, flags, align].concat() }
    }

    fn section_header(&self, kind: u32, offset: u64, size: u64) -> Vec<u8> {
        let mut header = [0u32.to_le_bytes(), kind.to_le_bytes()].concat();
        for value in [0, 0, offset, size] {
            header.extend(self.address(value));
        }
        header.extend([0; 8]);
        header.extend([self.address(1), self.address(0)].concat());
        header
    }

    /// The file: headers, parts, sections, section headers, in this order.
    pub fn build(&self) -> Vec<u8> {
        let (header, ph, sh) = if self.wide { (64, 56, 64) } else { (52, 32, 40) };
        let mut body = Vec::new();
        let start = header + ph * self.parts.len();
        let mut place = |bytes: &[u8]| {
            body.resize((start + body.len()).next_multiple_of(8) - start, 0);
            let offset = (start + body.len()) as u64;
            body.extend_from_slice(bytes);
            offset
        };
        let programs: Vec<_> = self.parts.iter().map(|p| self.program_header(p, place(&p.bytes))).collect();
        let mut sections = vec![self.section_header(0, 0, 0)];
        for (kind, bytes) in &self.sections {
            sections.push(self.section_header(*kind, place(bytes), bytes.len() as u64));
        }
        let count = if self.sections.is_empty() { 0 } else { sections.len() };
        let table = if count == 0 { 0 } else { place(&sections.concat()) };
        let mut file = b"\x7fELF".to_vec();
        file.extend([1 + u8::from(self.wide), 1, 1]);
        file.resize(16, 0);
        file.extend([self.kind.to_le_bytes(), self.machine.to_le_bytes()].concat());
        file.extend(1u32.to_le_bytes());
        for value in [self.entry, header as u64, table] {
            file.extend(self.address(value));
        }
        file.extend([0; 4]);
        for value in [header, ph, self.parts.len(), sh, count, count.saturating_sub(1)] {
            file.extend((value as u16).to_le_bytes());
        }
        assert_eq!(file.len(), header);
        [file, programs.concat(), body].concat()
    }
}

/// A Multiboot 1 header; the address fields where flag 16 wants them.
pub fn multiboot1(flags: u32, fields: &[u32]) -> Vec<u8> {
    let magic = 0x1bad_b002u32;
    let checksum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    [magic, flags, checksum].iter().chain(fields).flat_map(|w| w.to_le_bytes()).collect()
}

/// A Multiboot 2 header tag.
pub fn tag(kind: u16, flags: u16, body: &[u32]) -> Vec<u8> {
    let mut tag = [kind.to_le_bytes(), flags.to_le_bytes()].concat();
    tag.extend((8 + 4 * body.len() as u32).to_le_bytes());
    tag.extend(body.iter().flat_map(|w| w.to_le_bytes()));
    tag.resize(tag.len().next_multiple_of(8), 0);
    tag
}

/// A Multiboot 2 header with these tags and an end tag.
pub fn multiboot2(tags: &[Vec<u8>]) -> Vec<u8> {
    let tags = [tags.concat(), tag(0, 0, &[])].concat();
    let (magic, length) = (0xe852_50d6u32, 16 + tags.len() as u32);
    let checksum = 0u32.wrapping_sub(magic).wrapping_sub(length);
    [[magic, 0, length, checksum].iter().flat_map(|w| w.to_le_bytes()).collect(), tags].concat()
}

/// Replaces bytes of a file.
pub fn patch(bytes: &mut [u8], at: usize, with: &[u8]) {
    bytes[at..][..with.len()].copy_from_slice(with);
}

/// Packed by gzip's method.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut packer = flate2::GzBuilder::new().filename("Image").write(Vec::new(), flate2::Compression::default());
    packer.write_all(bytes).unwrap();
    packer.finish().unwrap()
}

/// Packed by zstd's, with a checksum.
pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

/// In one zstd block that is not packed, without a checksum.
pub fn zstd_plain(bytes: &[u8]) -> Vec<u8> {
    let block = ((bytes.len() as u32) << 3 | 1).to_le_bytes();
    [&[0x28, 0xb5, 0x2f, 0xfd, 0, 7 << 3], &block[..3], bytes].concat()
}

/// An EFI program that would unpack itself; for what architecture it does not say.
pub fn zboot(method: &str, packed: &[u8]) -> Vec<u8> {
    let mut head = vec![0; 0x200];
    patch(&mut head, 0, b"MZ\0\0zimg");
    patch(&mut head, 8, &0x200u32.to_le_bytes());
    patch(&mut head, 12, &(packed.len() as u32).to_le_bytes());
    patch(&mut head, 24, method.as_bytes());
    patch(&mut head, 0x3c, &0x40u32.to_le_bytes());
    // What unpacks it comes after it.
    [&head, packed, &[0xcc; 64]].concat()
}

/// An arm64 kernel of 1 MiB that takes 2: with the header of an EFI program, and a version.
pub fn arm_image() -> Vec<u8> {
    let mut image: Vec<u8> = (0..1u32 << 18).flat_map(|i| (i / 3 * 7).to_le_bytes()).collect();
    image[..0x200].fill(0);
    patch(&mut image, 0, b"MZ\x40\xfa");
    patch(&mut image, 16, &(2u64 << 20).to_le_bytes());
    patch(&mut image, 24, &0xau64.to_le_bytes());
    patch(&mut image, 0x38, b"ARM\x64");
    patch(&mut image, 0x3c, &0x40u32.to_le_bytes());
    patch(&mut image, 0x40, b"PE\0\0\x64\xaa\x02\0");
    patch(&mut image, 0x40 + 20, &0xa0u16.to_le_bytes());
    for (number, start, size) in [(0, 0x1_0000, 0xc_0000u32), (1, 0xd_0000, 0x3_0000)] {
        let section = 0x40 + 24 + 0xa0 + 40 * number;
        patch(&mut image, section + 16, &size.to_le_bytes());
        patch(&mut image, section + 20, &(start as u32).to_le_bytes());
    }
    // Across the pieces in which it is read.
    patch(&mut image, 0x2_0000 - 20, b"Linux version %s \0");
    patch(&mut image, 0x4_0000 - 20, b"Linux version 6.1.0-9-test (someone) #1 SMP");
    image
}
