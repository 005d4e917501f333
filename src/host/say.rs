//! What Bantam says to a person, on stderr: whole lines, nothing forged, never blocking for long.

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::stdio::stderr;

/// How long one piece of a line may wait for a reader of stderr.
const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
/// A pipe that is ready takes this much without blocking (PIPE_BUF is at least 512).
const PIECE: usize = 512;

/// Writes lines to stderr. Line ends in `text` stay; other control characters are shown as escapes.
pub fn say(text: &str) {
    let mut line = printable(text);
    line.push('\n');
    for piece in line.as_bytes().chunks(PIECE) {
        let mut rest = piece;
        while !rest.is_empty() {
            let stderr = stderr();
            let mut ready = [PollFd::new(&stderr, PollFlags::OUT)];
            match poll(&mut ready, Some(&PATIENCE)) {
                Ok(0) => return,
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(_) => return,
            }
            match rustix::io::write(stderr, rest) {
                Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                Err(_) => return,
            }
        }
    }
}

/// Writes to stdout what a command was asked for; a reader that has gone has seen enough. Gives the exit status 0.
///
/// # Errors
/// Stdout cannot be written to.
pub fn print(bytes: &[u8]) -> anyhow::Result<u8> {
    use std::io::Write;
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(e).context("writing to stdout"),
        _ => Ok(0),
    }
}

/// The text with every control character but the line end escaped, so that no guest byte can move a cursor, change a
/// colour or forge a line.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() && c != '\n' { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_shown_not_sent() {
        assert_eq!(printable("a\x1b[2Jb\rc\u{9b}d\ne"), "a\\u{1b}[2Jb\\rc\\u{9b}d\ne");
    }
}
