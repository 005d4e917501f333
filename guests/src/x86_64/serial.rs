//! Serial input, by asking and by interrupt.
//!
//! The registers of the 16550: 0x3f8 data, 0x3f9 interrupt enable, 0x3fc modem control, 0x3fd line status (bit 0: there is
//! input), 0x3fe modem status (bit 7: carrier; Bantam takes it away when input has ended and all of it has been read).

guest! {
    /// Echoes serial input until ctrl-D or the end of input.
    echo, r#"
    .code16
            mov dx, 0x3fd
    echo_ask:
            in al, dx
            test al, 1              // input?
            jnz echo_take
            mov dl, 0xfe
            in al, dx
            mov dl, 0xfd
            test al, 0x80           // no; but is there anybody?
            jnz echo_ask
    echo_end:
            hlt
    echo_take:
            mov dl, 0xf8
            in al, dx
            cmp al, 4               // ctrl-D
            je echo_end
            out dx, al
            mov dl, 0xfd
            jmp echo_ask
    "#
}

guest! {
    /// Echoes serial input until ctrl-D or the end of input, and sleeps in between.
    echo_irq,
    r#"
    .set echo_irq_handler_at, echo_irq_handler - guest_echo_irq + 0x1000
    .code16
            mov word ptr [4 * 0x24], offset echo_irq_handler_at     // the vector of IRQ 4; its segment is 0 already
    "#,
    start_pic!(),
    r#"
            mov al, 0xef            // all masked but IRQ 4, the serial port
            out 0x21, al
            mov dx, 0x3fc
            mov al, 0x0b            // DTR, RTS and OUT2, which lets interrupts through
            out dx, al
            mov dx, 0x3f9
            mov al, 9               // interrupt at input and at a change of carrier
            out dx, al
    echo_irq_ask:
            mov dx, 0x3fd
            in al, dx
            test al, 1              // input?
            jnz echo_irq_take
            mov dl, 0xfe
            in al, dx
            test al, 0x80           // no; but is there anybody?
            jz echo_irq_end
            sti                     // takes effect after the next instruction, so no interrupt is slept through
            hlt
            cli
            jmp echo_irq_ask
    echo_irq_take:
            mov dl, 0xf8
            in al, dx
            cmp al, 4               // ctrl-D
            je echo_irq_end
            out dx, al
            jmp echo_irq_ask
    echo_irq_end:
            hlt                     // with interrupts off: for good

    echo_irq_handler:
            push ax
            mov al, 0x20            // end of interrupt; being woken is all that was wanted
            out 0x20, al
            pop ax
            iret
    "#
}
