//! Sockets of the host that containers mount, as `hostPath` of type `Socket`: the guest has one for each, which leads to the host's.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use oci_spec::runtime::Spec;
use sandbox::plan::{self, Volume};
use sandbox::socket;

use super::Pod;
use crate::error::TaskError;
use crate::vm::Vm;

impl Pod {
    /// The guest paths of the sockets among a spec's mounts.
    pub(super) fn sockets(&self, spec: &Spec) -> HashMap<Volume, PathBuf> {
        let name = |volume: &Volume| self.socket_volumes.of(&volume.source).0;
        let guest_path = |volume: Volume| (volume.clone(), plan::guest_memory_volume(&name(&volume)));
        socket::sockets(spec).into_iter().map(guest_path).collect()
    }

    /// Makes them, and connects each for as long as the VM lives.
    pub(super) async fn serve_sockets(
        &self,
        vm: &Arc<Vm>,
        volumes: impl Iterator<Item = &Volume>,
    ) -> Result<(), TaskError> {
        for volume in volumes {
            let (name, _) = self.socket_volumes.of(&volume.source);
            vm.sandbox.add_socket(&name, &volume.source).await?;
            if self.served_sockets().insert(name.clone()) {
                let (vm, source) = (vm.clone(), volume.source.clone());
                tokio::spawn(async move { vm.sandbox.serve_socket(&name, &source).await });
            }
        }
        Ok(())
    }
}
