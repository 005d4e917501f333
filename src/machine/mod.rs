//! A machine: built from a `Config`, booted with a guest, run, ended.
//!
//! There is one build path. A [`Machine<Paused>`] has its CPUs at hand; a [`Machine<Running>`] has lent each to a
//! thread of its own and gets it back when it ends. Invariant: memory outlives the vCPUs that KVM lets write to it.

mod control;
mod port;
mod saved;
mod streams;
mod telling;
mod wait;
mod watchdog;
mod writing;

use std::cell::Cell;
use std::io::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::fd::OwnedFd;

pub use self::streams::Streams;
use self::telling::Telling;
pub use self::telling::hold_signal;
use self::wait::Stopping;
use self::watchdog::Watchdog;
use crate::arch::{self, Layout};
use crate::board::{self, Board, Wires};
use crate::bus::Buses;
use crate::config::{Config, IrqChip, Switch};
use crate::error::{refuse, status};
use crate::event::Worker;
use crate::explain::{self, Narrator};
use crate::host::output::Bell;
use crate::host::say::say;
use crate::host::sys;
use crate::load::{self, Format, Guest};
use crate::memory::{Memory, Span};
use crate::report::{self, Scene};
use crate::snapshot::Snapshot;
use crate::stats::{Halts, Recorder};
use crate::trace::{self, Filter, Last, LastExits, Off, Print, Recent, Record, Recording, Symbols};
use crate::vcpu::{Flag, PANICKED, Stop, Vcpu, run_loop};
use crate::virtio::worker::{self, Bench, Working};
use crate::virtio::{Ends, console};
use crate::vm::{Vm, kvm};

/// How long a guest that dies and reboots is silent between two reports.
const REPORT_PAUSE: Duration = Duration::from_secs(1);

/// How long after a kick that the host refused another is tried.
const RETRY: Duration = Duration::from_millis(1);

/// What to say of Linux on a host whose KVM emulates it.
const NO_LINUX: &str = "hint: Linux cannot run here: this host's KVM emulates the guest's instructions, and does not know all of Linux's; it boots \
    on a host with VT-x or SVM, and in a test host made on the spot: cargo xtask host x86_64 -- bantam example linux";

/// The CPUs are here.
pub struct Paused {
    vcpus: Vec<Vcpu>,
}

/// Each CPU is with its thread.
pub struct Running {
    cpus: Vec<Lent>,
    /// The thread of the virtio devices; it outlives those of the CPUs, which may wait for it.
    virtio: Option<Working>,
    ended: Arc<OnceLock<(u32, Stop)>>,
}

/// A CPU that is with its thread, and the ways to reach it.
struct Lent {
    id: u32,
    flag: Arc<Flag>,
    worker: Worker<Vcpu>,
}

/// A virtual machine.
pub struct Machine<S> {
    state: S,
    config: Config,
    layout: Layout,
    memory: Memory,
    board: Board,
    vm: Vm,
}

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// A vCPU ended it.
    Guest(u32, Stop),
    /// Every CPU is halted, and nothing can wake any of them.
    AllHalted,
    /// `--timeout`.
    Timeout,
    /// A signal to Bantam.
    Signal(i32),
    /// Somebody changes the snapshot that its RAM is in.
    Lost,
    /// `ctrl-a x`.
    Quit,
}

impl End {
    /// The exit status that scripts see.
    pub fn status(&self) -> u8 {
        match self {
            Self::AllHalted | Self::Quit => 0,
            Self::Timeout | Self::Guest(_, Stop::MaxExits) => status::LIMIT,
            Self::Signal(number) => 128u8.saturating_add(u8::try_from(*number).unwrap_or(0)),
            Self::Guest(_, Stop::DebugExit(value)) => (value.to_le_bytes()[0] << 1) | 1,
            Self::Guest(_, Stop::Died(_)) | Self::Lost => status::DIED,
            Self::Guest(..) => 0,
        }
    }

    /// With `--reboot` the machine starts anew.
    fn is_reset(&self) -> bool {
        matches!(self, Self::Guest(_, Stop::Reset)) || self.is_shutdown()
    }

