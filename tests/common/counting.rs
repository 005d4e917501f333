//! A machine that counts, and so shows that it goes on where it was.

use std::path::{Path, PathBuf};

use bantam::config::{Config, Serial};
use bantam::machine::{Machine, Paused, Streams};
use bantam::snapshot::{How, Snapshot};

use super::arch::SWEPT;
use super::place::{Place, grows};
use super::{File, Outcome, Started, code, file, within};

impl Place {
    /// Does something that has nothing to complain of.
    pub fn tell(&self, words: &str) -> Outcome {
        let outcome = self.run(words).run();
        outcome.expect(0).said_nothing();
        outcome
    }

    /// A machine called `one`, whose serial port writes to the file `out`.
    pub fn counter(&self, guest: &File, words: &str) -> Started {
        let serial = format!("--serial file:{}", self.path("out").display());
        let memory = if words.contains("--memory") { "" } else { "--memory 16M" };
        let words = format!("--name one {memory} --timeout 60 {serial} {words}");
        let started = self.run("run").arg(guest.path()).words(&words).start();
        grows(&self.path("out"), 0);
        started
    }

    /// Has the machine stand still; gives all that it has printed to this file before.
    pub fn pause(&self, out: &Path) -> String {
        self.tell("pause one");
        std::thread::sleep(within(0.1));
        text(out)
    }

    /// Writes a snapshot of a machine that is paused, so that all that it printed before is in its file.
    pub fn snapshot(&self, name: &str) -> PathBuf {
        let folder = self.path(name);
        self.pause(&self.path("out"));
        self.tell(&format!("snapshot one {}", folder.display()));
        folder
    }

    /// A snapshot of such a machine that has ended since.
    pub fn kept(&self, guest: &File, words: &str) -> PathBuf {
        let started = self.counter(guest, words);
        let folder = self.snapshot("snapshot");
        self.tell("stop one");
        started.wait().expect(143);
        folder
    }

    /// Has a machine go on for a while that nobody looks at.
    pub fn restore(&self, folder: &Path, words: &str) -> Outcome {
        let words = format!("--serial none --max-exits 200 --timeout 60 {words}");
        self.run("restore").arg(folder).words(&words).run()
    }
}

/// The machine of a snapshot, before it goes on.
pub fn of(snapshot: &Snapshot) -> anyhow::Result<Machine<Paused>> {
    connected(snapshot, snapshot.manifest.config.clone())
}

/// The same, connected as this says.
pub fn connected(snapshot: &Snapshot, config: Config) -> anyhow::Result<Machine<Paused>> {
    let config = Config { serial: Serial::None, ..config };
    Machine::of(snapshot, &config, &Streams::open(&config)?)
}

/// What a machine swept that ran [`code::SWEEPS`] is of one moment; whether that was between two rounds.
#[track_caller]
pub fn swept(folder: &Path) -> bool {
    let machine = of(&Snapshot::open(folder, How::default()).unwrap()).unwrap();
    let word = |part: u64| {
        let mut bytes = [0; 4];
        machine.memory().read(SWEPT + part * 0x1_0000, &mut bytes).unwrap();
        u32::from_le_bytes(bytes)
    };
    // Those before where it was have the new number, all others the one before.
    let (first, last) = (word(0), word(127));
    let new = (0..128).take_while(|part| word(*part) == first).count() as u64;
    assert!(
        (new..128).all(|part| word(part) == last) && (new == 128 || last == first.wrapping_sub(1)),
        "{first} {last}"
    );
    new == 128
}

pub fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// Counts in RAM, and prints the last three bits of it as a digit, again and again: 123456701…
pub fn counts() -> File {
    file(code::COUNTS)
}

/// What counts goes on counting behind the last digit of `before`.
#[track_caller]
pub fn goes_on(before: &str, after: &str) {
    let digits: Vec<u32> = before.chars().rev().take(1).chain(after.chars()).map(|c| c.to_digit(8).unwrap()).collect();
    assert!(digits.len() > 10, "{after}");
    let wrong = digits.windows(2).position(|two| (two[0] + 1) % 8 != two[1]);
    assert_eq!(wrong, None, "{after:.40}");
}
