//! All three steps for every format that the architecture runs.

#[allow(dead_code)]
pub mod samples;

#[cfg(target_arch = "aarch64")]
mod arm64;
#[cfg(target_arch = "x86_64")]
mod x86_64;
