//! Networks and sockets of a Linux guest: its own drivers, over a tap interface, over a socket to another guest, over vsock.
//!
//! The kernels are those of `tests/linux.rs`, and so is the init; what is done in the guest is typed at its shell.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

#[path = "linux/guest.rs"]
mod guest;
#[path = "linux/shell.rs"]
mod shell;

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use shell::{KERNEL, Shell};

const NET: &str = "failover net_failover virtio_net";
const VSOCK: &str = "vsock vmw_vsock_virtio_transport_common vmw_vsock_virtio_transport";
/// Bytes of a stream. A soak sends as many of them as it asks for: 256 are 1 GiB.
const SIZE: usize = 4 << 20;

/// A guest with a shell on its console.
fn shell(words: &str, modules: &str) -> Option<Shell> {
    Shell::start(&format!("--memory 256M {words}"), modules)
}

fn sh(command: &str) -> bool {
    Command::new("sh").args(["-c", command]).status().unwrap().success()
}

/// What comes in time.
fn soon<T>(mut get: impl FnMut() -> std::io::Result<T>) -> T {
    let start = Instant::now();
    loop {
        match get() {
            Err(e) if e.kind() == ErrorKind::WouldBlock && start.elapsed() < common::within(30.0) => {
                std::thread::sleep(Duration::from_millis(20));
            }
            result => return result.unwrap(),
        }
    }
}

/// Who connects next to a port of the host.
fn accept_tcp(server: &TcpListener) -> TcpStream {
    server.set_nonblocking(true).unwrap();
    let (stream, _) = soon(|| server.accept());
    stream.set_read_timeout(Some(common::within(30.0))).unwrap();
    stream.set_write_timeout(Some(common::within(30.0))).unwrap();
    stream
}

/// The same of a socket.
fn accept_unix(server: &UnixListener) -> UnixStream {
    server.set_nonblocking(true).unwrap();
    patient(soon(|| server.accept()).0)
}

/// What stands still is said to, some time.
fn patient(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(common::within(30.0))).unwrap();
    stream.set_write_timeout(Some(common::within(30.0))).unwrap();
    stream
}

/// Bytes of which none is where it is by chance.
fn noise(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed;
    let next = |state: &mut u64| {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*state >> 56) as u8
    };
    (0..size).map(|_| next(&mut state)).collect()
}

/// Sends `bytes` while reading as many; gives what was read.
fn echo<S: Read + Write + Send>(mut reader: S, mut writer: S, bytes: &[u8]) -> Vec<u8> {
    std::thread::scope(|scope| {
        scope.spawn(move || writer.write_all(bytes).unwrap());
        let mut got = vec![0; bytes.len()];
        reader.read_exact(&mut got).unwrap();
        got
    })
}

/// An interface of the host's; false where none can be made.
fn tap(name: &str, address: &str) -> bool {
    sh("modprobe tun 2>/dev/null");
    sh(&format!("tunctl -t {name} >/dev/null && ifconfig {name} {address} netmask 255.255.255.0 up"))
}

#[test]
fn a_guest_and_its_host_send_each_other_a_stream_over_tap_and_p39_the_interface_may_vanish() {
    if guest::kernel(KERNEL).is_none() || !common::root() {
        return;
    }
    if !tap("bt9", "10.9.0.1") {
        return common::skipped("no tap interface can be made here");
    }
    let server = TcpListener::bind("10.9.0.1:5000").unwrap();
    let Some(mut guest) = shell("--net tap:bt9,mac=52:54:00:00:00:09", NET) else { return };
    guest.run("grep 52:54:00:00:00:09 /sys/class/net/eth0/address");
    guest.run("ip addr add 10.9.0.2/24 dev eth0 && ip link set eth0 up && ping -c 1 10.9.0.1");
    // Down, and up again: what is sent comes back, in whole segments.
    let (first, count) = common::soak().unwrap_or((1, 1));
    for seed in first..first + count {
        guest.begin("nc 10.9.0.1 5000 >/tmp/in; nc 10.9.0.1 5000 </tmp/in; echo sent \\back");
        let bytes = noise(seed, SIZE);
        accept_tcp(&server).write_all(&bytes).unwrap();
        let mut back = Vec::new();
        accept_tcp(&server).read_to_end(&mut back).unwrap();
        assert!(back == bytes, "{} bytes came back of {SIZE}", back.len());
        guest.until("sent back");
    }
    // The driver may come and go.
    guest.rebind("virtio_net", 3);
    guest.run("ip addr add 10.9.0.2/24 dev eth0 && ip link set eth0 up && ping -c 1 10.9.0.1");
    // Switched off at the host, and on again; then taken away.
    assert!(sh("ifconfig bt9 down"));
    guest.run("ping -c 1 -W 1 10.9.0.1; sleep 1; grep 0 /sys/class/net/eth0/carrier");
    assert!(sh("ifconfig bt9 up"));
    guest.run("sleep 1; grep 1 /sys/class/net/eth0/carrier && ping -c 1 10.9.0.1");
    assert!(sh("ip link del bt9 2>/dev/null || tunctl -d bt9"));
    guest.run("ping -c 1 -W 1 10.9.0.1; sleep 1; grep 0 /sys/class/net/eth0/carrier");
    guest.leave("exit\n");
}

