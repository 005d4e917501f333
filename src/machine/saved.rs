//! A machine that stands still, as a snapshot; and one that was just built, from it.

use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::{Context, Result};
use kvm_ioctls::VcpuFd;

use super::streams::Streams;
use super::{Machine, Paused, build_on};
use crate::config::Config;
use crate::snapshot::{Snapshot, State, Taken};
use crate::vcpu::Vcpu;
use crate::virtio::worker::Devices;
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
        let at = UNIX_EPOCH.elapsed().map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX));
        // This too may write to RAM.
        Ok(State { at, cpus, kvm: board::save_vm(&self.vm, &self.cpus(), &self.board, irqchip)?, devices })
    }

    fn cpus(&self) -> Vec<&VcpuFd> {
        self.state.vcpus.iter().map(Vcpu::fd).collect()
    }

    /// Its CPUs in the order of their numbers, for whoever runs them by itself.
    pub fn vcpus(&mut self) -> &mut [Vcpu] {
        &mut self.state.vcpus
    }

    /// Builds the machine of a snapshot, as it was when that was written. `config` says what it has another of, as its name.
    ///
    /// # Errors
    /// The host cannot make it, or the snapshot is not as it was written, or of a machine of another kind.
    pub fn of(snapshot: &Snapshot, config: &Config, streams: &Streams) -> Result<Self> {
        let mut machine = build_on(config, streams, |spans| snapshot.memory(spans, || streams.bell()))?;
        machine.load(&snapshot.state, snapshot.passed())?;
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
        if let Some(bench) = &machine.board.bench {
            bench.with(Devices::renew);
        }
        Ok(machine)
    }

    /// So much later than it was then.
    fn load(&mut self, state: &State, passed: Duration) -> Result<()> {
        let State { cpus, kvm: of_kvm, devices, at: _ } = state;
        anyhow::ensure!(cpus.len() == self.state.vcpus.len(), "the state is that of {} CPUs", cpus.len());
        for (vcpu, saved) in self.state.vcpus.iter().zip(cpus) {
            arch::load_cpu(kvm()?, vcpu.fd(), saved).with_context(|| format!("CPU {}", vcpu.id()))?;
        }
        board::load_vm(&self.vm, &self.cpus(), &self.board, (of_kvm, passed))?;
        // It shall take note that it stood still, lest it complains of a stall.
        if passed > Duration::from_secs(1) {
            let hear = self.cpus().into_iter().zip(cpus).filter(|(_, saved)| saved.hears_of_stops());
            hear.for_each(|(fd, _)| arch::was_stopped(fd));
        }
        // Last: what raises an interrupt needs somebody to raise it to.
        self.board.buses.load(devices)
    }

    /// Gives whoever writes a snapshot what it asked for; since when the CPUs were to stop for it.
    pub(super) fn snapshot(&self, since: Instant, streams: &mut Streams) {
        let guest = streams.control.guest();
        let taken = self.save().and_then(|state| Taken::new(guest, self.config.of_a_snapshot(), state));
        streams.control.keeps(taken, since);
    }
}
