//! Bantam's own tools: `cargo xtask test`, `bench`, `soak`, `stats`.
//!
//! Invariant: nothing here is needed to build or run Bantam, and what a command prints last is its verdict.

// Printing is what these tools are for.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod bench;
mod guest;
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
    /// Measure Bantam beside the floor, a minimal program that makes the same system calls
    Bench(bench::Words),
    /// Run seeded jobs with large counts; a job that was cut short goes on where it stopped
    Soak(soak::Words),
    /// Lines of code, what is over the limits of size, unsafe blocks, dependencies
    Stats,
}

fn main() -> ExitCode {
    let done = match Task::parse() {
        Task::Test(words) => test::run(&words),
        Task::Bench(words) => bench::run(&words),
        Task::Soak(words) => soak::run(&words),
        Task::Stats => stats::run(),
    };
    done.unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        ExitCode::FAILURE
    })
}
