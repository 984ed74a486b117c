//! Mounts of the host below what is shared: what they do not allow, a guest cannot do, and what comes later comes to it.

use std::fs;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::symlink;

use rustix::fs::{Mode, OFlags, StatVfsMountFlags, fstatvfs, openat};
use rustix::io::Errno;
use sandbox::plan::{Propagation, ShareTags, Volume, VolumeShare};
use sandbox::share::{HostMount, Rootfs, rootfs_tree, volumes_share};
use tests::Story;
use tests::mounted::{Mounted, run};
use tests::python::Python;

#[test]
fn a_read_only_volume_is_read_only_for_the_guests_root_and_in_every_mount_below_it() {
    let story = Story::new();
    fs::create_dir(story.volume().join("inner")).expect("a folder");
    let _inner = Mounted::tmpfs(&story.volume().join("inner"), "size=1m");
    fs::write(story.volume().join("a"), "old").expect("file");
    fs::copy("/bin/busybox", story.volume().join("busybox")).expect("busybox-static is installed");
    let volume = format!("{}:ro", story.volume_at_mnt());
    let mut guest = Python::start(&story, &["-v", &volume, "--cap-add", "SYS_ADMIN"]);
    // The container's own mount is read-only; root of the guest takes that away and meets the host's.
    let remount =
        "import subprocess; subprocess.run(['/mnt/busybox', 'mount', '-o', 'remount,bind,rw', '/mnt'], check=True)";
    assert_eq!(guest.exec(remount), "None");
    assert_eq!(guest.eval("open('/mnt/a').read()"), "old");
    assert_eq!(guest.exec("open('/mnt/a', 'w')"), "EROFS");
    assert_eq!(guest.exec("open('/mnt/b', 'w')"), "EROFS");
    assert_eq!(guest.exec("open('/mnt/inner/b', 'w')"), "EROFS");
    assert_eq!(guest.exec("os.truncate('/mnt/a', 0)"), "EROFS");
    assert_eq!(guest.exec("os.chmod('/mnt/a', 0o777)"), "EROFS");
    assert_eq!(guest.exec("os.chown('/mnt/a', 1, 1)"), "EROFS");
    assert_eq!(guest.exec("os.utime('/mnt/a')"), "EROFS");
    assert_eq!(guest.exec("os.setxattr('/mnt/a', 'trusted.x', b'y')"), "EROFS");
    assert_eq!(guest.exec("os.unlink('/mnt/a')"), "EROFS");
    assert_eq!(guest.exec("os.rename('/mnt/a', '/mnt/c')"), "EROFS");
    assert_eq!(guest.exec("os.link('/mnt/a', '/mnt/c')"), "EROFS");
    assert_eq!(guest.exec("os.symlink('a', '/mnt/c')"), "EROFS");
    assert_eq!(guest.exec("os.mkdir('/mnt/c')"), "EROFS");
    assert_eq!(guest.exec("os.mkfifo('/mnt/c')"), "EROFS");
    assert_eq!(guest.end(), 0);
    assert_eq!(fs::read_to_string(story.volume().join("a")).expect("file"), "old");
}

#[test]
fn a_read_only_mount_of_the_host_below_a_writable_volume_stays_read_only() {
    let story = Story::new();
    let inner = story.volume().join("inner");
    fs::create_dir(&inner).expect("a folder");
    fs::write(inner.join("a"), "old").expect("file");
    let _inner = Mounted::bound(&inner, "ro");
    let mut guest = Python::start(&story, &["-v", &story.volume_at_mnt()]);
    assert_eq!(guest.exec("open('/mnt/b', 'w').close()"), "None");
    assert_eq!(guest.eval("open('/mnt/inner/a').read()"), "old");
    assert_eq!(guest.exec("open('/mnt/inner/a', 'w')"), "EROFS");
    assert_eq!(guest.exec("open('/mnt/inner/b', 'w')"), "EROFS");
    assert_eq!(guest.exec("os.chmod('/mnt/inner/a', 0o777)"), "EROFS");
    assert_eq!(guest.exec("os.unlink('/mnt/inner/a')"), "EROFS");
    assert_eq!(guest.end(), 0);
    assert_eq!(fs::read_to_string(inner.join("a")).expect("file"), "old");
}

