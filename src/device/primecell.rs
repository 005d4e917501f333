//! What Arm's PrimeCell peripherals have in common: 4 KiB of 32-bit registers, and at their end the numbers by which a
//! driver knows what it has found (ARM DDI 0183G §3.3.15, DDI 0224C §3.3.9: four bytes of PeriphID, four of PCellID).
//!
//! The APB has no byte strobes. A read always reads a whole register, with all that follows from it, and the CPU takes
//! the bytes it asked for. A write counts at the first byte of a register, whatever its width, and the bytes that were
//! not written are 0 (`strb` to a data register does what is meant); one that begins inside a register is dropped.
//! Invariant: no access concerns more than one register.

/// The bytes of registers and numbers.
#[cfg(test)]
pub const SIZE: u64 = 0x1000;

/// PCellID0 to 3, the same in all PrimeCells.
const CELL: [u8; 4] = [0x0d, 0xf0, 0x05, 0xb1];
/// Where PeriphID0 is; PCellID3 ends the device.
const IDS: u64 = 0xfe0;

/// The register that a read at `offset` reads.
pub fn read_from(offset: u64) -> u64 {
    offset & !3
}

/// The bytes of a register of `value` that a read at `offset` sees.
pub fn lanes(offset: u64, value: u32) -> u64 {
    u64::from(value) >> (8 * (offset & 3))
}

/// The register that a write at `offset` writes, if any.
pub fn written_to(offset: u64) -> Option<u64> {
    (offset & 3 == 0).then_some(offset)
}

/// The register at `offset` as far as it is one of those that name the device, which is `peripheral`; 0 elsewhere.
pub fn identity(peripheral: [u8; 4], offset: u64) -> u32 {
    let index = offset.checked_sub(IDS).and_then(|bytes| usize::try_from(bytes / 4).ok());
    index.and_then(|index| peripheral.iter().chain(&CELL).nth(index)).map_or(0, |byte| u32::from(*byte))
}

/// What the manuals call that register.
pub fn identity_name(offset: u64) -> &'static str {
    match read_from(offset) {
        0xfe0 => "PeriphID0",
        0xfe4 => "PeriphID1",
        0xfe8 => "PeriphID2",
        0xfec => "PeriphID3",
        0xff0 => "PCellID0",
        0xff4 => "PCellID1",
        0xff8 => "PCellID2",
        0xffc => "PCellID3",
        _ => "RESERVED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_lie_at_the_end_one_byte_a_register() {
        let seen: Vec<_> = (0..SIZE / 4).map(|register| identity([1, 2, 3, 4], register * 4)).collect();
        let (nothing, numbers) = seen.split_at(seen.len() - 8);
        assert!(nothing.iter().all(|value| *value == 0));
        assert_eq!(numbers, [1, 2, 3, 4, 0x0d, 0xf0, 0x05, 0xb1]);
        assert_eq!(identity([1, 2, 3, 4], SIZE), 0);
        assert_eq!(
            (identity_name(0xfe0), identity_name(0xfff), identity_name(SIZE)),
            ("PeriphID0", "PCellID3", "RESERVED")
        );
    }

    #[test]
    fn a_read_takes_its_bytes_out_of_a_whole_register() {
        let bytes: Vec<_> = (0..4).map(|offset| lanes(offset, 0x4433_2211) & 0xff).collect();
        assert_eq!(bytes, [0x11, 0x22, 0x33, 0x44]);
        assert_eq!(lanes(6, 0x4433_2211), 0x4433, "and none out of the next register");
        assert_eq!((read_from(4), read_from(7), read_from(u64::MAX)), (4, 4, u64::MAX - 3));
    }

    #[test]
    fn a_write_counts_only_at_the_first_byte() {
        assert_eq!([8, 9, 10, 11].map(written_to), [Some(8), None, None, None]);
    }
}
