//! The machine's ends of stdin, stdout, stderr, files and sockets, as the event loop serves them.
//!
//! One set serves all lives of a machine (`--reboot`). Invariant: nothing here blocks but [`Streams::finish`], which is
//! bounded.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::fd::{AsFd, OwnedFd};

use super::control::Control;
use super::port::{CONSOLE, Port, SERIAL, Target, create};
use crate::arch;
use crate::config::{Config, Serial};
use crate::console::{HostConsole, HostTerminal, Tail, Until};
use crate::event::Readiness;
use crate::host::input::Input;
use crate::host::output::{Bell, DELAY, Flusher, Left, Output, output};
use crate::host::say::say;
use crate::host::{sys, terminal};

/// How long a device that was busy is left alone before it is told again of its input.
const RETELL: Duration = Duration::from_millis(1);

/// All streams of one machine.
pub struct Streams {
    bell: Bell,
    stdout: Option<Output>,
    /// The serial port, and the console on virtio where there is one.
    ports: Vec<Port>,
    trace: Option<Output>,
    /// Where the trace for a viewer goes, at the end.
    recording: Option<File>,
    flushers: Vec<Flusher>,
    until: Option<String>,
    tail: Option<Tail>,
    flush_at: Option<Instant>,
    /// The serial device was busy when input came: tell it again.
    retell: bool,
    /// The control socket: the event loop's, beside the streams.
    pub(super) control: Control,
}

/// What a person or a guest asked for through a stream.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Wish {
    /// ctrl-a x, or ctrl-c before the guest listens (the latter as a signal number).
    pub end: Option<Ended>,
    /// There is input for the serial port.
    pub input: bool,
}

/// How the machine was ended from a stream, most of the time by a person from the keyboard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// ctrl-a x.
    Quit,
    /// ctrl-c.
    Interrupt,
    /// ctrl-a r: not for good.
    Report,
    /// Not a person: the console on virtio has shown the text of `--until`.
    Until,
}

impl Streams {
    /// Opens what `config` asks for.
    ///
    /// # Errors
    /// A file or socket cannot be made.
    pub fn open(config: &Config) -> Result<Self> {
        let bell = Bell::new().context("eventfd")?;
        // Before any file: a machine whose name is taken leaves those of the one that has it alone.
        let control = Control::open(config, bell.clone())?;
        let console = config.console.as_ref().filter(|_| config.has_console());
        // What is typed goes to one port only.
        let typed = console != Some(&Serial::Stdio);
        let mut opened = vec![Port::open(SERIAL, &config.serial, typed, bell.clone())?];
        if let Some(to) = console {
            opened.push(Port::open(CONSOLE, to, true, bell.clone())?);
        }
        let mut streams = Self {
            bell,
            stdout: None,
            ports: Vec::new(),
            trace: None,
            recording: None,
            flushers: Vec::new(),
            until: config.until.clone(),
            tail: (config.platform == arch::LINUX_PLATFORM).then(Tail::default),
            flush_at: None,
            retell: false,
            control,
        };
        if config.debugcon.is_some() || opened.iter().any(|(_, target)| matches!(target, Target::Stdout)) {
            let stdout = rustix::io::dup(rustix::stdio::stdout()).context("stdout")?;
            streams.stdout = Some(streams.output(Some(stdout)).context("stdout")?);
        }
        for (mut port, target) in opened {
            let (output, flusher) = streams.target(target)?;
            port.connect(output, flusher);
            streams.ports.push(port);
        }
        if let Some(path) = &config.trace {
            let file = || create(path).with_context(|| format!("--trace={}", path.display()));
            if path.extension().is_some_and(|e| e == "json") {
                streams.recording = Some(file()?);
            } else {
                let to = match path.as_os_str() == "-" {
                    true => rustix::io::dup(rustix::stdio::stderr()).context("stderr")?,
                    false => file()?.into(),
                };
                streams.trace = Some(streams.output(Some(to))?);
            }
        }
        Ok(streams)
    }

