//! Debian packages, fetched and unpacked without installing them.
//!
//! Invariant: neither apt's own configuration nor anything that is installed changes. apt runs with sources, lists and
//! caches in a folder of ours, signatures are checked with Debian's own keys, and a folder of unpacked packages appears
//! whole or not at all.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::arch::Arch;
use crate::sh;

/// The suite that the pieces of the hosts come from, whatever this machine runs: it has the kernel and the QEMU that they
/// were seen working with.
pub const HOSTS: &str = "bookworm-backports";

/// What is at the end of the name of a release's newer packages, which are used only where they are asked for.
const BACKPORTS: &str = "-backports";

/// Packages that are unpacked into one folder.
pub struct Set {
    /// What the folder is called; other packages, or those of another suite, need another name.
    pub name: &'static str,
    /// Where from: a release of Debian, or its backports and the rest from the release itself.
    pub suite: &'static str,
    /// Whose packages.
    pub arch: Arch,
    /// The packages; the first one's version is in the folder's name.
    pub packages: Vec<String>,
    /// Take from all that they depend on only what begins with this; themselves always.
    pub only: &'static str,
    /// Put something more into the folder before it is complete.
    pub finish: fn(&Path) -> Result<()>,
}

/// The folder of everything that was fetched.
pub fn cache() -> PathBuf {
    sh::target().join("host")
}

impl Set {
    /// The folder of the unpacked packages; fetches them if they are not there.
    pub fn folder(&self) -> Result<PathBuf> {
        if let Some(folder) = self.find()? {
            return Ok(folder);
        }
        let apt = Apt::new(self.arch, self.suite)?;
        let wanted = apt.closure(&self.packages, self.only)?;
        let first = wanted.iter().find(|deb| self.packages.first().is_some_and(|name| deb.package() == name));
        let version = first.or(wanted.first()).map_or("unknown", Deb::version);
        let folder = cache().join(format!("{}{version}", self.prefix()));
        let partial = cache().join(format!("{}{version}.{}.partial", self.prefix(), std::process::id()));
        let megabytes = wanted.iter().map(|deb| deb.size).sum::<u64>().div_ceil(1_000_000);
        eprintln!("xtask: fetching {} {version}: {} packages, {megabytes} MB", self.name, wanted.len());
        apt.unpack(&wanted, &partial)?;
        (self.finish)(&partial)?;
        fs::write(partial.join(LIST), self.list())?;
        // One that was made of other packages, or by another process meanwhile.
        let _ = fs::remove_dir_all(&folder);
        fs::rename(&partial, &folder).with_context(|| folder.display().to_string())?;
        Ok(folder)
    }

    fn prefix(&self) -> String {
        format!("{}-{}-", self.name, self.arch.debian())
    }

    fn list(&self) -> String {
        format!("{}\n", self.packages.join("\n"))
    }

    /// A complete folder of the same packages, the newest version if there are several.
    fn find(&self) -> Result<Option<PathBuf>> {
        fs::create_dir_all(cache()).with_context(|| cache().display().to_string())?;
        let mut folders = Vec::new();
        for entry in fs::read_dir(cache())? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let fits = name.starts_with(&self.prefix()) && !name.ends_with(".partial");
            if fits && fs::read_to_string(path.join(LIST)).is_ok_and(|list| list == self.list()) {
                folders.push((path.metadata()?.modified()?, path));
            }
        }
        Ok(folders.into_iter().max().map(|(_, path)| path))
    }
}

/// The file in a complete folder that says which packages were asked for.
const LIST: &str = ".packages";

/// A package's file, as apt names it.
#[derive(Debug, PartialEq)]
struct Deb {
    file: String,
    size: u64,
}

impl Deb {
    /// Reads a line of `apt-get --print-uris`: 'address' file size hash.
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.strip_prefix('\'')?.split_whitespace().skip(1);
        Some(Self { file: words.next()?.into(), size: words.next()?.parse().ok()? })
    }

    fn field(&self, number: usize) -> &str {
        self.file.strip_suffix(".deb").unwrap_or(&self.file).split('_').nth(number).unwrap_or("")
    }

    fn package(&self) -> &str {
        self.field(0)
    }

    /// Without the epoch, whose colon is no good in names of files.
    fn version(&self) -> &str {
        self.field(1).split_once("%3a").map_or(self.field(1), |(_, version)| version)
    }

    /// How apt wants a package of one version named.
    fn exact(&self) -> String {
        format!("{}:{}={}", self.package(), self.field(2), self.field(1).replace("%3a", ":"))
    }
}

/// apt with a configuration of its own.
struct Apt {
    config: PathBuf,
    suite: &'static str,
}

impl Apt {
    /// For packages of one architecture, as on a machine that has none installed. Fetches the lists of packages.
    fn new(arch: Arch, suite: &'static str) -> Result<Self> {
        for program in ["apt-get", "dpkg"] {
            if !sh::found(program) {
                bail!("{program} is missing: the test hosts are made of Debian packages, by Debian's own tools");
            }
        }
        let release = suite.strip_suffix(BACKPORTS).unwrap_or(suite);
        let folder = cache().join(format!("apt-{release}-{}", arch.debian()));
        for name in ["parts", "state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(folder.join(name)).with_context(|| folder.display().to_string())?;
        }
        let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
        let signed = if Path::new(keys).exists() { format!("[signed-by={keys}] ") } else { String::new() };
        let site = site()?;
        let line = |end: &str| format!("deb {signed}{site} {release}{end} main\n");
        fs::write(folder.join("sources.list"), line("") + &line(BACKPORTS))?;
        fs::write(folder.join("status"), "")?;
        let config = folder.join("apt.conf");
        fs::write(&config, settings(&folder, arch))?;
        let apt = Self { config, suite };
        eprintln!("xtask: fetching the lists of packages of Debian {release} for {}", arch.debian());
        loud(apt.get("update", &["-qq"])).with_context(|| {
            format!(
                "Debian {release}'s lists; if their signature has no key: sudo apt-get install debian-archive-keyring"
            )
        })?;
        Ok(apt)
    }

