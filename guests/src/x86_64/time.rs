//! Timer and clock.

guest! {
    /// Three ticks of the interval timer (8254), a twentieth of a second apart.
    timer,
    r#"
    .set timer_handler_at, timer_handler - guest_timer + 0x1000
    .set timer_text_at, timer_text - guest_timer + 0x1000
    .code16
            mov word ptr [4 * 0x20], offset timer_handler_at        // the vector of IRQ 0; its segment is 0 already
    "#,
    start_pic!(),
    r#"
            mov al, 0xfe            // all masked but IRQ 0, the timer
            out 0x21, al
            mov al, 0x34            // channel 0, low then high byte, mode 2: a tick at each end of the count
            out 0x43, al
            mov ax, 59659           // 1193182 Hz / 20
            out 0x40, al
            mov al, ah
            out 0x40, al
            mov bl, 3
            mov dx, 0x3f8
    timer_next:
            sti
            hlt
            cli
            mov si, offset timer_text_at
            mov cx, 5
            rep outsb
            dec bl
            jnz timer_next
            mov al, 3
            out 0xf4, al            // the debug-exit register: status 7

    timer_handler:
            push ax
            mov al, 0x20            // end of interrupt
            out 0x20, al
            pop ax
            iret
    timer_text:
            .ascii "tick\n"
    "#
}

guest! {
    /// Prints the date and the time of the CMOS clock (MC146818), which counts in BCD.
    clock, r#"
    .set clock_registers_at, clock_registers - guest_clock + 0x1000
    .set clock_values_at, clock_values - guest_clock + 0x1000
    .set clock_marks_at, clock_marks - guest_clock + 0x1000
    .code16
    clock_read:
            mov al, 10              // register A
            out 0x70, al
            in al, 0x71
            test al, 0x80           // being updated just now?
            jnz clock_read
            mov si, offset clock_registers_at
            mov di, offset clock_values_at
            mov cx, 7
    clock_next:
            lodsb
            out 0x70, al
            in al, 0x71
            stosb
            loop clock_next
            xor al, al              // still the same second? else it may have been 59 with the next minute
            out 0x70, al
            in al, 0x71
            cmp al, byte ptr [di - 1]
            jne clock_read

            mov dx, 0x3f8
            mov si, offset clock_values_at
            mov di, offset clock_marks_at
            mov cx, 7
    clock_print:
            lodsb
            mov ah, al
            shr al, 4               // the tens
            add al, '0'
            out dx, al
            mov al, ah
            and al, 15              // the ones
            add al, '0'
            out dx, al
            mov al, byte ptr [di]
            inc di
            test al, al
            jz clock_print_next     // nothing stands between century and year
            out dx, al
    clock_print_next:
            loop clock_print
            mov al, 0x0a
            out dx, al
            hlt

    clock_registers:
            .byte 0x32, 9, 8, 7, 4, 2, 0            // century, year, month, day, hours, minutes, seconds
    clock_values:
            .space 7
    clock_marks:
            .byte 0
            .ascii "--T::Z"
    "#
}
