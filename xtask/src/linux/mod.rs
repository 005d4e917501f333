//! The guests of the tests of stock Linux: Debian's own kernels, and one initramfs for all of them.
//!
//! Invariant: no kernel is built or patched here. What a guest is given is a file of a package of Debian's, or, for
//! `vmlinux`, what such a file unpacks in memory.

mod unpack;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::BufWriter;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};

use crate::arch::Arch;
use crate::cpio::Archive;
use crate::host::initramfs::{linux, programs};
use crate::host::packages::{HOSTS, cache};
use crate::sh;

/// One of Debian's kernels.
struct Kernel {
    /// What its folder in [`folder`] is called.
    name: &'static str,
    /// What its packages' folder in the cache is called. That of the hosts' own kernel is shared with them.
    set: &'static str,
    /// Where it is from.
    suite: &'static str,
}

/// The kernels. The last is the newest that Debian has: the backports to its newest release are ahead of what is to
/// become the next one.
const KERNELS: [Kernel; 3] = [
    Kernel { name: "6.1", set: "linux-6.1", suite: "bookworm" },
    Kernel { name: "6.12", set: "linux", suite: HOSTS },
    Kernel { name: "newest", set: "linux-newest", suite: "trixie-backports" },
];

/// The kernel that is there uncompressed as well, where it comes compressed.
const UNPACKED: &str = "6.12";

/// Modules that the guest's init loads, in this order, where a kernel has them as modules and not built in.
const MODULES: [&str; 5] = ["pvpanic", "pvpanic-mmio", "pvpanic-pci", "evdev", "button"];

/// Modules that are there for tests to load, each after those it needs.
const MORE: [&str; 10] = [
    "virtio_mmio",
    "virtio_blk",
    "virtio-rng",
    "virtio_balloon",
    "failover",
    "net_failover",
    "virtio_net",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
];

/// Words of `cargo xtask kernels`.
#[derive(clap::Args)]
pub struct Words {
    /// Whose kernels [default: this machine's]
    arch: Option<Arch>,
}

/// Makes the folder, and says where it is.
pub fn run(words: &Words) -> Result<ExitCode> {
    println!("{}", folder(words.arch.unwrap_or_else(Arch::native))?.display());
    Ok(ExitCode::SUCCESS)
}

/// The folder of the guests: NAME/vmlinuz for each kernel, vmlinux beside one of them, and initrd.img.
pub fn folder(arch: Arch) -> Result<PathBuf> {
    let folder = cache().join(format!("kernels-{}", arch.debian()));
    let mut modules = Vec::new();
    for kernel in &KERNELS {
        let packages = linux(kernel.set, kernel.suite, arch).folder()?;
        let (image, own) = parts(&packages)?;
        let place = folder.join(kernel.name);
        fs::create_dir_all(&place).with_context(|| place.display().to_string())?;
        replace(&place.join("vmlinuz"), |new| Ok(symlink(&image, new)?))?;
        if kernel.name == UNPACKED && arch == Arch::X86_64 {
            let elf = place.join("vmlinux");
            let time = |path: &Path| path.metadata().and_then(|meta| meta.modified()).ok();
            if time(&elf).is_none_or(|made| time(&image).is_none_or(|time| made < time)) {
                eprintln!("xtask: unpacking {}", image.display());
                replace(&elf, |new| unpack::vmlinux(&image, new))?;
            }
        }
        modules.push(own);
    }
    replace(&folder.join("initrd.img"), |new| initramfs(arch, &modules, new))?;
    Ok(folder)
}

/// What of that folder goes into a test host: the name in the folder, and the file.
pub fn files(arch: Arch) -> Result<Vec<(String, PathBuf)>> {
    let folder = folder(arch)?;
    let names = KERNELS.iter().flat_map(|kernel| ["vmlinuz", "vmlinux"].map(|file| format!("{}/{file}", kernel.name)));
    let all = names.chain(["initrd.img".into()]).map(|name| (name.clone(), folder.join(name)));
    Ok(all.filter(|(_, path)| path.exists()).collect())
}

/// Makes a file as a whole: others may be reading the one that is there.
fn replace(path: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let new = path.with_extension(format!("{}.new", std::process::id()));
    let _ = fs::remove_file(&new);
    make(&new)?;
    fs::rename(&new, path).with_context(|| path.display().to_string())
}

