//! The smallest guests: the published ones that Bantam starts from, byte for byte.

guest! {
    /// Adds al and bl and prints the digit (the guest of LWN's "Using the KVM API").
    add, r#"
    .code16
            mov dx, 0x3f8           // the data register of the first serial port
            add al, bl
            add al, '0'             // a number below ten becomes its digit
            out dx, al
            mov al, 0x0a            // a newline
            out dx, al
            hlt
    "#
}

guest! {
    /// [`add`] as NASM assembles it: there, '\n' in single quotes is the two characters, and al gets the first.
    add_nasm, r#"
    .code16
            mov dx, 0x3f8
            add al, bl
            add al, '0'
            out dx, al
            mov al, 0x5c            // a backslash
            out dx, al
            hlt
    "#
}

guest! {
    /// Counts on port 0x10, 16 bits wide.
    counter, r#"
    .code16
            xor ax, ax
    counter_next:
            out 0x10, ax
            inc ax
            jmp counter_next
    "#
}

guest! {
    /// Reads port 0x10, 16 bits wide.
    reader, r#"
    .code16
    reader_next:
            in ax, 0x10
            jmp reader_next
    "#
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_guests_are_as_published() {
        assert_eq!(add(), *b"\xba\xf8\x03\x00\xd8\x04\x30\xee\xb0\x0a\xee\xf4");
        assert_eq!(add_nasm(), *b"\xba\xf8\x03\x00\xd8\x04\x30\xee\xb0\x5c\xee\xf4");
        assert_eq!(counter(), *b"\x31\xc0\xe7\x10\x40\xeb\xfb");
        assert_eq!(reader(), *b"\xe5\x10\xeb\xfc");
    }
}
