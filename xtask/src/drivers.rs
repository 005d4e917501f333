//! Builds `guests/virtio`, which is not a member of the workspace: it is code for a bare machine.
//!
//! Invariant: it has no SSE instruction, since the KVM of some hosts emulates instructions and knows few of those.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::sh;

/// For the compiler, and for the linker: no C runtime, a place above the first MiB. `core` is not compiled anew, so what of
/// it is not inlined keeps SSE; nothing of that is reached.
const FLAGS: &str = "-C target-feature=-sse,-sse2,-mmx -C relocation-model=static -C link-arg=-nostartfiles \
    -C link-arg=-static -C link-arg=-Wl,--image-base=0x100000 -C link-arg=-Wl,--build-id=none";

/// Builds it and says where it is.
pub fn build() -> Result<PathBuf> {
    let (package, target) = (sh::root().join("guests/virtio"), sh::target().join("virtio-guest"));
    let mut cargo = sh::cargo(&["build", "--quiet", "--locked", "--release", "--target", "x86_64-unknown-linux-gnu"]);
    cargo.arg("--target-dir").arg(&target).current_dir(package).env("RUSTFLAGS", FLAGS);
    // It warns that such flags want a target of their own: shown only where it fails.
    let built = cargo.output().with_context(|| sh::words(&cargo))?;
    if !built.status.success() {
        bail!("{}: {}\n{}", sh::words(&cargo), built.status, String::from_utf8_lossy(&built.stderr));
    }
    Ok(target.join("x86_64-unknown-linux-gnu/release/virtio-guest"))
}
