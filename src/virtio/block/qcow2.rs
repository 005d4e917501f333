//! Whether a qcow2 image's tables hold together, before `imago` is given it (QEMU's docs/interop/qcow2.txt).
//!
//! imago trusts the reference counts: where one is missing for a cluster that is in use, making room recurses without end,
//! and a table that lies in a guest's data would be the guest's to write. Invariant: in what passes, each cluster that is in
//! use is within the file, counted, and used once.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// The most clusters of a file: 16 TiB of the usual size. A bit is kept for each while the image is looked at.
const MOST_CLUSTERS: u64 = 1 << 28;
/// Clusters behind the end of the file that may be in use: taken, and not written yet.
const SLACK: u64 = 1024;
/// The most bytes of the first-level table and of the table of reference counts, as in QEMU.
const MOST_L1: u64 = 32 << 20;
const MOST_TABLE: u64 = 8 << 20;
/// Bits of an entry that are an offset in the file.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;

type Checked<T = ()> = Result<T, String>;

struct Image<'a> {
    file: &'a File,
    cluster_bits: u32,
    /// Reference counts are 2^this bits long.
    count_order: u32,
    /// Clusters that may be in use.
    clusters: u64,
    /// Blocks of reference counts, each a cluster.
    blocks: Vec<Option<Vec<u8>>>,
    used: Vec<u64>,
}

/// Looks at all tables of an image.
///
/// # Errors
/// What is wrong with it.
pub fn check(file: &File) -> Checked {
    let mut head = [0; 104];
    file.read_exact_at(head.get_mut(..72).unwrap_or_default(), 0).map_err(|e| format!("its head: {e}"))?;
    let word = |at: usize| u64::from(u32::from_be_bytes(array(&head, at)));
    let (version, cluster_bits, l1_size) = (word(4), word(20), word(36));
    let (l1, table) = (u64::from_be_bytes(array(&head, 40)), u64::from_be_bytes(array(&head, 48)));
    let (table_clusters, encrypted, size) = (word(56), word(32), u64::from_be_bytes(array(&head, 24)));
    if head.get(..4) != Some(b"QFI\xfb") {
        return Err("it is no qcow2 image".into());
    }
    let mut count_order = 4;
    if version == 3 {
        file.read_exact_at(&mut head, 0).map_err(|e| format!("its head: {e}"))?;
        count_order = u32::from_be_bytes(array(&head, 96));
        if head.get(79).is_some_and(|bits| bits & 4 != 0) {
            return Err("it keeps its data in another file, which is not supported".into());
        }
        // The others that it may have change what its tables are; imago knows none of them.
        if u64::from_be_bytes(array(&head, 72)) != 0 {
            return Err("it was not closed properly, or has features that are not supported; see qemu-img check".into());
        }
    }
    if !(2..=3).contains(&version) || !(9..=21).contains(&cluster_bits) || count_order > 6 || encrypted != 0 {
        return Err("it is of a kind that is not supported".into());
    }
    let cluster_bits = cluster_bits as u32;
    let length = file.metadata().map_err(|e| e.to_string())?.len();
    let clusters = length.div_ceil(1 << cluster_bits) + SLACK;
    let covered = u128::from(l1_size) << (2 * cluster_bits - 3);
    if clusters > MOST_CLUSTERS
        || l1_size * 8 > MOST_L1
        || table_clusters << cluster_bits > MOST_TABLE
        || u128::from(size) > covered
    {
        return Err("its tables are too large, or too small for its disk".into());
    }
    let used = vec![0; clusters.div_ceil(64) as usize];
    let mut image = Image { file, cluster_bits, count_order, clusters, blocks: Vec::new(), used };
    image.load_counts(table, table_clusters)?;
    image.walk(l1, l1_size)
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|bytes| bytes.first_chunk().copied()).unwrap_or([0; N])
}

fn entries(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks_exact(8).map(|entry| u64::from_be_bytes(array(entry, 0)))
}

