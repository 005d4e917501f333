//! ELF files with headers written by hand (System V ABI, "Object Files").
//!
//! One segment each, with more memory than file: the rest, `bss`, must read as zero. The file goes on after the segment
//! with bytes that are not zero, so that a loader which copies too much is found out.

/// After the headers: prints a line, then whether the 4 KiB that begin at the end of the segment's file part are zero.
/// The instructions mean the same in protected and in long mode.
macro_rules! hello_and_bss {
    () => {
        r#"
    .macro hello_and_bss bits
    .set elf_at_start\bits, elf_start\bits - elf_image\bits + 0x100000
    .set elf_at_hello\bits, elf_hello\bits - elf_image\bits + 0x100000
    .set elf_at_clean\bits, elf_clean\bits - elf_image\bits + 0x100000
    .set elf_at_dirty\bits, elf_dirty\bits - elf_image\bits + 0x100000
    .set elf_at_bss\bits, elf_bss\bits - elf_image\bits + 0x100000
    .set elf_hello_size\bits, elf_clean\bits - elf_hello\bits
    .set elf_file_size\bits, elf_bss\bits - elf_image\bits
    elf_start\bits:
            mov edx, 0x3f8
            mov esi, offset elf_at_hello\bits
            mov ecx, offset elf_hello_size\bits
            rep outsb
            xor eax, eax
            mov edi, offset elf_at_bss\bits
            mov ecx, 1024
            repe scasd              // stops at the first four bytes that are not zero
            mov esi, offset elf_at_clean\bits
            mov ecx, 12             // mov leaves the flags as they are
            je elf_tell\bits
            mov esi, offset elf_at_dirty\bits
            mov ecx, 16
    elf_tell\bits:
            rep outsb
            cli
            hlt
    elf_hello\bits:
            .ascii "Hello from a \bits-bit ELF file\n"
    elf_clean\bits:
            .ascii "bss is zero\n"
    elf_dirty\bits:
            .ascii "bss is not zero\n"
    elf_bss\bits:
            .fill 64, 1, 0xcc       // in the file, but not in the segment
    .endm
        "#
    };
}

guest! {
    /// A 32-bit file.
    elf32,
    r#"
    .code32
    elf_image32:
            .byte 0x7f
            .ascii "ELF"
            .byte 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0            // 32 bits, little-endian, version 1
            .word 2, 3                                          // e_type EXEC, e_machine 386
            .long 1, elf_at_start32                             // e_version, e_entry
            .long 52, 0, 0                                      // e_phoff, e_shoff, e_flags
            .word 52, 32, 1, 0, 0, 0                            // e_ehsize, e_phentsize, e_phnum, no sections

            .long 1, 0                                          // p_type LOAD, p_offset
            .long 0x100000, 0x100000                            // p_vaddr, p_paddr
            .long elf_file_size32, elf_file_size32 + 4096       // p_filesz, p_memsz
            .long 7, 4096                                       // p_flags read, write, execute; p_align
    "#,
    hello_and_bss!(),
    "hello_and_bss 32",
    ".purgem hello_and_bss",
}

guest! {
    /// A 64-bit file.
    elf64,
    r#"
    .code64
    elf_image64:
            .byte 0x7f
            .ascii "ELF"
            .byte 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0            // 64 bits, little-endian, version 1
            .word 2, 62                                         // e_type EXEC, e_machine x86-64
            .long 1                                             // e_version
            .quad elf_at_start64, 64, 0                         // e_entry, e_phoff, e_shoff
            .long 0                                             // e_flags
            .word 64, 56, 1, 0, 0, 0                            // e_ehsize, e_phentsize, e_phnum, no sections

            .long 1, 7                                          // p_type LOAD, p_flags read, write, execute
            .quad 0                                             // p_offset
            .quad 0x100000, 0x100000                            // p_vaddr, p_paddr
            .quad elf_file_size64, elf_file_size64 + 4096       // p_filesz, p_memsz
            .quad 4096                                          // p_align
    "#,
    hello_and_bss!(),
    "hello_and_bss 64",
    ".purgem hello_and_bss",
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(image: &[u8], at: usize, size: usize) -> usize {
        image[at..at + size].iter().rev().fold(0, |value, byte| value << 8 | usize::from(*byte))
    }

    #[test]
    fn the_headers_say_what_is_in_the_file() {
        for (image, entry, program, word, first_code) in [(elf32(), 24, 52, 4, 52 + 32), (elf64(), 24, 64, 8, 64 + 56)]
        {
            assert_eq!(image[..4], *b"\x7fELF");
            assert_eq!(number(image, entry, word), 0x10_0000 + first_code);
            assert_eq!(number(image, entry + word, word), program);
            let sizes = if word == 4 { program + 16 } else { program + 32 };
            assert_eq!(number(image, sizes, word), image.len() - 64);
            assert_eq!(number(image, sizes + word, word), image.len() - 64 + 4096);
            assert_eq!(image[image.len() - 64..], [0xcc; 64]);
        }
    }
}