/// A network of its own for this thread, and for what it starts.
fn own_network() {
    use rustix::thread::{UnshareFlags, unshare_unsafe};
    // SAFETY: the thread loses no memory and no descriptor; it sees another network.
    #[allow(unsafe_code)]
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
}

#[test]
fn two_guests_on_a_bridge_send_each_other_a_stream() {
    if guest::kernel(KERNEL).is_none() || !common::root() {
        return;
    }
    own_network();
    sh("modprobe -a tun bridge 2>/dev/null");
    let join = |name| format!("tunctl -t {name} >/dev/null && brctl addif br4 {name} && ifconfig {name} up");
    if !sh(&format!("brctl addbr br4 && ifconfig br4 up && {} && {}", join("bt4"), join("bt5"))) {
        return common::skipped("no bridge can be made here");
    }
    let Some(mut left) = shell("--net tap:bt4,mac=52:54:00:00:00:04", NET) else { return };
    let Some(mut right) = shell("--net tap:bt5,mac=52:54:00:00:00:05", NET) else { return };
    left.run("ip addr add 10.4.0.4/24 dev eth0 && ip link set eth0 up");
    right.run("ip addr add 10.4.0.5/24 dev eth0 && ip link set eth0 up && ping -c 1 10.4.0.4");
    let (first, count) = common::soak().unwrap_or((1, 1));
    for seed in first..first + count {
        let (from, to, at) = if seed % 2 == 0 { (&mut left, &mut right, 5) } else { (&mut right, &mut left, 4) };
        from.run(&format!("dd if=/dev/urandom of=/tmp/out bs=64k count={} 2>/dev/null", SIZE >> 16));
        let sum = from.ask("md5sum </tmp/out");
        to.begin("nc -l -p 4000 >/tmp/in; echo all \\come");
        // It may not listen yet.
        from.run(&format!("until nc 10.4.0.{at} 4000 </tmp/out; do sleep 1; done"));
        to.until("all come");
        to.is("md5sum </tmp/in", &sum);
    }
    left.leave("exit\n");
    right.leave("exit\n");
}

/// What `cargo xtask bench io --host` shows: the same iperf3 and the same server, from the guest and from beside it.
#[test]
fn a_card_beside_the_hosts_own_speed() {
    if guest::kernel(KERNEL).is_none() || !common::root() {
        return;
    }
    let Some(tools) = guest::tools() else { return };
    if !tap("bt6", "10.6.0.1") {
        return common::skipped("no tap interface can be made here");
    }
    let modules = format!("{NET} virtio_blk");
    let Some(mut shell) = Shell::start(&format!("--memory 512M --net tap:bt6 {tools}"), &modules) else { return };
    shell.run(guest::TOOLS);
    shell.run("ip addr add 10.6.0.2/24 dev eth0 && ip link set eth0 up && ping -c 1 10.6.0.1");
    // Bits a second is in what the server has taken, or the client.
    let rate = "sed -n '/\"sum_received\"/,/}/s/.*\"bits_per_second\"[^0-9]*\\([0-9.e+]*\\).*/\\1/p' /tmp/told | awk '{ print $1 / 8 }'";
    for (what, words) in [("sent", ""), ("received", "-R")] {
        // The server may not be there yet.
        let client = format!("/tools/run iperf3 -c 10.6.0.1 -n 32M -J {words} >/tmp/told");
        let command = format!("for n in 1 2 3 4 5 6 7 8 9; do {client} && break; sleep 1; done; {rate}");
        let mut server = Command::new("/tools/run");
        server.args(["iperf3", "-s", "-B", "10.6.0.1"]).stdout(Stdio::null()).stderr(Stdio::null());
        let mut server = server.spawn().unwrap();
        let own = Command::new("busybox").args(["sh", "-c", &command]).output().unwrap();
        let guests = shell.ask(&command);
        server.kill().unwrap();
        server.wait().unwrap();
        guest::beside(&format!("card on tap, iperf3: {what}"), &String::from_utf8_lossy(&own.stdout), &guests);
    }
    shell.leave("exit\n");
    assert!(sh("ip link del bt6 2>/dev/null || tunctl -d bt6"));
}

