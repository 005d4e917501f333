//! Who is measured, and with which words: Bantam and the floor, the same guest for both.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::arch::Arch;
use crate::{guest, sh, stats};

/// What is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    /// System B and its like: its output and its end are all it does.
    Add,
    /// Many exits to an address without a device.
    None,
    /// Many exits to the serial port.
    Serial,
    /// A tenth of `None`, for slow counting (Bantam only).
    FewNone,
    /// A tenth of `Serial`, for slow counting (Bantam only).
    FewSerial,
    /// Spins for ever, in 512 MiB of RAM (the floor: one page).
    Spin,
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

/// Where things lie, and what only the machine that built them knows.
pub struct Place {
    /// The folder of the programs.
    pub programs: PathBuf,
    /// The folder of the guests, and of what strace writes.
    pub guests: PathBuf,
    /// This is a test host.
    pub in_host: bool,
    /// The floor stands in for Bantam.
    pub itself: bool,
    /// Exits of the guests that make many.
    pub exits: u32,
    /// Date and commit.
    pub when: String,
    /// How many crates there are.
    pub crates: String,
}

impl Place {
    /// On this machine: builds both programs and writes the guests.
    pub fn here(itself: bool, exits: u32) -> Result<Self> {
        sh::run(sh::cargo(&["build", "--quiet", "--release", "-p", "xtask", "--bin", "floor"]))?;
        if !itself {
            sh::run(sh::cargo(&["build", "--quiet", "--release", "-p", "bantam", "--bin", "bantam"]))?;
        }
        let (programs, guests) = (sh::target().join("release"), sh::target().join("bench"));
        let (when, crates) = (when(), crates(Arch::native())?);
        let place = Self { programs, guests, in_host: false, itself, exits, when, crates };
        place.write_guests()?;
        Ok(place)
    }

    /// Inside a test host, where `folder` has everything that was built outside.
    pub fn inside(folder: PathBuf, itself: bool, exits: u32) -> Result<Self> {
        let text = |name: &str| fs::read_to_string(folder.join(name)).with_context(|| name.to_owned());
        let (when, crates) = (text("when")?, text("crates")?);
        let guests = folder.join("guests");
        let place = Self { programs: folder, guests, in_host: true, itself, exits, when, crates };
        place.write_guests()?;
        Ok(place)
    }

    fn write_guests(&self) -> Result<()> {
        fs::create_dir_all(&self.guests).with_context(|| self.guests.display().to_string())?;
        for guest in [Guest::None, Guest::Serial, Guest::FewNone, Guest::FewSerial, Guest::Spin] {
            let file = self.guest(guest);
            fs::write(&file, self.code(guest)).with_context(|| file.display().to_string())?;
        }
        Ok(())
    }

    /// The file of a guest.
    fn guest(&self, guest: Guest) -> PathBuf {
        self.guests.join(format!("{guest:?}.bin").to_lowercase())
    }

    /// The file of a side's program.
    pub fn program(&self, side: Side) -> PathBuf {
        self.programs.join(if side == Side::Floor || self.itself { "floor" } else { "bantam" })
    }

    /// How many exits a guest makes that makes many.
    fn exits(&self, guest: Guest) -> u32 {
        if matches!(guest, Guest::FewNone | Guest::FewSerial) { self.exits / 10 } else { self.exits }
    }

    fn code(&self, guest: Guest) -> Vec<u8> {
        match guest {
            Guest::Add => guest::ADD.to_vec(),
            Guest::None | Guest::FewNone => guest::outs(guest::NO_DEVICE, self.exits(guest)).to_vec(),
            Guest::Serial | Guest::FewSerial => guest::outs(guest::SERIAL, self.exits(guest)).to_vec(),
            Guest::Spin => guest::SPIN.to_vec(),
        }
    }

    /// What the guest writes to the serial port, or is there to be seen of it.
    fn output(&self, guest: Guest) -> Vec<u8> {
        match guest {
            Guest::Add => b"4\n".to_vec(),
            Guest::None | Guest::FewNone => Vec::new(),
            Guest::Serial | Guest::FewSerial => vec![b'x'; self.exits(guest) as usize],
            Guest::Spin => b".".to_vec(),
        }
    }

    /// A side's program with the words that make it run `guest`; it reads nothing and its output goes nowhere.
    pub fn command(&self, side: Side, guest: Guest) -> Command {
        let mut command = Command::new(self.program(side));
        if side == Side::Floor || self.itself {
            command.args(self.floor_words(guest));
        } else {
            self.bantam_words(&mut command, guest);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    fn floor_words(&self, guest: Guest) -> Vec<String> {
        let name = match guest {
            Guest::Add => return vec!["add".into()],
            Guest::Spin => return vec!["spin".into()],
            Guest::None | Guest::FewNone => "none",
            Guest::Serial | Guest::FewSerial => "serial",
        };
        vec![name.into(), self.exits(guest).to_string()]
    }

    /// Bantam's words for a guest. RAM is the floor's one page except where the size is the point.
    fn bantam_words(&self, command: &mut Command, guest: Guest) {
        match guest {
            Guest::Add => command.args(["example", guest::ADD_NAME]),
            Guest::Spin => command.arg("run").arg(self.guest(guest)).args(["--memory", "512M", "--timeout", "60"]),
            _ => command.arg("run").arg(self.guest(guest)).args(guest::WORDS),
        };
    }

    /// Runs the guest once and compares what it writes: a program that does not do the work is not timed.
    pub fn verify(&self, side: Side, guest: Guest) -> Result<()> {
        let mut command = self.command(side, guest);
        let output = command.stdout(Stdio::piped()).stderr(Stdio::piped()).output()?;
        if !output.status.success() || output.stdout != self.output(guest) {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("{}: {}, {} bytes of output: {said}", sh::words(&command), output.status, output.stdout.len());
        }
        Ok(())
    }

    /// What the program `inside` prints: lines of a key and values. Nothing where the floor stands in for Bantam.
    pub fn measure_inside(&self) -> Result<String> {
        if self.itself {
            return Ok(String::new());
        }
        let mut command = Command::new(self.programs.join("inside"));
        if !self.in_host {
            let words = ["build", "--quiet", "--release", "-p", "xtask", "--features", "inside", "--bin", "inside"];
            sh::run(sh::cargo(&words))?;
        }
        command.arg(self.exits.to_string());
        sh::output(command)
    }
}

/// The date and the commit.
pub fn when() -> String {
    format!("{}, commit {}", sh::date(), sh::commit())
}

/// The crates that Bantam is made of.
pub fn crates(arch: Arch) -> Result<String> {
    let (linked, macros) = stats::dependencies(arch)?;
    ensure!(linked > 0, "cargo tree shows no crates");
    Ok(format!("{linked} crates linked, {macros} more to compile"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_get_the_same_number_of_exits() {
        let (programs, guests) = (PathBuf::from("/p"), PathBuf::from("/g"));
        let (when, crates) = (String::new(), String::new());
        let place = Place { programs, guests, in_host: true, itself: false, exits: 70, when, crates };
        assert_eq!(sh::words(&place.command(Side::Floor, Guest::None)), "floor none 70");
        assert_eq!(sh::words(&place.command(Side::Floor, Guest::FewSerial)), "floor serial 7");
        assert_eq!(place.code(Guest::FewNone), guest::outs(guest::NO_DEVICE, 7));
        assert_eq!(place.output(Guest::Serial).len(), 70);
        assert!(sh::words(&place.command(Side::Bantam, Guest::None)).starts_with("bantam run /g/none.bin --memory"));
    }
}
