//! `rootfs --agent PATH --output PATH`: packs the agent into the image that is the root of the guest.
//!
//! The path of the data, one module each: [`agent`] reads and checks the binary, [`manifest`] says what stands beside
//! it, [`image`] turns both into bytes and puts them into place. Run by the Makefile and by packagers; never at run time.

mod agent;
mod image;
mod manifest;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;

/// Packs the guest agent into an EROFS image. The same agent always gives the same bytes.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The agent: a statically linked ELF program, which becomes /init.
    #[arg(long, value_name = "PATH")]
    agent: PathBuf,

    /// Where the image goes. A file that is there already is replaced in one step.
    #[arg(long, value_name = "PATH")]
    output: PathBuf,
}

fn main() -> ExitCode {
    let Err(error) = run(&Arguments::parse()) else { return ExitCode::SUCCESS };
    eprintln!("rootfs: {error:#}");
    ExitCode::FAILURE
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let agent =
        agent::read(&arguments.agent).with_context(|| format!("cannot use {} as agent", arguments.agent.display()))?;
    image::build(manifest::ENTRIES, &agent, &arguments.output)?;
    Ok(())
}
