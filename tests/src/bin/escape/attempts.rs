//! The ways out that are tried, each by system calls of its own making.
#![expect(
    clippy::cast_possible_wrap,
    clippy::cast_possible_truncation,
    reason = "arguments of system calls are plain words"
)]

use std::ffi::CStr;
use std::io;
use std::os::fd::RawFd;

use libc::c_long;

use super::Scene;

type Attempt = fn(&Scene) -> io::Result<i64>;

const AT: i64 = libc::AT_FDCWD as i64;
const READ: i64 = libc::O_RDONLY as i64;
const MAKE: i64 = (libc::O_WRONLY | libc::O_CREAT) as i64;
const PAGE: i64 = 4096;
const RWX: i64 = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as i64;
const RX: i64 = (libc::PROT_READ | libc::PROT_EXEC) as i64;
const PRIVATE: i64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as i64;
const KVM_CREATE_VM: i64 = 0xae01;
const TUNSETIFF: i64 = 0x4004_54ca;

/// Makes a system call; the arguments that are left out are 0.
pub(super) fn call<const N: usize>(number: c_long, arguments: [i64; N]) -> io::Result<i64> {
    let mut all = [0; 6];
    all[..N].copy_from_slice(&arguments);
    let [a, b, c, d, e, f] = all;
    // SAFETY: not safe at all, and meant so: the process is here to be ended, and has nothing to lose.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn text(text: &CStr) -> i64 {
    text.as_ptr().addr() as i64
}

fn bytes<T>(value: &T) -> i64 {
    std::ptr::from_ref(value).addr() as i64
}

fn open(dir: i64, path: &CStr, flags: i64) -> io::Result<i64> {
    call(libc::SYS_openat, [dir, text(path), flags, 0o600])
}

fn open_below(dir: RawFd, way: &str) -> io::Result<i64> {
    let path = std::ffi::CString::new(format!("/proc/self/fd/{dir}/{way}")).expect("no zero");
    open(AT, &path, READ)
}

fn socket(family: i32, kind: i32) -> io::Result<i64> {
    call(libc::SYS_socket, [family.into(), kind.into()])
}

/// `sockaddr_un`.
fn address(name: &[u8]) -> Vec<u8> {
    [&(libc::AF_UNIX as u16).to_ne_bytes()[..], name].concat()
}

fn connect(name: &[u8]) -> io::Result<i64> {
    let (socket, address) = (socket(libc::AF_UNIX, libc::SOCK_DGRAM)?, address(name));
    call(libc::SYS_connect, [socket, address.as_ptr().addr() as i64, address.len() as i64])
}

/// To a socket by its name, from one half of a pair, which some threads may make.
fn send_to(name: &[u8]) -> io::Result<i64> {
    let mut pair = [0_i32; 2];
    call(libc::SYS_socketpair, [libc::AF_UNIX.into(), libc::SOCK_DGRAM.into(), 0, (&raw mut pair).addr() as i64])?;
    let address = address(name);
    let (at, len) = (address.as_ptr().addr() as i64, address.len() as i64);
    call(libc::SYS_sendto, [pair[0].into(), at, 1, 0, at, len])
}

fn abstract_name(scene: &Scene) -> Vec<u8> {
    [&[0], scene.abstract_name.as_slice()].concat()
}

