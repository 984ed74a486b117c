//! The kernel calls that need `unsafe`, and the end of the machine. Nothing else of the agent is unsafe.
#![expect(unsafe_code, reason = "ioctls without a safe wrapper, and inherited descriptors")]

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::ioctl::{Setter, ioctl, opcode};

/// Time that the file systems have to write back before a reset.
const SYNC_DEADLINE: Duration = Duration::from_millis(1000);

/// Largest part of the host's entropy that is used.
const MAX_ENTROPY_LEN: usize = 64;

/// `struct rand_pool_info` with its flexible array (linux/random.h).
#[repr(C)]
struct RandPool {
    entropy_bits: i32,
    len: i32,
    bytes: [u8; MAX_ENTROPY_LEN],
}

// The kernel encodes only the two leading integers in the number (linux/random.h).
const RNDADDENTROPY: u32 = opcode::write::<[i32; 2]>(b'R', 0x03);

/// Adds the host's bytes to the random pool and credits them.
pub(crate) fn add_entropy(entropy: &[u8]) -> io::Result<()> {
    let len = entropy.len().min(MAX_ENTROPY_LEN);
    let mut pool = RandPool { entropy_bits: 0, len: 0, bytes: [0; MAX_ENTROPY_LEN] };
    pool.bytes[..len].copy_from_slice(&entropy[..len]);
    pool.len = i32::try_from(len).map_err(io::Error::other)?;
    pool.entropy_bits = pool.len * 8;
    let device = OpenOptions::new().write(true).open("/dev/urandom")?;
    // SAFETY: the number takes a pointer to `rand_pool_info`, whose layout `RandPool` has, and `len` is within `bytes`.
    let request = unsafe { Setter::<{ RNDADDENTROPY as _ }, RandPool>::new(pool) };
    // SAFETY: the descriptor is /dev/urandom, and the kernel reads `len` bytes after the header and writes nothing.
    unsafe { ioctl(&device, request) }?;
    Ok(())
}

/// Writes one line to the kernel's log, as an emergency, which is printed on a quiet console too; a failure has no other place to be told.
pub(crate) fn log_to_kernel(line: &str) {
    if let Ok(mut log) = OpenOptions::new().write(true).open("/dev/kmsg") {
        let _ = writeln!(log, "<0>{line}");
    }
}

/// `struct sock_fprog` (linux/filter.h).
#[repr(C)]
struct FilterProgram {
    /// In instructions.
    len: u16,
    instructions: *const libc::c_void,
}

/// Loads a program of instructions of 8 bytes as a seccomp filter of this thread, with no flag.
pub(crate) fn load_filter(program: &[u8]) -> io::Result<()> {
    let len = u16::try_from(program.len() / 8).map_err(io::Error::other)?;
    let program = FilterProgram { len, instructions: program.as_ptr().cast() };
    // SAFETY: the kernel reads `len` instructions, which `program` has, and writes nothing.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Flushes every file system, for as long as the deadline allows, and resets the VM.
pub(crate) fn reset_machine() -> io::Result<()> {
    let (synced, on_synced) = mpsc::channel();
    thread::Builder::new().name("sync".to_owned()).spawn(move || {
        rustix::fs::sync();
        // Late: the reset does not wait.
        let _ = synced.send(());
    })?;
    // A share whose host does not answer must not keep the VM alive.
    let _ = on_synced.recv_timeout(SYNC_DEADLINE);
    // What the kernel says of each reset is an emergency, and takes 86 exits on the early console.
    let _ = fs::write("/proc/sys/kernel/printk", "0");
    Ok(rustix::system::reboot(rustix::system::RebootCommand::Restart)?)
}

/// Takes a descriptor that the parent handed over by number; the caller takes each number once.
pub(crate) fn take_fd(number: i32) -> OwnedFd {
    // SAFETY: the parent maps exactly these numbers into a fresh child, which takes each once, before it opens anything.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// Borrows a descriptor that the parent handed over by number and that this process never closes.
pub(crate) fn borrow_fd(number: i32) -> BorrowedFd<'static> {
    // SAFETY: the parent maps exactly this number into a fresh child, and nobody in it closes it before `execve` does.
    unsafe { BorrowedFd::borrow_raw(number) }
}

/// Sends a signal; the caller knows that the process has not been reaped.
pub(crate) fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: kill takes two numbers and touches no memory of ours.
    let result = unsafe { libc::kill(pid, signal) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Unblocks every signal and gives each its default action: the runtime of this language ignores SIGPIPE.
pub(crate) fn reset_signals() -> io::Result<()> {
    nix::sys::signal::SigSet::empty().thread_set_mask()?;
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL installs no code; numbers that cannot be changed are refused with EINVAL.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    Ok(())
}

/// Sets `IFF_UP` on `lo` (netdevice(7)).
pub(crate) fn bring_loopback_up() -> io::Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let mut name = [0; libc::IFNAMSIZ];
    for (to, from) in name.iter_mut().zip(b"lo") {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    let flags = libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap_or(0);
    let request = libc::ifreq { ifr_name: name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags } };
    // SAFETY: the request is a complete ifreq that outlives the call, and the descriptor is open.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Registers a descriptor with the runtime.
pub(crate) fn watch(fd: OwnedFd) -> io::Result<tokio::io::unix::AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` names the same open file until it is dropped, and the registration owns it.
    unsafe { tokio::io::unix::AsyncFd::register(fd) }.map_err(io::Error::from)
}
