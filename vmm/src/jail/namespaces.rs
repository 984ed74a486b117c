//! Namespaces of our own. The pid namespace is made by who spawns us, for it takes effect in children only.
#![expect(unsafe_code, reason = "a process that shares our memory makes a user namespace")]

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::ptr;

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use rustix::fs::{CWD, Mode, OFlags, openat, readlinkat};
use rustix::process::{PidfdFlags, getegid, geteuid, pidfd_open};

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
        let namespace = UserNamespace::create()?;
        let entered = self.map_and_enter(&namespace);
        namespace.let_go()?;
        entered?;
        check("entering a user namespace", before != self.read_link("ns/user")? && geteuid().is_root())
    }

    fn map_and_enter(&self, namespace: &UserNamespace) -> Result<(), JailError> {
        let process = namespace.process().map_err(refused("find a child"))?;
        self.write_maps(&process).map_err(refused("map the users of a user namespace"))?;
        setns(&process, CloneFlags::CLONE_NEWUSER).map_err(refused("enter a user namespace"))
    }

    /// Who is in a user namespace has no rights in the one above, which the maps need; so it is done from here.
    fn write_maps(&self, process: &OwnedFd) -> io::Result<()> {
        let maps = self.maps()?;
        // Our own numbers of processes are not those of the host, which /proc has.
        let info = self.read(&format!("fdinfo/{}", process.as_raw_fd()))?;
        let pid = info.lines().find_map(|line| line.strip_prefix("Pid:")).map(str::trim).unwrap_or_default();
        for (name, map) in maps {
            let path = format!("../{pid}/{name}");
            let file = openat(&self.process, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
            // The kernel takes a map in one write.
            File::from(file).write_all(map.as_bytes())?;
        }
        Ok(())
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

    /// A file of `/proc/self` that is shorter than a page, so that one read has all of it.
    pub(super) fn read(&self, name: &str) -> io::Result<String> {
        let file = openat(&self.process, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let mut bytes = [0; 4096];
        let len = rustix::io::read(&file, &mut bytes)?;
        let whole = bytes.get(..len).filter(|text| text.len() < bytes.len()).ok_or(io::ErrorKind::FileTooLarge)?;
        String::from_utf8(whole.to_vec()).map_err(io::Error::other)
    }

    fn read_link(&self, link: &str) -> Result<std::ffi::CString, JailError> {
        readlinkat(&self.process, link, Vec::new()).map_err(refused("read which namespace this is"))
    }
}

extern "C" fn do_nothing(_: *mut libc::c_void) -> i32 {
    loop {
        // SAFETY: it has no argument.
        unsafe { libc::pause() };
    }
}

/// A user namespace with a process in it that does nothing.
struct UserNamespace {
    child: Pid,
    /// The process runs on it.
    _stack: Box<[u8; STACK_LEN]>,
}

const STACK_LEN: usize = 16 << 10;

impl UserNamespace {
    /// Decided: a process that shares our memory. Because: a copy of us costs half a million instructions, most of them for pages that we
    /// write to afterwards. Instead of: a fork, and `unshare(2)` of our own, which no process that shares memory may call.
    fn create() -> Result<Self, JailError> {
        let mut stack = Box::new([0; STACK_LEN]);
        let flags = libc::CLONE_NEWUSER | libc::CLONE_VM | libc::SIGCHLD;
        // SAFETY: the child touches nothing but its stack, which outlives it, and never returns. (nix's `clone` has it read what is on
        // the parent's.)
        let child = unsafe { libc::clone(do_nothing, stack.as_mut_ptr_range().end.cast(), flags, ptr::null_mut()) };
        let child = nix::errno::Errno::result(child).map_err(refused("make a user namespace"))?;
        Ok(Self { child: Pid::from_raw(child), _stack: stack })
    }

    fn process(&self) -> io::Result<OwnedFd> {
        let pid = rustix::process::Pid::from_raw(self.child.as_raw()).ok_or(io::ErrorKind::NotFound)?;
        Ok(pidfd_open(pid, PidfdFlags::empty())?)
    }

    /// Ends the process; the namespace stays as long as somebody else is in it.
    fn let_go(self) -> Result<(), JailError> {
        kill(self.child, Signal::SIGKILL).map_err(refused("end a child"))?;
        waitpid(self.child, None).map(drop).map_err(refused("wait for a child"))
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
