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
    let told = example("03_clones").expect(0).out();
    let digits: Vec<_> =
        told.lines().filter_map(|line| line.split_once(' ')).map(|(_, digits)| digits.trim()).collect();
    assert!(digits.len() == 4 && digits[0].starts_with("12345670"), "{told}");
    // Each goes on where the first one was, which no other has moved.
    assert!(digits[1].len() > 5 && digits[1] == digits[2] && digits[2] == digits[3], "{told}");
    let (last, next) = (digits[0].as_bytes().last().unwrap(), digits[1].as_bytes()[0]);
    assert_eq!((last - b'0' + 1) % 8, next - b'0', "{told}");
}
