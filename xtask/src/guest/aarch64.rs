//! The guests on arm64, at EL1 with the MMU off.
//!
//! WFI never exits, and a monitor finds out that a CPU waits for ever only after it has waited for a while. So each of
//! these guests ends with PSCI's SYSTEM_OFF, which KVM reports at once (Arm DEN0022, 5.1; api.rst, KVM_EXIT_SYSTEM_EVENT).

use super::Access;

/// Where every guest is loaded and entered.
pub const AT: u64 = 0x4000_0000;
/// An address that no device answers.
pub const NO_DEVICE: u64 = 0x10;
/// The data register of the serial port.
pub const SERIAL: u64 = 0x0900_0000;

/// What the guests with many exits do, and what the serial port is.
pub const EXIT: &str = "`strb`";
/// The serial port.
pub const UART: &str = "PL011";
/// What Bantam calls [`ADD`].
pub const ADD_NAME: &str = "add-off";
/// Words that make Bantam build the floor's machine for the other guests.
pub const WORDS: &[&str] = &["--memory", "4K", "--irqchip", "none"];
/// What a reader of the table must know of its machines.
pub const REMARK: &str = "All guests end with PSCI SYSTEM_OFF: WFI never exits. The floor has no GIC; Bantam makes one \
    for line 1, where the guest may want it, and none for the others.";

/// The serial port to x20, the sum to it as a digit, a newline, SYSTEM_OFF.
pub const ADD: [u8; 36] = bytes([
    0xd2a1_2014, // mov x20, 0x09000000
    0x0b01_0000, // add w0, w0, w1
    0x1100_c000, // add w0, w0, '0'
    0xb900_0280, // str w0, [x20]
    0x5280_0140, // mov w0, '\n'
    0xb900_0280, // str w0, [x20]
    SYSTEM_OFF[0],
    SYSTEM_OFF[1],
    SYSTEM_OFF[2],
]);

/// Writes one `.` to the serial port, then spins.
pub const SPIN: [u8; 16] = bytes([
    0xd2a1_2002, // mov x2, 0x09000000
    0x5280_05c0, // mov w0, '.'
    0x3900_0040, // strb w0, [x2]
    0x1400_0000, // L: b L
]);

/// mov w0, 0x84000000; add w0, w0, 8; hvc 0
const SYSTEM_OFF: [u32; 3] = [0x52b0_8000, 0x1100_2000, 0xd400_0002];

/// Writes `x` to an address below 4 GiB `count` times, then switches the machine off: three instructions an exit.
pub const fn outs(address: u64, count: u32) -> [u8; 44] {
    let ([a0, a1, a2, a3, ..], [c0, c1, c2, c3]) = (address.to_le_bytes(), count.to_le_bytes());
    bytes([
        0xd280_0002 | immediate(a0, a1), // movz x2, address
        0xf2a0_0002 | immediate(a2, a3), // movk x2, address >> 16, lsl 16
        0x5280_0001 | immediate(c0, c1), // movz w1, count
        0x72a0_0001 | immediate(c2, c3), // movk w1, count >> 16, lsl 16
        0x5280_0f00,                     // mov w0, 'x'
        0x3900_0040,                     // L: strb w0, [x2]
        0x7100_0421,                     // subs w1, w1, 1
        0x54ff_ffc1,                     // b.ne L
        SYSTEM_OFF[0],
        SYSTEM_OFF[1],
        SYSTEM_OFF[2],
    ])
}

/// The 16-bit immediate operand of a move, at its place.
const fn immediate(low: u8, high: u8) -> u32 {
    u32::from_le_bytes([low, high, 0, 0]) << 5
}

/// The instructions as bytes.
const fn bytes<const WORDS: usize, const BYTES: usize>(words: [u32; WORDS]) -> [u8; BYTES] {
    let (mut bytes, mut i) = ([0; BYTES], 0);
    while i < BYTES {
        bytes[i] = words[i / 4].to_le_bytes()[i % 4];
        i += 1;
    }
    bytes
}

/// What `dispatch` is asked to read …
pub const READS: [Access; 2] = [("read, PL011 FR", false, 0x0900_0018, 4), ("read, no device", false, 0x10, 4)];
/// … and to write.
pub const WRITES: [Access; 2] = [("write, PL011 DR", false, SERIAL, 1), ("write, no device", false, 0x10, 2)];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_with_many_exits_is_these_instructions() {
        let words: Vec<u32> =
            outs(SERIAL, 100_000).chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
        // As LLVM's assembler has them.
        let code = [0xd280_0002, 0xf2a1_2002, 0x5290_d401, 0x72a0_0021, 0x5280_0f00];
        assert_eq!(words[..5], code);
        assert_eq!(words[5..], [0x3900_0040, 0x7100_0421, 0x54ff_ffc1, 0x52b0_8000, 0x1100_2000, 0xd400_0002]);
        assert_eq!(ADD.len() + 8, outs(0, 0).len());
    }
}
