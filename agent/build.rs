//! Compiles the filters of system calls that most containers have, so that no guest has to.

use std::error::Error;
use std::fs::{self, File};
use std::path::Path;

use libseccomp::{ScmpAction, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};

#[path = "src/child/seccomp/program.rs"]
mod program;

/// What `vmrun` sends; a test of its own writes the file.
const PROFILE: &str = "src/child/seccomp/default.json";
/// Knows no network namespaces and leads to the host (linux/socket.h).
const AF_VSOCK: u64 = 40;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/child/seccomp");
    let out = std::env::var("OUT_DIR")?;
    let out = Path::new(&out);
    let profile = serde_json::from_str(&fs::read_to_string(PROFILE)?)?;
    program::of_profile(&profile)?.export_bpf(File::create(out.join("default.bpf"))?)?;
    // As the agent writes what it has parsed, to compare it.
    fs::write(out.join("default.json"), serde_json::to_string(&profile)?)?;
    without_vsock()?.export_bpf(File::create(out.join("without-vsock.bpf"))?)?;
    Ok(())
}

/// EPERM for AF_VSOCK. Of the argument the kernel reads 32 bits.
fn without_vsock() -> Result<ScmpFilterContext, Box<dyn Error>> {
    let mut filter = program::filter(ScmpAction::Allow)?;
    let family = ScmpCompareOp::MaskedEqual(u32::MAX.into());
    let is_vsock = [ScmpArgCompare::new(0, family, AF_VSOCK)];
    for call in ["socket", "socketpair"] {
        // EPERM.
        filter.add_rule_conditional(ScmpAction::Errno(1), ScmpSyscall::from_name(call)?, &is_vsock)?;
    }
    Ok(filter)
}
