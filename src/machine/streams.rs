//! The machine's ends of stdin, stdout, stderr, files and sockets, as the event loop serves them.
//!
//! One set serves all lives of a machine (`--reboot`). Invariant: nothing here blocks but [`Streams::finish`], which is
//! bounded.

use std::fs::File;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::OFlags;

use crate::config::{Config, Serial};
use crate::console::{HostConsole, Until};
use crate::error::refuse;
use crate::event::{Edge, Readiness};
use crate::host::input::{self, Input, Key, Keys};
use crate::host::output::{Bell, DELAY, Flusher, Left, Output, output, reopen};
use crate::host::say::say;
use crate::host::{sys, terminal};

/// Bytes read from stdin at once.
const CHUNK: usize = 1024;

/// When the keyboard is ours: at once if the guest asks for input, else once the machine has run this long. Whoever
/// pastes several commands into a shell does not want a guest of two milliseconds to eat the second one.
const KEYS: Duration = Duration::from_millis(200);

/// How long a device that was busy is left alone before it is told again of its input.
const RETELL: Duration = Duration::from_millis(1);

/// Tokens of the descriptors that [`Streams`] watches.
const INPUT: u64 = 1;
const LISTEN: u64 = 2;

/// Where console input comes from.
enum Source {
    /// Nowhere, ever.
    None,
    /// Stdin, not touched before the guest asks for input; a terminal is listened to from `keys` on at the latest.
    Unopened { keys: Option<Instant> },
    /// An open descriptor. `watched`: the event loop will hear of it; else it is always ready (a file) or paused.
    Open { fd: OwnedFd, watched: bool, always: bool },
}

/// All streams of one machine.
pub struct Streams {
    bell: Bell,
    serial: Option<Output>,
    console: Option<Output>,
    trace: Option<Output>,
    flushers: Vec<Flusher>,
    /// Which flusher carries the serial port (for a socket that comes and goes).
    serial_flusher: usize,
    input: Arc<Input>,
    source: Source,
    listener: Option<(UnixListener, PathBuf)>,
    keys: Option<Keys>,
    until: Option<String>,
    flush_at: Option<Instant>,
    /// The serial device was busy when input came: tell it again.
    retell: bool,
    /// A second client of the serial socket has been told so.
    turned_away: bool,
}

/// What a person or a guest asked for through a stream.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Wish {
    /// ctrl-a x, or ctrl-c before the guest listens (the latter as a signal number).
    pub end: Option<Ended>,
    /// There is input for the serial port.
    pub input: bool,
}

/// How a person ended the machine from the keyboard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// ctrl-a x.
    Quit,
    /// ctrl-c.
    Interrupt,
}

impl Streams {
    /// Opens what `config` asks for.
    ///
    /// # Errors
    /// A file or socket cannot be made.
    pub fn open(config: &Config) -> Result<Self> {
        let bell = Bell::new().context("eventfd")?;
        let mut streams = Self {
            input: Input::new(bell.clone()),
            bell,
            serial: None,
            console: None,
            trace: None,
            flushers: Vec::new(),
            serial_flusher: 0,
            source: Source::None,
            listener: None,
            keys: None,
            until: config.until.clone(),
            flush_at: None,
            retell: false,
            turned_away: false,
        };
        if config.serial == Serial::Stdio || config.debugcon.is_some() {
            let stdout = rustix::io::dup(rustix::stdio::stdout()).context("stdout")?;
            streams.console = Some(streams.output(Some(stdout)).context("stdout")?);
        }
        streams.serial_flusher = streams.flushers.len();
        match &config.serial {
            Serial::Stdio => {
                streams.serial_flusher = 0;
                streams.serial = streams.console.clone();
                let keys = terminal::is_ours().then(|| Instant::now() + KEYS);
                streams.source = Source::Unopened { keys };
            }
            Serial::None => streams.input.end(),
            Serial::File(path) => {
                streams.input.end();
                let file = create(path).with_context(|| format!("--serial file:{}", path.display()))?;
                streams.serial = Some(streams.output(Some(file.into()))?);
            }
            Serial::Unix(path) => {
                streams.listener = Some((listen(path)?, path.clone()));
                streams.serial = Some(streams.output(None)?);
            }
        }
        if let Some(path) = &config.trace {
            let to = match path.as_os_str() == "-" {
                true => rustix::io::dup(rustix::stdio::stderr()).context("stderr")?,
                false => create(path).with_context(|| format!("--trace={}", path.display()))?.into(),
            };
            streams.trace = Some(streams.output(Some(to))?);
        }
        Ok(streams)
    }

