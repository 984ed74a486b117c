//! Shared directories: what a guest's programs may expect of a volume and of their root file system, and what they may not
//! do to the host.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::process::Command;

use tests::Story;
use tests::mounted::{Mounted, run};
use tests::python::Python;

#[test]
fn names_links_and_special_files_behave_as_on_a_local_file_system() {
    let story = Story::new();
    let mut guest = Python::start(&story, &["-v", &story.volume_at_mnt()]);
    guest.exec("os.chdir('/mnt'); open('a', 'w').write('one'); open('b', 'w').write('two')");
    assert_eq!(guest.exec("os.rename('a', 'b')"), "None");
    assert_eq!(guest.eval("open('b').read(), os.path.exists('a')"), "('one', False)");
    assert_eq!(guest.exec("os.link('b', 'hard')"), "None");
    assert_eq!(guest.eval("os.stat('b').st_nlink, os.stat('b').st_ino == os.stat('hard').st_ino"), "(2, True)");
    assert_eq!(guest.exec("f = open('hard', 'r+'); os.unlink('hard'); f.write('ONE'); f.seek(0)"), "None");
    assert_eq!(guest.eval("f.read(), os.fstat(f.fileno()).st_nlink, open('b').read()"), "('ONE', 1, 'ONE')");
    assert_eq!(guest.exec("g = open('gone', 'w+'); os.unlink('gone'); g.write('kept'); g.seek(0)"), "None");
    assert_eq!(guest.eval("g.read(), os.fstat(g.fileno()).st_nlink"), "('kept', 0)");
    assert_eq!(guest.exec("os.symlink('/etc/hostname', 'link'); os.symlink('loop', 'loop')"), "None");
    assert_eq!(
        guest.eval("os.readlink('link'), open('link').read() == open('/etc/hostname').read()"),
        "('/etc/hostname', True)"
    );
    assert_eq!(guest.exec("open('loop')"), "ELOOP");
    assert_eq!(guest.exec("open('n' * 255, 'w'); os.mkdir('d'); open('d/x', 'w'); os.mkdir('d/e')"), "None");
    assert_eq!(guest.exec("open('n' * 256, 'w')"), "ENAMETOOLONG");
    assert_eq!(guest.exec("os.rmdir('d')"), "ENOTEMPTY");
    assert_eq!(guest.exec("os.rename('d', 'd/e/f')"), "EINVAL");
    assert_eq!(guest.exec("os.mkdir('d')"), "EEXIST");
    assert_eq!(guest.exec("open('new\\nline \\udcff', 'w')"), "None");
    assert_eq!(guest.eval("'new\\nline \\udcff' in os.listdir('.')"), "True");
    assert_eq!(guest.exec("os.mkfifo('fifo'); import socket; socket.socket(socket.AF_UNIX).bind('socket')"), "None");
    assert_eq!(guest.exec("import stat; os.mknod('null', stat.S_IFCHR | 0o666, os.makedev(1, 3))"), "EPERM");
    assert_eq!(guest.exec("os.mknod('disk', stat.S_IFBLK | 0o666, os.makedev(8, 0))"), "EPERM");
    assert_eq!(guest.end(), 0);
    assert_eq!(fs::read_to_string(story.volume().join("b")).expect("file"), "ONE");
    assert!(!story.volume().join("null").exists());
}

#[test]
fn a_link_out_of_a_volume_is_the_guests_to_follow_and_special_files_of_the_host_are_not_opened() {
    let story = Story::new();
    fs::write(story.volume().with_file_name("secret"), "host").expect("file");
    symlink("../secret", story.volume().join("up")).expect("link");
    symlink(story.volume().with_file_name("secret"), story.volume().join("absolute")).expect("link");
    let device = story.volume().join("kmsg");
    run("mknod", &[&device.display().to_string(), "c", "1", "11"]);
    run("mkfifo", &[&story.volume().join("fifo").display().to_string()]);
    let mut guest = Python::start(&story, &["-v", &story.volume_at_mnt()]);
    assert_eq!(guest.exec("open('/mnt/up')"), "ENOENT");
    assert_eq!(guest.exec("open('/mnt/absolute')"), "ENOENT");
    // The guest's own kernel decides what a device number or a FIFO is; the host never opens either.
    assert_eq!(guest.exec("os.open('/mnt/kmsg', os.O_RDONLY)"), "EPERM");
    assert_eq!(guest.exec("os.open('/mnt/fifo', os.O_WRONLY | os.O_NONBLOCK)"), "ENXIO");
    assert_eq!(guest.end(), 0);
}

