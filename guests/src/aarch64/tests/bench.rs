//! Guests to measure with.

guest! {
    /// [`add`](crate::add), but it ends with SYSTEM_OFF, which KVM reports at once: that a CPU waits for ever shows late.
    add_off, r#"
            mov x20, 0x09000000     // the serial port
            add w0, w0, w1
            add w0, w0, '0'         // a number below ten becomes its digit
            str w0, [x20]
            mov w0, '\n'
            str w0, [x20]
            mov w0, 0x84000000
            add w0, w0, 8           // SYSTEM_OFF
            hvc 0
    "#
}

guest! {
    /// Exactly 100,000 stores to an address without a device; a hundred at a time, so that the loop costs little.
    out100k_none, r#"
            mov x20, 0x10
            mov w1, 1000
    out100k_none_next:
            .rept 100
            strb w0, [x20]
            .endr
            subs w1, w1, 1
            b.ne out100k_none_next
    out100k_none_end:
            wfi
            b out100k_none_end
    "#
}

guest! {
    /// Exactly 100,000 stores of the letter x to the serial port.
    out100k_serial, r#"
            mov x20, 0x09000000
            mov w0, 'x'
            mov w1, 1000
    out100k_serial_next:
            .rept 100
            strb w0, [x20]
            .endr
            subs w1, w1, 1
            b.ne out100k_serial_next
    out100k_serial_end:
            wfi
            b out100k_serial_end
    "#
}

guest! {
    /// As many lines of 64 bytes as x19 says: 16384 make 1 MiB.
    print_1m,
    r#"
            mov x20, 0x09000000
    print_1m_next:
    "#,
    say!("print_1m_text"),
    r#"
            subs x19, x19, 1
            b.ne print_1m_next
    print_1m_end:
            wfi
            b print_1m_end
    print_1m_text:
            .asciz "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-\n"
    "#
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bench_guests_do_exactly_what_they_say() {
        for image in [out100k_none(), out100k_serial()] {
            let words: Vec<u32> = image.chunks(4).map(|w| u32::from_le_bytes(w.try_into().unwrap())).collect();
            assert_eq!(words.iter().filter(|w| **w == 0x3900_0280).count(), 100, "strb w0, [x20]");
            assert!(words.contains(&0x5280_7d01), "mov w1, 1000");
        }
        let line = print_1m().split_at(print_1m().len() - 65).1;
        assert!(line.starts_with(b"0123") && line.ends_with(b"-\n\0"));
    }
}
