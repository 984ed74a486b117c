//! What is mounted where in our mount namespace, as mountinfo (proc_pid_mountinfo(5)) has it.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use rustix::mount::MountFlags;

/// A mount, or a part of one that is mounted elsewhere too.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Mounted {
    /// Major and minor number of the file system, as `0:42`.
    pub device: String,
    /// What of the file system is mounted: a path in it.
    pub root: PathBuf,
    /// Where it is.
    pub mount_point: PathBuf,
    /// Options of this mount, as `ro,nosuid`; those of its file system are not among them.
    pub options: String,
    /// Type of the file system.
    pub fstype: String,
    /// What is mounted below it later comes to its copies in other mount namespaces: it is shared, or a slave of one that is.
    pub propagates: bool,
}

impl Mounted {
    /// What this mount does not allow. When it notes the time of an access is left out: a remount that says nothing of it changes nothing.
    pub(super) fn flags(&self) -> MountFlags {
        let flag = |option| match option {
            "ro" => MountFlags::RDONLY,
            "nosuid" => MountFlags::NOSUID,
            "nodev" => MountFlags::NODEV,
            "noexec" => MountFlags::NOEXEC,
            "nosymfollow" => MountFlags::NOSYMFOLLOW,
            _ => MountFlags::empty(),
        };
        self.options.split(',').map(flag).collect()
    }
}

/// Every mount that this thread sees, each after the one that it is mounted on.
///
/// # Errors
/// When the kernel does not tell.
pub fn mount_table() -> io::Result<Vec<Mounted>> {
    Ok(parse(&fs::read("/proc/thread-self/mountinfo")?))
}

/// The mount of a table that a path is on, if the path has no symbolic links.
#[must_use]
pub fn mount_of<'table>(table: &'table [Mounted], path: &Path) -> Option<&'table Mounted> {
    // Of several at the same place this is the last one, which hides the others.
    let at = table.iter().filter(|mounted| path.starts_with(&mounted.mount_point));
    at.max_by_key(|mounted| mounted.mount_point.components().count())
}

/// A line that is not one is left out; the kernel writes none.
fn parse(mountinfo: &[u8]) -> Vec<Mounted> {
    mountinfo.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mounted> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    // A variable number of optional fields ends with a dash, which the type follows.
    let dash = fields.iter().skip(6).position(|field| *field == b"-")? + 6;
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    Some(Mounted {
        device: text(fields.get(2)?),
        root: unescape_octal(fields.get(3)?),
        mount_point: unescape_octal(fields.get(4)?),
        options: text(fields.get(5)?),
        fstype: text(fields.get(dash + 1)?),
        propagates: fields[6..dash].iter().any(|field| field.starts_with(b"shared:") || field.starts_with(b"master:")),
    })
}

/// Blanks, tabs, line ends and backslashes of a path are written as a backslash and three octal digits.
fn unescape_octal(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let digits = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use proptest::prelude::{any, proptest};
    use rustix::mount::MountFlags;

    use super::{Mounted, mount_of, parse};

    #[test]
    fn mounts_are_read_with_their_blanks() {
        let mountinfo = b"36 35 98:0 /mnt1 /a\\040b\\134 rw,noatime master:1 - ext3 /dev/root rw\n\
            37 36 0:41 / /c ro - tmpfs t rw\n";
        let first = Mounted {
            device: "98:0".to_owned(),
            root: PathBuf::from("/mnt1"),
            mount_point: PathBuf::from("/a b\\"),
            options: "rw,noatime".to_owned(),
            fstype: "ext3".to_owned(),
            propagates: true,
        };
        let second = Mounted {
            device: "0:41".to_owned(),
            root: PathBuf::from("/"),
            mount_point: PathBuf::from("/c"),
            options: "ro".to_owned(),
            fstype: "tmpfs".to_owned(),
            propagates: false,
        };
        assert_eq!(parse(mountinfo), [first, second]);
    }

    #[test]
    fn flags_are_those_of_the_mount_and_not_of_its_file_system() {
        let mountinfo = b"1 0 8:1 / /a rw,nosuid,nodev,noexec,relatime,nosymfollow - ext4 a ro\n2 1 8:1 / /a/b ro,noatime - ext4 a rw\n";
        let flags: Vec<MountFlags> = parse(mountinfo).iter().map(Mounted::flags).collect();
        let first = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOSYMFOLLOW;
        assert_eq!(flags, [first, MountFlags::RDONLY]);
    }

    #[test]
    fn a_path_is_on_the_last_of_the_nearest_mounts() {
        let mountinfo =
            b"1 0 8:1 / / rw shared:1 - ext4 a rw\n2 1 8:2 / /d rw - ext4 b rw\n3 2 8:3 / /d rw shared:2 - xfs c rw\n";
        let table = parse(mountinfo);
        let device = |path: &str| mount_of(&table, Path::new(path)).map(|mounted| mounted.device.as_str());
        assert_eq!([device("/d/x"), device("/dx")], [Some("8:3"), Some("8:1")]);
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(mountinfo in any::<Vec<u8>>()) {
            let _ = parse(&mountinfo);
        }
    }
}
