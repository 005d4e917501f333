use std::sync::atomic::AtomicBool;

use proptest::prelude::*;

use super::super::diff::zeroes;
use super::*;

/// A folder with the snapshots of one machine, each of the next moment.
struct Chain {
    folder: tempfile::TempDir,
    memory: Memory,
    base: Option<Base>,
    at: u64,
}

impl Chain {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), memory: written(), base: None, at: 5 }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes what the machine is now, since `base`.
    fn write(&self, name: &str, base: Option<Base>) -> Result<Written> {
        let (target, never) = (Target { path: self.path(name), keep: false, disks: None }, AtomicBool::new(false));
        let taken = Taken::new("guest", Config::default(), State { at: self.at, ..state() })?;
        taken.write(Moment::still(&self.memory).since(base), &target, &never)
    }

    /// Writes a whole one.
    fn whole(&mut self, name: &str) -> Written {
        let written = self.write(name, None).unwrap();
        self.base = Some(written.base.clone());
        written
    }

    /// Writes what has changed since the last one, at a moment of its own.
    fn diff(&mut self, name: &str) -> Written {
        self.at += 1;
        let written = self.write(name, self.base.clone()).unwrap();
        self.base = Some(written.base.clone());
        written
    }

    fn merge(&self, names: &[&str], into: &str) -> Result<Manifest> {
        let [first, rest @ ..] = names else { panic!("nothing to merge") };
        let rest: Vec<_> = rest.iter().map(|name| self.path(name)).collect();
        merge(&self.path(first), &rest, &Target { path: self.path(into), keep: false, disks: None })
    }

    fn blocks(&self, name: &str) -> Vec<(u64, Xxh64)> {
        Manifest::open(&self.path(name)).unwrap().memory.blocks
    }

    /// Why these cannot be merged; nothing is left of it.
    #[track_caller]
    fn refused(&self, names: &[&str], why: &str) {
        let before = std::fs::read_dir(self.folder.path()).unwrap().count();
        let told = self.merge(names, "refused").map(drop).map_err(|e| format!("{e:#}")).unwrap_err();
        assert!(told.contains(why), "{why}: {told:?}");
        assert_eq!(std::fs::read_dir(self.folder.path()).unwrap().count(), before, "{names:?}");
    }

    /// Two whole snapshots are of the same machine at the same moment.
    #[track_caller]
    fn same(&self, one: &str, other: &str) {
        let read = |name: &str, file: &str| std::fs::read(self.path(name).join(file)).unwrap();
        for file in [STATE, MANIFEST] {
            assert_eq!(String::from_utf8(read(one, file)), String::from_utf8(read(other, file)), "{one} {other}");
        }
        assert!(read(one, MEMORY) == read(other, MEMORY), "RAM of {one} and {other}");
    }

    /// Of a chain: one block has changed, one is new, one was filled with zeroes, one was written to with what was there.
    fn goes_on(&self) {
        self.memory.write(1, &[self.at as u8; 2]).unwrap();
        self.memory.write(7 * BLOCK + 9, b"new").unwrap();
        self.memory.write(5 * BLOCK - 2, &[0, 0]).unwrap();
        let same = (16 * BLOCK - 1) as u8 | 1;
        self.memory.write(16 * BLOCK - 1, &[same]).unwrap();
    }
}

#[test]
fn a_difference_holds_what_has_changed() {
    let mut chain = Chain::new();
    chain.whole("one");
    chain.goes_on();
    // And one was given back to the host.
    let last = Span { start: (1 << 32) + 3 * BLOCK, size: PAGE };
    assert_eq!(chain.memory.give_back(last), PAGE);
    let written = chain.diff("two");
    assert_eq!(written.memory, 2 * BLOCK);
    let two = Manifest::open(&chain.path("two")).unwrap();
    let zero = |(block, xxh64): &(u64, Xxh64)| (*block, *xxh64 == zeroes());
    let found: Vec<_> = two.memory.blocks.iter().map(zero).collect();
    assert_eq!(found, [(0, false), (4, true), (7, false), (20, true)]);
    assert_eq!(two.base, Some(Manifest::open(&chain.path("one")).unwrap().moment()));
    // Of all else there is nothing in the file.
    let file = chain.path("two").join(MEMORY).metadata().unwrap();
    assert!(file.len() == 21 * BLOCK && file.blocks() * 512 <= 2 * BLOCK, "{} {}", file.len(), file.blocks());
    // The sums that are remembered are those of a whole one.
    let whole = chain.write("whole", None).unwrap();
    assert_eq!((whole.base.moment, &whole.base.blocks), (written.base.moment, &written.base.blocks));
    chain.merge(&["one", "two"], "merged").unwrap();
    chain.same("merged", "whole");
    for how in [MAP, COPY] {
        assert!(
            all(&Snapshot::open(&chain.path("merged"), how).unwrap().memory(&spans(), bell).unwrap())
                == all(&chain.memory)
        );
        let told = Snapshot::open(&chain.path("two"), how).err().unwrap();
        let (_, hint) = crate::error::verdict(&told);
        assert!(told.to_string().contains("only what has changed since"), "{told}");
        assert!(hint.unwrap().contains("bantam snapshot merge BASE "), "{hint:?}");
    }
    let shown = two.to_string();
    assert!(shown.contains("128K that have changed, and 128K that are zeroes now"), "{shown}");
    let moment = Manifest::open(&chain.path("one")).unwrap().moment();
    assert!(shown.contains(&format!("difference: from the moment {moment};")), "{shown}");
    // Nothing has changed since.
    assert_eq!((chain.diff("three").memory, chain.blocks("three")), (0, vec![]));
}

