//! The guests of the bench, as bytes: what the floor runs and what Bantam is given are the same by construction.
//!
//! All are 16-bit real-mode code, loaded and entered at 0x1000.

// Three programs include this file, and each uses its part.
#![allow(dead_code)]

/// Where every guest is loaded and entered.
pub const AT: u64 = 0x1000;

/// Exits of [`outs`] in the bench.
pub const EXITS: u32 = 100_000;

/// A port that no device answers.
pub const NO_DEVICE: u16 = 0x10;

/// The data register of the first serial port.
pub const SERIAL: u16 = 0x3f8;

/// System B of the published minimal machines: writes `'0' + al + bl` and a newline to the serial port, then halts.
pub const ADD: [u8; 12] = [0xba, 0xf8, 0x03, 0x00, 0xd8, 0x04, 0x30, 0xee, 0xb0, 0x0a, 0xee, 0xf4];

/// Writes one `.` to the serial port, then spins with interrupts off.
pub const SPIN: [u8; 8] = [0xba, 0xf8, 0x03, 0xb0, b'.', 0xee, 0xeb, 0xfe];

/// Writes `x` to a port `count` times, then halts: two instructions an exit.
pub const fn outs(port: u16, count: u32) -> [u8; 16] {
    let ([p0, p1], [c0, c1, c2, c3]) = (port.to_le_bytes(), count.to_le_bytes());
    [
        0xba, p0, p1, // mov dx, port
        0x66, 0xb9, c0, c1, c2, c3, // mov ecx, count
        0xb0, b'x', // mov al, 'x'
        0xee, // L: out dx, al
        0x67, 0xe2, 0xfc, // loopd L
        0xf4, // hlt
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    // Once the package `guests` has the same programs, compare with its bytes here.
    #[test]
    fn the_guest_with_many_exits_is_these_bytes() {
        let code = [0xba, 0xf8, 0x03, 0x66, 0xb9, 0xa0, 0x86, 0x01, 0x00, 0xb0, 0x78, 0xee, 0x67, 0xe2, 0xfc, 0xf4];
        assert_eq!(outs(SERIAL, EXITS), code);
    }
}
