//! Ways for a machine to end.

guest! {
    /// Ends with a status of its own: the word takes v, the status is 2v + 1.
    exit, r#"
            mov x1, 0x09080000      // the debug-exit word
            mov w0, 21
            str w0, [x1]
    exit_end:
            wfi
            b exit_end
    "#
}

guest! {
    /// Switches the machine off through PSCI (Arm DEN0022, 5.1).
    poweroff, r#"
            mov w0, 0x84000000
            add w0, w0, 8           // SYSTEM_OFF
            hvc 0
    poweroff_end:
            wfi
            b poweroff_end
    "#
}

guest! {
    /// Resets the machine.
    reset, r#"
            mov w0, 0x84000000
            add w0, w0, 9           // SYSTEM_RESET
            hvc 0
    reset_end:
            wfi
            b reset_end
    "#
}
