//! Guests that use the buses in every way that is not usual.

guest! {
    /// String I/O. Port 0x10 has no device: it reads as all ones. Port 0x3ff is the serial port's scratch register.
    strings, r#"
    .set strings_text_at, strings_text - guest_strings + 0x1000
    .set strings_buffer, 0x20000
    .code32
            xor ebx, ebx            // the number of the check

            inc ebx                 // 1: rep outsb prints, and moves on as it should
            mov edx, 0x3f8
            mov esi, offset strings_text_at
            mov ecx, 6
            rep outsb
            cmp esi, offset strings_text_at + 6
            jne strings_end
            inc ebx                 // 2: and counts down
            test ecx, ecx
            jne strings_end
            inc ebx                 // 3: backwards
            std
            mov esi, offset strings_text_at + 4
            mov ecx, 5
            rep outsb
            cld
            cmp esi, offset strings_text_at - 1
            jne strings_end
            mov al, 0x0a
            out dx, al
            inc ebx                 // 4: rep outsw
            mov edx, 0x10
            mov esi, offset strings_text_at
            mov ecx, 3
            rep outsw
            cmp esi, offset strings_text_at + 6
            jne strings_end
            inc ebx                 // 5: rep outsd
            mov esi, offset strings_text_at
            mov ecx, 3
            rep outsd
            cmp esi, offset strings_text_at + 12
            jne strings_end

            mov eax, 0x11111111     // a buffer that shows what was written and what was not
            mov edi, offset strings_buffer
            mov ecx, 8
            rep stosd
            inc ebx                 // 6: rep insb stores five bytes of ones
            mov edi, offset strings_buffer
            mov ecx, 5
            rep insb
            cmp edi, strings_buffer + 5
            jne strings_end
            inc ebx                 // 7: all ones,
            cmp dword ptr [strings_buffer], -1
            jne strings_end
            inc ebx                 // 8: and no more than five
            cmp dword ptr [strings_buffer + 4], 0x111111ff
            jne strings_end
            inc ebx                 // 9: rep insw, three
            mov edi, offset strings_buffer + 8
            mov ecx, 3
            rep insw
            cmp dword ptr [strings_buffer + 8], -1
            jne strings_end
            inc ebx                 // 10
            cmp dword ptr [strings_buffer + 12], 0x1111ffff
            jne strings_end
            inc ebx                 // 11: rep insd, three
            mov edi, offset strings_buffer + 16
            mov ecx, 3
            rep insd
            mov eax, dword ptr [strings_buffer + 16]
            and eax, dword ptr [strings_buffer + 20]
            and eax, dword ptr [strings_buffer + 24]
            cmp eax, -1
            jne strings_end
            inc ebx                 // 12
            cmp dword ptr [strings_buffer + 28], 0x11111111
            jne strings_end

            inc ebx                 // 13: a register's value, four times
            mov edx, 0x3ff
            mov al, 0x5a
            out dx, al
            mov edi, offset strings_buffer
            mov ecx, 4
            rep insb
            cmp dword ptr [strings_buffer], 0x5a5a5a5a
            jne strings_end
            inc ebx                 // 14: rep outsb leaves the last byte there
            mov esi, offset strings_text_at
            mov ecx, 4
            rep outsb
            in al, dx
            cmp al, 'l'
            jne strings_end
            inc ebx                 // 15: rep insw of an 8-bit register and the port after it
            mov edi, offset strings_buffer
            mov ecx, 2
            rep insw
            cmp dword ptr [strings_buffer], 0xff6cff6c
            jne strings_end

            inc ebx                 // 16: more than a page, and not from its beginning
            mov edx, 0x10
            mov edi, offset strings_buffer + 0xffd
            mov ecx, 5000
            rep insb
            mov edi, offset strings_buffer + 0xffd
            mov ecx, 5000
            mov al, 0xff
            repe scasb
            jne strings_end
            inc ebx                 // 17: nothing before it, nothing after it
            cmp byte ptr [strings_buffer + 0xffc], 0
            jne strings_end
            inc ebx                 // 18
            cmp byte ptr [edi], 0
            jne strings_end
            xor ebx, ebx
    strings_end:
            mov al, bl
            out 0xf4, al
    strings_text:
            .ascii "Hello\n123456"
    "#
}

