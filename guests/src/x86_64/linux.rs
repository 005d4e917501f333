//! The first process of Linux, for `bantam example linux`: a static program with headers written by hand.

guest! {
    /// Says hello with the kernel's release, and switches the machine off.
    linux_init,
    r#"
    .code64
    .set init_base, 0x400000
    .set init_size, init_end - init_image
    init_image:
            .byte 0x7f
            .ascii "ELF"
            .byte 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0            // 64 bits, little-endian, version 1
            .word 2, 62                                         // e_type EXEC, e_machine x86-64
            .long 1                                             // e_version
            .quad init_start - init_image + init_base, 64, 0    // e_entry, e_phoff, e_shoff
            .long 0                                             // e_flags
            .word 64, 56, 1, 0, 0, 0                            // e_ehsize, e_phentsize, e_phnum, no sections

            .long 1, 5                                          // p_type LOAD, p_flags read, execute
            .quad 0                                             // p_offset
            .quad init_base, init_base                          // p_vaddr, p_paddr
            .quad init_size, init_size                          // p_filesz, p_memsz
            .quad 4096                                          // p_align
    init_start:
            lea rsi, [rip + init_hello]
            mov edx, offset init_hello_size
            call init_say
            sub rsp, 400
            mov eax, 63             // uname: six names of 65 bytes
            mov rdi, rsp
            syscall
            lea rsi, [rsp + 130]    // the third is the release
            xor edx, edx
    init_count:
            cmp byte ptr [rsi + rdx], 0
            je init_counted
            inc edx
            jmp init_count
    init_counted:
            call init_say
            lea rsi, [rip + init_rest]
            mov edx, offset init_rest_size
            call init_say
            mov eax, 169            // reboot
            mov edi, 0xfee1dead
            mov esi, 672274793
            mov edx, 0x4321fedc     // LINUX_REBOOT_CMD_POWER_OFF
            syscall
    init_stay:
            jmp init_stay
    init_say:
            mov eax, 1              // write
            mov edi, 1
            syscall
            ret
    init_hello:
            .ascii "Hello from the first process of Linux "
    init_rest:
            .ascii ". It has seen enough.\n"
    init_end:
    .set init_hello_size, init_rest - init_hello
    .set init_rest_size, init_end - init_rest
    "#,
}
