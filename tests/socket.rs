//! The control socket, `bantam ps` and `bantam top`: who may use them, and what nobody can do to a machine through them.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::place::{Place, chatter, grows, size};
use common::{File, Started, bantam, file, kvm};
use serde_json::Value;

impl Place {
    fn folder(&self) -> PathBuf {
        self.0.path().join("bantam")
    }

    fn make_folder(&self) {
        std::fs::create_dir(self.folder()).unwrap();
        std::fs::set_permissions(self.folder(), PermissionsExt::from_mode(0o700)).unwrap();
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.folder().join(format!("{name}.sock"))
    }

    /// A machine that runs until it is ended.
    fn machine(&self, guest: &File, words: &str) -> Started {
        let started = self.run("run").arg(guest.path()).words("--timeout 30").words(words).start();
        let until = Instant::now() + Duration::from_secs(10);
        // The file is there a moment before somebody listens.
        let listens = |entry: std::fs::DirEntry| UnixStream::connect(entry.path()).is_ok();
        let there = || std::fs::read_dir(self.folder()).is_ok_and(|entries| entries.flatten().any(listens));
        while !there() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        started
    }

    fn ask(&self, name: &str, request: &str) -> Value {
        let mut stream = UnixStream::connect(self.socket(name)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream.write_all(format!("{request}\n").as_bytes()).unwrap();
        answer(&stream)
    }
}

fn answer(stream: &UnixStream) -> Value {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap_or(Value::Null)
}

/// `cli; jmp $`, and on arm64 `b .`.
fn spin() -> File {
    file(if cfg!(target_arch = "x86_64") { &[0xfa, 0xeb, 0xfe] } else { &[0, 0, 0, 0x14] })
}

fn end(started: Started) {
    started.signal("TERM");
    started.wait().expect(143);
}

#[test]
fn a_machine_is_listed_while_it_lives_and_leaves_no_socket() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), spin());
    let machine = place.machine(&guest, "--name web --stats --memory 1M");
    let listed = place.run("ps").run();
    let line = listed.expect(0).out().lines().nth(1).unwrap_or_default().to_owned();
    assert!(line.starts_with("web ") && line.contains(&machine.pid().to_string()) && line.contains("1M"), "{line}");
    let mode = |path: PathBuf| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(place.folder()), mode(place.socket("web"))), (0o700, 0o600));
    end(machine);
    assert!(!place.socket("web").exists());
    assert_eq!(place.run("ps").run().expect(0).out().lines().count(), 1);
    place.run("top web").run().refused(125).said("no machine is called web");
}

#[test]
fn stop_ends_a_machine_that_has_no_button_at_once() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), spin());
    let machine = place.machine(&guest, "--name web");
    place.run("stop web").run().expect(0);
    machine.wait().expect(143);
    place.run("stop web").run().refused(125).said("no machine is called web");
}