/// The kernel in a folder of packages, and its folder of modules, whose name is the version in the kernel's own words.
/// Since 6.17 both are together, below usr/.
fn parts(packages: &Path) -> Result<(PathBuf, PathBuf)> {
    for lib in ["lib/modules", "usr/lib/modules"] {
        let Some(Ok(modules)) = fs::read_dir(packages.join(lib)).ok().and_then(|mut folders| folders.next()) else {
            continue;
        };
        let (modules, version) = (modules.path(), modules.file_name().to_string_lossy().into_owned());
        let images = [packages.join(format!("boot/vmlinuz-{version}")), modules.join("vmlinuz")];
        let image = images.into_iter().find(|image| image.exists());
        return Ok((image.with_context(|| format!("{}: no kernel", packages.display()))?, modules));
    }
    anyhow::bail!("{}: no modules of a kernel", packages.display())
}

/// The guests' file system: busybox, init and each kernel's few modules. It is not compressed: in a test host unpacking
/// takes a guest longer than it takes Bantam to read a larger file.
fn initramfs(arch: Arch, modules: &[PathBuf], to: &Path) -> Result<()> {
    let mut cpio = Archive::new(BufWriter::new(File::create(to).with_context(|| to.display().to_string())?));
    for name in ["bin", "dev", "proc", "sys", "tmp", "lib", "lib/modules"] {
        cpio.folder(name)?;
    }
    let programs = programs(arch).folder()?;
    let busybox = ["bin/busybox", "usr/bin/busybox"].map(|name| programs.join(name));
    let busybox = busybox.iter().find(|path| path.exists()).context("busybox-static has no busybox")?;
    cpio.file(OsStr::new("bin/busybox"), busybox)?;
    cpio.text("init", 0o755, include_str!("init.sh"))?;
    cpio.text("modules", 0o644, &format!("{}\n", MODULES.join(" ")))?;
    for folder in modules {
        let version = folder.file_name().unwrap_or_default().to_string_lossy();
        cpio.folder(&format!("lib/modules/{version}"))?;
        for name in MODULES.into_iter().chain(MORE) {
            if let Some(code) = module(&folder.join("kernel"), name)? {
                cpio.add(format!("lib/modules/{version}/{name}.ko").as_bytes(), 0o100_644, &code)?;
            }
        }
    }
    cpio.finish()?;
    Ok(())
}

/// A module's code, from wherever it is in a folder.
fn module(folder: &Path, name: &str) -> Result<Option<Vec<u8>>> {
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            if let Some(code) = module(&path, name)? {
                return Ok(Some(code));
            }
            continue;
        }
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if file == format!("{name}.ko") {
            return Ok(Some(fs::read(&path).with_context(|| path.display().to_string())?));
        }
        if file == format!("{name}.ko.xz") {
            return Ok(Some(filter(sh::program("xz", &["-dc"]), File::open(&path)?)?));
        }
    }
    Ok(None)
}

/// What a program makes of a file.
fn filter(mut command: Command, input: File) -> Result<Vec<u8>> {
    let output = command.stdin(input).output().with_context(|| sh::words(&command))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {}: {}", sh::words(&command), output.status, said.trim());
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_found_where_either_generation_of_packages_has_it() {
        let root = std::env::temp_dir().join(format!("bantam-kernels-{}", std::process::id()));
        for (old, image) in [(true, "boot/vmlinuz-7.0"), (false, "usr/lib/modules/7.0/vmlinuz")] {
            let modules = root.join(if old { "lib/modules/7.0" } else { "usr/lib/modules/7.0" });
            fs::create_dir_all(modules.join("kernel/a/b")).unwrap();
            assert!(parts(&root).is_err());
            fs::create_dir_all(root.join("boot")).unwrap();
            fs::write(root.join(image), "kernel").unwrap();
            fs::write(modules.join("kernel/a/b/evdev.ko"), "code").unwrap();
            assert_eq!(parts(&root).unwrap(), (root.join(image), modules.clone()));
            assert_eq!(module(&modules.join("kernel"), "evdev").unwrap().unwrap(), b"code");
            assert_eq!(module(&modules.join("kernel"), "button").unwrap(), None);
            fs::remove_dir_all(&root).unwrap();
        }
    }
}