#[test]
fn a_volume_is_read_ahead_by_whole_requests_and_the_root_file_system_as_linux_does() {
    let story = Story::new();
    let mut guest = Python::start(&story, &["-v", &story.volume_at_mnt()]);
    guest.exec("import glob; kib = lambda path: int(open(path + '/read_ahead_kb').read())");
    // What is mounted below a share goes by the share's.
    assert_eq!(guest.eval("sorted({kib(path) for path in glob.glob('/sys/class/bdi/*')})"), "[128, 496]");
    guest.exec("root = os.stat('/').st_dev");
    assert_eq!(guest.eval("kib(f'/sys/class/bdi/{os.major(root)}:{os.minor(root)}')"), "128");
    assert_eq!(guest.end(), 0);
}

#[test]
fn data_calls_behave_as_on_a_local_file_system() {
    let story = Story::new();
    let mut guest = Python::start(&story, &["-v", &story.volume_at_mnt()]);
    guest.exec("os.chdir('/mnt'); fd = os.open('sparse', os.O_RDWR | os.O_CREAT)");
    guest.exec("os.ftruncate(fd, 1 << 20); os.pwrite(fd, b'x', 512 << 10)");
    assert_eq!(guest.eval("os.lseek(fd, 0, os.SEEK_DATA), os.lseek(fd, 512 << 10, os.SEEK_HOLE)"), "(524288, 528384)");
    assert_eq!(guest.eval("os.fstat(fd).st_size, os.fstat(fd).st_blocks"), "(1048576, 8)");
    assert_eq!(guest.exec("os.posix_fallocate(fd, 0, 2 << 20)"), "None");
    assert_eq!(guest.eval("os.fstat(fd).st_size"), "2097152");
    guest.exec("append = os.open('log', os.O_WRONLY | os.O_CREAT | os.O_APPEND); os.write(append, b'one')");
    guest
        .exec("other = os.open('log', os.O_WRONLY | os.O_APPEND); os.write(other, b'two'); os.write(append, b'three')");
    assert_eq!(guest.eval("open('log').read()"), "onetwothree");
    guest.exec("src = os.open('log', os.O_RDONLY); dst = os.open('copy', os.O_RDWR | os.O_CREAT)");
    assert_eq!(guest.eval("os.copy_file_range(src, dst, 6), open('copy').read()"), "(6, 'onetwo')");
    guest.exec("direct = os.open('copy', os.O_RDWR | os.O_DIRECT); os.fsync(dst); os.fdatasync(dst)");
    assert_eq!(
        guest.eval("os.pread(direct, 3, 0), os.truncate('copy', 2), os.pread(direct, 9, 0)"),
        "(b'one', None, b'on')"
    );
    guest.exec("os.utime('log', ns=(1_000_000_001, 2_000_000_002))");
    assert_eq!(guest.eval("os.stat('log').st_atime_ns, os.stat('log').st_mtime_ns"), "(1000000001, 2000000002)");
    assert_eq!(guest.eval("os.statvfs('.').f_namemax, os.statvfs('.').f_blocks > 0"), "(255, True)");
    assert_eq!(guest.eval("len(os.urandom(1)), open('big', 'wb').write(b'z' * (9 << 20))"), "(1, 9437184)");
    assert_eq!(guest.end(), 0);
    let log = fs::metadata(story.volume().join("log")).expect("log");
    assert_eq!((log.mtime(), log.mtime_nsec()), (2, 2));
    assert_eq!(fs::metadata(story.volume().join("big")).expect("big").len(), 9 << 20);
}

/// Writes by read(2) into a shared mapping, and reads the mapping; perl-base has no mmap but can make system calls.
const MAPPED: &str = r#"
use Fcntl; my ($mmap, $msync, $read) = (9, 26, 0);
sysopen(F, "/mnt/mapped", O_RDWR | O_CREAT) or die; truncate(F, 4096);
my $at = syscall($mmap, 0, 4096, 3, 1, fileno(F), 0); die "mmap: $!" if $at == -1;
pipe(R, W); syswrite(W, "through the map"); syscall($read, fileno(R), $at, 15) == 15 or die "read: $!";
syscall($msync, $at, 4096, 4) == 0 or die "msync: $!";
sysseek(F, 0, 0); sysread(F, my $file, 15); sysseek(F, 0, 0); syswrite(F, "WRITE");
print "$file|", unpack("P15", pack("Q", $at)), "\n";
"#;

