//! Who is measured, and with which words: Bantam and the floor, the same guest for both.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::{guest, sh};

/// What is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    /// System B: four exits.
    Add,
    /// `guest::EXITS` exits to a port without a device.
    None,
    /// `guest::EXITS` exits to the serial port.
    Serial,
    /// A tenth of `None`, for slow counting (Bantam only).
    FewNone,
    /// A tenth of `Serial`, for slow counting (Bantam only).
    FewSerial,
    /// Spins for ever, in 512 MiB of RAM (the floor: one page).
    Spin,
}

impl Guest {
    fn code(self) -> Vec<u8> {
        match self {
            Self::Add => guest::ADD.to_vec(),
            Self::None => guest::outs(guest::NO_DEVICE, guest::EXITS).to_vec(),
            Self::Serial => guest::outs(guest::SERIAL, guest::EXITS).to_vec(),
            Self::FewNone => guest::outs(guest::NO_DEVICE, guest::EXITS / 10).to_vec(),
            Self::FewSerial => guest::outs(guest::SERIAL, guest::EXITS / 10).to_vec(),
            Self::Spin => guest::SPIN.to_vec(),
        }
    }

    /// What the guest writes to the serial port, or is there to be seen of it.
    fn output(self) -> Vec<u8> {
        match self {
            Self::Add => b"4\n".to_vec(),
            Self::None | Self::FewNone => Vec::new(),
            Self::Serial => vec![b'x'; guest::EXITS as usize],
            Self::FewSerial => vec![b'x'; guest::EXITS as usize / 10],
            Self::Spin => b".".to_vec(),
        }
    }

    fn file(self) -> PathBuf {
        sh::target().join("bench").join(format!("{self:?}.bin").to_lowercase())
    }
}

/// One of the two programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// `bantam`.
    Bantam,
    /// The floor.
    Floor,
}

/// Both, in the order in which they take turns.
pub const SIDES: [Side; 2] = [Side::Floor, Side::Bantam];

/// Builds both programs and writes the guests. With `itself`, the floor stands in for Bantam.
pub fn prepare(itself: bool) -> Result<()> {
    sh::run(sh::cargo(&["build", "--quiet", "--release", "-p", "xtask", "--bin", "floor"]))?;
    if !itself {
        sh::run(sh::cargo(&["build", "--quiet", "--release", "-p", "bantam", "--bin", "bantam"]))?;
    }
    let folder = sh::target().join("bench");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    for guest in [Guest::None, Guest::Serial, Guest::FewNone, Guest::FewSerial, Guest::Spin] {
        fs::write(guest.file(), guest.code()).with_context(|| guest.file().display().to_string())?;
    }
    Ok(())
}

impl Side {
    /// The program's file.
    pub fn file(self, itself: bool) -> PathBuf {
        let name = if self == Self::Floor || itself { "floor" } else { "bantam" };
        sh::target().join("release").join(name)
    }

    /// The program with the words that make it run `guest`; it reads nothing and its output goes nowhere.
    pub fn command(self, guest: Guest, itself: bool) -> Command {
        let mut command = Command::new(self.file(itself));
        if self == Self::Floor || itself {
            command.arg(match guest {
                Guest::Add => "add",
                Guest::None | Guest::FewNone => "none",
                Guest::Serial | Guest::FewSerial => "serial",
                Guest::Spin => "spin",
            });
        } else {
            bantam_words(&mut command, guest);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// Runs the guest once and compares what it writes: a program that does not do the work is not timed.
    pub fn verify(self, guest: Guest, itself: bool) -> Result<()> {
        let mut command = self.command(guest, itself);
        let output = command.stdout(Stdio::piped()).stderr(Stdio::piped()).output()?;
        if !output.status.success() || output.stdout != guest.output() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("{}: {}, {} bytes of output: {said}", sh::words(&command), output.status, output.stdout.len());
        }
        Ok(())
    }
}

/// Bantam's words for a guest. RAM is the floor's one page except where the size is the point.
fn bantam_words(command: &mut Command, guest: Guest) {
    match guest {
        Guest::Add => command.args(["example", "add"]),
        Guest::Spin => command.arg("run").arg(guest.file()).args(["--memory", "512M", "--timeout", "60"]),
        _ => command.arg("run").arg(guest.file()).args(["--memory", "4K", "--ram-base", "0x1000"]),
    };
}
