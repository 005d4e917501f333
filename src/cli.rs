//! The command line: words in, a [`Command`] out. Knows the words and their defaults, never what they do.
//!
//! The options of `run` are `Config`'s own fields, documented there. Three sources are laid over one another: the
//! defaults (or an example's own words), then `--config FILE`, then the command line.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand, value_parser};

use crate::arch;
use crate::config::{Config, DiskMode, Seconds, Size, Words as Text};
use crate::error::usage;
use crate::load::{self, Image};
use crate::snapshot::{How, Manifest, NOTED, Verify};

/// What a person asked for.
#[derive(Debug, Clone)]
pub enum Command {
    /// Run the guest in a file.
    Run(PathBuf, Config),
    /// Run a built-in guest.
    Example(&'static guests::Guest, Config),
    /// Run Linux: the kernel in a file, or one found on this host.
    ExampleLinux(Option<PathBuf>, Config),
    /// List the built-in guests.
    ListExamples,
    /// Say what a file is.
    Inspect(PathBuf),
    /// Say what the host offers.
    Check,
    /// Print the map of a machine.
    Layout(Config),
    /// Write its device tree to a file.
    DeviceTree(Config, PathBuf),
    /// Write its ACPI tables to a file.
    AcpiTables(Config, PathBuf),
    /// List this user's machines.
    Ps,
    /// Show a machine's statistics as they change.
    Top(String),
    /// End a machine, gently where its guest can be asked.
    Stop(String),
    /// Has a machine stand still.
    Pause(String),
    /// Has it go on.
    Resume(String),
    /// Writes a snapshot of a machine; whether only what has changed since the last one.
    Snapshot(String, PathBuf, bool, Option<PathBuf>),
    /// Makes one snapshot of the first and the differences that follow it.
    Merge(PathBuf, Vec<PathBuf>, PathBuf),
    /// Goes on with the machine of a snapshot.
    Restore(PathBuf, Box<Manifest>, How, Config),
    /// Makes machines of a snapshot, or of a machine that goes on.
    Clone(Cloning),
    /// Say how large a machine's balloon shall be, or show it.
    Balloon(String, Option<Size>),
    /// Print a text to stdout: help, version, completions, the manual page.
    Print(Vec<u8>),
}

/// What is to become of whom.
#[derive(Debug, Clone)]
pub struct Cloning {
    /// A snapshot's folder, or a machine's name.
    pub of: String,
    /// How many.
    pub count: u32,
    /// How each goes on.
    pub how: How,
    disks: DiskMode,
    words: ArgMatches,
}

/// Most machines that are made at once.
const MOST_CLONES: u64 = 10_000;

/// The example whose kernel is not built in.
const LINUX: &str = "linux";

/// `--watchdog` of the examples that crash.
const CRASH_WATCH: Seconds = Seconds(Duration::from_secs(2));

/// The largest configuration file.
const MAX_CONFIG: u64 = 1 << 20;

const EXAMPLES: &str = "\
Examples:
  bantam example                      list the built-in guests
  bantam example add                  run one: 2 + 2, on real KVM
  bantam run kernel.elf --trace       run a guest and see each exit
  bantam run boot.bin --entry 0x7c0:0 --load-at 0x7c00
  bantam inspect kernel.elf           what is it, and what does it need?
  bantam check                        can this host run machines?

Exit status:
  0    the guest ended: halt, power-off, reset, --until
  2    the command line is wrong            101  a bug in Bantam
  124  --timeout or --max-exits             125  the machine could not be built or run
  126  the guest died                       128+n  signal n
  ((v << 1) | 1) & 0xff: the guest wrote v to the debug-exit port, 0xf4";

/// Runs any guest under KVM, from twelve bytes of machine code on, and shows what happens.
#[derive(Parser)]
#[command(name = "bantam", version, about, after_help = EXAMPLES, max_term_width = WIDTH)]
struct Words {
    #[command(subcommand)]
    verb: Verb,
}

/// Run a guest; its format is found from the file
#[derive(Args)]
#[command(
    after_help = "ctrl-a x leaves an interactive console, ctrl-a h shows its keys.\nExample: bantam run guest.bin --reg rax=2 --trace"
)]
struct Run;

