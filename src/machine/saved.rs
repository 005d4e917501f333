//! A machine that stands still, as a snapshot; and one that was just built, from it.

use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{Context, Result};
use kvm_ioctls::VcpuFd;

use super::streams::Streams;
use super::writing::{Stood, Writing, told};
use super::{Machine, Paused, build_on};
use crate::config::Config;
use crate::event::Readiness;
use crate::snapshot::{Snapshot, State, Taken, Target};
use crate::vcpu::Vcpu;
use crate::vm::kvm;
use crate::{arch, board};

impl Machine<Paused> {
    /// What the machine holds besides its RAM, which is not complete before: its devices finish first what they are at, and
    /// some interrupt controllers write what they know to it.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn save(&self) -> Result<State> {
        let irqchip = self.config.irqchip;
        // They may still write to RAM and raise interrupts.
        let devices = self.board.buses.save();
        let one =
            |vcpu: &Vcpu| arch::save_cpu(kvm()?, vcpu.fd(), irqchip).with_context(|| format!("CPU {}", vcpu.id()));
        let cpus = self.state.vcpus.iter().map(one).collect::<Result<_>>()?;
        // This too may write to RAM.
        Ok(State { cpus, kvm: board::save_vm(&self.vm, &self.cpus(), &self.board, irqchip)?, devices })
    }

    fn cpus(&self) -> Vec<&VcpuFd> {
        self.state.vcpus.iter().map(Vcpu::fd).collect()
    }

    /// Builds the machine of a snapshot, as it was when that was written. `config` says what it has another of, as its name.
    ///
    /// # Errors
    /// The host cannot make it, or the snapshot is not as it was written, or of a machine of another kind.
    pub fn of(snapshot: &Snapshot, config: &Config, streams: &Streams) -> Result<Self> {
        let mut machine = build_on(config, streams, |spans| snapshot.memory(spans))?;
        machine.load(&snapshot.state)?;
        Ok(machine)
    }

    /// The same for one that goes on, and is told that it is another machine now.
    ///
    /// # Errors
    /// The same.
    pub fn spawn(snapshot: &Snapshot, config: &Config, streams: &Streams) -> Result<Self> {
        let machine = Self::of(snapshot, config, streams)?;
        // A guest that waits for input asked for it in its former life; nobody else is at the device yet.
        let _ = machine.board.buses.service(machine.board.serial);
        board::renew(&machine.board, &machine.memory)?;
        Ok(machine)
    }

    fn load(&mut self, state: &State) -> Result<()> {
        let State { cpus, kvm: of_kvm, devices } = state;
        anyhow::ensure!(cpus.len() == self.state.vcpus.len(), "the state is that of {} CPUs", cpus.len());
        for (vcpu, saved) in self.state.vcpus.iter().zip(cpus) {
            arch::load_cpu(kvm()?, vcpu.fd(), saved).with_context(|| format!("CPU {}", vcpu.id()))?;
        }
        board::load_vm(&self.vm, &self.cpus(), &self.board, of_kvm)?;
        // Last: what raises an interrupt needs somebody to raise it to.
        self.board.buses.load(devices)
    }

    /// Takes a snapshot, and has it written while the machine goes on where the host has a way to that; whoever asked for
    /// it, since when the CPUs were to stop, is told.
    pub(super) fn snapshot(&self, target: Target, since: Instant, readiness: &Readiness, streams: &mut Streams) {
        let bell = streams.bell();
        let Err(answer) = self.take(&target, streams.control.guest()).and_then(|mut taken| {
            let stood = || if streams.control.runs() { Stood::Since(since) } else { Stood::For(since.elapsed()) };
            if let Err(why) = taken.freeze() {
                // Nothing cancels it, as nobody else is served.
                let written = taken.write(&target, &AtomicBool::new(false))?;
                streams.control.answer(&Ok(told(written, since.elapsed(), Some(&why.to_string()))));
                return Ok(());
            }
            streams.control.writes(Writing::start(taken, target, stood(), bell)?, readiness);
            Ok(())
        }) else {
            return;
        };
        streams.control.answer(&Err(format!("{answer:#}")));
    }

    fn take(&self, target: &Target, guest: &str) -> Result<Taken> {
        target.path.is_absolute().then_some(()).context("the folder is to be named by its whole path")?;
        Taken::new(guest, self.config.of_a_snapshot(), self.save()?, &self.memory)
    }
}