    /// KVM met an instruction that it would have to emulate, and cannot.
    fn is_not_emulated(&self) -> bool {
        matches!(self, Self::Guest(_, Stop::Died(fault)) if fault.detail.contains("KVM_INTERNAL_ERROR_EMULATION"))
    }

    /// A triple fault, which real hardware answers with a reset.
    fn is_shutdown(&self) -> bool {
        matches!(self, Self::Guest(_, Stop::Died(fault)) if fault.name == "KVM_EXIT_SHUTDOWN")
    }
}

/// What spans all lives of a machine that reboots.
pub struct Life {
    deadline: Option<Instant>,
    exits_left: Option<Arc<AtomicU64>>,
    signals: OnceLock<OwnedFd>,
    /// The signal that ended what came after the guest.
    ended_by: Cell<Option<i32>>,
    /// What a trace shows, and the names it has for addresses.
    filter: Option<Filter>,
    symbols: Symbols,
    recording: Recording,
    keeps_last: bool,
    last: Option<LastExits>,
    print: OnceLock<Print>,
    telling: Telling,
    stopping: Stopping,
}

impl Life {
    /// Starts the clock of `--timeout`.
    pub fn new(config: &Config, symbols: Symbols) -> Self {
        Self {
            filter: config.trace_filter.clone(),
            symbols,
            recording: match keeps_last(config) {
                true => Recording::little(),
                false => Recording::new(config.trace_memory.map_or(trace::MEMORY, |size| size.0)),
            },
            keeps_last: keeps_last(config),
            last: (config.last_exits != Some(Switch::Off)).then(LastExits::default),
            print: OnceLock::new(),
            deadline: config.timeout.and_then(|t| Instant::now().checked_add(t.0)),
            exits_left: config.max_exits.map(|n| Arc::new(AtomicU64::new(n))),
            signals: OnceLock::new(),
            ended_by: Cell::new(None),
            telling: Telling::new(config),
            stopping: Stopping::default(),
        }
    }

    /// The process's control signals, taken over at the first call; before any thread is started, and not before there
    /// is an event loop to answer them.
    ///
    /// # Errors
    /// The host has no descriptor left.
    fn signals(&self) -> Result<&OwnedFd> {
        if let Some(signals) = self.signals.get() {
            return Ok(signals);
        }
        let signals = sys::control_signals(self.telling.signal()).context("taking over the process's signals")?;
        Ok(self.signals.get_or_init(|| signals))
    }

    /// The trace of one CPU, where there is one. A machine that reboots goes on in the same.
    fn tracer(&self, vcpu: &Vcpu, cpus: u32, streams: &Streams) -> (Option<Print>, Option<Record>) {
        let cpu = vcpu.id();
        let new = |output| Print::new(output, self.filter.clone(), self.symbols.clone());
        let print = streams.trace().map(|output| self.print.get_or_init(|| new(output)).for_cpu(cpu));
        let record = || self.recording.of_cpu(cpu, cpus, self.filter.clone());
        let halts = || vcpu.counters().and_then(Halts::new);
        let record = match streams.records() {
            true => Some(record().with_halts(halts())),
            false => self.keeps_last.then(record),
        };
        (print, record)
    }

    /// Who keeps the last exits of one CPU, where none of `tracer` does.
    fn last(&self, cpu: u32, tracer: &(Option<Print>, Option<Record>)) -> Option<Last> {
        self.last.as_ref().filter(|_| tracer.1.is_none()).map(|last| last.of_cpu(cpu))
    }

    /// The last exits, where they were kept.
    fn last_exits(&self, buses: &Buses) -> Recent {
        match &self.last {
            Some(last) if !self.recording.is_used() => last.recent(buses),
            _ => self.recording.last(&self.symbols),
        }
    }

    /// Writes the trace for a viewer, where there is one.
    fn write_recording(&self, streams: &mut Streams) -> Result<()> {
        let Some(file) = streams.take_recording() else { return Ok(()) };
        let mut file = std::io::BufWriter::new(file);
        let written = self.recording.write(&mut file, &explain::calls(), &self.symbols);
        match written.and_then(|dropped| file.flush().map(|()| dropped)).context("--trace")? {
            0 => {}
            dropped => say(&format!("bantam: the trace is full: its oldest {dropped} slices were dropped")),
        }
        Ok(())
    }

