//! The floor on arm64: the CPU of the host's kind, with PSCI, since its guests end with SYSTEM_OFF.

use std::ffi::{CStr, c_int, c_ulong};

use crate::{Exit, guest, ioctl};

const KVM_SET_ONE_REG: c_ulong = 0x4010_aeac;
const KVM_ARM_VCPU_INIT: c_ulong = 0x4020_aeae;
const KVM_ARM_PREFERRED_TARGET: c_ulong = 0x8020_aeaf;
const KVM_ARM_VCPU_PSCI_0_2: u32 = 2;

const KVM_EXIT_MMIO: u32 = 6;
const KVM_EXIT_SYSTEM_EVENT: u32 = 24;

/// Ids of x0, x1 and pc: a 64-bit core register of arm64, and its place in struct kvm_regs in units of 4 bytes (api.rst
/// 4.68).
const CORE: u64 = 0x6030_0000_0010_0000;
const X0: u64 = CORE;
const X1: u64 = CORE | 2;
const PC: u64 = CORE | 64;

/// struct kvm_vcpu_init.
#[repr(C)]
struct Init {
    target: u32,
    features: [u32; 7],
}

/// struct kvm_one_reg.
#[repr(C)]
struct OneReg {
    id: u64,
    address: u64,
}

/// The head of struct kvm_run, with the KVM_EXIT_MMIO member of its union.
#[repr(C)]
pub struct Run {
    requests: [u8; 8],
    reason: u32,
    flags: [u8; 20],
    address: u64,
    data: [u8; 8],
    len: u32,
    is_write: u8,
}
const _: () = assert!(std::mem::offset_of!(Run, address) == 32);

/// Makes the CPU start the guest.
pub fn enter(vm: c_int, vcpu: c_int, _run: *mut Run, adds: bool) {
    let mut init = Init { target: 0, features: [0; 7] };
    ioctl(vm, KVM_ARM_PREFERRED_TARGET, &raw mut init as u64, c"KVM_ARM_PREFERRED_TARGET");
    init.features[0] |= 1 << KVM_ARM_VCPU_PSCI_0_2;
    ioctl(vcpu, KVM_ARM_VCPU_INIT, &raw const init as u64, c"KVM_ARM_VCPU_INIT");
    let set = |id, value: u64, what: &CStr| {
        let register = OneReg { id, address: &raw const value as u64 };
        ioctl(vcpu, KVM_SET_ONE_REG, &raw const register as u64, what);
    };
    set(PC, guest::AT, c"KVM_SET_ONE_REG of pc");
    if adds {
        set(X0, 2, c"KVM_SET_ONE_REG of x0");
        set(X1, 2, c"KVM_SET_ONE_REG of x1");
    }
}

/// What the guest did.
pub fn exit(run: *const Run) -> Exit {
    // SAFETY: KVM writes kvm_run only inside KVM_RUN.
    let exit = unsafe { &*run };
    match exit.reason {
        KVM_EXIT_MMIO if exit.address == guest::SERIAL => Exit::Output(exit.data[0]),
        KVM_EXIT_MMIO => Exit::Nothing,
        KVM_EXIT_SYSTEM_EVENT => Exit::End,
        reason => Exit::Other(reason),
    }
}
