//! `--network bridge`: a namespace of the container's own on a bridge of the host, wired by the plugins of CNI (specification 1.0.0), as
//! nerdctl and podman have it. Addresses are given from what all of the host's containers share, so two state roots do not collide.
//!
//! ```text
//!   DATA/containers/NAME.RANDOM/network/netns      the namespace, a mount
//!                                      /cni.json   what takes the plugins' work back; written first
//! ```
//! [`remove`] belongs to the removal of the data folder: whoever removes a container whose owner was killed finds all that it needs there.

use std::fs;
use std::io::{self, ErrorKind, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use sandbox::network::netns;
use sandbox::network::user::PortForward;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tracing::info;

mod ipv6;
mod ports;

/// Where the authors of the plugins and the distributions have them.
const PLUGIN_DIRS: [&str; 3] = ["/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"];
const PLUGINS: [&str; 4] = ["bridge", "host-local", "portmap", "firewall"];
const CNI_VERSION: &str = "1.0.0";
const NETWORK: &str = "vmrun";
const BRIDGE: &str = "vmrun0";
const SUBNET: &str = "10.214.0.0/16";
const PREFIX_LEN: u8 = 16;
/// A unique local prefix (RFC 4193), chosen to be read as the network of IPv4.
const SUBNET_V6: &str = "fd00:214::/64";
const PREFIX_LEN_V6: u8 = 64;
const INTERFACE: &str = "eth0";

/// What a container wants of the bridge.
pub(super) struct Wishes<'a> {
    pub(super) ip: Option<Ipv4Addr>,
    pub(super) ip6: Option<Ipv6Addr>,
    pub(super) published: &'a [PortForward],
}

/// A namespace on the bridge.
pub(super) struct Wired {
    pub(super) netns: PathBuf,
    /// Sockets that hold the published ports of the host, for as long as the container has them.
    pub(super) ports: Vec<OwnedFd>,
}

/// What the plugins were asked for, in their order, and what they answered.
#[derive(Debug, Deserialize, Serialize)]
struct Wiring {
    container_id: String,
    plugin_dir: PathBuf,
    configurations: Vec<Value>,
    result: Value,
}

/// Makes the namespace of the container with this data folder, and has it wired.
pub(super) fn create(data_dir: &Path, wishes: &Wishes<'_>) -> Result<Wired> {
    ports::refuse_loopback(wishes.published)?;
    let plugin_dir = plugin_dir()?;
    let has_ipv6 = has_ipv6(wishes)?;
    let ports = ports::hold(wishes.published, has_ipv6)?;
    let folder = folder(data_dir);
    let netns = folder.join("netns");
    let container_id = data_dir.file_name().context("a data folder has a name")?.to_string_lossy().into_owned();
    let configurations = configurations(wishes, has_ipv6);
    let mut wiring = Wiring { container_id, plugin_dir, configurations, result: Value::Null };
    fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    wiring.write(&folder)?;
    netns::create(&netns)?;
    for configuration in wiring.configurations.clone() {
        let answer = wiring.call("ADD", &netns, configuration)?;
        wiring.result = serde_json::from_slice(&answer).context("a CNI plugin answered something else than JSON")?;
    }
    wiring.write(&folder)?;
    ports::leave_loopback(&ports, BRIDGE)?;
    Ok(Wired { netns, ports })
}

/// Takes the wiring of a container back, if it has one.
pub(crate) fn remove(data_dir: &Path) -> Result<()> {
    let folder = folder(data_dir);
    let text = match fs::read(folder.join("cni.json")) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        read => read.with_context(|| format!("cannot read {}", folder.display()))?,
    };
    let netns = folder.join("netns");
    // What was killed while it wrote the first word had not wired anything.
    if let Ok(wiring) = serde_json::from_slice::<Wiring>(&text) {
        let undone = wiring.configurations.iter().rev().map(|plugin| {
            let undo = || wiring.call("DEL", &netns, plugin.clone()).map(drop);
            // `bridge` misses rules that its ADD did not come to; with the interface gone it looks for none.
            undo().or_else(|_| undo())
        });
        // Each is told, whatever the others say.
        undone.fold(Ok(()), Result::and)?;
    }
    netns::remove(&netns)?;
    fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))
}

