//! One virtual CPU: running it, answering its exits, stopping it.
//!
//! `kvm_run` is read here and nowhere else: kvm-ioctls' own decoding loses the element size of string I/O and the
//! payload of internal errors. Invariant: an exit is complete only after the next KVM_RUN (KVM api.rst, "kvm_run"); who
//! wants to see or save registers calls [`Vcpu::settle`] first.

#![allow(unsafe_code)]

#[cfg(feature = "loops")]
pub mod bare;
mod exits;
mod late;
mod progress;
mod reasons;

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use anyhow::Result;
use kvm_bindings::{KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{Cap, VcpuFd};

pub use self::late::Late;
use self::progress::Progress;
use crate::arch::{self, BootRegs, CpuState};
use crate::bus::{Buses, Effect, Exit, FaultInfo};
use crate::host::sys;
use crate::memory::Memory;
use crate::trace::{Culprit, Sight, Trace};
use crate::vm::kvm;

/// `_IO(KVMIO, 0x80)`.
const KVM_RUN: u64 = 0xae80;
/// `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: u64 = 0xaece;
/// How many further exits of one instruction [`Vcpu::settle`] answers; a longer string is cut there, between elements.
const SETTLE: usize = 64;

/// The name of the fault that is a panic of the guest's kernel.
pub const PANICKED: &str = "pvpanic";

/// A virtual CPU.
pub struct Vcpu {
    fd: VcpuFd,
    id: u32,
    /// Bytes mapped for `kvm_run` and what its offsets point into.
    run_size: usize,
    /// RAM, to read the guest's code for `--trace-insn`.
    code: Option<Memory>,
    progress: Progress,
    /// Writes that come with the next exit, where the machine has such.
    late: Option<Arc<Late>>,
}

impl Sight for Vcpu {
    fn pc(&mut self) -> u64 {
        arch::pc(&mut self.fd, self.code.is_some())
    }

    fn culprit(&mut self) -> Option<Culprit> {
        let memory = self.code.clone()?;
        let state = arch::seen(&mut self.fd)?;
        Some(Box::new(move |exit| state.culprit(&memory, exit)))
    }
}

/// Why a vCPU's loop ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// It halted and nothing can wake it. `interrupts`: they were on, so the guest may have expected to wake.
    Halted {
        /// RFLAGS.IF or its like was set.
        interrupts: bool,
    },
    /// The guest switched the machine off.
    PowerOff,
    /// The guest reset the machine.
    Reset,
    /// A console showed the text of `--until`.
    Until,
    /// The guest wrote this value to the debug-exit register.
    DebugExit(u64),
    /// `--max-exits`.
    MaxExits,
    /// The guest died.
    Died(FaultInfo),
    /// It was asked to.
    Asked,
}

/// What [`dispatch`] says of the next step.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Run on.
    Run,
    /// Leave the loop.
    Stop(Stop),
}

/// Answers one exit: the whole of what a machine does between two KVM_RUNs.
pub fn dispatch(exit: &mut Exit<'_>, buses: &Buses) -> Next {
    let died = |name: &str, detail: &str| {
        Next::Stop(Stop::Died(FaultInfo { name: name.into(), detail: detail.into(), bytes: Vec::new() }))
    };
    match exit {
        Exit::Read { space, addr, width, data } => {
            buses.read(*space, *addr, *width, data);
            Next::Run
        }
        Exit::Write { space, addr, width, data } => match buses.write(*space, *addr, *width, data) {
            Effect::None => Next::Run,
            Effect::Reset => Next::Stop(Stop::Reset),
            Effect::PowerOff => Next::Stop(Stop::PowerOff),
            Effect::Exit(value) => Next::Stop(Stop::DebugExit(value)),
            Effect::Until => Next::Stop(Stop::Until),
            Effect::Panicked => died(PANICKED, "the guest's kernel says that it has panicked"),
        },
        Exit::EndOfInterrupt(vector) => {
            buses.end_of_interrupt(*vector);
            Next::Run
        }
        Exit::Interrupted => Next::Run,
        Exit::Halt => Next::Stop(Stop::Halted { interrupts: false }),
        Exit::Shutdown => died("KVM_EXIT_SHUTDOWN", arch::SHUTDOWN),
        Exit::System { event: KVM_SYSTEM_EVENT_SHUTDOWN, .. } => Next::Stop(Stop::PowerOff),
        Exit::System { event: KVM_SYSTEM_EVENT_RESET, .. } => Next::Stop(Stop::Reset),
        Exit::System { event, data } => died(
            "KVM_EXIT_SYSTEM_EVENT",
            &format!("type {event} ({}), data {data:x?}", exits::system_event_name(*event)),
        ),
        Exit::Debug => died("KVM_EXIT_DEBUG", "a debug exit that nobody asked for"),
        Exit::Fault(fault) => Next::Stop(Stop::Died((**fault).clone())),
    }
}