#[test]
fn a_machine_without_a_name_has_a_socket_once_it_has_lived_a_while() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), spin());
    let machine = place.machine(&guest, "");
    let name = format!("bantam-{}", machine.pid());
    assert_eq!(place.ask(&name, r#"{"ping":{}}"#)["ok"]["name"], name.as_str());
    end(machine);
    assert!(!place.socket(&name).exists());
    if cfg!(target_arch = "x86_64") {
        place.run("example add").run().expect(0).printed("4\n");
    }
}

#[test]
fn top_has_a_machine_begin_to_count() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), spin());
    let machine = place.machine(&guest, "--name x");
    assert!(place.ask("x", r#"{"stats":{}}"#)["error"].as_str().unwrap().contains("--stats"));
    let top = place.run("top x").start();
    std::thread::sleep(Duration::from_millis(2500));
    let stats = place.ask("x", r#"{"stats":{}}"#);
    assert!(stats["ok"]["report"]["time"]["cpus"][0]["guest_and_kvm_ns"].as_u64().unwrap() > 1_000_000_000, "{stats}");
    end(machine);
    let lines = top.wait();
    assert!(lines.expect(0).out().lines().count() >= 2 && lines.out().contains("exits a second"), "{}", lines.out());
}

#[test]
fn p35_names_that_are_taken_stale_links_or_too_long() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), spin());
    place.make_folder();
    let start = |name: &str| place.run("run").arg(guest.path()).words("--timeout 0.2 --name").arg(name).run();
    start("a/b").refused(2).said("--name");
    start("").refused(2);
    start(&"x".repeat(120)).refused(125).said("longer than 107");
    // Stale: bound once, listened to no more.
    drop(UnixListener::bind(place.socket("old")).unwrap());
    assert!(place.socket("old").exists());
    start("old").expect(124);
    assert!(!place.socket("old").exists());
    symlink("/tmp/elsewhere", place.socket("link")).unwrap();
    start("link").refused(125).said("no socket");
    assert!(place.socket("link").is_symlink());
    let machine = place.machine(&guest, "--name taken");
    std::thread::sleep(Duration::from_millis(200));
    start("taken").refused(125).said("is running");
    // Nor does it touch the files of the one that has it.
    let log = file(b"kept");
    for option in ["--serial", "--console"] {
        let words = format!("--timeout 0.2 --name taken {option} file:{}", log.path().display());
        place.run("run").arg(guest.path()).words(&words).run().refused(125).said("is running");
        assert_eq!(std::fs::read(log.path()).unwrap(), b"kept");
    }
    assert_eq!(place.ask("taken", r#"{"ping":{}}"#)["ok"]["name"], "taken");
    end(machine);
}

#[test]
fn p35_a_folder_that_is_not_ours_alone_is_refused() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), spin());
    place.make_folder();
    let start = |words: &str| place.run("run").arg(guest.path()).words("--timeout 0.3").words(words).run();
    std::fs::set_permissions(place.folder(), PermissionsExt::from_mode(0o755)).unwrap();
    start("--name x").refused(125).said("not this user's alone");
    // A machine that nobody named runs without.
    start("").expect(124).said("will not see this machine");
    // Who asks does not talk to whoever put a socket there.
    place.run("ps").run().refused(125).said("not this user's alone");
    place.run("top x").run().refused(125).said("not this user's alone");
    std::fs::remove_dir(place.folder()).unwrap();
    symlink("/tmp", place.folder()).unwrap();
    start("--name x").refused(125);
    std::fs::remove_file(place.folder()).unwrap();
    std::fs::write(place.folder(), "").unwrap();
    start("--name x").refused(125);
    let nowhere = bantam("run").arg(guest.path()).words("--timeout 0.2 --name x").env("XDG_RUNTIME_DIR", "/proc");
    nowhere.run().refused(125).said("control sockets' folder");
}

#[test]
fn nobody_waits_for_a_machine_that_accepts_nobody() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    place.make_folder();
    // Nobody accepts, and as many wait as the listener lets.
    let socket = || {
        rustix::net::socket_with(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::STREAM,
            rustix::net::SocketFlags::NONBLOCK | rustix::net::SocketFlags::CLOEXEC,
            None,
        )
        .unwrap()
    };
    let address = rustix::net::SocketAddrUnix::new(place.socket("x")).unwrap();
    let listener = socket();
    rustix::net::bind(&listener, &address).unwrap();
    rustix::net::listen(&listener, 4).unwrap();
    let connect = || {
        let socket = socket();
        rustix::net::connect(&socket, &address).map(|()| socket).ok()
    };
    let waiting: Vec<_> = std::iter::from_fn(connect).take(100).collect();
    assert!(waiting.len() < 100);
    let begun = Instant::now();
    place.run("top x").run().refused(125).said("x does not answer");
    assert_eq!(place.run("ps").run().expect(0).out().lines().count(), 1);
    assert!(begun.elapsed() < common::within(5.0), "{:?}", begun.elapsed());
}

#[test]
fn top_gives_the_terminal_back_when_a_signal_ends_it() {
    if !kvm() || !common::have("script") || !common::have("stty") {
        return;
    }
    let (place, guest) = (Place::new(), spin());
    let machine = place.machine(&guest, "--name x");
    let pid = place.path("pid");
    let top = format!("sh -c 'echo $$ > {}; exec {} top x'", pid.display(), common::program().display());
    let mut script = std::process::Command::new("script");
    script.args(["-qec", &format!("{top}; echo status $?; stty -a"), "/dev/null"]);
    script.env("XDG_RUNTIME_DIR", place.0.path()).env("SHELL", "/bin/sh");
    let child = script.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(2500));
    let pid = std::fs::read_to_string(pid).unwrap();
    std::process::Command::new("kill").args(["-TERM", pid.trim()]).status().unwrap();
    let shown = String::from_utf8_lossy(&child.wait_with_output().unwrap().stdout).into_owned();
    let (before, after) = shown.split_once("status 143").unwrap_or_else(|| panic!("{shown}"));
    assert!(before.contains("\x1b[?1049h") && before.contains("\x1b[?1049l"), "{shown}");
    assert!(after.contains(" icanon") && after.contains(" echo ") && !after.contains("-icanon"), "{shown}");
    end(machine);
}

