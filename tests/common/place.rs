//! A folder of one test's own, where its machines' control sockets are.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{File, Run, bantam, file, within};

/// The folder.
pub struct Place(pub tempfile::TempDir);

impl Place {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `bantam` with some words, to which the control sockets here are those of its user.
    pub fn run(&self, words: &str) -> Run {
        bantam(words).env("XDG_RUNTIME_DIR", self.0.path().to_str().unwrap())
    }
}

/// Waits until a file has more than so many bytes.
#[track_caller]
pub fn grows(path: &Path, from: u64) {
    let until = Instant::now() + within(10.0);
    while size(path) <= from {
        assert!(Instant::now() < until, "{} stays at {from} bytes", path.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// How many bytes a file has; one that is not there has none.
pub fn size(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |file| file.len())
}

/// A guest that writes a byte to the serial port, again and again.
pub fn chatter() -> File {
    let x86: &[u8] = &[0xba, 0xf8, 0x03, 0xee, 0xeb, 0xfd];
    let arm64 = [0xd2a1_2001_u32, 0x3900_0020, 0x17ff_ffff].map(u32::to_le_bytes).concat();
    file(if cfg!(target_arch = "x86_64") { x86 } else { &arm64 })
}