/// Runs a CPU until something ends it. With `trace::Off` there is nothing here but what is written.
pub fn run_loop(vcpu: &mut Vcpu, buses: &Buses, flag: &Flag, trace: &mut impl Trace) -> Stop {
    vcpu.show_pc(trace.wants_pc());
    loop {
        if flag.is_raised()
            && let Some(stop) = flag.answer(vcpu)
        {
            return stop;
        }
        trace.enter();
        let result = vcpu.enter_guest();
        trace.returned(vcpu);
        vcpu.catch_up(buses);
        let mut exit = vcpu.exit(result);
        let next = dispatch(&mut exit, buses);
        trace.leave(&exit, buses);
        let spent = !matches!(exit, Exit::Interrupted) && flag.spend();
        match next {
            Next::Run if spent => return Stop::MaxExits,
            Next::Run => {}
            Next::Stop(Stop::Halted { .. }) => return Stop::Halted { interrupts: vcpu.interrupts_on() },
            Next::Stop(stop) => return stop,
        }
    }
}

/// What the rest of the machine asks of one running vCPU. Set the flag first, then kick the thread.
pub struct Flag {
    request: AtomicU32,
    idle: AtomicU8,
    /// Looks in a row that found the guest lost.
    lost: AtomicU8,
    /// Exits that all CPUs together may still make.
    left: Option<Arc<AtomicU64>>,
    /// The thread that runs the vCPU; 0 before it does.
    thread: AtomicU32,
    /// Looks for `--watchdog`, and how many of them found that the CPU had got on.
    looks: AtomicU32,
    moved: AtomicU32,
    trapped: AtomicU32,
    /// Guest RAM, for looks.
    memory: Option<Memory>,
}

/// A look may meet a guest that recovers; so many in a row do not.
const LOST: u8 = 3;

const STOP: u32 = 1;
const LOOK: u32 = 2;
const WATCH: u32 = 4;

/// What looks for `--watchdog` have seen of a CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// How many there were, since the CPU was last resumed.
    pub looks: u32,
    /// How often the CPU had got on, in all its life.
    pub moved: u32,
    /// Looks in a row that found it in the same exception, in its own vectors.
    pub trapped: u32,
}

/// What a vCPU was doing when it was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Idle {
    /// Not looked at since the last request.
    Unknown = 0,
    /// Running, or waiting for an interrupt that may come.
    No = 1,
    /// Halted, and nothing can wake it.
    ForGood = 2,
}

impl Flag {
    /// A flag for one CPU; all of a machine share what is left of `--max-exits`, if there is a limit. With `memory`, a
    /// look at the CPU sees its instructions too.
    pub fn new(left: Option<Arc<AtomicU64>>, memory: Option<Memory>) -> Arc<Self> {
        Arc::new(Self {
            request: AtomicU32::new(0),
            idle: AtomicU8::new(0),
            lost: AtomicU8::new(0),
            left,
            thread: AtomicU32::new(0),
            looks: AtomicU32::new(0),
            moved: AtomicU32::new(0),
            trapped: AtomicU32::new(0),
            memory,
        })
    }

    /// Asks the vCPU to stop.
    pub fn stop(&self) {
        self.request.fetch_or(STOP, Ordering::SeqCst);
    }

    /// Asks the vCPU what it is doing; [`Flag::seen`] has the answer once it has given one.
    pub fn look(&self) {
        self.idle.store(Idle::Unknown as u8, Ordering::SeqCst);
        self.request.fetch_or(LOOK, Ordering::SeqCst);
    }

    /// The answer to the last [`Flag::look`].
    pub fn seen(&self) -> Idle {
        match self.idle.load(Ordering::SeqCst) {
            1 => Idle::No,
            2 => Idle::ForGood,
            _ => Idle::Unknown,
        }
    }

    /// Asks the vCPU whether it gets on; [`Flag::progress`] has the answer some time later.
    pub fn watch(&self) {
        self.request.fetch_or(WATCH, Ordering::SeqCst);
    }

    /// The answers to [`Flag::watch`], once there is one.
    pub fn progress(&self) -> Option<Seen> {
        let looks = self.looks.load(Ordering::SeqCst);
        let (moved, trapped) = (self.moved.load(Ordering::SeqCst), self.trapped.load(Ordering::SeqCst));
        (looks > 0).then_some(Seen { looks, moved, trapped })
    }

