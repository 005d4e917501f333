//! Timer and clock.

guest! {
    /// Three ticks of the virtual timer, a twentieth of a second apart.
    timer,
    r#"
            mov x20, 0x09000000
            adr x9, guest_timer
            add x9, x9, 0x800       // the vectors; the guest is at a multiple of 2 KiB
            msr vbar_el1, x9
    "#,
    start_gic!(),
    r#"
            mov w9, 1 << 27         // the virtual timer's interrupt
            str w9, [x22, 0x100]
            mrs x24, cntfrq_el0     // its ticks in a second
            mov x9, 20
            udiv x24, x24, x9
            msr cntv_tval_el0, x24
            mov x9, 1
            msr cntv_ctl_el0, x9
            isb
            mov w25, 0              // interrupts taken
            mov w26, 0              // and told
    timer_next:
            wfi
            msr daifclr, 2
            isb                     // here
            msr daifset, 2
            cmp w25, w26
            b.eq timer_next
            add w26, w26, 1
    "#,
    say!("timer_text"),
    r#"
            cmp w26, 3
            b.ne timer_next
            mov x9, 0x09080000      // the debug-exit word: status 7
            str w26, [x9]
    timer_end:
            wfi
            b timer_end
    timer_text:
            .asciz "tick\n"

            .org guest_timer + 0x800 + 0x280    // interrupts at EL1
    "#,
    take_interrupt!(),
    r#"
            add w25, w25, 1
            msr cntv_tval_el0, x24  // silent for another twentieth
            isb
    "#,
    end_interrupt!(),
    "eret",
}

guest! {
    /// Prints the date and the time of the real-time clock (PL031), which counts seconds since 1970.
    clock, r#"
            mov x20, 0x09000000
            mov x1, 0x09010000
            ldr w1, [x1]
            adr x10, clock_values
            mov w9, 60
            udiv w2, w1, w9         // minutes
            msub w3, w2, w9, w1
            str w3, [x10, 24]       // seconds
            udiv w1, w2, w9         // hours
            msub w3, w1, w9, w2
            str w3, [x10, 20]
            mov w9, 24
            udiv w2, w1, w9         // days
            msub w3, w2, w9, w1
            str w3, [x10, 16]

            mov w4, 1970
            mov w6, 2100            // the only year before 2106, when 32 bits end, that is a multiple of 4 and no leap year
    clock_year:
            tst w4, 3
            ccmp w4, w6, 4, eq
            cset w5, ne             // w5 is 1 in a leap year,
            add w3, w5, 365         // and this its length
            cmp w2, w3
            b.lo clock_month
            sub w2, w2, w3
            add w4, w4, 1
            b clock_year
    clock_month:
            adr x7, clock_lengths
            ldrb w3, [x7, 1]
            add w3, w3, w5          // February
            strb w3, [x7, 1]
            mov w8, 0
    clock_next_month:
            ldrb w3, [x7], 1
            add w8, w8, 1
            cmp w2, w3
            b.lo clock_day
            sub w2, w2, w3
            b clock_next_month
    clock_day:
            add w2, w2, 1
            str w2, [x10, 12]
            str w8, [x10, 8]
            mov w9, 100
            udiv w2, w4, w9         // century
            msub w3, w2, w9, w4     // and year in it
            str w2, [x10]
            str w3, [x10, 4]

            adr x11, clock_marks
            mov w12, 7
            mov w9, 10
    clock_print:
            ldr w2, [x10], 4
            udiv w3, w2, w9         // the tens
            msub w4, w3, w9, w2     // the ones
            add w3, w3, '0'
            str w3, [x20]
            add w4, w4, '0'
            str w4, [x20]
            ldrb w3, [x11], 1
            cbz w3, clock_print_next        // nothing stands between century and year
            str w3, [x20]
    clock_print_next:
            subs w12, w12, 1
            b.ne clock_print
            mov w3, '\n'
            str w3, [x20]
    clock_end:
            wfi
            b clock_end

            .balign 4
    clock_values:
            .space 28               // century, year, month, day, hours, minutes, seconds
    clock_lengths:
            .byte 31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31
    clock_marks:
            .byte 0
            .ascii "--T::Z"
    "#
}
