//! A machine that stands still, as a snapshot; and one that was just built, from it.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use kvm_ioctls::VcpuFd;

use super::streams::Streams;
use super::{Machine, Paused};
use crate::arch;
use crate::snapshot::{self, Snapshot, State};
use crate::vcpu::Vcpu;
use crate::vm::kvm;

impl Machine<Paused> {
    /// What the machine holds besides its RAM. Its devices finish first what they are at.
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
        Ok(State { cpus, kvm: arch::save_vm(self.vm.fd(), &self.cpus(), irqchip)?, devices })
    }

    fn cpus(&self) -> Vec<&VcpuFd> {
        self.state.vcpus.iter().map(Vcpu::fd).collect()
    }

    /// Makes a machine that was just built the one of a snapshot.
    ///
    /// # Errors
    /// It is a machine of another kind, or the snapshot is not as it was written.
    pub fn load(&mut self, snapshot: &Snapshot) -> Result<()> {
        let State { cpus, kvm: of_kvm, devices } = &snapshot.state;
        snapshot.fill(&self.memory)?;
        anyhow::ensure!(cpus.len() == self.state.vcpus.len(), "the state is that of {} CPUs", cpus.len());
        for (vcpu, saved) in self.state.vcpus.iter().zip(cpus) {
            arch::load_cpu(kvm()?, vcpu.fd(), saved).with_context(|| format!("CPU {}", vcpu.id()))?;
        }
        arch::load_vm(self.vm.fd(), &self.cpus(), of_kvm)?;
        // Last: what raises an interrupt needs somebody to raise it to.
        self.board.buses.load(devices)
    }

    /// Writes a snapshot, and tells whoever asked for it.
    pub(super) fn snapshot(&self, path: &Path, streams: &mut Streams) {
        let begun = Instant::now();
        let config = self.config.of_a_snapshot();
        let guest = streams.control.guest();
        let whole = path.is_absolute().then_some(()).context("the folder is to be named by its whole path");
        let written = whole
            .and_then(|()| self.save())
            .and_then(|state| snapshot::write(path, guest, &config, &state, &self.memory));
        let answer = written.map_err(|e| format!("{e:#}")).map(|written| {
            format!("{{\"memory\":{},\"seconds\":{:.6}}}", written.memory, begun.elapsed().as_secs_f64())
        });
        streams.control.answer(&answer);
    }
}