    /// A signal has come that ends the process: [`Life::ended_by`] has it. For what takes long and is no event loop.
    fn has_enough(&self) -> bool {
        let next = || sys::next_signal(self.signals.get()?);
        while let Some(signal) = next() {
            match signal {
                sys::SIGTSTP => sys::stop_self(),
                sys::SIGCONT | sys::SIGUSR1 | sys::SIGWINCH => {}
                signal => self.ended_by.set(Some(signal)),
            }
        }
        self.ended_by.get().is_some()
    }

    /// `--max-exits` has been reached.
    fn is_spent(&self) -> bool {
        self.exits_left.as_ref().is_some_and(|left| left.load(Ordering::Relaxed) == 0)
    }
}

/// A report may come that shows the last exits and where the guest was, and nothing else keeps them.
fn keeps_last(config: &Config) -> bool {
    let for_a_viewer = config.trace.as_ref().is_some_and(|file| file.extension().is_some_and(|e| e == "json"));
    (config.core.is_some() || config.watchdog.is_some()) && !for_a_viewer && config.last_exits != Some(Switch::Off)
}

/// A machine that has ended. To drop it takes KVM about half a millisecond, which a process that ends anyway can save.
pub struct Ended {
    /// How it ended.
    pub end: End,
    /// What is left of it.
    pub machine: Machine<Paused>,
}

/// How a machine begins.
enum Start<'a> {
    /// With this guest.
    Boot(&'a Guest),
    /// As it was when this was written.
    Restore(&'a Snapshot),
}

/// Runs a guest to its end and says how it ended; the whole of `bantam run`.
///
/// # Errors
/// The machine cannot be built or run.
pub fn run(config: &Config, guest: &Guest) -> Result<Ended> {
    live(config, &Start::Boot(guest))
}

/// Goes on with a machine where its snapshot was written, to its end; the whole of `bantam restore`. A machine that resets
/// then has ended, since what it began with is not known.
///
/// # Errors
/// The machine cannot be built or run, or the snapshot is not as it was written.
pub fn restore(config: &Config, snapshot: &Snapshot) -> Result<Ended> {
    live(config, &Start::Restore(snapshot))
}

impl Start<'_> {
    fn guest(&self) -> Option<&Guest> {
        match self {
            Self::Boot(guest) => Some(guest),
            Self::Restore(_) => None,
        }
    }

    fn snapshot(&self) -> Option<&Snapshot> {
        match self {
            Self::Boot(_) => None,
            Self::Restore(snapshot) => Some(snapshot),
        }
    }

    /// What the machine runs, in a word.
    fn name(&self) -> &str {
        match self {
            Self::Boot(guest) => guest.image.name(),
            Self::Restore(snapshot) => &snapshot.manifest.guest,
        }
    }
}

