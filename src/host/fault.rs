//! Faults on purpose, for tests of the ways out (PROMISES row 36). Debug builds only.

use super::say::say;

/// Does what `BANTAM_TEST_FAULT=PLACE:WHAT` asks for, if this is the place.
#[allow(clippy::panic)]
pub fn inject(place: &str) {
    let Ok(word) = std::env::var("BANTAM_TEST_FAULT") else { return };
    match word.split_once(':') {
        Some((at, "panic")) if at == place => panic!("asked for by BANTAM_TEST_FAULT"),
        Some((at, "overflow")) if at == place => say(&format!("depth {}", deep(1))),
        _ => {}
    }
}

/// Recurses until the stack ends.
fn deep(level: u64) -> u64 {
    let frame = std::hint::black_box([level; 64]);
    if level == u64::MAX { 0 } else { deep(level + 1) + frame[0] }
}