    fn output(&mut self, fd: Option<OwnedFd>) -> Result<Output> {
        let (output, flusher) = output(fd, self.bell.clone())?;
        self.flushers.push(flusher);
        Ok(output)
    }

    /// The bell that wakes the event loop; vCPUs ring it too.
    pub fn bell(&self) -> Bell {
        self.bell.clone()
    }

    /// A wire for the serial port.
    pub fn serial_console(&self) -> HostConsole {
        self.wire(self.serial.clone(), Some(self.input.clone()))
    }

    /// A wire for the debug console.
    pub fn debug_console(&self) -> HostConsole {
        self.wire(self.console.clone(), None)
    }

    fn wire(&self, output: Option<Output>, input: Option<Arc<Input>>) -> HostConsole {
        HostConsole { output, input, until: self.until.as_deref().map(Until::new) }
    }

    /// Where trace lines go.
    pub fn trace(&self) -> Option<Output> {
        self.trace.clone()
    }

    /// Starts watching. The bell itself is the caller's to watch.
    ///
    /// # Errors
    /// The host refuses.
    pub fn watch(&mut self, readiness: &Readiness) -> Result<()> {
        if let Some((listener, _)) = &self.listener {
            readiness.watch(listener, LISTEN, Edge::Level)?;
        }
        if let Source::Open { fd, watched, always } = &mut self.source {
            *always = !readiness.watch(&*fd, INPUT, Edge::Level)?;
            *watched = !*always;
        }
        Ok(())
    }

    /// When [`Streams::serve`] wants to be called even if nothing happens.
    pub fn deadline(&self) -> Option<Instant> {
        let input_now = matches!(self.source, Source::Open { always: true, .. }) && self.input.room() > 0;
        let soon = match (input_now, self.retell) {
            (true, _) => Some(Instant::now()),
            (false, true) => Some(Instant::now() + RETELL),
            (false, false) => None,
        };
        let keys = if let Source::Unopened { keys } = self.source { keys } else { None };
        [soon, keys, self.flush_at].into_iter().flatten().min()
    }

    /// Does what there is to do. `ready`: the tokens that are.
    ///
    /// # Errors
    /// The host refuses to watch stdin.
    pub fn serve(&mut self, readiness: &Readiness, ready: &[u64]) -> Result<Wish> {
        self.flush_due();
        if ready.contains(&LISTEN) {
            self.accept(readiness);
        }
        if let Source::Unopened { keys } = self.source
            && (self.input.is_wanted() || keys.is_some_and(|at| at <= Instant::now()))
        {
            self.open_stdin(readiness)?;
        }
        let mut wish = Wish { input: std::mem::take(&mut self.retell), ..Wish::default() };
        let (readable, always) = match &self.source {
            Source::Open { always, .. } => (*always || ready.contains(&INPUT), *always),
            _ => (false, false),
        };
        if readable {
            self.read(readiness, &mut wish);
        }
        if !always {
            self.pause_or_resume(readiness)?;
        }
        Ok(wish)
    }

    /// The serial device was busy: [`Streams::serve`] will report its input again, soon.
    pub fn tell_again(&mut self) {
        self.retell = true;
    }

