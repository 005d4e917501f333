//! The guests on x86-64: 16-bit real-mode code that ends with HLT, which exits.

use super::Access;

/// Where every guest is loaded and entered.
pub const AT: u64 = 0x1000;
/// A port that no device answers.
pub const NO_DEVICE: u64 = 0x10;
/// The data register of the first serial port.
pub const SERIAL: u64 = 0x3f8;

/// What the guests with many exits do, and what the serial port is.
pub const EXIT: &str = "`out`";
/// The serial port.
pub const UART: &str = "16550";
/// What Bantam calls [`ADD`].
pub const ADD_NAME: &str = "add";
/// Words that make Bantam build the floor's machine for the other guests.
pub const WORDS: &[&str] = &["--memory", "4K", "--ram-base", "0x1000"];
/// What a reader of the table must know of its machines.
pub const REMARK: &str = "";

/// System B of the published minimal machines: writes `'0' + al + bl` and a newline to the serial port, then halts.
pub const ADD: [u8; 12] = [0xba, 0xf8, 0x03, 0x00, 0xd8, 0x04, 0x30, 0xee, 0xb0, 0x0a, 0xee, 0xf4];

/// Writes one `.` to the serial port, then spins with interrupts off.
pub const SPIN: [u8; 8] = [0xba, 0xf8, 0x03, 0xb0, b'.', 0xee, 0xeb, 0xfe];

/// Writes `x` to a port `count` times, then halts: two instructions an exit.
pub const fn outs(port: u64, count: u32) -> [u8; 16] {
    let ([p0, p1, ..], [c0, c1, c2, c3]) = (port.to_le_bytes(), count.to_le_bytes());
    [
        0xba, p0, p1, // mov dx, port
        0x66, 0xb9, c0, c1, c2, c3, // mov ecx, count
        0xb0, b'x', // mov al, 'x'
        0xee, // L: out dx, al
        0x67, 0xe2, 0xfc, // loopd L
        0xf4, // hlt
    ]
}

/// What `dispatch` is asked to read …
pub const READS: [Access; 3] =
    [("in, 16550 LSR", true, 0x3fd, 1), ("in, no device", true, 0x10, 1), ("read, no device", false, 0xd000_0000, 4)];
/// … and to write.
pub const WRITES: [Access; 2] = [("out, 16550 THR", true, 0x3f8, 1), ("out, no device", true, 0x10, 2)];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_with_many_exits_is_these_bytes() {
        let code = [0xba, 0xf8, 0x03, 0x66, 0xb9, 0xa0, 0x86, 0x01, 0x00, 0xb0, 0x78, 0xee, 0x67, 0xe2, 0xfc, 0xf4];
        assert_eq!(outs(SERIAL, 100_000), code);
    }
}