/// Run a built-in guest; without a name, list them
#[derive(Args)]
#[command(after_help = "Example: bantam example add --trace")]
struct Example;

/// Print the guest-physical address map of a machine
#[derive(Args)]
#[command(
    after_help = "Examples: bantam layout --memory 5G\n          bantam layout --fdt machine.dtb (arm64; read it with dtc -I dtb -O dts)\n          bantam layout --acpi tables.bin (x86-64)"
)]
struct Layout {
    /// Write the machine's device tree to FILE instead (arm64)
    #[arg(long, value_name = "FILE")]
    fdt: Option<PathBuf>,
    /// Write the ACPI tables of the machine that Linux gets to FILE instead, as they lie from 0xe0000 on (x86-64)
    #[arg(long, value_name = "FILE", conflicts_with = "fdt")]
    acpi: Option<PathBuf>,
}

/// Go on with a machine where its snapshot was written
#[derive(Args)]
#[command(
    after_help = "The options are those of run; what makes it another machine is refused.\nExample: bantam restore /var/tmp/web.snapshot --name web2 --stats"
)]
struct Restore;

/// Make machines of a snapshot, or of a machine that goes on: each goes on from there by itself
#[derive(Args)]
#[command(
    after_help = "The options are those of run; what makes it another machine is refused. In each of them {} is the clone's number, from 1 on.\nExamples: bantam clone /var/tmp/web.snapshot --count 3 --name web-{} --serial file:/tmp/web-{}.out\n          bantam clone web --name web2"
)]
struct Clone;

#[derive(Subcommand)]
enum Verb {
    Run(Run),
    Example(Example),
    /// Say what a file is: format, architecture, entry, segments, what it needs
    Inspect {
        /// The file
        #[arg(value_name = "GUEST")]
        file: PathBuf,
    },
    /// Say what this host's KVM offers, and what to do about each gap
    Check,
    Layout(Layout),
    /// List this user's machines
    #[command(after_help = "A machine is in the list once it has run for 0.05 s, and at once if it has a --name.")]
    Ps,
    /// Show a machine's statistics as they change; q quits
    #[command(after_help = "Example: bantam top $(bantam ps | awk 'NR == 2 { print $1 }')")]
    Top {
        /// The machine's name, as `bantam ps` shows it
        #[arg(value_name = "NAME")]
        name: String,
    },
    /// End a machine: press its power button where the guest has a driver for it, else end it at once
    #[command(
        after_help = "A second `bantam stop`, or the machine's --stop-timeout, ends it in any case.\nExample: bantam stop web"
    )]
    Stop {
        /// The machine's name, as `bantam ps` shows it
        #[arg(value_name = "NAME")]
        name: String,
    },
    /// Have a machine stand still: no CPU and no device does anything until `bantam resume`
    #[command(
        after_help = "The guest's clocks go on, and --timeout does. A paused machine that is to end ends at once.\nExample: bantam pause web"
    )]
    Pause {
        /// The machine's name, as `bantam ps` shows it
        #[arg(value_name = "NAME")]
        name: String,
    },
    /// Have a paused machine go on
    #[command(after_help = "Example: bantam resume web")]
    Resume {
        /// The machine's name, as `bantam ps` shows it
        #[arg(value_name = "NAME")]
        name: String,
    },
    /// Write a machine to a folder, from which `bantam restore` has it go on; the machine goes on too
    #[command(
        args_conflicts_with_subcommands = true,
        subcommand_negates_reqs = true,
        disable_help_subcommand = true,
        after_help = "It stands still for a moment; how long is printed.\nExamples: bantam snapshot web /var/tmp/web.snapshot\n          bantam snapshot web /var/tmp/web.1 --diff\n          bantam snapshot web /var/tmp/web.2 --disks /var/tmp/web.2.disks\n          bantam snapshot merge /var/tmp/web.snapshot /var/tmp/web.1 /var/tmp/web.now\n          bantam snapshot -- merge FOLDER (of a machine that is called merge)"
    )]
    Snapshot {
        #[command(subcommand)]
        merge: Option<Merge>,
        /// The machine's name, as `bantam ps` shows it
        #[arg(value_name = "NAME", required = true)]
        name: Option<String>,
        /// A folder that is not there yet
        #[arg(value_name = "FOLDER", required = true)]
        folder: Option<PathBuf>,
        /// Write only what has changed since the last snapshot of this machine, or since the one that it came of
        #[arg(long)]
        diff: bool,
        /// Copy the disks that it writes to into this folder, as they are at that moment: to FOLDER/0, FOLDER/1 and so on
        #[arg(long, value_name = "FOLDER")]
        disks: Option<PathBuf>,
    },
    Restore(Restore),
    Clone(Clone),
    /// Take memory from a machine that goes on, and give it back: say how much its balloon shall hold
    #[command(
        after_help = "The machine needs --balloon and a guest with a driver for it, who may give less, and less soon.\nExamples: bantam balloon web 256M\n          bantam balloon web 0"
    )]
    Balloon {
        /// The machine's name, as `bantam ps` shows it
        #[arg(value_name = "NAME")]
        name: String,
        /// Bytes, or a number with K, M or G, that the guest shall give to the host; without it the balloon is only shown
        #[arg(value_name = "SIZE")]
        size: Option<Size>,
    },
    /// Print a shell's completion script
    #[command(after_help = "Example: bantam completions bash > /etc/bash_completion.d/bantam")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    #[command(after_help = "Example: bantam man | man -l -")]
    Man,
}

