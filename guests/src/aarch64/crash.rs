//! Ways to die, one mistake each; the report of each names its cause.
//!
//! An exception at EL1 goes to a vector, whatever is there: it ends nothing. Most of these guests do what bare-metal code
//! does at first: they set a vector table that branches to itself. There the CPU stands until Bantam finds it.

/// Sets VBAR_EL1 to 2 KiB after the start of `$guest`. Clobbers x9.
macro_rules! set_vectors {
    ($guest:literal) => {
        concat!("\nadr x9, ", $guest, "\nadd x9, x9, 0x800\nmsr vbar_el1, x9\nisb\n")
    };
}

/// The vector for exceptions from EL1 itself, in the table of [`set_vectors`].
macro_rules! vector {
    ($guest:literal, $code:literal) => {
        concat!("\n.org ", $guest, " + 0x800 + 0x200\n", $code, "\n")
    };
    ($guest:literal) => {
        vector!($guest, "7: b 7b")
    };
}

/// Entry 4 of the table of [`start_mmu`], which is for addresses from 4 GiB on: RAM again, with these attributes.
macro_rules! map_again {
    ($low:literal, $high:literal) => {
        concat!(
            "\nmov x10, ",
            $low,
            "\nmovk x10, 0x4000, lsl 16\nmovk x10, ",
            $high,
            ", lsl 48\nstr x10, [x9, 32]\ndsb sy\nisb\n"
        )
    };
}

guest! {
    /// One load of two registers: the CPU tells KVM that memory is missing, but not what for.
    crash, r#"
            mov x2, 0xd000
            movk x2, 0xdea, lsl 16
            ldp x0, x1, [x2]
    crash_end:
            wfi
            b crash_end
    "#
}

guest! {
    /// Makes a system call. Nobody has set VBAR_EL1.
    crash_vectors, r#"
            mov x8, 64
            svc 0
    "#
}

guest! {
    /// Sets VBAR_EL1 to where no memory is, then breaks.
    crash_vectors_unmapped, r#"
            mov x9, 0xdead0000
            msr vbar_el1, x9
            isb
            udf 1
    "#
}

guest! {
    /// Sets VBAR_EL1 to a table that nobody has filled in.
    crash_vectors_empty,
    set_vectors!("guest_crash_vectors_empty"),
    "brk 7"
}

guest! {
    /// Breaks; its handler begins, and then executes an instruction that is none.
    crash_handler,
    set_vectors!("guest_crash_handler"),
    "brk 7",
    vector!("guest_crash_handler", "nop\nudf 9"),
}

guest! {
    /// Executes an instruction that is none.
    crash_undefined,
    set_vectors!("guest_crash_undefined"),
    "udf 42",
    vector!("guest_crash_undefined"),
}

guest! {
    /// Calls a function of a program that was loaded elsewhere: there are zeroes.
    crash_zeroes,
    set_vectors!("guest_crash_zeroes"),
    r#"
            add x0, x9, 0x10, lsl 12
            blr x0
    "#,
    vector!("guest_crash_zeroes"),
}

guest! {
    /// Jumps to where no memory is.
    crash_jump,
    set_vectors!("guest_crash_jump"),
    r#"
            mov x0, 0xd000
            movk x0, 0xdea, lsl 16
            br x0
    "#,
    vector!("guest_crash_jump"),
}

guest! {
    /// Jumps to an address that is no multiple of 4.
    crash_pc,
    set_vectors!("guest_crash_pc"),
    r#"
            add x0, x9, 2
            br x0
    "#,
    vector!("guest_crash_pc"),
}

guest! {
    /// Takes a lock that is not aligned to its size and lies across two pieces of 16 bytes, within which a CPU with FEAT_LSE2
    /// allows it. (With the MMU off any such access faults; QEMU's CPUs, on which this is tested, know it of exclusive ones
    /// only.)
    crash_unaligned,
    set_vectors!("guest_crash_unaligned"),
    r#"
            add x1, x9, 0x40f
            ldaxr w0, [x1]
    "#,
    vector!("guest_crash_unaligned"),
}

guest! {
    /// Pushes to a stack pointer that nobody has set, and so does the handler.
    crash_stack,
    set_vectors!("guest_crash_stack"),
    start_mmu!("guest_crash_stack", "0x00"),
    r#"
            mov x0, 0
            mov sp, x0
            stp x29, x30, [sp, -16]!
    "#,
    vector!("guest_crash_stack", "stp x0, x1, [sp, -16]!\n7: b 7b"),
}

guest! {
    /// Turns the MMU on with tables that are empty: nothing is mapped, neither its code nor its vectors.
    crash_tables,
    set_vectors!("guest_crash_tables"),
    r#"
            add x9, x9, 0x10, lsl 12
            and x9, x9, 0xfffffffffffff000
            msr ttbr0_el1, x9
            mov x10, 0x19           // 39 bits of address, pages of 4 KiB,
            movk x10, 0x80, lsl 16  // and no second table
            msr tcr_el1, x10
            dsb sy
            isb
            mrs x10, sctlr_el1
            orr x10, x10, 1
            msr sctlr_el1, x10
            isb
    "#,
    vector!("guest_crash_tables"),
}

guest! {
    /// Reads through a pointer that no page table maps.
    crash_translation,
    set_vectors!("guest_crash_translation"),
    start_mmu!("guest_crash_translation", "0x00"),
    r#"
            mov x1, 0x200000000
            ldr x0, [x1]
    "#,
    vector!("guest_crash_translation"),
}

guest! {
    /// Writes to memory that is mapped read-only.
    crash_permission,
    set_vectors!("guest_crash_permission"),
    start_mmu!("guest_crash_permission", "0x00"),
    map_again!("0x785", "0"),
    r#"
            mov x1, 0x100000000
            str x0, [x1, 0x100]
    "#,
    vector!("guest_crash_permission"),
}

guest! {
    /// Jumps to memory that is mapped as data.
    crash_noexec,
    set_vectors!("guest_crash_noexec"),
    start_mmu!("guest_crash_noexec", "0x00"),
    map_again!("0x705", "0x20"),
    r#"
            mov x1, 0x100000000
            br x1
    "#,
    vector!("guest_crash_noexec"),
}

guest! {
    /// Panics, as compilers do it.
    crash_brk,
    set_vectors!("guest_crash_brk"),
    "brk 1",
    vector!("guest_crash_brk"),
}

guest! {
    /// Returns to EL2, which it never came from.
    crash_el,
    set_vectors!("guest_crash_el"),
    r#"
            mov x0, 0x3c9           // EL2, its own stack
            msr spsr_el1, x0
            adr x0, crash_el_there
            msr elr_el1, x0
            eret
    crash_el_there:
            nop
    "#,
    vector!("guest_crash_el"),
}

guest! {
    /// Reads a register of the hypervisor's level.
    crash_sysreg,
    set_vectors!("guest_crash_sysreg"),
    "mrs x0, hcr_el2",
    vector!("guest_crash_sysreg"),
}

guest! {
    /// Uses a floating-point register, as compilers do for a copy, while they are switched off.
    crash_fpu,
    set_vectors!("guest_crash_fpu"),
    r#"
            .arch_extension fp
            fmov d0, xzr
    "#,
    vector!("guest_crash_fpu"),
}
