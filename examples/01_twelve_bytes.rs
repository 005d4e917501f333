//! The smallest machine, by hand: one page of RAM, one CPU, twelve bytes that add 2 and 2.
//!
//!     cargo run --example 01_twelve_bytes
//!
//! No board, no devices, no threads: what is left is what KVM itself needs.

#![allow(clippy::print_stdout)]

use bantam::arch::BootRegs;
use bantam::bus::Exit;
use bantam::memory::{Memory, Span};
use bantam::vm::Vm;

/// mov dx,0x3f8; add al,bl; add al,'0'; out dx,al; mov al,'\n'; out dx,al; hlt
const GUEST: [u8; 12] = [0xba, 0xf8, 0x03, 0x00, 0xd8, 0x04, 0x30, 0xee, 0xb0, 0x0a, 0xee, 0xf4];

fn main() -> anyhow::Result<()> {
    let memory = Memory::new(&[Span { start: 0x1000, size: 0x1000 }], false)?;
    memory.write(0x1000, &GUEST)?;

    let vm = Vm::new(0)?;
    vm.map(&memory)?;
    let mut vcpu = vm.vcpu(0)?;

    let mut boot = BootRegs::real();
    (boot.regs.rip, boot.regs.rax, boot.regs.rbx) = (0x1000, 2, 2);
    vcpu.enter(&boot)?;

    loop {
        match vcpu.run() {
            Exit::Write { addr: 0x3f8, data, .. } => print!("{}", String::from_utf8_lossy(data)),
            Exit::Halt => return Ok(()),
            other => anyhow::bail!("unexpected: {other:?}"),
        }
    }
}