/// The host's way out, by which passt knows what network to be.
fn gateway() -> Option<String> {
    let output = Command::new("ip").args(["-4", "route"]).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.lines().find_map(|line| Some(line.strip_prefix("default via ")?.split_whitespace().next()?.to_owned()))
}

#[test]
fn a_guest_reaches_a_server_of_its_host_over_a_user_network() {
    if guest::kernel(KERNEL).is_none() || !common::have("passt") {
        return;
    }
    if gateway().is_none() && common::host_is_emulated() && tap("bt7", "10.7.0.5") {
        sh("ip route add default via 10.7.0.1 dev bt7");
    }
    let Some(gateway) = gateway() else { return common::skipped("this host has no way out, which passt wants to see") };
    let server = TcpListener::bind("127.0.0.1:5001").unwrap();
    let Some(mut guest) = shell("--net user", NET) else { return };
    let script = "[ \"$ip\" ] && ip addr add $ip/$mask dev $interface && ip route add default via $router";
    guest.run(&format!("echo '#!/bin/busybox sh' >/tmp/got; echo '{script}' >>/tmp/got; chmod +x /tmp/got"));
    guest.run("ip link set eth0 up && udhcpc -n -q -i eth0 -s /tmp/got");
    // Where the guest's way out is, the host is.
    guest.begin(&format!("nc {gateway} 5001 >/tmp/in; nc {gateway} 5001 </tmp/in; echo sent \\back"));
    let bytes = noise(2, SIZE);
    accept_tcp(&server).write_all(&bytes).unwrap();
    let mut back = Vec::new();
    accept_tcp(&server).read_to_end(&mut back).unwrap();
    assert!(back == bytes, "{} bytes came back of {SIZE}", back.len());
    guest.until("sent back");
    guest.leave("exit\n");
}

#[test]
fn two_guests_send_each_other_a_stream_over_a_socket() {
    if guest::kernel(KERNEL).is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wire");
    let Some(mut left) = shell(&format!("--net socket:{},listen", path.display()), NET) else { return };
    let Some(mut right) = shell(&format!("--net socket:{}", path.display()), NET) else { return };
    left.run("ip addr add 10.8.0.1/24 dev eth0 && ip link set eth0 up; seq 1 200000 >/tmp/all");
    right.run("ip addr add 10.8.0.2/24 dev eth0 && ip link set eth0 up; seq 1 200000 >/tmp/all");
    right.run("ping -c 1 10.8.0.1");
    left.begin("nc -l -p 5000 >/tmp/in; cmp /tmp/in /tmp/all && echo all \\came");
    right.run("sleep 1; nc 10.8.0.1 5000 </tmp/all");
    left.until("all came");
    right.leave("exit\n");
    left.run("sleep 1; grep 0 /sys/class/net/eth0/carrier");
    left.leave("exit\n");
    assert!(!path.exists(), "the socket is still there");
}

