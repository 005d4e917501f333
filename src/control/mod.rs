//! The control socket of a machine: where it lies, who may use it, what can be asked.
//!
//! One request a line, one answer a line, both JSON (docs/control.md). Invariant: the folder belongs to this user and
//! nobody else may enter it, so whoever connects is this user or root; a socket that a live machine answers is never taken
//! away.

mod server;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::fd::OwnedFd;
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use self::server::{Server, TOKENS};
use crate::error::{Refusal, refuse, usage};
use crate::host::socket::{MAX_PATH, clear, connect, listen};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;
/// How long `ps` and `top` wait for an answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often, and after which pauses, they try to connect to a machine at which many others wait.
const TRIES: u32 = 20;
const TRY: Duration = Duration::from_millis(25);
/// The longest answer that is read.
const MAX_ANSWER: u64 = 16 << 20;

/// What can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Who are you?
    Ping {},
    /// What have you counted?
    Stats {
        /// Begin to count, if the machine does not yet.
        #[serde(default)]
        start: bool,
    },
    /// How is the balloon?
    Balloon {
        /// From now on it shall hold so many bytes.
        #[serde(default)]
        size: Option<u64>,
    },
    /// Press the power button, or end the machine where nobody would hear it.
    Stop {},
    /// Stand still: no CPU and no device does anything.
    Pause {},
    /// Go on.
    Resume {},
    /// Write a snapshot of itself, and be as before.
    Snapshot {
        /// A folder that is not there yet, by its whole path.
        path: PathBuf,
        /// It is to be there after whatever happens to the host; nobody waits for the disk else.
        #[serde(default = "keeps")]
        keep: bool,
        /// Only what has changed since the last one that was kept.
        #[serde(default)]
        diff: bool,
        /// A folder that is there, for copies of the disks that it writes to, as they are at that moment: each is named by its
        /// number, from 0 on.
        #[serde(default)]
        disks: Option<PathBuf>,
    },
}

fn keeps() -> bool {
    true
}

/// Whether a machine's CPUs and devices are at work.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// They are.
    #[default]
    Running,
    /// They stand still until somebody has them go on.
    Paused,
}

/// What a request gives: JSON, or why there is none.
pub type Answer = Result<String, String>;

/// A machine, as `ps` lists it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Info {
    /// Its name.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// Seconds since its start.
    pub age: f64,
    /// Whether it is paused.
    pub state: State,
    /// What it runs.
    pub guest: String,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Guest RAM in bytes.
    pub memory: u64,
    /// Exits a second since the start; null where nobody counts.
    pub exits_per_second: Option<f64>,
    /// Bytes of RAM that the balloon holds; null where there is none.
    pub balloon: Option<u64>,
}

impl Info {
    fn of(value: &Value) -> Option<Self> {
        let info = Self::deserialize(value).ok()?;
        // Whoever answers may not be Bantam: what is shown has a bound.
        let bound = |text: String| text.chars().take(200).collect();
        Some(Self { name: bound(info.name), guest: bound(info.guest), ..info })
    }
}

/// The folder of all control sockets of this user.
pub fn folder() -> PathBuf {
    let user = rustix::process::getuid().as_raw();
    let told = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute());
    let usual = || Some(PathBuf::from(format!("/run/user/{user}"))).filter(|path| path.is_dir());
    told.or_else(usual).map_or_else(|| format!("/tmp/bantam-{user}").into(), |path| path.join("bantam"))
}

/// That folder, made if need be; none where it is not this user's alone.
pub fn own_folder() -> Option<PathBuf> {
    let folder = folder();
    let _ = rustix::fs::mkdir(&folder, Mode::RWXU);
    opened(&folder).ok()?.map(|_| folder)
}

fn socket_of(name: &str) -> PathBuf {
    folder().join(format!("{name}.sock"))
}

/// Refuses a name that is no file's name, or that would not show as it is.
///
/// # Errors
/// As said (status 2).
pub fn check_name(name: &str) -> Result<(), Refusal> {
    let bad = name.is_empty() || name.starts_with('.') || name.chars().any(|c| c == '/' || c.is_control());
    if bad {
        let hint = "letters, digits, - and _ make good names";
        return Err(
            usage(format!("--name {name:?}: empty, or with a / or a control character, or a dot first")).hint(hint)
        );
    }
    Ok(())
}

fn called(folder: &Path) -> String {
    format!("the control sockets' folder {}", folder.display())
}

/// Opens the folder; none where there is none. In one that is not this user's alone anyone may have put a socket.
fn opened(folder: &Path) -> Result<Option<OwnedFd>> {
    let what = || called(folder);
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = match rustix::fs::open(folder, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        fd => fd.with_context(what)?,
    };
    let stat = rustix::fs::fstat(&fd).with_context(what)?;
    if stat.st_uid != rustix::process::geteuid().as_raw() || stat.st_mode & 0o077 != 0 {
        let why = format!("{}: it is not this user's alone (mode {:04o})", what(), stat.st_mode & 0o7777);
        return Err(refuse(why).hint("set XDG_RUNTIME_DIR to a folder of your own").into());
    }
    Ok(Some(fd))
}

/// Opens the folder, made if need be, with its lock held; none while another start holds it.
fn locked(folder: &Path) -> Result<Option<OwnedFd>> {
    let what = || called(folder);
    match rustix::fs::mkdir(folder, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(e).with_context(what),
    }
    let Some(fd) = opened(folder)? else { return Ok(None) };
    match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(fd)),
        Err(Errno::WOULDBLOCK | Errno::INTR) => Ok(None),
        Err(e) => Err(e).with_context(what),
    }
}

