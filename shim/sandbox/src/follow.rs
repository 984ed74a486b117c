//! Keeps the VM's network as its namespace is, while the VM runs: interfaces are plugged in and pulled out, addresses and routes
//! are told to the guest. Called at each start of a container, and by each event of the namespace.

use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::task::{JoinError, spawn_blocking};
use vmm_api::control::Request;

use crate::error::RescanError;
use crate::message::SetNetworkRequest;
use crate::network::pod::{self, Made, PodNetwork, PodOptions};
use crate::network::{NetworkError, watch};
use crate::{ControlError, Sandbox};

impl Sandbox {
    /// Takes the VMM's own network namespace for the VM's, for engines that wire a container by its process id. It is empty, and
    /// looked at by [`Self::rescan_network`].
    ///
    /// # Errors
    /// As [`pod::attach`].
    pub async fn offer_network(&self, options: &PodOptions) -> Result<(), NetworkError> {
        let path = PathBuf::from(format!("/proc/{}/ns/net", self.vmm_pid()));
        self.network.lock().await.pod = Some(PodNetwork::open(&path, options)?);
        Ok(())
    }

    /// Looks at the network's namespace again, and gives the VM what is new there. Nothing happens without a namespace.
    ///
    /// # Errors
    /// What failed first. Everything else is done.
    pub async fn rescan_network(&self) -> Result<(), RescanError> {
        let mut held = self.network.lock().await;
        let Some(pod) = &mut held.pod else { return Ok(()) };
        let namespace = pod.namespace.clone();
        let found = done(self.network_work.run(move || pod::look(&namespace)).await)?;
        let change = pod.change(&found);
        for &position in &change.carriers {
            let joined = &mut pod.joined[position];
            joined.is_up = !joined.is_up;
            if joined.join.is_some() {
                let request = Request::SetLink { name: joined.device.name.clone(), up: joined.is_up };
                self.vmm.ask(&request, &[]).await?;
            }
        }
        for &position in &change.gone {
            self.pull_out(pod, position).await;
        }
        let wanted = pod.wanted(change);
        let mut outcome = Ok(());
        for made in done(self.network_work.run(move || wanted.make()).await)? {
            outcome = outcome.and(self.plug_in(pod, made).await);
        }
        if let Some(news) = pod.news(&found) {
            self.tell_network(&news).await?;
            pod.set_told(&found);
        }
        outcome
    }

    /// Does so whenever something changes there, until the VM ends; at once when there is no namespace.
    pub async fn follow_network(&self) {
        let Some(namespace) = self.network.lock().await.pod.as_ref().map(|pod| pod.namespace.clone()) else { return };
        if let Err(error) = self.follow(namespace).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "the network of the pod is not followed");
        }
    }

    async fn follow(&self, namespace: Arc<std::os::fd::OwnedFd>) -> Result<(), NetworkError> {
        let socket = done(spawn_blocking(move || watch::listen(&namespace)).await)?;
        let failed = || NetworkError::host("watch the network namespace");
        let watch = watch::Watch::new(socket).map_err(failed())?;
        let follow = async {
            loop {
                if let Err(error) = self.rescan_network().await {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "the guest does not have the pod's network"
                    );
                }
                watch.changed().await.map_err(failed())?;
            }
        };
        tokio::select! {
            followed = follow => followed,
            // Its TAP interfaces go with the VM, which is nothing to follow.
            _ = self.ended() => Ok(()),
        }
    }

    /// Lets go of what the network has on the host, after the end of the VM; dropping the sandbox does the same.
    pub async fn leave_network(&self) {
        let held = std::mem::take(&mut *self.network.lock().await);
        drop(held);
        // The end of the VM may have found them at an interface that the end itself changed.
        self.network_work.finished().await;
    }

    async fn plug_in(&self, pod: &mut PodNetwork, made: Made) -> Result<(), RescanError> {
        let Made { joined, fds } = made;
        let device = joined.device.clone();
        // It is let go with its pod from here on.
        pod.joined.push(joined);
        let plugged: Result<(), RescanError> = match fds {
            Ok(fds) => {
                let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
                let asked = self.vmm.ask(&Request::AddNetwork { device: device.clone() }, &fds).await;
                asked.map(drop).map_err(RescanError::from)
            }
            Err(error) => Err(error.into()),
        };
        if plugged.is_err() {
            let join = pod.joined.last_mut().and_then(|joined| joined.join.take());
            // A panic would have been told where it was.
            let _ = self.network_work.run(move || drop(join)).await;
        } else {
            tracing::info!(interface = device.name, "plugged in");
        }
        plugged
    }

    /// The interface is gone on the host, so nothing can fail that anybody could do something about.
    async fn pull_out(&self, pod: &mut PodNetwork, position: usize) {
        let joined = pod.forget(position);
        if joined.join.is_none() {
            return;
        }
        let gone_interfaces = vec![joined.device.mac.to_string()];
        let told = self.tell_network(&SetNetworkRequest { gone_interfaces, ..Default::default() }).await;
        let pulled = self.vmm.ask(&Request::RemoveNetwork { name: joined.device.name.clone() }, &[]).await;
        for error in [told.err(), pulled.err()].into_iter().flatten() {
            tracing::warn!(error = &error as &dyn std::error::Error, "an interface was pulled out by force");
        }
        tracing::info!(interface = joined.device.name, "pulled out");
        let _ = self.network_work.run(move || drop(joined)).await;
    }

    async fn tell_network(&self, request: &SetNetworkRequest) -> Result<(), ControlError> {
        let told = self.agent.set_network(request).await;
        self.vmm.explain(told).await.map_err(ControlError::Agent)
    }
}

pub(crate) fn done<T>(joined: Result<Result<T, NetworkError>, JoinError>) -> Result<T, NetworkError> {
    let panicked = |error: JoinError| NetworkError::Host {
        action: "work in the network namespace".to_owned(),
        source: std::io::Error::other(error),
    };
    joined.map_err(panicked)?
}
