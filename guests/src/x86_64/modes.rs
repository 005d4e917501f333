//! The modes of the CPU, entered and climbed through.

guest! {
    /// Prints a line from protected mode.
    hello_protected, r#"
    .set hello_protected_text_at, hello_protected_text - guest_hello_protected + 0x1000
    .set hello_protected_size, guest_hello_protected_end - hello_protected_text
    .code32
            mov esi, offset hello_protected_text_at
            mov ecx, offset hello_protected_size
            mov edx, 0x3f8
            rep outsb               // all ecx bytes at esi; Bantam's serial port is always ready for more
            hlt
    hello_protected_text:
            .ascii "Hello from protected mode\n"
    "#
}

guest! {
    /// Prints a line from long mode, wherever it is loaded.
    hello_long, r#"
    .set hello_long_size, guest_hello_long_end - hello_long_text
    .code64
            lea rsi, [rip + hello_long_text]
            mov ecx, offset hello_long_size
            mov edx, 0x3f8
            rep outsb
            hlt
    hello_long_text:
            .ascii "Hello from long mode\n"
    "#
}

guest! {
    /// Goes from real to protected to long mode, with a line from each (Intel SDM vol. 3, 10.8.5).
    modes, r#"
    .set modes_base, 0x1000
    .set modes_real_at, modes_real - guest_modes + modes_base
    .set modes_protected_at, modes_protected - guest_modes + modes_base
    .set modes_long_at, modes_long - guest_modes + modes_base
    .set modes_code32_at, modes_code32 - guest_modes + modes_base
    .set modes_code64_at, modes_code64 - guest_modes + modes_base
    .set modes_gdt_at, modes_gdt - guest_modes + modes_base
    .set modes_gdtr_at, modes_gdtr - guest_modes + modes_base
    .code16
            mov dx, 0x3f8
            mov si, offset modes_real_at
            mov cx, 5
            rep outsb

            lgdtd [modes_gdtr_at]
            mov eax, cr0
            or al, 1                // PE: protected mode ...
            mov cr0, eax
            ljmp 8, offset modes_code32_at          // ... once cs is loaded from the table
    .code32
    modes_code32:
            mov eax, 0x10
            mov ds, eax
            mov es, eax
            mov ss, eax
            mov esi, offset modes_protected_at
            mov ecx, 10
            rep outsb

            mov dword ptr [0x10000], 0x11003        // page tables: the first entry of each, present and writable;
            mov dword ptr [0x11000], 0x12003        // all else in this memory is zero
            mov dword ptr [0x12000], 0x83           // and one page of 2 MiB at address 0
            mov eax, 0x10000
            mov cr3, eax
            mov eax, cr4
            or eax, 0x20            // PAE
            mov cr4, eax
            mov ecx, 0xc0000080     // EFER ...
            rdmsr
            or eax, 0x100           // ... LME: paging will mean long mode
            wrmsr
            mov eax, cr0
            or eax, 0x80000000      // PG
            mov cr0, eax
            ljmp 0x18, offset modes_code64_at
    .code64
    modes_code64:
            mov edx, 0x3f8
            mov esi, offset modes_long_at
            mov ecx, 5
            rep outsb
            hlt

    modes_real:
            .ascii "real\n"
    modes_protected:
            .ascii "protected\n"
    modes_long:
            .ascii "long\n"
    modes_gdt:
            .quad 0
            .quad 0x00cf9b000000ffff                // 0x08: code, 32 bits, 4 GiB
            .quad 0x00cf93000000ffff                // 0x10: data
            .quad 0x00af9b000000ffff                // 0x18: code, 64 bits
    modes_gdtr:
            .word . - modes_gdt - 1
            .long modes_gdt_at
    "#
}

guest! {
    /// Asks the CPU who it is.
    cpuid, r#"
    .set cpuid_vendor_at, cpuid_vendor - guest_cpuid + 0x1000
    .set cpuid_text_at, cpuid_text - guest_cpuid + 0x1000
    .set cpuid_yes_at, cpuid_yes - guest_cpuid + 0x1000
    .set cpuid_no_at, cpuid_no - guest_cpuid + 0x1000
    .set cpuid_text_size, cpuid_yes - cpuid_text
    .code32
            xor eax, eax
            cpuid                   // leaf 0: the vendor, in ebx, edx, ecx
            mov dword ptr [cpuid_vendor_at], ebx
            mov dword ptr [cpuid_vendor_at + 4], edx
            mov dword ptr [cpuid_vendor_at + 8], ecx
            mov edx, 0x3f8
            mov esi, offset cpuid_text_at
            mov ecx, offset cpuid_text_size
            rep outsb

            mov edi, offset cpuid_no_at
            mov eax, 0x80000000
            cpuid                   // the highest extended leaf
            cmp eax, 0x80000001
            jb cpuid_answer
            mov eax, 0x80000001
            cpuid
            bt edx, 29              // LM
            jnc cpuid_answer
            mov edi, offset cpuid_yes_at
    cpuid_answer:
            mov edx, 0x3f8
            mov esi, edi
            mov ecx, 4
            rep outsb
            hlt

    cpuid_text:
            .ascii "vendor: "
    cpuid_vendor:
            .ascii "............\nlong mode: "
    cpuid_yes:
            .ascii "yes\n"
    cpuid_no:
            .ascii "no \n"
    "#
}