fn folder(data_dir: &Path) -> PathBuf {
    data_dir.join("network")
}

fn plugin_dir() -> Result<PathBuf> {
    let dirs = std::env::var_os("CNI_PATH").map(|path| std::env::split_paths(&path).collect());
    let dirs: Vec<PathBuf> = dirs.unwrap_or_else(|| PLUGIN_DIRS.map(PathBuf::from).into());
    let found = dirs.into_iter().find(|dir| PLUGINS.iter().all(|plugin| dir.join(plugin).is_file()));
    found.with_context(|| {
        format!(
            "the bridge needs the CNI plugins {}: install the package containernetworking-plugins, or use --network user",
            PLUGINS.join(", ")
        )
    })
}

/// Whether the host can give the container IPv6, which one that names an address of it does not do without.
fn has_ipv6(wishes: &Wishes<'_>) -> Result<bool> {
    let Err(why) = ipv6::look(BRIDGE) else { return Ok(true) };
    let named = wishes.published.iter().filter_map(|port| port.host_address).find(IpAddr::is_ipv6);
    match (wishes.ip6, named) {
        (Some(address), _) => Err(why).with_context(|| format!("--ip6 {address} needs IPv6 on the bridge")),
        (_, Some(address)) => Err(why).with_context(|| format!("--publish at {address} needs IPv6 on the bridge")),
        (None, None) => {
            info!(%why, "the bridge has no IPv6");
            Ok(false)
        }
    }
}

/// Configurations of the plugins, in the order of their ADD.
fn configurations(wishes: &Wishes<'_>, has_ipv6: bool) -> Vec<Value> {
    let plugin = |kind: &str, settings: Value| {
        let mut configuration = json!({ "cniVersion": CNI_VERSION, "name": NETWORK, "type": kind });
        if let (Some(all), Value::Object(settings)) = (configuration.as_object_mut(), settings) {
            all.extend(settings);
        }
        configuration
    };
    let mut ips: Vec<String> = wishes.ip.iter().map(|ip| format!("{ip}/{PREFIX_LEN}")).collect();
    let mut ranges = vec![json!([{ "subnet": SUBNET }])];
    let mut routes = vec![json!({ "dst": "0.0.0.0/0" })];
    if has_ipv6 {
        ips.extend(wishes.ip6.iter().map(|ip6| format!("{ip6}/{PREFIX_LEN_V6}")));
        ranges.push(json!([{ "subnet": SUBNET_V6 }]));
        routes.push(json!({ "dst": "::/0" }));
    }
    let mut all = vec![
        plugin(
            "bridge",
            json!({
                "bridge": BRIDGE, "isGateway": true, "ipMasq": true, "hairpinMode": true,
                "ipam": { "type": "host-local", "ranges": ranges, "routes": routes },
                "runtimeConfig": { "ips": ips },
            }),
        ),
        plugin("firewall", json!({})),
    ];
    if !wishes.published.is_empty() {
        let mappings: Vec<Value> = wishes.published.iter().map(mapping).collect();
        let mut settings = json!({ "runtimeConfig": { "portMappings": mappings } });
        if has_ipv6 {
            // What is sent to ::1 comes from there, and nobody's answer finds the way back.
            settings["conditionsV6"] = json!(["!", "-d", "::1"]);
        }
        all.push(plugin("portmap", settings));
    }
    all
}

fn mapping(port: &PortForward) -> Value {
    let protocol = if port.udp { "udp" } else { "tcp" };
    let mut mapping = json!({ "hostPort": port.host_port, "containerPort": port.guest_port, "protocol": protocol });
    if let Some(address) = port.host_address {
        mapping["hostIP"] = json!(address);
    }
    mapping
}

