//! The console wire: what a serial port or a debug console is connected to.
//!
//! Invariant: no call blocks without bound, whatever the other end does; bytes that find no room are counted.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fd::{AsFd, BorrowedFd};

use crate::bus::Effect;
use crate::host::input::Input;
use crate::host::output::{Bell, Output};
use crate::host::say::printable;

/// The two directions of a character device, seen from the guest's side.
pub trait Console: Send {
    /// Takes one byte from the guest. [`Effect::Until`] when it completes the text of `--until`.
    fn put(&mut self, byte: u8) -> Effect;

    /// The next byte for the guest, if there is one.
    fn get(&mut self) -> Option<u8>;

    /// The far end has hung up and all that it sent has been read: the carrier is gone.
    fn hung_up(&self) -> bool;
}

/// Looks for a text in a stream of bytes.
#[derive(Debug, Clone)]
pub struct Until {
    text: Vec<u8>,
    /// For each length of a match, the length of the longest shorter match that it ends with (Knuth-Morris-Pratt).
    fallback: Vec<usize>,
    matched: usize,
}

impl Until {
    /// A matcher for `text`; an empty text never matches.
    pub fn new(text: &str) -> Self {
        let text = text.as_bytes().to_vec();
        let mut fallback = vec![0; text.len()];
        let mut length = 0;
        for (i, byte) in text.iter().enumerate().skip(1) {
            while length > 0 && text.get(length) != Some(byte) {
                length = fallback.get(length - 1).copied().unwrap_or(0);
            }
            length += usize::from(text.get(length) == Some(byte));
            if let Some(slot) = fallback.get_mut(i) {
                *slot = length;
            }
        }
        Self { text, fallback, matched: 0 }
    }

    /// Takes the next byte; true when it completes the text.
    pub fn see(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.text.get(self.matched) != Some(&byte) {
            self.matched = self.fallback.get(self.matched - 1).copied().unwrap_or(0);
        }
        self.matched += usize::from(self.text.get(self.matched) == Some(&byte));
        let complete = self.matched == self.text.len() && !self.text.is_empty();
        if complete {
            self.matched = self.fallback.last().copied().unwrap_or(0);
        }
        complete
    }
}

/// The last that a guest wrote to a console, for the report of its panic. Clones keep the same.
#[derive(Debug, Clone, Default)]
pub struct Tail(Arc<Mutex<VecDeque<u8>>>);

impl Tail {
    /// Bytes that are kept, and lines that are shown.
    const BYTES: usize = 8192;
    const LINES: usize = 24;
    /// How Linux begins to say why it panics. Its trace of calls, which follows, may be longer than those lines.
    const PANIC: &str = "Kernel panic";

    fn push(&self, more: &[u8]) {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for byte in more {
            if bytes.len() >= Self::BYTES {
                bytes.pop_front();
            }
            bytes.push_back(*byte);
        }
    }

    /// The last lines, as text that no terminal acts on; a panic from its beginning.
    pub fn lines(&self) -> Vec<String> {
        let bytes: Vec<u8> = self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes).replace('\r', "");
        let lines: Vec<_> = text.lines().filter(|line| !line.is_empty()).map(printable).collect();
        let panic = lines.iter().rposition(|line| line.contains(Self::PANIC)).unwrap_or(lines.len());
        let first = lines.len().saturating_sub(Self::LINES).min(panic);
        lines.into_iter().skip(first).collect()
    }
}

/// A console whose other end is on the host: output and input may each be missing.
pub struct HostConsole {
    /// Where the guest's bytes go.
    pub output: Option<Output>,
    /// Where bytes for the guest come from.
    pub input: Option<Arc<Input>>,
    /// Ends the machine, where asked for.
    pub until: Option<Until>,
    /// Keeps the last of the output.
    pub tail: Option<Tail>,
}

impl Console for HostConsole {
    fn put(&mut self, byte: u8) -> Effect {
        if let Some(output) = &self.output {
            output.push(byte);
        }
        if let Some(tail) = &self.tail {
            tail.push(&[byte]);
        }
        let seen = self.until.as_mut().is_some_and(|until| until.see(byte));
        if seen { Effect::Until } else { Effect::None }
    }

    fn get(&mut self) -> Option<u8> {
        self.input.as_ref()?.get()
    }

    fn hung_up(&self) -> bool {
        self.input.as_ref().is_none_or(|input| input.hung_up())
    }
}

