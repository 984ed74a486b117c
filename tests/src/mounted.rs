//! Mounts of the host that a story makes and unmounts at its end.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::eventually;

/// A mount at a folder of the story; unmounted at the end, when nobody uses it any more.
pub struct Mounted(pub PathBuf);

impl Mounted {
    /// An empty file system in memory.
    ///
    /// # Panics
    /// When the host refuses.
    #[must_use]
    pub fn tmpfs(target: &Path, options: &str) -> Self {
        run("mount", &["-t", "tmpfs", "-o", options, "tmpfs", &target.display().to_string()]);
        Self(target.to_owned())
    }

    /// ext4, which has every kind of extended attribute and access control lists.
    ///
    /// # Panics
    /// When the host refuses.
    #[must_use]
    pub fn ext4(target: &Path) -> Self {
        let image = target.with_extension("ext4");
        fs::File::create(&image).and_then(|file| file.set_len(64 << 20)).expect("an image");
        run("mkfs.ext4", &["-q", &image.display().to_string()]);
        run("mount", &["-o", "loop", &image.display().to_string(), &target.display().to_string()]);
        Self(target.to_owned())
    }

    /// The folder itself, as a mount with these options.
    ///
    /// # Panics
    /// When the host refuses.
    #[must_use]
    pub fn bound(target: &Path, options: &str) -> Self {
        let path = target.display().to_string();
        run("mount", &["--bind", &path, &path]);
        run("mount", &["-o", &format!("remount,bind,{options}"), &path]);
        Self(target.to_owned())
    }

    /// The folder itself, as a mount of which other mount namespaces learn.
    ///
    /// # Panics
    /// When the host refuses.
    #[must_use]
    pub fn shared(target: &Path) -> Self {
        let path = target.display().to_string();
        run("mount", &["--bind", &path, &path]);
        run("mount", &["--make-shared", &path]);
        Self(target.to_owned())
    }

    /// Whether it is unmounted now.
    ///
    /// # Panics
    /// When umount(8) cannot be started.
    #[must_use]
    pub fn unmount(&self) -> bool {
        Command::new("umount").arg(&self.0).status().expect("umount starts").success()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        eventually(Duration::from_secs(10), "the host unmounts it", || self.unmount());
    }
}

/// Runs a program of the host, which must succeed.
///
/// # Panics
/// When it does not.
pub fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().expect("the program starts");
    assert!(status.success(), "{program} {arguments:?}");
}
