//! containerd's configuration for stories: the format of its release, every path in the room, two handlers of ours for the CRI plugin.

use std::path::Path;

use super::packages::cni_plugins;
use super::{PAUSE, Release};

/// The network of pods: a bridge in the room, at 10.88.0.1 and fd88::1, addresses that nothing else there has, and ports of the room.
pub(super) const NETWORK: &str = r#"{"cniVersion": "0.4.0", "name": "story", "plugins": [{
    "type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true, "ipam": {
        "type": "host-local", "ranges": [[{"subnet": "10.88.0.0/16"}], [{"subnet": "fd88::/64"}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
    }
}, {"type": "portmap", "capabilities": {"portMappings": true}}]}"#;

/// The text of `config.toml`. The handlers of the CRI plugin are `vm`, and `vm-sandbox` with the sandbox service of the shim.
pub(super) fn containerd(release: Release, dir: &Path) -> String {
    let dir = dir.display();
    let plugins = cni_plugins();
    let plugins = plugins.display();
    let cni = |plugins: String| format!("{plugins}\nconf_dir = \"{dir}/net.d\"");
    let bin_dir = cni(format!("bin_dir = \"{plugins}\""));
    let first = format!(
        "root = \"{dir}/root\"\nstate = \"{dir}/run\"\nimports = [\"/etc/containerd/conf.d/*.toml\"]\n\
         [grpc]\naddress = \"{dir}/run/containerd.sock\"\n[debug]\nlevel = \"debug\"\n"
    );
    match release {
        Release::Bookworm => format!("version = 2\n{first}{}", version_2(&bin_dir, None)),
        Release::Trixie => format!("version = 2\n{first}{}", version_2(&bin_dir, Some("sandbox_mode"))),
        Release::Sid => format!("version = 3\n{first}{}", version_3(&cni(format!("bin_dirs = [\"{plugins}\"]")))),
    }
}

fn version_2(cni: &str, sandbox_key: Option<&str>) -> String {
    let plugin = "plugins.\"io.containerd.grpc.v1.cri\"";
    let sandbox = sandbox_key.map_or_else(String::new, |key| {
        let table = format!("[{plugin}.containerd.runtimes.vm-sandbox]");
        format!("{table}\nruntime_type = \"io.containerd.vm.v2\"\n{key} = \"shim\"\n")
    });
    format!(
        "[{plugin}]\nsandbox_image = \"{PAUSE}\"\ndisable_apparmor = true\n[{plugin}.cni]\n{cni}\n\
         [{plugin}.containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n\
         [{plugin}.containerd.runtimes.vm]\nruntime_type = \"io.containerd.vm.v2\"\n{sandbox}"
    )
}

fn version_3(cni: &str) -> String {
    let runtime = "plugins.\"io.containerd.cri.v1.runtime\"";
    format!(
        "[plugins.\"io.containerd.cri.v1.images\".pinned_images]\nsandbox = \"{PAUSE}\"\n\
         [{runtime}]\ndisable_apparmor = true\n[{runtime}.cni]\n{cni}\n\
         [{runtime}.containerd.runtimes.vm]\nruntime_type = \"io.containerd.vm.v2\"\n\
         [{runtime}.containerd.runtimes.vm-sandbox]\nruntime_type = \"io.containerd.vm.v2\"\nsandboxer = \"shim\"\n"
    )
}
