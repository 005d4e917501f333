//! The console wire: what a serial port or a debug console is connected to.
//!
//! Invariant: no call blocks without bound, whatever the other end does; bytes that find no room are counted.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use crate::bus::Effect;
use crate::host::input::Input;
use crate::host::output::Output;

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

/// A console whose other end is on the host: output and input may each be missing.
pub struct HostConsole {
    /// Where the guest's bytes go.
    pub output: Option<Output>,
    /// Where bytes for the guest come from.
    pub input: Option<Arc<Input>>,
    /// Ends the machine, where asked for.
    pub until: Option<Until>,
}

impl Console for HostConsole {
    fn put(&mut self, byte: u8) -> Effect {
        if let Some(output) = &self.output {
            output.push(byte);
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

    proptest::proptest! {
        #[test]
        fn until_agrees_with_a_plain_search(text in "[ab]{1,5}", stream in "[ab]{0,40}") {
            let mut until = Until::new(&text);
            let found = stream.bytes().position(|b| until.see(b));
            proptest::prop_assert_eq!(found, stream.find(&text).map(|i| i + text.len() - 1));
        }
    }
}
