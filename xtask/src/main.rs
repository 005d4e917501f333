//! Bantam's own tools: `cargo xtask test`, `build`, `clippy`, `host`, `kernels`, `bench`, `order`, `soak`, `stats`.
//!
//! Invariant: nothing here is needed to build or run Bantam, and what a command prints last is its verdict.

// Printing is what these tools are for.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod arch;
mod bench;
mod costs;
mod cpio;
mod cross;
mod drivers;
mod guest;
mod host;
mod lane;
mod linux;
#[cfg(test)]
mod loops;
mod order;
mod sh;
mod soak;
mod stats;
mod test;

use std::process::ExitCode;

use clap::Parser;

/// Bantam's own tools.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Task {
    /// Run every test; say how many ran, passed, failed and were skipped
    Test(test::Words),
    /// Build the static program for an architecture
    Build(cross::Words),
    /// Let clippy read what is for an architecture; a warning is an error
    Clippy(cross::Words),
    /// Make and enter a test host: a Debian kernel with /dev/kvm, under QEMU
    Host(host::Words),
    /// Fetch the stock kernels that the tests boot as guests, and make their initramfs; say in which folder
    Kernels(linux::Words),
    /// Measure Bantam beside the floor, a minimal program that makes the same system calls
    Bench(bench::Words),
    /// Have the linker lay side by side what the start of a machine executes: writes xtask/start.ld
    Order,
    /// Run seeded jobs with large counts; a job that was cut short goes on where it stopped
    Soak(soak::Words),
    /// Lines of code, what is over the limits of size, unsafe blocks, dependencies
    Stats,
}

fn main() -> ExitCode {
    let done = match Task::parse() {
        Task::Test(words) => test::run(&words),
        Task::Build(words) => cross::run(&words),
        Task::Clippy(words) => cross::clippy(&words),
        Task::Host(words) => host::run(&words),
        Task::Kernels(words) => linux::run(&words),
        Task::Bench(words) => bench::run(&words),
        Task::Order => order::run(),
        Task::Soak(words) => soak::run(&words),
        Task::Stats => stats::run(),
    };
    done.unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        ExitCode::FAILURE
    })
}