guest! {
    /// All the bytes of the address space to one port.
    outs_huge, r#"
    .code32
            mov edx, 0x10
            mov ecx, 0xffffffff
            rep outsb
            hlt
    "#
}

guest! {
    /// Past the end of RAM, which is at 2 MiB.
    mmio_edge, r#"
    .code64
            mov ebp, 0x200000
            movabs rax, 0x8877665544332211
            mov qword ptr [rbp - 8], rax
            xor ebx, ebx

            inc ebx                 // 1: reads outside are all ones, 1 byte wide,
            mov al, byte ptr [rbp]
            cmp al, 0xff
            jne mmio_edge_end
            inc ebx                 // 2: and 2,
            mov ax, word ptr [rbp + 2]
            cmp ax, -1
            jne mmio_edge_end
            inc ebx                 // 3: and 4,
            mov eax, dword ptr [rbp + 4]
            cmp eax, -1
            jne mmio_edge_end
            inc ebx                 // 4: and 8,
            mov rax, qword ptr [rbp + 8]
            cmp rax, -1
            jne mmio_edge_end
            inc ebx                 // 5: unaligned and across a page too
            mov rax, qword ptr [rbp + 0xffd]
            cmp rax, -1
            jne mmio_edge_end

            inc ebx                 // 6: across the end, the part in RAM is RAM
            mov ax, word ptr [rbp - 1]
            cmp ax, 0xff88
            jne mmio_edge_end
            inc ebx                 // 7
            mov eax, dword ptr [rbp - 2]
            cmp eax, 0xffff8877
            jne mmio_edge_end
            inc ebx                 // 8
            mov rax, qword ptr [rbp - 3]
            mov rcx, 0xffffffffff887766
            cmp rax, rcx
            jne mmio_edge_end

            xor eax, eax
            mov byte ptr [rbp], al  // writes outside are dropped
            mov word ptr [rbp], ax
            mov dword ptr [rbp], eax
            mov qword ptr [rbp], rax
            mov qword ptr [rbp + 0xffd], rax
            inc ebx                 // 9
            mov rax, qword ptr [rbp]
            cmp rax, -1
            jne mmio_edge_end
            inc ebx                 // 10: the part of a write that is in RAM is not
            mov qword ptr [rbp - 4], 0
            movabs rcx, 0x44332211
            cmp qword ptr [rbp - 8], rcx
            jne mmio_edge_end
            inc ebx                 // 11
            mov rax, qword ptr [rbp]
            cmp rax, -1
            jne mmio_edge_end

            inc ebx                 // 12: read, change and write back
            inc dword ptr [rbp + 4]
            add qword ptr [rbp + 8], 5
            xor eax, eax
            xchg dword ptr [rbp + 16], eax
            cmp eax, -1
            jne mmio_edge_end
            inc ebx                 // 13: strings, in ...
            mov rsi, rbp
            lea rdi, [rbp - 0x100]
            mov ecx, 16
            rep movsb
            mov rax, qword ptr [rbp - 0x100]
            and rax, qword ptr [rbp - 0xf8]
            cmp rax, -1
            jne mmio_edge_end
            inc ebx                 // 14: ... and out over the end
            lea rdi, [rbp - 8]
            mov ecx, 16
            mov al, 0x77
            rep stosb
            mov rax, qword ptr [rbp - 1]
            mov rcx, 0xffffffffffffff77
            cmp rax, rcx
            jne mmio_edge_end
            xor ebx, ebx
    mmio_edge_end:
            mov al, bl
            out 0xf4, al
    "#
}

guest! {
    /// Wide accesses to the serial port: each byte is for its own register, the lowest address first.
    serial_wide, r#"
    .code32
            xor ebx, ebx
            inc ebx                 // 1: 16 bits: data and interrupt enable
            mov edx, 0x3f8
            mov eax, 0x0000 + 'w'
            out dx, ax
            mov dl, 0xf9
            in al, dx
            test al, al
            jne serial_wide_end
            inc ebx                 // 2: 32 bits: and FIFO control, line control (8 bits, no parity)
            mov dl, 0xf8
            mov eax, 0x03000000 + 'W'
            out dx, eax
            mov dl, 0xfb
            in al, dx
            cmp al, 3
            jne serial_wide_end
            inc ebx                 // 3: modem control, line status, modem status, scratch
            mov dl, 0xff
            mov al, 0xa5
            out dx, al
            mov dl, 0xfc
            in eax, dx
            mov ecx, eax
            shr ecx, 24
            cmp cl, 0xa5
            jne serial_wide_end
            inc ebx                 // 4: the transmitter is always empty
            and ah, 0x60
            cmp ah, 0x60
            jne serial_wide_end
            inc ebx                 // 5: the last register and nothing
            mov dl, 0xff
            in eax, dx
            cmp eax, 0xffffffa5
            jne serial_wide_end
            inc ebx                 // 6: nothing and the first registers: modem control is not one of them
            mov edx, 0x3f6
            mov eax, 0x000affff     // a newline for the data register
            out dx, eax
            in ax, dx
            cmp ax, -1
            jne serial_wide_end
            inc ebx                 // 7: the scratch register has not changed
            mov edx, 0x3ff
            in al, dx
            cmp al, 0xa5
            jne serial_wide_end
            xor ebx, ebx
    serial_wide_end:
            mov al, bl
            out 0xf4, al
    "#
}

