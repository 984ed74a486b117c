//! Kernel parameters of a container. Those of its own namespaces are set by `libcontainer` from within; all others are the
//! guest's, and the guest is the container's or pod's own: they are set here, before the container is made.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use oci_spec::runtime::LinuxNamespaceType;

/// Parameters of the IPC namespace (ipc_namespaces(7)).
const IPC: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// Whether a parameter belongs to one of the container's own namespaces.
pub(crate) fn is_namespaced(name: &str, namespaces: &[LinuxNamespaceType]) -> bool {
    let name = name.replace('/', ".");
    let has = |namespace| namespaces.contains(&namespace);
    (IPC.contains(&name.as_str()) || name.starts_with("fs.mqueue.")) && has(LinuxNamespaceType::Ipc)
        || name == "kernel.domainname" && has(LinuxNamespaceType::Uts)
        || name.starts_with("net.") && has(LinuxNamespaceType::Network)
        || name.starts_with("user.") && has(LinuxNamespaceType::User)
}

/// Writes the parameters that are the guest's.
pub(crate) fn apply_to_guest(sysctls: &HashMap<String, String>, namespaces: &[LinuxNamespaceType]) -> Result<()> {
    for (name, value) in sysctls.iter().filter(|(name, _)| !is_namespaced(name, namespaces)) {
        let path = path(name).with_context(|| format!("{name:?} is not the name of a kernel parameter"))?;
        std::fs::write(&path, value).with_context(|| format!("cannot set the kernel parameter {name} to {value:?}"))?;
    }
    Ok(())
}

/// The file of a parameter; dots and slashes separate alike (sysctl(8)).
fn path(name: &str) -> Result<PathBuf> {
    let mut path = Path::new("/proc/sys").to_owned();
    for part in name.split(['.', '/']) {
        if part.is_empty() {
            bail!("empty part");
        }
        path.push(part);
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxNamespaceType::{Ipc, Network};

    use super::{is_namespaced, path};

    #[test]
    fn parameter_of_a_namespace_is_the_containers_only_if_it_has_one() {
        assert!(is_namespaced("kernel.shmmax", &[Ipc]));
        assert!(is_namespaced("net.ipv4.ip_forward", &[Network]));
        assert!(!is_namespaced("net.ipv4.ip_forward", &[Ipc]));
        assert!(!is_namespaced("vm.overcommit_memory", &[Ipc, Network]));
    }

    #[test]
    fn parameter_cannot_leave_its_folder() {
        assert!(path("kernel/../../etc/passwd").is_err());
        assert!(path("").is_err());
        assert_eq!(path("net/core.somaxconn").expect("name"), std::path::Path::new("/proc/sys/net/core/somaxconn"));
    }
}
