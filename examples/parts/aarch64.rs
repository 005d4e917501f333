//! The arm64 machine: EL1, and devices among the addresses.

use bantam::arch::BootRegs;
use bantam::bus::Space;
use bantam::vcpu::Vcpu;
use bantam::vm::Vm;

/// Where the one page of RAM is.
pub const RAM: u64 = 0x10000;
/// Where devices are.
pub const SPACE: Space = Space::Mmio;
/// Where [`TWELVE`] prints.
pub const PRINTER: u64 = 0x996;
/// Twelve instructions: mov x4,0x996; then for each letter of Hello and a newline: mov x5,'H'; strb w5,[x4]
pub const TWELVE: &[u8] =
    b"\xc4\x32\x81\xd2\x05\x09\x80\xd2\x85\x00\x00\x39\xa5\x0c\x80\xd2\x85\x00\x00\x39\x85\x0d\x80\xd2\
    \x85\x00\x00\x39\x85\x00\x00\x39\xe5\x0d\x80\xd2\x85\x00\x00\x39\x45\x01\x80\xd2\x85\x00\x00\x39";
/// mov x1,0x20; mov w0,21; strb w0,[x1]; ldrb w0,[x1]; strb w0,[x1,0xd4]
pub const ASK: &[u8] = b"\x01\x04\x80\xd2\xa0\x02\x80\x52\x20\x00\x00\x39\x20\x00\x40\x39\x20\x50\x03\x39";
/// b .
pub const SPIN: &[u8] = b"\x00\x00\x00\x14";

/// A CPU about to execute the first instruction in RAM.
pub fn cpu(vm: &Vm) -> anyhow::Result<Vcpu> {
    let mut vcpu = vm.vcpu(0)?;
    let mut target = kvm_bindings::kvm_vcpu_init::default();
    vm.fd().get_preferred_target(&mut target)?;
    vcpu.fd().vcpu_init(&target)?;
    vcpu.enter(&BootRegs { pc: RAM, ..BootRegs::default() })?;
    Ok(vcpu)
}
/// Counts in RAM, and prints the last three bits of it as a digit, again and again: mov x1,0x9000000; mov x2,0x40002000;
/// L: ldr w3,[x2]; add w3,w3,1; str w3,[x2]; and w0,w3,7; add w0,w0,'0'; strb w0,[x1]; b L
pub const COUNTS: &[u8] = b"\x01\x20\xa1\xd2\x02\x00\xa8\xd2\x02\x00\x84\xf2\x43\x00\x40\xb9\x63\x04\x00\x11\
    \x43\x00\x00\xb9\x60\x08\x00\x12\x00\xc0\x00\x11\x20\x00\x00\x39\xfa\xff\xff\x17";
