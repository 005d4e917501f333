//! The command: words → configuration → machine → exit status.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use bantam::cli::{self, Command};
use bantam::config::Config;
use bantam::error::{refuse, status, usage, verdict};
use bantam::host::say::{print, say};
use bantam::load::{self, Image};
use bantam::{arch, board, check, host, machine};

fn main() -> ExitCode {
    host::guard();
    let status = carry_out().unwrap_or_else(|error| {
        host::terminal::restore();
        say(&format!("bantam: {error:#}").replace('\n', " "));
        let (status, hint) = verdict(&error);
        if let Some(hint) = hint {
            say(&format!("hint: {hint}"));
        }
        status
    });
    ExitCode::from(status)
}

fn carry_out() -> Result<u8> {
    match cli::parse(std::env::args_os())? {
        Command::Run(path, config) => run(Image::open(&path)?, &config),
        Command::Example(guest, config) => run(Image::builtin(guest.name, (guest.image)()), &config),
        Command::ListExamples => print(cli::list_examples().as_bytes()),
        Command::Inspect(path) => print(format!("{}", load::identify(Image::open(&path)?)?).as_bytes()),
        Command::Layout(config, None) => print(arch::layout(&config)?.to_string().as_bytes()),
        Command::Layout(config, Some(tree)) => write_tree(&config, &tree),
        Command::Print(text) => print(&text),
        Command::Check => {
            let (text, able) = check::check()?;
            print(text.as_bytes())?;
            Ok(if able { 0 } else { status::HOST })
        }
    }
}

/// Writes the device tree of the machine that `config` describes.
fn write_tree(config: &Config, path: &Path) -> Result<u8> {
    let Some(tree) = board::device_tree(config, &arch::layout(config)?)? else {
        return Err(usage(format!("--fdt: an {} machine has no device tree", arch::NAME)).into());
    };
    std::fs::write(path, tree).map_err(|e| refuse(format!("cannot write {}: {e}", path.display())))?;
    Ok(0)
}

fn run(image: Image, config: &Config) -> Result<u8> {
    let guest = load::identify(image)?;
    let config = load::settle(config, &guest)?;
    let ended = machine::run(&config, &guest)?;
    // The kernel takes the machine down with the process, and faster than piece by piece.
    host::sys::exit_now(ended.end.status())
}
