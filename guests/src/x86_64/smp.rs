//! Several CPUs (Intel SDM vol. 3, "Multiple-Processor Management").
//!
//! CPU 0 starts alone. Through its local APIC at 0xfee00000 it sends the others INIT, then a start-up message with the
//! number of the page they shall begin at, in real mode.

guest! {
    /// Every CPU says its number.
    smp, r#"
    .set smp_first_at, smp_first - guest_smp + 0x1000
    .set smp_first_size, smp_second - smp_first
    .set smp_second_at, smp_second - guest_smp + 0x1000
    .set smp_gdtr_at, smp_gdtr - guest_smp + 0x1000
    .set smp_lock_at, smp_lock - guest_smp + 0x1000
    .set smp_text_at, smp_text - guest_smp + 0x1000
    .set smp_newline_at, smp_newline - guest_smp + 0x1000
    .code32
            mov esi, offset smp_first_at            // the others' first instructions go to page 8
            mov edi, 0x8000
            mov ecx, offset smp_first_size
            rep movsb
            sgdt [smp_gdtr_at]                      // they shall use the same descriptor table
            mov ebx, 0xfee00000
            mov dword ptr [ebx + 0xf0], 0x1ff       // this APIC is on
            mov dword ptr [ebx + 0x300], 0xc4500    // INIT to all but this CPU
            mov dword ptr [ebx + 0x300], 0xc4608    // and start-up, at page 8; a board would want 10 ms between them

    smp_say:
            mov eax, dword ptr [0xfee00020]         // each CPU sees its own APIC here
            shr eax, 24                             // its number
    smp_wait:
            lock bts dword ptr [smp_lock_at], 0     // the text and the serial port are for one CPU at a time
            jc smp_wait
            mov edi, offset smp_newline_at          // the number's digits, the last one first
            mov ecx, 10
    smp_digit:
            xor edx, edx
            div ecx
            add dl, '0'
            dec edi
            mov byte ptr [edi], dl
            test eax, eax
            jnz smp_digit

            mov edx, 0x3f8
            mov esi, offset smp_text_at
            mov ecx, 4
            rep outsb
            mov esi, edi
            mov ecx, offset smp_newline_at + 1
            sub ecx, edi
            rep outsb
            mov dword ptr [smp_lock_at], 0
            cli
            hlt

    .code16
    smp_first:                                      // here, at 0x8000, ds is 0
            lgdtd [smp_gdtr_at]
            mov eax, cr0
            or al, 1
            mov cr0, eax
            ljmp 8, offset smp_second_at
    .code32
    smp_second:
            mov eax, 0x10
            mov ds, eax
            mov es, eax
            mov ss, eax
            jmp smp_say

    smp_gdtr:
            .space 6
    smp_lock:
            .long 0
    smp_text:
            .ascii "CPU       "
    smp_newline:
            .ascii "\n"
    "#
}

/// Starts all other CPUs in real mode with the code between the labels `all_start_HOW` and `all_end_HOW`.
macro_rules! all_begin {
    () => {
        r#"
    .macro all_begin how
    .set all_at_\how, all_start_\how - all_image_\how + 0x1000
    .set all_size_\how, all_end_\how - all_start_\how
    .code32
    all_image_\how:
            mov esi, offset all_at_\how
            mov edi, 0x8000
            mov ecx, offset all_size_\how
            rep movsb
            mov ebx, 0xfee00000
            mov dword ptr [ebx + 0xf0], 0x1ff
            mov dword ptr [ebx + 0x300], 0xc4500
            mov dword ptr [ebx + 0x300], 0xc4608
    .endm
        "#
    };
}

guest! {
    /// Every CPU prints `h` and halts with interrupts off.
    smp_halt_off,
    all_begin!(),
    r#"
            all_begin halt
            .purgem all_begin
            mov edx, 0x3f8
            mov al, 'h'
            out dx, al
            cli
            hlt
    .code16
    all_start_halt:
            mov dx, 0x3f8
            mov al, 'h'
            out dx, al
            cli
            hlt
    all_end_halt:
    "#
}

guest! {
    /// Every CPU prints `s` and spins with interrupts off.
    smp_spin,
    all_begin!(),
    r#"
            all_begin spin
            .purgem all_begin
            mov edx, 0x3f8
            mov al, 's'
            out dx, al
            cli
    all_spin_first:
            jmp all_spin_first
    .code16
    all_start_spin:
            mov dx, 0x3f8
            mov al, 's'
            out dx, al
            cli
    all_spin_others:
            jmp all_spin_others
    all_end_spin:
    "#
}
