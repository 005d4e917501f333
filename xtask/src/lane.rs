//! The lanes of `cargo xtask test` that run in test hosts: static test programs, one boot of a host for all of them.
//!
//! Invariant: what is run there is what was built here a moment ago, and a host that dies, hangs or is too slow is a
//! failure that says so, never a lane with fewer tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::arch::Arch;
use crate::host::{self, Job};
use crate::{cross, linux, sh};

/// How what is to be tested is built (Cargo.toml).
pub const PROFILE: &str = "lane";

/// All the tests of a lane must be done by then.
const LIMIT: Duration = Duration::from_secs(1800);

/// Seconds for each test program: one that hangs must not keep the others from running.
const PROGRAM_LIMIT: u32 = 800;

/// Cases of a test that could run thousands; in a test host each takes a second.
const CASES: u32 = 100;

/// Cases of a property that has no count of its own: where the code is the same on both architectures, all of them ran
/// here.
const PROPERTY_CASES: u32 = 32;

/// Where the programs are in the host. The tests look for the examples beside the program under test.
const FOLDER: &str = "tests";

/// The files under tests/ whose guests are stock kernels.
const NEED_KERNELS: [&str; 5] = ["disk", "linux", "net", "snapshot", "virtio"];

/// An archive of programs that measure, for the tests that do nothing without (`cargo xtask bench io --host`).
const TOOLS: &str = "BANTAM_TOOLS";

/// What a soak tells its test, also the one in a host.
const SOAK: [&str; 2] = ["BANTAM_SOAK_SEED", "BANTAM_SOAK_COUNT"];

/// What the tests of a lane are.
pub struct Tests<'a> {
    /// Files under tests/.
    pub files: &'a [String],
    /// The tests beside the code as well.
    pub unit: bool,
    /// Only those whose names contain this.
    pub filter: Option<&'a str>,
}

/// Builds and runs the tests of a lane; each line that they print goes to `show`. Gives the log of skipped tests.
pub fn run(arch: Arch, tests: &Tests, mut show: impl FnMut(&str)) -> Result<String> {
    let preparing = host::preparing();
    let programs = build(arch, tests, &mut show)?;
    let out = sh::target().join("xtask").join(format!("out-{}", arch.name()));
    let _ = fs::remove_dir_all(&out);
    fs::create_dir_all(&out).with_context(|| out.display().to_string())?;
    let script = out.join("run.sh");
    fs::write(&script, commands(&programs, tests.filter))?;
    let mut files: Vec<_> = programs.iter().map(|p| (p.place(), p.path.clone())).collect();
    files.push((format!("{FOLDER}/run.sh"), script));
    if tests.files.iter().any(|file| NEED_KERNELS.contains(&file.as_str())) {
        files.extend(linux::files(arch)?.into_iter().map(|(name, path)| (format!("{FOLDER}/kernels/{name}"), path)));
    }
    if let Some(tools) = std::env::var_os(TOOLS) {
        files.push((format!("{FOLDER}/tools.tar"), tools.into()));
    }
    drop(preparing);
    let job = Job {
        command: vec!["sh".into(), format!("/{FOLDER}/run.sh")],
        files,
        out: Some(out.clone()),
        timeout: Some(LIMIT),
        memory: 3072,
        cpus: arch.host_cpus(),
    };
    let mut rest = Vec::new();
    let ended = host::enter(arch, &job, |bytes| {
        rest.extend_from_slice(bytes);
        while let Some(at) = rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<_> = rest.drain(..=at).collect();
            show(String::from_utf8_lossy(&line).trim_end());
        }
        Ok(())
    })?;
    match ended {
        Ok(0) => {}
        Ok(status) => bail!("the tests in the {} host: status {status}", arch.name()),
        Err(trouble) => bail!("{}", host::describe(&trouble, arch, job.timeout)),
    }
    Ok(fs::read_to_string(out.join("skipped.txt")).unwrap_or_default())
}

/// The line that says how a test program ended, as [`commands`] prints it: its name and its status. It begins a line of its
/// own also where a program was killed in the middle of one.
pub fn ended(line: &str) -> Option<(&str, i32)> {
    let (name, status) = line.strip_prefix("-- ended: ")?.rsplit_once(' ')?;
    Some((name, status.parse().ok()?))
}

/// A program to take into the host.
#[derive(Debug, PartialEq)]
struct Program {
    kind: Kind,
    name: String,
    path: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    /// A program of tests.
    Test,
    /// One of examples/.
    Example,
    /// `bantam` itself.
    Bin,
}