#[test]
fn a_shared_mapping_and_the_file_are_one_whatever_the_cache() {
    let story = Story::new();
    let image = tests::python::debian_image();
    let ran = tests::outcome(story.vmrun(&["run", "--rm", "-v", &story.volume_at_mnt(), &image, "perl", "-e", MAPPED]));
    assert_eq!(ran.success(), "through the map|WRITEgh the map\n");
    let mapped = fs::read_to_string(story.volume().join("mapped")).expect("file");
    assert!(mapped.starts_with("WRITEgh the map"));
    let private = MAPPED.replace("/mnt/", "/root/");
    let ran = tests::outcome(story.vmrun(&["run", "--rm", &image, "perl", "-e", &private]));
    assert_eq!(ran.success(), "through the map|WRITEgh the map\n");
}

#[test]
fn locks_exclude_processes_of_the_guest() {
    let story = Story::new();
    let mut guest = Python::start(&story, &["-v", &story.volume_at_mnt()]);
    let script = "import fcntl\nf = open('/mnt/lock', 'w')\n\
        def other(lock):\n  pid = os.fork()\n  if pid: return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])\n  \
        try: lock(open('/mnt/lock', 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB); os._exit(0)\n  \
        except BlockingIOError: os._exit(1)\n";
    assert_eq!(guest.exec(script), "None");
    assert_eq!(guest.eval("fcntl.flock(f, fcntl.LOCK_EX), other(fcntl.flock)"), "(None, 1)");
    assert_eq!(guest.eval("fcntl.flock(f, fcntl.LOCK_UN), other(fcntl.flock)"), "(None, 0)");
    assert_eq!(guest.eval("fcntl.lockf(f, fcntl.LOCK_EX), other(fcntl.lockf)"), "(None, 1)");
    assert_eq!(guest.eval("fcntl.lockf(f, fcntl.LOCK_UN), other(fcntl.lockf)"), "(None, 0)");
    assert_eq!(guest.end(), 0);
}

#[test]
fn owners_modes_and_the_umask_are_the_guests() {
    let story = Story::new();
    fs::set_permissions(story.volume(), fs::Permissions::from_mode(0o777)).expect("mode");
    let mut guest = Python::start(&story, &["-v", &story.volume_at_mnt()]);
    guest.exec(
        "os.chdir('/mnt'); os.umask(0o027); open('root', 'w').write('r'); os.mkdir('set'); os.chown('set', 0, 77)",
    );
    assert_eq!(guest.exec("os.chmod('set', 0o2777); os.chmod('root', 0o640)"), "None");
    guest.exec("open('set/file', 'w'); os.mkdir('set/dir'); open('tool', 'w').write('x'); os.chmod('tool', 0o6777)");
    guest.exec("os.setgroups([]); os.setegid(1000); os.seteuid(1000)");
    assert_eq!(guest.exec("open('root')"), "EACCES");
    assert_eq!(guest.exec("os.chmod('root', 0o777)"), "EPERM");
    assert_eq!(guest.exec("open('mine', 'w'); os.mkdir('folder', 0o777)"), "None");
    assert_eq!(guest.exec("os.chown('mine', 0, 0)"), "EPERM");
    // A write by somebody else takes the set-id bits away.
    assert_eq!(guest.exec("t = open('tool', 'a'); t.write('y'); t.close()"), "None");
    assert_eq!(guest.eval("oct(os.stat('tool').st_mode)"), "0o100777");
    assert_eq!(guest.end(), 0);
    let seen = |name: &str| {
        let metadata = fs::metadata(story.volume().join(name)).expect("made by the guest");
        (metadata.uid(), metadata.gid(), metadata.mode() & 0o7777)
    };
    assert_eq!(seen("root"), (0, 0, 0o640));
    assert_eq!(seen("mine"), (1000, 1000, 0o640));
    assert_eq!(seen("folder"), (1000, 1000, 0o750));
    assert_eq!(seen("set/file"), (0, 77, 0o640));
    assert_eq!(seen("set/dir"), (0, 77, 0o2750));
    assert_eq!(seen("tool"), (0, 0, 0o777));
}