#[test]
fn differences_become_a_whole_one_whatever_is_merged_first() {
    let mut chain = Chain::new();
    chain.whole("one");
    chain.goes_on();
    chain.diff("two");
    // What was zeroes holds something again, and the other way round.
    chain.memory.write(5 * BLOCK - 1, b"x").unwrap();
    chain.memory.write(7 * BLOCK + 9, &[0; 3]).unwrap();
    chain.diff("three");
    chain.memory.write(1 << 24, b"four").unwrap();
    chain.diff("four");
    chain.write("whole", None).unwrap();
    chain.merge(&["one", "two", "three", "four"], "at once").unwrap();
    chain.same("at once", "whole");
    // One of differences is one; it is laid on what the first of them differs from.
    let both = chain.merge(&["two", "three"], "both").unwrap();
    assert_eq!(both.base, Some(Manifest::open(&chain.path("one")).unwrap().moment()));
    let blocks: Vec<_> = both.memory.blocks.iter().map(|(block, xxh64)| (*block, *xxh64 == zeroes())).collect();
    assert_eq!(blocks, [(0, false), (4, false), (7, true)]);
    chain.merge(&["one", "both", "four"], "later").unwrap();
    chain.same("later", "whole");
    // A later one fits on what was merged.
    chain.merge(&["one", "two"], "so far").unwrap();
    chain.merge(&["so far", "three", "four"], "earlier").unwrap();
    chain.same("earlier", "whole");
    // One that stands alone is copied.
    chain.merge(&["whole"], "copy").unwrap();
    chain.same("copy", "whole");
}

#[test]
fn what_does_not_follow_is_refused() {
    let mut chain = Chain::new();
    chain.whole("one");
    for name in ["two", "three"] {
        chain.goes_on();
        chain.diff(name);
    }
    let moment = |name: &str| Manifest::open(&chain.path(name)).unwrap().moment();
    let why = format!("three: it differs from the moment {}, and ", moment("two"));
    chain.refused(&["one", "three"], &why);
    chain.refused(&["one", "three"], &format!("one is of {}", moment("one")));
    chain.refused(&["one", "three", "two"], &why);
    chain.refused(&["one", "two", "two"], "two: it differs from the moment");
    chain.refused(&["two", "one"], "one: it is a whole snapshot");
    chain.refused(&["one", "two", "four"], "no snapshot: there is no manifest.json in it");
    std::fs::rename(chain.path("two"), chain.path("two.partial")).unwrap();
    chain.refused(&["one", "two.partial"], "never completed");
    // A machine of other RAM, of which somebody says that it follows.
    let memory = Memory::new(&[Span { start: 0, size: BLOCK }], false).unwrap();
    let other = Chain { memory, base: chain.base.clone(), folder: tempfile::tempdir().unwrap(), at: 9 };
    let told = other.write("four", chain.base.clone()).err().unwrap().to_string();
    assert!(told.contains("a machine of other RAM"), "{told}");
    assert_eq!(std::fs::read_dir(other.folder.path()).unwrap().count(), 0);
    let taken = Taken::new("guest", Config::default(), state()).unwrap();
    let base = Base { bytes: BLOCK, blocks: std::sync::Arc::default(), ..chain.base.clone().unwrap() };
    let target = Target { path: chain.path("four"), keep: false, disks: None };
    taken.write(Moment::still(&other.memory).since(Some(base)), &target, &AtomicBool::new(false)).unwrap();
    std::fs::rename(chain.path("two.partial"), chain.path("two")).unwrap();
    chain.refused(&["one", "two", "three", "four"], "four: it has not as much RAM as");
    // What is there is not touched.
    let told = chain.merge(&["one", "two"], "three").err().unwrap().to_string();
    assert!(told.contains("is there already"), "{told}");
}

