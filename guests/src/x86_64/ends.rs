//! Ways for a machine to end.

guest! {
    /// Ends with a status of its own: the port takes v, the status is 2v + 1.
    exit, r#"
    .code16
            mov al, 21
            out 0xf4, al            // the debug-exit register
            hlt
    "#
}

guest! {
    /// Switches the machine off, as a kernel does after reading the ACPI tables.
    poweroff, r#"
    .code16
            mov dx, 0x604           // PM1a control
            mov ax, 0x2000          // SLP_EN, with sleep type 0
            out dx, ax
            hlt
    "#
}

guest! {
    /// Resets the machine through the keyboard controller, as PCs have done since 1984.
    reset, r#"
    .code16
            mov al, 0xfe            // pulse output line 0, which is the CPU's reset
            out 0x64, al
            hlt
    "#
}
