//! `cargo xtask bench boot`: a stock kernel from the start of the process to the kernel's first process, in a test host.
//!
//! Invariant: one guest boots in one boot of the host, and time is the host's count of instructions. So what is measured
//! repeats to 1 or 2 %, whatever else runs here; world switches are nearly free there, which is why exits are counted too.

mod inside;
mod table;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::subject;
use crate::arch::Arch;
use crate::cpio::Archive;
use crate::host::{self, Job};
use crate::{cross, linux, sh};

/// Where everything lies in the host.
const FOLDER: &str = "bench";

/// A host that takes longer than this hangs.
const LIMIT: Duration = Duration::from_secs(600);

/// The bench's smallest program: no kernel, one page of RAM, so that its first instruction is as early as one can be.
const FLOOR: &str = "floor";

/// Bytes of the guest's initramfs.
const INITRAMFS: usize = 1 << 20;

/// Words of `cargo xtask bench boot`.
#[derive(clap::Args)]
pub struct Words {
    /// The host's architecture
    #[arg(long, value_name = "ARCH", required_unless_present = "inside")]
    host: Option<Arch>,
    /// Measure this static program beside Bantam (repeatable). NAME bantam, firecracker, cloud-hypervisor or kvmtool tells its words;
    /// any other is run as PATH KERNEL INITRD CMDLINE
    #[arg(long, value_name = "NAME=PATH", value_parser = peer)]
    peer: Vec<(String, PathBuf)>,
    /// How often each boots, each time in a host of its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// What the kernel is told beside the console, by Bantam and by every peer
    #[arg(long, value_name = "TEXT", default_value = "quiet")]
    cmdline: String,
    /// This is the inside of a host: measure the monitor of this name
    #[arg(long, value_name = "NAME", hide = true)]
    inside: Option<String>,
}

fn peer(text: &str) -> std::result::Result<(String, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("NAME=PATH is wanted")?;
    if name.is_empty() || !Path::new(path).is_file() {
        return Err(format!("{path} is no file"));
    }
    Ok((name.into(), path.into()))
}

/// Measures, and prints a table.
pub fn run(words: &Words) -> Result<ExitCode> {
    if let Some(name) = &words.inside {
        inside::measure(name, &words.cmdline, Path::new("/").join(FOLDER).as_path())?;
        return Ok(ExitCode::SUCCESS);
    }
    let arch = words.host.context("--host")?;
    let files = files(arch)?;
    let mut subjects = vec![("bantam".to_owned(), cross::bantam(arch)?)];
    subjects.extend(words.peer.iter().map(|(name, path)| (name.clone(), path.clone())));
    subjects.push((FLOOR.to_owned(), cross::folder(arch).join(FLOOR)));
    let mut columns = Vec::new();
    for (name, path) in &subjects {
        let mut results = Vec::new();
        for run in 1..=words.runs {
            eprintln!("xtask: {name}, {} of {} boots in an {} host", run, words.runs, arch.name());
            results.push(table::Result::parse(&boot(arch, (name, path), &words.cmdline, &files)?));
        }
        columns.push((name.clone(), results));
    }
    println!("\n{}: {}, a host of QEMU's, 1 ns an instruction", subject::when(), arch.name());
    println!("Debian's 6.12 cloud kernel, 1 CPU, 256 MiB, an initramfs of 1 MiB, {}\n", words.cmdline);
    print!("{}", table::table(&columns));
    Ok(ExitCode::SUCCESS)
}

/// What goes into the host, whoever is measured there.
fn files(arch: Arch) -> Result<Vec<(String, PathBuf)>> {
    sh::run(cross::cargo(
        arch,
        &["build", "--quiet", "--release", "-p", "xtask", "--bin", "xtask", "--bin", "first", "--bin", FLOOR],
    )?)?;
    let built = cross::folder(arch);
    let initrd = sh::target().join("bench").join(arch.name()).join("initrd.img");
    initramfs(&built.join("first"), &initrd)?;
    let mut files = vec![("xtask".to_owned(), built.join("xtask")), ("initrd.img".to_owned(), initrd)];
    for (name, path) in linux::files(arch)? {
        if let Some(file) = name.strip_prefix("6.12/") {
            files.push((file.to_owned(), path));
        }
    }
    Ok(files.into_iter().map(|(name, path)| (format!("{FOLDER}/{name}"), path)).collect())
}

/// The guest's file system: its first process, and something to make it as large as those of other benches.
fn initramfs(first: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to.parent().unwrap_or(Path::new(".")))?;
    let program = fs::metadata(first).with_context(|| first.display().to_string())?.len();
    // Three headers, names and ends of entries take less than 1 KiB.
    let Some(rest) = INITRAMFS.checked_sub(usize::try_from(program)? + 1024) else {
        bail!("{}: {program} bytes are too many for an initramfs of {INITRAMFS}", first.display());
    };
    let mut cpio = Archive::new(BufWriter::new(File::create(to).with_context(|| to.display().to_string())?));
    cpio.file(OsStr::new("init"), first)?;
    cpio.add(b"rest", 0o100_644, &vec![0x5a; rest])?;
    cpio.finish()?;
    // The kernel takes zeroes behind an archive.
    Ok(File::options().write(true).open(to)?.set_len(INITRAMFS as u64)?)
}

/// Boots a host, and in it the guest: gives what was measured.
fn boot(arch: Arch, (name, path): (&str, &Path), cmdline: &str, files: &[(String, PathBuf)]) -> Result<String> {
    let mut files = files.to_vec();
    files.push((format!("{FOLDER}/monitor"), path.to_owned()));
    let words = [&format!("/{FOLDER}/xtask"), "bench", "boot", "--inside", name, "--cmdline", cmdline];
    let command = words.map(String::from).to_vec();
    let job = Job { command, files, out: None, timeout: Some(LIMIT), memory: 2048, cpus: 1 };
    let mut text = Vec::new();
    let ended = host::enter_by(host::Clock::Instructions, arch, &job, |bytes| {
        text.extend_from_slice(bytes);
        Ok(())
    })?;
    match ended {
        Ok(status) => ensure!(status == 0, "{name}: status {status}\n{}", String::from_utf8_lossy(&text)),
        Err(trouble) => bail!("{name}: {}", host::describe(&trouble, arch, job.timeout)),
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}