#[derive(Subcommand)]
enum Merge {
    /// Make one snapshot of one and of what has changed since, in the order in which they were written
    #[command(
        after_help = "Where BASE is a difference itself, so is INTO. Nothing needs KVM.\nExample: bantam snapshot merge /var/tmp/web.snapshot /var/tmp/web.1 /var/tmp/web.2 /var/tmp/web.now"
    )]
    Merge {
        /// The first, most of the time a whole one
        #[arg(value_name = "BASE")]
        base: PathBuf,
        /// What was written with --diff after it, each after the one before
        #[arg(value_name = "DIFF", required = true)]
        differences: Vec<PathBuf>,
        /// A folder that is not there yet
        #[arg(value_name = "INTO")]
        into: PathBuf,
    },
}

/// A verb that takes the machine's options, and what else it takes.
type Taker = (&'static str, fn(clap::Command) -> clap::Command);

const TAKE_OPTIONS: [Taker; 5] = [
    ("run", Run::augment_args),
    ("example", Example::augment_args),
    ("layout", Layout::augment_args),
    ("restore", Restore::augment_args),
    ("clone", Clone::augment_args),
];

/// Columns of a help text.
const WIDTH: usize = 100;

/// The command line. Of one that names a verb of those that take options only that is described: to describe all takes
/// longer than to start a small machine.
fn command(verb: Option<&str>) -> clap::Command {
    match TAKE_OPTIONS.iter().find(|(name, _)| Some(*name) == verb) {
        Some((name, own)) => {
            let verb = with_options(own(clap::Command::new(*name)));
            clap::Command::new("bantam").max_term_width(WIDTH).subcommand(verb)
        }
        None => TAKE_OPTIONS.iter().fold(Words::command(), |all, (name, _)| all.mut_subcommand(name, with_options)),
    }
}

fn with_options(verb: clap::Command) -> clap::Command {
    let config = Arg::new("config")
        .long("config")
        .value_name("FILE")
        .value_parser(value_parser!(PathBuf))
        .help("Read options from a TOML file; those on the command line win");
    let guest = Arg::new("guest").value_name("GUEST").value_parser(value_parser!(PathBuf));
    let positional = match verb.get_name() {
        "run" => Some(guest.required(true).help("The guest: flat binary, ELF or multiboot kernel")),
        "restore" => Some(guest.value_name("FOLDER").required(true).help("The snapshot's folder")),
        "clone" => {
            Some(guest.value_name("FOLDER|NAME").required(true).help("A snapshot's folder, or a machine's name"))
        }
        "example" => Some(Arg::new("name-of-example").value_name("EXAMPLE").help("The built-in guest")),
        _ => None,
    };
    // The options bring a description of their own; the verb keeps its.
    let about = verb.get_about().cloned().unwrap_or_default();
    let kernel = Arg::new("kernel")
        .long("kernel")
        .value_name("FILE")
        .value_parser(value_parser!(PathBuf))
        .help("The kernel of example linux [default: the newest /boot/vmlinuz-*]");
    let kernel = (verb.get_name() == "example").then_some(kernel);
    let how = match verb.get_name() {
        "restore" => of_snapshots(),
        "clone" => [of_snapshots(), of_clones()].concat(),
        _ => Vec::new(),
    };
    let verb = Config::augment_args_for_update(verb).about(about).long_about(None);
    verb.arg(config).args(kernel).args(positional).args(how)
}

/// What is to be said of how a snapshot is read.
fn of_snapshots() -> Vec<Arg> {
    let verify = Arg::new("verify").long("verify").value_name("WHEN").value_parser(value_parser!(Verify));
    let verify = verify.help("When the sums of its RAM are compared [default: once]");
    let copy = Arg::new("copy").long("copy").action(clap::ArgAction::SetTrue);
    let copy = copy.help("Read all of its RAM at once, and need the snapshot no more");
    let freeze = Arg::new("clock-freeze").long("clock-freeze").action(clap::ArgAction::SetTrue);
    let freeze = freeze.help("Have its clocks go on from where they were, and not from what time it is now (x86-64)");
    [verify, copy, freeze].map(|arg| arg.help_heading("Snapshot")).into()
}

fn of_clones() -> Vec<Arg> {
    let count =
        Arg::new("count").long("count").value_name("N").value_parser(value_parser!(u32).range(1..=MOST_CLONES as i64));
    let disks = Arg::new("disk-mode").long("disk-mode").value_name("MODE").value_parser(value_parser!(DiskMode));
    let count = count.help("How many [default: 1]");
    let disks = disks.help("What becomes of the disks that it writes to [default: overlay]");
    [count, disks].map(|arg| arg.help_heading("Snapshot")).into()
}

/// Understands the words of a command line, the program's name first.
///
/// # Errors
/// The words are wrong (status 2).
pub fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Command> {
    let words: Vec<OsString> = words.into_iter().collect();
    let verb = words.get(1).and_then(|w| w.to_str());
    let mut command = command(verb);
    let matches = match command.try_get_matches_from_mut(&words) {
        Ok(matches) => matches,
        Err(e) if !e.use_stderr() => {
            let text = e.render();
            let colours = std::io::IsTerminal::is_terminal(&std::io::stdout());
            let text = if colours { text.ansi().to_string() } else { text.to_string() };
            return Ok(Command::Print(text.into_bytes()));
        }
        Err(e) => return Err(understandable(&e).into()),
    };
    let Some((verb, words)) = matches.subcommand() else { anyhow::bail!(usage("no command")) };
    match verb {
        "run" => {
            let guest = words.get_one::<PathBuf>("guest").context("no guest")?;
            Ok(Command::Run(guest.clone(), config(Config::default(), words)?))
        }
        "example" => match words.get_one::<String>("name-of-example") {
            None => Ok(Command::ListExamples),
            Some(name) if name == LINUX => {
                let kernel = words.get_one::<PathBuf>("kernel").cloned();
                Ok(Command::ExampleLinux(kernel, config(Config::default(), words)?))
            }
            Some(name) if words.contains_id("kernel") => {
                Err(usage(format!("--kernel means nothing for example {name}")).into())
            }
            Some(name) => example(name, words, &mut command),
        },
        "restore" => {
            let folder = words.get_one::<PathBuf>("guest").context("no folder")?;
            let manifest = Manifest::open(folder)?;
            let config = of_snapshot(&manifest, words)?;
            Ok(Command::Restore(folder.clone(), Box::new(manifest), How { note: Some(NOTED), ..how(words)? }, config))
        }
        "clone" => {
            let of = words.get_one::<PathBuf>("guest").context("no folder")?;
            Ok(Command::Clone(Cloning {
                of: of.to_str().context("a name or a folder whose name is text")?.to_owned(),
                count: words.get_one("count").copied().unwrap_or(1),
                how: how(words)?,
                disks: words.get_one("disk-mode").copied().unwrap_or_default(),
                words: words.clone(),
            }))
        }
        "layout" => {
            let file = |name| words.get_one::<PathBuf>(name).cloned();
            let config = config(Config::default(), words)?;
            Ok(match (file("fdt"), file("acpi")) {
                (Some(tree), _) => Command::DeviceTree(config, tree),
                (_, Some(tables)) => Command::AcpiTables(config, tables),
                _ => Command::Layout(config),
            })
        }
        _ => other(&matches),
    }
}

/// The verbs that take no options of a machine's.
fn other(matches: &ArgMatches) -> Result<Command> {
    Ok(match Words::from_arg_matches(matches)?.verb {
        Verb::Inspect { file } => Command::Inspect(file),
        Verb::Ps => Command::Ps,
        Verb::Top { name } => Command::Top(name),
        Verb::Stop { name } => Command::Stop(name),
        Verb::Pause { name } => Command::Pause(name),
        Verb::Resume { name } => Command::Resume(name),
        Verb::Snapshot { merge: Some(Merge::Merge { base, differences, into }), .. } => {
            Command::Merge(base, differences, into)
        }
        Verb::Snapshot { name: Some(name), folder: Some(folder), diff, disks, .. } => {
            Command::Snapshot(name, folder, diff, disks)
        }
        Verb::Snapshot { .. } => return Err(usage("no machine is named").into()),
        Verb::Balloon { name, size } => Command::Balloon(name, size),
        Verb::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut command(None), "bantam", &mut text);
            Command::Print(text)
        }
        Verb::Man => {
            let mut text = Vec::new();
            clap_mangen::Man::new(command(None)).render(&mut text).context("rendering the manual page")?;
            Command::Print(text)
        }
        _ => Command::Check,
    })
}

