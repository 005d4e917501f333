//! The terminal on stdin: raw while a guest reads it, put back on every way out.
//!
//! Invariant: once [`make_raw`] has changed the terminal, [`restore`] undoes it; it may be called from a panic hook or
//! a signal handler, and any number of times.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::stdio::stdin;
use rustix::termios::{OptionalActions, OutputModes, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr};

static BEFORE: OnceLock<Termios> = OnceLock::new();
static RAW: AtomicBool = AtomicBool::new(false);

/// Stdin is a terminal and this process may change it (it is not in the background).
pub fn is_ours() -> bool {
    isatty(stdin()) && tcgetpgrp(stdin()).is_ok_and(|group| group == rustix::process::getpgrp())
}

/// Gives every key to the guest: no line editing, echo or signals; output is still translated, since bare-metal guests
/// end their lines with a bare line feed.
pub fn make_raw() -> rustix::io::Result<()> {
    let before = match BEFORE.get() {
        Some(before) => before,
        None => {
            let now = tcgetattr(stdin())?;
            BEFORE.get_or_init(|| now)
        }
    };
    let mut raw = before.clone();
    raw.make_raw();
    raw.output_modes.insert(OutputModes::OPOST | OutputModes::ONLCR);
    RAW.store(true, Ordering::SeqCst);
    tcsetattr(stdin(), OptionalActions::Now, &raw)
}

/// Puts the terminal back as it was.
pub fn restore() {
    // From the background the terminal is someone else's.
    if RAW.swap(false, Ordering::SeqCst)
        && is_ours()
        && let Some(before) = BEFORE.get()
    {
        let _ = tcsetattr(stdin(), OptionalActions::Now, before);
    }
}

/// Columns and rows of the terminal on stdout, where there is one.
pub fn size() -> Option<[u16; 2]> {
    let size = rustix::termios::tcgetwinsize(rustix::stdio::stdout()).ok()?;
    Some([size.ws_col, size.ws_row])
}
