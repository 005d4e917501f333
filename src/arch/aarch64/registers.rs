//! Registers: by KVM's numbers and by the names people write.
//!
//! Invariant: a core register's number carries its size and its place in `struct kvm_regs` (KVM api.rst 4.68); all that
//! are named here have 64 bits. (The vectors are none of them: V0 to V31 are core registers only of a CPU without SVE; of one
//! with it they are the low 128 bits of KVM_REG_ARM64_SVE_ZREG, and KVM refuses their core numbers.)

use std::io;

use anyhow::{Context, Result};
use kvm_bindings::{KVM_REG_ARM_CORE, KVM_REG_ARM64, KVM_REG_ARM64_SYSREG, KVM_REG_SIZE_U64};
use kvm_ioctls::VcpuFd;

use super::boot::{BootRegs, EL1H_MASKED};
use crate::config::{CpuMode, RegValue};
use crate::error::{Refusal, usage};
use crate::explain::call;

/// A core register at this offset of `struct kvm_regs`.
const fn core(offset: u64) -> u64 {
    KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE as u64 | (offset / 4)
}

/// A system register by its encoding (Arm ARM D19.2: op0, op1, CRn, CRm, op2).
const fn sys(op0: u64, op1: u64, crn: u64, crm: u64, op2: u64) -> u64 {
    let encoding = op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2;
    KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG as u64 | encoding
}

/// x0 to x30.
pub const fn x(number: u64) -> u64 {
    core(8 * number)
}

/// The stack pointer of EL0.
pub const SP_EL0: u64 = core(248);
/// The program counter.
pub const PC: u64 = core(256);
/// Flags, masks, exception level.
pub const PSTATE: u64 = core(264);
/// The stack pointer of EL1.
pub const SP_EL1: u64 = core(272);
/// Where the last exception to EL1 came from.
pub const ELR_EL1: u64 = core(280);
/// PSTATE before it.
pub const SPSR_EL1: u64 = core(288);

/// System control: bit 0 is the MMU.
pub const SCTLR_EL1: u64 = sys(3, 0, 1, 0, 0);
/// Translation tables of the lower half.
pub const TTBR0_EL1: u64 = sys(3, 0, 2, 0, 0);
/// Translation tables of the upper half.
pub const TTBR1_EL1: u64 = sys(3, 0, 2, 0, 1);
/// Translation control.
pub const TCR_EL1: u64 = sys(3, 0, 2, 0, 2);
/// What the last exception to EL1 was.
pub const ESR_EL1: u64 = sys(3, 0, 5, 2, 0);
/// The address it is about.
pub const FAR_EL1: u64 = sys(3, 0, 6, 0, 0);
/// Memory attributes.
pub const MAIR_EL1: u64 = sys(3, 0, 10, 2, 0);
/// The sizes of pages and addresses that the CPU has.
pub const ID_AA64MMFR0_EL1: u64 = sys(3, 0, 0, 7, 0);
/// Where exceptions go.
pub const VBAR_EL1: u64 = sys(3, 0, 12, 0, 0);
/// The virtual timer's control: bit 0 enabled, bit 1 masked.
pub const CNTV_CTL_EL0: u64 = sys(3, 3, 14, 3, 1);
/// The physical timer's.
pub const CNTP_CTL_EL0: u64 = sys(3, 3, 14, 2, 1);
/// The virtual counter. KVM_REG_ARM_TIMER_CNT has the number that should be CNTV_CVAL_EL0's, and that has this one's
/// (KVM api.rst 4.68).
pub const CNTVCT_EL0: u64 = sys(3, 3, 14, 3, 2);
/// The physical counter.
pub const CNTPCT_EL0: u64 = sys(3, 3, 14, 0, 1);
/// What performance counters do, from the side that switches it off: their interrupts, counting, overflows.
pub const PMINTENCLR_EL1: u64 = sys(3, 0, 9, 14, 2);
/// Counting.
pub const PMCNTENCLR_EL0: u64 = sys(3, 3, 9, 12, 2);
/// Overflows.
pub const PMOVSCLR_EL0: u64 = sys(3, 3, 9, 12, 3);

/// Reads a 64-bit register.
///
/// # Errors
/// KVM has no such register, or the CPU is not initialised.
pub fn get(fd: &VcpuFd, id: u64) -> Result<u64> {
    let mut value = [0; 8];
    fd.get_one_reg(id, &mut value).map_err(io::Error::from).with_context(|| format!("KVM_GET_ONE_REG {id:#x}"))?;
    Ok(u64::from_le_bytes(value))
}

/// Writes a 64-bit register.
///
/// # Errors
/// KVM refuses it.
pub fn set(fd: &VcpuFd, id: u64, value: u64) -> Result<()> {
    let fields = || (format!("id {id:#x} ({}): {value:#x}", name(id)), "One register; its number carries its size.");
    call("KVM_SET_ONE_REG", fields, || fd.set_one_reg(id, &value.to_le_bytes()))
        .map_err(io::Error::from)
        .with_context(|| format!("KVM_SET_ONE_REG {id:#x}"))?;
    Ok(())
}