guest! {
    /// Nearly every port is read and written, first 4 bytes wide, then those below 0x1000 in single bytes. Left out are
    /// the registers that end the machine: keyboard controller, debug exit, power-off, and what lies just below them.
    ports_sweep, r#"
    .set ports_sweep_ranges_at, ports_sweep_ranges - guest_ports_sweep + 0x1000
    .set ports_sweep_text_at, ports_sweep_text - guest_ports_sweep + 0x1000
    .code32
            mov esi, offset ports_sweep_ranges_at
            mov ebx, 0x12345678     // the values written: not random, but without pattern
    ports_sweep_range:
            lodsd
            mov edx, eax            // the first port, 0 after the last range
            lodsd
            mov edi, eax            // one past the last
            test edi, edi
            jz ports_sweep_narrow
    ports_sweep_wide:
            in eax, dx
            imul ebx, ebx, 0x41c64e6d
            lea eax, [ebx + 0x3039]
            out dx, eax
            inc edx
            cmp edx, edi
            jne ports_sweep_wide
            jmp ports_sweep_range

    ports_sweep_narrow:
            mov esi, offset ports_sweep_ranges_at
    ports_sweep_narrow_range:
            lodsd
            mov edx, eax
            lodsd
            mov edi, eax
            cmp edx, 0x1000
            jae ports_sweep_end
    ports_sweep_narrow_next:
            in al, dx
            imul ebx, ebx, 0x41c64e6d
            mov eax, ebx
            shr eax, 16
            out dx, al
            inc edx
            cmp edx, edi
            jne ports_sweep_narrow_next
            jmp ports_sweep_narrow_range

    ports_sweep_end:
            mov edx, 0x3fb          // the serial port may be in any state
            mov al, 3
            out dx, al
            mov dl, 0xfc
            mov al, 8
            out dx, al
            mov dl, 0xf8
            mov esi, offset ports_sweep_text_at
            mov ecx, 6
            rep outsb
            cli
            hlt
    ports_sweep_ranges:
            .long 0, 0x5d, 0x65, 0xf1, 0xf8, 0x601, 0x606, 0x1000, 0x1000, 0x10000, 0, 0
    ports_sweep_text:
            .ascii "swept\n"
    "#
}

guest! {
    /// The device hole, with steps of a length that meets every alignment. Left out are the boot tables, which hold this
    /// guest's own page tables, and KVM's own pages near 4 GiB.
    mmio_sweep, r#"
    .code64
            mov edi, 0xc0000000
            mov ebp, 0xf7ff0000
            mov ebx, 0x1f3fff
            call mmio_sweep_range
            mov edi, 0xfe000000     // with the I/O APIC and the local APIC
            mov ebp, 0xfffb0000
            mov ebx, 0xfff7
            call mmio_sweep_range
            lea rsi, [rip + mmio_sweep_text]
            mov edx, 0x3f8
            mov ecx, 6
            rep outsb
            cli
            hlt
    mmio_sweep_range:
            mov al, byte ptr [rdi]
            mov byte ptr [rdi], al
            mov ax, word ptr [rdi]
            mov word ptr [rdi], ax
            mov eax, dword ptr [rdi]
            mov dword ptr [rdi], eax
            mov rax, qword ptr [rdi]
            mov qword ptr [rdi], rax
            add edi, ebx
            cmp edi, ebp
            jb mmio_sweep_range
            ret
    mmio_sweep_text:
            .ascii "swept\n"
    "#
}
