//! Guests for how machines spin, halt, break and take input.

guest! {
    /// Spins with interrupts off.
    spin_real, r#"
    .code16
            cli
    spin_real_here:
            jmp spin_real_here
    "#
}

guest! {
    /// The same in long mode.
    spin_long, r#"
    .code64
            cli
    spin_long_here:
            jmp spin_long_here
    "#
}

guest! {
    /// Halts with interrupts on, and again whenever woken.
    halt_if_on, r#"
    .code16
            sti
    halt_if_on_next:
            hlt
            jmp halt_if_on_next
    "#
}

guest! {
    /// Halts for good.
    halt_off, r#"
    .code16
            cli
    halt_off_next:
            hlt
            jmp halt_off_next
    "#
}

guest! {
    /// One instruction with a VEX prefix, vzeroupper. KVM's emulator knows none; a CPU faults, since CR4.OSXSAVE is 0.
    vex, r#"
    .code64
            .byte 0xc5, 0xf8, 0x77
            hlt
    "#
}

guest! {
    /// Takes a byte of serial input, then dawdles over sixteen exits, until the input ends.
    serial_flood_read, r#"
    .set serial_flood_read_text_at, serial_flood_read_text - guest_serial_flood_read + 0x1000
    .code32
    serial_flood_read_ask:
            mov edx, 0x3fd
            in al, dx
            test al, 1
            jnz serial_flood_read_take
            mov dl, 0xfe
            in al, dx
            test al, 0x80
            jnz serial_flood_read_ask
            mov dl, 0xf8
            mov esi, offset serial_flood_read_text_at
            mov ecx, 5
            rep outsb
            hlt
    serial_flood_read_take:
            mov dl, 0xf8
            in al, dx
            .rept 16
            in al, 0x80
            .endr
            jmp serial_flood_read_ask
    serial_flood_read_text:
            .ascii "done\n"
    "#
}
