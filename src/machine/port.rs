//! What a port of the guest's is connected to: the serial port, or the console on virtio.
//!
//! Invariant: nothing here blocks.

use std::fs::File;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;

use super::streams::{Ended, Wish};
use crate::config::Serial;
use crate::console::Link;
use crate::error::refuse;
use crate::event::{Edge, Readiness};
use crate::host::input::{self, Input, Key, Keys};
use crate::host::output::{Bell, Flusher, Output, reopen};
use crate::host::say::say;
use crate::host::terminal;

/// Bytes read at once.
const CHUNK: usize = 1024;

/// When the keyboard is ours: at once if the guest asks for input, else once the machine has run this long. Whoever
/// pastes several commands into a shell does not want a guest of two milliseconds to eat the second one.
const KEYS: Duration = Duration::from_millis(200);

/// Where console input comes from.
pub enum Source {
    /// Nowhere, ever.
    None,
    /// Stdin, not touched before the guest asks for input; a terminal is listened to from `keys` on at the latest.
    Unopened { keys: Option<Instant> },
    /// An open descriptor. `watched`: the event loop will hear of it; else it is always ready (a file) or paused.
    Open { fd: OwnedFd, watched: bool, always: bool },
}

/// The host's side of a port.
pub struct Port {
    /// The option that says what it is connected to.
    option: &'static str,
    /// Bytes for the guest.
    pub input: Arc<Input>,
    /// Bytes of the guest.
    pub output: Option<Output>,
    /// What the console on virtio says and is told besides; its device hears of input by itself.
    pub link: Option<Link>,
    /// Which flusher carries them (for a socket that comes and goes).
    flusher: usize,
    on_stdout: bool,
    source: Source,
    listener: Option<(UnixListener, PathBuf)>,
    keys: Option<Keys>,
    /// A second client of the socket has been told so.
    turned_away: bool,
    /// Tokens of the descriptors that it watches: this one of its input, the next of its socket.
    token: u64,
}

/// Where a port's output goes.
pub enum Target {
    /// Nowhere.
    None,
    /// Where stdout goes.
    Stdout,
    /// To a file of its own.
    File(OwnedFd),
    /// To whoever connects.
    Socket,
}

impl Port {
    /// A port, and where its output is to go. Only one can have what is typed (`typed`).
    ///
    /// # Errors
    /// The file or the socket cannot be made.
    pub fn open(option: &'static str, to: &Serial, typed: bool, bell: Bell) -> Result<(Self, Target)> {
        let link = (option == CONSOLE).then(|| Link::new(bell.clone()).context("eventfd")).transpose()?;
        let mut port = Self {
            option,
            input: Input::new(bell),
            output: None,
            link,
            flusher: 0,
            on_stdout: *to == Serial::Stdio,
            source: Source::None,
            listener: None,
            keys: None,
            turned_away: false,
            token: if option == SERIAL { 1 } else { 3 },
        };
        let target = match to {
            Serial::Stdio => {
                if typed {
                    let keys = terminal::is_ours().then(|| Instant::now() + KEYS);
                    port.source = Source::Unopened { keys };
                } else {
                    port.input.end();
                }
                Target::Stdout
            }
            Serial::None => {
                port.input.end();
                Target::None
            }
            Serial::File(path) => {
                port.input.end();
                Target::File(create(path).with_context(|| format!("{option} file:{}", path.display()))?.into())
            }
            Serial::Unix(path) => {
                port.listener = Some((listen(option, path)?, path.clone()));
                Target::Socket
            }
        };
        if let Some(link) = &port.link {
            port.input.tell(link.bell().clone());
        }
        port.resized();
        Ok((port, target))
    }

    /// The terminal may have another size.
    pub fn resized(&self) {
        if let Some(link) = self.link.as_ref().filter(|_| self.on_stdout) {
            link.resize(terminal::size().unwrap_or_default());
        }
    }

    /// Its output goes there.
    pub fn connect(&mut self, output: Option<Output>, flusher: usize) {
        (self.output, self.flusher) = (output, flusher);
    }

    /// What is typed goes to this port, and the terminal is ours.
    pub fn has_keys(&self) -> bool {
        self.keys.is_some()
    }

    /// Starts watching.
    ///
    /// # Errors
    /// The host refuses.
    pub fn watch(&mut self, readiness: &Readiness) -> Result<()> {
        if let Some((listener, _)) = &self.listener {
            readiness.watch(listener, self.token + 1, Edge::Level)?;
        }
        if let Source::Open { fd, watched, always } = &mut self.source {
            *always = !readiness.watch(&*fd, self.token, Edge::Level)?;
            *watched = !*always;
        }
        Ok(())
    }

    /// When [`Port::serve`] wants to be called even if nothing happens.
    pub fn deadline(&self) -> Option<Instant> {
        match self.source {
            Source::Open { always: true, .. } if self.input.room() > 0 => Some(Instant::now()),
            Source::Unopened { keys } => keys,
            _ => None,
        }
    }

    /// Does what there is to do. `ready`: the tokens that are.
    ///
    /// # Errors
    /// The host refuses to watch stdin.
    pub fn serve(&mut self, readiness: &Readiness, ready: &[u64], flushers: &mut [Flusher]) -> Result<Wish> {
        if ready.contains(&(self.token + 1)) {
            self.accept(readiness, flushers);
        }
        if let Source::Unopened { keys } = self.source
            && (self.input.is_wanted() || keys.is_some_and(|at| at <= Instant::now()))
        {
            self.open_stdin(readiness)?;
        }
        let mut wish = Wish::default();
        let (readable, always) = match &self.source {
            Source::Open { always, .. } => (*always || ready.contains(&self.token), *always),
            _ => (false, false),
        };
        if readable {
            self.read(readiness, &mut wish);
        }
        if !always {
            self.pause_or_resume(readiness)?;
        }
        if let Some(link) = &self.link {
            wish.input = false;
            wish.end = wish.end.or(link.has_seen_until().then_some(Ended::Until));
        }
        Ok(wish)
    }

