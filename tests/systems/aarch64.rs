//! System D.

use crate::common::{bantam, file, kvm};

/// `mov x4,0x996`, then the bytes of `Hello\n`, stored one at a time to address 0x996.
const HELLO: [u32; 12] = [
    0xd281_32c4,
    0xd280_0905,
    0x3900_0085,
    0xd280_0ca5,
    0x3900_0085,
    0xd280_0d85,
    0x3900_0085,
    0x3900_0085,
    0xd280_0de5,
    0x3900_0085,
    0xd280_0145,
    0x3900_0085,
];

#[test]
fn system_d_says_hello_on_one_page_of_ram() {
    if !kvm() {
        return;
    }
    let guest = file(&HELLO.map(u32::to_le_bytes).concat());
    let run = || bantam("run").arg(guest.path()).words("--memory 4K --ram-base 0x10000 --debugcon mmio:0x996");
    run().words("--until").arg("\n").run().expect(0).printed("Hello\n").said_nothing();
    let outcome = run().words("--trace --until").arg("\n").run();
    let stored = |byte: &u8| format!("write 0x00000996 ← {byte:#04x} (1 bytes, debug-console.DATA)");
    assert_eq!(outcome.expect(0).trace(), b"Hello\n".iter().map(stored).collect::<Vec<_>>());
}

#[test]
fn system_d_is_an_example() {
    if !kvm() {
        return;
    }
    bantam("example hello").run().expect(0).printed("Hello\n").said_nothing();
}

/// On the machine that everyone has, it stores to nothing, then runs into zeroes, which are no instructions, and has no
/// handler for that either.
#[test]
fn system_d_elsewhere_is_lost() {
    if !kvm() {
        return;
    }
    let guest = file(&HELLO.map(u32::to_le_bytes).concat());
    let outcome = bantam("run").arg(guest.path()).words("--max-exits 6 --trace").run();
    assert_eq!(outcome.expect(124).trace().iter().filter(|l| l.contains("no device")).count(), 6);
    bantam("run").arg(guest.path()).words("--timeout 20").run().expect(126).printed("").said("the guest died");
}
