//! The smallest machine, by hand: one page of RAM, one CPU, twelve bytes that add 2 and 2; on arm64, twelve instructions
//! that say Hello.
//!
//!     cargo run --example 01_twelve_bytes
//!
//! No board, no devices, no threads: what is left is what KVM itself needs.

#![allow(clippy::print_stdout)]

mod parts;

use bantam::bus::Exit;
use bantam::memory::{Memory, Span};
use bantam::vm::Vm;
use parts::{PRINTER, RAM, TWELVE};

fn main() -> anyhow::Result<()> {
    let memory = Memory::new(&[Span { start: RAM, size: 0x1000 }], false)?;
    memory.write(RAM, TWELVE)?;

    let vm = Vm::new(0)?;
    vm.map(&memory)?;
    let mut vcpu = parts::cpu(&vm)?;

    loop {
        match vcpu.run() {
            Exit::Write { addr: PRINTER, data, .. } => {
                print!("{}", String::from_utf8_lossy(data));
                if *data == *b"\n" {
                    return Ok(());
                }
            }
            other => anyhow::bail!("unexpected: {other:?}"),
        }
    }
}
