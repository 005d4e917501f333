//! Serial input, by asking and by interrupt.
//!
//! The flags of the PL011: bit 4, there is no input; bit 2, carrier, which Bantam takes away when input has ended and all of
//! it has been read.

guest! {
    /// Echoes serial input until ctrl-D or the end of input.
    echo, r#"
            mov x20, 0x09000000
            mov w0, 0x301           // on, both ways
            str w0, [x20, 0x30]
    echo_ask:
            ldr w0, [x20, 0x18]
            tbz w0, 4, echo_take
            tbnz w0, 2, echo_ask    // no input; but is there anybody?
    echo_end:
            wfi
            b echo_end
    echo_take:
            ldr w0, [x20]
            and w0, w0, 0xff        // above are errors
            cmp w0, 4               // ctrl-D
            b.eq echo_end
            str w0, [x20]
            b echo_ask
    "#
}

guest! {
    /// Echoes serial input until ctrl-D or the end of input, and sleeps in between. The CPU never takes the interrupt, which
    /// is masked: it only wakes from it, and asks the controller.
    echo_irq,
    "mov x20, 0x09000000",
    start_gic!(),
    r#"
            mov w0, 0x301           // on, both ways
            str w0, [x20, 0x30]
            mov w0, 0x54            // interrupt at input, at input left lying, and at a change of carrier
            str w0, [x20, 0x38]
            mov w24, 2              // interrupt 33
            str w24, [x21, 0x104]
    echo_irq_ask:
            ldr w0, [x20, 0x18]
            tbz w0, 4, echo_irq_take
            tbz w0, 2, echo_irq_end // no input; is there anybody?
            wfi                     // returns at once if the interrupt is there already
    "#,
    take_interrupt!(),
    r#"
            mov w0, 4               // the change of carrier has been seen; what else there is ends by reading it
            str w0, [x20, 0x44]
    "#,
    end_interrupt!(),
    r#"
            b echo_irq_ask
    echo_irq_take:
            ldr w0, [x20]
            and w0, w0, 0xff        // above are errors
            cmp w0, 4               // ctrl-D
            b.eq echo_irq_end
            str w0, [x20]
            b echo_irq_ask
    echo_irq_end:
            str w24, [x21, 0x184]   // no more interrupts: for good
    echo_irq_sleep:
            wfi
            b echo_irq_sleep
    "#
}
