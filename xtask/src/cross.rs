//! `cargo xtask build` and `clippy`: static programs for either architecture.
//!
//! Invariant: what another compiler, or other flags, built is kept in a target directory of its own, so that no build
//! undoes another one's work.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Result, bail};

use crate::arch::Arch;
use crate::sh;

/// Debian's compiler: the one that has a standard library for arm64 in a package.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

/// What Debian 12 needs to build for arm64 on x86-64.
const PACKAGES: [&str; 5] =
    ["rustc-web", "rust-web-clippy", "libstd-rust-web-dev:arm64", "gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"];

/// Debian's clippy, which comes with its compiler.
const DEBIAN_CLIPPY: &str = "/usr/bin/clippy-driver";

/// The linker of that.
const LINKER: &str = "aarch64-linux-gnu-gcc";

/// Words of `cargo xtask build`.
#[derive(clap::Args)]
pub struct Words {
    /// What the program is for [default: this machine]
    arch: Option<Arch>,
}

/// Builds the program, and says where it is.
pub fn run(words: &Words) -> Result<ExitCode> {
    println!("{}", bantam(words.arch.unwrap_or_else(Arch::native))?.display());
    Ok(ExitCode::SUCCESS)
}

/// Lets clippy read the parts for another architecture, which a build for this one leaves out. A warning is an error.
pub fn clippy(words: &Words) -> Result<ExitCode> {
    let arch = words.arch.unwrap_or_else(Arch::native);
    // `cargo clippy` would take cargo's own clippy, which need not have the standard library: this is what it does.
    let mut command = cargo(arch, &["check", "--workspace", "--all-targets"])?;
    let debians = command.get_envs().any(|(name, value)| name == "RUSTC" && value.is_some());
    command.env("RUSTC_WORKSPACE_WRAPPER", if debians { DEBIAN_CLIPPY } else { "clippy-driver" });
    command.env("CLIPPY_ARGS", "-Dwarnings__CLIPPY_HACKERY__");
    sh::run(command)?;
    Ok(ExitCode::SUCCESS)
}

/// The static `bantam` for an architecture, as it is released.
pub fn bantam(arch: Arch) -> Result<PathBuf> {
    let words = ["build", "--release", "--package", "bantam", "--bin", "bantam"];
    if arch.is_native() {
        sh::run(sh::cargo(&words))?;
        return Ok(sh::target().join("release/bantam"));
    }
    sh::run(cargo(arch, &words)?)?;
    Ok(folder(arch).join("bantam"))
}

/// Where [`cargo`] puts released programs.
pub fn folder(arch: Arch) -> PathBuf {
    target(arch).join(arch.triple()).join("release")
}

/// The target directory of builds for an architecture.
fn target(arch: Arch) -> PathBuf {
    if arch.is_native() { sh::target() } else { sh::target().join(arch.name()) }
}

/// Cargo, set up to make static programs for an architecture; `words` must not name a target.
pub fn cargo(arch: Arch, words: &[&str]) -> Result<Command> {
    let mut command = sh::cargo(words);
    command.args(["--target", arch.triple()]).env("CARGO_TARGET_DIR", target(arch));
    // With --target these flags are not for procedural macros, which cannot be static. Not in the environment, where a cargo
    // that a test runs would find them.
    let name = format!("target.{}", arch.triple());
    command.args(["--config", &format!("{name}.rustflags=['-C', 'target-feature=+crt-static']")]);
    if !arch.is_native() {
        if let Some(rustc) = compiler(arch)? {
            command.env("RUSTC", rustc);
        }
        command.args(["--config", &format!("{name}.linker='{LINKER}'")]);
    }
    Ok(command)
}

/// Makes sure that there is a compiler and a linker for another architecture; gives the compiler if it is not cargo's.
fn compiler(arch: Arch) -> Result<Option<&'static str>> {
    if arch != Arch::Arm64 {
        bail!("there is no way yet to build for {} on this machine", arch.name());
    }
    let linker = sh::found(LINKER) && Path::new("/usr/aarch64-linux-gnu/lib/libc.a").exists();
    if linker && builds_for("rustc", arch) {
        return Ok(None);
    }
    if !linker || !builds_for(DEBIAN_RUSTC, arch) || !Path::new(DEBIAN_CLIPPY).exists() {
        install()?;
    }
    Ok(Some(DEBIAN_RUSTC))
}

/// Has this compiler the architecture's standard library?
fn builds_for(rustc: &str, arch: Arch) -> bool {
    let folder = sh::output(sh::program(rustc, &["--print", "target-libdir", "--target", arch.triple()]));
    let entries = folder.ok().and_then(|folder| std::fs::read_dir(folder.trim()).ok());
    entries.is_some_and(|mut entries| {
        entries.any(|entry| entry.is_ok_and(|entry| entry.file_name().to_string_lossy().starts_with("libstd-")))
    })
}

/// Installs what is missing, or says how.
fn install() -> Result<()> {
    let install = ["install", "-y", "-q", "--no-install-recommends"];
    let steps = [
        ("dpkg", vec!["--add-architecture", "arm64"]),
        ("apt-get", vec!["update", "-q"]),
        ("apt-get", [&install[..], &PACKAGES].concat()),
    ];
    if !sh::is_root() || !sh::found("apt-get") {
        let lines = steps.map(|(name, words)| format!("sudo {name} {}", words.join(" ")));
        bail!("a compiler for arm64 is missing; on Debian 12: {}", lines.join(" && "));
    }
    for (name, words) in steps {
        eprintln!("xtask: a compiler for arm64 is missing: {name} {}", words.join(" "));
        let mut command = sh::program(name, &words);
        command.env("DEBIAN_FRONTEND", "noninteractive").stdout(std::io::stderr());
        sh::run(command)?;
    }
    Ok(())
}
