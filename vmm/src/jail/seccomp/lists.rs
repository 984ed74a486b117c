//! Which system calls each kind of thread may make, as lists to be read. Any other ends the process.
//!
//! A list holds what its threads were seen to need under the stories, and what the C library and the allocator may do at any
//! time. Memory is never executable, descriptors never name a new socket, threads of other processes are never signalled.
//! `build.rs` makes programs of them.

use libc::c_long;

use super::kind::ThreadKind;

/// A call, and what must be true of one of its arguments. What one list allows always and another sometimes is allowed always.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Allowed {
    pub(super) call: c_long,
    pub(super) when: When,
}

#[derive(Clone, Copy, PartialEq)]
pub(super) enum When {
    Always,
    /// ENOSYS, as from a kernel without it: the caller does without.
    NotThere,
    /// The argument of this index has one of these values.
    OneOf(u32, &'static [u32]),
    /// It has none of these bits.
    Without(u32, u32),
    /// It is our process id.
    OwnProcess(u32),
}

const fn always(call: c_long) -> Allowed {
    Allowed { call, when: When::Always }
}

const fn one_of(call: c_long, argument: u32, values: &'static [u32]) -> Allowed {
    Allowed { call, when: When::OneOf(argument, values) }
}

const fn without(call: c_long, argument: u32, bits: u32) -> Allowed {
    Allowed { call, when: When::Without(argument, bits) }
}

const EXECUTABLE: u32 = 4; // PROT_EXEC
const KVM_RUN: u32 = 0xae80;
const KVM_IOEVENTFD: u32 = 0x4040_ae79;
const KVM_SIGNAL_MSI: u32 = 0x4020_aea5;
const KVM_GET_REGS: u32 = 0x8090_ae81;
const KVM_GET_SREGS: u32 = 0x8138_ae83;
const TUNGETIFF: u32 = 0x8004_54d2;
const TUNSETVNETHDRSZ: u32 = 0x4004_54d8;
const TUNSETOFFLOAD: u32 = 0x4004_54d0;
const TUNSETQUEUE: u32 = 0x4004_54d9;
const KVM_IRQFD: u32 = 0x4020_ae76;
const KVM_SET_GSI_ROUTING: u32 = 0x4008_ae6a;
const VHOST_GET_FEATURES: u32 = 0x8008_af00;
const VHOST_SET_FEATURES: u32 = 0x4008_af00;
const VHOST_SET_OWNER: u32 = 0xaf01;
const VHOST_SET_MEM_TABLE: u32 = 0x4008_af03;
const VHOST_SET_VRING_NUM: u32 = 0x4008_af10;
const VHOST_SET_VRING_ADDR: u32 = 0x4028_af11;
const VHOST_SET_VRING_BASE: u32 = 0x4008_af12;
const VHOST_SET_VRING_KICK: u32 = 0x4008_af20;
const VHOST_SET_VRING_CALL: u32 = 0x4008_af21;
const VHOST_NET_SET_BACKEND: u32 = 0x4008_af30;
const FIONBIO: u32 = 0x5421;
const PR_SET_NAME: u32 = 15;
const PR_CAPBSET_READ: u32 = 23;
const PR_SET_NO_NEW_PRIVS: u32 = 38;
const PR_CAP_AMBIENT: u32 = 47;
const SECCOMP_SET_MODE_FILTER: u32 = 1;
const CLONE_FS: u32 = 0x200;
/// What the C library starts a thread with: everything is shared, and no namespace is new.
const CLONE_THREAD: u32 = 0x003d_0f00;
const AF_UNIX: u32 = 1;
/// `F_GETFD`, `F_SETFD`, `F_GETFL`, `F_SETFL`, `F_DUPFD_CLOEXEC`.
const DESCRIPTOR_FLAGS: &[u32] = &[1, 2, 3, 4, 1030];

/// Of every thread: memory, locks, the time of a log line and its text.
const COMMON: &[Allowed] = &[
    always(libc::SYS_brk),
    always(libc::SYS_clock_gettime),
    always(libc::SYS_futex),
    always(libc::SYS_madvise),
    without(libc::SYS_mmap, 2, EXECUTABLE),
    without(libc::SYS_mprotect, 2, EXECUTABLE),
    always(libc::SYS_mremap),
    always(libc::SYS_munmap),
    // A wait with a deadline goes on by it after the process was stopped.
    always(libc::SYS_restart_syscall),
    always(libc::SYS_write),
];

/// A vCPU's thread never ends: see `vcpu.rs`.
const VCPU: &[Allowed] = &[
    one_of(libc::SYS_ioctl, 1, &[KVM_RUN, KVM_SIGNAL_MSI, KVM_IOEVENTFD, KVM_GET_REGS, KVM_GET_SREGS]),
    // Behind the signal that interrupts KVM_RUN.
    always(libc::SYS_rt_sigreturn),
];

const EVENT_LOOP: &[Allowed] = &[
    always(libc::SYS_close),
    always(libc::SYS_epoll_ctl),
    always(libc::SYS_epoll_wait),
    always(libc::SYS_exit_group),
    always(libc::SYS_getpid),
    // Entropy for the guest.
    always(libc::SYS_getrandom),
    one_of(libc::SYS_ioctl, 1, &[KVM_SIGNAL_MSI, KVM_IOEVENTFD, FIONBIO]),
    always(libc::SYS_read),
    always(libc::SYS_recvmsg),
    always(libc::SYS_rt_sigprocmask),
    always(libc::SYS_sendmsg),
    always(libc::SYS_sendto),
    always(libc::SYS_shutdown),
    always(libc::SYS_sigaltstack),
    one_of(libc::SYS_socketpair, 0, &[AF_UNIX]),
    Allowed { call: libc::SYS_tgkill, when: When::OwnProcess(0) },
];

/// Of a thread that waits for a queue and ends when its device is reset.
const WORKER: &[Allowed] = &[
    always(libc::SYS_close),
    always(libc::SYS_epoll_wait),
    always(libc::SYS_exit),
    always(libc::SYS_read),
    always(libc::SYS_rt_sigprocmask),
    always(libc::SYS_sigaltstack),
];

const FS: &[Allowed] = &[
    // Data.
    always(libc::SYS_copy_file_range),
    always(libc::SYS_fallocate),
    always(libc::SYS_fdatasync),
    always(libc::SYS_flock),
    always(libc::SYS_fsync),
    always(libc::SYS_ftruncate),
    always(libc::SYS_lseek),
    always(libc::SYS_preadv2),
    always(libc::SYS_pwritev2),
    always(libc::SYS_syncfs),
    // Names.
    always(libc::SYS_getdents64),
    always(libc::SYS_linkat),
    always(libc::SYS_mkdirat),
    always(libc::SYS_mknodat),
    always(libc::SYS_openat),
    always(libc::SYS_openat2),
    always(libc::SYS_readlinkat),
    always(libc::SYS_renameat2),
    always(libc::SYS_symlinkat),
    always(libc::SYS_unlinkat),
    // Attributes.
    always(libc::SYS_fchdir),
    always(libc::SYS_fchmod),
    always(libc::SYS_fchmodat),
    always(libc::SYS_fchownat),
    always(libc::SYS_fgetxattr),
    always(libc::SYS_flistxattr),
    always(libc::SYS_fremovexattr),
    always(libc::SYS_fsetxattr),
    always(libc::SYS_fstatfs),
    always(libc::SYS_getxattr),
    always(libc::SYS_listxattr),
    always(libc::SYS_removexattr),
    always(libc::SYS_setxattr),
    always(libc::SYS_statx),
    always(libc::SYS_umask),
    always(libc::SYS_utimensat),
    // The guest's users.
    always(libc::SYS_capget),
    always(libc::SYS_capset),
    always(libc::SYS_getegid),
    always(libc::SYS_geteuid),
    always(libc::SYS_setgroups),
    always(libc::SYS_setresgid),
    always(libc::SYS_setresuid),
    // The rest: duplicates of descriptors, interrupts, the keys of a hash table, what libcap-ng asks.
    always(libc::SYS_dup),
    one_of(libc::SYS_fcntl, 1, DESCRIPTOR_FLAGS),
    always(libc::SYS_getrandom),
    always(libc::SYS_gettid),
    one_of(libc::SYS_ioctl, 1, &[KVM_SIGNAL_MSI]),
    one_of(libc::SYS_prctl, 0, &[PR_CAPBSET_READ, PR_CAP_AMBIENT]),
    // A umask of the thread's own.
    one_of(libc::SYS_unshare, 0, &[CLONE_FS]),
];

const NET: &[Allowed] = &[
    always(libc::SYS_epoll_ctl),
    one_of(libc::SYS_ioctl, 1, &[KVM_SIGNAL_MSI, TUNSETQUEUE]),
    always(libc::SYS_readv),
    always(libc::SYS_recvfrom),
    always(libc::SYS_sendto),
    always(libc::SYS_writev),
];

const VSOCK_FINISH: &[Allowed] =
    &[one_of(libc::SYS_ioctl, 1, &[FIONBIO]), one_of(libc::SYS_fcntl, 1, DESCRIPTOR_FLAGS), always(libc::SYS_sendto)];

/// Of rings that the host's kernel serves, and of the interrupts that it sends for them.
const VHOST: &[u32] = &[
    KVM_IRQFD,
    KVM_SET_GSI_ROUTING,
    VHOST_GET_FEATURES,
    VHOST_SET_FEATURES,
    VHOST_SET_OWNER,
    VHOST_SET_MEM_TABLE,
    VHOST_SET_VRING_NUM,
    VHOST_SET_VRING_ADDR,
    VHOST_SET_VRING_BASE,
    VHOST_SET_VRING_KICK,
    VHOST_SET_VRING_CALL,
    VHOST_NET_SET_BACKEND,
];

/// Beside all that its children may do, whose filters only add to this one.
const DEVICES: &[Allowed] = &[
    one_of(libc::SYS_clone, 0, &[CLONE_THREAD]),
    // Its flags are in memory, where a filter cannot see them; the C library starts threads by clone(2) then.
    Allowed { call: libc::SYS_clone3, when: When::NotThere },
    always(libc::SYS_epoll_create1),
    always(libc::SYS_eventfd2),
    one_of(libc::SYS_ioctl, 1, &[KVM_IOEVENTFD, TUNGETIFF, TUNSETVNETHDRSZ, TUNSETOFFLOAD, FIONBIO]),
    one_of(libc::SYS_ioctl, 1, VHOST),
    one_of(libc::SYS_prctl, 0, &[PR_SET_NAME, PR_SET_NO_NEW_PRIVS]),
    // How large a stack may be; of another process, nothing.
    one_of(libc::SYS_prlimit64, 0, &[0]),
    always(libc::SYS_rseq),
    always(libc::SYS_sched_getaffinity),
    one_of(libc::SYS_seccomp, 0, &[SECCOMP_SET_MODE_FILTER]),
    always(libc::SYS_set_robust_list),
];

impl ThreadKind {
    pub(super) fn lists(self) -> &'static [&'static [Allowed]] {
        match self {
            Self::EventLoop => &[COMMON, EVENT_LOOP],
            Self::Vcpu => &[COMMON, VCPU],
            Self::Devices => &[COMMON, WORKER, FS, NET, VSOCK_FINISH, DEVICES],
            Self::Fs => &[COMMON, WORKER, FS],
            Self::Net => &[COMMON, WORKER, NET],
            Self::VsockFinish => &[COMMON, WORKER, VSOCK_FINISH],
        }
    }
}

/// The lists of a kind as one, by number.
pub(super) fn calls(kind: ThreadKind) -> Vec<Allowed> {
    let mut calls = kind.lists().concat();
    calls.sort_by_key(|allowed| allowed.call);
    calls
}
