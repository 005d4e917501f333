//! The smallest guests: the published one that Bantam starts from, word for word, and its like.

guest! {
    /// Stores `Hello` and a newline to address 0x996, as published.
    hello, r#"
            mov x4, 0x996
            mov x5, 'H'
            strb w5, [x4]
            mov x5, 'e'
            strb w5, [x4]
            mov x5, 'l'
            strb w5, [x4]
            strb w5, [x4]
            mov x5, 'o'
            strb w5, [x4]
            mov x5, '\n'
            strb w5, [x4]
    "#
}

guest! {
    /// Adds x0 and x1 and prints the digit.
    add, r#"
            mov x20, 0x09000000     // the serial port
            add w0, w0, w1
            add w0, w0, '0'         // a number below ten becomes its digit
            str w0, [x20]
            mov w0, '\n'
            str w0, [x20]
    add_end:
            wfi
            b add_end
    "#
}

guest! {
    /// Counts at address 0x10, 16 bits wide.
    counter, r#"
            mov x1, 0x10
            mov w0, 0
    counter_next:
            strh w0, [x1]
            add w0, w0, 1
            b counter_next
    "#
}

guest! {
    /// Reads address 0x10, 16 bits wide.
    reader, r#"
            mov x1, 0x10
    reader_next:
            ldrh w0, [x1]
            b reader_next
    "#
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_guest_is_as_published() {
        let words: Vec<u32> = hello().chunks(4).map(|w| u32::from_le_bytes(w.try_into().unwrap())).collect();
        let published = [
            0xd281_32c4u32,
            0xd280_0905,
            0x3900_0085,
            0xd280_0ca5,
            0x3900_0085,
            0xd280_0d85,
            0x3900_0085,
            0x3900_0085,
            0xd280_0de5,
            0x3900_0085,
            0xd280_0145,
            0x3900_0085,
        ];
        assert_eq!(words, published);
    }
}