fn how(words: &ArgMatches) -> Result<How> {
    let verify = words.get_one("verify").copied().unwrap_or_default();
    let (copy, freeze_clock) = (words.get_flag("copy"), words.get_flag("clock-freeze"));
    if copy && verify == Verify::Lazy {
        return Err(usage("--copy reads all of RAM at once, and --verify lazy what is touched: choose one").into());
    }
    Ok(How { verify, copy, freeze_clock, note: None })
}

/// The machine of a snapshot, with what it is to have another of.
fn of_snapshot(manifest: &Manifest, words: &ArgMatches) -> Result<Config> {
    let mut config = config(manifest.config.clone(), words)?;
    config.connect(&manifest.config)?;
    load::check(&config)?;
    match config.differs_from(&manifest.config) {
        Some(name) => {
            let why = format!("--{name}: a machine that goes on is what its snapshot says");
            Err(usage(why).hint("`bantam inspect FOLDER` shows what it is").into())
        }
        None => Ok(config),
    }
}

impl Cloning {
    /// Each clone writes to disks, so that they need those of a machine that goes on as they were.
    pub fn copies_disks(&self) -> bool {
        self.disks != DiskMode::ShareRo
    }

    /// The configuration of each clone of a snapshot, in the order of their numbers. `copies` are those that were made of its
    /// disks: the number of each, and the file, which this process keeps open.
    ///
    /// # Errors
    /// The options make no sense for a machine of this snapshot.
    pub fn configs(&self, manifest: &Manifest, copies: &[(usize, File)]) -> Result<Vec<Config>> {
        let mut config = of_snapshot(manifest, &self.words)?;
        config.share_disks(&manifest.config, copies, self.disks)?;
        if self.count > 1
            && let Some(name) = config.name.as_mut().filter(|name| !name.contains("{}"))
        {
            name.push_str("-{}");
        }
        // Each listens at a path of its own, and so does whom it was made of.
        if let (Some(words), false) = (&mut config.vsock, self.words.contains_id("vsock")) {
            let mut taken = words.take("--vsock").without_first();
            if let (Some(cid), Some(path)) = (taken.value::<u32>("cid")?, taken.value::<String>("path")?) {
                let path = format!("path={path}-{}-{{}}", std::process::id());
                *words = Text::join(&format!("cid={cid}"), "").and(&path);
            }
        }
        Ok((1..=self.count).map(|number| config.numbered(number)).collect())
    }
}

