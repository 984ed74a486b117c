//! What a guest is told about its CPU: what KVM can emulate, less what a guest must not have.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const ECX_DTES64: u32 = 1 << 2;
const ECX_VMX: u32 = 1 << 5;
const ECX_PDCM: u32 = 1 << 15;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_DS: u32 = 1 << 21;
const EDX_HTT: u32 = 1 << 28;
const FEATURES_EDX_ARCH_LBR: u32 = 1 << 19;
const EXT_ECX_SVM: u32 = 1 << 2;
const EXT_ECX_IBS: u32 = 1 << 10;
/// Performance counters of the core, the northbridge and the last-level cache.
const EXT_ECX_PERFCTR: u32 = 1 << 23 | 1 << 24 | 1 << 28;

/// Extended topology, and its successor that Linux asks for first (Intel SDM, CPUID).
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;
/// Bits of an APIC id that number the cores of a package: 128 of them are more than a VM has.
const CORE_BITS: u32 = 7;

/// The table of one vCPU: one thread per core, all cores in one package. Nested virtualization, the performance counters and what
/// records branches are hidden; the registers of each are denied as well (`msrs.rs`).
#[must_use]
pub fn of_vcpu(supported: &CpuId, vcpu_index: u8, vcpu_count: u8) -> Vec<kvm_cpuid_entry2> {
    let last_core = u32::from(vcpu_count.saturating_sub(1));
    let mut entries = Vec::new();
    for mut entry in supported.as_slice().iter().copied() {
        match entry.function {
            // Features; initial APIC id and logical processors in EBX (Intel SDM, CPUID leaf 1).
            1 => {
                entry.ecx = (entry.ecx | ECX_HYPERVISOR | ECX_TSC_DEADLINE) & !(ECX_VMX | ECX_PDCM | ECX_DTES64);
                entry.edx &= !EDX_DS;
                entry.ebx = (entry.ebx & 0xffff) | u32::from(vcpu_count) << 16 | u32::from(vcpu_index) << 24;
                if vcpu_count > 1 {
                    entry.edx |= EDX_HTT;
                }
            }
            // Cache topology: every cache belongs to one core, all cores are in one package.
            4 => entry.eax = (entry.eax & 0x3fff) | last_core << 26,
            7 if entry.index == 0 => entry.edx &= !FEATURES_EDX_ARCH_LBR,
            // Performance counters and last branch records, SVM, instruction-based sampling, AMD's counters: none.
            0xa | 0x1c | 0x8000_000a | 0x8000_001b | 0x8000_0022 => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0)
            }
            // KVM gives one level; ours stand behind the others.
            LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 => continue,
            0x8000_0001 => entry.ecx &= !(EXT_ECX_SVM | EXT_ECX_IBS | EXT_ECX_PERFCTR),
            0x8000_0008 => entry.ecx = CORE_BITS << 12 | last_core,
            // Cache topology (AMD).
            0x8000_001d => entry.eax &= 0x3fff,
            // Extended APIC id (AMD).
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (u32::from(vcpu_index), u32::from(vcpu_index), 0),
            _ => {}
        }
        entries.push(entry);
    }
    let max_leaf = entries.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    if max_leaf >= LEAF_TOPOLOGY {
        entries.extend(topology(vcpu_index, vcpu_count));
    }
    entries
}

/// The two levels, and the one that ends the list.
fn topology(vcpu_index: u8, vcpu_count: u8) -> [kvm_cpuid_entry2; 3] {
    let level = |index, eax, ebx, ecx| kvm_cpuid_entry2 {
        function: LEAF_TOPOLOGY,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx,
        edx: u32::from(vcpu_index),
        ..Default::default()
    };
    [level(0, 0, 1, LEVEL_THREAD), level(1, CORE_BITS, u32::from(vcpu_count), LEVEL_CORE | 1), level(2, 0, 0, 2)]
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{CpuId, kvm_cpuid_entry2};
    use proptest::prelude::*;

    use super::of_vcpu;

    fn entry(function: u32, eax: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ecx, ..Default::default() }
    }

    #[test]
    fn nested_virtualization_and_performance_counters_are_hidden() {
        const ALL: u32 = u32::MAX;
        let leaf =
            |function| kvm_cpuid_entry2 { function, eax: ALL, ebx: ALL, ecx: ALL, edx: ALL, ..Default::default() };
        let gone = [0xa, 0x1c, 0x8000_000a, 0x8000_001b, 0x8000_0022];
        let supported: Vec<_> = [1, 7, 0x8000_0001].into_iter().chain(gone).map(leaf).collect();
        let cpuid = of_vcpu(&CpuId::from_entries(&supported).expect("cpuid"), 2, 4);
        assert_eq!(cpuid[0].ecx, !(1 << 2 | 1 << 5 | 1 << 15));
        assert_eq!(cpuid[0].edx, !(1 << 21));
        assert_eq!(cpuid[0].ebx >> 16, 2 << 8 | 4);
        assert_eq!(cpuid[1].edx, !(1 << 19));
        assert_eq!(cpuid[2].ecx, !(1 << 2 | 1 << 10 | 1 << 23 | 1 << 24 | 1 << 28));
        let left: Vec<u32> = cpuid[3..].iter().map(|leaf| leaf.eax | leaf.ebx | leaf.ecx | leaf.edx).collect();
        assert_eq!(left, [0; 5]);
    }

    #[test]
    fn topology_is_there_whatever_kvm_says_of_it_unless_the_cpu_is_too_old() {
        let supported = CpuId::from_entries(&[entry(0, 0xd, 0), entry(0xb, 0, 0), entry(0x1f, 0, 0)]).expect("cpuid");
        let cpuid = of_vcpu(&supported, 5, 8);
        let levels: Vec<_> =
            cpuid.iter().filter(|e| e.function == 0xb).map(|e| (e.index, e.eax, e.ebx, e.edx)).collect();
        assert_eq!(levels, [(0, 0, 1, 5), (1, 7, 8, 5), (2, 0, 0, 5)]);
        assert!(!cpuid.iter().any(|e| e.function == 0x1f));
        let old = CpuId::from_entries(&[entry(0, 0xa, 0)]).expect("cpuid");
        assert_eq!(of_vcpu(&old, 0, 1).len(), 1);
    }

    proptest! {
        #[test]
        fn every_vcpu_has_an_apic_id_of_its_own_in_one_package(count in 1_u8..=64) {
            let supported = CpuId::from_entries(&[entry(0, 0x20, 0), entry(1, 0, 0)]).expect("cpuid");
            let ids: std::collections::BTreeSet<u32> =
                (0..count).map(|index| of_vcpu(&supported, index, count)[1].ebx >> 24).collect();
            prop_assert_eq!(ids.len(), usize::from(count));
            prop_assert!(ids.iter().all(|id| id >> 7 == 0));
        }
    }
}