    fn get(&self, verb: &str, words: &[&str]) -> Command {
        let mut command = sh::program("apt-get", &[verb]);
        command.args(words).env("APT_CONFIG", &self.config);
        command
    }

    /// The packages and all that they need, as far as their names begin with `only`.
    fn closure(&self, packages: &[String], only: &str) -> Result<Vec<Deb>> {
        let mut command = self.get("install", &["-qq", "--print-uris", "--no-install-recommends", "-t", self.suite]);
        command.args(packages);
        let list = sh::output(command)?;
        let wanted = |deb: &Deb| deb.package().starts_with(only) || packages.iter().any(|name| name == deb.package());
        let debs: Vec<_> = list.lines().filter_map(Deb::parse).filter(wanted).collect();
        if debs.is_empty() {
            bail!("apt-get offers nothing for {}", packages.join(" "));
        }
        Ok(debs)
    }

    /// Downloads packages and unpacks them into a new folder.
    fn unpack(&self, debs: &[Deb], folder: &Path) -> Result<()> {
        let archives = folder.join(".debs");
        fs::create_dir_all(&archives).with_context(|| archives.display().to_string())?;
        let mut command = self.get("download", &["-q"]);
        loud_in(command.args(debs.iter().map(Deb::exact)), &archives)?;
        for entry in fs::read_dir(&archives)? {
            let mut command = sh::program("dpkg", &["-x"]);
            command.arg(entry?.path()).arg(folder);
            sh::run(command)?;
        }
        fs::remove_dir_all(&archives).with_context(|| archives.display().to_string())
    }
}

/// Runs a command whose chatter is not what was asked for: it goes to stderr.
fn loud(mut command: Command) -> Result<()> {
    command.stdout(std::io::stderr());
    sh::run(command)
}

fn loud_in(command: &mut Command, folder: &Path) -> Result<()> {
    let status = command.current_dir(folder).stdout(std::io::stderr()).status()?;
    if !status.success() {
        bail!("{}: {status}", sh::words(command));
    }
    Ok(())
}

/// apt's settings: everything it keeps is in `folder`, and it thinks that nothing is installed.
fn settings(folder: &Path, arch: Arch) -> String {
    let place = |name: &str, path: &str| format!("{name} \"{}\";\n", folder.join(path).display());
    let mut text = place("Dir::State", "state") + &place("Dir::State::status", "status");
    text += &(place("Dir::Cache", "cache") + &place("Dir::Etc::sourcelist", "sources.list"));
    text += &(place("Dir::Etc::sourceparts", "parts") + &place("Dir::Etc::preferencesparts", "parts"));
    text += &format!("APT::Architecture \"{0}\";\nAPT::Architectures {{ \"{0}\"; }};\n", arch.debian());
    // The folder may be one that apt's own user cannot enter.
    text + "Acquire::Languages \"none\";\nAPT::Sandbox::User \"root\";\n"
}

/// Where this machine gets Debian from: apt's own configuration knows.
fn site() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")).unwrap_or("bookworm");
    let format = "$(SITE) $(RELEASE) $(COMPONENT)";
    let list = sh::output(sh::program("apt-get", &["indextargets", "--no-release-info", "--format", format]))?;
    let fits = |line: &str| Some(line.strip_suffix(&format!(" {name} main"))?.to_owned());
    list.lines().find_map(fits).with_context(|| format!("apt's sources name no mirror of Debian {name}"))
}

/// A program of an unpacked folder, called `name`, run with that folder's own libraries: this machine may have others,
/// or none.
pub fn program(folder: &Path, path: &str, name: &str) -> Result<Command> {
    let (triple, loader) = match Arch::native() {
        Arch::X86_64 => ("x86_64-linux-gnu", "ld-linux-x86-64.so.2"),
        Arch::Arm64 => ("aarch64-linux-gnu", "ld-linux-aarch64.so.1"),
    };
    let libraries = [folder.join("lib").join(triple), folder.join("usr/lib").join(triple)];
    let loader = libraries.iter().map(|lib| lib.join(loader)).find(|path| path.exists());
    let mut command = Command::new(loader.with_context(|| format!("{}: no loader", folder.display()))?);
    command.arg("--inhibit-cache").arg("--library-path").arg(std::env::join_paths(&libraries)?);
    command.args(["--argv0", name]).arg(folder.join(path)).current_dir(sh::root());
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_apt_prints_is_understood() {
        let line = "'http://x/pool/q_1%3a10.0.2+ds-2_amd64.deb' q_1%3a10.0.2+ds-2_amd64.deb 9788540 SHA256:00";
        let deb = Deb::parse(line).unwrap();
        assert_eq!((deb.package(), deb.version(), deb.size), ("q", "10.0.2+ds-2", 9_788_540));
        assert_eq!(deb.exact(), "q:amd64=1:10.0.2+ds-2");
        assert_eq!(Deb::parse("Reading package lists..."), None);
    }
}
