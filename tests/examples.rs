//! The programs of `examples/` do what their first lines say.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;

/// `cargo test` builds the examples beside the test binaries.
fn example(name: &str) -> common::Outcome {
    let folder = common::program().parent().unwrap().join("examples");
    common::Run::of(&folder.join(name), []).run()
}

#[test]
fn the_library_runs_a_machine_by_hand() {
    if !common::kvm() {
        return;
    }
    example("01_twelve_bytes").expect(0).printed("4\n");
    example("02_own_device").expect(0).printed("the guest ended with DebugExit(42)\n");
}