pub(super) const ALL: &[(&str, Attempt)] = &[
    // What is not an escape, and shows that an attempt can succeed.
    ("say something to the owner", |_| call(libc::SYS_write, [2, text(c"."), 1])),
    ("read a file of a share", |scene| open(scene.share.into(), c"file", READ)),
    ("write to a share", |scene| open(scene.share.into(), c"new", MAKE)),
    ("make a pair of sockets", |_| {
        let mut pair = [0_i32; 2];
        call(libc::SYS_socketpair, [libc::AF_UNIX.into(), libc::SOCK_STREAM.into(), 0, (&raw mut pair).addr() as i64])
    }),
    ("act as another user of the share", |_| call(libc::SYS_setresuid, [-1, 1234, -1])),
    // Files of the host.
    ("read a file of the host", |_| open(AT, c"/etc/passwd", READ)),
    ("read a file of the host above a share", |scene| {
        open(scene.share.into(), c"../../../../../../../../etc/passwd", READ)
    }),
    ("read a file of the host above a share's descriptor", |scene| {
        open_below(scene.share, "../../../../../../../../etc/passwd")
    }),
    ("read a file of the host by a link in a share", |scene| open(scene.share.into(), c"link", READ)),
    ("read a file of the host beside an open one", |scene| open_below(scene.program, "../../../etc/passwd")),
    ("open a file by its handle", |scene| {
        let handle = [8_u32, 1, 2, 0];
        call(libc::SYS_open_by_handle_at, [scene.share.into(), bytes(&handle), READ])
    }),
    ("write to a read-only share", |scene| open(scene.read_only_share.into(), c"new", MAKE)),
    ("remove from a read-only share", |scene| {
        call(libc::SYS_unlinkat, [scene.read_only_share.into(), text(c"file"), 0])
    }),
    ("write to the root", |_| open(AT, c"/new", MAKE)),
    ("make a device in a share", |scene| {
        call(libc::SYS_mknodat, [scene.share.into(), text(c"device"), (libc::S_IFCHR | 0o666).into(), 0x103])
    }),
    ("open a device", |_| open(AT, c"/dev/kvm", READ)),
    ("open another process's files", |_| open(AT, c"/proc/1/root/etc/passwd", READ)),
    ("open our own memory", |_| open(AT, c"/proc/self/mem", READ)),
    ("list processes", |_| open(AT, c"/proc/1/status", READ)),
    // Mounts and namespaces.
    ("mount", |_| call(libc::SYS_mount, [text(c"none"), text(c"/proc"), text(c"tmpfs"), 0])),
    ("mount proc anew", |_| call(libc::SYS_mount, [text(c"proc"), text(c"/proc"), text(c"proc"), 0])),
    ("unmount", |_| call(libc::SYS_umount2, [text(c"/proc/self/fd"), 2])),
    ("open a file system", |_| call(libc::SYS_fsopen, [text(c"tmpfs")])),
    ("clone a mount", |scene| call(libc::SYS_open_tree, [scene.share.into(), text(c""), 0x1001])),
    ("move a mount", |scene| call(libc::SYS_move_mount, [scene.share.into(), text(c""), AT, text(c"/proc"), 4])),
    ("change a mount", |scene| {
        let attributes = [0_u64, 1, 0, 0];
        call(libc::SYS_mount_setattr, [scene.read_only_share.into(), text(c""), 0x1000, bytes(&attributes), 32])
    }),
    ("change the root", |scene| {
        call(libc::SYS_fchdir, [scene.share.into()])?;
        call(libc::SYS_chroot, [text(c".")])
    }),
    ("swap the root", |_| call(libc::SYS_pivot_root, [text(c"."), text(c".")])),
    ("make a user namespace", |_| call(libc::SYS_unshare, [libc::CLONE_NEWUSER.into()])),
    ("make a mount namespace", |_| call(libc::SYS_unshare, [libc::CLONE_NEWNS.into()])),
    ("enter a namespace", |scene| call(libc::SYS_setns, [scene.share.into(), 0])),
    // Processes.
    ("start a process", |_| call(libc::SYS_clone, [libc::SIGCHLD.into()])),
    ("start a process, the new way", |_| {
        let arguments = [0_u64, 0, 0, 0, 17, 0, 0, 0];
        call(libc::SYS_clone3, [bytes(&arguments), 64])
    }),
    ("start a program", |scene| {
        let path = std::ffi::CString::new(format!("/proc/self/fd/{}", scene.program)).expect("no zero");
        call(libc::SYS_execve, [text(&path), 0, 0])
    }),
    ("start a program by its descriptor", |scene| {
        call(libc::SYS_execveat, [scene.program.into(), text(c""), 0, 0, 0x1000])
    }),
    ("signal the owner", |scene| call(libc::SYS_kill, [scene.owner, 0])),
    ("signal everybody", |_| call(libc::SYS_kill, [-1, 0])),
    ("signal a thread of the owner", |scene| call(libc::SYS_tgkill, [scene.owner, scene.owner, 0])),
    ("hold the owner", |scene| call(libc::SYS_pidfd_open, [scene.owner, 0])),
    ("trace the owner", |scene| call(libc::SYS_ptrace, [16, scene.owner, 0, 0])),
    ("read the owner's memory", |scene| call(libc::SYS_process_vm_readv, [scene.owner, 0, 0, 0, 0, 0])),
    ("limit the owner", |scene| call(libc::SYS_prlimit64, [scene.owner, 7, 0, 0])),
    ("slow the owner down", |scene| call(libc::SYS_setpriority, [0, scene.owner, 19])),
    // Networks and sockets of others.
    ("reach the internet", |_| socket(libc::AF_INET, libc::SOCK_STREAM)),
    ("reach the internet, IPv6", |_| socket(libc::AF_INET6, libc::SOCK_DGRAM)),
    ("see all frames", |_| socket(libc::AF_PACKET, libc::SOCK_RAW)),
    ("configure the network", |_| socket(libc::AF_NETLINK, libc::SOCK_RAW)),
    ("reach another guest", |_| socket(libc::AF_VSOCK, libc::SOCK_STREAM)),
    ("encrypt in the kernel", |_| socket(libc::AF_ALG, libc::SOCK_SEQPACKET)),
    ("connect to another VM's socket", |scene| connect(&scene.socket)),
    ("connect to an abstract socket", |scene| connect(&abstract_name(scene))),
    ("send to another VM's socket", |scene| send_to(&scene.socket)),
    ("send to an abstract socket", |scene| send_to(&abstract_name(scene))),
    // KVM and other devices.
    ("make a VM", |scene| call(libc::SYS_ioctl, [scene.kvm.into(), KVM_CREATE_VM, 0])),
    ("make a network interface", |scene| call(libc::SYS_ioctl, [scene.kvm.into(), TUNSETIFF, 0])),
    ("type into the owner's terminal", |_| call(libc::SYS_ioctl, [0, 0x5412, text(c"x")])),
    ("make an ioctl behind the low half of a number", |scene| {
        call(libc::SYS_ioctl, [scene.kvm.into(), 1 << 32 | KVM_CREATE_VM, 0])
    }),
    // Code.
    ("map memory that can be executed", |_| call(libc::SYS_mmap, [0, PAGE, RWX, PRIVATE, -1, 0])),
    ("map a file that can be executed", |scene| {
        call(libc::SYS_mmap, [0, PAGE, RX, libc::MAP_PRIVATE.into(), scene.program.into(), 0])
    }),
    ("make memory executable", |_| {
        let at = call(libc::SYS_mmap, [0, PAGE, 1, PRIVATE, -1, 0])?;
        call(libc::SYS_mprotect, [at, PAGE, RX])
    }),
    ("make memory executable with a key", |_| {
        let at = call(libc::SYS_mmap, [0, PAGE, 1, PRIVATE, -1, 0])?;
        call(libc::SYS_pkey_mprotect, [at, PAGE, RX, -1])
    }),
    ("have all memory executable", |_| call(libc::SYS_personality, [0x0040_0000])),
    ("make a file of memory", |_| call(libc::SYS_memfd_create, [text(c"code"), 0])),
    // Rights.
    ("take capabilities back", |_| {
        let (header, all) = ([0x2008_0522_u32, 0], [u32::MAX; 6]);
        call(libc::SYS_capset, [bytes(&header), bytes(&all)])
    }),
    ("be traceable", |_| call(libc::SYS_prctl, [4, 1, 0, 0, 0])),
    ("dump core", |_| {
        let limit = [u64::MAX; 2];
        call(libc::SYS_prlimit64, [0, 4, bytes(&limit), 0])
    }),
    // Other interfaces of the kernel.
    ("set up a ring of requests", |_| {
        let parameters = [0_u8; 120];
        call(libc::SYS_io_uring_setup, [1, bytes(&parameters)])
    }),
    ("load a program into the kernel", |_| call(libc::SYS_bpf, [0, 0, 0])),
    ("watch performance", |_| call(libc::SYS_perf_event_open, [0, 0, -1, -1, 0])),
    ("serve page faults", |_| call(libc::SYS_userfaultfd, [0])),
    ("add a key", |_| call(libc::SYS_add_key, [text(c"user"), text(c"key"), text(c"x"), 1, -3])),
    ("read keys", |_| call(libc::SYS_keyctl, [0, -3, 0])),
    ("load a module", |scene| call(libc::SYS_finit_module, [scene.program.into(), text(c""), 0])),
    ("load a kernel", |scene| call(libc::SYS_kexec_file_load, [scene.program.into(), -1, 0, 0, 0])),
    ("read the kernel's log", |_| {
        let log = [0_u8; 64];
        call(libc::SYS_syslog, [3, bytes(&log), 64])
    }),
    ("restart the host", |_| call(libc::SYS_reboot, [0xfee1_dead, 0x2812_1969, 0, 0])),
    ("set the clock", |_| {
        let time = [0_i64; 2];
        call(libc::SYS_clock_settime, [0, bytes(&time)])
    }),
    ("name the host", |_| call(libc::SYS_sethostname, [text(c"x"), 1])),
    ("use ports of the host", |_| call(libc::SYS_iopl, [3])),
    ("keep accounts", |_| call(libc::SYS_acct, [0])),
    ("swap", |_| call(libc::SYS_swapon, [text(c"/proc"), 0])),
    ("share memory with others", |_| call(libc::SYS_shmget, [1, PAGE, 0o1666])),
    ("watch files of the host", |_| call(libc::SYS_fanotify_init, [0, 0])),
];