fn example(name: &str, words: &ArgMatches, command: &mut clap::Command) -> Result<Command> {
    let Some(guest) = guests::find(name) else {
        return Err(usage(format!("there is no example {name:?}")).hint("`bantam example` lists them").into());
    };
    let own = ["bantam", "example"].into_iter().chain(guest.words.iter().copied());
    let own = command.try_get_matches_from_mut(own).with_context(|| format!("the words of example {name}"))?;
    let mut base = Config::default();
    if let Some((_, own)) = own.subcommand() {
        base.update_from_arg_matches(own)?;
    }
    // Where a guest may be lost without an exit, somebody looks.
    if arch::CAN_BE_LOST && name.starts_with("crash-") {
        base.watchdog = base.watchdog.or(Some(CRASH_WATCH));
    }
    Ok(Command::Example(guest, config(base, words)?))
}

/// The options of a machine: those of `base`, then of the file, then of the command line.
fn config(base: Config, words: &ArgMatches) -> Result<Config> {
    let mut config = match words.get_one::<PathBuf>("config") {
        Some(path) => from_file(&base, path)?,
        None => base,
    };
    config.update_from_arg_matches(words).map_err(|e| understandable(&e))?;
    Ok(config)
}

/// `base` with what the file says in its place.
fn from_file(base: &Config, path: &Path) -> Result<Config> {
    let what = || format!("--config {}", path.display());
    let file = Image::open(path).map_err(|e| usage(format!("--config {e:#}")))?;
    if file.len() > MAX_CONFIG {
        return Err(usage(format!("{}: {} bytes are more than a configuration has", what(), file.len())).into());
    }
    let bytes = file.head(1 << 20).with_context(what)?;
    let text = String::from_utf8(bytes).map_err(|_| usage(format!("{}: it is not text", what())))?;
    let wrong = |e: toml::de::Error| {
        let line =
            e.span().map_or(0, |span| text.get(..span.start).map_or(0, |before| before.matches('\n').count() + 1));
        usage(format!("{} line {line}: {}", what(), e.message().replace('\n', " ")))
    };
    toml::from_str::<Config>(&text).map_err(wrong)?;
    let said: serde_json::Map<_, _> = toml::from_str(&text).map_err(wrong)?;
    let mut all = serde_json::to_value(base)?;
    if let Some(all) = all.as_object_mut() {
        all.extend(said);
    }
    serde_json::from_value(all).with_context(what)
}

