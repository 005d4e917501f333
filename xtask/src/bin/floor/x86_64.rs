//! The floor on x86-64. The registers are handed over in `kvm_run` (KVM_CAP_SYNC_REGS) in place of three ioctls.

use std::ffi::c_int;

use crate::{Exit, guest};

const KVM_EXIT_IO: u32 = 2;
const KVM_EXIT_HLT: u32 = 5;
const KVM_SYNC_X86_REGS: u64 = 1;
const KVM_SYNC_X86_SREGS: u64 = 2;

/// struct kvm_segment; `kind` is its `type`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Segment {
    base: u64,
    limit: u32,
    selector: u16,
    kind: u8,
    present: u8,
    dpl: u8,
    db: u8,
    s: u8,
    l: u8,
    g: u8,
    avl: u8,
    unusable: u8,
    padding: u8,
}

/// struct kvm_dtable.
#[repr(C)]
#[derive(Clone, Copy)]
struct Table {
    base: u64,
    limit: u16,
    padding: [u16; 3],
}

/// struct kvm_sregs.
#[repr(C)]
struct Sregs {
    cs_to_ss: [Segment; 6],
    tr: Segment,
    ldt: Segment,
    gdt: Table,
    idt: Table,
    cr0: u64,
    cr2_to_cr8: [u64; 4],
    efer: u64,
    apic_base: u64,
    interrupts: [u64; 4],
}

/// struct kvm_regs.
#[repr(C)]
struct Regs {
    rax: u64,
    rbx: u64,
    rcx_to_r15: [u64; 14],
    rip: u64,
    rflags: u64,
}

/// The head of struct kvm_run, with the KVM_EXIT_IO member of its union.
#[repr(C)]
pub struct Run {
    requests: [u8; 8],
    reason: u32,
    flags: [u8; 4],
    cr8: u64,
    apic_base: u64,
    direction: u8,
    size: u8,
    port: u16,
    count: u32,
    data_offset: u64,
    rest: [u8; 240],
    valid: u64,
    dirty: u64,
    regs: Regs,
    sregs: Sregs,
}
const _: () = assert!(std::mem::offset_of!(Run, valid) == 288 && size_of::<Sregs>() == 312);

const fn segment(kind: u8, s: u8) -> Segment {
    let (base, limit, selector, present) = (0, 0xffff, 0, 1);
    Segment { base, limit, selector, kind, present, dpl: 0, db: 0, s, l: 0, g: 0, avl: 0, unusable: 0, padding: 0 }
}

/// The state of a CPU after reset (SDM Vol. 3, table 11-1) but with all segments at 0.
fn real_mode() -> Sregs {
    let table = Table { base: 0, limit: 0xffff, padding: [0; 3] };
    let data = segment(3, 1);
    Sregs {
        cs_to_ss: [segment(11, 1), data, data, data, data, data],
        tr: segment(11, 0),
        ldt: segment(2, 0),
        gdt: table,
        idt: table,
        cr0: 0x6000_0010,
        cr2_to_cr8: [0; 4],
        efer: 0,
        apic_base: 0xfee0_0900,
        interrupts: [0; 4],
    }
}

/// Makes the CPU start the guest.
pub fn enter(_vm: c_int, _vcpu: c_int, run: *mut Run, _adds: bool) {
    let regs = Regs { rax: 2, rbx: 2, rcx_to_r15: [0; 14], rip: guest::AT, rflags: 2 };
    // SAFETY: kvm_run is mapped, longer than `Run`, and nothing else refers to it.
    let state = unsafe { &mut *run };
    (state.regs, state.sregs, state.dirty) = (regs, real_mode(), KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS);
}

/// What the guest did.
pub fn exit(run: *const Run) -> Exit {
    // SAFETY: KVM writes kvm_run only inside KVM_RUN.
    let exit = unsafe { &*run };
    match exit.reason {
        KVM_EXIT_IO if u64::from(exit.port) == guest::SERIAL => {
            // SAFETY: KVM has put the data into the mapping, at the offset it says.
            Exit::Output(unsafe { *run.cast::<u8>().wrapping_add(exit.data_offset as usize) })
        }
        KVM_EXIT_IO => Exit::Nothing,
        KVM_EXIT_HLT => Exit::End,
        reason => Exit::Other(reason),
    }
}
