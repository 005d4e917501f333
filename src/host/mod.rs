//! The host's side of things: signals, terminal, standard streams. Knows nothing of machines.

use anyhow::Context;

#[cfg(debug_assertions)]
pub mod fault;
pub mod file;
pub mod input;
pub mod output;
pub mod say;
pub mod socket;
pub mod sys;
pub mod terminal;

/// Random bytes that nobody can know; waits for them where the host has just started.
///
/// # Errors
/// The host has none.
pub fn random<const N: usize>() -> anyhow::Result<[u8; N]> {
    let mut bytes = [0; N];
    // As many as are asked for: up to 256 there is no other way (getrandom(2)).
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).context("getrandom")?;
    Ok(bytes)
}

/// Makes every way out of this process put the terminal back and end with a status from the table: a panic is 101, a
/// crash 128 + n.
pub fn guard() {
    std::panic::set_hook(Box::new(|info| {
        terminal::restore();
        let what = info.payload_as_str().unwrap_or("no message");
        let place = info.location().map_or_else(String::new, |at| format!(" at {}:{}", at.file(), at.line()));
        // The standard library panics where it finds no memory for a thread's signal stack: the host's doing, not a bug.
        if what.starts_with("failed to allocate an alternative stack") || what.starts_with("failed to set up") {
            say::say(&format!("bantam: {what}").replace('\n', " "));
            sys::exit_now(crate::error::status::HOST);
        }
        say::say(&format!("bantam: this is a bug in Bantam: {what}{place}").replace('\n', " "));
        sys::exit_now(crate::error::status::BUG);
    }));
    if let Err(e) = sys::handle_fatal_signals() {
        say::say(&format!("bantam: warning: crashes will not be reported: {e}"));
    }
}

/// Says that this test did not run, to who counts such tests (`cargo xtask test`), and why.
#[cfg(test)]
pub fn skipped(why: &str) {
    use std::io::Write as _;
    let name = std::thread::current().name().unwrap_or("?").to_owned();
    if let Some(path) = std::env::var_os("BANTAM_SKIP_LOG")
        && let Ok(mut log) = std::fs::OpenOptions::new().append(true).create(true).open(path)
    {
        let _ = log.write_all(format!("SKIPPED: {name}: {why}\n").as_bytes());
    }
}