/// The far end of a device that moves bytes by the buffer and may make nobody wait, whatever the other side does.
pub trait Terminal: Send {
    /// Takes bytes from the guest; gives how many. Where that is not all, the bell rings when it is worth another try.
    fn put(&mut self, bytes: &[u8]) -> usize;

    /// Bytes from the guest were given up.
    fn lose(&mut self, count: u64);

    /// There are bytes for the guest; if not, the bell rings when there are. Not to be asked before the guest listens.
    fn waiting(&self) -> bool;

    /// Puts bytes for the guest into `into`; gives how many.
    fn get(&mut self, into: &mut [u8]) -> usize;

    /// Columns and rows, where somebody sees them; the bell rings when they change.
    fn size(&self) -> Option<[u16; 2]>;

    /// Rings.
    fn bell(&self) -> BorrowedFd<'_>;

    /// Rings the bell: there is more to do than fits into one turn.
    fn ring(&self);
}

/// What the event loop and the far end of a terminal know of each other. Clones are the same.
#[derive(Clone)]
pub struct Link(Arc<Both>);

struct Both {
    /// The device's.
    bell: Bell,
    /// The event loop's.
    home: Bell,
    /// Columns and rows; 0 where nobody sees them.
    size: AtomicU32,
    until_seen: AtomicBool,
}

impl Link {
    /// Between a device and the event loop whose bell is `home`.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn new(home: Bell) -> rustix::io::Result<Self> {
        let (size, until_seen) = (AtomicU32::new(0), AtomicBool::new(false));
        Ok(Self(Arc::new(Both { bell: Bell::new()?, home, size, until_seen })))
    }

    /// Rings at the device.
    pub fn bell(&self) -> &Bell {
        &self.0.bell
    }

    /// So large is the terminal now.
    pub fn resize(&self, [columns, rows]: [u16; 2]) {
        let size = u32::from(columns) << 16 | u32::from(rows);
        if self.0.size.swap(size, Ordering::AcqRel) != size {
            self.0.bell.ring();
        }
    }

    /// The guest has shown the text of `--until`.
    pub fn has_seen_until(&self) -> bool {
        self.0.until_seen.load(Ordering::Acquire)
    }
}

/// A terminal whose other end is on the host.
pub struct HostTerminal {
    /// Where bytes go and come from, the text of `--until`, and who keeps the last of the output.
    pub wire: HostConsole,
    /// To the event loop.
    pub link: Link,
}

impl Terminal for HostTerminal {
    fn put(&mut self, bytes: &[u8]) -> usize {
        if self.link.has_seen_until() {
            return 0;
        }
        let HostConsole { output, until, tail, .. } = &mut self.wire;
        // What is to end the machine is the last that is shown.
        let mut ahead = until.clone();
        let end = ahead.as_mut().and_then(|until| bytes.iter().position(|byte| until.see(*byte)));
        let most = end.map_or(bytes, |end| bytes.get(..=end).unwrap_or(bytes));
        let taken = output.as_ref().map_or(most.len(), |output| output.offer(most, &self.link.0.bell));
        let bytes = bytes.get(..taken).unwrap_or_default();
        if let Some(tail) = tail {
            tail.push(bytes);
        }
        let seen = until.as_mut().is_some_and(|until| bytes.iter().any(|byte| until.see(*byte)));
        if seen {
            self.link.0.until_seen.store(true, Ordering::Release);
            self.link.0.home.ring();
        }
        taken
    }

    fn lose(&mut self, count: u64) {
        if let Some(output) = &self.wire.output {
            output.lose(count);
        }
    }

    fn waiting(&self) -> bool {
        self.wire.input.as_ref().is_some_and(|input| input.waiting())
    }

    fn get(&mut self, into: &mut [u8]) -> usize {
        let Some(input) = &self.wire.input else { return 0 };
        let bytes = into.iter_mut().map_while(|slot| input.get().map(|byte| *slot = byte));
        bytes.count()
    }

    fn size(&self) -> Option<[u16; 2]> {
        let size = self.link.0.size.load(Ordering::Acquire);
        (size != 0).then_some([(size >> 16) as u16, (size & 0xffff) as u16])
    }

    fn bell(&self) -> BorrowedFd<'_> {
        self.link.0.bell.as_fd()
    }

    fn ring(&self) {
        self.link.0.bell.ring();
    }
}

