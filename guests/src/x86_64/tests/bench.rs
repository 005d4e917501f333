//! Guests to measure with.

guest! {
    /// Exactly 100,000 `out` to a port without a device; a hundred at a time, so that the loop costs little.
    out100k_none, r#"
    .code16
            mov dx, 0x10
            mov cx, 1000
    out100k_none_next:
            .rept 100
            out dx, al
            .endr
            dec cx
            jnz out100k_none_next
            hlt
    "#
}

guest! {
    /// Exactly 100,000 `out` of the letter x to the serial port.
    out100k_serial, r#"
    .code16
            mov dx, 0x3f8
            mov al, 'x'
            mov cx, 1000
    out100k_serial_next:
            .rept 100
            out dx, al
            .endr
            dec cx
            jnz out100k_serial_next
            hlt
    "#
}

guest! {
    /// As many lines of 64 bytes as rbx says: 16384 make 1 MiB.
    print_1m, r#"
    .code64
            mov edx, 0x3f8
    print_1m_next:
            lea rsi, [rip + print_1m_text]
            mov ecx, 64
            rep outsb
            dec rbx
            jnz print_1m_next
            hlt
    print_1m_text:
            .ascii "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-\n"
    "#
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bench_guests_do_exactly_what_they_say() {
        for image in [out100k_none(), out100k_serial()] {
            assert_eq!(image.iter().filter(|b| **b == 0xee).count(), 100);
            assert!(image.windows(3).any(|w| w == [0xb9, 0xe8, 0x03]), "mov cx, 1000");
        }
        let line = print_1m().split_at(print_1m().len() - 64).1;
        assert!(line.starts_with(b"0123") && line.ends_with(b"-\n"));
    }
}