/// Not among the flags that rustix has a name for.
const ST_NOSYMFOLLOW: StatVfsMountFlags = StatVfsMountFlags::from_bits_retain(0x2000);

#[test]
fn a_share_adds_to_what_the_mounts_of_the_host_do_not_allow() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let [source, scratch] = ["volume", "scratch"].map(|name| dir.path().join(name));
    fs::create_dir_all(source.join("inner")).expect("a folder");
    fs::create_dir(&scratch).expect("a folder");
    fs::write(source.join("file"), "content").expect("file");
    symlink("file", source.join("link")).expect("link");
    let _inner = Mounted::bound(&source.join("inner"), "ro,noexec");
    let volume = Volume { source, read_only: false, propagation: Propagation::Private };
    let share = volumes_share(&ShareTags::only(), VolumeShare::Private, vec![volume], &scratch).expect("a share");
    let open = |path: &str, flags| openat(&share.root, path, flags, Mode::empty());
    let flags = |path: &str| fstatvfs(open(path, OFlags::PATH).expect("it is there")).expect("its flags").f_flag;

    let added = StatVfsMountFlags::NODEV | StatVfsMountFlags::NOSUID | ST_NOSYMFOLLOW;
    let not_allowed = added | StatVfsMountFlags::RDONLY | StatVfsMountFlags::NOEXEC;
    assert_eq!(flags("v0") & not_allowed, added);
    assert_eq!(flags("v0/inner") & not_allowed, not_allowed);
    // No link of a volume is followed on the host, but for those by which the VMM opens again what it holds.
    assert_eq!(open("v0/link", OFlags::RDONLY).expect_err("a link"), Errno::LOOP);
    let held = open("v0/file", OFlags::PATH | OFlags::NOFOLLOW).expect("a file");
    assert_eq!(fs::read_to_string(format!("/proc/self/fd/{}", held.as_raw_fd())).expect("opened again"), "content");
}

/// As containerd gives a committed snapshot to a container whose spec does not ask for a read-only root.
#[test]
fn a_root_file_system_that_is_bound_read_only_is_read_only() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let [source, scratch] = ["snapshot", "scratch"].map(|name| dir.path().join(name));
    fs::create_dir(&source).expect("a folder");
    fs::create_dir(&scratch).expect("a folder");
    let options = ["rbind", "ro"].map(str::to_owned).to_vec();
    let source = source.display().to_string();
    let mount = HostMount { fstype: "bind".to_owned(), source, target: String::new(), options };
    let tree = rootfs_tree(Rootfs::Mounts { mounts: vec![mount], read_only: false }, &scratch).expect("a tree");
    let made = openat(&tree, "new", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR);
    assert_eq!(made.expect_err("read-only"), Errno::ROFS);
}

#[test]
fn what_the_host_mounts_later_comes_to_a_slave_volume_and_goes_when_it_is_unmounted() {
    let story = Story::new();
    fs::create_dir(story.volume().join("disk")).expect("a folder");
    let _volume = Mounted::shared(&story.volume());
    let mut guest = Python::start(&story, &["-v", &format!("{}:rslave", story.volume_at_mnt())]);
    assert_eq!(guest.eval("os.listdir('/mnt/disk')"), "[]");
    let disk = Mounted::tmpfs(&story.volume().join("disk"), "size=1m");
    fs::write(disk.0.join("a"), "later").expect("file");
    assert_eq!(guest.eval("open('/mnt/disk/a').read(), os.listdir('/mnt/disk')"), "('later', ['a'])");
    assert_eq!(guest.exec("held = open('/mnt/disk/b', 'w'); held.write('guest'); held.flush()"), "None");
    assert_eq!(fs::read_to_string(disk.0.join("b")).expect("file"), "guest");
    assert!(!disk.unmount(), "what a container uses is busy on the host");
    assert_eq!(guest.exec("held.close()"), "None");
    drop(disk);
    assert_eq!(guest.eval("os.listdir('/mnt/disk')"), "[]");
    // It comes as often as the host mounts it, and a mount below it as well.
    let disk = Mounted::tmpfs(&story.volume().join("disk"), "size=1m");
    fs::create_dir(disk.0.join("inner")).expect("a folder");
    let inner = Mounted::tmpfs(&disk.0.join("inner"), "size=1m");
    fs::write(inner.0.join("c"), "").expect("file");
    assert_eq!(guest.eval("os.listdir('/mnt/disk/inner')"), "['c']");
    drop(inner);
    drop(disk);
    assert_eq!(guest.end(), 0);
}