impl Wiring {
    fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join("cni.json");
        fs::write(&path, serde_json::to_vec(self)?).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Runs the plugin of a configuration; returns its standard output.
    fn call(&self, verb: &str, netns: &Path, mut configuration: Value) -> Result<Vec<u8>> {
        if !self.result.is_null() {
            configuration["prevResult"] = self.result.clone();
        }
        let plugin = configuration["type"].as_str().unwrap_or_default().to_owned();
        let mut command = Command::new(self.plugin_dir.join(&plugin));
        command
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", &self.container_id)
            .env("CNI_IFNAME", INTERFACE)
            .env("CNI_PATH", &self.plugin_dir)
            // Of a host that was booted since there is only the file.
            .env("CNI_NETNS", if netns::is_there(netns) { netns.as_os_str() } else { "".as_ref() })
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let context = || format!("cannot run the CNI plugin {plugin}");
        let mut child = command.spawn().with_context(context)?;
        let input = child.stdin.take().map(|mut stdin| stdin.write_all(configuration.to_string().as_bytes()));
        let output = child.wait_with_output().with_context(context)?;
        if !output.status.success() {
            bail!("the CNI plugin {plugin} refused {verb}: {}", cause(&output.stdout));
        }
        input.transpose().or_else(ignore_unread).with_context(context)?;
        Ok(output.stdout)
    }
}

/// A plugin that has nothing to do need not read why.
fn ignore_unread(error: io::Error) -> io::Result<Option<()>> {
    if error.kind() == ErrorKind::BrokenPipe { Ok(None) } else { Err(error) }
}

/// What an error of a plugin says (CNI specification, section 5).
fn cause(output: &[u8]) -> String {
    let error: Value = serde_json::from_slice(output).unwrap_or_default();
    let texts = [&error["msg"], &error["details"]].map(|text| text.as_str().unwrap_or_default());
    let said: Vec<&str> = texts.into_iter().filter(|text| !text.is_empty()).collect();
    if said.is_empty() { "it does not say why".to_owned() } else { said.join(": ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plugins_are_told_of_addresses_and_ports() {
        let port = PortForward { host_address: None, host_port: 8080, guest_port: 80, udp: false };
        let local = PortForward { host_address: Some("127.0.0.1".parse().expect("v4")), udp: true, ..port };
        let (ip, ip6) = ("10.214.0.9".parse().expect("v4"), "fd00:214::9".parse().expect("v6"));
        let all = configurations(&Wishes { ip: Some(ip), ip6: Some(ip6), published: &[port, local] }, true);
        let kinds: Vec<_> = all.iter().map(|plugin| plugin["type"].as_str().expect("a type")).collect();
        assert_eq!(kinds, ["bridge", "firewall", "portmap"]);
        assert_eq!(all[0]["runtimeConfig"]["ips"], json!(["10.214.0.9/16", "fd00:214::9/64"]));
        let tcp = json!({ "hostPort": 8080, "containerPort": 80, "protocol": "tcp" });
        let udp = json!({ "hostPort": 8080, "containerPort": 80, "protocol": "udp", "hostIP": "127.0.0.1" });
        assert_eq!(all[2]["runtimeConfig"]["portMappings"], json!([tcp, udp]));
        assert_eq!(all[2]["conditionsV6"], json!(["!", "-d", "::1"]));
        assert!(all.iter().all(|plugin| plugin["cniVersion"] == CNI_VERSION && plugin["name"] == NETWORK));
    }

    #[test]
    fn a_host_without_ipv6_has_one_family() {
        let wishes = Wishes { ip: None, ip6: None, published: &[] };
        let [both, one] = [true, false].map(|has_ipv6| configurations(&wishes, has_ipv6));
        assert_eq!((both.len(), one.len()), (2, 2));
        assert_eq!(
            both[0]["ipam"]["ranges"],
            json!([[{ "subnet": "10.214.0.0/16" }], [{ "subnet": "fd00:214::/64" }]])
        );
        assert_eq!(both[0]["ipam"]["routes"], json!([{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }]));
        assert_eq!(one[0]["ipam"]["ranges"], json!([[{ "subnet": "10.214.0.0/16" }]]));
        assert_eq!(one[0]["ipam"]["routes"], json!([{ "dst": "0.0.0.0/0" }]));
        let port = PortForward { host_address: None, host_port: 8080, guest_port: 80, udp: false };
        let all = configurations(&Wishes { published: &[port], ..wishes }, false);
        assert!(all[2].get("conditionsV6").is_none(), "{}", all[2]);
    }

    #[test]
    fn a_refusal_is_told_in_the_plugins_words() {
        assert_eq!(cause(br#"{"code": 999, "msg": "no address", "details": "all taken"}"#), "no address: all taken");
        assert_eq!(cause(b"panic"), "it does not say why");
    }
}
