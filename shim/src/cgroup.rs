//! The pod's cgroup on the host: the VMM is in it, so that the host's limits and accounts of a pod hold for its VM.
//!
//! Limits of containers are set in the guest; those of the pod are set by whoever made the parent, as the kubelet does. A
//! host without cgroup v2 at the usual place has none of this.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

const ROOT: &str = "/sys/fs/cgroup";

/// A cgroup of ours.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct HostCgroup(PathBuf);

impl HostCgroup {
    /// Makes the cgroup that a spec names (`linux.cgroupsPath`) and puts a process into it.
    pub(crate) fn create(cgroups_path: &Path, pid: u32) -> io::Result<Self> {
        let relative = relative(cgroups_path).ok_or(io::ErrorKind::InvalidInput)?;
        // Without this file it is not cgroup v2.
        fs::metadata(Path::new(ROOT).join("cgroup.controllers"))?;
        let cgroup = Self(Path::new(ROOT).join(relative));
        fs::create_dir_all(&cgroup.0)?;
        if let Err(error) = fs::write(cgroup.0.join("cgroup.procs"), pid.to_string()) {
            cgroup.remove();
            return Err(error);
        }
        Ok(cgroup)
    }

    /// One that was made before.
    pub(crate) fn at(path: PathBuf) -> Self {
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Removes it. Somebody else's processes keep it.
    pub(crate) fn remove(&self) {
        if let Err(error) = fs::remove_dir(&self.0)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, cgroup = %self.0.display(), "a cgroup cannot be removed");
        }
    }
}

/// Where a spec's cgroup is below the root. systemd's form is `SLICE:PREFIX:NAME`, and a slice `a-b.slice` is in `a.slice`.
fn relative(cgroups_path: &Path) -> Option<PathBuf> {
    let text = cgroups_path.to_str()?;
    let words: Vec<&str> = text.split(':').collect();
    let path = match words.as_slice() {
        [slice, prefix, name] => slice_path(slice)?.join(format!("{prefix}-{name}.scope")),
        _ => PathBuf::from(text.trim_start_matches('/')),
    };
    let plain = path.components().all(|component| matches!(component, Component::Normal(_)));
    (plain && !path.as_os_str().is_empty()).then_some(path)
}

/// The folders of a slice of systemd.
pub(crate) fn slice_path(slice: &str) -> Option<PathBuf> {
    let name = slice.strip_suffix(".slice")?;
    let mut path = PathBuf::new();
    let mut whole = String::new();
    for part in name.split('-').filter(|part| !part.is_empty()) {
        if !whole.is_empty() {
            whole.push('-');
        }
        whole.push_str(part);
        path.push(format!("{whole}.slice"));
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::relative;

    #[test]
    fn both_forms_of_a_path_are_known() {
        let of = |path: &str| relative(Path::new(path));
        assert_eq!(of("/default/box"), Some(PathBuf::from("default/box")));
        let systemd = of("kubepods-burstable-pod1.slice:cri-containerd:box");
        let expected = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-box.scope";
        assert_eq!(systemd, Some(PathBuf::from(expected)));
    }

    #[test]
    fn no_path_leads_out_or_to_the_root() {
        let of = |path: &str| relative(Path::new(path));
        assert_eq!(of("/../x"), None);
        assert_eq!(of("/"), None);
        assert_eq!(of("a/../../b"), None);
    }
}
