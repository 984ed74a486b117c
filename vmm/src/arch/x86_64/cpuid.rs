//! What a guest is told about its CPU: what KVM can emulate, less what a guest must not have.

use kvm_bindings::CpuId;

const ECX_VMX: u32 = 1 << 5;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
const EXT_ECX_SVM: u32 = 1 << 2;

/// The table of one vCPU. Nested virtualization and the performance counters are hidden.
#[must_use]
pub fn of_vcpu(supported: &CpuId, vcpu_index: u8, vcpu_count: u8) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            // Features; initial APIC id and logical processors in EBX (Intel SDM, CPUID leaf 1).
            1 => {
                entry.ecx = (entry.ecx | ECX_HYPERVISOR | ECX_TSC_DEADLINE) & !ECX_VMX;
                entry.ebx = (entry.ebx & 0xffff) | u32::from(vcpu_count) << 16 | u32::from(vcpu_index) << 24;
                if vcpu_count > 1 {
                    entry.edx |= EDX_HTT;
                }
            }
            // Cache topology: every cache belongs to one core, all cores are in one package.
            4 => entry.eax = (entry.eax & 0x3fff) | u32::from(vcpu_count.saturating_sub(1)) << 26,
            // Performance counters: none.
            0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            // Topology: one thread per core, all cores in one package.
            0xb | 0x1f => {
                entry.edx = u32::from(vcpu_index);
                match entry.index {
                    0 => (entry.eax, entry.ebx, entry.ecx) = (0, 1, 1 << 8),
                    1 => (entry.eax, entry.ebx, entry.ecx) = (7, u32::from(vcpu_count), 2 << 8 | 1),
                    level => (entry.eax, entry.ebx, entry.ecx) = (0, 0, level),
                }
            }
            0x8000_0001 => entry.ecx &= !EXT_ECX_SVM,
            0x8000_0008 => entry.ecx = 7 << 12 | u32::from(vcpu_count.saturating_sub(1)),
            // SVM features: none.
            0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            // Extended APIC id (AMD).
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (u32::from(vcpu_index), u32::from(vcpu_index), 0),
            _ => {}
        }
    }
    cpuid
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{CpuId, kvm_cpuid_entry2};

    use super::{ECX_VMX, EXT_ECX_SVM, of_vcpu};

    #[test]
    fn nested_virtualization_is_hidden() {
        let entry = |function, ecx| kvm_cpuid_entry2 { function, ecx, ..Default::default() };
        let supported = CpuId::from_entries(&[entry(1, u32::MAX), entry(0x8000_0001, u32::MAX)]).expect("cpuid");
        let cpuid = of_vcpu(&supported, 2, 4);
        assert_eq!(cpuid.as_slice()[0].ecx & ECX_VMX, 0);
        assert_eq!(cpuid.as_slice()[0].ebx >> 16, 2 << 8 | 4);
        assert_eq!(cpuid.as_slice()[1].ecx & EXT_ECX_SVM, 0);
    }
}
