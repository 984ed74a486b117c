//! What `libcontainer` takes for granted of a container's root and its mounts, and what an image or a spec may have made otherwise:
//! checked before it is let at them.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use libcontainer::rootfs::Mount;
use oci_spec::runtime::Spec;

/// Refuses a root that would lead `libcontainer` out of it, and a mount in the place of what the kernel shows in `/proc`.
pub(super) fn check(spec: &Spec) -> Result<()> {
    let root = spec.root().as_ref().context("the spec has no root")?.path();
    // It makes and removes links in this folder by the folder's path in the guest, and a link there would be followed in the guest.
    let dev = fs::symlink_metadata(root.join("dev"));
    ensure!(!dev.is_ok_and(|found| found.is_symlink()), "/dev of the root file system is a link");
    // It asks this about mounts of procfs only.
    let mounter = Mount::new();
    Ok(spec.mounts().iter().flatten().try_for_each(|mount| mounter.check_proc_mount(root, mount))?)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use serde_json::{Value, json};

    use super::check;

    fn checked(root: &Path, mount: &Value) -> String {
        let spec = json!({ "ociVersion": "1.2.0", "root": { "path": root }, "mounts": [mount] });
        let spec = serde_json::from_value(spec).expect("a spec");
        check(&spec).map_or_else(|error| format!("{error:#}"), |()| "accepted".to_owned())
    }

    #[test]
    fn a_link_in_the_place_of_dev_is_refused() {
        let root = tempfile::tempdir().expect("a folder");
        let mount = json!({ "destination": "/dev", "type": "tmpfs", "source": "tmpfs" });
        assert_eq!(checked(root.path(), &mount), "accepted");
        symlink("/run", root.path().join("dev")).expect("a link");
        assert_eq!(checked(root.path(), &mount), "/dev of the root file system is a link");
        fs::remove_file(root.path().join("dev")).expect("removed");
        fs::create_dir(root.path().join("dev")).expect("a folder");
        assert_eq!(checked(root.path(), &mount), "accepted");
    }

    #[test]
    fn a_mount_over_proc_is_refused() {
        let root = tempfile::tempdir().expect("a folder");
        let at = |destination: &str, typ: &str| {
            checked(root.path(), &json!({ "destination": destination, "type": typ, "source": "/tmp" }))
        };
        assert_eq!(at("/proc", "proc"), "accepted");
        assert!(at("/proc", "bind").contains("/proc cannot be mounted"), "{}", at("/proc", "bind"));
        assert_ne!(at("/proc", "tmpfs"), "accepted");
        assert_ne!(at("/proc/sys", "bind"), "accepted");
        assert_ne!(at("/proc/self/attr", "tmpfs"), "accepted");
        // What shows a container its own numbers (lxcfs).
        assert_eq!(at("/proc/meminfo", "bind"), "accepted");
        assert_eq!(at("/process", "bind"), "accepted");
    }
}
