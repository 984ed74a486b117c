//! What a caller can ask of the VM itself, beside its containers: state, pause, counters, shares that come and go.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use vmm_api::control::{Reply, Request, State, Stats};
use vmm_api::net::NetStats;

use crate::network::pod::PodNetwork;
use crate::share::Share;
use crate::{CallError, ControlError, Sandbox, message};

/// Time from the start of a VM to the device by which it gives memory back.
const REPORTS_AFTER: Duration = Duration::from_secs(1);

impl Sandbox {
    /// Whether the vCPUs run.
    ///
    /// # Errors
    /// Each variant of [`ControlError`] but `Agent`.
    pub async fn vm_state(&self) -> Result<State, ControlError> {
        match self.vmm.ask(&Request::State, &[]).await? {
            Reply::State(state) => Ok(state),
            other => Err(unexpected(&other)),
        }
    }

    /// Stops every vCPU until [`Self::resume_vm`]; the agent does not answer meanwhile.
    ///
    /// # Errors
    /// As [`Self::vm_state`].
    pub async fn pause_vm(&self) -> Result<(), ControlError> {
        self.vmm.ask(&Request::Pause, &[]).await.map(drop)
    }

    /// Lets the vCPUs run again.
    ///
    /// # Errors
    /// As [`Self::vm_state`].
    pub async fn resume_vm(&self) -> Result<(), ControlError> {
        self.vmm.ask(&Request::Resume, &[]).await.map(drop)
    }

    /// Counters of the VMM.
    ///
    /// # Errors
    /// As [`Self::vm_state`].
    pub async fn vm_stats(&self) -> Result<Stats, ControlError> {
        match self.vmm.ask(&Request::Stats, &[]).await? {
            Reply::Stats(stats) => Ok(stats),
            other => Err(unexpected(&other)),
        }
    }

    /// Counters of each interface.
    ///
    /// # Errors
    /// As [`Self::vm_state`].
    pub async fn network_stats(&self) -> Result<Vec<NetStats>, ControlError> {
        let mut stats = match self.vmm.ask(&Request::NetStats, &[]).await? {
            Reply::NetStats(stats) => stats,
            other => return Err(unexpected(&other)),
        };
        let counters = self.network.lock().await.pod.as_ref().map(PodNetwork::counters).unwrap_or_default();
        if counters.is_empty() {
            return Ok(stats);
        }
        let fill = move || {
            counters.iter().for_each(|counters| counters.fill(&mut stats));
            stats
        };
        Ok(tokio::task::spawn_blocking(fill).await.expect("it does not panic"))
    }

    /// Has the guest say which of its pages are free, for the host to take them back: not before [`REPORTS_AFTER`], so that a start has a
    /// device fewer to look for, and a short container none. Returns when that is done, or the VM has ended.
    pub async fn report_free_pages(&self) {
        let report = async {
            tokio::time::sleep(REPORTS_AFTER).await;
            self.vmm.ask(&Request::ReportFreePages, &[]).await?;
            self.agent.find_devices().await.map_err(ControlError::Agent)
        };
        tokio::select! {
            biased;
            _ = self.ended() => {}
            reported = report => if let Err(error) = reported {
                tracing::warn!(error = &error as &dyn std::error::Error, "the VM keeps what its containers have freed");
            }
        }
    }

    /// Sets the guest's interfaces, routes, neighbours and resolver.
    ///
    /// # Errors
    /// What the agent says, or that it no longer answers.
    pub async fn set_network(&self, request: &message::SetNetworkRequest) -> Result<(), CallError> {
        self.agent.set_network(request).await
    }

    /// Sets the guest's clock to ours, after the VM was stopped for a while.
    ///
    /// # Errors
    /// As [`Self::set_network`].
    pub async fn sync_clock(&self) -> Result<(), CallError> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.agent.set_clock(i64::try_from(now.as_nanos()).unwrap_or(i64::MAX)).await
    }

    /// Brings every CPU and memory block online that the guest has; returns what is online then.
    ///
    /// # Errors
    /// As [`Self::set_network`].
    pub async fn online_resources(&self) -> Result<message::OnlineResourcesReply, CallError> {
        self.agent.online_resources().await
    }

    /// Shares another directory with the running VM; the guest mounts it below its folder of shares.
    ///
    /// # Errors
    /// Each variant of [`ControlError`]; the share is gone then.
    pub async fn add_share(&self, share: Share) -> Result<(), ControlError> {
        let of_guest = share.request();
        let Share { tag, root, cache, read_only, namespace } = share;
        let request = Request::AddShare { tag: tag.clone(), cache, read_only };
        self.vmm.ask(&request, &[root.as_fd()]).await?;
        if let Err(error) = self.agent.add_share(&of_guest).await {
            // What failed is the guest's answer; that the VMM gives the device up as well changes nothing about it.
            let _ = self.vmm.ask(&Request::RemoveShare { tag }, &[]).await;
            return Err(ControlError::Agent(error));
        }
        if let Some(namespace) = namespace {
            self.namespaces().insert(tag, namespace);
        }
        Ok(())
    }

    /// Makes a file system in the guest's memory, below its folder of shares; what is there already stays as it is. It lasts as
    /// long as the VM.
    ///
    /// # Errors
    /// As [`Self::set_network`].
    pub async fn add_memory_volume(&self, request: &message::MemoryVolumeRequest) -> Result<(), CallError> {
        self.agent.add_memory_volume(request).await
    }

    /// Makes a file system as [`Self::add_memory_volume`] does, if it is not there, and makes it hold what the request lists.
    ///
    /// # Errors
    /// As [`Self::set_network`].
    pub async fn write_volume(&self, request: &message::WriteVolumeRequest) -> Result<(), CallError> {
        self.agent.write_volume(request).await
    }

    /// Takes a share away: the guest unmounts it first.
    ///
    /// # Errors
    /// Each variant of [`ControlError`]; a guest that still uses the share keeps it.
    pub async fn remove_share(&self, tag: &str) -> Result<(), ControlError> {
        self.agent.remove_share(tag).await.map_err(ControlError::Agent)?;
        self.vmm.ask(&Request::RemoveShare { tag: tag.to_owned() }, &[]).await?;
        self.namespaces().remove(tag);
        Ok(())
    }

    fn namespaces(&self) -> MutexGuard<'_, HashMap<String, OwnedFd>> {
        self.namespaces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unexpected(reply: &Reply) -> ControlError {
    ControlError::Refused { message: format!("the VMM answered {reply:?}") }
}