#[test]
fn what_the_host_mounts_later_below_a_read_only_volume_is_not_written_by_the_guests_root() {
    let story = Story::new();
    fs::create_dir(story.volume().join("disk")).expect("a folder");
    fs::copy("/bin/busybox", story.volume().join("busybox")).expect("busybox-static is installed");
    let _volume = Mounted::shared(&story.volume());
    let volume = format!("{}:ro,rslave", story.volume_at_mnt());
    let mut guest = Python::start(&story, &["-v", &volume, "--cap-add", "SYS_ADMIN"]);
    let disk = Mounted::tmpfs(&story.volume().join("disk"), "size=1m");
    fs::write(disk.0.join("a"), "old").expect("file");
    assert_eq!(guest.exec("open('/mnt/disk/a', 'w')"), "EROFS");
    // The container's own mount is read-only; root of the guest takes that away. The host's mount at `disk` is not read-only.
    let remount =
        "import subprocess; subprocess.run(['/mnt/busybox', 'mount', '-o', 'remount,bind,rw', '/mnt'], check=True)";
    assert_eq!(guest.exec(remount), "None");
    assert_eq!(guest.exec("os.chdir('/mnt/disk')"), "None");
    assert_eq!(guest.eval("open('a').read()"), "old");
    assert_eq!(guest.exec("open('a', 'w')"), "EROFS");
    assert_eq!(guest.exec("open('a', 'r+')"), "EROFS");
    assert_eq!(guest.exec("open('b', 'w')"), "EROFS");
    assert_eq!(guest.exec("os.truncate('a', 0)"), "EROFS");
    assert_eq!(guest.exec("os.chmod('a', 0o777)"), "EROFS");
    assert_eq!(guest.exec("os.chown('a', 1, 1)"), "EROFS");
    assert_eq!(guest.exec("os.utime('a')"), "EROFS");
    assert_eq!(guest.exec("os.setxattr('a', 'user.x', b'y')"), "EROFS");
    assert_eq!(guest.exec("os.unlink('a')"), "EROFS");
    assert_eq!(guest.exec("os.rename('a', 'c')"), "EROFS");
    assert_eq!(guest.exec("os.link('a', 'c')"), "EROFS");
    assert_eq!(guest.exec("os.symlink('a', 'c')"), "EROFS");
    assert_eq!(guest.exec("os.mkdir('c')"), "EROFS");
    assert_eq!(guest.exec("os.mkfifo('c')"), "EROFS");
    // What was there at the start is read-only by its mount.
    assert_eq!(guest.exec("open('/mnt/b', 'w')"), "EROFS");
    assert_eq!(guest.end(), 0);
    assert_eq!(fs::read_to_string(disk.0.join("a")).expect("file"), "old");
    assert_eq!(fs::read_dir(&disk.0).expect("a folder").count(), 1);
}

#[test]
fn propagation_that_cannot_be_is_refused_with_what_to_do() {
    let story = Story::new();
    let refused = story.run(&["-v", &format!("{}:rshared", story.volume_at_mnt())], &["true"]);
    assert!(refused.code == 125 && refused.stderr.contains("rslave"), "{refused:?}");
    let _private = Mounted::tmpfs(&story.volume(), "size=1m");
    run("mount", &["--make-private", &story.volume().display().to_string()]);
    let refused = story.run(&["-v", &format!("{}:rslave", story.volume_at_mnt())], &["true"]);
    assert!(refused.code == 125 && refused.stderr.contains("mount --make-shared"), "{refused:?}");
}
