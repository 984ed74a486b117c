//! What a pod uses of the host, as the shim tells containerd.

use containerd_client::services::v1::sandbox::ControllerMetricsRequest;
use containerd_client::services::v1::sandbox::controller_client::ControllerClient;
use containerd_client::services::v1::{MetricsRequest, tasks_client::TasksClient};
use containerd_client::types::Metric;
use containerd_client::with_namespace;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use protobuf::Message as _;
use tonic::Request;

use super::{Cri, Pod};

/// The CRI plugin's namespace of containerd.
const NAMESPACE: &str = "k8s.io";

impl Cri {
    /// Of the task that stands for the pod.
    ///
    /// # Panics
    /// When containerd does not tell it.
    pub async fn task_metrics(&self, pod: &Pod) -> Metrics {
        let request = MetricsRequest { filters: vec![format!("id=={}", pod.id)] };
        let answer = TasksClient::new(self.channel.clone()).metrics(with_namespace!(request, NAMESPACE)).await;
        decoded(answer.expect("metrics").into_inner().metrics.pop())
    }

    /// Of a pod of the shim's sandbox service.
    ///
    /// # Panics
    /// When containerd does not tell it.
    pub async fn sandbox_metrics(&self, pod: &Pod) -> Metrics {
        let request = ControllerMetricsRequest { sandbox_id: pod.id.clone(), sandboxer: "shim".to_owned() };
        let answer = ControllerClient::new(self.channel.clone()).metrics(with_namespace!(request, NAMESPACE)).await;
        decoded(answer.expect("metrics").into_inner().metrics)
    }
}

/// Whether that much memory was used as a guest's kernel alone takes, and time of a CPU.
#[must_use]
pub fn holds_a_guest(metrics: &Metrics) -> bool {
    metrics.memory.usage > 16 << 20 && metrics.cpu.usage_usec > 0
}

fn decoded(metric: Option<Metric>) -> Metrics {
    let data = metric.and_then(|metric| metric.data).expect("metrics of the pod");
    Metrics::parse_from_bytes(&data.value).expect("metrics of cgroup v2")
}