#[test]
fn ten_thousand_entries_are_listed_whole_although_few_descriptors_are_allowed_at_first() {
    let story = Story::new();
    fs::create_dir(story.volume().join("host")).expect("a folder");
    (0..10_000).for_each(|index| drop(fs::File::create(story.volume().join(format!("host/{index}"))).expect("file")));
    let image = tests::python::debian_image();
    let script = "import os\nos.mkdir('/mnt/guest')\nfor i in range(1000): os.close(os.open(f'/mnt/guest/{i}', os.O_CREAT))\n\
        for d in ('host', 'guest'):\n  with os.scandir('/mnt/' + d) as found: sizes = [e.stat().st_size for e in found]\n  \
        print(len(sizes), sum(sizes), len(set(os.listdir('/mnt/' + d))))";
    let vmrun = story.vmrun(&["run", "--rm", "-v", &story.volume_at_mnt(), &image, "python3", "-c", script]);
    let mut limited = Command::new("prlimit");
    limited.arg("--nofile=256:").arg("--").arg(vmrun.get_program()).args(vmrun.get_args());
    assert_eq!(tests::outcome(limited).success(), "10000 0 10000\n1000 0 1000\n");
    assert_eq!(fs::read_dir(story.volume().join("guest")).expect("folder").count(), 1_000);
}

#[test]
fn extended_attributes_reach_a_volume() {
    let story = Story::new();
    let _volume = Mounted::ext4(&story.volume());
    let mut guest = Python::start(&story, &["-v", &story.volume_at_mnt(), "--cap-add", "SYS_ADMIN"]);
    guest.exec("os.chdir('/mnt'); open('a', 'w'); os.setxattr('a', 'user.colour', b'blue')");
    assert_eq!(guest.eval("os.getxattr('a', 'user.colour'), os.listxattr('a')"), "(b'blue', ['user.colour'])");
    assert_eq!(guest.exec("os.setxattr('a', 'user.colour', b'x', os.XATTR_CREATE)"), "EEXIST");
    assert_eq!(guest.exec("os.getxattr('a', 'user.none')"), "ENODATA");
    assert_eq!(guest.exec("os.removexattr('a', 'user.colour')"), "None");
    assert_eq!(guest.eval("os.listxattr('a')"), "[]");
    // These belong to root of the host, whom nobody behind a share is.
    assert_eq!(guest.exec("os.setxattr('a', 'trusted.t', b'1')"), "EPERM");
    assert_eq!(guest.end(), 0);
}

#[test]
fn the_root_file_system_has_capabilities_and_access_control_lists() {
    let story = Story::new();
    let mut guest = Python::start(&story, &["--cap-add", "SETFCAP"]);
    guest.exec("import struct; cap = struct.pack('<IIIII', 0x02000001, 1 << 13, 0, 0, 0)");
    guest.exec("open('/tool', 'w').write('x'); os.setxattr('/tool', 'security.capability', cap)");
    assert_eq!(guest.eval("os.getxattr('/tool', 'security.capability') == cap"), "True");
    // A write takes them away.
    assert_eq!(guest.exec("t = open('/tool', 'a'); t.write('y'); t.close()"), "None");
    assert_eq!(guest.exec("os.getxattr('/tool', 'security.capability')"), "ENODATA");
    // Read and write for the owner, read for user 1000: entries of (tag, permissions, id).
    let acl = "acl = struct.pack('<I', 2) + b''.join(struct.pack('<HHI', *e) for e in \
        ((1, 6, 0xffffffff), (2, 4, 1000), (4, 0, 0xffffffff), (16, 4, 0xffffffff), (32, 0, 0xffffffff)))";
    assert_eq!(guest.exec(acl), "None");
    guest.exec("os.chdir('/'); open('a', 'w'); os.chmod('a', 0o600)");
    assert_eq!(guest.exec("os.setxattr('a', 'system.posix_acl_access', acl)"), "None");
    guest.exec("os.setgroups([]); os.setegid(1000); os.seteuid(1000)");
    assert_eq!(guest.eval("open('a').read() == ''"), "True");
    assert_eq!(guest.exec("open('a', 'w')"), "EACCES");
    assert_eq!(guest.end(), 0);
}

