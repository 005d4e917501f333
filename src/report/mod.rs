//! What a dead guest leaves behind, on a page a person can act on: what happened in words, what to look at, and for the
//! CPU that died its registers, page walks, instructions, stack and callers. `ctrl-a r` shows it of a machine that runs.
//!
//! Invariant: everything printed is numbers and our own words; reading guest memory is bounded, follows no address
//! unchecked and never fails the report.

pub mod core;

use std::fmt::Write;

use crate::arch::{CpuState, Line, bytes, word};
use crate::bus::FaultInfo;
use crate::memory::Memory;
use crate::trace::Recent;
use crate::vcpu::Vcpu;

/// Bytes shown at the program counter.
const WINDOW: usize = 16;
/// Instructions shown before it, and from it on.
const BEFORE: usize = 4;
const AFTER: usize = 5;
/// How far back instructions are looked for.
const BACK: u64 = 32;
/// Words of the stack, and callers.
const WORDS: u64 = 12;
const CALLERS: usize = 16;

/// What a report is made of.
#[derive(Clone, Copy)]
pub struct Scene<'a> {
    /// The CPUs, stopped.
    pub vcpus: &'a [Vcpu],
    /// Guest RAM.
    pub memory: &'a Memory,
    /// The last exits, where someone kept them.
    pub recent: &'a Recent,
}