/// An archive with perl and all that it needs; how it is called there.
fn perl(folder: &Path) -> (PathBuf, String) {
    // The dynamic linker says which files it takes, by names that may be links to others.
    let output = Command::new("perl").env("LD_TRACE_LOADED_OBJECTS", "1").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut files: BTreeSet<PathBuf> = text.split_whitespace().filter(|w| w.starts_with('/')).map(Into::into).collect();
    let program = Command::new("perl").args(["-e", "print $^X"]).output().unwrap();
    files.insert(String::from_utf8(program.stdout).unwrap().into());
    files.extend(files.clone().iter().map(|file| file.canonicalize().unwrap()));
    let all: BTreeSet<&Path> = files.iter().flat_map(|file| file.ancestors()).collect();
    let names: String =
        all.iter().filter_map(|path| Some(format!("{}\n", path.to_str()?.strip_prefix('/')?))).collect();
    let to = folder.join("perl.cpio");
    let file = std::fs::File::create(&to).unwrap();
    let mut command = Command::new("cpio");
    command.args(["-o", "-H", "newc"]).current_dir("/").stdin(Stdio::piped()).stdout(file).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(names.trim_start().as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    let find = |part: &str| files.iter().find_map(|file| file.to_str().filter(|name| name.contains(part))).unwrap();
    let folders = files.iter().filter_map(|file| file.parent()?.to_str().filter(|name| name.contains("lib")));
    let folders = folders.collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join(":");
    (to, format!("{} --library-path {folders} {}", find("/ld-"), find("bin/perl")))
}

/// Whoever reads in a guest that goes on elsewhere would wait for ever for a host that never heard of it.
#[test]
fn a_guest_that_goes_on_hears_that_its_vsock_connections_are_gone() {
    if !common::kvm() || guest::kernel(KERNEL).is_none() || !common::have("perl") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (path, (archive, perl)) = (folder.path().join("v"), perl(folder.path()));
    let server = UnixListener::bind(folder.path().join("v_1234")).unwrap();
    let name = format!("vsock-{}", std::process::id());
    let words = format!("--name {name} --vsock cid=7,path={} --initrd {}", path.display(), archive.display());
    let Some(mut guest) = shell(&words, VSOCK) else { return };
    let call = "socket(C, 40, 1, 0); connect(C, pack(\"SSLLx4\", 40, 0, 1234, 2)) or die $!; \
        print \"op\", \"en\\n\"; print sysread(C, $b, 1) // \"lo\", \"st\\n\"";
    guest.begin(&format!("{perl} -e '$|=1; {call}'"));
    let stream = accept_unix(&server);
    guest.until("open");
    let kept = folder.path().join("kept");
    common::bantam(&format!("snapshot {name} {}", kept.display())).run().expect(0);
    // The first goes on with it.
    (&stream).write_all(b"x").unwrap();
    guest.until("1st");
    guest.leave("poweroff -f\n");
    let mut again = Shell::restore(&kept, "once");
    again.until("lost");
    again.leave("poweroff -f\n");
}

#[test]
fn a_guest_and_its_host_reach_each_others_ports_over_vsock() {
    if guest::kernel(KERNEL).is_none() || !common::have("perl") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (path, (archive, perl)) = (folder.path().join("v"), perl(folder.path()));
    let server = UnixListener::bind(folder.path().join("v_1234")).unwrap();
    let words = format!("--vsock cid=7,path={} --initrd {}", path.display(), archive.display());
    let Some(mut guest) = shell(&words, VSOCK) else { return };
    // Echoes all that comes, to whom it connects to and to who connects to it. 40 is AF_VSOCK.
    let body = "while (sysread(C, my $b, 65536)) { my $n = 0; \
        while ($n < length $b) { $n += syswrite(C, $b, 65536, $n) } } close C;";
    let address = |port: u32, cid: u32| format!("pack(\"SSLLx4\", 40, 0, {port}, {cid})");
    let call = format!("socket(C, 40, 1, 0); connect(C, {}) or die $!; {body}", address(1234, 2));
    let serve = format!(
        "socket(S, 40, 1, 0); bind(S, {}) or die $!; listen(S, 5); print \"rea\", \"dy\\n\"; \
        for (1..2) {{ accept(C, S); {body} }}",
        address(52, u32::MAX)
    );
    guest.begin(&format!("{perl} -e '{call}'; echo hung \\up"));
    let stream = accept_unix(&server);
    let bytes = noise(1, SIZE);
    assert!(echo(stream.try_clone().unwrap(), stream.try_clone().unwrap(), &bytes) == bytes);
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!((&stream).read(&mut [0]).unwrap(), 0, "the guest closes too");
    guest.until("hung up");
    // Now it sends and does not receive; it may have less in flight than it is allowed.
    let words = format!("for my $n (0..{}) {{ ", (SIZE >> 16) - 1);
    let send = "my ($b, $d) = (pack(\"V*\", $n << 14..($n << 14) + 16383), 0); \
        while ($d < 65536) { $d += syswrite(C, $b, 65536, $d) } }";
    let call = format!("socket(C, 40, 1, 0); connect(C, {}) or die $!; {words}{send}", address(1234, 2));
    guest.begin(&format!("{perl} -e '{call}'; echo hung \\up"));
    let mut got = Vec::new();
    accept_unix(&server).read_to_end(&mut got).unwrap();
    assert!(got == (0..SIZE as u32 / 4).flat_map(u32::to_le_bytes).collect::<Vec<_>>(), "{}", got.len());
    guest.until("hung up");
    guest.begin(&format!("{perl} -e '$|=1; {serve}'; echo hung \\up"));
    guest.until("ready");
    for _ in 0..2 {
        let mut stream = patient(UnixStream::connect(&path).unwrap());
        stream.write_all(b"CONNECT 52\n").unwrap();
        let mut line = [0; 14];
        stream.read_exact(&mut line).unwrap();
        assert!(line.starts_with(b"OK 1") && line.ends_with(b"\n"), "{line:?}");
        assert!(echo(stream.try_clone().unwrap(), stream.try_clone().unwrap(), &bytes) == bytes);
    }
    guest.until("hung up");
    // Nobody is at this port of either side.
    let mut stream = patient(UnixStream::connect(&path).unwrap());
    stream.write_all(b"CONNECT 53\n").unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    let call = format!("socket(C, 40, 1, 0); connect(C, {}) and die; print \"nobo\", \"dy\\n\"", address(4321, 2));
    guest.begin(&format!("{perl} -e '{call}'"));
    guest.until("nobody");
    guest.leave("exit\n");
    assert!(!path.exists(), "the socket is still there");
}
