//! Guests for how machines spin, wait and take input.

guest! {
    /// Spins with interrupts off.
    spin, r#"
    spin_here:
            b spin_here
    "#
}

guest! {
    /// Waits for events: KVM gives the CPU to others in the meantime, and comes back.
    spin_wfe, r#"
    spin_wfe_here:
            wfe
            b spin_wfe_here
    "#
}

guest! {
    /// Waits for interrupts, of which serial input makes one.
    halt_if_on,
    "mov x20, 0x09000000",
    start_gic!(),
    r#"
            mov w0, 0x301           // on, both ways
            str w0, [x20, 0x30]
            mov w0, 0x50            // interrupt at input
            str w0, [x20, 0x38]
            mov w0, 2               // interrupt 33
            str w0, [x21, 0x104]
    halt_if_on_next:
            wfi
            b halt_if_on_next
    "#
}

guest! {
    /// Waits for good.
    halt_off, r#"
    halt_off_next:
            wfi
            b halt_off_next
    "#
}

guest! {
    /// Takes a byte of serial input, then dawdles over sixteen exits, until the input ends.
    serial_flood_read,
    r#"
            mov x20, 0x09000000
            mov w0, 0x301           // on, both ways
            str w0, [x20, 0x30]
            mov x9, 0x10            // no device
    serial_flood_read_ask:
            ldr w0, [x20, 0x18]
            tbz w0, 4, serial_flood_read_take
            tbnz w0, 2, serial_flood_read_ask
    "#,
    say!("serial_flood_read_text"),
    r#"
    serial_flood_read_end:
            wfi
            b serial_flood_read_end
    serial_flood_read_take:
            ldr w0, [x20]
            .rept 16
            ldrb w0, [x9]
            .endr
            b serial_flood_read_ask
    serial_flood_read_text:
            .asciz "done\n"
    "#
}
