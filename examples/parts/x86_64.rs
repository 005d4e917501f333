//! The PC: real mode, and ports.

use bantam::arch::BootRegs;
use bantam::bus::Space;
use bantam::vcpu::Vcpu;
use bantam::vm::Vm;

/// Where the one page of RAM is.
pub const RAM: u64 = 0x1000;
/// Where devices are.
pub const SPACE: Space = Space::Pio;
/// Where [`TWELVE`] prints.
pub const PRINTER: u64 = 0x3f8;
/// Twelve bytes that add al and bl: mov dx,0x3f8; add al,bl; add al,'0'; out dx,al; mov al,'\n'; out dx,al; hlt
pub const TWELVE: &[u8] = &[0xba, 0xf8, 0x03, 0x00, 0xd8, 0x04, 0x30, 0xee, 0xb0, 0x0a, 0xee, 0xf4];
/// mov al,21; out 0x20,al; in al,0x20; out 0xf4,al; hlt
pub const ASK: &[u8] = &[0xb0, 21, 0xe6, 0x20, 0xe4, 0x20, 0xe6, 0xf4, 0xf4];
/// jmp $
pub const SPIN: &[u8] = &[0xeb, 0xfe];

/// A CPU about to execute the first instruction in RAM, with 2 in two registers.
pub fn cpu(vm: &Vm) -> anyhow::Result<Vcpu> {
    let mut vcpu = vm.vcpu(0)?;
    let mut boot = BootRegs::real();
    (boot.regs.rip, boot.regs.rax, boot.regs.rbx) = (RAM, 2, 2);
    vcpu.enter(&boot)?;
    Ok(vcpu)
}
/// Counts in RAM, and prints the last three bits of it as a digit, again and again: mov dx,0x3f8; L: inc word [0x2000];
/// mov al,[0x2000]; and al,7; add al,'0'; out dx,al; jmp L
pub const COUNTS: &[u8] = b"\xba\xf8\x03\xff\x06\x00\x20\xa0\x00\x20\x24\x07\x04\x30\xee\xeb\xf2";
