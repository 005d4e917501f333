//! Registers by the names people write.

use kvm_bindings::kvm_segment;

use super::BootRegs;
use crate::config::{CpuMode, RegValue};
use crate::error::{Refusal, usage};

/// RFLAGS bits that exist (Intel SDM vol. 1, 3.4.3); bit 1 is always set.
const RFLAGS: u64 = 0x3f_7fd5 | 2;
/// Virtual-8086 mode: not a state to start in.
const RFLAGS_VM: u64 = 1 << 17;

/// Sets one register of an entry state. In real mode a segment register also gets its base.
///
/// # Errors
/// A name that no register has, or a value it cannot hold: status 2.
pub fn set_register(boot: &mut BootRegs, mode: CpuMode, reg: &RegValue) -> Result<(), Refusal> {
    let (name, value) = (reg.name.as_str(), reg.value);
    if let Some(segment) = segment(boot, name) {
        let selector = u16::try_from(value).map_err(|_| too_wide(reg, 16))?;
        segment.selector = selector;
        if mode == CpuMode::Real {
            segment.base = u64::from(selector) << 4;
        }
        return Ok(());
    }
    let Some((full, bits)) = canonical(name) else {
        return Err(usage(format!("--reg {reg}: there is no register {name:?}")).hint(
            "rax rbx rcx rdx rsi rdi rbp rsp r8…r15 rip rflags cs ds es fs gs ss, or their 32- and 16-bit names",
        ));
    };
    if bits < 64 && value >> bits != 0 {
        return Err(too_wide(reg, bits));
    }
    if full == 'i' && !can_point(mode, value) {
        return Err(usage(format!("--reg {reg}: a CPU in {mode} mode cannot start there"))
            .hint("below 4 GiB in real and protected mode, a canonical address in long mode"));
    }
    let regs = &mut boot.regs;
    let slot = match full {
        'a' => &mut regs.rax,
        'b' => &mut regs.rbx,
        'c' => &mut regs.rcx,
        'd' => &mut regs.rdx,
        'S' => &mut regs.rsi,
        'D' => &mut regs.rdi,
        'B' => &mut regs.rbp,
        'P' => &mut regs.rsp,
        '8' => &mut regs.r8,
        '9' => &mut regs.r9,
        '0' => &mut regs.r10,
        '1' => &mut regs.r11,
        '2' => &mut regs.r12,
        '3' => &mut regs.r13,
        '4' => &mut regs.r14,
        '5' => &mut regs.r15,
        'i' => &mut regs.rip,
        _ => {
            if value & !RFLAGS != 0 || value & RFLAGS_VM != 0 {
                return Err(usage(format!("--reg {reg}: sets flags that a CPU cannot start with")));
            }
            regs.rflags = value | 2;
            return Ok(());
        }
    };
    *slot = value;
    Ok(())
}

/// A CPU can be entered with `rip` (SDM vol. 3, "Checks on Guest RIP, RFLAGS, and SSP").
fn can_point(mode: CpuMode, rip: u64) -> bool {
    match mode {
        CpuMode::Real | CpuMode::Protected => rip >> 32 == 0,
        CpuMode::Long | CpuMode::El1 => (rip as i64) << 16 >> 16 == rip as i64,
    }
}

fn too_wide(reg: &RegValue, bits: u32) -> Refusal {
    usage(format!("--reg {reg}: {} is a {bits}-bit register", reg.name))
}

fn segment<'a>(boot: &'a mut BootRegs, name: &str) -> Option<&'a mut kvm_segment> {
    let sregs = &mut boot.sregs;
    Some(match name {
        "cs" => &mut sregs.cs,
        "ds" => &mut sregs.ds,
        "es" => &mut sregs.es,
        "fs" => &mut sregs.fs,
        "gs" => &mut sregs.gs,
        "ss" => &mut sregs.ss,
        _ => return None,
    })
}

/// A letter for the register, and the width that its name speaks of.
fn canonical(name: &str) -> Option<(char, u32)> {
    let legacy = [
        ("ax", 'a'),
        ("bx", 'b'),
        ("cx", 'c'),
        ("dx", 'd'),
        ("si", 'S'),
        ("di", 'D'),
        ("bp", 'B'),
        ("sp", 'P'),
        ("ip", 'i'),
        ("flags", 'f'),
    ];
    let of = |base: &str, bits| legacy.iter().find(|(n, _)| *n == base).map(|(_, letter)| (*letter, bits));
    if let Some(digits) = name.strip_prefix('r').filter(|d| d.starts_with(|c: char| c.is_ascii_digit())) {
        let (digits, bits) = match digits.strip_suffix('d') {
            Some(d) => (d, 32),
            None => (digits, 64),
        };
        return match digits {
            "8" | "9" => digits.chars().next().map(|c| (c, bits)),
            "10" | "11" | "12" | "13" | "14" | "15" => digits.chars().nth(1).map(|c| (c, bits)),
            _ => None,
        };
    }
    of(name, 16).or_else(|| of(name.strip_prefix('e')?, 32)).or_else(|| of(name.strip_prefix('r')?, 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(words: &[&str], mode: CpuMode) -> Result<BootRegs, Refusal> {
        let mut boot = BootRegs::real();
        for word in words {
            set_register(&mut boot, mode, &word.parse().unwrap())?;
        }
        Ok(boot)
    }

    #[test]
    fn every_name_reaches_its_register() {
        let boot = set(
            &["rax=1", "ebx=2", "cx=3", "r8=4", "r15=5", "r10d=6", "rip=7", "esp=8", "rflags=0x200"],
            CpuMode::Long,
        )
        .unwrap();
        let r = boot.regs;
        assert_eq!((r.rax, r.rbx, r.rcx, r.r8, r.r15, r.r10, r.rip, r.rsp, r.rflags), (1, 2, 3, 4, 5, 6, 7, 8, 0x202));
    }

    #[test]
    fn a_segment_gets_its_base_in_real_mode_only() {
        let real = set(&["ss=0x1000"], CpuMode::Real).unwrap().sregs.ss;
        assert_eq!((real.selector, real.base), (0x1000, 0x10000));
        let long = set(&["ss=0x10"], CpuMode::Long).unwrap().sregs.ss;
        assert_eq!((long.selector, long.base), (0x10, 0));
    }

    #[test]
    fn an_instruction_pointer_that_a_cpu_refuses_is_refused() {
        for (word, mode, fine) in [
            ("rip=0xffffffff", CpuMode::Real, true),
            ("rip=0x100000000", CpuMode::Real, false),
            ("rip=0x100000000", CpuMode::Protected, false),
            ("rip=0x7fffffffffff", CpuMode::Long, true),
            ("rip=0xffffffff80000000", CpuMode::Long, true),
            ("rip=0x800000000000", CpuMode::Long, false),
        ] {
            assert_eq!(set(&[word], mode).is_ok(), fine, "{word} {mode}");
        }
    }

    #[test]
    fn unknown_names_and_values_that_do_not_fit_are_refused() {
        for word in [
            "xyz=1",
            "rcs=1",
            "r16=1",
            "r=1",
            "e=1",
            "ax=0x10000",
            "eax=0x100000000",
            "cs=0x10000",
            "rflags=0x8000",
            "rflags=0x20002",
            "r1é=1",
        ] {
            assert_eq!(set(&[word], CpuMode::Real).unwrap_err().status, 2, "{word}");
        }
    }
}
