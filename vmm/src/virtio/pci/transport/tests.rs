//! What a driver may and may not do with the registers.

use std::sync::mpsc::Receiver;

use proptest::prelude::*;

use super::*;
use crate::virtio::pci::owed;

fn transport() -> (Transport, Receiver<&'static str>) {
    owed::transport(crate::memory::create(64).expect("memory"))
}

fn read(transport: &mut Transport, offset: u64, len: usize) -> u32 {
    let mut data = [0; 4];
    transport.read(offset, &mut data[..len]);
    u32::from_le_bytes(data)
}

fn set_features(transport: &mut Transport, features: u64) {
    for half in [0_u32, 1] {
        transport.write(0x08, &half.to_le_bytes());
        transport.write(0x0c, &select_word(features, half).to_le_bytes());
    }
}

/// Gives queue `index` rings at `base` and enables it.
fn enable(transport: &mut Transport, index: u16, base: u32) {
    transport.write(0x16, &index.to_le_bytes());
    transport.write(0x20, &base.to_le_bytes());
    transport.write(0x28, &(base + 0x1000).to_le_bytes());
    transport.write(0x30, &(base + 0x2000).to_le_bytes());
    transport.write(0x1c, &1_u16.to_le_bytes());
}

#[test]
fn a_driver_that_follows_the_standard_gets_a_working_device() {
    let (mut transport, heard) = transport();
    transport.write(0x14, &[1]);
    transport.write(0x14, &[3]);
    set_features(&mut transport, VIRTIO_F_VERSION_1 | 1);
    transport.write(0x14, &[0x0b]);
    assert_eq!(read(&mut transport, 0x14, 1), 0x0b);
    enable(&mut transport, 0, 0x1_0000);
    enable(&mut transport, 1, 0x2_0000);
    transport.write(0x14, &[0x0f]);
    assert_eq!((read(&mut transport, 0x14, 1), heard.try_recv()), (0x0f, Ok("activate")));
    transport.write(0x14, &[0x0f]);
    assert!(heard.try_recv().is_err(), "activated once");
    transport.write(0x14, &[0]);
    assert_eq!((read(&mut transport, 0x14, 1), heard.try_recv()), (0, Ok("reset")));
}

#[test]
fn features_that_were_not_offered_or_lack_version_1_are_not_accepted() {
    let (mut transport, heard) = transport();
    set_features(&mut transport, VIRTIO_F_VERSION_1 | 1 << 5);
    transport.write(0x14, &[0x0b]);
    assert_eq!(read(&mut transport, 0x14, 1), 3);
    set_features(&mut transport, 1);
    transport.write(0x14, &[0x0f]);
    assert_eq!((read(&mut transport, 0x14, 1), heard.try_recv().is_err()), (3, true));
}

#[test]
fn features_are_frozen_once_they_are_accepted() {
    let (mut transport, _heard) = transport();
    set_features(&mut transport, VIRTIO_F_VERSION_1);
    transport.write(0x14, &[0x0b]);
    set_features(&mut transport, u64::MAX);
    transport.write(0x08, &1_u32.to_le_bytes());
    assert_eq!(read(&mut transport, 0x0c, 4), 1);
    transport.write(0x08, &2_u32.to_le_bytes());
    assert_eq!(read(&mut transport, 0x0c, 4), 0);
}

#[test]
fn a_queue_is_frozen_once_it_is_enabled() {
    let (mut transport, _heard) = transport();
    enable(&mut transport, 0, 0x1_0000);
    transport.write(0x20, &0x5_0000_u32.to_le_bytes());
    transport.write(0x18, &4_u16.to_le_bytes());
    transport.write(0x1c, &0_u16.to_le_bytes());
    assert_eq!(read(&mut transport, 0x20, 4), 0x1_0000);
    assert_eq!((read(&mut transport, 0x18, 2), read(&mut transport, 0x1c, 2)), (16, 1));
}

#[test]
fn a_queue_size_is_a_power_of_two_and_not_above_the_largest() {
    let (mut transport, _heard) = transport();
    for size in [0_u16, 3, 32, 0xffff] {
        transport.write(0x18, &size.to_le_bytes());
        assert_eq!(read(&mut transport, 0x18, 2), 16);
    }
    transport.write(0x18, &4_u16.to_le_bytes());
    assert_eq!(read(&mut transport, 0x18, 2), 4);
    transport.write(0x16, &9_u16.to_le_bytes());
    transport.write(0x18, &4_u16.to_le_bytes());
    assert_eq!(read(&mut transport, 0x18, 2), 0, "a queue that does not exist has no size");
}

/// Whether a device whose rings begin at `base` asks for a reset and is not started.
fn needs_reset(base: u32) -> bool {
    let (mut transport, heard) = transport();
    set_features(&mut transport, VIRTIO_F_VERSION_1);
    transport.write(0x14, &[0x0b]);
    enable(&mut transport, 0, base);
    transport.write(0x14, &[0x0f]);
    read(&mut transport, 0x14, 1) & 0x40 == 0x40 && heard.try_recv().is_err()
}

#[test]
fn rings_outside_guest_ram_or_not_aligned_need_a_reset() {
    assert!(needs_reset(0xd000_0000));
    assert!(needs_reset(0x1_0001));
    assert!(!needs_reset(0x1_0000));
}

#[test]
fn a_vector_that_does_not_exist_reads_back_as_none() {
    let (mut transport, _heard) = transport();
    transport.write(0x10, &2_u16.to_le_bytes());
    assert_eq!(read(&mut transport, 0x10, 2), 2);
    transport.write(0x10, &3_u16.to_le_bytes());
    assert_eq!(read(&mut transport, 0x10, 2), 0xffff);
}

#[test]
fn a_doorbell_that_kvm_does_not_watch_still_rings() {
    let (mut transport, _heard) = transport();
    transport.write(doorbell_offset(1), &[1, 0]);
    assert_eq!(transport.kicks[1].read().expect("rung"), 1);
    transport.write(doorbell_offset(900), &[1, 0]);
    assert!(transport.kicks[0].read().is_err());
}

#[test]
fn an_unplugged_device_answers_all_ones_and_stays_down() {
    let (mut transport, heard) = transport();
    transport.unplug();
    assert_eq!(heard.try_recv(), Ok("reset"));
    assert_eq!(read(&mut transport, 0x14, 1), 0xff);
    transport.write(0x14, &[0]);
    assert!(heard.try_recv().is_err());
}

proptest! {
    #[test]
    fn no_sequence_of_accesses_panics(
        accesses in prop::collection::vec((0_u64..0x8000, prop::collection::vec(any::<u8>(), 0..9), any::<bool>()), 0..64),
    ) {
        let (mut transport, _heard) = transport();
        for (offset, mut data, write) in accesses {
            // Half of the accesses go to the registers that matter most.
            let offset = if offset % 2 == 0 { offset } else { offset % 0x40 };
            if write { transport.write(offset, &data) } else { transport.read(offset, &mut data) }
        }
    }

    #[test]
    fn no_access_to_configuration_space_panics(at in 0_usize..0x103, data in prop::collection::vec(any::<u8>(), 0..9)) {
        let (mut transport, _heard) = transport();
        let mut read = data.clone();
        transport.write_config_space(at, &data);
        transport.read_config_space(at, &mut read);
    }
}