fn live(config: &Config, start: &Start) -> Result<Ended> {
    // The trace's clock starts here.
    let _ = crate::trace::now();
    if let Some(format) = config.explain {
        explain::start(format);
    }
    let mut streams = Streams::open(config)?;
    let named = config.trace.is_some() || config.symbols.is_some() || keeps_last(config);
    let life = Life::new(config, if named { load::symbols(config, start.guest())? } else { Symbols::default() });
    life.telling.check()?;
    Watchdog::check(config)?;
    if streams.records() {
        explain::record();
    }
    streams.control.describe(start.name(), start.snapshot().and_then(Snapshot::base));
    let mut told: Option<Instant> = None;
    loop {
        let machine = match start {
            Start::Boot(guest) => {
                let mut machine = build(config, &streams)?;
                machine.boot(guest)?;
                machine
            }
            Start::Restore(snapshot) => Machine::spawn(snapshot, config, &streams)?,
        };
        let machine = machine.resume(&life, &streams)?;
        // As long as it runs.
        let noting = start.snapshot().and_then(|snapshot| snapshot.note(machine.memory()));
        let (machine, mut end) = machine.wait(&life, &mut streams)?;
        drop(noting);
        if config.reboot && end.is_reset() && life.is_spent() {
            end = End::Guest(0, Stop::MaxExits);
        }
        // A guest that was asked to end does not live again.
        if config.reboot && end.is_reset() && life.stopping.is_on() {
            end = End::Signal(sys::SIGTERM);
        }
        let again = config.reboot && end.is_reset() && start.guest().is_some();
        if !again {
            crate::host::terminal::restore();
        }
        // A guest that dies again and again does not flood stderr.
        let quiet = again && (!end.is_shutdown() || told.is_some_and(|at| at.elapsed() < REPORT_PAUSE));
        if !quiet {
            machine.tell(&end, &life, &streams);
            if start.guest().is_some_and(|guest| matches!(guest.format, Format::Linux(_))) && end.is_not_emulated() {
                say(NO_LINUX);
            }
            told = Some(Instant::now());
        }
        if !again {
            if let Err(e) = life.write_recording(&mut streams) {
                say(&format!("bantam: warning: the trace is lost: {e:#}"));
            }
            life.telling.tell();
            let end = life.ended_by.get().map_or(end, End::Signal);
            return Ok(Ended { end, machine });
        }
    }
}

/// Builds the machine that a settled `config` describes; it has no guest yet.
///
/// # Errors
/// The host cannot make it; the reason is named.
pub fn build(config: &Config, streams: &Streams) -> Result<Machine<Paused>> {
    build_on(config, streams, |spans| Memory::new(spans, config.hugepages))
}

/// Builds it on the RAM that `memory` makes for the places where it has RAM.
fn build_on(
    config: &Config,
    streams: &Streams,
    memory: impl FnOnce(&[Span]) -> Result<Memory>,
) -> Result<Machine<Paused>> {
    let layout = arch::layout(config)?;
    check_cpus(config.cpus.count())?;
    let vm = Vm::new(arch::vm_type(kvm()?, &layout)?)?;
    let config = board::choose(&vm, config)?;
    let layout = arch::layout(&config)?;
    let memory = memory(&layout.memory())?;
    vm.map(&memory)?;
    let console = streams.terminal().map(|far| Box::new(console::Console::new(Box::new(far))) as _);
    let connected = console.into_iter().chain(streams.control.balloon.device()).collect();
    let ends = Ends { memory: memory.clone(), connected };
    let wires = Wires { serial: streams.serial_console(), debug: streams.debug_console(), ends };
    let mut board = board::build(&vm, &config, &layout, wires)?;
    let vcpus = (0..config.cpus.count()).map(|id| vm.vcpu(id)).collect::<Result<Vec<_>>>()?;
    board::prepare(&vm, &vcpus, &config, &mut board)?;
    Ok(Machine { state: Paused { vcpus }, config, layout, memory, board, vm })
}

/// The soft limit warns, the hard one refuses.
fn check_cpus(cpus: u32) -> Result<()> {
    // One is what every host has.
    if cpus <= 1 {
        return Ok(());
    }
    let kvm = kvm()?;
    let wanted = usize::try_from(cpus).unwrap_or(usize::MAX);
    let (soft, hard) = (kvm.get_nr_vcpus(), kvm.get_max_vcpus().min(arch::MAX_CPUS));
    if wanted > hard {
        let why = format!("{cpus} CPUs are more than the {hard} that this host and Bantam allow (KVM_CAP_MAX_VCPUS)");
        return Err(refuse(why).hint("give --cpus a smaller number").into());
    }
    if wanted > soft {
        say(&format!("bantam: warning: {cpus} CPUs are more than the {soft} that KVM recommends (KVM_CAP_NR_VCPUS)"));
    }
    Ok(())
}

impl Machine<Paused> {
    /// Loads the guest and sets CPU 0 to enter it; the others wait for CPU 0.
    ///
    /// # Errors
    /// The guest cannot be loaded.
    pub fn boot(&mut self, guest: &Guest) -> Result<()> {
        if let (Some(page), Some(cpu)) = (guest.format.page_size(), self.state.vcpus.first()) {
            arch::check_page_size(cpu.fd(), page)?;
        }
        let boot = load::load(&self.config, guest, &self.memory, &self.layout)?;
        self.state.vcpus.first_mut().map_or(Ok(()), |cpu| cpu.enter(&boot))
    }