/// A core register's name.
fn name(id: u64) -> String {
    match id {
        SP_EL0 => "sp_el0".into(),
        SP_EL1 => "sp_el1".into(),
        PC => "pc".into(),
        PSTATE => "pstate".into(),
        _ => (0..31).find(|n| x(*n) == id).map_or_else(|| "a system register".into(), |n| format!("x{n}")),
    }
}

/// The affinity that KVM gives to CPU `id`: what MPIDR_EL1 and the device tree call it.
pub fn mpidr(id: u32) -> u64 {
    let id = u64::from(id);
    id & 0xf | (id >> 4 & 0xff) << 8 | (id >> 12 & 0xff) << 16
}

/// Condition flags and interrupt masks: what of PSTATE a guest may start with.
const FLAGS: u64 = 0xf000_03c0;

/// Sets one register of an entry state.
///
/// # Errors
/// A name that no register has, or a value it cannot hold: status 2.
pub fn set_register(boot: &mut BootRegs, _mode: CpuMode, reg: &RegValue) -> Result<(), Refusal> {
    let (name, value) = (reg.name.as_str(), reg.value);
    let number = |name: &str, letter| {
        let digits = name.strip_prefix(letter)?;
        digits.parse::<usize>().ok().filter(|n| *n < 31 && n.to_string() == digits)
    };
    let wide = match name {
        "fp" => Some(29),
        "lr" => Some(30),
        _ => number(name, 'x'),
    };
    let slot = match (name, wide.or(number(name, 'w'))) {
        ("sp", _) if value % 16 != 0 => {
            return Err(usage(format!("--reg {reg}: a stack pointer is a multiple of 16")));
        }
        ("sp", _) => &mut boot.sp,
        ("pc", _) if value % 4 != 0 => {
            return Err(usage(format!("--reg {reg}: a program counter is a multiple of 4")));
        }
        ("pc", _) => &mut boot.pc,
        ("pstate", _) if value & !FLAGS != EL1H_MASKED & !FLAGS => {
            let hint = format!("{EL1H_MASKED:#x} is EL1 with all masked; bits {FLAGS:#x} can be chosen");
            return Err(usage(format!("--reg {reg}: not a state of EL1 to start in")).hint(hint));
        }
        ("pstate", _) => &mut boot.pstate,
        (_, Some(_)) if wide.is_none() && value >> 32 != 0 => {
            return Err(usage(format!("--reg {reg}: {name} is a 32-bit register")));
        }
        (_, Some(number)) => boot.x.get_mut(number).ok_or_else(|| usage(format!("--reg {reg}")))?,
        (_, None) => {
            return Err(usage(format!("--reg {reg}: there is no register {name:?}"))
                .hint("x0…x30 (or w0…w30, fp, lr) sp pc pstate"));
        }
    };
    *slot = value;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set_all(words: &[&str]) -> Result<BootRegs, Refusal> {
        let mut boot = BootRegs::default();
        for word in words {
            set_register(&mut boot, CpuMode::El1, &word.parse().unwrap())?;
        }
        Ok(boot)
    }

    #[test]
    fn every_name_reaches_its_register() {
        let boot = set_all(&["x0=1", "x30=2", "w7=3", "fp=4", "sp=0x10", "pc=0x14", "pstate=0x5"]).unwrap();
        assert_eq!((boot.x[0], boot.x[30], boot.x[7], boot.x[29]), (1, 2, 3, 4));
        assert_eq!((boot.sp, boot.pc, boot.pstate), (0x10, 0x14, 5));
        assert_eq!(set_all(&["lr=9"]).unwrap().x[30], 9);
    }

    #[test]
    fn unknown_names_and_values_that_do_not_fit_are_refused() {
        for word in [
            "x31=1",
            "x=1",
            "x01=1",
            "x+1=1",
            "y0=1",
            "rax=1",
            "w0=0x100000000",
            "sp=8",
            "pc=2",
            "pstate=0x3c9",
            "pstate=0x15",
            "xé=1",
        ] {
            assert_eq!(set_all(&[word]).unwrap_err().status, 2, "{word}");
        }
    }

    #[test]
    fn numbers_are_those_of_the_kvm_api() {
        // KVM api.rst 4.68: "0x6030 0000 0010 0000 X0", "… 0040 PC", "… 0044 SP_EL1".
        assert_eq!((x(0), x(30)), (0x6030_0000_0010_0000, 0x6030_0000_0010_003c));
        assert_eq!((PC, PSTATE, SP_EL1), (0x6030_0000_0010_0040, 0x6030_0000_0010_0042, 0x6030_0000_0010_0044));
        // "0x6030 0000 0013 <op0:2><op1:3><crn:4><crm:4><op2:3>"; KVM_REG_ARM_TIMER_CTL.
        assert_eq!(CNTV_CTL_EL0, 0x6030_0000_0013_df19);
        assert_eq!((mpidr(0), mpidr(15), mpidr(16), mpidr(122)), (0, 15, 0x100, 0x70a));
    }
}
