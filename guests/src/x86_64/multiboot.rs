//! Kernels for the two Multiboot specifications (version 0.6.96, 3.1 to 3.3; version 2.0, 3.1 to 3.6).
//!
//! Both are loaded at 1 MiB by the addresses in their headers and entered in protected mode, with a magic number in eax
//! and the address of the boot loader's information in ebx. Both print the same.

/// What both kernels say, and how: strings that end in a zero, and numbers of 64 bits. `talk 1` makes the labels end
/// in 1.
macro_rules! talk {
    () => {
        r#"
    .macro talk v
    .set mb_at_wrong\v, mb_wrong\v - mb_image\v + 0x100000
    .set mb_at_magic\v, mb_magic\v - mb_image\v + 0x100000
    .set mb_at_loader\v, mb_loader\v - mb_image\v + 0x100000
    .set mb_at_line\v, mb_line\v - mb_image\v + 0x100000
    .set mb_at_memory\v, mb_memory\v - mb_image\v + 0x100000
    .set mb_at_plus\v, mb_plus\v - mb_image\v + 0x100000
    .set mb_at_type\v, mb_type\v - mb_image\v + 0x100000
    .set mb_at_module\v, mb_module\v - mb_image\v + 0x100000
    mb_say\v:                               // the string at esi; dx is the serial port
            lodsb
            test al, al
            jz mb_said\v
            out dx, al
            jmp mb_say\v

    mb_number\v:                            // the eight bytes at esi, in hexadecimal; clobbers ecx
            push ebx
            mov ecx, 8
    mb_byte\v:
            mov bl, byte ptr [esi + ecx - 1]
            mov al, bl
            shr al, 4
            call mb_digit\v
            mov al, bl
            and al, 15
            call mb_digit\v
            dec ecx
            jnz mb_byte\v
            pop ebx
    mb_said\v:
            ret

    mb_digit\v:
            cmp al, 10
            jb mb_decimal\v
            add al, 'a' - '0' - 10
    mb_decimal\v:
            add al, '0'
            out dx, al
            ret

    mb_range\v:                             // the memory map's entry at edi: base, length, type
            mov esi, offset mb_at_memory\v
            call mb_say\v
            mov esi, edi
            call mb_number\v
            mov esi, offset mb_at_plus\v
            call mb_say\v
            lea esi, [edi + 8]
            call mb_number\v
            mov esi, offset mb_at_type\v
            call mb_say\v
            mov al, byte ptr [edi + 16]
            call mb_digit\v
    mb_newline\v:
            mov al, 0x0a
            out dx, al
            ret

    mb_wrong\v:
            .asciz "magic wrong\n"
    mb_magic\v:
            .asciz "magic right\n"
    mb_loader\v:
            .asciz "loader: "
    mb_line\v:
            .asciz "command line: "
    mb_memory\v:
            .asciz "memory: 0x"
    mb_plus\v:
            .asciz " + 0x"
    mb_type\v:
            .asciz ", type "
    mb_module\v:
            .asciz "module: "
    .endm
        "#
    };
}

guest! {
    /// A Multiboot 1 kernel.
    multiboot,
    r#"
    .set multiboot_flags, 0x10003                   // modules at pages, memory information, and the addresses below
    .set multiboot_load_end, guest_multiboot_end - guest_multiboot + 0x100000
    .set multiboot_stack_top, multiboot_load_end + 0x1000
    .set multiboot_entry, multiboot_start - guest_multiboot + 0x100000
    .code32
    mb_image1:
            .long 0x1badb002, multiboot_flags, -(0x1badb002 + multiboot_flags)
            .long 0x100000                          // where this header is
            .long 0x100000                          // where loading starts,
            .long multiboot_load_end                // and ends,
            .long multiboot_stack_top               // and where zeroed memory ends
            .long multiboot_entry
    multiboot_start:
            cld
            mov esp, offset multiboot_stack_top
            mov edx, 0x3f8
            mov esi, offset mb_at_wrong1
            cmp eax, 0x2badb002
            jne multiboot_last_word
            mov esi, offset mb_at_magic1
            call mb_say1

            test dword ptr [ebx], 0x200             // a flag for each thing that the loader tells
            jz multiboot_try_line
            mov esi, offset mb_at_loader1
            mov edi, dword ptr [ebx + 64]
            call multiboot_pair
    multiboot_try_line:
            test dword ptr [ebx], 4
            jz multiboot_try_memory
            mov esi, offset mb_at_line1
            mov edi, dword ptr [ebx + 16]
            call multiboot_pair
    multiboot_try_memory:
            test dword ptr [ebx], 0x40
            jz multiboot_try_modules
            mov edi, dword ptr [ebx + 48]           // the map's address and its length
            mov ebp, dword ptr [ebx + 44]
            add ebp, edi
    multiboot_next_range:
            cmp edi, ebp
            jae multiboot_try_modules
            add edi, 4                              // the entry follows its size, which does not count itself
            call mb_range1
            add edi, dword ptr [edi - 4]
            jmp multiboot_next_range
    multiboot_try_modules:
            test dword ptr [ebx], 8
            jz multiboot_end
            mov ebp, dword ptr [ebx + 20]           // how many
            mov ebx, dword ptr [ebx + 24]           // start, end, string and a reserved word for each
    multiboot_next_module:
            test ebp, ebp
            jz multiboot_end
            mov esi, offset mb_at_module1
            mov edi, dword ptr [ebx + 8]
            call multiboot_pair
            add ebx, 16
            dec ebp
            jmp multiboot_next_module
    multiboot_last_word:
            call mb_say1
    multiboot_end:
            cli
            hlt

    multiboot_pair:                                 // the strings at esi and edi, a line
            call mb_say1
            mov esi, edi
            call mb_say1
            jmp mb_newline1
    "#,
    talk!(),
    "talk 1",
    ".purgem talk",
}