impl Image<'_> {
    /// Bytes of the file, zeroes behind its end.
    fn read(&self, at: u64, size: u64) -> Checked<Vec<u8>> {
        let mut bytes = vec![0; size as usize];
        let mut done = 0;
        while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, at + done as u64).map_err(|e| format!("reading its tables: {e}"))? {
                0 => break,
                some => done += some,
            }
        }
        Ok(bytes)
    }

    /// The cluster at an offset, which must be in the file.
    fn cluster(&self, offset: u64) -> Checked<u64> {
        let cluster = offset >> self.cluster_bits;
        let fits = offset.is_multiple_of(1 << self.cluster_bits) && cluster < self.clusters;
        if fits { Ok(cluster) } else { Err(format!("a table of it names {offset:#x}, where it has nothing")) }
    }

    /// Reads all blocks of reference counts; then they count themselves, their table, and the head.
    fn load_counts(&mut self, table: u64, table_clusters: u64) -> Checked {
        let places: Vec<u64> = {
            self.cluster(table)?;
            entries(&self.read(table, table_clusters << self.cluster_bits)?).collect()
        };
        for place in &places {
            let block = match place & OFFSET {
                0 => None,
                place => {
                    self.cluster(place)?;
                    Some(self.read(place, 1 << self.cluster_bits)?)
                }
            };
            self.blocks.push(block);
        }
        self.take(0)?;
        let bits = self.cluster_bits;
        let table = (0..table_clusters).map(|n| table + (n << bits));
        let blocks = places.into_iter().map(|place| place & OFFSET).filter(|place| *place != 0);
        table.chain(blocks).try_for_each(|offset| self.take(offset))
    }

    /// A cluster has a reference count.
    fn is_counted(&self, cluster: u64) -> bool {
        // Counts of a block: 2^(bits of a cluster, in bits of a count).
        let per_block = self.cluster_bits + 3 - self.count_order;
        let block = usize::try_from(cluster >> per_block).ok().and_then(|at| self.blocks.get(at)?.as_ref());
        let index = (cluster & ((1 << per_block) - 1)) as usize;
        block.is_some_and(|block| match self.count_order {
            order @ 0..=2 => {
                let (at, width) = (index << order, 1 << order);
                let byte = block.get(at / 8).copied().unwrap_or(0);
                byte >> (at % 8) & ((1u16 << width) - 1) as u8 != 0
            }
            order => {
                let width = 1 << (order - 3);
                block.get(index * width..(index + 1) * width).is_some_and(|count| count.iter().any(|byte| *byte != 0))
            }
        })
    }

    /// The cluster at an offset is in use, by nobody else.
    fn take(&mut self, offset: u64) -> Checked {
        let cluster = self.cluster(offset)?;
        if !self.is_counted(cluster) {
            return Err(format!("it uses what lies at {offset:#x}, but does not count it; see qemu-img check"));
        }
        let (word, bit) = ((cluster / 64) as usize, 1 << (cluster % 64));
        match self.used.get_mut(word) {
            Some(word) if *word & bit == 0 => {
                *word |= bit;
                Ok(())
            }
            _ => Err(format!("it uses what lies at {offset:#x} twice; see qemu-img check")),
        }
    }

    /// Takes what the two levels of tables name.
    fn walk(&mut self, l1: u64, l1_size: u64) -> Checked {
        let bytes = l1_size * 8;
        for n in 0..bytes.div_ceil(1 << self.cluster_bits) {
            self.take(l1.checked_add(n << self.cluster_bits).ok_or("its first table is nowhere")?)?;
        }
        for table in entries(&self.read(l1, bytes)?).map(|entry| entry & OFFSET).filter(|table| *table != 0) {
            self.take(table)?;
            for entry in entries(&self.read(table, 1 << self.cluster_bits)?) {
                if entry & COMPRESSED != 0 {
                    self.look(entry)?;
                } else if entry & OFFSET != 0 {
                    self.take(entry & OFFSET)?;
                }
            }
        }
        Ok(())
    }

    /// Compressed clusters share clusters of the file, and begin and end anywhere in them.
    fn look(&self, entry: u64) -> Checked {
        let shift = 62 - (self.cluster_bits - 8);
        let start = entry & ((1 << shift) - 1);
        let sectors = (entry & (COMPRESSED - 1)) >> shift;
        let end = (start & !511) + sectors * 512;
        let clusters = (start >> self.cluster_bits)..=(end >> self.cluster_bits);
        // More than two clusters no compressed one takes.
        match clusters.take(3).all(|cluster| cluster < self.clusters && self.is_counted(cluster)) {
            true => Ok(()),
            false => Err(format!("it uses what lies at {start:#x}, but does not count it; see qemu-img check")),
        }
    }
}