impl Program {
    /// From a line of cargo's messages, which are JSON.
    fn parse(line: &str) -> Option<Self> {
        let (_, rest) = line.split_once("\"executable\":\"")?;
        let path = PathBuf::from(rest.split_once('"')?.0);
        let stem = path.file_name()?.to_str()?;
        let (kind, name) = match path.parent()?.file_name()?.to_str()? {
            "deps" => (Kind::Test, stem.rsplit_once('-')?.0),
            "examples" => (Kind::Example, stem),
            _ => (Kind::Bin, stem),
        };
        Some(Self { kind, name: name.into(), path: path.clone() })
    }

    /// Its name in the host.
    fn place(&self) -> String {
        match self.kind {
            Kind::Test => format!("{FOLDER}/test-{}", self.name),
            Kind::Example => format!("{FOLDER}/examples/{}", self.name),
            Kind::Bin => format!("{FOLDER}/{}", self.name),
        }
    }
}

/// Builds everything that a lane runs, statically: the host has no libraries to count on.
fn build(arch: Arch, tests: &Tests, show: &mut impl FnMut(&str)) -> Result<Vec<Program>> {
    let messages = "--message-format=json-render-diagnostics";
    let wanted = ["build", "--profile", PROFILE, "--package", "bantam", "--bin", "bantam", "--examples", messages];
    let mut programs = artifacts(cross::cargo(arch, &wanted)?, show)?;
    let mut command = cross::cargo(arch, &["test", "--no-run", "--profile", PROFILE, "--package", "bantam", messages])?;
    command.args(tests.files.iter().flat_map(|name| ["--test", name]));
    if tests.unit {
        command.arg("--lib");
    }
    programs.extend(artifacts(command, show)?.into_iter().filter(|p| p.kind == Kind::Test));
    Ok(programs)
}

/// Runs cargo and reads from its messages which programs there are now.
fn artifacts(mut command: Command, show: &mut impl FnMut(&str)) -> Result<Vec<Program>> {
    show(&format!("-- {}", sh::words(&command)));
    let output = command.stderr(Stdio::inherit()).output().with_context(|| sh::words(&command))?;
    if !output.status.success() {
        bail!("{}: {}", sh::words(&command), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().filter_map(Program::parse).collect())
}

/// What runs in the host: one test program after the other, whatever becomes of each.
fn commands(programs: &[Program], filter: Option<&str>) -> String {
    let mut text = format!(
        "cd /{FOLDER}\nexport BANTAM_BIN=/{FOLDER}/bantam BANTAM_SKIP_LOG=/out/skipped.txt BANTAM_REQUIRE_KVM=1\n\
         export BANTAM_HOST_IS_TCG=1 BANTAM_SOAK_COUNT={CASES} BANTAM_KERNELS=/{FOLDER}/kernels\n\
         export PROPTEST_CASES={PROPERTY_CASES}\n"
    );
    if std::env::var_os(TOOLS).is_some() {
        text += &format!("export {TOOLS}=/{FOLDER}/tools.tar\n");
    }
    for (name, value) in SOAK.iter().filter_map(|name| Some((name, std::env::var(name).ok()?))) {
        text += &format!("export {name}={}\n", host::quote(&value));
    }
    let filter = filter.map(host::quote).unwrap_or_default();
    for program in programs.iter().filter(|p| p.kind == Kind::Test) {
        let place = Path::new("/").join(program.place());
        text += &format!(
            "echo '-- {0}'\ntimeout -s KILL {PROGRAM_LIMIT} {1} {filter}\nprintf '\\n-- ended: %s %s\\n' {0} $?\n",
            program.name,
            place.display()
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargos_messages_name_the_programs() {
        let parse = |path: &str| Program::parse(&format!(r#"{{"x":1,"executable":"{path}","fresh":true}}"#)).unwrap();
        let test = parse("/t/lane/deps/bad_input-0123abc");
        assert_eq!(
            (test.kind, test.name.as_str(), test.place().as_str()),
            (Kind::Test, "bad_input", "tests/test-bad_input")
        );
        assert_eq!(parse("/t/lane/examples/01_a").place(), "tests/examples/01_a");
        assert_eq!(parse("/t/lane/bantam").place(), "tests/bantam");
        assert_eq!(Program::parse(r#"{"executable":null}"#), None);
    }

    #[test]
    fn a_test_program_that_was_killed_is_seen() {
        assert_eq!(ended("-- ended: guests 134"), Some(("guests", 134)));
        assert_eq!(ended("test a ... ok"), None);
    }
}
