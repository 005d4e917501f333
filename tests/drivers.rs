//! The virtio devices, driven natively by drivers that are not Bantam's: the guest in guests/virtio, on both transports.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use common::Outcome;

const HOW: [&str; 4] =
    ["--transport pci", "--transport mmio", "--transport pci --doorbell exit", "--transport mmio --doorbell exit"];

/// Runs the guest with these devices on each transport, and with doorbells that make exits.
fn drive(words: &str, expect: impl Fn(&Outcome)) {
    drive_with(words, b"", expect);
}

/// The same, with this on stdin.
fn drive_with(words: &str, input: &[u8], expect: impl Fn(&Outcome)) {
    if !common::kvm() {
        return;
    }
    let Some(guest) = std::env::var_os("BANTAM_VIRTIO_GUEST") else {
        return common::skipped("the guest is built by `cargo xtask test`");
    };
    for how in HOW {
        let outcome = common::bantam(&format!("run --timeout 20 {how} {words}")).arg(&guest).input(input).run();
        // The debug exit's 0.
        expect(outcome.expect(1));
    }
}

#[test]
fn random_numbers_come_over_every_transport() {
    drive("--rng on", |outcome| {
        outcome.printed("rng: ok\ndevices: 1\n");
    });
}

#[test]
fn a_disk_is_read_written_flushed_and_ends_at_its_end() {
    let image = common::file(&[b'B'; 64 * 512]);
    for how in ["", ",ro", ",queues=4"] {
        drive(&format!("--disk {}{how},serial=d-1", image.path().display()), |outcome| {
            outcome.printed("block: ok, 64 sectors, id d-1, begins with 'B'\ndevices: 1\n");
        });
    }
    let written = std::fs::read(image.path()).unwrap();
    assert_eq!((written[3 * 512 + 1], written[4 * 512]), (1, 1));
}

/// Serves, in a thread that ends with the test, whoever connects to `path`.
fn serve(path: &Path, talk: impl Fn(UnixStream) -> std::io::Result<()> + Send + 'static) {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            // A guest that is gone hangs up; what it missed it says.
            let _ = stream.and_then(&talk);
        }
    });
}

#[test]
fn frames_go_out_and_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wire");
    serve(&path, |mut stream| std::io::copy(&mut stream.try_clone()?, &mut stream).map(|_| ()));
    drive(&format!("--net socket:{}", path.display()), |outcome| {
        outcome.printed("net: ok\ndevices: 1\n");
    });
}

#[test]
fn the_host_answers_a_guest_that_connects_over_vsock() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("v");
    serve(&folder.path().join("v_1234"), |mut stream| {
        let mut ping = [0; 4];
        stream.read_exact(&mut ping)?;
        stream.write_all(if ping == *b"ping" { b"pong" } else { b"what" })?;
        stream.read(&mut ping).map(|_| ())
    });
    drive(&format!("--vsock cid=3,path={}", path.display()), |outcome| {
        outcome.printed("vsock: ok\ndevices: 1\n");
    });
    assert!(!path.exists(), "the socket is still there");
}

#[test]
fn a_console_takes_a_line_and_is_given_one() {
    let told = common::file(b"");
    drive_with(&format!("--console stdio --serial file:{}", told.path().display()), b"it is me\n", |outcome| {
        outcome.printed("who is there?\nit is me\n");
        assert_eq!(std::fs::read_to_string(told.path()).unwrap(), "console: ok\ndevices: 1\n");
    });
}

#[test]
fn all_devices_of_one_machine_work() {
    let folder = tempfile::tempdir().unwrap();
    let wire = folder.path().join("wire");
    serve(&wire, |mut stream| std::io::copy(&mut stream.try_clone()?, &mut stream).map(|_| ()));
    let image = common::file(&[b'A'; 64 * 512]);
    let words = format!(
        "--rng on --disk {},ro,serial=a --disk {},ro,serial=b --net socket:{} --cpus 2",
        image.path().display(),
        image.path().display(),
        wire.display()
    );
    let block = |id| format!("block: ok, 64 sectors, id {id}, begins with 'A'\n");
    drive(&words, |outcome| {
        outcome.printed(&format!("{}{}net: ok\nrng: ok\ndevices: 4\n", block("a"), block("b")));
    });
}
