//! QEMU: one run of a test host, from its start to its end.
//!
//! Invariant: QEMU never outlives the xtask: the kernel kills it when its parent dies, and whoever gives up on a host
//! kills it first.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// A host that gives no sign of life for so long is dead: it gives one every 5 s, which a loaded machine stretches.
const DEAD: Duration = Duration::from_secs(120);

/// Lines of the host's console that are shown when it came to a bad end.
const LAST_LINES: usize = 25;

/// A way out of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Port {
    /// The command's stdout.
    Out = 1,
    /// The command's stderr.
    Err = 2,
    /// The folder /out, as an archive of tar.
    Files = 3,
    /// Signs of life.
    Alive = 4,
}

const PORTS: [Port; 4] = [Port::Out, Port::Err, Port::Files, Port::Alive];

/// What arrives from a port.
#[derive(Debug)]
enum Event {
    Bytes(Port, Vec<u8>),
    /// Nothing comes after this; with the status of the command if the host said that it was the end.
    End(Option<i32>),
}

/// Why a host did not come to its end.
#[derive(Debug)]
pub enum Trouble {
    /// The time was up. Whether the host was alive then.
    Timeout(bool),
    /// Its kernel panicked, it rebooted, or QEMU died.
    Died(String),
}

/// A host that is running.
pub struct Host {
    qemu: Child,
    folder: PathBuf,
    events: Receiver<Event>,
    start: Instant,
    /// When the host's first process said that it lives, counted from the start.
    pub up: Option<Duration>,
    /// How long it may give no sign of life.
    pub patience: Duration,
}

