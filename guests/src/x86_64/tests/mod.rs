//! Guests that tests and benchmarks run. Those that check something themselves write 0 to the debug-exit port (status 1)
//! if all is well, and n (status 2n + 1) if their check number n is the first to fail.

pub(super) mod bench;
pub(super) mod machine;
pub(super) mod malice;
