//! The disks of a machine that goes on: the words by which it has them, and by which it may have others.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use super::{Config, Words};
use crate::error::{Refusal, usage};

/// What becomes of the disks that a machine writes to, where others are made of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum DiskMode {
    /// Each clone reads the machine's, and what it writes is its own, and gone when it ends.
    #[default]
    Overlay,
    /// Each has a copy, which is gone when it ends.
    Copy,
    /// All read the same ones; a machine that writes to one has no clones.
    ShareRo,
}

impl Config {
    /// Nobody knows where whoever reads it stands.
    pub(super) fn name_whole_paths_of_disks(&mut self) {
        for words in &mut self.disk {
            let (path, rest) = words.split();
            let path = std::path::absolute(&path).map_or(path, |path| path.display().to_string());
            *words = Words::join(&path, rest);
        }
    }

    /// `--disk OLD=NEW`: each that is named in the place of another; the rest are those of the snapshot.
    pub(super) fn connect_disks(&mut self, snapshot: &Self) -> Result<(), Refusal> {
        if self.disk == snapshot.disk {
            return Ok(());
        }
        let asked = std::mem::replace(&mut self.disk, snapshot.disk.clone());
        asked.iter().try_for_each(|words| exchange(&mut self.disk, words))
    }

    /// The words of disks for machines of a snapshot that all write. `copies` are those that were made of its disks: the
    /// number of each, and the file, which this process keeps open.
    ///
    /// # Errors
    /// The mode forbids it.
    pub fn share_disks(&mut self, snapshot: &Self, copies: &[(usize, File)], mode: DiskMode) -> Result<(), Refusal> {
        for (number, copy) in copies {
            let had = snapshot.disk.get(*number);
            if let Some(words) = self.disk.get_mut(*number).filter(|words| Some(&**words) == had) {
                *words = Words::join(&format!("/proc/self/fd/{}", copy.as_raw_fd()), words.split().1);
            }
        }
        for words in &mut self.disk {
            let mut taken = words.take("--disk");
            if taken.flag("ro")? || taken.flag("overlay")? || taken.flag("copy")? {
                continue;
            }
            *words = match mode {
                DiskMode::Overlay => words.and("overlay"),
                DiskMode::Copy => words.and("copy"),
                DiskMode::ShareRo => {
                    let why = format!("--disk-mode share-ro: the machine writes to {}", taken.first());
                    return Err(usage(why).hint("overlay and copy let each clone write what it likes"));
                }
            };
        }
        Ok(())
    }
}

/// `OLD=NEW`, and words of its own if it is to have others.
fn exchange(disks: &mut [Words], asked: &Words) -> Result<(), Refusal> {
    let (both, own) = asked.split();
    let same = |path: &str, other: &str| match (Path::new(path).canonicalize(), Path::new(other).canonicalize()) {
        (Ok(path), Ok(other)) => path == other,
        _ => std::path::absolute(path).ok() == std::path::absolute(other).ok(),
    };
    for (at, _) in both.match_indices('=') {
        let (old, new) = (both.get(..at).unwrap_or_default(), both.get(at + 1..).unwrap_or_default());
        if let Some(words) = disks.iter_mut().find(|words| same(&words.split().0, old)) {
            let serial = |words: &Words| words.take("--disk").value::<String>("serial");
            let own = if own.is_empty() { words.split().1 } else { own };
            let other = Words::join(new, own);
            // The guest knows it by that.
            *words = match (serial(&other)?, serial(words)?) {
                (None, Some(serial)) => other.and(&format!("serial={serial}")),
                _ => other,
            };
            return Ok(());
        }
    }
    let hint = "--disk OLD=NEW gives it another file for its disk OLD; `bantam inspect FOLDER` lists them";
    Err(usage(format!("--disk {asked}: a machine that goes on has the disks of its snapshot")).hint(hint))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(words: &str) -> Config {
        Config { disk: vec![words.parse().unwrap()], ..Config::default() }
    }

    #[test]
    fn a_disk_in_the_place_of_another_keeps_its_serial_number() {
        let new = |had: &str, text: &str| {
            let mut config = of(&format!("/old={text}"));
            config.connect_disks(&of(had)).map(|()| config.disk[0].to_string())
        };
        assert_eq!(new("/old,serial=a,,b", "/new,ro").unwrap(), "/new,ro,serial=a,,b");
        assert_eq!(new("/old,serial=a", "/new,serial=b").unwrap(), "/new,serial=b");
        assert_eq!(new("/old,ro,serial=a", "/new").unwrap(), "/new,ro,serial=a");
        assert_eq!(new("/old", "/new").unwrap(), "/new");
    }

    #[test]
    fn a_disk_that_is_written_to_is_not_shared() {
        let shared = |words: &str, mode| {
            let mut config = of(words);
            config.share_disks(&of(words), &[], mode).map(|()| config.disk[0].to_string())
        };
        assert_eq!(shared("/a", DiskMode::Overlay).unwrap(), "/a,overlay");
        assert_eq!(shared("/a,serial=x", DiskMode::Copy).unwrap(), "/a,serial=x,copy");
        assert_eq!(shared("/a", DiskMode::ShareRo).unwrap_err().status, 2);
        for mode in [DiskMode::Overlay, DiskMode::Copy, DiskMode::ShareRo] {
            for own in ["/a,ro", "/a,overlay", "/a,copy"] {
                assert_eq!(shared(own, mode).unwrap(), own);
            }
        }
        let copy = tempfile::tempfile().unwrap();
        let path = format!("/proc/self/fd/{}", copy.as_raw_fd());
        let mut config = of("/a,serial=x");
        config.share_disks(&of("/a,serial=x"), &[(0, copy)], DiskMode::Overlay).unwrap();
        assert_eq!(config.disk[0].to_string(), format!("{path},serial=x,overlay"));
    }
}
