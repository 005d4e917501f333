//! Exception levels and the MMU.

guest! {
    /// Prints the exception level it runs at.
    hello_el1,
    r#"
            mov x20, 0x09000000
            adr x3, hello_el1_level
            mrs x4, currentel
            lsr x4, x4, 2
            add w4, w4, '0'
            strb w4, [x3]
    "#,
    say!("hello_el1_text"),
    r#"
    hello_el1_end:
            wfi
            b hello_el1_end
    hello_el1_text:
            .ascii "Hello from EL"
    hello_el1_level:
            .asciz "?\n"
    "#
}

guest! {
    /// A line without the MMU, a line with it, and a line from EL0, which may not touch what EL1 has: code and serial port
    /// are there a second time, 4 GiB higher.
    modes,
    "mov x20, 0x09000000",
    say!("modes_physical"),
    start_mmu!("guest_modes", "0x00"),
    say!("modes_virtual"),
    r#"
            add x9, x9, 0x20        // entries 4 and 5 of the table: 0 and 1 GiB again,
            mov x10, 0x441          // for EL0
            str x10, [x9]
            mov x10, 0x745
            movk x10, 0x4000, lsl 16
            str x10, [x9, 8]
            dsb sy
            adr x10, guest_modes
            add x10, x10, 0x800     // the vectors
            msr vbar_el1, x10
            mov x10, 0x3c0          // to EL0, interrupts off
            msr spsr_el1, x10
            adr x10, modes_el0
            orr x10, x10, 0x100000000
            msr elr_el1, x10
            orr x20, x20, 0x100000000
            eret
    modes_el0:
    "#,
    say!("modes_user"),
    r#"
            svc 0                   // to EL1: EL0 may not wait

    modes_physical:
            .asciz "physical\n"
    modes_virtual:
            .asciz "virtual\n"
    modes_user:
            .asciz "user\n"

            .org guest_modes + 0x800 + 0x400    // exceptions from EL0
    modes_svc:
            wfi
            b modes_svc
    "#
}

guest! {
    /// Asks the CPU who it is.
    cpuid,
    r#"
            mov x20, 0x09000000
    "#,
    say!("cpuid_midr"),
    "mrs x0, midr_el1",
    say_number!(),
    say!("cpuid_bits"),
    r#"
            mrs x9, id_aa64mmfr0_el1
            and x9, x9, 15          // PARange
            adr x0, cpuid_ranges
            add x0, x0, x9, lsl 2   // four bytes each
    "#,
    say!(),
    r#"
    cpuid_end:
            wfi
            b cpuid_end
    cpuid_midr:
            .asciz "MIDR_EL1: 0x"
    cpuid_bits:
            .asciz "\naddress bits: "
    cpuid_ranges:
            .asciz "32\n", "36\n", "40\n", "42\n", "44\n", "48\n", "52\n", "56\n"
            .fill 8, 4, 0x000a3f3f  // reserved: ??
    "#
}