/// Takes the name: the socket, listening. None where another start is taking one at this moment.
fn claim(name: &str) -> Result<Option<(UnixListener, PathBuf)>> {
    let path = socket_of(name);
    if path.as_os_str().len() > MAX_PATH {
        let why = format!("the control socket's path is longer than {MAX_PATH} bytes: {}", path.display());
        return Err(refuse(why).hint("a shorter --name, or a shorter XDG_RUNTIME_DIR").into());
    }
    let Some(_lock) = locked(&folder())? else { return Ok(None) };
    if !clear(&path)? {
        let hint = "`bantam ps` lists the machines; choose another --name";
        return Err(refuse(format!("--name {name}: a machine of this name is running")).hint(hint).into());
    }
    let listener = listen(&path, BACKLOG).with_context(|| format!("the control socket {}", path.display()))?;
    Ok(Some((listener, path)))
}

/// Asks the machine at `path`.
fn ask_at(path: &Path, request: &Request) -> Result<Value> {
    let mut tries = 0;
    let mut stream = loop {
        match connect(path) {
            // A machine that runs accepts them soon.
            Err(Errno::AGAIN) if tries < TRIES => std::thread::sleep(TRY),
            connected => break connected.map_err(std::io::Error::from)?,
        }
        tries += 1;
    };
    stream.set_nonblocking(false)?;
    // What a snapshot takes depends on how much RAM there is; and who wants a machine to be otherwise waits until it is.
    let waits = matches!(request, Request::Snapshot { .. } | Request::Pause {} | Request::Resume {});
    let patience = (!waits).then_some(PATIENCE);
    stream.set_read_timeout(patience)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all((serde_json::to_string(request)? + "\n").as_bytes())?;
    let mut line = String::new();
    BufReader::new(std::io::Read::take(&mut stream, MAX_ANSWER)).read_line(&mut line)?;
    let mut answer: Value = serde_json::from_str(&line).context("the machine's answer")?;
    match answer.get_mut("ok") {
        Some(value) => Ok(value.take()),
        None => Err(refuse(answer["error"].as_str().unwrap_or("no answer")).into()),
    }
}

/// Asks the machine of this name.
///
/// # Errors
/// There is none, or it does not answer.
pub fn ask(name: &str, request: &Request) -> Result<Value> {
    use std::io::ErrorKind::{ConnectionRefused, NotFound, WouldBlock};
    check_name(name)?;
    let nobody = || refuse(format!("no machine is called {name}")).hint("`bantam ps` lists those there are");
    if opened(&folder())?.is_none() {
        return Err(nobody().into());
    }
    let path = socket_of(name);
    ask_at(&path, request).map_err(|e| match e.downcast_ref::<std::io::Error>().map(std::io::Error::kind) {
        Some(NotFound | ConnectionRefused) => nobody().into(),
        Some(WouldBlock) => refuse(format!("{name} does not answer: it is stopped, or too many others ask it")).into(),
        _ => e.context(format!("asking {name}")),
    })
}

/// Whether the machine of this name is still the process `pid`, or does not say.
pub fn lives(name: &str, pid: &Value) -> bool {
    use std::io::ErrorKind::{ConnectionRefused, NotFound};
    match ask_at(&socket_of(name), &Request::Ping {}) {
        Ok(info) => info["pid"] == *pid,
        Err(e) => {
            let kind = e.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
            !matches!(kind, Some(NotFound | ConnectionRefused))
        }
    }
}

/// All machines of this user that answer, by name.
///
/// # Errors
/// The folder of their sockets is not this user's alone.
pub fn machines() -> Result<Vec<Info>> {
    let folder = folder();
    if opened(&folder)?.is_none() {
        return Ok(Vec::new());
    }
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let sockets = entries.filter(|path| path.extension().is_some_and(|e| e == "sock"));
    let infos = sockets.filter_map(|path| Info::of(&ask_at(&path, &Request::Ping {}).ok()?));
    let mut infos: Vec<Info> = infos.collect();
    infos.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(infos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_what_the_page_says() {
        let read = |text: &str| serde_json::from_str::<Request>(text).ok();
        assert_eq!(read(r#"{"ping":{}}"#), Some(Request::Ping {}));
        assert_eq!(read(r#"{"stop":{}}"#), Some(Request::Stop {}));
        assert_eq!(read(r#"{"stats":{}}"#), Some(Request::Stats { start: false }));
        assert_eq!(read(r#"{"stats":{"start":true}}"#), Some(Request::Stats { start: true }));
        assert_eq!(read(r#"{"balloon":{}}"#), Some(Request::Balloon { size: None }));
        assert_eq!(read(r#"{"balloon":{"size":4096}}"#), Some(Request::Balloon { size: Some(4096) }));
        let whole = Request::Snapshot { path: "/a".into(), keep: true, diff: false, disks: None };
        assert_eq!(read(r#"{"snapshot":{"path":"/a"}}"#), Some(whole));
        let diff = Request::Snapshot { path: "/a".into(), keep: false, diff: true, disks: None };
        assert_eq!(read(r#"{"snapshot":{"path":"/a","keep":false,"diff":true}}"#), Some(diff));
        let deep = "[".repeat(50_000);
        for bad in ["", "{}", "null", r#"{"ping":{},"stats":{}}"#, r#"{"halt":{}}"#, r#"{"stats":{"x":1}}"#, &deep] {
            assert_eq!(read(bad), None, "{bad:.40}");
        }
    }

    #[test]
    fn a_name_is_a_files_name() {
        assert!(["a", "web-1", "häuser", "a.b"].into_iter().all(|name| check_name(name).is_ok()));
        assert!(["", ".", "..", ".a", "a/b", "/", "a\n", "a\x1b[2J"].into_iter().all(|name| check_name(name).is_err()));
    }
}
