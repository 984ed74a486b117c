//! The files that a sandbox is made from, and where they are looked for.
//!
//! Each can be named by an environment variable; otherwise it stands beside the running program, as a build leaves it, or in
//! `../libexec/vmrun` relative to it, as an installation does.

use std::env;
use std::path::{Path, PathBuf};

use crate::BootError;

/// The three files of a sandbox.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Artifacts {
    /// The VMM program.
    pub vmm: PathBuf,
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The guest image.
    pub rootfs: PathBuf,
}

impl Artifacts {
    /// Finds all three.
    ///
    /// # Errors
    /// [`BootError::MissingArtifact`] for the first one that is not there.
    pub fn find() -> Result<Self, BootError> {
        let program =
            env::current_exe().map_err(|source| BootError::Host { action: "find the running program", source })?;
        let program_dir = program.parent().unwrap_or(Path::new("/"));
        Ok(Self {
            vmm: locate("the VMM", "vmm", "VMRUN_VMM", program_dir)?,
            kernel: locate("the guest kernel", "vmlinux", "VMRUN_KERNEL", program_dir)?,
            rootfs: locate("the guest image", "rootfs.erofs", "VMRUN_ROOTFS", program_dir)?,
        })
    }
}

fn locate(what: &'static str, name: &str, variable: &'static str, program_dir: &Path) -> Result<PathBuf, BootError> {
    let named = env::var_os(variable).map(PathBuf::from);
    let beside = program_dir.join(name);
    let installed = program_dir.join("../libexec/vmrun").join(name);
    let candidates = named.map_or_else(|| vec![beside.clone(), installed], |path| vec![path]);
    candidates.iter().find(|path| path.is_file()).cloned().ok_or_else(|| BootError::MissingArtifact {
        what,
        path: candidates.first().cloned().unwrap_or(beside),
        variable,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::locate;

    #[test]
    fn finds_a_file_beside_the_program() {
        let dir = tempfile::tempdir().expect("temporary directory");
        fs::write(dir.path().join("vmlinux"), "").expect("write");
        let found = locate("the guest kernel", "vmlinux", "VMRUN_TEST_UNSET", dir.path()).expect("found");
        assert_eq!(found, dir.path().join("vmlinux"));
    }

    #[test]
    fn says_where_it_looked_and_what_to_do() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let error = locate("the VMM", "vmm", "VMRUN_TEST_UNSET", dir.path()).expect_err("missing");
        let text = error.to_string();
        assert!(text.contains(&dir.path().display().to_string()), "{text}");
        assert!(text.contains("VMRUN_TEST_UNSET"), "{text}");
    }
}