    /// The thread that runs the vCPU, once there is one.
    pub fn thread(&self) -> Option<i32> {
        i32::try_from(self.thread.load(Ordering::Relaxed)).ok().filter(|id| *id != 0)
    }

    fn is_raised(&self) -> bool {
        self.request.load(Ordering::Relaxed) != 0
    }

    /// Answers the requests; a stop where one was asked for, or where the guest turns out to be lost.
    fn answer(&self, vcpu: &mut Vcpu) -> Option<Stop> {
        let request = self.request.fetch_and(!(LOOK | WATCH), Ordering::SeqCst);
        if request & STOP != 0 {
            return Some(Stop::Asked);
        }
        if request & WATCH != 0 {
            let (moved, trapped) = vcpu.progress(self.memory.as_ref());
            self.moved.store(moved, Ordering::SeqCst);
            self.trapped.store(trapped, Ordering::SeqCst);
            self.looks.fetch_add(1, Ordering::SeqCst);
        }
        if request & LOOK == 0 {
            return None;
        }
        let idle = if arch::halted_for_good(&vcpu.fd) { Idle::ForGood } else { Idle::No };
        let lost = arch::lost(&vcpu.fd, self.memory.as_ref());
        let looks = if lost.is_some() { self.lost.load(Ordering::Relaxed).saturating_add(1) } else { 0 };
        self.lost.store(looks, Ordering::Relaxed);
        self.idle.store(if lost.is_some() { Idle::No } else { idle } as u8, Ordering::SeqCst);
        lost.filter(|_| looks >= LOST).map(Stop::Died)
    }

    /// Takes one exit off the limit; true when that was the last.
    fn spend(&self) -> bool {
        let Some(left) = &self.left else { return false };
        let before = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        before.is_ok_and(|left| left == 1) || before.is_err()
    }
}

impl Vcpu {
    /// Wraps a new vCPU.
    pub(crate) fn new(fd: VcpuFd, id: u32, run_size: usize, late: Option<Arc<Late>>) -> Self {
        Self { fd, id, run_size, code: None, progress: Progress::default(), late }
    }