    /// Starts every CPU on its own thread.
    ///
    /// # Errors
    /// The host has no thread left.
    pub fn resume(self, life: &Life, streams: &Streams) -> Result<Machine<Running>> {
        let Self { state, config, layout, memory, board, vm } = self;
        life.signals()?;
        sys::handle_kicks().context("the signal that kicks a CPU")?;
        let ended = Arc::new(OnceLock::new());
        let stats = life.telling.stats().inspect(|stats| stats.begin(&board.buses));
        if let Some(bench) = board.bench.as_ref().filter(|_| streams.records()) {
            bench.note(life.recording.of_worker(worker::NAME));
        }
        let virtio = board.bench.as_ref().map(Bench::start).transpose()?;
        let mut running = Running { cpus: Vec::new(), virtio, ended };
        // CPU 0 last: it runs at once, the others wait for it.
        for mut vcpu in state.vcpus.into_iter().rev() {
            if config.trace_insn {
                vcpu.show_code(&memory);
            }
            let (id, flag) = (vcpu.id(), Flag::new(life.exits_left.clone(), Some(memory.clone())));
            let trace = life.tracer(&vcpu, config.cpus.count(), streams);
            let cpu = Cpu {
                last: life.last(id, &trace),
                trace,
                narrator: Narrator::new(id),
                recorder: stats.map(|stats| stats.recorder(id, vcpu.counters())),
                vcpu,
                flag: flag.clone(),
                buses: board.buses.clone(),
                ended: running.ended.clone(),
                bell: streams.bell(),
            };
            match Worker::start(format!("vcpu{id}"), move || cpu.run()) {
                Ok(worker) => running.cpus.insert(0, Lent { id, flag, worker }),
                Err(e) => {
                    running.stop()?;
                    return Err(e);
                }
            }
        }
        Ok(Machine { state: running, config, layout, memory, board, vm })
    }

    /// Takes the machine down piece by piece, and tells of it.
    pub fn take_down(self) {
        let Self { state, memory, board, vm, .. } = self;
        let count = format!("of {} vCPUs", state.vcpus.len());
        let why = "The machine has ended. A CPU goes with its descriptor and the page that it shared.";
        explain::step("munmap kvm_run, close", &count, why, || drop(state));
        let why = "The devices, and the eventfds and controllers that KVM had for them.";
        explain::step("close", "of the devices' descriptors", why, || drop(board));
        let why = "The last descriptor of the machine: KVM frees its page tables and forgets its memory slots.";
        explain::step("close", "of the machine", why, || drop(vm));
        let why = "The guest's RAM was this process's memory all the time.";
        explain::step("munmap, close", "of RAM", why, || drop(memory));
    }

    /// What a report looks at.
    fn scene<'a>(&'a self, recent: &'a Recent) -> Scene<'a> {
        Scene { vcpus: &self.state.vcpus, memory: &self.memory, recent }
    }

