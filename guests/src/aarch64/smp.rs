//! Several CPUs. CPU 0 starts alone; PSCI's CPU_ON starts another (Arm DEN0022, 5.6), until there is none of that number.
//!
//! No locks: with the MMU off, exclusive loads and stores need not work.

/// Starts CPU w19 at the address x2. Afterwards w0 is 0, or not if there is no such CPU; clobbers x1 and x3.
macro_rules! cpu_on {
    () => {
        r#"
            and w1, w19, 15         // sixteen to a cluster: the number's parts in MPIDR_EL1
            lsr w3, w19, 4
            orr w1, w1, w3, lsl 8
            mov w0, 3
            movk w0, 0xc400, lsl 16
            mov x3, 0
            hvc 0
        "#
    };
}

guest! {
    /// Every CPU says its number, then starts the next one, so that only one talks at a time.
    smp,
    r#"
            mov x20, 0x09000000
            mrs x9, mpidr_el1
            and w19, w9, 15
            ubfx w9, w9, 8, 8
            add w19, w19, w9, lsl 4
    "#,
    say!("smp_text"),
    r#"
            mov w9, 10
            mov w10, 1              // the highest power of ten that the number has
    smp_power:
            mul w11, w10, w9
            cmp w11, w19
            b.hi smp_print
            mov w10, w11
            b smp_power
    smp_print:
            mov w12, w19
    smp_digit:
            udiv w11, w12, w10
            msub w12, w11, w10, w12
            add w11, w11, '0'
            str w11, [x20]
            udiv w10, w10, w9
            cbnz w10, smp_digit
            mov w11, '\n'
            str w11, [x20]

            add w19, w19, 1
            adr x2, guest_smp
    "#,
    cpu_on!(),
    r#"
    smp_end:
            wfi
            b smp_end
    smp_text:
            .asciz "CPU "
    "#
}

/// Starts all other CPUs at the label `$others`.
macro_rules! all_begin {
    ($others:literal) => {
        concat!(
            "mov w19, 1\n7: adr x2, ",
            $others,
            cpu_on!(),
            r#"
            add w19, w19, 1
            cbz w0, 7b
        "#
        )
    };
}

guest! {
    /// Every CPU prints `h` and waits with no interrupt enabled.
    smp_halt_off,
    all_begin!("smp_halt_off_each"),
    r#"
    smp_halt_off_each:
            mov x20, 0x09000000
            mov w0, 'h'
            str w0, [x20]
    smp_halt_off_end:
            wfi
            b smp_halt_off_end
    "#
}

guest! {
    /// Every CPU prints `s` and spins.
    smp_spin,
    all_begin!("smp_spin_each"),
    r#"
    smp_spin_each:
            mov x20, 0x09000000
            mov w0, 's'
            str w0, [x20]
    smp_spin_here:
            b smp_spin_here
    "#
}
