//! All three steps for every format that the architecture runs.

#[allow(dead_code)]
pub mod samples;

#[cfg(target_arch = "aarch64")]
mod arm64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[test]
fn the_names_of_an_elfs_code_are_read_with_bounds() {
    use super::{Image, elf, symbols};
    let symbol = |name: u32, info: u8, value: u64| {
        [&name.to_le_bytes()[..], &[info, 0, 1, 0], &value.to_le_bytes(), &8u64.to_le_bytes()].concat()
    };
    // A null symbol, a function, data, a name beyond the table.
    let table = [symbol(0, 0, 0), symbol(1, 2, 0x1000), symbol(1, 1, 0x2000), symbol(99, 2, 0x3000)].concat();
    let mut sample = samples::Elf::new(true);
    sample.sections = vec![(2, table), (3, b"\0main\0".to_vec())];
    let mut bytes = sample.build();
    let headers = usize::try_from(u64::from_le_bytes(bytes[0x28..0x30].try_into().unwrap())).unwrap();
    // sh_link of the symbol table: its names are in section 2.
    bytes[headers + 64 + 40] = 2;
    let names = |bytes: &[u8]| {
        let image = Image::from_bytes("x", bytes.to_vec());
        elf::sections(&image).ok().flatten().map(|table| symbols::names(&image, table)).unwrap_or_default()
    };
    assert_eq!(names(&bytes), [(0x1000, 8, "main".to_owned())]);
    for cut in 0..bytes.len() {
        let _ = names(&bytes[..cut]);
    }
    for at in headers..bytes.len() {
        let mut broken = bytes.clone();
        broken[at] ^= 0xff;
        let _ = names(&broken);
    }
    assert!(elf::sections(&Image::from_bytes("x", b"no ELF".to_vec())).is_err());
}
