//! The command: words → configuration → machine → exit status.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use bantam::cli::{self, Cloning, Command};
use bantam::config::Config;
use bantam::control::Request;
use bantam::error::{refuse, status, usage, verdict};
use bantam::host::say::{print, say};
use bantam::load::{self, Guest, Image};
use bantam::snapshot::{self, Manifest, Snapshot, Target};
use bantam::{arch, board, check, clones, host, machine, top};

fn main() -> ExitCode {
    host::sys::share_heap();
    host::guard();
    ExitCode::from(status_of(carry_out()))
}

/// The exit status, after what there is to say of it.
fn status_of(result: Result<u8>) -> u8 {
    result.unwrap_or_else(|error| {
        host::terminal::restore();
        // A machine that nobody may take down has left its own.
        host::socket::remove_all();
        say(&format!("bantam: {error:#}").replace('\n', " "));
        let (status, hint) = verdict(&error);
        if let Some(hint) = hint {
            say(&format!("hint: {hint}"));
        }
        status
    })
}

fn carry_out() -> Result<u8> {
    match cli::parse(std::env::args_os())? {
        Command::Run(path, config) => run(|| Image::open(&path), &config),
        Command::Example(guest, config) => run(|| Ok(Image::builtin(guest.name, (guest.image)())), &config),
        Command::ExampleLinux(kernel, config) => run_linux(kernel, &config),
        Command::ListExamples => print(cli::list_examples().as_bytes()),
        Command::Inspect(path) if path.is_dir() => print(Manifest::open(&path)?.to_string().as_bytes()),
        Command::Inspect(path) => print(format!("{}", load::identify(Image::open(&path)?)?).as_bytes()),
        Command::Layout(config) => print(arch::layout(&config)?.to_string().as_bytes()),
        Command::DeviceTree(config, file) => write_tree(&config, &file),
        Command::AcpiTables(config, file) => write_tables(config, &file),
        Command::Ps => top::ps(),
        Command::Top(name) => top::top(&name),
        Command::Stop(name) => top::stop(&name),
        Command::Pause(name) => top::ask(&name, &Request::Pause {}),
        Command::Resume(name) => top::ask(&name, &Request::Resume {}),
        Command::Snapshot(name, folder, diff, disks) => top::snapshot(&name, &folder, diff, disks.as_deref()),
        Command::Merge(first, differences, into) => {
            let made = snapshot::merge(&first, &differences, &Target { path: into, keep: true, disks: None })?;
            print(made.to_string().as_bytes())
        }
        Command::Restore(folder, manifest, how, config) => {
            machine::hold_signal(&config)?;
            let snapshot = Snapshot::of(&folder, *manifest, how)?;
            snapshot.check_disks(&config)?;
            end(machine::restore(&config, &snapshot)?, &config)
        }
        Command::Clone(cloning) => clone(&cloning),
        Command::Balloon(name, size) => top::balloon(&name, size),
        Command::Print(text) => print(&text),
        Command::Check => {
            let (text, able) = check::check()?;
            print(text.as_bytes())?;
            Ok(if able { 0 } else { status::HOST })
        }
    }
}

/// Makes machines of a snapshot, or of a machine that goes on and is none the worse for it.
fn clone(cloning: &Cloning) -> Result<u8> {
    let folder = Path::new(&cloning.of);
    if folder.is_dir() {
        return clone_from(folder, cloning, &[], |_| Ok(()));
    }
    if cloning.of.contains('/') {
        return Err(refuse(format!("{}: there is no such folder, and no machine has such a name", cloning.of)).into());
    }
    // Whoever ends this meanwhile leaves nothing in it.
    host::sys::ENDS.into_iter().try_for_each(host::sys::hold)?;
    let place = tempfile::Builder::new().prefix("bantam-clone-").tempdir().context("a folder for what is cloned")?;
    let (folder, disks) = (place.path().join("snapshot"), place.path().join("disks"));
    std::fs::create_dir(&disks).context("a folder for copies of disks")?;
    let stood = top::hand_over(&cloning.of, &folder, cloning.copies_disks().then_some(&disks))?;
    let copies = copies(&disks)?;
    if !copies.is_empty() {
        let (count, name) = (copies.len(), &cloning.of);
        say(&format!("bantam: {name} stood still for {stood:.1?}, until {count} of its disks were copied"));
    }
    // The clones keep what they need of it.
    clone_from(&folder, cloning, &copies, |snapshot| {
        snapshot.passes();
        place.close().context("the folder of what was cloned")
    })
}

