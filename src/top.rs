//! `bantam ps`, `top`, `stop`, `pause`, `resume` and `balloon`: what the control sockets of this user's machines say.

mod screen;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ratatui_core::layout::{Constraint, Layout};
use ratatui_core::style::Stylize;
use ratatui_core::terminal::{Frame, Terminal};
use ratatui_core::text::{Line, Text};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use serde_json::Value;

use self::screen::{ENTER, LEAVE, Screen};
use crate::config::Size;
use crate::control::{self, Info, Request, State};
use crate::host::say::{print, printable};
use crate::host::{sys, terminal};

const SECOND: Duration = Duration::from_secs(1);
/// How often a machine that was told to count is asked whether it does.
const TRIES: u32 = 20;

fn age(seconds: f64) -> String {
    // Ages are positive and small; the cast stops at the largest number.
    let seconds = seconds as u64;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86_400 => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {:02} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// The list of machines, one a line.
fn list(machines: &[Info]) -> String {
    let width = |of: fn(&Info) -> &str, least: usize| {
        machines.iter().map(|info| of(info).chars().count()).max().unwrap_or(0).max(least)
    };
    let (names, guests) = (width(|i| &i.name, 4), width(|i| &i.guest, 5));
    let line = |name: &str, [pid, age, state]: [&str; 3], guest: &str, [cpus, memory, balloon, exits]: [&str; 4]| {
        let who = format!("{name:names$} {pid:>8} {age:>11}  {state:7} {guest:guests$}");
        let line = format!("{who} {cpus:>4} {memory:>8} {balloon:>8} {exits:>10}");
        printable(&line).replace('\n', "\\n") + "\n"
    };
    let mut text = line("NAME", ["PID", "AGE", "STATE"], "GUEST", ["CPUS", "MEMORY", "BALLOON", "EXITS/S"]);
    for info in machines {
        let exits = info.exits_per_second.map_or("-".into(), |exits| format!("{exits:.0}"));
        let balloon = info.balloon.map_or("-".into(), |size| Size(size).to_string());
        let rest = [info.cpus.to_string(), Size(info.memory).to_string(), balloon, exits];
        let [cpus, memory, balloon, exits] = &rest;
        let state = if info.state == State::Paused { "paused" } else { "running" };
        let who = [&info.pid.to_string(), &age(info.age), state];
        text += &line(&info.name, who, &info.guest, [cpus, memory, balloon, exits]);
    }
    text
}

/// Lists the machines.
///
/// # Errors
/// Stdout cannot be written to, or the folder of the sockets is not this user's alone.
pub fn ps() -> Result<u8> {
    print(list(&control::machines()?).as_bytes())
}

/// Has a machine end, and waits until it has.
///
/// # Errors
/// There is no such machine.
pub fn stop(name: &str) -> Result<u8> {
    let pid = control::ask(name, &Request::Ping {})?["pid"].clone();
    control::ask(name, &Request::Stop {})?;
    while control::lives(name, &pid) {
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(0)
}

/// Asks a machine for something that it answers once it is done, and that says nothing.
///
/// # Errors
/// There is no such machine, or it has ended.
pub fn ask(name: &str, request: &Request) -> Result<u8> {
    control::ask(name, request).map(|_| 0)
}

/// Has a machine write a snapshot of itself, or what has changed since the last one, and says how long it stood still.
///
/// # Errors
/// There is no such machine, or it cannot: the folder is there already, or cannot be written, or there was none before.
pub fn snapshot(name: &str, folder: &Path, diff: bool, disks: Option<&Path>) -> Result<u8> {
    let whole = |path: &Path| std::path::absolute(path).with_context(|| path.display().to_string());
    let made = disks.filter(|disks| !disks.exists());
    made.map_or(Ok(()), std::fs::create_dir).context("a folder for copies of disks")?;
    let (path, disks) = (whole(folder)?, disks.map(whole).transpose()?);
    let told = control::ask(name, &Request::Snapshot { path, keep: true, diff, disks }).inspect_err(|_| {
        // Unless something is in it.
        let _ = made.map(std::fs::remove_dir);
    })?;
    let (memory, seconds) = (told["memory"].as_u64().unwrap_or(0), told["seconds"].as_f64().unwrap_or(0.0));
    let why = told["copied"].as_str().map(|why| format!(", until all was written ({})", printable(why)));
    let why = why.unwrap_or_default();
    print(format!("{} of RAM; the machine stood still for {:.1} ms{why}\n", Size(memory), seconds * 1e3).as_bytes())
}

/// Has a machine write a snapshot of itself that nobody is to keep, and copies of the disks that it writes to if there is a
/// folder for those; gives how long it stood still.
///
/// # Errors
/// There is no such machine, or it cannot.
pub fn hand_over(name: &str, folder: &Path, disks: Option<&Path>) -> Result<Duration> {
    let (path, disks) = (folder.to_owned(), disks.map(Path::to_owned));
    let told = control::ask(name, &Request::Snapshot { path, keep: false, diff: false, disks })?;
    Ok(Duration::try_from_secs_f64(told["seconds"].as_f64().unwrap_or(0.0)).unwrap_or_default())
}

/// How long a guest gets until what its balloon holds is shown, and how often it is looked at meanwhile.
const INFLATES: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(50);

/// Tells a machine's balloon how large it shall be, waits for it as long as it moves, and shows it.
///
/// # Errors
/// There is no such machine, or it has no balloon.
pub fn balloon(name: &str, size: Option<Size>) -> Result<u8> {
    let mut told = control::ask(name, &Request::Balloon { size: size.map(|size| size.0) })?;
    let end = Instant::now() + INFLATES;
    while size.is_some() && told["actual"] != told["target"] && Instant::now() < end {
        std::thread::sleep(LOOK);
        told = control::ask(name, &Request::Balloon { size: None })?;
    }
    let number = |name: &str| Size(told[name].as_u64().unwrap_or(0));
    let (actual, target, given_back) = (number("actual"), number("target"), number("given_back"));
    let wanted = if actual == target { String::new() } else { format!(" of {target}") };
    print(format!("{actual}{wanted} in the balloon; {given_back} given back to the host in all\n").as_bytes())
}

/// What is compared from one second to the next.
#[derive(Default, Clone, Copy)]
struct Sample {
    uptime: f64,
    exits: f64,
    guest: f64,
    vmm: f64,
    halted: f64,
}

impl Sample {
    fn of(report: &Value) -> Self {
        let cpus = report["time"]["cpus"].as_array().map_or(&[][..], Vec::as_slice);
        let sum = |name: &str| cpus.iter().filter_map(|cpu| cpu[name].as_f64()).sum();
        Self {
            uptime: report["time"]["uptime_ns"].as_f64().unwrap_or(0.0) / 1e9,
            exits: report["exits"]["total"].as_f64().unwrap_or(0.0),
            guest: sum("guest_and_kvm_ns"),
            vmm: sum("vmm_ns"),
            halted: sum("halted_ns"),
        }
    }

    /// The last second in a line.
    fn since(&self, before: &Self) -> String {
        let span = (self.uptime - before.uptime).max(1e-9);
        let (guest, vmm, halted) = (self.guest - before.guest, self.vmm - before.vmm, self.halted - before.halted);
        let all = (guest + vmm + halted).max(1.0);
        format!(
            "{:.1} s: {:.0} exits a second; guest and KVM {:.1} %, VMM {:.1} %, halted {:.1} %; {} exits in all",
            self.uptime,
            (self.exits - before.exits).max(0.0) / span,
            guest.max(0.0) / all * 100.0,
            vmm.max(0.0) / all * 100.0,
            halted.max(0.0) / all * 100.0,
            self.exits,
        )
    }
}

/// Shows a machine's statistics until it ends, or somebody types q; has it begin to count if it does not.
///
/// # Errors
/// There is no such machine.
pub fn top(name: &str) -> Result<u8> {
    let mut first = control::ask(name, &Request::Stats { start: true })?;
    for _ in 0..TRIES {
        if !first.is_null() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
        first = control::ask(name, &Request::Stats { start: true })?;
    }
    if !rustix::termios::isatty(rustix::stdio::stdout()) || !terminal::is_ours() {
        return show(name, first, None);
    }
    // A signal must not leave the terminal raw.
    let signals = sys::control_signals(None).context("taking over the process's signals")?;
    enter()?;
    let result = Terminal::new(Screen::default())
        .context("the terminal")
        .and_then(|window| show(name, first, Some((signals, window))));
    leave();
    result
}

/// Takes the terminal.
fn enter() -> Result<()> {
    terminal::make_raw().context("the terminal")?;
    print(ENTER.as_bytes()).map(|_| ())
}

/// Gives it back; who hung up takes no more bytes.
fn leave() {
    let _ = print(LEAVE.as_bytes());
    terminal::restore();
}

/// What fills the screen: the last second, a part in a line, the table as far as there is room, and the key.
fn draw(frame: &mut Frame, name: &str, line: &str, table: &str) {
    let mut second = line.split("; ").map(Line::from).collect::<Text>();
    if let Some(first) = second.lines.first_mut() {
        first.spans.splice(0..0, [printable(name).bold(), ": ".into()]);
    }
    // And an empty line.
    let rows = u16::try_from(second.height()).unwrap_or(u16::MAX).saturating_add(1);
    let parts = [Constraint::Length(rows), Constraint::Min(0), Constraint::Length(1)];
    let [head, body, foot] = Layout::vertical(parts).areas(frame.area());
    frame.render_widget(second, head);
    frame.render_widget(Text::raw(printable(table)), body);
    frame.render_widget(Line::from("q quits".dim()), foot);
}

fn show(name: &str, mut answer: Value, mut screen: Option<(OwnedFd, Terminal<Screen>)>) -> Result<u8> {
    let mut before = Sample::default();
    loop {
        let now = Sample::of(&answer["report"]);
        let line = now.since(&before);
        if let Some((_, window)) = &mut screen {
            let table = answer["table"].as_str().unwrap_or_default();
            window.draw(|frame| draw(frame, name, &line, table))?;
        } else {
            print((line + "\n").as_bytes())?;
        }
        before = now;
        match &mut screen {
            None => std::thread::sleep(SECOND),
            Some((signals, window)) => {
                if let Some(status) = quit(signals, window)? {
                    return Ok(status);
                }
            }
        }
        match control::ask(name, &Request::Stats { start: true }) {
            Ok(next) if !next.is_null() => answer = next,
            // A machine that reboots may be between two lives.
            Ok(_) => {}
            // It has ended, and so does this.
            Err(_) => return Ok(0),
        }
    }
}

/// Waits a second for a key, q or ctrl-c, and for signals. A status when it is time to end.
fn quit(signals: &OwnedFd, window: &mut Terminal<Screen>) -> Result<Option<u8>> {
    let stdin = rustix::stdio::stdin();
    let patience = Timespec { tv_sec: 1, tv_nsec: 0 };
    let mut both = [PollFd::new(&stdin, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
    let _ = poll(&mut both, Some(&patience));
    let [typed, signalled] = both.map(|fd| !fd.revents().is_empty());
    match sys::next_signal(signals).filter(|_| signalled) {
        Some(sys::SIGTSTP) => {
            leave();
            sys::stop_self();
            enter()?;
            window.clear()?;
        }
        // Others may have written to it meanwhile.
        Some(sys::SIGCONT) => window.clear()?,
        Some(sys::SIGWINCH) | None => {}
        Some(number) => return Ok(Some(128u8.saturating_add(u8::try_from(number).unwrap_or(0)))),
    }
    let mut keys = [0; 64];
    let count = if typed { rustix::io::read(stdin, &mut keys).unwrap_or(0) } else { return Ok(None) };
    let end = count == 0 || keys.iter().take(count).any(|key| matches!(key, b'q' | b'Q' | 3));
    Ok(end.then_some(0))
}

#[cfg(test)]
mod tests {
    use ratatui_core::backend::TestBackend;

    use super::*;

    #[test]
    fn machines_are_listed_in_columns_and_forge_no_lines() {
        let info = Info {
            name: "web".into(),
            pid: 7,
            age: 3725.0,
            state: State::Paused,
            guest: "a\nb\x1b[2J".into(),
            cpus: 2,
            memory: 1 << 29,
            exits_per_second: Some(12.3),
            balloon: Some(3 << 20),
        };
        let text = list(&[info.clone(), Info { exits_per_second: None, ..info }]);
        assert_eq!(text.lines().count(), 3);
        assert!(
            text.contains("1 h 02 min  paused  a") && text.contains("512M") && text.contains(" 3M         12\n"),
            "{text}"
        );
        assert!(!text.contains('\x1b') && text.trim_end().ends_with('-'), "{text}");
    }

    #[test]
    fn what_is_shown_has_the_size_of_the_screen() {
        let mut window = Terminal::new(TestBackend::new(12, 6)).unwrap();
        window.draw(|frame| draw(frame, "a\x1bb", "1.0 s: 5; VMM 1 %", "one\ntwo\nthree")).unwrap();
        window.backend().assert_buffer_lines([
            Line::from(vec!["a\\u{1b}b".bold(), ": 1.".into()]),
            "VMM 1 %".into(),
            "".into(),
            "one".into(),
            "two".into(),
            "q quits".dim().into(),
        ]);
    }

    #[test]
    fn a_second_is_the_difference_of_two_samples() {
        let before = Sample { uptime: 1.0, exits: 100.0, guest: 1e9, vmm: 0.0, halted: 0.0 };
        let now = Sample { uptime: 2.0, exits: 600.0, guest: 1.5e9, vmm: 1e8, halted: 4e8 };
        let line = now.since(&before);
        assert!(
            line.starts_with("2.0 s: 500 exits a second; guest and KVM 50.0 %, VMM 10.0 %, halted 40.0 %"),
            "{line}"
        );
        assert_eq!([0.5, 61.0, 90_000.0].map(age), ["0 s", "1 min", "1 d 01 h"]);
    }
}