impl Host {
    /// Starts QEMU with the four ports; `folder` is for the run's own files.
    pub fn start(mut command: Command, folder: &Path, mark: &str) -> Result<Self> {
        let (sender, events) = sync_channel(64);
        command.args(["-device", "virtio-serial-pci"]);
        let mut theirs = Vec::new();
        for port in PORTS {
            let (ours, qemus) = UnixStream::pair()?;
            let (number, fd) = (port as u32, qemus.as_raw_fd());
            command.args(["-chardev", &format!("socket,id=port{number},fd={fd}")]);
            command.args(["-device", &format!("virtserialport,chardev=port{number},nr={number}")]);
            theirs.push(qemus);
            let (sender, mark) = (sender.clone(), mark.as_bytes().to_vec());
            std::thread::spawn(move || pump(ours, port, &mark, &sender));
        }
        let log = fs::File::create(folder.join("qemu.log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        bind(&mut command, theirs.iter().map(AsRawFd::as_raw_fd).collect());
        let qemu = command.spawn().with_context(|| crate::sh::words(&command))?;
        Ok(Self { qemu, folder: folder.into(), events, start: Instant::now(), up: None, patience: DEAD })
    }

    /// Takes in what the host sends, until its command has ended or `limit` is over; gives the exit status.
    pub fn wait(
        &mut self,
        limit: Duration,
        mut on: impl FnMut(Port, &[u8]) -> Result<()>,
    ) -> Result<Result<i32, Trouble>> {
        let (mut open, mut status, mut alive) = (PORTS.len(), None, Instant::now());
        loop {
            let now = Instant::now();
            let end = (self.start + limit).min(alive + self.patience);
            match self.events.recv_timeout(end.saturating_duration_since(now)) {
                Ok(Event::Bytes(Port::Alive, _)) => {
                    alive = Instant::now();
                    self.up.get_or_insert(alive - self.start);
                }
                Ok(Event::Bytes(port, bytes)) => on(port, &bytes)?,
                Ok(Event::End(None)) => return Ok(Err(Trouble::Died(self.last_words()))),
                Ok(Event::End(Some(code))) => {
                    open -= 1;
                    status = Some(code);
                }
                Err(RecvTimeoutError::Timeout) => return Ok(Err(Trouble::Timeout(now < alive + self.patience / 2))),
                Err(RecvTimeoutError::Disconnected) => bail!("the ports of the host are gone"),
            }
            // The port for signs of life has no end.
            if let (1, Some(code)) = (open, status) {
                return Ok(Ok(code));
            }
        }
    }

    /// What the host's kernel, and QEMU, said last.
    pub fn last_words(&self) -> String {
        let read = |name| String::from_utf8_lossy(&fs::read(self.folder.join(name)).unwrap_or_default()).into_owned();
        let text = read("console.log") + &read("qemu.log");
        let lines: Vec<_> = text.lines().filter(|line| !line.contains("TCG doesn't support")).collect();
        // What comes before a panic says more than what comes after it.
        let panic = lines.iter().position(|line| line.contains("Kernel panic")).map_or(lines.len(), |at| at + 8);
        let end = panic.min(lines.len());
        lines.get(end.saturating_sub(LAST_LINES)..end).unwrap_or_default().join("\n")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Makes the child inherit these descriptors, and die with this process.
pub fn bind(command: &mut Command, fds: Vec<RawFd>) {
    let prepare = move || {
        for fd in &fds {
            // SAFETY: clears close-on-exec of a descriptor that is open in the child, and touches no memory.
            #[allow(unsafe_code)]
            unsafe {
                libc::fcntl(*fd, libc::F_SETFD, 0)
            };
        }
        // SAFETY: prctl with these arguments only sets the signal that the child gets when its parent dies.
        #[allow(unsafe_code)]
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL)
        };
        Ok(())
    };
    // SAFETY: between fork and exec, `prepare` makes two kinds of system calls and allocates nothing.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(prepare)
    };
}

/// Hands on what comes from a port until its end.
fn pump(mut from: UnixStream, port: Port, mark: &[u8], to: &SyncSender<Event>) {
    let (mut held, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
    let status = loop {
        match from.read(&mut buffer) {
            Ok(0) | Err(_) => break None,
            Ok(n) => held.extend_from_slice(buffer.get(..n).unwrap_or_default()),
        }
        let (bytes, end) = split(&mut held, mark);
        if !bytes.is_empty() && to.send(Event::Bytes(port, bytes)).is_err() {
            return;
        }
        if end.is_some() {
            break end;
        }
    };
    let _ = to.send(Event::End(status));
}

/// Takes from `held` all that is surely not part of the mark, and the status behind the mark if that is there.
fn split(held: &mut Vec<u8>, mark: &[u8]) -> (Vec<u8>, Option<i32>) {
    let found = held.windows(mark.len()).position(|window| window == mark);
    if let Some(at) = found {
        let digits = held.get(at + mark.len()..at + mark.len() + 3);
        let status = digits.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
        return (held.drain(..at).collect(), status);
    }
    // The end may be the mark's beginning.
    let most = held.len().min(mark.len());
    let keep = (0..=most).rev().find(|n| held.ends_with(mark.get(..*n).unwrap_or_default())).unwrap_or(0);
    (held.drain(..held.len() - keep).collect(), None)
}

/// Unpacks an archive of tar as it comes.
pub struct Unpacker {
    tar: Child,
}

impl Unpacker {
    /// Into this folder, which is made if it is not there.
    pub fn new(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let mut command = crate::sh::program("tar", &["--no-same-owner", "-xf", "-", "-C"]);
        command.arg(std::path::absolute(folder)?).stdin(Stdio::piped()).stdout(Stdio::null());
        Ok(Self { tar: command.spawn().context("tar")? })
    }

    /// Some of the archive.
    pub fn take(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.tar.stdin.as_mut().context("tar")?.write_all(bytes)?)
    }

    /// All of it has come.
    pub fn finish(mut self) -> Result<()> {
        drop(self.tar.stdin.take());
        let status = self.tar.wait()?;
        if !status.success() {
            bail!("tar: {status}");
        }
        Ok(())
    }
}

impl Drop for Unpacker {
    fn drop(&mut self) {
        let _ = self.tar.kill();
        let _ = self.tar.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mark_is_found_wherever_the_stream_is_cut() {
        let stream = b"some M text MAMARK042";
        for cut in 0..stream.len() {
            let (mut held, mut text, mut status) = (Vec::new(), Vec::new(), None);
            for part in [&stream[..cut], &stream[cut..]] {
                held.extend_from_slice(part);
                let (bytes, end) = split(&mut held, b"MARK");
                text.extend(bytes);
                status = end;
            }
            assert_eq!((text.as_slice(), status), (&b"some M text MA"[..], Some(42)), "cut at {cut}");
        }
    }
}