impl Scene<'_> {
    /// The report of a guest that died on CPU `cpu`; `said`: the last lines of its console, where they say why.
    pub fn death(&self, cpu: u32, fault: &FaultInfo, said: &[String]) -> String {
        let mut page = format!("bantam: the guest died: vCPU {cpu}: {}: {}", fault.name, fault.detail);
        if !fault.bytes.is_empty() {
            let _ = write!(page, "\n  KVM could not emulate: {}", hex(&fault.bytes));
        }
        if !said.is_empty() {
            list(&mut page, "the last lines of its console", said);
        }
        // The CPU that died first.
        let (dead, others): (Vec<_>, Vec<_>) = self.vcpus.iter().partition(|vcpu| vcpu.id() == cpu);
        for vcpu in dead {
            self.cpu(&mut page, vcpu, Some(fault));
        }
        self.exits(&mut page);
        for vcpu in others {
            self.short(&mut page, vcpu);
        }
        page
    }

    /// The same page of a machine that still lives.
    pub fn life(&self) -> String {
        let mut page = "bantam: the machine is stopped for this report, and goes on".to_owned();
        for vcpu in self.vcpus {
            self.cpu(&mut page, vcpu, None);
        }
        self.exits(&mut page);
        page
    }

    fn exits(&self, page: &mut String) {
        if !self.recent.lines.is_empty() {
            let order = if self.recent.by_cpu { "of each CPU, its newest last" } else { "the newest last" };
            list(page, &format!("the last exits, {order}"), &self.recent.lines);
        }
    }

    /// A CPU that did not die: its registers.
    fn short(&self, page: &mut String, vcpu: &Vcpu) {
        let _ = write!(page, "\nvCPU {}", vcpu.id());
        let _ = match vcpu.state() {
            Err(e) => write!(page, ": no registers: {e:#}"),
            Ok(state) => write!(page, ": {}, at {:#x}\n{state}", state.mode(), state.pc()),
        };
    }

    fn cpu(&self, page: &mut String, vcpu: &Vcpu, fault: Option<&FaultInfo>) {
        let state = match vcpu.state() {
            Ok(state) => state,
            Err(_) => return self.short(page, vcpu),
        };
        if fault.is_some() && state.is_after_reset() {
            page.push_str(
                "\nwhat happened\n  It cannot be told: this host's KVM resets a CPU's registers at a triple fault.\n  Those below are a CPU's registers after power-on",
            );
            page.push_str(if self.recent.places && !self.recent.lines.is_empty() {
                ". The last exits tell where the guest was"
            } else {
                ". Run it with --core or --trace: the last exits then tell where the guest was"
            });
            self.short(page, vcpu);
            return;
        }
        let story = state.story(fault, self.memory);
        list(page, "what happened", &story.lines);
        if !story.hints.is_empty() {
            list(page, "what to look at", &story.hints);
        }
        let pc = state.pc();
        let there = bytes(&state, self.memory, pc, WINDOW);
        let there = if there.is_empty() { "none (not mapped, or not RAM)".into() } else { hex(&there) };
        let _ = write!(page, "\nvCPU {}: {}, at {pc:#x}\n{state}\n  bytes there: {there}", vcpu.id(), state.mode());
        self.code(page, &state);
        self.walks(page, &state);
        self.stack(page, &state);
    }

    /// The instructions around the program counter, and around the one that took an exception.
    fn code(&self, page: &mut String, state: &CpuState) {
        for pc in state.sites() {
            let code = bytes(state, self.memory, pc, AFTER * 15);
            let after = state.disassemble(pc, &code, AFTER);
            if after.is_empty() {
                continue;
            }
            page.push_str("\ninstructions");
            for line in self.before(state, pc).iter().chain(&after) {
                let mark = if line.at == pc { "→" } else { " " };
                let _ = write!(page, "\n{mark} {:#012x}  {:30}  {}", line.at, hex(&line.bytes), line.text);
            }
        }
    }

    /// The instructions that end at `pc`: of the places to begin at, the earliest from which they do. Only a guess where
    /// instructions have many sizes.
    fn before(&self, state: &CpuState, pc: u64) -> Vec<Line> {
        let fits = |start: u64| {
            let size = usize::try_from(pc.checked_sub(start)?).ok()?;
            let code = bytes(state, self.memory, start, size);
            let lines = state.disassemble(start, &code, size);
            // Zeroes are `add [rax], al` on a PC; nobody means that.
            let zero = |line: &Line| line.bytes.first() == Some(&0) && line.text.starts_with("add [");
            let sound = lines.iter().all(|line| line.text != "no instruction" && !zero(line));
            let ends = lines.iter().map(|line| line.bytes.len()).sum::<usize>() == size;
            (sound && ends && !lines.is_empty()).then_some(lines)
        };
        let lines = (pc.saturating_sub(BACK)..pc).find_map(fits).unwrap_or_default();
        let skip = lines.len().saturating_sub(BEFORE);
        lines.into_iter().skip(skip).collect()
    }

    fn walks(&self, page: &mut String, state: &CpuState) {
        let mut last: Option<Vec<String>> = None;
        for (name, address) in state.places() {
            let walk = state.walk(self.memory, address);
            let _ = write!(page, "\npage walk of {name} {address:#x}");
            if last.as_ref() == Some(&walk.steps) && walk.end.is_ok() {
                page.push_str("\n  as above");
            } else {
                walk.steps.iter().for_each(|step| {
                    let _ = write!(page, "\n  {step}");
                });
            }
            let _ = match walk.end {
                Ok(at) => {
                    let ram = self.memory.read(at.physical, &mut [0]).is_ok();
                    write!(page, "\n  → {:#x}, {}", at.physical, if ram { "RAM" } else { "where no RAM is" })
                }
                Err(why) => write!(page, "\n  → not mapped: {why}"),
            };
            last = Some(walk.steps);
        }
    }

    fn stack(&self, page: &mut String, state: &CpuState) {
        let stack = state.stack();
        let step = stack.word as u64;
        let read = |i: u64| {
            let at = stack.top.checked_add(i * step)?;
            word(state, self.memory, at, stack.word).map(|value| (at, value))
        };
        let words: Vec<_> = (0..WORDS).map_while(read).collect();
        if words.is_empty() {
            let _ = write!(page, "\nstack at {:#x}: no RAM there, or the stack is empty", stack.top);
            return;
        }
        page.push_str("\nstack");
        for row in words.chunks(4) {
            let at = row.first().map_or(0, |(at, _)| *at);
            let values: Vec<_> = row.iter().map(|(_, value)| format!("{value:0w$x}", w = 2 * stack.word)).collect();
            let _ = write!(page, "\n  {at:#012x}  {}", values.join(" "));
        }
        let callers = self.callers(state);
        if !callers.is_empty() {
            list(page, "callers, if the guest keeps frame pointers", &callers);
        }
    }

    /// Return addresses, found by frame pointers: each frame's first word is the caller's frame pointer, its second the
    /// return address. Frames must lie ever higher, so that the search ends.
    fn callers(&self, state: &CpuState) -> Vec<String> {
        let stack = state.stack();
        let step = stack.word as u64;
        let (mut frame, mut found) = (stack.frame, Vec::new());
        while found.len() < CALLERS && frame >= stack.top && frame % step == 0 {
            let read = |at: Option<u64>| word(state, self.memory, at?, stack.word);
            let (Some(next), Some(back)) = (read(Some(frame)), read(frame.checked_add(step))) else { break };
            if bytes(state, self.memory, back, 1).is_empty() || back == 0 {
                break;
            }
            found.push(format!("{back:#x}, frame {frame:#x}"));
            if next <= frame {
                break;
            }
            frame = next;
        }
        found
    }
}

fn list(page: &mut String, title: &str, lines: &[String]) {
    let _ = write!(page, "\n{title}");
    for line in lines {
        let _ = write!(page, "\n  {line}");
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ")
}
