//! The serial port carries large volumes, both ways and over each of its wires, and loses no byte.
//!
//! A flat guest of the PC moves them by string I/O. 1,024 bytes come in by one exit, but each byte that goes out is one: a
//! soak (BANTAM_SOAK_SEED, _COUNT) prints all of 10 MiB, otherwise a part of it is printed.

#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{bantam, file, kvm};

/// What is pasted in, always; what is printed, in a soak and else.
const IN: usize = 1 << 20;
const OUT: usize = 10 << 20;
const LESS_OUT: usize = 96 << 10;
/// The wires.
const WIRES: [&str; 3] = ["stdio", "unix", "file"];
/// Where the guest puts what comes in.
const PLACE: u64 = 0x20_0000;

/// Case `n`, in a soak with all that is printed.
fn cases() -> (Vec<u64>, usize) {
    match common::soak() {
        Some((seed, count)) => ((0..count).map(|i| seed.wrapping_add(i)).collect(), OUT),
        None => (vec![0, 1, 2], LESS_OUT),
    }
}

fn wire(case: u64) -> &'static str {
    WIRES[usize::try_from(case % 3).unwrap()]
}

/// Bytes that repeat nowhere for long; none is 0 (Knuth's generator, MMIX).
fn bytes(seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33).to_le_bytes()[0].max(1)
    };
    (0..count).map(|_| next()).collect()
}

fn connect(path: &Path) -> UnixStream {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        match UnixStream::connect(path) {
            Ok(client) => break client,
            Err(e) => assert!(Instant::now() < until, "{}: {e}", path.display()),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Of two that differ says where, which says more than two megabytes.
#[track_caller]
fn assert_same(got: &[u8], sent: &[u8], what: &str) {
    let differ = got.iter().zip(sent).position(|(a, b)| a != b);
    assert!(got == sent, "{what}: {} bytes of {}, the first that differs: {differ:?}", got.len(), sent.len());
}

/// Protected mode: where input can come, waits for a byte (there is a client then); prints what comes after the code.
fn printer(wait: bool, text: &[u8]) -> Vec<u8> {
    // mov edx,0x3fd; L: in al,dx; test al,1; jz L; mov dl,0xf8; in al,dx
    let waiting: &[u8] = &[0xba, 0xfd, 3, 0, 0, 0xec, 0xa8, 1, 0x74, 0xfb, 0xb2, 0xf8, 0xec];
    let mut code = if wait { waiting.to_vec() } else { Vec::new() };
    let start = 0x1000 + u32::try_from(code.len()).unwrap() + 19;
    // mov esi,start; mov ecx,count; mov edx,0x3f8; cld; rep outsb; hlt
    code.push(0xbe);
    code.extend(start.to_le_bytes());
    code.push(0xb9);
    code.extend(u32::try_from(text.len()).unwrap().to_le_bytes());
    code.extend([0xba, 0xf8, 3, 0, 0, 0xfc, 0xf3, 0x6e, 0xf4]);
    code.extend(text);
    code
}

#[test]
fn megabytes_printed_lose_no_byte() {
    if !kvm() {
        return;
    }
    let (cases, size) = cases();
    for case in cases {
        let (wire, text) = (wire(case), bytes(case, size));
        let (guest, dir) = (file(&printer(wire != "file", &text)), tempfile::tempdir().unwrap());
        let path = dir.path().join("serial");
        let to = if wire == "stdio" { wire.to_owned() } else { format!("{wire}:{}", path.display()) };
        let run = bantam("run").arg(guest.path()).words("--cpu-mode protected --memory 16M --serial").arg(to);
        let got = match wire {
            "stdio" => run.input(b"!").patient().run().expect(0).stdout.clone(),
            "unix" => {
                let started = run.patient().start();
                let (mut client, mut got) = (connect(&path), Vec::new());
                client.write_all(b"!").unwrap();
                client.read_to_end(&mut got).unwrap();
                started.wait().expect(0).printed("");
                got
            }
            _ => {
                run.patient().run().expect(0).printed("");
                std::fs::read(path).unwrap()
            }
        };
        assert_same(&got, &text, wire);
    }
}

/// Long mode: takes what has come, 1,024 bytes at once, from [`PLACE`] on; what is not there yet of them is zeroes. Once the
/// far end has hung up it dies, so that its RAM can be looked at. `mov edi,PLACE; L: mov edx,0x3fd; in al,dx; test al,1;
/// jnz take; mov dl,0xfe; in al,dx; test al,0x80; jnz L; ud2; nop; take: mov ecx,1024; mov dl,0xf8; rep insb; jmp L`
const READER: &[u8] = &[
    0xbf, 0, 0, 0x20, 0, 0xba, 0xfd, 3, 0, 0, 0xec, 0xa8, 1, 0x75, 0x0a, 0xb2, 0xfe, 0xec, 0xa8, 0x80, 0x75, 0xef,
    0x0f, 0x0b, 0x90, 0xb9, 0, 4, 0, 0, 0xb2, 0xf8, 0xf3, 0x6c, 0xeb, 0xe1,
];

/// What a core file has of RAM from [`PLACE`] on, without zeroes: the program headers say where (ELF64).
fn taken(core: &[u8]) -> Vec<u8> {
    let number =
        |at: usize, size: usize| core[at..at + size].iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte));
    let headers = (0..number(56, 2)).map(|n| usize::try_from(number(32, 8) + n * 56).unwrap());
    let piece = |at: usize| {
        let (offset, start, size) = (number(at + 8, 8), number(at + 24, 8), number(at + 32, 8));
        let skip = PLACE.checked_sub(start).filter(|skip| *skip < size && number(at, 4) == 1)?;
        let range = usize::try_from(offset + skip).unwrap()..usize::try_from(offset + size).unwrap();
        Some(core[range].iter().copied().filter(|byte| *byte != 0).collect())
    };
    headers.into_iter().find_map(piece).expect("RAM in the core file")
}

#[test]
fn a_megabyte_pasted_in_loses_no_byte() {
    if !kvm() {
        return;
    }
    for case in cases().0.into_iter().filter(|case| wire(*case) != "file") {
        let (wire, text) = (wire(case), bytes(!case, IN));
        let (guest, dir) = (file(READER), tempfile::tempdir().unwrap());
        let (path, core) = (dir.path().join("serial"), dir.path().join("core"));
        let run = bantam("run").arg(guest.path()).words("--cpu-mode long --memory 64M --core").arg(&core);
        if wire == "stdio" {
            run.input(&text).run().expect(126);
        } else {
            let started = run.arg(format!("--serial={wire}:{}", path.display())).start();
            connect(&path).write_all(&text).unwrap();
            started.wait().expect(126);
        }
        assert_same(&taken(&std::fs::read(core).unwrap()), &text, wire);
    }
}
