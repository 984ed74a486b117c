//! Whether the bridge of this host can have IPv6. It is looked at before any plugin is called, and nothing is changed: what a host
//! has of IPv6 without our bridge it keeps with it.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use thiserror::Error;

// linux/ipv6_route.h
const RTF_DEFAULT: u32 = 0x0001_0000;
const RTF_ADDRCONF: u32 = 0x0004_0000;

/// Why the bridge has IPv4 alone.
#[derive(Debug, Eq, Error, PartialEq)]
pub(super) enum NoIpv6 {
    #[error("the host's kernel has none")]
    Kernel,
    #[error("the host has disabled it: set net.ipv6.conf.{interface}.disable_ipv6 to 0")]
    Disabled { interface: String },
    #[error(
        "the host would forget its router at {interface}, for the bridge lets it forward: set net.ipv6.conf.{interface}.accept_ra to 2"
    )]
    Router { interface: String },
    #[error("the program `ip6tables` of the package iptables cannot list its rules: {said}")]
    Tables { said: String },
}

/// Looks whether `bridge`, which need not be there yet, can have IPv6. Costs a process.
pub(super) fn look(bridge: &str) -> Result<(), NoIpv6> {
    look_at_kernel(Path::new("/proc"), bridge)?;
    look_at_tables()
}

fn look_at_kernel(proc: &Path, bridge: &str) -> Result<(), NoIpv6> {
    if !proc.join("net/if_inet6").exists() {
        return Err(NoIpv6::Kernel);
    }
    let settings = proc.join("sys/net/ipv6/conf");
    let is_set = |interface: &str, name: &str, value: &str| {
        fs::read_to_string(settings.join(interface).join(name)).is_ok_and(|text| text.trim() == value)
    };
    let bridge = if settings.join(bridge).exists() { bridge } else { "default" };
    if let Some(interface) = ["all", bridge].into_iter().find(|interface| is_set(interface, "disable_ipv6", "1")) {
        return Err(NoIpv6::Disabled { interface: interface.to_owned() });
    }
    if is_set("all", "forwarding", "1") {
        return Ok(());
    }
    // The plugin lets the host forward, and a host that begins to forward drops what routers have advertised (ip-sysctl, accept_ra).
    let routes = fs::read_to_string(proc.join("net/ipv6_route")).unwrap_or_default();
    match advertised(&routes).find(|interface| !is_set(interface, "accept_ra", "2")) {
        Some(interface) => Err(NoIpv6::Router { interface: interface.to_owned() }),
        None => Ok(()),
    }
}

/// Interfaces with a default route that the kernel has made from an advertisement (RFC 4861). Those of a program, as NetworkManager
/// makes them, stay.
fn advertised(routes: &str) -> impl Iterator<Item = &str> {
    routes.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, prefix_len, _, _, _, _, _, _, flags, interface] = fields[..] else { return None };
        let flags = u32::from_str_radix(flags, 16).ok()?;
        let wanted = RTF_DEFAULT | RTF_ADDRCONF;
        (prefix_len == "00" && flags & wanted == wanted).then_some(interface)
    })
}

/// The plugins fail where the program is missing, or the kernel does not translate addresses of IPv6.
fn look_at_tables() -> Result<(), NoIpv6> {
    let mut command = Command::new("ip6tables");
    command.args(["--wait", "--table", "nat", "--list-rules", "POSTROUTING"]).stdin(Stdio::null());
    match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(NoIpv6::Tables { said: String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ") }),
        Err(error) => Err(NoIpv6::Tables { said: error.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    const BRIDGE: &str = "vmrun0";
    /// A default route from an advertisement, and one that an administrator has made.
    const ROUTES: &str = "\
20010db8000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 004c0001   uplink
00000000000000000000000000000000 00 00000000000000000000000000000000 00 fe800000000000002cb57afffec3eb73 00000400 00000001 00000000 00450003   uplink
00000000000000000000000000000000 00 00000000000000000000000000000000 00 fd990000000000000000000000000001 00000400 00000001 00000000 00000003   other
";

    /// A `/proc` with these files.
    fn proc(files: &[(&str, &str)]) -> TempDir {
        let proc = TempDir::new().expect("a folder");
        for (path, text) in files {
            let path = proc.path().join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            fs::write(path, text).expect("a file");
        }
        proc
    }

    #[test]
    fn a_kernel_without_ipv6_and_a_host_that_has_disabled_it_are_told_apart() {
        let here = ("net/if_inet6", "");
        assert_eq!(look_at_kernel(proc(&[]).path(), BRIDGE), Err(NoIpv6::Kernel));
        assert_eq!(look_at_kernel(proc(&[here]).path(), BRIDGE), Ok(()));
        let disabled = |interface: &str| Err(NoIpv6::Disabled { interface: interface.to_owned() });
        for interface in ["all", "default", BRIDGE] {
            let setting = format!("sys/net/ipv6/conf/{interface}/disable_ipv6");
            assert_eq!(look_at_kernel(proc(&[here, (&setting, "1\n")]).path(), BRIDGE), disabled(interface));
        }
        let own = ("sys/net/ipv6/conf/vmrun0/disable_ipv6", "0\n");
        let others = ("sys/net/ipv6/conf/default/disable_ipv6", "1\n");
        assert_eq!(look_at_kernel(proc(&[here, own, others]).path(), BRIDGE), Ok(()), "the bridge is there already");
    }

    #[test]
    fn a_router_that_the_host_would_forget_keeps_ipv6_away() {
        assert_eq!(advertised(ROUTES).collect::<Vec<_>>(), ["uplink"]);
        let files = [("net/if_inet6", ""), ("net/ipv6_route", ROUTES)];
        let forgets = Err(NoIpv6::Router { interface: "uplink".to_owned() });
        assert_eq!(look_at_kernel(proc(&files).path(), BRIDGE), forgets);
        for setting in [("sys/net/ipv6/conf/uplink/accept_ra", "2\n"), ("sys/net/ipv6/conf/all/forwarding", "1\n")] {
            assert_eq!(look_at_kernel(proc(&[&files[..], &[setting]].concat()).path(), BRIDGE), Ok(()));
        }
    }
}