guest! {
    /// A Multiboot 2 kernel.
    multiboot2,
    r#"
    .set multiboot2_load_end, guest_multiboot2_end - guest_multiboot2 + 0x100000
    .set multiboot2_stack_top, multiboot2_load_end + 0x1000
    .set multiboot2_entry, multiboot2_start - guest_multiboot2 + 0x100000
    .set multiboot2_header_size, multiboot2_start - guest_multiboot2
    .code32
    mb_image2:
            .long 0xe85250d6, 0, multiboot2_header_size         // 0: for a PC, in protected mode
            .long 0x100000000 - 0xe85250d6 - multiboot2_header_size
            .word 1, 0                              // information that must be there:
            .long 24, 1, 2, 3, 6                    // command line, loader, modules, memory map
            .word 2, 0                              // addresses:
            .long 24, 0x100000, 0x100000            // of this header, of what is loaded,
            .long multiboot2_load_end               // of its end
            .long multiboot2_stack_top              // and of the end of zeroed memory
            .word 3, 0                              // the entry address
            .long 12, multiboot2_entry, 0           // and 4 bytes to make it a multiple of 8
            .word 6, 0                              // modules at pages
            .long 8
            .word 0, 0                              // that is all
            .long 8
    multiboot2_start:
            cld
            mov esp, offset multiboot2_stack_top
            mov edx, 0x3f8
            mov esi, offset mb_at_wrong2
            cmp eax, 0x36d76289
            jne multiboot2_last_word
            mov esi, offset mb_at_magic2
            call mb_say2

            add ebx, 8                              // past the total size: tags of type, size and content
    multiboot2_next_tag:
            mov eax, dword ptr [ebx]
            lea edi, [ebx + 8]
            mov esi, offset mb_at_line2
            cmp eax, 1
            je multiboot2_text
            mov esi, offset mb_at_loader2
            cmp eax, 2
            je multiboot2_text
            lea edi, [ebx + 16]                     // after start and end, or size and version of an entry
            mov esi, offset mb_at_module2
            cmp eax, 3
            je multiboot2_text
            cmp eax, 6
            je multiboot2_map
            test eax, eax
            jnz multiboot2_skip
            cli
            hlt
    multiboot2_text:
            call mb_say2
            mov esi, edi
            call mb_say2
            call mb_newline2
            jmp multiboot2_skip
    multiboot2_map:
            mov ebp, dword ptr [ebx + 4]
            add ebp, ebx                            // the tag's end
    multiboot2_next_range:
            cmp edi, ebp
            jae multiboot2_skip
            call mb_range2
            add edi, dword ptr [ebx + 8]
            jmp multiboot2_next_range
    multiboot2_skip:
            add ebx, dword ptr [ebx + 4]
            add ebx, 7                              // the next one is at a multiple of 8
            and ebx, -8
            jmp multiboot2_next_tag
    multiboot2_last_word:
            call mb_say2
            cli
            hlt
    "#,
    talk!(),
    "talk 2",
    ".purgem talk",
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(image: &[u8], index: usize) -> u32 {
        u32::from_le_bytes(image[4 * index..][..4].try_into().unwrap())
    }

    #[test]
    fn the_first_header_adds_up_to_zero_and_names_the_whole_file() {
        let image = multiboot();
        let header: Vec<u32> = (0..8).map(|i| word(image, i)).collect();
        assert_eq!(header[0], 0x1bad_b002);
        assert_eq!(header[0].wrapping_add(header[1]).wrapping_add(header[2]), 0);
        let end = 0x10_0000 + u32::try_from(image.len()).unwrap();
        assert_eq!(header[3..], [0x10_0000, 0x10_0000, end, end + 0x1000, 0x10_0020]);
    }

    #[test]
    fn the_second_header_adds_up_to_zero_and_its_tags_fill_it() {
        let image = multiboot2();
        assert_eq!((word(image, 0), word(image, 1)), (0xe852_50d6, 0));
        assert_eq!((0..4).fold(0, |sum: u32, i| sum.wrapping_add(word(image, i))), 0);
        let size = word(image, 2) as usize;
        let mut at = 16;
        let mut kinds = Vec::new();
        while at < size {
            kinds.push(word(image, at / 4) & 0xffff);
            at += (word(image, at / 4 + 1) as usize).next_multiple_of(8);
        }
        assert_eq!(at, size);
        assert_eq!(kinds, [1, 2, 3, 6, 0]);
        assert_eq!(word(image, (16 + 24 + 24 + 8) / 4) as usize, 0x10_0000 + size);
    }
}
