//! `--volume HOST:GUEST[:OPTIONS]`, as Docker has it: from the text to a bind mount of the OCI spec.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use oci_spec::runtime::Mount;
use sandbox::share;

use crate::spec;

/// The bind mount.
pub(crate) fn mount(text: &str) -> Result<Mount> {
    let fields: Vec<&str> = text.split(':').collect();
    let (source, target, options) = match fields.as_slice() {
        [source, target] => (source, target, ""),
        [source, target, options] => (source, target, *options),
        _ => bail!("--volume {text:?} is not HOST:GUEST[:OPTIONS]"),
    };
    if !target.starts_with('/') {
        bail!("--volume {text:?}: {target:?} is not an absolute path in the container");
    }
    let source = fs::canonicalize(source).with_context(|| format!("--volume {text:?}: cannot use {source}"))?;
    let options: Vec<&str> = options.split(',').filter(|option| !option.is_empty()).collect();
    for option in &options {
        match *option {
            "ro" | "rw" | "private" | "rprivate" => {}
            "slave" | "rslave" => check_propagates(&source).with_context(|| format!("--volume {text:?}"))?,
            "shared" | "rshared" => bail!(
                "--volume {text:?}: mounts that a guest makes are its own and do not come to the host; with rslave those of the host come to the container"
            ),
            other => bail!("--volume {text:?}: no option {other:?}; there are ro, rw, rslave and rprivate"),
        }
    }
    let source = source.to_str().with_context(|| format!("--volume {text:?}: the path is not UTF-8"))?;
    spec::mount(target, "bind", source, &[&["rbind"], &options[..]].concat())
}

/// As Docker does: from a private mount nothing would ever come, and nobody would be told.
fn check_propagates(source: &Path) -> Result<()> {
    let table = share::mount_table().context("cannot read the table of mounts")?;
    let Some(at) = share::mount_of(&table, source).filter(|mounted| !mounted.propagates) else { return Ok(()) };
    let (source, at) = (source.display(), at.mount_point.display());
    bail!(
        "{source} is on the private mount {at}, of which no other mount ever learns: run `mount --make-shared {at}`, or leave rslave out"
    )
}

#[cfg(test)]
mod tests {
    use super::mount;

    #[test]
    fn a_volume_must_exist_and_have_an_absolute_target() {
        assert!(mount("/does/not/exist:/mnt").is_err());
        assert!(mount("/tmp:mnt").is_err());
        assert!(mount("/tmp:/mnt:rx").is_err());
        assert!(mount("/tmp:/mnt:ro:rw").is_err());
    }

    #[test]
    fn options_of_a_volume_are_those_of_its_mount() {
        let options = |text| mount(text).expect("a volume").options().clone().expect("options");
        assert_eq!(options("/tmp:/mnt"), ["rbind"]);
        assert_eq!(options("/tmp:/mnt:ro"), ["rbind", "ro"]);
        assert_eq!(options("/tmp:/mnt:rw,rprivate"), ["rbind", "rw", "rprivate"]);
    }

    #[test]
    fn mounts_of_the_guest_do_not_come_to_the_host() {
        let refused = mount("/tmp:/mnt:rshared").expect_err("refused").to_string();
        assert!(refused.contains("rslave"), "{refused}");
    }
}
