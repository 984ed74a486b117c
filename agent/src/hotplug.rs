//! What comes into the guest while it runs: devices on the PCI bus, CPUs, memory.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use agent_api::message::OnlineResourcesReply;
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::sys;

const CPUS: &str = "/sys/devices/system/cpu";
const MEMORY: &str = "/sys/devices/system/memory";
/// Longest event of the kernel (lib/kobject_uevent.c: UEVENT_BUFFER_SIZE is 2048).
const MAX_UEVENT: usize = 4096;

/// Events of the kernel about devices, from now on (the group of the kernel's own is 1).
pub(crate) fn device_events() -> io::Result<AsyncFd<OwnedFd>> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(KOBJECT_UEVENT))?;
    bind(&socket, &SocketAddrNetlink::new(0, 1))?;
    sys::watch(socket)
}

/// Waits for one event, whatever it says.
pub(crate) async fn next_event(events: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut event = [0; MAX_UEVENT];
    let received = events.async_io(Interest::READABLE, |fd| Ok(recv(fd, &mut event, RecvFlags::empty())?.1)).await;
    match received {
        // Events were lost, so something happened.
        Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(()),
        other => other.map(drop),
    }
}

/// Looks for new devices on the PCI bus.
pub(crate) fn rescan_pci() -> io::Result<()> {
    fs::write("/sys/bus/pci/rescan", "1")
}

/// Lets go of the device of the network interface with a hardware address, if there is one.
pub(crate) fn let_go_of_interface(mac: &[u8]) -> io::Result<()> {
    let text: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    for entry in fs::read_dir("/sys/class/net")?.flatten() {
        // The virtio device, whose parent is on the bus. Interfaces of containers have none.
        let Ok(virtio) = fs::canonicalize(entry.path().join("device")) else { continue };
        if fs::read_to_string(entry.path().join("address"))?.trim() == text.join(":")
            && let Some(device) = virtio.parent()
        {
            return fs::write(device.join("remove"), "1");
        }
    }
    Ok(())
}

/// Brings every CPU and memory block online that is present; says what is online then.
pub(crate) fn online_everything() -> io::Result<OnlineResourcesReply> {
    for cpu in numbered(Path::new(CPUS), "cpu")? {
        let online = cpu.join("online");
        // The first CPU has no such file.
        if fs::read_to_string(&online).is_ok_and(|state| state.trim() == "0") {
            fs::write(&online, "1")?;
        }
    }
    let mut block_count: u64 = 0;
    for block in numbered(Path::new(MEMORY), "memory").unwrap_or_default() {
        let state = block.join("state");
        if fs::read_to_string(&state)?.trim() == "offline" {
            fs::write(&state, "online")?;
        }
        block_count += 1;
    }
    let block_size = fs::read_to_string(Path::new(MEMORY).join("block_size_bytes")).unwrap_or_default();
    let block_size = u64::from_str_radix(block_size.trim(), 16).unwrap_or(0);
    let cpus = list_len(&fs::read_to_string(Path::new(CPUS).join("online"))?);
    Ok(OnlineResourcesReply { cpus, memory_bytes: block_count.saturating_mul(block_size), ..Default::default() })
}

/// Entries of a folder whose names are `prefix` and a number.
fn numbered(folder: &Path, prefix: &str) -> io::Result<Vec<std::path::PathBuf>> {
    let is_numbered = |name: &str| {
        name.strip_prefix(prefix).is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit()))
    };
    let entries = fs::read_dir(folder)?.flatten();
    Ok(entries.filter(|entry| entry.file_name().to_str().is_some_and(is_numbered)).map(|entry| entry.path()).collect())
}

/// How many numbers a list such as `0-2,4` names.
fn list_len(list: &str) -> u32 {
    let part_len = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        last.checked_sub(first)?.checked_add(1)
    };
    list.trim().split(',').filter_map(part_len).fold(0, u32::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::list_len;

    #[test]
    fn list_of_cpus_is_counted() {
        assert_eq!(list_len("0-2,4\n"), 4);
        assert_eq!(list_len("0\n"), 1);
        assert_eq!(list_len("3-1,x,0-4294967295"), 0);
    }
}
