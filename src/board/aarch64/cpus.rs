//! What the vCPUs are made of: their reset state, and the features that a machine is asked to have.
//!
//! Invariant: the order is KVM's (api.rst 4.82, 4.119; devices/vcpu.rst). A CPU is initialised with all its features; SVE is
//! then complete before anything else is asked of the CPU, the PMU only once the interrupt controller is there.

use std::io;

use anyhow::{Context, Result};
use kvm_bindings::{
    KVM_ARM_VCPU_PMU_V3, KVM_ARM_VCPU_PMU_V3_CTRL, KVM_ARM_VCPU_PMU_V3_INIT, KVM_ARM_VCPU_PMU_V3_IRQ,
    KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2, KVM_ARM_VCPU_SVE, kvm_device_attr, kvm_vcpu_init,
};
use kvm_ioctls::Cap;

use crate::config::{Config, CpuFeature};
use crate::error::{Refusal, refuse};
use crate::explain::call;
use crate::vcpu::Vcpu;
use crate::vm::Vm;

/// The PMU's interrupt, private to each CPU: number 7 of those, as Arm's Base System Architecture (DEN 0094, "PPI
/// assignments") has it.
pub const PMU_PPI: u32 = 7;
/// The id of the first private interrupt (IHI 0069, 2.2.1).
const FIRST_PPI: u32 = 16;

/// The host's KVM has the features that are asked for.
///
/// # Errors
/// It lacks one.
pub fn check(vm: &Vm, config: &Config) -> Result<(), Refusal> {
    refuse_lacking(config, |feature| {
        vm.fd().check_extension(match feature {
            CpuFeature::Pmu => Cap::ArmPmuV3,
            CpuFeature::Sve => Cap::ArmSve,
        })
    })
}

fn refuse_lacking(config: &Config, has: impl Fn(CpuFeature) -> bool) -> Result<(), Refusal> {
    let Some(lacking) = config.cpu_features.iter().find(|feature| !has(**feature)) else { return Ok(()) };
    let (word, what) = match lacking {
        CpuFeature::Pmu => ("pmu", "performance counters (KVM_CAP_ARM_PMU_V3)"),
        CpuFeature::Sve => ("sve", "SVE (KVM_CAP_ARM_SVE)"),
    };
    let why = format!("--cpu-features {word}: this host, its CPUs or its KVM, has no {what} for guests");
    Err(refuse(why).hint(format!("leave {word} out; `bantam check` lists what is there")))
}

/// The features of one CPU: their bits, and their names.
fn features(config: &Config, id: u32) -> (u32, String) {
    let asked = |feature| config.cpu_features.contains(&feature);
    let all = [
        (true, KVM_ARM_VCPU_PSCI_0_2, "KVM_ARM_VCPU_PSCI_0_2"),
        (id > 0, KVM_ARM_VCPU_POWER_OFF, "KVM_ARM_VCPU_POWER_OFF"),
        (asked(CpuFeature::Pmu), KVM_ARM_VCPU_PMU_V3, "KVM_ARM_VCPU_PMU_V3"),
        (asked(CpuFeature::Sve), KVM_ARM_VCPU_SVE, "KVM_ARM_VCPU_SVE"),
    ];
    let on = || all.iter().filter(|(on, ..)| *on);
    (on().fold(0, |bits, (_, bit, _)| bits | 1 << bit), on().map(|(.., name)| *name).collect::<Vec<_>>().join(", "))
}

/// Initialises the vCPUs, all but the first switched off until PSCI starts them.
///
/// # Errors
/// KVM refuses one.
pub fn init(vm: &Vm, vcpus: &[Vcpu], config: &Config) -> Result<()> {
    let mut target = kvm_vcpu_init::default();
    let why = "Which kind of CPU this host can give a guest: its own.";
    call("KVM_ARM_PREFERRED_TARGET", || (String::new(), why), || vm.fd().get_preferred_target(&mut target))
        .map_err(io::Error::from)
        .context("KVM_ARM_PREFERRED_TARGET")?;
    for vcpu in vcpus {
        let (mut own, id) = (target, vcpu.id());
        let (bits, names) = features(config, id);
        if let Some(word) = own.features.first_mut() {
            *word |= bits;
        }
        let why =
            "The CPU gets its reset state and its features; all but the first wait, switched off, for PSCI CPU_ON.";
        let fields = || (format!("vCPU {id}, target {}, features {names}", own.target), why);
        call("KVM_ARM_VCPU_INIT", fields, || vcpu.fd().vcpu_init(&own))
            .map_err(io::Error::from)
            .with_context(|| format!("KVM_ARM_VCPU_INIT of CPU {id}"))?;
        if config.cpu_features.contains(&CpuFeature::Sve) {
            finalize_sve(vcpu)?;
        }
    }
    Ok(())
}

