//! What CPUID says on each CPU: what KVM supports, with that CPU's own number and the machine's topology in it.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::config::Cpus;

/// Leaf 1: ECX bits for the TSC-deadline timer and "a hypervisor is there", EDX bit for several logical processors.
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001 ECX: several logical processors, by AMD's way; and their topology in leaf 0x8000_001e.
const CMP_LEGACY: u32 = 1 << 1;
/// KVM's leaf with the frequencies in kHz, which VMware began (Linux arch/x86/kernel/cpu/vmware.c), and the first of all.
const HYPERVISOR_FIRST: u32 = 0x4000_0000;
const FREQUENCIES: u32 = 0x4000_0010;
/// KVM's local APIC timer counts at 1 GHz, whatever the host's does.
const APIC_KHZ: u32 = 1_000_000;

/// What a CPU's leaves depend on.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// The CPU's number, which is its APIC id.
    pub id: u32,
    /// The machine's CPUs.
    pub cpus: Cpus,
    /// KVM has a local APIC, with its deadline timer.
    pub local_apic: bool,
    /// The frequency of the TSC, where KVM says it.
    pub tsc_khz: Option<u32>,
}

/// Bits that count up to `number`.
fn bits(number: u32) -> u32 {
    u32::BITS - number.saturating_sub(1).leading_zeros()
}

impl Identity {
    /// CPUs of one package, as APIC ids count them.
    fn package(&self) -> u32 {
        self.cpus.cores.saturating_mul(self.cpus.threads)
    }

    /// Bits of an APIC id below the core's number, and below the package's.
    fn shifts(&self) -> (u32, u32) {
        let thread = bits(self.cpus.threads);
        (thread, thread + bits(self.cpus.cores))
    }

    fn correct(&self, leaf: &mut kvm_cpuid_entry2) {
        let (id, package) = (self.id, self.package());
        let (thread, core) = self.shifts();
        let last = package.saturating_sub(1);
        match (leaf.function, leaf.index) {
            // SDM vol. 2, CPUID: EBX[31:24] initial APIC id, EBX[23:16] number of logical processor ids in the package.
            (1, _) => {
                leaf.ebx = leaf.ebx & 0xffff | id << 24 | package.min(255) << 16;
                leaf.ecx |= HYPERVISOR;
                leaf.ecx = if self.local_apic { leaf.ecx | TSC_DEADLINE } else { leaf.ecx & !TSC_DEADLINE };
                leaf.edx = if package > 1 { leaf.edx | HTT } else { leaf.edx & !HTT };
            }
            // Caches: EAX[25:14] ids that share it, less 1 (the last level is the package's), EAX[31:26] cores, less 1.
            (4, _) if leaf.eax & 0x1f != 0 => {
                let level = leaf.eax >> 5 & 7;
                let share = if level >= 3 { (1 << core) - 1 } else { (1 << thread) - 1 };
                leaf.eax = leaf.eax & 0x3fff | share << 14 | ((1u32 << (core - thread)) - 1).min(63) << 26;
            }
            // Extended topology: threads of a core (level 0), logical processors of a package (level 1).
            (0xb | 0x1f, 0) => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (thread, self.cpus.threads, 0x100, id),
            (0xb | 0x1f, 1) => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (core, package, 0x201, id),
            (0xb | 0x1f, level) => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, level, id),
            // AMD APM vol. 3, appendix E: the same in AMD's own leaves.
            (0x8000_0001, _) => {
                leaf.ecx = if package > 1 { leaf.ecx | CMP_LEGACY } else { leaf.ecx & !CMP_LEGACY };
            }
            (0x8000_0008, _) => leaf.ecx = leaf.ecx & !0xf0ff | core << 12 | last.min(255),
            (0x8000_001d, _) if leaf.eax & 0x1f != 0 => {
                let level = leaf.eax >> 5 & 7;
                let share = if level >= 3 { last } else { self.cpus.threads.saturating_sub(1) };
                leaf.eax = leaf.eax & 0x3fff | (share & 0xfff) << 14;
            }
            (0x8000_001e, _) => {
                let number = id >> thread & ((1 << (core - thread)) - 1);
                leaf.eax = id;
                leaf.ebx = self.cpus.threads.saturating_sub(1) << 8 | number;
                leaf.ecx = id >> core;
            }
            (HYPERVISOR_FIRST, _) => leaf.eax = leaf.eax.max(FREQUENCIES),
            _ => {}
        }
    }
}

