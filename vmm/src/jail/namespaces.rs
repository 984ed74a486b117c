//! Namespaces of our own. The pid namespace is made by who spawns us, for it takes effect in children only.
#![expect(unsafe_code, reason = "the map of a user namespace is written by a forked child that stays outside")]

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;

use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use rustix::fs::{CWD, Mode, OFlags, openat, readlinkat};
use rustix::process::{getegid, geteuid};

use super::{JailError, check, refused};

/// Each with the name of its link below `/proc/self/ns`.
const LEFT: [(CloneFlags, &str); 5] = [
    (CloneFlags::CLONE_NEWNS, "ns/mnt"),
    (CloneFlags::CLONE_NEWNET, "ns/net"),
    (CloneFlags::CLONE_NEWIPC, "ns/ipc"),
    (CloneFlags::CLONE_NEWUTS, "ns/uts"),
    (CloneFlags::CLONE_NEWCGROUP, "ns/cgroup"),
];

/// The host's view of this process, for as long as it is needed.
pub(super) struct Host {
    /// `/proc/self`, which the new root does not have.
    process: OwnedFd,
}

impl Host {
    pub(super) fn open() -> Result<Self, JailError> {
        let process = openat(CWD, "/proc/self", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(refused("open /proc/self"))?;
        Ok(Self { process })
    }

    /// Leaves every namespace of the host but those of users and processes.
    pub(super) fn leave(&self) -> Result<(), JailError> {
        let before = LEFT.map(|(_, link)| self.read_link(link));
        let flags = LEFT.into_iter().map(|(flag, _)| flag).collect();
        unshare(flags).map_err(refused("leave the host's namespaces"))?;
        for (before, (_, link)) in before.into_iter().zip(LEFT) {
            check("leaving a namespace of the host", before? != self.read_link(link)?)?;
        }
        Ok(())
    }

    /// Enters a user namespace that knows the same users as ours, so that owners of shared files keep their numbers; without
    /// rights over users, one that knows nobody but the caller, as root.
    pub(super) fn enter_user_namespace(&self) -> Result<(), JailError> {
        let before = self.read_link("ns/user")?;
        let maps = self.maps().map_err(refused("read the maps of users"))?;
        let (unshared, mut tell_unshared) = io::pipe().map_err(refused("make a pipe"))?;
        // SAFETY: the process has one thread, so the child finds no lock held and may do what the parent may.
        let child = match unsafe { fork() }.map_err(refused("fork"))? {
            ForkResult::Child => {
                drop(tell_unshared);
                std::process::exit(i32::from(self.write_maps(&maps, unshared).is_err()))
            }
            ForkResult::Parent { child } => child,
        };
        drop(unshared);
        let entered = unshare(CloneFlags::CLONE_NEWUSER);
        if entered.is_ok() {
            tell_unshared.write_all(&[1]).map_err(refused("write to a pipe"))?;
        }
        drop(tell_unshared);
        let ended = waitpid(child, None).map_err(refused("wait for a child"))?;
        entered.map_err(refused("enter a user namespace"))?;
        check("mapping the users of a user namespace", ended == WaitStatus::Exited(child, 0))?;
        check("entering a user namespace", before != self.read_link("ns/user")? && geteuid().is_root())
    }

    /// What to write to which file.
    fn maps(&self) -> io::Result<Vec<(&'static str, String)>> {
        if geteuid().is_root() {
            return Ok(vec![
                ("uid_map", identity(&self.read("uid_map")?)),
                ("gid_map", identity(&self.read("gid_map")?)),
            ]);
        }
        Ok(vec![
            ("setgroups", "deny".to_owned()),
            ("uid_map", format!("0 {} 1\n", geteuid().as_raw())),
            ("gid_map", format!("0 {} 1\n", getegid().as_raw())),
        ])
    }

    /// Runs in the child. Who has entered a user namespace has no rights left in the one above, which the maps need.
    fn write_maps(&self, maps: &[(&'static str, String)], mut unshared: io::PipeReader) -> io::Result<()> {
        unshared.read_exact(&mut [0])?;
        for (name, map) in maps {
            let file = openat(&self.process, *name, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
            // The kernel takes a map in one write.
            File::from(file).write_all(map.as_bytes())?;
        }
        Ok(())
    }

    fn read(&self, name: &str) -> io::Result<String> {
        let file = openat(&self.process, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let mut text = String::new();
        File::from(file).read_to_string(&mut text)?;
        Ok(text)
    }

    fn read_link(&self, link: &str) -> Result<std::ffi::CString, JailError> {
        readlinkat(&self.process, link, Vec::new()).map_err(refused("read which namespace this is"))
    }
}

/// Maps each range of a map, which has the columns inside, outside and count, to itself.
fn identity(map: &str) -> String {
    let mut identity = String::new();
    for line in map.lines() {
        let columns: Vec<&str> = line.split_whitespace().collect();
        if let [inside, _, count] = columns[..] {
            // Writing to a string cannot fail.
            let _ = writeln!(identity, "{inside} {inside} {count}");
        }
    }
    identity
}

#[cfg(test)]
mod tests {
    use super::identity;

    #[test]
    fn the_users_of_a_namespace_are_mapped_to_themselves() {
        assert_eq!(identity("         0          0 4294967295\n"), "0 0 4294967295\n");
        assert_eq!(identity("0 1000 1\n1 100000 65536\n"), "0 0 1\n1 1 65536\n");
    }
}