    /// Says on stderr what a person should know of the end.
    fn tell(&self, end: &End, life: &Life, streams: &Streams) {
        let recent = life.last_exits(self.buses());
        let text = match end {
            End::Guest(cpu, Stop::Died(fault)) => {
                // Of a panic the guest's own words say most.
                let panicked = fault.name == PANICKED;
                let said = if panicked { streams.last_lines() } else { Vec::new() };
                self.scene(&recent).death(*cpu, fault, &said)
            }
            End::Guest(_, Stop::Halted { interrupts: true }) => {
                "bantam: the guest halted with interrupts on, and this machine has no interrupt controller to wake it\nhint: give it one: --irqchip kernel".into()
            }
            End::Guest(_, Stop::MaxExits) => {
                format!("bantam: --max-exits reached: the guest made {} exits", self.config.max_exits.unwrap_or(0))
            }
            End::Timeout => {
                format!("bantam: --timeout reached: the guest ran for {} s", self.config.timeout.map_or(0.0, |t| t.0.as_secs_f64()))
            }
            End::Lost => {
                "bantam: the guest died: another program is about to change the snapshot's memory.bin, which holds this machine's RAM\nhint: leave the files of a snapshot alone, or go on from a copy in RAM: bantam restore --copy".into()
            }
            _ => String::new(),
        };
        if !text.is_empty() {
            say(&text);
        }
        if let (End::Guest(_, Stop::Died(_)), Some(path)) = (end, &self.config.core) {
            match report::core::write(&self.scene(&recent), path, &|| life.has_enough()) {
                Ok(()) => say(&format!("bantam: the core file is {}", path.display())),
                Err(e) => say(&format!("bantam: no core file: {e:#}")),
            }
        }
        if let (count @ 1.., Some(first)) = self.board.buses.misses()
            && self.config.trace.is_none()
        {
            say(&format!(
                "bantam: note: accesses that no device answers: {count}, the first: {first}; --trace shows each"
            ));
        }
    }
}

impl Running {
    /// Tells every CPU that was started to stop.
    fn halt(&self) {
        let ended = self.ended.get().map(|(cpu, _)| *cpu);
        for cpu in &self.cpus {
            cpu.flag.stop();
            // It must come: the CPU would be waited for in vain. None is refused for want of anything, so this is for a host
            // that fails now and then.
            while ended != Some(cpu.id) && !cpu.worker.kick() {
                std::thread::sleep(RETRY);
            }
        }
    }

    /// Stops every CPU that was started and takes it back, in their order.
    fn stop(self) -> Result<Vec<Vcpu>> {
        self.halt();
        let vcpus = self.cpus.into_iter().map(|cpu| cpu.worker.join()).collect();
        drop(self.virtio);
        vcpus
    }
}

/// What a vCPU's thread owns.
struct Cpu {
    vcpu: Vcpu,
    flag: Arc<Flag>,
    buses: Arc<Buses>,
    trace: (Option<Print>, Option<Record>),
    narrator: Option<Narrator>,
    last: Option<Last>,
    recorder: Option<Recorder>,
    ended: Arc<OnceLock<(u32, Stop)>>,
    bell: Bell,
}

impl Cpu {
    fn run(mut self) -> Vcpu {
        #[cfg(debug_assertions)]
        crate::host::fault::inject("vcpu");
        self.vcpu.adopt(&self.flag);
        let (vcpu, buses, flag) = (&mut self.vcpu, &self.buses, &self.flag);
        let stop = match ((self.trace, self.narrator), (self.recorder, self.last)) {
            (((None, None), None), (None, None)) => run_loop(vcpu, buses, flag, &mut Off),
            (((None, None), None), (None, Some(mut last))) => run_loop(vcpu, buses, flag, &mut last),
            (((None, None), None), (Some(recorder), last)) => run_loop(vcpu, buses, flag, &mut (recorder, last)),
            mut watching => run_loop(vcpu, buses, flag, &mut watching),
        };
        // What it was doing may still end the machine: a write to the reset port may be the last of many.
        let stop = match stop {
            Stop::Asked => self.vcpu.settle(&self.buses),
            // The guest may go on in another machine.
            Stop::MaxExits | Stop::Until => {
                let _ = self.vcpu.settle(&self.buses);
                Some(stop)
            }
            stop => Some(stop),
        };
        if let Some(stop) = stop {
            // The first CPU to end ends the machine; later ones have nothing to add.
            let _ = self.ended.set((self.vcpu.id(), stop));
        }
        self.vcpu.release();
        self.bell.ring();
        self.vcpu
    }
}

impl<S> Machine<S> {
    /// The guest-physical map.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Guest RAM.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The devices.
    pub fn buses(&self) -> &Arc<Buses> {
        &self.board.buses
    }

    /// KVM's own halt: whether CPUs may sleep in KVM for ever without an exit.
    fn halts_in_kvm(&self) -> bool {
        !arch::HALT_EXITS || self.config.irqchip != Some(IrqChip::None)
    }
}
