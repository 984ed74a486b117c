//! Reports of pages that are free (VIRTIO 1.2, 5.5.6.7), and of what is no page.

use super::exchange::works;
use crate::machine::{read, write};
use crate::virtio::{Device, Queue, WRITE};
use crate::{Report, Verdict};

const VIRTIO_BALLOON_F_PAGE_REPORTING: u64 = 1 << 5;
const REPORTING_QUEUE: u16 = 2;
const PAGE: u64 = 4096;
const WRITTEN: u64 = 0x5a5a_5a5a_5a5a_5a5a;

/// What is reported, relative to a page of ours, and whether that page is free by it.
const OF_A_PAGE: [(&str, u64, u32, bool); 5] = [
    ("page", 0, 4096, true),
    ("page-and-parts", 8, 2 * 4096, true),
    ("half-a-page", 8, 4088, false),
    ("nothing", 0, 0, false),
    ("four-gibibytes", 0, u32::MAX, false),
];

/// What is no RAM, or not all of it.
const OF_NO_PAGE: [(&str, u64, u32); 4] = [
    ("hole", 0xd000_0000, 4096),
    ("root-image", 0xe000_0000, 4096),
    ("end-of-addresses", u64::MAX - 4095, 4096),
    ("around-the-end-of-addresses", u64::MAX - 4095, 8192),
];

/// Reports one range; false when the device does not give it back.
fn report_range(device: &Device, address: u64, len: u32) -> bool {
    let queue = Queue::of_device(device, REPORTING_QUEUE);
    queue.describe(0, address, len, WRITE, 0);
    queue.offer(0);
    device.kick(REPORTING_QUEUE);
    queue.wait(1)
}

fn starts(device: &Device) -> Verdict {
    if device.start(VIRTIO_BALLOON_F_PAGE_REPORTING) { Ok(()) } else { Err("it does not start") }
}

fn of_a_page(device: &Device, offset: u64, len: u32, free: bool) -> Verdict {
    starts(device)?;
    // Behind the first page, of which a report may have a part.
    let page = Queue::of(REPORTING_QUEUE).buffer + PAGE;
    write(page, WRITTEN);
    let before = if free && offset > 0 { PAGE } else { 0 };
    if !report_range(device, page - before + offset, len) {
        return Err("a report is not given back");
    }
    match (read::<u64>(page), free) {
        (0, true) | (WRITTEN, false) => works(device),
        (_, true) => Err("a page that is free stays"),
        (_, false) => Err("a page that is not free is gone"),
    }
}

/// The rings of the queue itself: what the device says afterwards is in pages of zeros.
fn of_the_rings(device: &Device) -> Verdict {
    starts(device)?;
    let queue = Queue::of(REPORTING_QUEUE);
    if !report_range(device, queue.desc, u32::try_from(queue.buffer - queue.desc).unwrap_or(0)) {
        return Err("a report is not given back");
    }
    works(device)
}

/// All attacks on a balloon.
pub fn attack(report: &mut Report, device: &Device) {
    for (name, offset, len, free) in OF_A_PAGE {
        report.tell(format_args!("balloon/reports/{name}"), of_a_page(device, offset, len, free));
    }
    for (name, address, len) in OF_NO_PAGE {
        let verdict = starts(device).and_then(|()| match report_range(device, address, len) {
            true => works(device),
            false => Err("a report is not given back"),
        });
        report.tell(format_args!("balloon/reports/{name}"), verdict);
    }
    report.tell(format_args!("balloon/reports/rings"), of_the_rings(device));
}