/// Until then KVM neither runs the CPU nor shows its registers.
fn finalize_sve(vcpu: &Vcpu) -> Result<()> {
    let id = vcpu.id();
    let why = "SVE is complete: vectors as long as this host has them. The CPU's registers have their sizes now.";
    call(
        "KVM_ARM_VCPU_FINALIZE",
        || (format!("vCPU {id}, KVM_ARM_VCPU_SVE"), why),
        || vcpu.fd().vcpu_finalize(&KVM_ARM_VCPU_SVE.cast_signed()),
    )
    .map_err(io::Error::from)
    .with_context(|| format!("KVM_ARM_VCPU_FINALIZE of CPU {id}"))
}

/// What is left to do once the interrupt controller is there: the PMUs.
///
/// # Errors
/// KVM refuses one.
pub fn finish(vcpus: &[Vcpu], config: &Config) -> Result<()> {
    if !config.cpu_features.contains(&CpuFeature::Pmu) {
        return Ok(());
    }
    let line = (FIRST_PPI + PMU_PPI).cast_signed();
    let steps = [
        (KVM_ARM_VCPU_PMU_V3_IRQ, Some(&line), "The interrupt of a counter that overflows."),
        (KVM_ARM_VCPU_PMU_V3_INIT, None, "The counters are complete, and their interrupt has its place in the GIC."),
    ];
    for vcpu in vcpus {
        for (attr, value, why) in steps {
            let addr = value.map_or(0, |value| std::ptr::from_ref(value).expose_provenance() as u64);
            let attribute = kvm_device_attr { flags: 0, group: KVM_ARM_VCPU_PMU_V3_CTRL, attr: attr.into(), addr };
            let (id, value) = (vcpu.id(), value.map_or(String::new(), |value| format!(": {value}")));
            let fields = || (format!("vCPU {id}, KVM_ARM_VCPU_PMU_V3_CTRL, attribute {attr}{value}"), why);
            call("KVM_SET_DEVICE_ATTR", fields, || vcpu.fd().set_device_attr(&attribute))
                .map_err(io::Error::from)
                .with_context(|| format!("KVM_SET_DEVICE_ATTR of CPU {id}'s PMU, attribute {attr}"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asking(cpu_features: &[CpuFeature]) -> Config {
        Config { cpu_features: cpu_features.to_vec(), ..Config::default() }
    }

    #[test]
    fn a_cpu_has_the_features_that_are_asked_for_and_waits_if_it_is_not_the_first() {
        let bits = |config: &Config, id| features(config, id).0;
        assert_eq!(bits(&asking(&[]), 0), 1 << 2);
        assert_eq!(bits(&asking(&[]), 1), 1 << 2 | 1);
        assert_eq!(bits(&asking(&[CpuFeature::Pmu]), 0), 1 << 2 | 1 << 3);
        let both = features(&asking(&[CpuFeature::Sve, CpuFeature::Pmu]), 3);
        assert_eq!(both.0, 1 << 2 | 1 | 1 << 3 | 1 << 4);
        assert!(both.1.ends_with("KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PMU_V3, KVM_ARM_VCPU_SVE"), "{}", both.1);
    }

    #[test]
    fn what_the_host_lacks_is_refused_by_name() {
        let only_pmu = |feature| feature == CpuFeature::Pmu;
        refuse_lacking(&asking(&[]), |_| false).unwrap();
        refuse_lacking(&asking(&[CpuFeature::Pmu]), only_pmu).unwrap();
        let refusal = refuse_lacking(&asking(&[CpuFeature::Pmu, CpuFeature::Sve]), only_pmu).unwrap_err();
        assert_eq!(refusal.status, 125);
        assert!(
            refusal.to_string().contains("--cpu-features sve") && refusal.to_string().contains("no SVE"),
            "{refusal}"
        );
        let refusal = refuse_lacking(&asking(&[CpuFeature::Pmu]), |_| false).unwrap_err();
        assert!(refusal.to_string().contains("KVM_CAP_ARM_PMU_V3"), "{refusal}");
    }
}