/// A console whose other end is a test.
#[derive(Debug, Clone, Default)]
pub struct TestConsole {
    /// What the guest wrote.
    pub output: Arc<Mutex<Vec<u8>>>,
    /// What the guest will read.
    pub input: Arc<Mutex<VecDeque<u8>>>,
    /// No more will come.
    pub closed: bool,
}

impl Console for TestConsole {
    fn put(&mut self, byte: u8) -> Effect {
        self.output.lock().unwrap_or_else(PoisonError::into_inner).push(byte);
        Effect::None
    }

    fn get(&mut self) -> Option<u8> {
        self.input.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    fn hung_up(&self) -> bool {
        self.closed && self.input.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn until_finds_its_text_wherever_it_starts() {
        for (text, stream, at) in [
            ("login:", "xx login:", Some(8)),
            ("aab", "aaab", Some(3)),
            ("abab", "abacabab", Some(7)),
            ("\n", "a\n", Some(1)),
            ("", "abc", None),
            ("x", "abc", None),
        ] {
            let mut until = Until::new(text);
            assert_eq!(stream.bytes().position(|b| until.see(b)), at, "{text:?} in {stream:?}");
        }
    }

    #[test]
    fn what_ends_the_machine_is_the_last_that_a_terminal_shows() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let home = Bell::new().unwrap();
        let (output, mut flusher) = crate::host::output::output(Some(write), home.clone()).unwrap();
        let until = Some(Until::new("login:"));
        let wire = HostConsole { output: Some(output), input: None, until, tail: Some(Tail::default()) };
        let mut terminal = HostTerminal { wire, link: Link::new(home).unwrap() };
        assert_eq!((terminal.put(b"host lo"), terminal.put(b"gin: x")), (7, 4));
        assert!(terminal.link.has_seen_until() && terminal.put(b" more") == 0);
        flusher.flush();
        let mut bytes = [0; 64];
        let count = rustix::io::read(&read, &mut bytes).unwrap();
        assert_eq!(&bytes[..count], b"host login:");
        assert_eq!(terminal.wire.tail.unwrap().lines(), ["host login:"]);
    }

    #[test]
    fn a_terminal_has_the_size_that_it_was_told_and_rings_when_that_changes() {
        let input = Input::new(Bell::new().unwrap());
        let wire = HostConsole { output: None, input: Some(input.clone()), until: None, tail: None };
        let mut terminal = HostTerminal { wire, link: Link::new(Bell::new().unwrap()).unwrap() };
        input.tell(terminal.link.bell().clone());
        let rung = |terminal: &HostTerminal| rustix::io::read(terminal.link.bell(), &mut [0; 8]).is_ok();
        assert_eq!(terminal.size(), None);
        terminal.link.resize([132, 43]);
        assert!(terminal.size() == Some([132, 43]) && rung(&terminal));
        terminal.link.resize([132, 43]);
        assert!(!rung(&terminal) && !terminal.waiting() && input.is_wanted());
        input.put(b"abc");
        let mut bytes = [0; 8];
        assert!(rung(&terminal) && terminal.waiting());
        assert_eq!((terminal.get(&mut bytes), &bytes[..3], terminal.put(b"nowhere")), (3, &b"abc"[..], 7));
    }

    #[test]
    fn the_last_lines_are_kept_within_bounds_and_harmless() {
        let tail = Tail::default();
        (0..1000).for_each(|n| format!("line {n}\r\n").bytes().for_each(|byte| tail.push(&[byte])));
        tail.push(b"\x1b[2J\xff");
        let lines = tail.lines();
        assert_eq!((lines.len(), &*lines[22], &*lines[23]), (24, "line 999", "\\u{1b}[2J\u{fffd}"));
        let text = "\nKernel panic - not syncing: why\n".to_owned() + &"  a_call+0x1/0x2\n".repeat(50);
        tail.push(text.as_bytes());
        let lines = tail.lines();
        assert_eq!((lines.len(), &*lines[0]), (51, "Kernel panic - not syncing: why"));
    }

    proptest::proptest! {
        #[test]
        fn until_agrees_with_a_plain_search(text in "[ab]{1,5}", stream in "[ab]{0,40}") {
            let mut until = Until::new(&text);
            let found = stream.bytes().position(|b| until.see(b));
            proptest::prop_assert_eq!(found, stream.find(&text).map(|i| i + text.len() - 1));
        }
    }
}