    fn flush_due(&mut self) {
        let now = Instant::now();
        let urgent = self.flushers.iter().any(Flusher::is_urgent);
        if self.flush_at.is_none() && !urgent {
            self.flush_at = self.flushers.iter().any(Flusher::is_armed).then(|| now + DELAY);
        }
        if urgent || self.flush_at.is_some_and(|at| at <= now) {
            let busy =
                self.flushers.iter_mut().map(Flusher::flush).fold(false, |busy, left| busy | (left != Left::Idle));
            self.flush_at = busy.then(|| now + DELAY);
        }
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
        let watched = readiness.watch(&fd, INPUT, Edge::Level)?;
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
    fn accept(&mut self, readiness: &Readiness) {
        let Some((listener, _)) = &self.listener else { return };
        match listener.accept() {
            Ok(_) if matches!(self.source, Source::Open { .. }) => {
                if !std::mem::replace(&mut self.turned_away, true) {
                    say("bantam: --serial: only one client at a time");
                }
            }
            Ok((client, _)) => {
                if let Err(e) = self.welcome(client.into(), readiness) {
                    say(&format!("bantam: --serial: a client could not be served: {e:#}"));
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(e) => {
                // The event would never fall silent.
                readiness.forget(listener);
                say(&format!("bantam: --serial: no more clients: {e}"));
            }
        }
    }

    fn welcome(&mut self, fd: OwnedFd, readiness: &Readiness) -> Result<()> {
        let out = rustix::io::dup(&fd)?;
        rustix::io::ioctl_fionbio(&fd, true)?;
        readiness.watch(&fd, INPUT, Edge::Level)?;
        if let Some(flusher) = self.flushers.get_mut(self.serial_flusher) {
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
                readiness.watch(&*fd, INPUT, Edge::Level)?;
            } else {
                readiness.forget(&*fd);
            }
            *watched = room;
        }
        Ok(())
    }

    /// Stops the process for a while, as its shell asked, with the terminal as it was.
    pub fn suspend(&self) {
        terminal::restore();
        sys::stop_self();
    }

    /// The process goes on, perhaps in the foreground.
    pub fn go_on(&self) {
        if self.keys.is_some() && terminal::is_ours() {
            let _ = terminal::make_raw();
        }
    }

    /// A vCPU may wait for a reader: the event loop is there to write for it.
    pub fn hold(&self) {
        for output in self.outputs() {
            output.hold();
        }
    }

    /// No vCPU waits for a reader any more.
    pub fn release(&self) {
        for output in self.outputs() {
            output.release();
        }
    }

    fn outputs(&self) -> impl Iterator<Item = &Output> {
        [&self.serial, &self.console, &self.trace].into_iter().flatten()
    }

    /// Writes out what is left, for at most `patience`, and says what was lost.
    pub fn finish(&mut self, patience: Duration) {
        for flusher in &mut self.flushers {
            let (lost, closed) = flusher.finish(patience);
            if lost > 0 {
                let why = if closed { "its reader is gone" } else { "its reader does not read" };
                say(&format!("bantam: {lost} bytes of output were lost: {why}"));
            }
        }
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        terminal::restore();
        if let Some((_, path)) = &self.listener {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A file to write to; a FIFO without a reader is an error, not a wait.
fn create(path: &Path) -> std::io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    File::options().write(true).create(true).truncate(true).custom_flags(flags).open(path)
}

fn listen(path: &Path) -> Result<UnixListener> {
    let listener = UnixListener::bind(path).map_err(|e| {
        let refusal = refuse(format!("--serial unix:{}: {e}", path.display()));
        let taken = e.kind() == std::io::ErrorKind::AddrInUse;
        if taken { refusal.hint("remove the file if no other machine uses it") } else { refusal }
    })?;
    listener.set_nonblocking(true).context("--serial")?;
    Ok(listener)
}

impl AsFd for Streams {
    fn as_fd(&self) -> rustix::fd::BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