/// One line of what and why, and the tip, if there is one.
fn understandable(error: &clap::Error) -> crate::error::Refusal {
    let text = error.render().to_string();
    let text = text.split("\n\n").next().unwrap_or_default();
    let words: Vec<_> = text.trim_start_matches("error: ").split_whitespace().collect();
    let what = match error.kind() {
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => "no command given".into(),
        _ => words.join(" "),
    };
    let suggested = [ContextKind::SuggestedArg, ContextKind::SuggestedSubcommand, ContextKind::SuggestedValue];
    let tip = suggested.into_iter().find_map(|kind| match error.get(kind)? {
        ContextValue::String(word) => Some(word.clone()),
        ContextValue::Strings(words) => words.first().cloned(),
        _ => None,
    });
    let hint = tip.map_or_else(
        || "`bantam --help` and `bantam run --help` show what there is".into(),
        |tip| format!("did you mean {tip:?}?"),
    );
    usage(what).hint(hint)
}

/// The list that `bantam example` prints.
pub fn list_examples() -> String {
    let linux = (LINUX, "a stock Linux kernel of this host's /boot, with a first process that is built in");
    let all: Vec<_> = guests::all().iter().map(|g| (g.name, g.about)).chain([linux]).collect();
    let width = all.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let lines = all.iter().map(|(name, about)| format!("{name:width$}  {about}\n"));
    lines.collect::<String>() + "\nRun one with `bantam example NAME`; any option of `bantam run` may follow.\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Addr, CpuMode, IrqChip};
    use crate::error::verdict;

    fn words(text: &str) -> Result<Command> {
        parse(std::iter::once("bantam").chain(text.split_whitespace()).map(OsString::from))
    }

    fn run(text: &str) -> Config {
        match words(text).unwrap() {
            Command::Run(_, config) | Command::Example(_, config) | Command::Layout(config) => config,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_contract_parses() {
        let config = run(
            "run g --memory 1M --cpus 2 --load-at 0x2000 --entry 0x100:2 --cpu-mode long --reg rax=2 --reg rbx=0x3 \
             --irqchip kernel --until login: --timeout 2.5 --max-exits 7 --reboot --trace --debugcon mmio:0x996 --serial none",
        );
        assert_eq!((config.memory, config.cpus.count(), config.load_at), (Size(1 << 20), 2, Some(Addr(0x2000))));
        assert_eq!((config.cpu_mode, config.irqchip), (Some(CpuMode::Long), Some(IrqChip::Kernel)));
        assert_eq!((config.reg.len(), config.reboot, config.hugepages), (2, true, false));
        assert_eq!(config.trace.as_deref(), Some(Path::new("-")));
        assert_eq!(run("run --trace=x g").trace.as_deref(), Some(Path::new("x")));
        assert_eq!(run("run --trace g").trace.as_deref(), Some(Path::new("-")));
        assert_eq!(run("run g --debugcon").debugcon, Some("pio:0xe9".parse().unwrap()));
        assert_eq!(run("run g"), Config::default());
    }

    #[test]
    fn a_file_is_laid_under_the_words() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, "memory = \"2M\"\ncpus = 3\nreboot = true\n").unwrap();
        let config = run(&format!("run g --config {} --cpus 4", file.path().display()));
        assert_eq!((config.memory, config.cpus.count(), config.reboot), (Size(2 << 20), 4, true));
        std::fs::write(&file, "memory = 1\n\nmemroy = 2\n").unwrap();
        let error = words(&format!("run g --config {}", file.path().display())).unwrap_err();
        assert!(format!("{error:#}").contains("line 3") && verdict(&error).0 == 2, "{error:#}");
    }

    #[test]
    fn a_file_is_laid_over_an_examples_own_words() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, "cpus = 2\nreg = [\"rax=7\"]\n").unwrap();
        let config = run(&format!("example add --config {}", file.path().display()));
        assert_eq!((config.memory, config.cpus.count()), (Size(4096), 2));
        assert_eq!(config.reg, ["rax=7".parse().unwrap()]);
    }

    #[test]
    fn wrong_words_are_status_2_in_one_line() {
        for text in [
            "",
            "run",
            "run g --memroy 1",
            "run g --memory x",
            "run g --cpus -1",
            "run g --reg rax",
            "fly",
            "example nope",
            "run g --timeout -1",
            "run g h",
        ] {
            let error = words(text).unwrap_err();
            let (status, hint) = verdict(&error);
            assert!(status == 2 && hint.is_some() && !format!("{error:#}").contains('\n'), "{text:?}: {error:#}");
        }
        assert_eq!(verdict(&words("run g --memroy 1").unwrap_err()).1, Some("did you mean \"--memory\"?"));
    }

    #[test]
    fn a_snapshot_is_written_and_merged() {
        assert!(matches!(words("snapshot web f").unwrap(), Command::Snapshot(name, _, false, None) if name == "web"));
        assert!(matches!(words("snapshot web f --diff").unwrap(), Command::Snapshot(_, _, true, None)));
        assert!(
            matches!(words("snapshot -- merge f").unwrap(), Command::Snapshot(name, _, false, None) if name == "merge")
        );
        let Command::Merge(base, differences, into) = words("snapshot merge a b c d").unwrap() else { panic!() };
        assert_eq!((base, differences, into), ("a".into(), vec!["b".into(), "c".into()], "d".into()));
        for text in ["snapshot", "snapshot web", "snapshot merge a b", "snapshot merge a b c --diff"] {
            assert_eq!(verdict(&words(text).unwrap_err()).0, 2, "{text}");
        }
    }

    #[test]
    fn the_documented_defaults_are_the_defaults() {
        let help = command(None).find_subcommand_mut("run").unwrap().render_long_help().to_string();
        let Config { memory, cpus, serial, .. } = Config::default();
        for default in [format!("[default: {memory}]"), format!("[default: {cpus}]"), format!("[default: {serial}]")] {
            assert!(help.contains(&default), "{default}");
        }
    }

    #[test]
    fn every_example_has_words_that_parse() {
        for guest in guests::all() {
            run(&format!("example {}", guest.name));
        }
    }
}
