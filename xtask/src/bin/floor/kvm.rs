//! What of the KVM API no floor can do without.

use std::ffi::c_ulong;

pub const KVM_CREATE_VM: c_ulong = 0xae01;
pub const KVM_GET_VCPU_MMAP_SIZE: c_ulong = 0xae04;
pub const KVM_CREATE_VCPU: c_ulong = 0xae41;
pub const KVM_RUN: c_ulong = 0xae80;
pub const KVM_SET_USER_MEMORY_REGION: c_ulong = 0x4020_ae46;

/// struct kvm_userspace_memory_region.
#[repr(C)]
pub struct Slot {
    pub slot: u32,
    pub flags: u32,
    pub guest: u64,
    pub size: u64,
    pub host: u64,
}
