//! The file system of a test host: a cpio archive that its kernel unpacks into memory.
//!
//! Invariant: the large constant part (programs, kernel, modules) is made once for each version of its packages and kept;
//! what a run adds is a second archive behind it, which Linux allows (Documentation/driver-api/early-userspace/
//! buffer-format.rst).

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::packages::{HOSTS, Set, cache, program};
use crate::arch::Arch;
use crate::cpio::Archive;

/// Changes when what [`base`] puts into its archive does.
const FORMAT: u32 = 2;

/// Programs that tests and people call in a host. Where busybox has one of the same name, this is the one found.
const TOOLS: [&str; 10] = [
    "busybox-static",
    "dash",
    "passt",
    "perl-base",
    "strace",
    "util-linux",
    "bsdutils",
    "coreutils",
    "kmod",
    "device-tree-compiler",
];

/// Folders of packages that no program needs.
const LEFT_OUT: [&str; 8] = [
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "usr/share/bash-completion",
    "usr/share/bug",
    "usr/share/lintian",
    "usr/lib/valgrind",
    "lib/systemd",
];

/// Who there is: root, and nobody for tests that give up rights.
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n";
const GROUP: &str = "root:x:0:\ntty:x:5:\nkvm:x:104:\nnogroup:x:65534:\n";

/// passt leaves the root file system behind, which the kernel allows of any but the initial RAM disk: here it gets another.
const PASST: &str = "#!/bin/sh
exec unshare -m sh -c '
    mount -t tmpfs passt /mnt && cd /mnt || exit 1
    for folder in bin dev etc lib lib64 proc run sys tmp usr; do
        [ ! -d /$folder ] || { mkdir $folder && mount --rbind /$folder $folder; } || exit 1
    done
    mount --move . / && exec chroot . /usr/bin/passt \"$@\"' passt \"$@\"
";

/// What all runs have in common.
pub struct Base {
    /// The kernel's file, for QEMU.
    pub kernel: PathBuf,
    /// Everything, as an archive.
    archive: PathBuf,
}

/// The programs of a host.
pub fn programs(arch: Arch) -> Set {
    let packages = TOOLS.map(String::from).to_vec();
    Set { name: "programs", suite: HOSTS, arch, packages, only: "", finish: |_| Ok(()) }
}

/// Debian's kernel for clouds, from a suite; `name` is the folder's.
pub fn linux(name: &'static str, suite: &'static str, arch: Arch) -> Set {
    let packages = vec![format!("linux-image-cloud-{}", arch.debian())];
    Set { name, suite, arch, packages, only: "linux-", finish: |_| Ok(()) }
}

/// The kernel and the programs of a host; made if they are not in the cache.
pub fn base(arch: Arch, tools: &Path) -> Result<Base> {
    let linux = linux("linux", HOSTS, arch).folder()?;
    let programs = programs(arch).folder()?;
    let version = version(&linux)?;
    let kernel = linux.join("boot").join(format!("vmlinuz-{version}"));
    let archive = cache().join(format!("base-{}-{version}.{FORMAT}.cpio", arch.debian()));
    let time = |path: &Path| path.metadata().and_then(|meta| meta.modified());
    if time(&archive).is_ok_and(|made| [&linux, &programs].iter().all(|of| time(of).is_ok_and(|time| time < made))) {
        return Ok(Base { kernel, archive });
    }
    eprintln!("xtask: packing the programs and modules of the {} host, {version}", arch.name());
    index_modules(tools, &linux, &version)?;
    let partial = archive.with_extension(format!("{}.partial", std::process::id()));
    let out = File::create(&partial).with_context(|| partial.display().to_string())?;
    let mut cpio = Archive::new(BufWriter::new(out));
    for name in ["dev", "proc", "sys", "tmp", "run", "root", "files", "out", "mnt", "busybox"] {
        cpio.folder(name)?;
    }
    cpio.tree(&programs, &LEFT_OUT)?;
    cpio.tree(&linux, &LEFT_OUT)?;
    // Not busybox: its shell prefers its own commands to what is on the PATH.
    cpio.link("bin/sh", "dash")?;
    cpio.text("etc/passwd", 0o644, PASSWD)?;
    cpio.text("etc/group", 0o644, GROUP)?;
    cpio.folder("usr/local")?;
    cpio.folder("usr/local/bin")?;
    cpio.text("usr/local/bin/passt", 0o755, PASST)?;
    cpio.finish()?;
    fs::rename(&partial, &archive).with_context(|| archive.display().to_string())?;
    Ok(Base { kernel, archive })
}

/// The version in the kernel's own words: the name of its folder of modules.
fn version(linux: &Path) -> Result<String> {
    let modules = linux.join("lib/modules");
    let mut folders = fs::read_dir(&modules).with_context(|| modules.display().to_string())?;
    let folder = folders.next().with_context(|| format!("{}: no kernel", modules.display()))??;
    Ok(folder.file_name().to_string_lossy().into_owned())
}

/// Makes `modules.dep` and the like, as installing the package would: `modprobe` needs them.
fn index_modules(tools: &Path, linux: &Path, version: &str) -> Result<()> {
    let mut command = program(tools, "bin/kmod", "depmod")?;
    command.arg("-b").arg(linux).arg(version);
    crate::sh::run(command)
}

/// What a run adds: files of this machine and texts, each with its name in the host.
#[derive(Default)]
pub struct Extra {
    /// Name in the host, file on this machine.
    pub files: Vec<(String, PathBuf)>,
    /// Name in the host, mode, text.
    pub texts: Vec<(String, u32, String)>,
}

/// Writes the whole archive of a run.
pub fn write(base: &Base, extra: &Extra, to: &Path) -> Result<()> {
    fs::copy(&base.archive, to).with_context(|| to.display().to_string())?;
    let mut cpio = Archive::new(BufWriter::new(File::options().append(true).open(to)?));
    let names = extra.files.iter().map(|(name, _)| name).chain(extra.texts.iter().map(|(name, _, _)| name));
    let folders: std::collections::BTreeSet<_> = names.flat_map(|name| Path::new(name).ancestors().skip(1)).collect();
    for folder in folders.iter().filter_map(|folder| folder.to_str()).filter(|folder| !folder.is_empty()) {
        cpio.folder(folder)?;
    }
    for (name, path) in &extra.files {
        cpio.file(OsStr::new(name), path)?;
    }
    for (name, mode, text) in &extra.texts {
        cpio.text(name, *mode, text)?;
    }
    cpio.finish()?;
    Ok(())
}
