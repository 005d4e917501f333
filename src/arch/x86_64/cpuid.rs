//! What CPUID says on each CPU: what KVM supports, with that CPU's own number in it.

use kvm_bindings::CpuId;

/// Leaf 1: ECX bits for the TSC-deadline timer and "a hypervisor is there", EDX bit for several logical processors.
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const HTT: u32 = 1 << 28;

/// The CPUID of CPU `id` of `cpus` (both at most 255). `local_apic`: KVM has one, with its deadline timer.
pub fn cpuid(supported: &CpuId, id: u32, cpus: u32, local_apic: bool) -> CpuId {
    let mut cpuid = supported.clone();
    let bits = u32::BITS - cpus.saturating_sub(1).leading_zeros();
    for leaf in cpuid.as_mut_slice() {
        match (leaf.function, leaf.index) {
            // SDM vol. 2, CPUID: EBX[31:24] initial APIC id, EBX[23:16] number of logical processor ids.
            (1, _) => {
                leaf.ebx = leaf.ebx & 0xffff | id << 24 | cpus << 16;
                leaf.ecx |= HYPERVISOR;
                leaf.ecx = if local_apic { leaf.ecx | TSC_DEADLINE } else { leaf.ecx & !TSC_DEADLINE };
                leaf.edx = if cpus > 1 { leaf.edx | HTT } else { leaf.edx & !HTT };
            }
            // Extended topology: one thread a core (level 0), all cores in one package (level 1).
            (0xb | 0x1f, 0) => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 1, 0x100, id),
            (0xb | 0x1f, 1) => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (bits, cpus, 0x201, id),
            (0xb | 0x1f, level) => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, level, id),
            _ => {}
        }
    }
    cpuid
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_cpuid_entry2;

    #[test]
    fn each_cpu_has_its_own_number() {
        let leaf = |function, index| kvm_cpuid_entry2 { function, index, ebx: 0x1234_5678, ..Default::default() };
        let supported = CpuId::from_entries(&[leaf(0, 0), leaf(1, 0), leaf(0xb, 0), leaf(0xb, 1)]).unwrap();
        let third = cpuid(&supported, 2, 5, true);
        let leaves = third.as_slice();
        assert_eq!(leaves[0], supported.as_slice()[0]);
        assert_eq!((leaves[1].ebx, leaves[1].edx & HTT), (0x0205_5678, HTT));
        assert_eq!((leaves[2].ebx, leaves[2].edx), (1, 2));
        assert_eq!((leaves[3].eax, leaves[3].ebx, leaves[3].edx), (3, 5, 2));
    }
}
