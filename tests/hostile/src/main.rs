//! A guest without an operating system that attacks the VMM from ring 0. For each case it prints `ok NAME` or `FAILED NAME: why`, and after
//! each it drives the attacked device by the rules: a device that does not work again after a reset has failed. The story `hostile` boots
//! it, reads the verdicts and looks at the host.
#![no_std]
#![no_main]

mod attacks;
mod console;
mod machine;
mod pci;
mod virtio;

use console::say;
use virtio::Device;

/// What an attack comes to: nothing, or what was wrong.
pub type Verdict = Result<(), &'static str>;

/// Counts verdicts and prints them.
pub struct Report {
    cases: u32,
    failed: u32,
}

impl Report {
    /// Prints the verdict of one case.
    pub fn tell(&mut self, name: core::fmt::Arguments<'_>, verdict: Verdict) {
        self.cases += 1;
        match verdict {
            Ok(()) => say!("ok {name}"),
            Err(why) => {
                self.failed += 1;
                say!("FAILED {name}: {why}");
            }
        }
    }
}

#[unsafe(no_mangle)]
#[expect(unsafe_code, reason = "called by boot.s")]
extern "C" fn start() -> ! {
    machine::load_gates();
    let mut report = Report { cases: 0, failed: 0 };
    let mut last = 0;
    // Twice: one device is plugged in while the others are attacked.
    for _ in 0..2 {
        for device in (last + 1..pci::SLOT_COUNT).filter_map(Device::find) {
            attacks::on_device(&mut report, &device);
            last = device.slot;
        }
    }
    attacks::on_machine(&mut report);
    say!("end: {} cases, {} failed", report.cases, report.failed);
    machine::halt();
}

#[unsafe(no_mangle)]
#[expect(unsafe_code, reason = "called by boot.s")]
extern "C" fn unexpected_exception(number: u64, address: u64) -> ! {
    say!("FAILED: exception {number} at {address:#x}");
    machine::reset();
}

#[panic_handler]
fn panicked(panic: &core::panic::PanicInfo<'_>) -> ! {
    say!("FAILED: {panic}");
    machine::reset();
}
