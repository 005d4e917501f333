//! The memory of a running monitor that is its own: private pages outside guest RAM.

use std::fs;
use std::io::Read;
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use super::subject::{Guest, Place, Side};

/// KiB of a process's own memory.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Own {
    /// Private pages outside guest RAM.
    pub total: u64,
    /// The largest mappings among them: name and KiB.
    pub parts: Vec<(String, u64)>,
}

/// Starts a machine whose guest spins, reads what is its own once the guest has shown a sign of life, and ends it.
pub fn own(place: &Place, side: Side) -> Result<Own> {
    let mut child = place.command(side, Guest::Spin).stdout(Stdio::piped()).spawn()?;
    let mut byte = [0];
    let alive = child.stdout.take().context("no pipe")?.read_exact(&mut byte);
    let maps = fs::read_to_string(format!("/proc/{}/smaps", child.id()));
    let _ = child.kill();
    let status = child.wait()?;
    if alive.is_err() || byte != *b"." {
        bail!("{side:?}: the guest showed no sign of life: {status}");
    }
    Ok(read(&maps?))
}

/// Adds up `Private_Clean` and `Private_Dirty` of every mapping but guest RAM, which is a memory file or a snapshot's.
pub fn read(maps: &str) -> Own {
    let (mut own, mut name) = (Own::default(), String::new());
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or("");
        if first.contains('-') {
            name = words.nth(4).unwrap_or("anonymous").rsplit('/').next().unwrap_or("").to_string();
        } else if first.starts_with("Private_") && first != "Private_Hugetlb:" && !is_ram(&name) {
            let size = words.next().and_then(|size| size.parse().ok()).unwrap_or(0);
            own.total += size;
            match own.parts.iter_mut().find(|(known, _)| *known == name) {
                Some((_, sum)) => *sum += size,
                None => own.parts.push((name.clone(), size)),
            }
        }
    }
    own.parts.retain(|(_, size)| *size > 0);
    own.parts.sort_by_key(|(_, size)| std::cmp::Reverse(*size));
    own.parts.truncate(5);
    own
}

fn is_ram(mapping: &str) -> bool {
    mapping.contains("memfd:guest-ram") || mapping == "memory.bin"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_pages_count_and_guest_ram_does_not() {
        let maps = "55a0-55b0 r-xp 00000000 fe:00 1  /usr/bin/bantam\nRss: 900 kB\nPrivate_Clean: 300 kB\nPrivate_Dirty: 0 kB\n\
                    7f00-7f10 rw-s 00000000 00:01 2  /memfd:guest-ram (deleted)\nPrivate_Clean: 0 kB\nPrivate_Dirty: 4000 kB\n\
                    7f20-7f30 rw-p 00000000 00:00 0 \nPrivate_Clean: 0 kB\nPrivate_Dirty: 20 kB\nPrivate_Hugetlb: 5 kB\n";
        let own = read(maps);
        assert_eq!(own.total, 320);
        assert_eq!(own.parts, [("bantam".into(), 300), ("anonymous".into(), 20)]);
    }
}