#[test]
fn a_full_volume_is_an_error_of_the_write_and_works_again_when_there_is_room() {
    let story = Story::new();
    let _volume = Mounted::tmpfs(&story.volume(), "size=1m,nr_inodes=20");
    let mut guest = Python::start(&story, &["-v", &story.volume_at_mnt()]);
    guest.exec("os.chdir('/mnt'); fd = os.open('a', os.O_RDWR | os.O_CREAT)");
    assert_eq!(guest.eval("os.write(fd, b'x' * (512 << 10))"), "524288");
    assert_eq!(guest.exec("while True: os.write(fd, b'x' * 4096)"), "ENOSPC");
    assert_eq!(guest.eval("os.statvfs('.').f_bavail"), "0");
    assert_eq!(guest.exec("os.posix_fallocate(fd, 0, 2 << 20)"), "ENOSPC");
    assert_eq!(guest.exec("for i in range(30): os.mkdir(f'd{i}')"), "ENOSPC");
    assert_eq!(guest.exec("os.ftruncate(fd, 0)"), "None");
    assert_eq!(guest.eval("os.pwrite(fd, b'y' * 4096, 0)"), "4096");
    assert_eq!(guest.end(), 0);
}

#[test]
fn what_the_host_changes_is_seen_at_the_next_open_and_within_a_second() {
    let story = Story::new();
    fs::write(story.volume().join("a"), "first").expect("file");
    let mut guest = Python::start(&story, &["-v", &story.volume_at_mnt()]);
    assert_eq!(guest.eval("open('/mnt/a').read()"), "first");
    fs::write(story.volume().join("a"), "second, longer").expect("file");
    assert_eq!(guest.eval("open('/mnt/a').read()"), "second, longer");
    // The same length and an open that is not the first: pages of the guest's cache must go.
    fs::write(story.volume().join("a"), "SECOND, LONGER").expect("file");
    assert_eq!(guest.eval("open('/mnt/a').read()"), "SECOND, LONGER");
    assert_eq!(guest.eval("os.path.exists('/mnt/new')"), "False");
    fs::write(story.volume().join("new"), "").expect("file");
    assert_eq!(guest.eval("os.path.exists('/mnt/new')"), "True");
    fs::rename(story.volume().join("new"), story.volume().join("a")).expect("rename");
    guest.exec("import time; start = time.monotonic()");
    guest.exec("while os.path.exists('/mnt/new') and time.monotonic() < start + 3: pass");
    assert_eq!(guest.eval("os.path.exists('/mnt/new'), time.monotonic() < start + 2"), "(False, True)");
    assert_eq!(guest.eval("open('/mnt/a').read()"), "");
    assert_eq!(guest.end(), 0);
}

#[test]
fn a_socket_of_the_host_is_reached_from_a_container() {
    let story = Story::new();
    let path = story.scratch().join("socket");
    let listener = UnixListener::bind(&path).expect("bound");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("a mode");
    let server = std::thread::spawn(move || {
        for _ in 0..2 {
            let (mut client, _) = listener.accept().expect("a connection");
            let mut said = String::new();
            client.read_to_string(&mut said).expect("its end");
            client.write_all(said.to_uppercase().as_bytes()).expect("answered");
        }
    });
    let mut python = Python::start(&story, &["-v", &format!("{}:/run/host.sock:ro", path.display())]);
    assert_eq!(python.exec("import socket, stat"), "None");
    assert_eq!(python.eval("oct(os.stat('/run/host.sock').st_mode)"), "0o140640");
    let connect = "s = socket.socket(socket.AF_UNIX); s.settimeout(20); s.connect('/run/host.sock')";
    for words in ["hello", "again"] {
        assert_eq!(python.exec(&format!("{connect}; s.sendall(b'{words}'); s.shutdown(socket.SHUT_WR)")), "None");
        assert_eq!(python.eval("s.recv(100, socket.MSG_WAITALL)"), format!("b'{}'", words.to_uppercase()));
    }
    server.join().expect("no panic");
    // Nobody listens on the host any more.
    assert_eq!(python.exec(connect), "None");
    assert_eq!(python.eval("s.recv(100)"), "b''");
    assert_eq!(python.end(), 0);
}
