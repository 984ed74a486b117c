//! `vmrun ps`, `kill` and `gc`: what the state folder and the owners of the containers say.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use sandbox::state::{self, Status};

use crate::control::{Answer, Client, Request};

pub(crate) fn ps(root: &Path, all: bool, json: bool) -> Result<u8> {
    let states: Vec<_> =
        state::list(root)?.into_iter().filter(|s| all || !matches!(s.status, Status::Exited { .. })).collect();
    if json {
        println!("{}", serde_json::to_string_pretty(&states)?);
        return Ok(0);
    }
    println!("{:<24} {:<12} {:<32} COMMAND", "NAME", "STATUS", "IMAGE");
    for state in states {
        let status = match state.status {
            Status::Creating => "creating".to_owned(),
            Status::Running => "running".to_owned(),
            Status::Exited { exit_code } => format!("exited ({exit_code})"),
        };
        println!("{:<24} {:<12} {:<32} {}", state.name, status, state.image, state.command.join(" "));
    }
    Ok(0)
}

pub(crate) fn kill(root: &Path, signal: &str, names: &[String]) -> Result<u8> {
    let signal = parse_signal(signal)?;
    for name in names {
        let mut client = Client::connect(root, name)?;
        client.send(&Request::Signal(signal))?;
        match client.receive()?.0 {
            Answer::Done => println!("{name}"),
            Answer::Failed(cause) => bail!("cannot signal {name}: {cause}"),
            other => bail!("unexpected answer of the container's owner: {other:?}"),
        }
    }
    Ok(0)
}

/// Removes the folders of containers whose owner was killed. Their VMs ended with it.
pub(crate) fn gc(root: &Path, data_root: &Path) -> Result<u8> {
    let Ok(entries) = fs::read_dir(root) else { return Ok(0) };
    for entry in entries.flatten() {
        if state::is_orphan(&entry.path()) {
            let name = entry.file_name();
            fs::remove_dir_all(entry.path()).with_context(|| format!("cannot remove {}", entry.path().display()))?;
            // What the container wrote, when it had got that far.
            let _ = fs::remove_dir_all(data_root.join("containers").join(&name));
            println!("{}", name.to_string_lossy());
        }
    }
    Ok(0)
}

fn parse_signal(text: &str) -> Result<u32> {
    if let Ok(number) = text.parse::<u32>() {
        if (1..=64).contains(&number) {
            return Ok(number);
        }
        bail!("signal {number} does not exist: write a name or 1 to 64");
    }
    let upper = text.to_ascii_uppercase();
    let name = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    let signal: nix::sys::signal::Signal =
        name.parse().ok().with_context(|| format!("signal {text:?} does not exist"))?;
    Ok(u32::try_from(signal as i32).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::parse_signal;

    #[test]
    fn signals_have_names_and_numbers() {
        assert_eq!(parse_signal("KILL").expect("signal"), 9);
        assert_eq!(parse_signal("sigterm").expect("signal"), 15);
        assert_eq!(parse_signal("10").expect("signal"), 10);
        assert!(parse_signal("NOPE").is_err());
        assert!(parse_signal("99").is_err());
    }
}