    /// The CPU's number.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The descriptor, for the board's own calls.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// A descriptor for KVM's own counters of this CPU; none where this kernel has none. Not while the CPU runs: KVM
    /// would have the call wait for it.
    pub fn counters(&self) -> Option<OwnedFd> {
        // SAFETY: the call takes no argument; the descriptor is a vCPU's.
        let fd = unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_GET_STATS_FD, 0) };
        // SAFETY: KVM has just given the descriptor to us alone.
        (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Sets the state to start from.
    ///
    /// # Errors
    /// KVM refuses the state.
    pub fn enter(&mut self, boot: &BootRegs) -> Result<()> {
        boot.apply(&mut self.fd, kvm()?)
    }

    /// Lets a trace see which instruction caused an exit.
    pub fn show_code(&mut self, memory: &Memory) {
        self.code = Some(memory.clone());
    }

    /// Makes the calling thread the one that runs this vCPU and that `flag` speaks of.
    pub fn adopt(&mut self, flag: &Flag) {
        let byte = (&raw mut self.fd.get_kvm_run().immediate_exit).cast::<AtomicU8>();
        // SAFETY: the byte lies in the mapping that `self.fd` keeps; `release` is called before the vCPU leaves.
        unsafe { sys::watch_kicks(byte) };
        flag.thread.store(sys::thread_id().unsigned_abs(), Ordering::Relaxed);
    }

    /// The opposite of [`Vcpu::adopt`], on the same thread.
    pub fn release(&self) {
        sys::forget_kicks();
    }

    /// How often the CPU has got on, and for how many looks it is trapped, as far as looks tell; this is one.
    fn progress(&mut self, memory: Option<&Memory>) -> (u32, u32) {
        let active = progress::made_exit(self.fd.get_kvm_run()) || arch::rests(&self.fd, memory);
        let trap = arch::trapped(&self.fd).map(|(trap, _)| trap);
        let moved = self.progress.note(self.state().map_or(0, |state| state.pc()), active);
        (moved, self.progress.trap(trap, active))
    }

    /// What looks have found the CPU trapped in, if it still is; in the words of [`arch::lost`] where that knows better.
    pub fn trap(&self, memory: &Memory) -> Option<FaultInfo> {
        let (_, fault) = arch::trapped(&self.fd).filter(|(trap, _)| self.progress.is_in(*trap))?;
        arch::lost(&self.fd, Some(memory)).or(Some(fault))
    }

    /// Runs the guest until its next exit.
    pub fn run(&mut self) -> Exit<'_> {
        let result = self.enter_guest();
        self.exit(result)
    }

    /// KVM_RUN, and nothing else.
    fn enter_guest(&self) -> io::Result<()> {
        // SAFETY: KVM_RUN takes no argument; the descriptor is a vCPU's.
        match unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_RUN, 0) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Carries out the writes that made no exit of their own.
    fn catch_up(&self, buses: &Buses) {
        if let Some(late) = &self.late {
            late.carry_out(buses);
        }
    }

    /// Whether [`arch::pc`] will be asked after each exit.
    fn show_pc(&mut self, wanted: bool) {
        if wanted && kvm().is_ok_and(|kvm| kvm.check_extension(Cap::SyncRegs)) {
            arch::show_pc(&mut self.fd);
        }
    }

    /// Why KVM_RUN returned.
    fn exit(&mut self, result: io::Result<()>) -> Exit<'_> {
        let Err(error) = result else { return exits::decode(self.fd.get_kvm_run(), self.run_size) };
        if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) {
            // A kick from here on sets it again; one before has raised its flag already.
            self.fd.set_kvm_immediate_exit(0);
            return Exit::Interrupted;
        }
        let reason = exits::name(self.fd.get_kvm_run().exit_reason);
        let detail = format!("{error} (the exit reason then was {reason})");
        Exit::Fault(Box::new(FaultInfo { name: "KVM_RUN".into(), detail, bytes: Vec::new() }))
    }

    /// Completes the exit that is being answered, so that registers and memory show it done. The CPU runs no
    /// instruction of its own; but the last part of one may still stop the machine.
    pub fn settle(&mut self, buses: &Buses) -> Option<Stop> {
        let mut stop = None;
        for _ in 0..SETTLE {
            self.fd.set_kvm_immediate_exit(1);
            let result = self.enter_guest();
            self.catch_up(buses);
            let mut exit = self.exit(result);
            let next = dispatch(&mut exit, buses);
            match (next, exit) {
                (Next::Run, Exit::Read { .. } | Exit::Write { .. }) => {}
                (Next::Run, _) => break,
                (Next::Stop(why), _) => {
                    stop = Some(why);
                    break;
                }
            }
        }
        self.fd.set_kvm_immediate_exit(0);
        stop
    }

    /// The registers. After an exit that was answered, call [`Vcpu::settle`] first.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn state(&self) -> Result<CpuState> {
        CpuState::read(&self.fd)
    }

    /// Whether the CPU took interrupts at its last exit, where the architecture's KVM says so.
    fn interrupts_on(&mut self) -> bool {
        self.fd.get_kvm_run().if_flag != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::{Builder, Space};

    fn next(mut exit: Exit<'_>) -> Next {
        dispatch(&mut exit, &Builder::default().finish())
    }

    #[test]
    fn reads_of_nothing_are_ones_and_writes_run_on() {
        let mut data = [0; 2];
        assert_eq!(next(Exit::Read { space: Space::Pio, addr: 0x10, width: 2, data: &mut data }), Next::Run);
        assert_eq!(data, [0xff; 2]);
        assert_eq!(next(Exit::Write { space: Space::Mmio, addr: 0x996, width: 1, data: &[0x48] }), Next::Run);
        assert_eq!(next(Exit::Interrupted), Next::Run);
    }

    #[test]
    fn ends_are_told_apart() {
        assert!(matches!(next(Exit::Halt), Next::Stop(Stop::Halted { .. })));
        assert!(matches!(next(Exit::Shutdown), Next::Stop(Stop::Died(f)) if f.name == "KVM_EXIT_SHUTDOWN"));
        let off = Exit::System { event: KVM_SYSTEM_EVENT_SHUTDOWN, data: vec![] };
        assert_eq!(next(off), Next::Stop(Stop::PowerOff));
        let reset = Exit::System { event: KVM_SYSTEM_EVENT_RESET, data: vec![] };
        assert_eq!(next(reset), Next::Stop(Stop::Reset));
        let other = Exit::System { event: 99, data: vec![7] };
        assert!(matches!(next(other), Next::Stop(Stop::Died(f)) if f.detail.contains("99")));
        assert!(matches!(next(Exit::Debug), Next::Stop(Stop::Died(_))));
    }

    #[test]
    fn the_limit_of_exits_is_shared() {
        let left = Arc::new(AtomicU64::new(3));
        let flags = [Flag::new(Some(left.clone()), None), Flag::new(Some(left), None)];
        assert_eq!([flags[0].spend(), flags[1].spend(), flags[0].spend()], [false, false, true]);
        assert!(!Flag::new(None, None).spend());
    }
}
