//! Measures a clone of a snapshot in this process, from the snapshot that is open to the guest's first exit.
//!
//! `cargo xtask bench clone` runs it and reads what it prints. `clone time SNAPSHOT ROUNDS`: lines `time SIDE NS`, the sides
//! in turns, and of the library's parts `part NAME NS`. `clone count SNAPSHOT SIDE COUNT`: so many clones, for strace to count.
//! `clone keep SNAPSHOT COUNT`: so many that stand still after their first exit, each in a process of its own, until they are
//! killed; a byte for each once it is there.
//! Invariant: each clone is dropped before the next begins, and no time has that in it.

// Printing is what this tool is for.
#![allow(clippy::print_stdout, clippy::print_stderr)]

#[cfg(target_arch = "x86_64")]
mod floor;

#[cfg(target_arch = "x86_64")]
fn main() -> anyhow::Result<()> {
    x86_64::main()
}

#[cfg(not(target_arch = "x86_64"))]
fn main() -> anyhow::Result<()> {
    anyhow::bail!("clone: the floor is written for x86-64")
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::io::Write as _;
    use std::path::Path;
    use std::time::{Duration, Instant};

    use anyhow::{Context, Result, bail, ensure};
    use bantam::bus::{Exit, Space};
    use bantam::clones;
    use bantam::config::{Config, Serial};
    use bantam::machine::{End, Life, Machine, Paused, Streams};
    use bantam::snapshot::{How, Snapshot};
    use bantam::trace::Symbols;
    use bantam::vcpu::Stop;

    use super::floor::Floor;

    /// What takes turns: the floor; the library on this thread; the same with what serves a machine, as `bantam clone` has it.
    const SIDES: [&str; 3] = ["floor", "alone", "served"];

    /// What clones are made of.
    struct Bench {
        snapshot: Snapshot,
        config: Config,
        floor: Floor,
    }

    impl Bench {
        fn open(folder: &Path) -> Result<Self> {
            let snapshot = Snapshot::open(folder, How::default())?;
            let given = snapshot.manifest.config.clone();
            let config = Config { serial: Serial::None, max_exits: Some(1), name: None, timeout: None, ..given };
            let mut machine = Machine::spawn(&snapshot, &config, &Streams::open(&config)?)?;
            let floor = Floor::new(&folder.join("memory.bin"), &mut machine)?;
            let bench = Self { snapshot, config, floor };
            ensure!(bench.floor.spawn()?.exit() == first_exit(&mut machine)?, "the floor's guest does something else");
            Ok(bench)
        }

        /// A clone, to its first exit: how long that took, and its parts.
        fn run(&self, side: &str) -> Result<(Duration, Vec<(&'static str, Duration)>)> {
            let start = Instant::now();
            Ok(match side {
                "floor" => {
                    let clone = self.floor.spawn()?;
                    let time = start.elapsed();
                    drop(clone);
                    (time, Vec::new())
                }
                "alone" => {
                    let streams = Streams::open(&self.config)?;
                    let opened = start.elapsed();
                    let mut machine = Machine::spawn(&self.snapshot, &self.config, &streams)?;
                    let made = start.elapsed();
                    first_exit(&mut machine)?;
                    let time = start.elapsed();
                    (time, vec![("streams", opened), ("spawn", made - opened), ("run", time - made)])
                }
                "served" => {
                    let mut streams = Streams::open(&self.config)?;
                    let life = Life::new(&self.config, Symbols::default());
                    let machine = Machine::spawn(&self.snapshot, &self.config, &streams)?;
                    let (machine, end) = machine.resume(&life, &streams)?.wait(&life, &mut streams)?;
                    let time = start.elapsed();
                    ensure!(end == End::Guest(0, Stop::MaxExits), "{end:?}");
                    drop(machine);
                    (time, Vec::new())
                }
                _ => bail!("no side is called {side}"),
            })
        }
    }

    /// Runs the CPU to its first exit: the port, and the byte.
    fn first_exit(machine: &mut Machine<Paused>) -> Result<(u16, u8)> {
        let cpu = machine.vcpus().first_mut().context("no CPU")?;
        match cpu.run() {
            Exit::Write { space: Space::Pio, addr, data: [byte], .. } => Ok((u16::try_from(addr)?, *byte)),
            _ => bail!("the guest's first exit is no byte for a port"),
        }
    }

    /// The first round warms caches.
    fn time(bench: &Bench, rounds: u32) -> Result<()> {
        for round in 0..=rounds {
            for side in SIDES {
                let (time, parts) = bench.run(side).context(side)?;
                if round > 0 {
                    println!("time {side} {}", time.as_nanos());
                    parts.iter().for_each(|(name, time)| println!("part {name} {}", time.as_nanos()));
                }
            }
        }
        Ok(())
    }

    /// Makes a clone and keeps it.
    fn keep(bench: &Bench, config: &Config) -> Result<()> {
        let mut machine = Machine::spawn(&bench.snapshot, config, &Streams::open(config)?)?;
        first_exit(&mut machine)?;
        std::io::stdout().write_all(b".").and_then(|()| std::io::stdout().flush())?;
        loop {
            std::thread::park();
        }
    }

    pub fn main() -> Result<()> {
        let words: Vec<_> = std::env::args().skip(1).collect();
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        match words.as_slice() {
            ["time", folder, rounds] => time(&Bench::open(Path::new(folder))?, rounds.parse()?),
            ["count", folder, side, count] => {
                let bench = Bench::open(Path::new(folder))?;
                (0..count.parse::<u32>()?).try_for_each(|_| bench.run(side).map(drop))
            }
            ["keep", folder, count] => {
                let bench = Bench::open(Path::new(folder))?;
                let configs = vec![bench.config.clone(); count.parse()?];
                clones::run(&configs, |config| u8::from(keep(&bench, config).is_err())).map(drop)
            }
            _ => bail!("clone time SNAPSHOT ROUNDS, clone count SNAPSHOT SIDE COUNT or clone keep SNAPSHOT COUNT"),
        }
    }
}
