//! The MultiProcessor table (MultiProcessor Specification 1.4, chapter 4): how a kernel without ACPI finds its CPUs. Present CPUs
//! beyond the first are started by the guest.
//!
//! There is no I/O APIC and nothing at the pins of the local ones: every device of ours interrupts by MSI-X. A Linux that knows of an I/O
//! APIC accesses it 890 times while it boots, each an exit whose instruction KVM has to emulate.

use super::layout::{LAPIC, MP_TABLE};

const FLOATING_POINTER_LEN: u8 = 16;
const HEADER_LEN: usize = 44;
const APIC_VERSION: u8 = 0x14;
const ENTRY_PROCESSOR: u8 = 0;

/// The floating pointer and the table behind it, to be written at [`MP_TABLE`].
#[must_use]
pub fn build(vcpu_count: u8) -> Vec<u8> {
    let mut entries = Vec::new();
    for cpu in 0..vcpu_count {
        let flags = 1 | if cpu == 0 { 2 } else { 0 };
        let mut entry = vec![ENTRY_PROCESSOR, cpu, APIC_VERSION, flags];
        entry.extend_from_slice(&0x600_u32.to_le_bytes());
        entry.extend_from_slice(&0x201_u32.to_le_bytes());
        entry.extend_from_slice(&[0; 8]);
        entries.extend_from_slice(&entry);
    }

    let mut table = floating_pointer();
    let table_len = u16::try_from(HEADER_LEN + entries.len()).expect("at most 64 CPUs");
    let mut header = Vec::with_capacity(HEADER_LEN);
    header.extend_from_slice(b"PCMP");
    header.extend_from_slice(&table_len.to_le_bytes());
    header.extend_from_slice(&[4, 0]);
    header.extend_from_slice(b"VMRUN   ");
    header.extend_from_slice(b"MICROVM     ");
    header.extend_from_slice(&[0; 6]);
    header.extend_from_slice(&u16::from(vcpu_count).to_le_bytes());
    header.extend_from_slice(&LAPIC.to_le_bytes());
    header.extend_from_slice(&[0; 4]);
    header.extend_from_slice(&entries);
    header[7] = checksum(&header);
    table.extend_from_slice(&header);
    table
}

fn floating_pointer() -> Vec<u8> {
    let table_address = u32::try_from(MP_TABLE).expect("below 1 MiB") + u32::from(FLOATING_POINTER_LEN);
    let mut pointer = Vec::with_capacity(FLOATING_POINTER_LEN.into());
    pointer.extend_from_slice(b"_MP_");
    pointer.extend_from_slice(&table_address.to_le_bytes());
    pointer.extend_from_slice(&[1, 4, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    pointer
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::super::layout::{HIMEM_START, MP_TABLE};
    use super::{FLOATING_POINTER_LEN, build};

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_size_has_right_checksums_counts_and_room() {
        for vcpu_count in 1..=64 {
            let table = build(vcpu_count);
            let (pointer, table) = table.split_at(FLOATING_POINTER_LEN.into());
            assert_eq!((sum(pointer), sum(table)), (0, 0));
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            assert_eq!(table.len(), 44 + usize::from(vcpu_count) * 20);
            assert_eq!(u16::from_le_bytes([table[34], table[35]]), u16::from(vcpu_count));
            assert!(MP_TABLE + 16 + (table.len() as u64) < HIMEM_START);
        }
    }

    #[test]
    fn the_table_lists_every_cpu() {
        let table = build(3);
        let entries = &table[usize::from(FLOATING_POINTER_LEN) + 44..];
        assert_eq!([entries[0], entries[20], entries[40]], [0; 3]);
        assert_eq!([entries[1], entries[21], entries[41]], [0, 1, 2]);
    }
}
