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

guest! {
    /// Executes `out` where its page lies, where it is mapped once more beyond 4 GiB, there again, and twice in
    /// 32-bit code of a segment that does not begin at 0: to port 1 at 0x1040, to 2 and 3 at 0x8000001080, to 4 at 0x10c0,
    /// to 5 at 0x1100.
    high_and_low, r#"
    .set high_and_low_gdt_at, high_and_low_gdt - guest_high_and_low + 0x1000
    .set high_and_low_gdtr_at, high_and_low_gdtr - guest_high_and_low + 0x1000
    .code64
            mov edi, 0xf8001000     // Bantam's PML4: entry 1 maps what entry 0 maps
            mov rax, [rdi]
            mov [rdi + 8], rax
            jmp high_and_low_begin
            .skip 0x40 - (. - guest_high_and_low)
    high_and_low_begin:
            out 1, al
            movabs rax, 0x8000001080
            jmp rax
            .skip 0x80 - (. - guest_high_and_low)
            out 2, al
            out 3, al
            lgdt [high_and_low_gdtr_at]
            push 8
            push 0x10c0 - 0x800
            retfq
            .skip 0xc0 - (. - guest_high_and_low)
    .code32
            out 4, al
            .skip 0x100 - (. - guest_high_and_low), 0x90
            out 5, al
            hlt
    high_and_low_gdtr:
            .word 15
            .quad high_and_low_gdt_at
    high_and_low_gdt:
            .quad 0, 0x00cf9a000800ffff     // code, 32 bits, from 0x800 on
    "#
}
