//! Guests that tests and benchmarks run. Those that check something themselves write 0 to the debug-exit word (status 1)
//! if all is well, and n (status 2n + 1) if their check number n is the first to fail.

/// The end of a guest that checks: w19 is its number.
macro_rules! tell {
    () => {
        r#"
            mov x9, 0x09080000
            str w19, [x9]
    7:      wfi
            b 7b
        "#
    };
}

pub(super) mod bench;
pub(super) mod machine;
pub(super) mod malice;
