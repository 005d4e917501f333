//! The programs of `examples/` do what their first lines say.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;

/// A plain `cargo test`, and `cargo xtask test`, build the examples beside the program.
fn example(name: &str) -> common::Outcome {
    let path = common::program().parent().unwrap().join("examples").join(name);
    assert!(path.exists(), "{} is not there: cargo build --examples", path.display());
    common::Run::of(&path, []).run()
}

#[test]
fn the_library_runs_a_machine_by_hand() {
    if !common::kvm() {
        return;
    }
    example("01_twelve_bytes").expect(0).printed(common::arch::TWELVE);
    example("02_own_device").expect(0).printed("the guest ended with DebugExit(42)\n");
}
