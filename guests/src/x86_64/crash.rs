//! Ways to die, one mistake each; the report of each names its cause.
//!
//! All are entered in 64-bit mode with Bantam's own GDT and page tables and no IDT, unless they say otherwise: any
//! exception makes a double fault, and that one a triple fault.

guest! {
    /// Faults. There is no interrupt table, so the page fault makes a double fault, and that one a triple fault.
    crash, r#"
    .code64
            movabs rbx, 0xdeadbeef000
            mov rax, qword ptr [rbx]
            hlt
    "#
}

guest! {
    /// Writes to a page that it means to map when it faults. But nobody has loaded an IDT.
    crash_idt, r#"
    .code64
            mov eax, 42
            movabs rdi, 0x40000000000
            mov [rdi], eax
            hlt
    "#
}

guest! {
    /// Makes a system call. Nobody has loaded an IDT either; and KVM's emulator knows no INT in this mode.
    crash_int, r#"
    .code64
            mov eax, 1
            int 0x80
            hlt
    "#
}

guest! {
    /// Loads an IDT from an address that no page table maps, then breaks.
    crash_idt_unmapped, r#"
    .code64
            lidt [rip + crash_idt_unmapped_idtr]
            ud2
    crash_idt_unmapped_idtr:
            .word 0xfff
            .quad 0xdead0000000
    "#
}

guest! {
    /// Loads an IDT whose gates nobody has filled in.
    crash_gates, r#"
    .code64
            lidt [rip + crash_gates_idtr]
            ud2
    crash_gates_idtr:
            .word 0xfff
            .quad 0x8000
    "#
}

guest! {
    /// Has a gate for #UD, to a handler that is not where the gate says.
    crash_handler, r#"
    .code64
            lidt [rip + crash_handler_idtr]
            mov rax, 0x00008e0000080000     // present, interrupt gate, code selector 8, handler's low bits 0
            mov rcx, 0x00000dea             // handler 0xdea00000000: its high bits
            mov [0x8060], rax               // gate 6
            mov [0x8068], rcx
            ud2
    crash_handler_idtr:
            .word 0xfff
            .quad 0x8000
    "#
}

guest! {
    /// Loads a GDT that is empty, then a segment register from it.
    crash_gdt, r#"
    .code64
            lgdt [rip + crash_gdt_gdtr]
            mov eax, 0x10
            mov ds, eax
            hlt
    crash_gdt_gdtr:
            .word 0
            .quad 0
    "#
}

guest! {
    /// Calls a function with the stack where no memory is.
    crash_stack, r#"
    .code64
            movabs rsp, 0x7ffff0000000
            call crash_stack_function
            hlt
    crash_stack_function:
            ret
    "#
}

guest! {
    /// In protected mode: turns paging on for long mode and has forgotten PAE.
    crash_pae, r#"
    .code32
            mov dword ptr [0x10000], 0x11003        // a page table: one entry each
            mov dword ptr [0x11000], 0x12003
            mov dword ptr [0x12000], 0x83
            mov eax, 0x10000
            mov cr3, eax
            mov ecx, 0xc0000080                     // EFER ...
            rdmsr
            or eax, 0x100                           // ... LME
            wrmsr
            mov eax, cr0
            or eax, 0x80000000                      // PG
            mov cr0, eax
            hlt
    "#
}

guest! {
    /// Loads CR3 with the address of a page of zeroes: nothing is mapped any more.
    crash_tables, r#"
    .code64
            mov eax, 0x8000
            mov cr3, rax
            hlt
    "#
}

guest! {
    /// Clears the writable bit of the page directory entry for 2 MiB, then writes there.
    crash_readonly, r#"
    .code64
            mov rax, cr0
            or eax, 0x10000                         // WP: the kernel heeds it too
            mov cr0, rax
            mov rbx, cr3
            and qword ptr [rbx + 0x2008], -3        // Bantam's tables: CR3 + 0x2000 has the first GiB; entry 1, RW
            mov rax, cr3
            mov cr3, rax
            mov byte ptr [0x200000], 1
            hlt
    "#
}

guest! {
    /// Sets the no-execute bit of the same entry, then jumps there.
    crash_noexec, r#"
    .code64
            mov ecx, 0xc0000080                     // EFER ...
            rdmsr
            or eax, 0x800                           // ... NXE
            wrmsr
            mov rbx, cr3
            bts qword ptr [rbx + 0x2008], 63        // XD
            mov rax, cr3
            mov cr3, rax
            mov byte ptr [0x200000], 0xf4
            mov eax, 0x200000
            jmp rax
    "#
}

guest! {
    /// Calls a function through a pointer that nobody has set.
    crash_zeroes, r#"
    .code64
            movabs rax, 0xbad00000000
            xor ebx, ebx
            call rbx
            hlt
    "#
}

guest! {
    /// Is linked for 0x100000 and loaded at 0x1000: its first absolute jump goes to where it is not.
    crash_load_address, r#"
    .set crash_load_address_target, crash_load_address_main - guest_crash_load_address + 0x100000
    .code64
            movabs rax, 0xffff800000100000          // where its data will be
            mov ecx, offset crash_load_address_target
            jmp rcx
    crash_load_address_main:
            hlt
    "#
}

guest! {
    /// One instruction of AVX, which nobody has switched on.
    crash_vex, r#"
    .code64
            vzeroupper
            hlt
    "#
}

guest! {
    /// One instruction of SSE, which the guest has switched off.
    crash_sse, r#"
    .code64
            mov rax, cr4
            and eax, -513                           // OSFXSR
            mov cr4, rax
            movaps xmm1, xmm0
            hlt
    "#
}

guest! {
    /// Divides by zero.
    crash_div0, r#"
    .code64
            mov eax, 7
            xor edx, edx
            xor ecx, ecx
            div ecx
            hlt
    "#
}

guest! {
    /// Executes what compilers put where a program must not arrive.
    crash_ud, r#"
    .code64
            ud2
    "#
}

guest! {
    /// Reads through a pointer whose upper half is wrong.
    crash_canonical, r#"
    .code64
            movabs rsi, 0x1234567890abcdef
            mov rax, [rsi]
            hlt
    "#
}

guest! {
    /// Writes a model-specific register that no CPU has.
    crash_msr, r#"
    .code64
            mov ecx, 0x12345678
            mov eax, 1
            xor edx, edx
            wrmsr
            hlt
    "#
}

guest! {
    /// Returns from an interrupt that never was.
    crash_iret, r#"
    .code64
            mov esp, 0x7000                         // a stack of zeroes
            iretq
    "#
}

guest! {
    /// Loads a task register with a selector that the GDT does not have.
    crash_ltr, r#"
    .code64
            mov eax, 0x28
            ltr ax
            hlt
    "#
}

guest! {
    /// Runs out of its RAM: there is no end to its code.
    crash_past, r#"
    .code64
            mov eax, 0x200000                       // the end of RAM
            jmp rax
    "#
}
