//! What this user has compared with its sums already: the last files, in a list beside the control sockets.
//!
//! Invariant: a file is known by what changes whenever its content does: its device, inode, size and time of change; and by
//! the sums that it was compared with. A list that cannot be read or written means that all is compared again.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, UNIX_EPOCH};

use super::Xxh64;
use crate::control;
use crate::host::file;

/// How many files are remembered.
const MOST: usize = 256;
/// A file that has changed a moment ago may do so again with the same time.
const MOMENT: Duration = Duration::from_millis(100);

/// A file, as it is now.
pub struct Known {
    line: String,
    /// It has not changed for a while.
    rests: bool,
}

/// Nobody else may have written it.
fn list() -> Option<PathBuf> {
    control::own_folder().map(|folder| folder.join("checked"))
}

fn lines() -> Vec<String> {
    let text = list().and_then(|list| std::fs::read_to_string(list).ok()).unwrap_or_default();
    text.lines().take(MOST).map(str::to_owned).collect()
}

impl Known {
    /// How the file is now; `sums` are those of a manifest with this sum.
    pub fn of(file: &File, sums: Xxh64) -> io::Result<Self> {
        let told = file.metadata()?;
        let changed =
            Duration::new(u64::try_from(told.ctime()).unwrap_or(0), u32::try_from(told.ctime_nsec()).unwrap_or(0));
        Ok(Self {
            line: format!(
                "{} {} {} {}.{:09} {sums}",
                told.dev(),
                told.ino(),
                told.len(),
                told.ctime(),
                told.ctime_nsec()
            ),
            rests: UNIX_EPOCH.checked_add(changed).is_some_and(|at| at.elapsed().is_ok_and(|since| since > MOMENT)),
        })
    }

    /// It was compared, and has not changed since.
    pub fn is_checked(&self) -> bool {
        lines().contains(&self.line)
    }

    /// Remembers that it is as it was written.
    pub fn remember(&self) {
        if self.rests
            && let Some(list) = list()
        {
            let mut all = lines();
            all.retain(|line| *line != self.line);
            all.insert(0, self.line.clone());
            all.truncate(MOST);
            let _ = file::replace(&list, None, |mut file| Ok(file.write_all((all.join("\n") + "\n").as_bytes())?));
        }
    }
}