/// The copies of disks in a folder, each with its number, open for as long as this process and its children live.
fn copies(folder: &Path) -> Result<Vec<(usize, File)>> {
    let mut all = Vec::new();
    for entry in folder.read_dir().context("copies of disks")? {
        let path = entry.context("copies of disks")?.path();
        if let Some(number) = path.file_name().and_then(|name| name.to_str()?.parse().ok()) {
            all.push((number, File::open(&path).with_context(|| path.display().to_string())?));
        }
    }
    Ok(all)
}

fn clone_from(
    folder: &Path,
    cloning: &Cloning,
    copies: &[(usize, File)],
    opened: impl FnOnce(&mut Snapshot) -> Result<()>,
) -> Result<u8> {
    let manifest = Manifest::open(folder)?;
    let configs = cloning.configs(&manifest, copies)?;
    configs.iter().try_for_each(machine::hold_signal)?;
    let mut snapshot = Snapshot::of(folder, manifest, cloning.how)?;
    configs.iter().try_for_each(|config| snapshot.check_disks(config))?;
    opened(&mut snapshot)?;
    clones::run(&configs, |config| {
        let kept = snapshot.keep();
        status_of(kept.and_then(|_kept| end(machine::restore(config, &snapshot)?, config)))
    })
}

/// Writes the device tree of the machine that `config` describes.
fn write_tree(config: &Config, path: &Path) -> Result<u8> {
    let told = board::Chosen { cmdline: config.cmdline.as_deref(), ..board::Chosen::default() };
    let Some(tree) = board::device_tree(config, &arch::layout(config)?, &told)? else {
        return Err(usage(format!("--fdt: an {} machine has no device tree", arch::NAME)).into());
    };
    write(path, &tree)
}

/// Writes the ACPI tables of the machine that Linux would get of `config`.
fn write_tables(config: Config, path: &Path) -> Result<u8> {
    let config = Config { platform: config.platform.or(arch::LINUX_PLATFORM), ..config };
    arch::layout(&config)?;
    let mut firmware = board::firmware(&config)?;
    let tables = firmware.parts.iter().position(|(_, at, _)| firmware.rsdp == Some(*at));
    let Some(tables) = tables else {
        let kind = if arch::LINUX_PLATFORM.is_some() { "such an" } else { "an arm64" };
        return Err(usage(format!("--acpi: {kind} machine has no ACPI tables")).into());
    };
    write(path, &firmware.parts.swap_remove(tables).2)
}

fn write(path: &Path, bytes: &[u8]) -> Result<u8> {
    std::fs::write(path, bytes).map_err(|e| refuse(format!("cannot write {}: {e}", path.display())))?;
    Ok(0)
}

/// Runs a kernel with the built-in first process.
fn run_linux(kernel: Option<PathBuf>, config: &Config) -> Result<u8> {
    machine::hold_signal(config)?;
    let kernel = kernel.or_else(newest_kernel).ok_or_else(|| {
        refuse("there is no kernel in /boot that may be read").hint("name one: bantam example linux --kernel FILE")
    })?;
    let guest = load::identify(Image::open(&kernel)?)?;
    if !matches!(guest.format, load::Format::Linux(_)) {
        let name = guest.format.name();
        return Err(usage(format!("--kernel {}: it is {name}, not a Linux kernel", kernel.display())).into());
    }
    run_guest(&Guest { initrd: Some(load::archive(guests::linux_init())), ..guest }, config)
}

/// The newest kernel of this host that may be read.
fn newest_kernel() -> Option<PathBuf> {
    let entries = std::fs::read_dir("/boot").ok()?.flatten().map(|entry| entry.path());
    let kernels = entries.filter(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("vmlinuz")));
    let readable = kernels.filter(|path| std::fs::File::open(path).is_ok());
    readable.max_by_key(|path| std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok())
}

fn run(image: impl FnOnce() -> Result<Image>, config: &Config) -> Result<u8> {
    machine::hold_signal(config)?;
    run_guest(&load::identify(image()?)?, config)
}

fn run_guest(guest: &Guest, config: &Config) -> Result<u8> {
    let config = load::settle(config, guest)?;
    end(machine::run(&config, guest)?, &config)
}

fn end(ended: machine::Ended, config: &Config) -> Result<u8> {
    if config.explain.is_some() {
        ended.machine.take_down();
    }
    host::socket::remove_all();
    // The kernel takes the machine down with the process, and faster than piece by piece.
    host::sys::exit_now(ended.end.status())
}