    /// Where a port's output goes, and which flusher carries it.
    fn target(&mut self, target: Target) -> Result<(Option<Output>, usize)> {
        let own = self.flushers.len();
        Ok(match target {
            Target::None => (None, own),
            Target::Stdout => (self.stdout.clone(), 0),
            Target::File(fd) => (Some(self.output(Some(fd))?), own),
            Target::Socket => (Some(self.output(None)?), own),
        })
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
        self.port_wire(self.ports.first())
    }

    /// A wire for the debug console.
    pub fn debug_console(&self) -> HostConsole {
        self.wire(self.stdout.clone(), None)
    }

    /// The far end of the console on virtio.
    pub fn terminal(&self) -> Option<HostTerminal> {
        let far = |port: &Port| Some(HostTerminal { wire: self.port_wire(Some(port)), link: port.link.clone()? });
        self.ports.iter().find_map(far)
    }

    fn port_wire(&self, port: Option<&Port>) -> HostConsole {
        let (output, input) = (port.and_then(|port| port.output.clone()), port.map(|port| port.input.clone()));
        HostConsole { tail: self.tail.clone(), ..self.wire(output, input) }
    }

    fn wire(&self, output: Option<Output>, input: Option<Arc<Input>>) -> HostConsole {
        HostConsole { output, input, until: self.until.as_deref().map(Until::new), tail: None }
    }

    /// The last lines that the guest wrote to its consoles.
    pub fn last_lines(&self) -> Vec<String> {
        self.tail.as_ref().map(Tail::lines).unwrap_or_default()
    }

    /// Where trace lines go.
    pub fn trace(&self) -> Option<Output> {
        self.trace.clone()
    }

    /// Whether the trace is one for a viewer.
    pub fn records(&self) -> bool {
        self.recording.is_some()
    }

    /// The file for such a trace, once.
    pub fn take_recording(&mut self) -> Option<File> {
        self.recording.take()
    }

    /// Starts watching. The bell itself is the caller's to watch.
    ///
    /// # Errors
    /// The host refuses.
    pub fn watch(&mut self, readiness: &Readiness) -> Result<()> {
        self.ports.iter_mut().try_for_each(|port| port.watch(readiness))
    }

    /// When [`Streams::serve`] wants to be called even if nothing happens.
    pub fn deadline(&self) -> Option<Instant> {
        let retell = self.retell.then(|| Instant::now() + RETELL);
        self.ports.iter().map(Port::deadline).chain([retell, self.flush_at]).flatten().min()
    }

    /// Does what there is to do. `ready`: the tokens that are.
    ///
    /// # Errors
    /// The host refuses to watch stdin.
    pub fn serve(&mut self, readiness: &Readiness, ready: &[u64]) -> Result<Wish> {
        self.flush_due();
        let mut wish = Wish { end: None, input: std::mem::take(&mut self.retell) };
        for port in &mut self.ports {
            let own = port.serve(readiness, ready, &mut self.flushers)?;
            wish = Wish { end: wish.end.or(own.end), input: wish.input || own.input };
        }
        Ok(wish)
    }

    /// The terminal may have another size.
    pub fn resized(&self) {
        self.ports.iter().for_each(Port::resized);
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

    /// Stops the process for a while, as its shell asked, with the terminal as it was.
    pub fn suspend(&self) {
        terminal::restore();
        sys::stop_self();
    }

    /// The process goes on, perhaps in the foreground.
    pub fn go_on(&self) {
        if self.ports.iter().any(Port::has_keys) && terminal::is_ours() {
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
        let ports = self.ports.iter().filter_map(|port| port.output.as_ref());
        ports.chain(&self.stdout).chain(&self.trace)
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
    }
}

impl AsFd for Streams {
    fn as_fd(&self) -> rustix::fd::BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
