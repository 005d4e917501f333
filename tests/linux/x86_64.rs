//! The PC.

/// Those that a virtual machine may have.
pub const CLOCKSOURCES: &[&str] = &["kvm-clock", "tsc"];
/// A kernel that need not unpack itself.
pub const UNCOMPRESSED: &str = "6.12/vmlinux";
/// Drivers of Debian's cloud kernels.
pub const HAS_PVPANIC: bool = true;
pub const HAS_BUTTON: bool = true;

/// What a kernel says of what this host gives its machines.
pub fn found() -> Vec<&'static str> {
    Vec::new()
}