/// Also one that nothing of comes into what is merged: block 0 of the first two, and what is no hole any more.
#[test]
fn a_bit_that_has_changed_in_any_is_found() {
    let mut chain = Chain::new();
    chain.whole("one");
    for name in ["two", "three"] {
        chain.goes_on();
        chain.diff(name);
    }
    let names = ["one", "two", "three"];
    for (name, part) in names.iter().flat_map(|name| [MANIFEST, MANIFEST_SUM, STATE, MEMORY].map(|file| (name, file))) {
        let path = chain.path(name).join(part);
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let size = file.metadata().unwrap().len();
        for at in (0..size).step_by(if part == MEMORY { 65_521 } else { 7 }) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1 << (at % 8)], at).unwrap();
            let told = chain.merge(&names, "bad").map(drop).map_err(|e| format!("{e:#}"));
            let told = told.expect_err(&format!("{name}/{part}, byte {at}"));
            assert!(told.contains(part) || told.contains(MANIFEST), "{name}/{part}, byte {at}: {told}");
            file.write_all_at(&byte, at).unwrap();
        }
        for bytes in [size - 1, size + 1] {
            let whole = std::fs::read(&path).unwrap();
            file.set_len(bytes).unwrap();
            assert!(chain.merge(&names, "bad").is_err(), "{name}/{part} with {bytes} bytes");
            std::fs::write(&path, whole).unwrap();
        }
    }
    chain.merge(&names, "good").unwrap();
}

/// What a guest does between two snapshots.
#[derive(Debug, Clone)]
enum Deed {
    Write(u64, u8),
    Clear(u64),
    GiveBack(u64),
}

fn deeds() -> impl Strategy<Value = Vec<Deed>> {
    let block = || 0..21_u64;
    let deed = prop_oneof![
        3 => (block(), 0..4_u8).prop_map(|(block, value)| Deed::Write(block, value)),
        1 => block().prop_map(Deed::Clear),
        2 => block().prop_map(Deed::GiveBack),
    ];
    prop::collection::vec(deed, 0..6)
}

/// Where a block begins in RAM, and how much of it there is.
fn place(block: u64) -> Span {
    match block {
        0..16 => Span { start: block * BLOCK, size: BLOCK },
        16 => Span { start: 1 << 24, size: PAGE },
        17..20 => Span { start: (1 << 32) + (block - 17) * BLOCK, size: BLOCK },
        _ => Span { start: (1 << 32) + 3 * BLOCK, size: PAGE },
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever a machine does, and however often it goes on as another: a chain is what a whole snapshot is.
    #[test]
    fn a_chain_is_the_whole(steps in prop::collection::vec((deeds(), 0..3_u8), 1..5), split in 1..5_usize) {
        let mut chain = Chain::new();
        chain.whole("0");
        let mut names = vec!["0".to_owned()];
        for (number, (deeds, life)) in steps.iter().enumerate() {
            for deed in deeds {
                let Span { start, size } = place(match deed {
                    Deed::Write(block, _) | Deed::Clear(block) | Deed::GiveBack(block) => *block,
                });
                match deed {
                    Deed::Write(_, value) => chain.memory.write(start + 5, &[*value]).unwrap(),
                    Deed::Clear(_) => chain.memory.write(start, &vec![0; size as usize]).unwrap(),
                    Deed::GiveBack(_) => drop(chain.memory.give_back(Span { start, size })),
                }
            }
            let name = (number + 1).to_string();
            chain.diff(&name);
            names.push(name.clone());
            let whole = format!("whole {name}");
            chain.write(&whole, None).unwrap();
            let all: Vec<_> = names.iter().map(String::as_str).collect();
            let merged = format!("merged {name}");
            chain.merge(&all, &merged).unwrap();
            chain.same(&merged, &whole);
            if let (Some((first, rest)), true) = (all.split_at_checked(split), all.len() > split) {
                chain.merge(first, &format!("first {name}")).unwrap();
                chain.merge(rest, &format!("rest {name}")).unwrap();
                chain.merge(&[&format!("first {name}"), &format!("rest {name}")], &format!("both {name}")).unwrap();
                chain.same(&format!("both {name}"), &whole);
            }
            // It goes on, or another does that came of it.
            if let Some(how) = [MAP, COPY, LAZY].get(usize::from(*life)).filter(|how| **how != LAZY || can_wait()) {
                let snapshot = Snapshot::open(&chain.path(&merged), *how).unwrap();
                chain.memory = snapshot.memory(&spans(), bell).unwrap();
                chain.base = snapshot.base();
            }
        }
    }
}
