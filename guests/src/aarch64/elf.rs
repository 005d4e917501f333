//! An ELF file with headers written by hand (System V ABI, "Object Files").
//!
//! One segment, with more memory than file: the rest, `bss`, must read as zero. The file goes on after the segment
//! with bytes that are not zero, so that a loader which copies too much is found out.

guest! {
    /// Prints a line, then whether the 4 KiB that begin at the end of the segment's file part are zero.
    elf64,
    r#"
    .set elf_base, 0x40100000
    .set elf_file_size, elf_bss - guest_elf64
            .byte 0x7f
            .ascii "ELF"
            .byte 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0            // 64 bits, little-endian, version 1
            .hword 2, 183                                       // e_type EXEC, e_machine AArch64
            .word 1                                             // e_version
            .quad elf_start - guest_elf64 + elf_base, 64, 0     // e_entry, e_phoff, e_shoff
            .word 0                                             // e_flags
            .hword 64, 56, 1, 0, 0, 0                           // e_ehsize, e_phentsize, e_phnum, no sections

            .word 1, 7                                          // p_type LOAD, p_flags read, write, execute
            .quad 0                                             // p_offset
            .quad elf_base, elf_base                            // p_vaddr, p_paddr
            .quad elf_file_size, elf_file_size + 4096           // p_filesz, p_memsz
            .quad 4096                                          // p_align
    elf_start:
            mov x20, 0x09000000
    "#,
    say!("elf_hello"),
    r#"
            adr x2, elf_bss
            mov w3, 512
    elf_look:
            ldr x4, [x2], 8
            cbnz x4, elf_dirty
            subs w3, w3, 1
            b.ne elf_look
    "#,
    say!("elf_clean_text"),
    r#"
    elf_end:
            wfi
            b elf_end
    elf_dirty:
    "#,
    say!("elf_dirty_text"),
    r#"
            b elf_end
    elf_hello:
            .asciz "Hello from a 64-bit ELF file\n"
    elf_clean_text:
            .asciz "bss is zero\n"
    elf_dirty_text:
            .asciz "bss is not zero\n"
            .balign 8
    elf_bss:
            .fill 64, 1, 0xcc       // in the file, but not in the segment
    "#
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(at: usize) -> usize {
        usize::from_le_bytes(elf64()[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn the_headers_say_what_is_in_the_file() {
        let image = elf64();
        assert_eq!(image[..4], *b"\x7fELF");
        assert_eq!((number(24), number(32)), (0x4010_0000 + 64 + 56, 64));
        let filled = image.len() - 64;
        assert_eq!((number(64 + 32), number(64 + 40)), (filled, filled + 4096));
        assert_eq!(image[filled..], [0xcc; 64]);
    }
}
