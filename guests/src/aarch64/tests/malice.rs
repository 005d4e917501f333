//! Guests that use bus, interrupts and KVM's calls in every way that is not usual.

guest! {
    /// Past the end of RAM, which is at 0x40200000. What an access across that end reads or leaves is the CPU's and KVM's
    /// business; that the machine goes on is ours.
    mmio_edge,
    start_mmu!("guest_mmio_edge", "0x00"),
    r#"
            mov x20, 0x40000000
            movk x20, 0x4020, lsl 16
            mov w19, 1              // 1: reads outside are all ones, 1 byte wide,
            ldrb w0, [x20]
            cmp w0, 0xff
            b.ne mmio_edge_end
            mov w19, 2              // 2: and 2,
            ldrh w0, [x20, 2]
            mov w1, 0xffff
            cmp w0, w1
            b.ne mmio_edge_end
            mov w19, 3              // 3: and 4,
            ldr w0, [x20, 4]
            cmn w0, 1
            b.ne mmio_edge_end
            mov w19, 4              // 4: and 8,
            ldr x0, [x20, 8]
            cmn x0, 1
            b.ne mmio_edge_end
            mov w19, 5              // 5: unaligned too,
            add x1, x20, 0x1000
            ldur x0, [x1, 3]
            cmn x0, 1
            b.ne mmio_edge_end
            mov w19, 6              // 6: and with a sign, which Linux 6.12 forgets
            ldrsb x0, [x20, 1]
            and x0, x0, 0xff
            cmp x0, 0xff
            b.ne mmio_edge_end
            mov w19, 7              // 7
            ldrsh w0, [x20, 6]
            and w0, w0, 0xff
            cmp w0, 0xff
            b.ne mmio_edge_end

            strb wzr, [x20]         // writes outside are dropped
            strh wzr, [x20, 2]
            str wzr, [x20, 4]
            str xzr, [x20, 8]
            stur xzr, [x1, 3]
            mov w19, 8              // 8
            ldr x0, [x20]
            cmn x0, 1
            b.ne mmio_edge_end
            mov w19, 9              // 9: loads that order others
            ldar x0, [x20]
            cmn x0, 1
            b.ne mmio_edge_end
            stlr x0, [x20]

            mov x2, 0x5a5a          // across pages, and across the end
            str x2, [x20, -16]
            ldur x0, [x1, -3]
            stur xzr, [x1, -3]
            ldurh w0, [x20, -1]
            ldur w0, [x20, -2]
            ldur x0, [x20, -3]
            stur xzr, [x20, -3]
            mov w19, 10             // 10: what is wholly inside is as it was
            ldr x0, [x20, -16]
            cmp x0, x2
            b.ne mmio_edge_end
            mov w19, 0
    mmio_edge_end:
    "#,
    tell!(),
}

guest! {
    /// The addresses below RAM, with steps of a length that meets every alignment: coarse where nothing should be, fine
    /// where devices and the interrupt controller are. Left out are the debug-exit word, which ends the machine, and
    /// GICv2's CPU interface, which is the CPU's own and wants its alignment.
    mmio_sweep,
    start_mmu!("guest_mmio_sweep", "0x44"),
    r#"
            adr x24, mmio_sweep_ranges
    mmio_sweep_range:
            ldr w25, [x24], 4       // the first address, its end, the step
            ldr w26, [x24], 4
            ldr w27, [x24], 4
            cbz w27, mmio_sweep_end
    mmio_sweep_next:
            ldrb w0, [x25]
            strb w0, [x25]
            ldrh w0, [x25]
            strh w0, [x25]
            ldr w0, [x25]
            str w0, [x25]
            ldr x0, [x25]
            str x0, [x25]
            add w25, w25, w27
            cmp w25, w26
            b.lo mmio_sweep_next
            b mmio_sweep_range
    mmio_sweep_end:
            mov x20, 0x09000000     // the serial port may be in any state
            mov w0, 0x301
            str w0, [x20, 0x30]
    "#,
    say!("mmio_sweep_text"),
    r#"
    mmio_sweep_off:
            wfi
            b mmio_sweep_off
    mmio_sweep_text:
            .asciz "swept\n"
            .balign 4
    mmio_sweep_ranges:
            .word 0, 0x08000000, 0x1f3fff
            .word 0x08000000, 0x08001000, 0x1d
            .word 0x08001000, 0x0800fff0, 0x3ff
            .word 0x08030000, 0x09000000, 0xfff7
            .word 0x09000000, 0x09000100, 3
            .word 0x09010000, 0x09010040, 3
            .word 0x09080010, 0x40000000, 0x1f3fff
            .word 0, 0, 0
    "#
}

