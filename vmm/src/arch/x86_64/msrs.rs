//! Model-specific registers that no guest reads or writes, whatever KVM makes of them: an access is a general protection fault.
//!
//! CPUID shows none of what they are for. Linux looks for some of them all the same, and is prepared for the fault. DEBUGCTL (0x1d9) is
//! not among them, for Linux takes for granted that it is there; which branches a guest has the CPU record by it, the guest cannot read.

use std::ops::RangeInclusive;

/// How many registers a window has.
pub const WINDOW_LEN: u32 = 0x2000;
/// The first register of each window; others are KVM's alone to judge.
const WINDOWS: [u32; 4] = [0, 0x4000_0000, 0xc000_0000, 0xc001_0000];

/// Each group is in one window.
const DENIED: [RangeInclusive<u32>; 27] = [
    // Performance counters.
    0xc1..=0xc8,   // IA32_PMC
    0x186..=0x18d, // IA32_PERFEVTSEL
    0x1a6..=0x1a7, // MSR_OFFCORE_RSP
    0x309..=0x310, // IA32_FIXED_CTR
    0x345..=0x345, // IA32_PERF_CAPABILITIES
    0x38d..=0x391, // IA32_FIXED_CTR_CTRL, IA32_PERF_GLOBAL_*
    0x3f1..=0x3f2, // IA32_PEBS_ENABLE, MSR_PEBS_DATA_CFG
    0x4c1..=0x4c8, // IA32_A_PMC
    0x600..=0x600, // IA32_DS_AREA
    // Last branch records. Between the two stacks are the registers of shadow stacks, behind them the timer's deadline.
    0x1c8..=0x1c9,   // MSR_LBR_SELECT, MSR_LASTBRANCH_TOS
    0x1db..=0x1de,   // LASTBRANCHFROMIP, LASTBRANCHTOIP, LASTINTFROMIP, LASTINTTOIP
    0x680..=0x69f,   // MSR_LASTBRANCH_n_FROM_IP
    0x6c0..=0x6df,   // MSR_LASTBRANCH_n_TO_IP
    0xdc0..=0xddf,   // MSR_LBR_INFO
    0x1200..=0x121f, // IA32_LBR_n_INFO
    0x14ce..=0x14cf, // IA32_LBR_CTL, IA32_LBR_DEPTH
    0x1500..=0x151f, // IA32_LBR_n_FROM_IP
    0x1600..=0x161f, // IA32_LBR_n_TO_IP
    // Nested virtualization.
    0x480..=0x493,             // IA32_VMX_*
    0xc001_0114..=0xc001_0117, // VM_CR, IGNNE, SMM_CTL, VM_HSAVE_PA
    // Hyper-V's interface.
    0x4000_0000..=0x4000_01ff,
    // The same of AMD: counters, last branch records, instruction-based sampling.
    0xc000_010e..=0xc000_010f, // LBR_SELECT, DBG_EXTN_CFG
    0xc000_0300..=0xc000_0303, // PerfCntrGlobal*
    0xc001_0000..=0xc001_0007, // PERF_LEGACY_CTL, PERF_LEGACY_CTR
    0xc001_0200..=0xc001_024f, // PERF_CTL, PERF_CTR; of the L3 cache and the northbridge
    0xc001_0300..=0xc001_031f, // LastBranchStack
    0xc001_1030..=0xc001_103d, // IBS_*
];

/// Registers in a row, and which of them a guest may access.
pub struct MsrWindow {
    /// The first.
    pub base: u32,
    /// A bit for each, the lowest of a byte first.
    pub allowed: Vec<u8>,
}

/// What KVM is told.
#[must_use]
pub fn windows() -> [MsrWindow; 4] {
    WINDOWS.map(|base| {
        let mut allowed = vec![u8::MAX; WINDOW_LEN as usize / 8];
        let indices = DENIED.into_iter().flatten().filter_map(|register| register.checked_sub(base));
        for index in indices.filter(|index| *index < WINDOW_LEN) {
            allowed[index as usize / 8] &= !(1 << (index % 8));
        }
        MsrWindow { base, allowed }
    })
}

#[cfg(test)]
mod tests {
    use super::{DENIED, MsrWindow, WINDOW_LEN, windows};

    /// As KVM reads a window; what is in none is allowed.
    fn is_allowed(windows: &[MsrWindow], register: u32) -> bool {
        let within = windows.iter().find(|window| (window.base..window.base + WINDOW_LEN).contains(&register));
        within.is_none_or(|window| {
            let index = register - window.base;
            window.allowed[index as usize / 8] >> (index % 8) & 1 == 1
        })
    }

    #[test]
    fn each_denied_register_is_denied_and_no_other() {
        let windows = windows();
        let denied = |window: &MsrWindow| {
            let registers = window.base..window.base + WINDOW_LEN;
            registers.filter(|register| !is_allowed(&windows, *register)).collect::<Vec<_>>()
        };
        let mut listed: Vec<u32> = DENIED.into_iter().flatten().collect();
        listed.sort_unstable();
        assert_eq!(windows.iter().flat_map(denied).collect::<Vec<_>>(), listed);
    }

    #[test]
    fn what_linux_takes_for_granted_is_allowed() {
        let windows = windows();
        // Time, APIC, SPEC_CTRL, PRED_CMD, MTRRs, SYSENTER, MISC_ENABLE, DEBUGCTL, PAT, shadow stacks, TSC deadline.
        let intel =
            [0x10, 0x1b, 0x48, 0x49, 0xfe, 0x174, 0x1a0, 0x1d9, 0x277, 0x2ff, 0x6a0, 0x6a2, 0x6a8, 0x6e0, 0x830];
        // Steal time and the clock, EFER, STAR to FMASK, bases, TSC_AUX, HWCR, PATCH_LEVEL, VIRT_SPEC_CTRL, LS_CFG, DE_CFG.
        let others = [0x4b56_4d00, 0x4b56_4d01, 0x4b56_4d03, 0xc000_0080, 0xc000_0081, 0xc000_0084, 0xc000_0100];
        let amd = [0xc000_0102, 0xc000_0103, 0xc001_0015, 0xc001_008b, 0xc001_011f, 0xc001_1020, 0xc001_1029];
        for register in intel.into_iter().chain(others).chain(amd) {
            assert!(is_allowed(&windows, register), "{register:#x}");
        }
    }
}