#[test]
fn p33_bad_clients_are_told_and_leave() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), spin());
    let machine = place.machine(&guest, "--name x");
    let connect = || {
        let stream = UnixStream::connect(place.socket("x")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(8))).unwrap();
        stream
    };
    for garbage in [&b"\xff\xfe\x00garbage\n"[..], b"{\"ping\":{}\n", b"[\n", &b"[".repeat(40_000)] {
        let mut stream = connect();
        stream.write_all(garbage).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("{\"error\":"), "{text}");
    }
    // A megabyte without a line end: refused after 51,200 bytes.
    let mut stream = connect();
    let written = (0..256).map_while(|_| stream.write_all(&[b' '; 4096]).ok()).count();
    let mut byte = [0];
    let ended = stream.read(&mut byte).is_err() || byte == *b"{" || byte == [0];
    assert!(written <= 256 && ended);
    // Half-closed, without a line end, and several at once.
    let mut stream = connect();
    stream.write_all(b"{\"ping\":{}}\n{\"ping\":{}}\n{\"ping\":{}}").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!((text.lines().count(), text.matches("\"name\":\"x\"").count()), (3, 3));
    // One that begins and does not go on is let go after five seconds.
    let (mut slow, begun) = (connect(), Instant::now());
    slow.write_all(b"{").unwrap();
    assert_eq!(slow.read(&mut byte).unwrap(), 0);
    assert!((4..8).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    assert!(machine.proc_status("VmRSS") < 20_000);
    end(machine);
}

#[test]
fn p33_a_thousand_connections_leave_room_for_one_that_asks() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), spin());
    let machine = place.machine(&guest, "--name x");
    let path = place.socket("x");
    let flood =
        std::thread::spawn(move || (0..1000).filter_map(|_| UnixStream::connect(&path).ok()).collect::<Vec<_>>());
    // Who has not asked yet when sixteen others come has to come again.
    let ask = || {
        let mut stream = UnixStream::connect(place.socket("x")).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream.write_all(b"{\"ping\":{}}\n").ok()?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).ok()?;
        serde_json::from_str::<Value>(&line).ok()
    };
    for _ in 0..5 {
        let asked = Instant::now();
        let answer = (0..20).find_map(|_| ask()).expect("nobody is let in");
        assert_eq!(answer["ok"]["name"], "x");
        assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
    }
    let all = flood.join().unwrap();
    assert_eq!(place.ask("x", r#"{"ping":{}}"#)["ok"]["name"], "x");
    let open = std::fs::read_dir(format!("/proc/{}/fd", machine.pid())).unwrap().count();
    assert!(all.len() > 500 && open < 50, "{} connections, {open} descriptors", all.len());
    end(machine);
}

#[test]
fn a_paused_machine_stands_still_until_it_is_to_go_on() {
    if !kvm() {
        return;
    }
    let (place, guest) = (Place::new(), chatter());
    let out = place.path("out");
    let started = place.machine(&guest, &format!("--name still --serial file:{}", out.display()));
    let tell = |words: &str| {
        place.run(words).run().expect(0).said_nothing();
    };
    grows(&out, 0);
    for _ in 0..3 {
        tell("pause still");
        tell("pause still");
        // What was printed before is still written.
        std::thread::sleep(common::within(0.1));
        let before = size(&out);
        assert!(place.run("ps").run().out().contains(" paused "));
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(size(&out), before);
        tell("resume still");
        tell("resume still");
        grows(&out, before);
        assert!(place.run("ps").run().out().contains(" running "));
    }
    // One after the other, each answered once it is done.
    let mut stream = UnixStream::connect(place.socket("still")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let ping = "{\"ping\":{}}\n";
    stream.write_all(format!("{{\"pause\":{{}}}}\n{ping}{{\"resume\":{{}}}}\n{ping}").as_bytes()).unwrap();
    let answers: Vec<Value> =
        BufReader::new(&stream).lines().take(4).map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect();
    assert_eq!((&answers[0]["ok"], &answers[2]["ok"]), (&Value::Null, &Value::Null), "{answers:?}");
    assert_eq!((&answers[1]["ok"]["state"], &answers[3]["ok"]["state"]), (&"paused".into(), &"running".into()));
    // Nobody is there to hear its power button.
    tell("pause still");
    tell("stop still");
    started.wait().expect(143);
    place.run("pause still").run().refused(125).said("no machine is called still");
    let started = place.run("run").arg(guest.path()).words("--name still --serial none --timeout 4").start();
    started.up();
    tell("pause still");
    started.wait().expect(124);
}