    fn open_stdin(&mut self, readiness: &Readiness) -> Result<()> {
        let stdin = rustix::stdio::stdin();
        if rustix::termios::isatty(stdin) {
            if !terminal::is_ours() {
                // In the background: reading would stop the process.
                self.source = Source::None;
                return Ok(());
            }
            terminal::make_raw().context("making the terminal raw")?;
            #[cfg(debug_assertions)]
            crate::host::fault::inject("terminal");
            self.keys = Some(Keys::default());
        }
        let fd = reopen(stdin, OFlags::RDONLY).or_else(|_| rustix::io::dup(stdin)).context("stdin")?;
        let watched = readiness.watch(&fd, self.token, Edge::Level)?;
        // A file's position is the original description's to keep.
        let fd = if watched { fd } else { rustix::io::dup(stdin).context("stdin")? };
        self.source = Source::Open { fd, watched, always: !watched };
        Ok(())
    }

    fn read(&mut self, readiness: &Readiness, wish: &mut Wish) {
        let Source::Open { fd, .. } = &self.source else { return };
        // A person's keys are always read, or ctrl-a x would wait behind what the guest does not take.
        let room = if self.keys.is_some() { CHUNK } else { self.input.room().min(CHUNK) };
        if room == 0 {
            return;
        }
        let mut bytes = [0; CHUNK];
        match rustix::io::read(fd, bytes.get_mut(..room).unwrap_or_default()) {
            Ok(0) => self.input_ended(readiness),
            Ok(count) => self.typed(bytes.get(..count).unwrap_or_default(), wish),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
            Err(_) => self.input_ended(readiness),
        }
        wish.input = true;
    }

    fn typed(&mut self, bytes: &[u8], wish: &mut Wish) {
        let Some(keys) = &mut self.keys else { return self.input.put(bytes) };
        let mut guest = Vec::with_capacity(bytes.len());
        for key in keys.sort(bytes, &mut guest) {
            match key {
                Key::Quit => wish.end = Some(Ended::Quit),
                Key::Report => wish.end = wish.end.or(Some(Ended::Report)),
                Key::Help => say(input::HELP),
            }
        }
        // A guest that has never read its serial port will not answer ctrl-c; the person means us.
        if guest.contains(&3) && !self.input.is_used() {
            wish.end = wish.end.or(Some(Ended::Interrupt));
        }
        self.input.put(&guest);
    }

    fn input_ended(&mut self, readiness: &Readiness) {
        self.input.end();
        if let Source::Open { fd, .. } = std::mem::replace(&mut self.source, Source::None) {
            readiness.forget(&fd);
        }
    }

    /// One client at a time. One that has sent all it has may still read, until the next one comes.
    fn accept(&mut self, readiness: &Readiness, flushers: &mut [Flusher]) {
        let Some((listener, _)) = &self.listener else { return };
        match listener.accept() {
            Ok(_) if matches!(self.source, Source::Open { .. }) => {
                if !std::mem::replace(&mut self.turned_away, true) {
                    say(&format!("bantam: {}: only one client at a time", self.option));
                }
            }
            Ok((client, _)) => {
                if let Err(e) = self.welcome(client.into(), readiness, flushers) {
                    say(&format!("bantam: {}: a client could not be served: {e:#}", self.option));
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(e) => {
                // The event would never fall silent.
                readiness.forget(listener);
                say(&format!("bantam: {}: no more clients: {e}", self.option));
            }
        }
    }

    fn welcome(&mut self, fd: OwnedFd, readiness: &Readiness, flushers: &mut [Flusher]) -> Result<()> {
        let out = rustix::io::dup(&fd)?;
        rustix::io::ioctl_fionbio(&fd, true)?;
        readiness.watch(&fd, self.token, Edge::Level)?;
        if let Some(flusher) = flushers.get_mut(self.flusher) {
            flusher.connect(Some(out))?;
        }
        self.input.begin();
        self.turned_away = false;
        self.source = Source::Open { fd, watched: true, always: false };
        Ok(())
    }

    /// Looks away from a source while the queue is full; a level-triggered event would never fall silent.
    fn pause_or_resume(&mut self, readiness: &Readiness) -> Result<()> {
        let room = self.keys.is_some() || self.input.room() > 0;
        if let Source::Open { fd, watched, .. } = &mut self.source
            && *watched != room
        {
            if room {
                readiness.watch(&*fd, self.token, Edge::Level)?;
            } else {
                readiness.forget(&*fd);
            }
            *watched = room;
        }
        Ok(())
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        if let Some((_, path)) = &self.listener {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// The option of the serial port, and of the console on virtio.
pub const SERIAL: &str = "--serial";
pub const CONSOLE: &str = "--console";

/// A file to write to; a FIFO without a reader is an error, not a wait.
pub fn create(path: &Path) -> std::io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    File::options().write(true).create(true).truncate(true).custom_flags(flags).open(path)
}

fn listen(option: &str, path: &Path) -> Result<UnixListener> {
    let listener = UnixListener::bind(path).map_err(|e| {
        let refusal = refuse(format!("{option} unix:{}: {e}", path.display()));
        let taken = e.kind() == std::io::ErrorKind::AddrInUse;
        if taken { refusal.hint("remove the file if no other machine uses it") } else { refusal }
    })?;
    listener.set_nonblocking(true).with_context(|| option.to_owned())?;
    Ok(listener)
}
