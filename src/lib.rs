//! Bantam: a KVM virtual machine monitor that runs anything, shows everything and stays small.
//!
//! Four principles explain most of the code:
//!
//! 1. **The loop is the specification.** [`vcpu::run_loop`] runs a CPU, looks at the exit, replies; nothing else.
//! 2. **A device is a value with registers.** It gets wires (interrupt, clock, console), never numbers, and what it
//!    wants of the machine is the value that a write returns.
//! 3. **Guest addresses are ABI.** A pure function of the configuration makes the map; golden tests pin it.
//! 4. **The guest is an enemy.** What it does wrong is device behaviour, never an error, a panic or a loop of ours.
//!
//! The way through: words → [`config::Config`] → [`load::settle`] → [`arch::layout()`] → [`memory::Memory`] →
//! `machine::build` → run. ARCHITECTURE.md in the repository has the map and follows one exit from KVM to a device and back.

pub mod arch;
pub mod board;
pub mod bus;
pub mod check;
pub mod cli;
pub mod clock;
pub mod clones;
pub mod config;
pub mod console;
pub mod control;
pub mod device;
pub mod error;
pub mod event;
pub mod explain;
pub mod host;
pub mod irq;
pub mod load;
pub mod machine;
pub mod memory;
pub mod report;
pub mod snapshot;
pub mod stats;
pub mod top;
pub mod trace;
pub mod vcpu;
pub mod virtio;
pub mod vm;
