//! Compiles the filters of system calls, so that no start has to.

use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use kind::ThreadKind;

#[expect(unreachable_pub, reason = "the library exports it")]
#[path = "src/jail/seccomp/kind.rs"]
mod kind;
#[path = "src/jail/seccomp/lists.rs"]
mod lists;
#[path = "src/jail/seccomp/program.rs"]
mod program;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/jail/seccomp");
    let mut programs = String::from("[");
    for kind in ThreadKind::ALL {
        programs.push_str("&[");
        for instruction in program::program(&lists::calls(kind))? {
            // It is written as in Rust.
            write!(programs, "{instruction:?},")?;
        }
        programs.push_str("],");
    }
    programs.push(']');
    fs::write(Path::new(&std::env::var("OUT_DIR")?).join("programs.rs"), programs)?;
    Ok(())
}
