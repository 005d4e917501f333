//! The device tree (Devicetree Specification 0.4, chapter 5): big-endian words, of which a 1 begins a node and is followed
//! by its name, a 3 is a property, a 2 ends a node, and a 9 ends it all.

guest! {
    /// Prints what the tree at x0 says. An address or a size in it has two words, as the root of Bantam's says.
    fdt,
    r#"
            mov x20, 0x09000000
            mov x19, x0
            cbz x0, fdt_none
            ldr w1, [x19]
            rev w1, w1
            mov w2, 0xfeed
            movk w2, 0xd00d, lsl 16
            cmp w1, w2
            b.ne fdt_wrong
    "#,
    say!("fdt_magic_text"),
    r#"
            ldr w21, [x19, 8]       // where the words begin,
            rev w21, w21
            add x21, x19, x21
            ldr w22, [x19, 12]      // and where the names of properties do
            rev w22, w22
            add x22, x19, x22
            mov w23, 1              // the kind of node: 1 root, 2 memory, 3 chosen, 0 another
            mov w24, -1             // how many CPUs; the first node is the root
    fdt_next:
            ldr w0, [x21], 4
            rev w0, w0
            cmp w0, 1
            b.eq fdt_node
            cmp w0, 3
            b.eq fdt_property
            cmp w0, 9
            b.ne fdt_next
    "#,
    say!("fdt_cpus_text"),
    r#"
            mov w2, 10
            udiv w3, w24, w2
            msub w4, w3, w2, w24
            cbz w3, fdt_ones
            add w3, w3, '0'
            str w3, [x20]
    fdt_ones:
            add w4, w4, '0'
            str w4, [x20]
            mov w0, '\n'
            str w0, [x20]
    fdt_end:
            wfi
            b fdt_end
    fdt_none:
    "#,
    say!("fdt_none_text"),
    r#"
            b fdt_end
    fdt_wrong:
    "#,
    say!("fdt_wrong_text"),
    r#"
            b fdt_end

    fdt_node:
            mov x25, x21            // its name
    fdt_name:
            ldrb w0, [x21], 1
            cbnz w0, fdt_name
            tbnz w24, 31, fdt_root
            mov w23, 2
            adr x1, fdt_memory
            bl fdt_begins
            b.eq fdt_align
            mov w23, 3
            adr x1, fdt_chosen
            bl fdt_begins
            b.eq fdt_align
            mov w23, 0
            adr x1, fdt_cpu
            bl fdt_begins
            cinc w24, w24, eq
            b fdt_align
    fdt_root:
            mov w24, 0
    fdt_align:                      // to the next word
            add x21, x21, 3
            and x21, x21, -4
            b fdt_next

    fdt_property:
            ldr w26, [x21], 4       // the size of its value,
            rev w26, w26
            ldr w25, [x21], 4       // its name,
            rev w25, w25
            add x25, x22, x25
            mov x27, x21            // and the value
            add x21, x21, x26
            cmp w23, 2
            b.eq fdt_try_reg
            b.hi fdt_try_bootargs
            cbz w23, fdt_align
            adr x1, fdt_compatible
            bl fdt_begins
            b.ne fdt_align
    "#,
    say!("fdt_machine_text"),
    r#"
    fdt_value:                      // a string
            mov x0, x27
    "#,
    say!(),
    r#"
            mov w0, '\n'
            str w0, [x20]
            b fdt_align
    fdt_try_bootargs:
            adr x1, fdt_bootargs
            bl fdt_begins
            b.ne fdt_align
    "#,
    say!("fdt_line_text"),
    r#"
            b fdt_value
    fdt_try_reg:
            adr x1, fdt_reg
            bl fdt_begins
            b.ne fdt_align
    fdt_range:
            subs w26, w26, 16
            b.mi fdt_align
    "#,
    say!("fdt_memory_text"),
    "bl fdt_number",
    say!("fdt_plus_text"),
    r#"
            bl fdt_number
            mov w0, '\n'
            str w0, [x20]
            b fdt_range

    fdt_begins:                     // eq: the string at x25 begins with the one at x1
            mov x9, x25
    fdt_letter:
            ldrb w2, [x1], 1
            cmp w2, 0
            b.eq fdt_begun
            ldrb w3, [x9], 1
            cmp w2, w3
            b.eq fdt_letter
    fdt_begun:
            ret

    fdt_number:                     // the two words at x27
            ldr w0, [x27], 4
            rev w0, w0
            ldr w1, [x27], 4
            rev w1, w1
            orr x0, x1, x0, lsl 32
    "#,
    say_number!(),
    r#"
            ret

    fdt_memory:
            .asciz "memory"
    fdt_chosen:
            .asciz "chosen"
    fdt_cpu:
            .asciz "cpu@"
    fdt_compatible:
            .asciz "compatible"
    fdt_bootargs:
            .asciz "bootargs"
    fdt_reg:
            .asciz "reg"
    fdt_magic_text:
            .asciz "magic right\n"
    fdt_wrong_text:
            .asciz "magic wrong\n"
    fdt_none_text:
            .asciz "no device tree\n"
    fdt_machine_text:
            .asciz "machine: "
    fdt_line_text:
            .asciz "command line: "
    fdt_memory_text:
            .asciz "memory: 0x"
    fdt_plus_text:
            .asciz " + 0x"
    fdt_cpus_text:
            .asciz "CPUs: "
    "#
}