/// The CPUID of one CPU.
pub fn cpuid(supported: &CpuId, identity: Identity) -> CpuId {
    let mut leaves: Vec<_> = supported.as_slice().to_vec();
    // KVM since Linux 6.2 gives the first level of the extended topology only, and leaves all of it to us.
    for function in [0xb, 0x1f] {
        let has = |index| leaves.iter().any(|leaf| (leaf.function, leaf.index) == (function, index));
        if has(0) && !has(1) {
            let flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
            leaves.push(kvm_cpuid_entry2 { function, index: 1, flags, ..Default::default() });
        }
    }
    leaves.iter_mut().for_each(|leaf| identity.correct(leaf));
    let has = |function| leaves.iter().any(|leaf| leaf.function == function);
    if let Some(eax) = identity.tsc_khz.filter(|_| has(HYPERVISOR_FIRST) && !has(FREQUENCIES)) {
        leaves.push(kvm_cpuid_entry2 { function: FREQUENCIES, eax, ebx: APIC_KHZ, ..Default::default() });
    }
    if let (Some(khz), Some(leaf)) = (identity.tsc_khz, leaves.iter_mut().find(|leaf| leaf.function == 0x15)) {
        // SDM vol. 2: the TSC runs at ECX Hz x EBX / EAX; the crystal is what the local APIC's timer counts.
        (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (APIC_KHZ, khz, APIC_KHZ.saturating_mul(1000), 0);
    }
    // More leaves than KVM takes cannot be: it gave all but one.
    CpuId::from_entries(&leaves).unwrap_or_else(|_| supported.clone())
}

/// Where CPUID has bits that each stand for a feature (SDM vol. 2, AMD APM vol. 3): leaf and index, the registers from EAX
/// to EDX, of each the bits that count. Some follow what the guest does: OSXSAVE and MONITOR, OSPKE.
const FEATURES: [(u32, u32, [u32; 4]); 6] = [
    (1, 0, [0, 0, !(1 << 27 | 1 << 3), !0]),
    (7, 0, [0, !0, !(1 << 4), !0]),
    (7, 1, [!0, 0, 0, !0]),
    (0xd, 1, [!0, 0, 0, 0]),
    (0x8000_0001, 0, [0, 0, !0, !0]),
    (0x8000_0008, 0, [0, !0, 0, 0]),
];

/// The features that a guest was told of by `saved` (function, index, flags, EAX, EBX, ECX, EDX) and that a CPU here does
/// not have, whose leaves are `here`.
pub fn lacking(saved: &[[u32; 7]], here: &[kvm_cpuid_entry2]) -> Vec<String> {
    let of = |[function, index, _, registers @ ..]: &[u32; 7]| ((*function, *index), *registers);
    let has = |wanted: (u32, u32)| {
        let leaf = here.iter().find(|leaf| (leaf.function, leaf.index) == wanted);
        leaf.map_or([0; 4], |leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx])
    };
    let mut lacking = Vec::new();
    for (leaf, told) in saved.iter().map(of) {
        let Some((.., counts)) = FEATURES.iter().find(|(function, index, _)| (*function, *index) == leaf) else {
            continue;
        };
        let names = ["EAX", "EBX", "ECX", "EDX"].into_iter();
        for (((name, told), has), counts) in names.zip(told).zip(has(leaf)).zip(counts) {
            let more = told & !has & counts;
            if more != 0 {
                lacking.push(format!("{:#x}.{} {name} {more:#x}", leaf.0, leaf.1));
            }
        }
    }
    lacking
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, ebx: 0x1234_5678, ..Default::default() }
    }

    fn on(id: u32, cpus: &str, leaves: &[kvm_cpuid_entry2]) -> Vec<kvm_cpuid_entry2> {
        let identity = Identity { id, cpus: cpus.parse().unwrap(), local_apic: true, tsc_khz: Some(2_400_000) };
        cpuid(&CpuId::from_entries(leaves).unwrap(), identity).as_slice().to_vec()
    }

    #[test]
    fn each_cpu_has_its_own_number() {
        let leaves = on(2, "5", &[leaf(0, 0), leaf(1, 0), leaf(0xb, 0), leaf(0xb, 1)]);
        assert_eq!(leaves[0], leaf(0, 0));
        assert_eq!((leaves[1].ebx, leaves[1].edx & HTT), (0x0205_5678, HTT));
        assert_eq!((leaves[2].ebx, leaves[2].edx), (1, 2));
        assert_eq!((leaves[3].eax, leaves[3].ebx, leaves[3].edx), (3, 5, 2));
    }

    #[test]
    fn sockets_cores_and_threads_are_told_in_both_makers_ways() {
        let cache = kvm_cpuid_entry2 { eax: 3 << 5 | 1, ..leaf(4, 3) };
        let inner = kvm_cpuid_entry2 { eax: 1 << 5 | 1, ..leaf(4, 0) };
        let all = [leaf(0xb, 0), leaf(0xb, 1), cache, inner, leaf(0x8000_0008, 0), leaf(0x8000_001e, 0)];
        // The second thread of the third core of the second package.
        let leaves = on(13, "sockets=2,cores=4,threads=2", &all);
        assert_eq!((leaves[0].eax, leaves[0].ebx), (1, 2));
        assert_eq!((leaves[1].eax, leaves[1].ebx), (3, 8));
        assert_eq!((leaves[2].eax >> 14 & 0xfff, leaves[2].eax >> 26), (7, 3));
        assert_eq!(leaves[3].eax >> 14 & 0xfff, 1);
        assert_eq!(leaves[4].ecx, 3 << 12 | 7);
        assert_eq!((leaves[5].eax, leaves[5].ebx, leaves[5].ecx), (13, 1 << 8 | 2, 1));
    }

    #[test]
    fn a_level_of_the_topology_that_kvm_leaves_out_is_put_in() {
        let leaves = on(1, "cores=4,threads=2", &[leaf(0xb, 0)]);
        assert_eq!((leaves.len(), leaves[0].eax, leaves[0].ebx), (2, 1, 2));
        let kvm_cpuid_entry2 { index, flags, eax, ebx, ecx, edx, .. } = leaves[1];
        assert_eq!((index, flags, eax, ebx, ecx, edx), (1, 1, 3, 8, 0x201, 1));
        assert_eq!(on(1, "4", &[leaf(0xb, 0), leaf(0xb, 1)]).len(), 2);
    }

    #[test]
    fn a_feature_that_is_not_here_is_named() {
        let here = [leaf(7, 0), kvm_cpuid_entry2 { ecx: 0x10, ..leaf(1, 0) }];
        let saved = |function, index, ebx, ecx| [function, index, 0, 5, ebx, ecx, 0];
        assert!(
            lacking(&[saved(7, 0, 0x1234_0000, 1 << 4), saved(1, 0, 99, 1 << 27 | 0x10), saved(4, 0, 1, 1)], &here)
                .is_empty()
        );
        let all = [saved(7, 0, 0x1234_5679, 0), saved(1, 0, 0, 0x30), saved(0xd, 1, 0, 0)];
        assert_eq!(lacking(&all, &here), ["0x7.0 EBX 0x1", "0x1.0 ECX 0x20", "0xd.1 EAX 0x5"]);
    }

    #[test]
    fn the_tsc_s_frequency_is_told_where_there_is_a_place_for_it() {
        let leaves = on(0, "1", &[leaf(0x15, 0), leaf(HYPERVISOR_FIRST, 0)]);
        assert_eq!((leaves[0].eax, leaves[0].ebx, leaves[0].ecx), (1_000_000, 2_400_000, 1_000_000_000));
        assert_eq!((leaves[1].eax, leaves[2].function, leaves[2].eax), (FREQUENCIES, FREQUENCIES, 2_400_000));
        assert_eq!(on(0, "1", &[leaf(0, 0)]).len(), 1);
    }
}
