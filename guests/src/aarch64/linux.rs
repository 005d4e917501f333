//! The first process of Linux, for `bantam example linux`: a static program with headers written by hand.

guest! {
    /// Says hello with the kernel's release, and switches the machine off.
    linux_init,
    r#"
    .set init_base, 0x400000
    .set init_size, init_end - init_image
    init_image:
            .byte 0x7f
            .ascii "ELF"
            .byte 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0            // 64 bits, little-endian, version 1
            .hword 2, 183                                       // e_type EXEC, e_machine AArch64
            .word 1                                             // e_version
            .quad init_start - init_image + init_base, 64, 0    // e_entry, e_phoff, e_shoff
            .word 0                                             // e_flags
            .hword 64, 56, 1, 0, 0, 0                           // e_ehsize, e_phentsize, e_phnum, no sections

            .word 1, 5                                          // p_type LOAD, p_flags read, execute
            .quad 0                                             // p_offset
            .quad init_base, init_base                          // p_vaddr, p_paddr
            .quad init_size, init_size                          // p_filesz, p_memsz
            .quad 0x10000                                       // p_align
    init_start:
            adr x1, init_hello
            mov x2, init_rest - init_hello
            bl init_say
            sub sp, sp, 400
            mov x8, 160             // uname: six names of 65 bytes
            mov x0, sp
            svc 0
            add x1, sp, 130         // the third is the release
            mov x2, 0
    init_count:
            ldrb w3, [x1, x2]
            cbz w3, init_counted
            add x2, x2, 1
            b init_count
    init_counted:
            bl init_say
            adr x1, init_rest
            mov x2, init_end - init_rest
            bl init_say
            mov x8, 142             // reboot
            ldr w0, init_magic
            ldr w1, init_magic + 4
            ldr w2, init_magic + 8
            svc 0
    init_stay:
            b init_stay
    init_say:
            mov x8, 64              // write
            mov x0, 1
            svc 0
            ret
    init_magic:
            .word 0xfee1dead, 672274793, 0x4321fedc // LINUX_REBOOT_CMD_POWER_OFF
    init_hello:
            .ascii "Hello from the first process of Linux "
    init_rest:
            .ascii ". It has seen enough.\n"
    init_end:
            .balign 4
    "#,
}
