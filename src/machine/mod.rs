//! A machine: built from a `Config`, booted with a guest, run, ended.
//!
//! There is one build path. A [`Machine<Paused>`] has its CPUs at hand; a [`Machine<Running>`] has lent each to a
//! thread of its own and gets it back when it ends. Invariant: memory outlives the vCPUs that KVM lets write to it.

mod streams;
mod wait;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::fd::OwnedFd;

pub use self::streams::Streams;
use crate::arch::{self, Layout};
use crate::board::{self, Board};
use crate::bus::Buses;
use crate::config::{Config, IrqChip};
use crate::error::{refuse, status};
use crate::event::Worker;
use crate::host::output::Bell;
use crate::host::say::say;
use crate::host::sys;
use crate::load::{self, Guest};
use crate::memory::Memory;
use crate::trace::{Off, Print};
use crate::vcpu::{Flag, Stop, Vcpu, run_loop};
use crate::vm::{Vm, kvm};

/// How long a guest that dies and reboots is silent between two reports.
const REPORT_PAUSE: Duration = Duration::from_secs(1);

/// The CPUs are here.
pub struct Paused {
    vcpus: Vec<Vcpu>,
}

/// Each CPU is with its thread.
pub struct Running {
    cpus: Vec<Lent>,
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
            Self::Guest(_, Stop::Died(_)) => status::DIED,
            Self::Guest(..) => 0,
        }
    }

    /// With `--reboot` the machine starts anew.
    fn is_reset(&self) -> bool {
        matches!(self, Self::Guest(_, Stop::Reset)) || self.is_shutdown()
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
}

impl Life {
    /// Starts the clock of `--timeout`.
    pub fn new(config: &Config) -> Self {
        Self {
            deadline: config.timeout.and_then(|t| Instant::now().checked_add(t.0)),
            exits_left: config.max_exits.map(|n| Arc::new(AtomicU64::new(n))),
            signals: OnceLock::new(),
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
        let signals = sys::control_signals().context("taking over the process's signals")?;
        Ok(self.signals.get_or_init(|| signals))
    }

    /// `--max-exits` has been reached.
    fn is_spent(&self) -> bool {
        self.exits_left.as_ref().is_some_and(|left| left.load(Ordering::Relaxed) == 0)
    }
}

/// A machine that has ended. To drop it takes KVM about half a millisecond, which a process that ends anyway can save.
pub struct Ended {
    /// How it ended.
    pub end: End,
    /// What is left of it.
    pub machine: Machine<Paused>,
}

/// Runs a guest to its end and says how it ended; the whole of `bantam run`.
///
/// # Errors
/// The machine cannot be built or run.
pub fn run(config: &Config, guest: &Guest) -> Result<Ended> {
    let life = Life::new(config);
    let mut streams = Streams::open(config)?;
    let mut told: Option<Instant> = None;
    loop {
        let mut machine = build(config, &streams)?;
        machine.boot(guest)?;
        let (machine, mut end) = machine.resume(&life, &streams)?.wait(&life, &mut streams)?;
        if config.reboot && end.is_reset() && life.is_spent() {
            end = End::Guest(0, Stop::MaxExits);
        }
        let again = config.reboot && end.is_reset();
        if !again {
            crate::host::terminal::restore();
        }
        // A guest that dies again and again does not flood stderr.
        let quiet = again && (!end.is_shutdown() || told.is_some_and(|at| at.elapsed() < REPORT_PAUSE));
        if !quiet {
            machine.tell(&end);
            told = Some(Instant::now());
        }
        if !again {
            return Ok(Ended { end, machine });
        }
    }
}

/// Builds the machine that a settled `config` describes; it has no guest yet.
///
/// # Errors
/// The host cannot make it; the reason is named.
pub fn build(config: &Config, streams: &Streams) -> Result<Machine<Paused>> {
    let layout = arch::layout(config)?;
    check_cpus(config.cpus)?;
    let vm = Vm::new(arch::vm_type(kvm()?, &layout)?)?;
    let config = board::choose(&vm, config)?;
    let layout = arch::layout(&config)?;
    let memory = Memory::new(&layout.memory(), config.hugepages)?;
    vm.map(&memory)?;
    let mut board = board::build(&vm, &config, &layout, streams.serial_console(), streams.debug_console())?;
    let vcpus = (0..config.cpus).map(|id| vm.vcpu(id)).collect::<Result<Vec<_>>>()?;
    board::prepare(&vm, &vcpus, &config, &mut board)?;
    Ok(Machine { state: Paused { vcpus }, config, layout, memory, board, vm })
}

/// The soft limit warns, the hard one refuses.
fn check_cpus(cpus: u32) -> Result<()> {
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
        let print = streams.trace().map(Print::new);
        let mut running = Running { cpus: Vec::new(), ended };
        // CPU 0 last: it runs at once, the others wait for it.
        for vcpu in state.vcpus.into_iter().rev() {
            let (id, flag) = (vcpu.id(), Flag::new(life.exits_left.clone()));
            let cpu = Cpu {
                print: print.as_ref().map(|p| p.for_cpu(id)),
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

    /// Says on stderr what a person should know of the end.
    fn tell(&self, end: &End) {
        let text = match end {
            End::Guest(cpu, Stop::Died(fault)) => crate::report::death(*cpu, fault, &self.state.vcpus, &self.memory),
            End::Guest(_, Stop::Halted { interrupts: true }) => {
                "bantam: the guest halted with interrupts on, and this machine has no interrupt controller to wake it\nhint: give it one: --irqchip kernel".into()
            }
            End::Guest(_, Stop::MaxExits) => {
                format!("bantam: --max-exits reached: the guest made {} exits", self.config.max_exits.unwrap_or(0))
            }
            End::Timeout => {
                format!("bantam: --timeout reached: the guest ran for {} s", self.config.timeout.map_or(0.0, |t| t.0.as_secs_f64()))
            }
            _ => String::new(),
        };
        if !text.is_empty() {
            say(&text);
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
    /// Stops every CPU that was started and takes it back, in their order.
    fn stop(self) -> Result<Vec<Vcpu>> {
        let ended = self.ended.get().map(|(cpu, _)| *cpu);
        for cpu in &self.cpus {
            cpu.flag.stop();
            if ended != Some(cpu.id) {
                cpu.worker.kick();
            }
        }
        self.cpus.into_iter().map(|cpu| cpu.worker.join()).collect()
    }
}

/// What a vCPU's thread owns.
struct Cpu {
    vcpu: Vcpu,
    flag: Arc<Flag>,
    buses: Arc<Buses>,
    print: Option<Print>,
    ended: Arc<OnceLock<(u32, Stop)>>,
    bell: Bell,
}

impl Cpu {
    fn run(mut self) -> Vcpu {
        #[cfg(debug_assertions)]
        crate::host::fault::inject("vcpu");
        self.vcpu.adopt(&self.flag);
        let stop = match self.print {
            None => run_loop(&mut self.vcpu, &self.buses, &self.flag, &mut Off),
            Some(mut print) => run_loop(&mut self.vcpu, &self.buses, &self.flag, &mut print),
        };
        if stop == Stop::Asked {
            self.vcpu.settle(&self.buses);
        } else {
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
