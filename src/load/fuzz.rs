//! One hostile file through all three steps: what a soak runner calls by the million.

use super::{Guest, Image, identify, load, settle};
use crate::arch::{self, BootRegs};
use crate::config::{Config, Size};
use crate::memory::{Memory, Span};

/// Identifies, settles and loads `bytes` as a guest with 2 MiB of RAM.
///
/// # Panics
/// What was accepted does not hold what is promised: writes outside RAM, an entry outside RAM.
#[doc(hidden)]
pub fn fuzz_one(bytes: &[u8]) -> bool {
    let Ok(guest) = identify(Image::from_bytes("fuzz", bytes.to_vec())) else { return false };
    let _ = guest.to_string();
    let config = Config { memory: Size(2 << 20), ..Config::default() };
    start(&config, &guest).is_ok_and(|(boot, memory)| {
        let entry = Span { start: boot.entry(), size: 1 };
        assert!(memory.contains(entry), "entry {entry}");
        true
    })
}

fn start(config: &Config, guest: &Guest) -> anyhow::Result<(BootRegs, Memory)> {
    let config = settle(config, guest)?;
    let layout = arch::layout(&config)?;
    let memory = Memory::new(&layout.memory(), false)?;
    let boot = load(&config, guest, &memory, &layout)?;
    if let Some(tables) = layout.tables {
        // The rest of the GDT's page: memory, but not RAM, and so no guest's to fill.
        let mut rest = [0; 0x1000 - 24];
        memory.read(tables.start + 24, &mut rest)?;
        assert!(rest.iter().all(|byte| *byte == 0), "a guest was loaded over the boot tables");
    }
    Ok((boot, memory))
}
