//! Attachments of namespaces to networks, as container engines have CNI's plugins make them (specification 1.0.0).

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::{Netns, left};
use crate::Outcome;

/// Where Debian has the plugins.
const CNI_DIR: &str = "/usr/lib/cni";

/// An attachment by real plugins, undone when dropped; no VM may have the interface then.
pub struct Attachment {
    netns: PathBuf,
    id: String,
    interface: String,
    plugins: Vec<Value>,
    is_checked: bool,
    /// What the last plugin said.
    pub result: Value,
}

impl Attachment {
    /// Runs the plugins' ADD, in their order (CNI specification 1.0.0, section 3).
    ///
    /// # Panics
    /// When a plugin refuses.
    #[must_use]
    pub fn add(netns: &Netns, interface: &str, plugins: Vec<Value>) -> Self {
        let mut attachment = Self {
            netns: netns.path(),
            id: netns.name().to_owned(),
            interface: interface.to_owned(),
            plugins,
            is_checked: true,
            result: Value::Null,
        };
        for mut plugin in attachment.plugins.clone() {
            plugin["prevResult"] = attachment.result.take();
            let added = attachment.call("ADD", &plugin);
            assert_eq!(added.code, 0, "{added:?}");
            attachment.result = serde_json::from_str(&added.stdout).expect("JSON");
        }
        attachment
    }

    /// Address of the namespace in the family of `like`.
    ///
    /// # Panics
    /// When it has none.
    #[must_use]
    pub fn address(&self, like: char) -> String {
        let ips = self.result["ips"].as_array().expect("addresses");
        let found = ips.iter().filter_map(|ip| ip["address"].as_str()).find(|address| address.contains(like));
        found.expect("an address").split('/').next().expect("a part").to_owned()
    }

    /// Undoes it now, though a VM has the interface.
    pub fn remove(mut self) {
        self.is_checked = false;
    }

    fn call(&self, verb: &str, plugin: &Value) -> Outcome {
        let mut plugin = plugin.clone();
        if plugin["prevResult"].is_null() {
            plugin.as_object_mut().expect("an object").remove("prevResult");
        }
        let program = plugin["type"].as_str().expect("a type");
        let mut child = Command::new(format!("{CNI_DIR}/{program}"))
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", &self.id)
            .env("CNI_NETNS", &self.netns)
            .env("CNI_IFNAME", &self.interface)
            .env("CNI_PATH", CNI_DIR)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("containernetworking-plugins is installed");
        child.stdin.take().expect("piped").write_all(plugin.to_string().as_bytes()).expect("read");
        Outcome::of(child.wait_with_output().expect("it ends"))
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        if self.is_checked && !std::thread::panicking() {
            left::assert_nothing_of_a_vm(&self.id);
        }
        for plugin in self.plugins.clone().iter().rev() {
            let mut plugin = plugin.clone();
            plugin["prevResult"] = self.result.clone();
            let deleted = self.call("DEL", &plugin);
            assert!(deleted.code == 0 || std::thread::panicking(), "{deleted:?}");
        }
    }
}

/// The `bridge` plugin with `host-local`: pods of one bridge, 10.88.0.0/24 and fd88::/64, the host at `.1` and `::1`.
#[must_use]
pub fn bridge(state: &Path, mtu: u32) -> Value {
    json!({
        "cniVersion": "1.0.0", "name": "story", "type": "bridge", "bridge": "cni0",
        "isGateway": true, "ipMasq": false, "hairpinMode": true, "mtu": mtu,
        "ipam": host_local(state),
    })
}

/// The `ptp` plugin with `host-local`: a link of its own for each pod.
#[must_use]
pub fn ptp(state: &Path, mtu: u32) -> Value {
    json!({ "cniVersion": "1.0.0", "name": "story", "type": "ptp", "ipMasq": false, "mtu": mtu, "ipam": host_local(state) })
}

/// The `portmap` plugin: the pod's port 7 of TCP and of UDP at `host_port` of each of the host's addresses.
#[must_use]
pub fn portmap(host_port: u16) -> Value {
    let mapping = |protocol| json!({ "hostPort": host_port, "containerPort": 7, "protocol": protocol });
    json!({
        "cniVersion": "1.0.0", "name": "story", "type": "portmap",
        "runtimeConfig": { "portMappings": [mapping("tcp"), mapping("udp")] },
    })
}

fn host_local(state: &Path) -> Value {
    json!({
        "type": "host-local", "dataDir": state,
        "ranges": [[{ "subnet": "10.88.0.0/24" }], [{ "subnet": "fd88::/64" }]],
        "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
    })
}