guest! {
    /// Narrow and wide accesses to the serial port, whose registers have 32 bits: a narrow write sets the other bits to 0,
    /// a wide one is for two registers.
    serial_wide,
    r#"
            mov x20, 0x09000000
            mov w0, 'b'
            strb w0, [x20]
            mov w0, 'h'
            strh w0, [x20]
            mov w0, 'w'
            str w0, [x20]
            mov x0, 'd'             // data and error clear
            str x0, [x20]
            mov w0, '\n'
            strb w0, [x20]
            mov w19, 1              // 1: the flags' low byte: the transmitter is always empty,
            ldrb w0, [x20, 0x18]
            tbz w0, 7, serial_wide_end
            mov w19, 2              // 2: and the high one: nobody calls
            ldrb w0, [x20, 0x19]
            cbnz w0, serial_wide_end
            mov w19, 3              // 3: a register, by halves
            mov w1, 0x1234
            strh w1, [x20, 0x24]
            ldrh w0, [x20, 0x24]
            cmp w0, w1
            b.ne serial_wide_end
            mov w19, 4              // 4: a write that begins inside a register is dropped
            mov w0, 0xff
            strb w0, [x20, 0x25]
            ldr w0, [x20, 0x24]
            cmp w0, w1
            b.ne serial_wide_end
            mov w19, 5              // 5: two registers: fractional baud rate and line control
            mov x1, 0x15
            movk x1, 0x60, lsl 32
            str x1, [x20, 0x28]
            ldr w0, [x20, 0x2c]
            cmp w0, 0x60
            b.ne serial_wide_end
            mov w19, 6              // 6
            ldr x0, [x20, 0x28]
            cmp x0, x1
            b.ne serial_wide_end
            mov w19, 7              // 7: the device's first two numbers
            ldr x0, [x20, 0xfe0]
            mov x1, 0x11
            movk x1, 0x10, lsl 32
            cmp x0, x1
            b.ne serial_wide_end
            mov w19, 0
    serial_wide_end:
    "#,
    tell!(),
}

guest! {
    /// Accesses of which the CPU does not tell KVM what they are: x1 = 0, two registers; 1 and 2, an address that moves
    /// on; 3, a vector.
    nisv, r#"
            mov x0, 0x300000        // vector instructions are allowed
            msr cpacr_el1, x0
            isb
            mov x20, 0xd000
            movk x20, 0xdea, lsl 16
            adr x0, nisv_first
            add x0, x0, x1, lsl 3
            br x0
    nisv_first:
            stp x0, x1, [x20]
            b nisv_end
            ldr w0, [x20], 4
            b nisv_end
            str w0, [x20, 8]!
            b nisv_end
            ldr q0, [x20]
    nisv_end:
            wfi
            b nisv_end
    "#
}

guest! {
    /// Cache maintenance, which is an access of a kind, where no memory is.
    cache_hole,
    r#"
            mov x20, 0xd000
            movk x20, 0xdea, lsl 16
            dc cvac, x20
            dc ivac, x20
            dc civac, x20
            dc cvau, x20
            ic ivau, x20
            dsb sy
            isb
            mov w19, 0
    "#,
    tell!(),
}

guest! {
    /// Calls of PSCI (Arm DEN0022, 5): what must be refused, and a CPU that goes on, off, and on again.
    psci,
    r#"
            mov w19, 1              // 1: PSCI_VERSION is 1.0 at least
            mov w20, 0x84000000     // the 32-bit calls,
            mov x21, 0xc4000000     // and the 64-bit ones
            mov w0, w20
            hvc 0
            cmp w0, 0x10, lsl 12
            b.lo psci_end
            mov w19, 2              // 2: a call that does not exist: NOT_SUPPORTED
            add w0, w20, 0xfff
            hvc 0
            cmn w0, 1
            b.ne psci_end
            mov w19, 3              // 3: CPU_ON of a CPU that is on: ALREADY_ON
            add x0, x21, 3
            mov x1, 0
            adr x2, psci_other
            hvc 0
            cmn w0, 4
            b.ne psci_end
            mov w19, 4              // 4: of none: INVALID_PARAMETERS
            add x0, x21, 3
            mov x1, 0xf0f
            hvc 0
            cmn w0, 2
            b.ne psci_end
            mov w19, 5              // 5: of a number that is none
            add x0, x21, 3
            mov x1, 1 << 63
            hvc 0
            cmn w0, 2
            b.ne psci_end
            mov w19, 6              // 6: AFFINITY_INFO of CPU 1: off
            bl psci_ask
            cmp w0, 1
            b.ne psci_end
            mov w19, 7              // 7: PSCI_FEATURES knows CPU_ON
            add w0, w20, 10
            add w1, w21, 3
            hvc 0
            cbnz w0, psci_end
            mov w22, 50             // CPU_ON, fifty times
    psci_again:
            mov w19, 8              // 8: is done,
            add x0, x21, 3
            mov x1, 1
            adr x2, psci_other
            hvc 0
            cbnz w0, psci_end
            mov w19, 9              // 9: and in the end the CPU is off
            mov w23, 0xffff
    psci_wait:
            subs w23, w23, 1
            b.eq psci_end
            bl psci_ask
            cmp w0, 1
            b.ne psci_wait
            subs w22, w22, 1
            b.ne psci_again
            mov w19, 0
            b psci_end
    psci_ask:
            add x0, x21, 4
            mov x1, 1
            mov x2, 0
            hvc 0
            ret
    psci_other:
            mov w0, 0x84000000
            add w0, w0, 2           // CPU_OFF
            hvc 0
            b psci_other
    psci_end:
    "#,
    tell!(),
}

guest! {
    /// Takes the virtual timer's interrupt again as soon as it is done with it.
    irq_storm,
    r#"
            adr x9, guest_irq_storm
            add x9, x9, 0x800       // the vectors; the guest is at a multiple of 2 KiB
            msr vbar_el1, x9
    "#,
    start_gic!(),
    r#"
            mov w9, 1 << 27
            str w9, [x22, 0x100]
            msr cntv_cval_el0, xzr  // since the machine began
            mov x9, 1
            msr cntv_ctl_el0, x9
            isb
            msr daifclr, 2
    irq_storm_here:
            b irq_storm_here

            .org guest_irq_storm + 0x800 + 0x280
    "#,
    take_interrupt!(),
    end_interrupt!(),
    "eret",
}

guest! {
    /// Jumps to where no memory is; the fault's handler is at 0x200, where there is none either.
    abort_storm, r#"
            mov x0, 0xd000
            movk x0, 0xdea, lsl 16
            br x0
    "#
}
