//! containerd's Sandbox service: the pod as a whole, when containerd is configured with `sandboxer = "shim"`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest, PlatformResponse,
    SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest, SandboxStatusResponse, ShutdownSandboxRequest,
    ShutdownSandboxResponse, StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
    WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::Sandbox;
use protobuf::Message as _;
use ttrpc::Result;
use ttrpc::asynchronous::TtrpcContext;

use crate::cri::Limits;
use crate::error::TaskError;
use crate::pod::{Pod, SandboxConfig};
use crate::proto::cri::{DNSConfig, LinuxPodSandboxConfig, NamespaceMode, PodSandboxConfig};
use crate::translate::HOST_NETWORK;
use crate::{metrics, translate};

/// The service of a pod.
pub(crate) struct SandboxService(pub(crate) Arc<Pod>);

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(&self, _: &TtrpcContext, request: CreateSandboxRequest) -> Result<CreateSandboxResponse> {
        self.0.create_sandbox(&request.sandbox_id, sandbox_config(&request)?)?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(&self, _: &TtrpcContext, request: StartSandboxRequest) -> Result<StartSandboxResponse> {
        let pod = self.0.clone();
        let started = tokio::spawn(async move { pod.start_sandbox(&request.sandbox_id).await });
        let vm = started.await.map_err(|error| TaskError::Invalid(error.to_string()))??;
        let created_at = translate::timestamp(vm.started_at);
        Ok(StartSandboxResponse { pid: vm.pid(), created_at, ..Default::default() })
    }

    async fn platform(&self, _: &TtrpcContext, request: PlatformRequest) -> Result<PlatformResponse> {
        self.0.sandbox(&request.sandbox_id)?;
        let mut response = PlatformResponse::new();
        let platform = response.platform.mut_or_insert_default();
        platform.os = "linux".to_owned();
        platform.architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }.to_owned();
        Ok(response)
    }

    async fn stop_sandbox(&self, _: &TtrpcContext, request: StopSandboxRequest) -> Result<StopSandboxResponse> {
        self.0.stop_sandbox(&request.sandbox_id).await?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(&self, _: &TtrpcContext, request: WaitSandboxRequest) -> Result<WaitSandboxResponse> {
        self.0.sandbox(&request.sandbox_id)?;
        let exit = self.0.vm_ended().await;
        let exited_at = translate::timestamp(exit.at);
        Ok(WaitSandboxResponse { exit_status: exit.code, exited_at, ..Default::default() })
    }

    async fn sandbox_status(&self, _: &TtrpcContext, request: SandboxStatusRequest) -> Result<SandboxStatusResponse> {
        self.0.sandbox(&request.sandbox_id)?;
        let mut response = SandboxStatusResponse { sandbox_id: request.sandbox_id, ..Default::default() };
        response.state = if self.0.vm().is_ok() { "SANDBOX_READY" } else { "SANDBOX_NOTREADY" }.to_owned();
        if let Some(vm) = self.0.any_vm() {
            response.pid = vm.pid();
            response.created_at = translate::timestamp(vm.started_at);
            response.info.insert("vcpus".to_owned(), vm.size.vcpus.to_string());
            response.info.insert("memory_mib".to_owned(), vm.size.memory_mib.to_string());
            response
                .info
                .insert("address".to_owned(), vm.address.clone().unwrap_or_else(|| "loopback only".to_owned()));
        }
        if let Some((exit, reason)) = self.0.vm_end() {
            response.exited_at = translate::timestamp(exit.at);
            response.info.insert("reason".to_owned(), reason);
        }
        Ok(response)
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> Result<PingResponse> {
        self.0.sandbox(&request.sandbox_id)?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(&self, _: &TtrpcContext, _: ShutdownSandboxRequest) -> Result<ShutdownSandboxResponse> {
        self.0.shutdown_sandbox().await;
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> Result<SandboxMetricsResponse> {
        self.0.sandbox(&request.sandbox_id)?;
        let mut response = SandboxMetricsResponse::new();
        let metric = response.metrics.mut_or_insert_default();
        metric.timestamp = translate::timestamp(std::time::SystemTime::now());
        metric.id = request.sandbox_id;
        metric.data = Some(metrics::any(&self.0.vm()?.metrics().await)?).into();
        Ok(response)
    }
}

fn sandbox_config(request: &CreateSandboxRequest) -> std::result::Result<SandboxConfig, TaskError> {
    let malformed =
        |error: protobuf::Error| TaskError::Invalid(format!("the pod's configuration is malformed: {error}"));
    let config = match request.options.as_ref() {
        Some(any) if any.type_url.ends_with("PodSandboxConfig") => {
            PodSandboxConfig::parse_from_bytes(&any.value).map_err(malformed)?
        }
        _ => PodSandboxConfig::new(),
    };
    let mut annotations = config.annotations.clone();
    annotations.extend(request.annotations.clone());
    let resources = config.linux.resources.clone().unwrap_or_default();
    let mut limits = Limits::new(resources.cpu_quota, resources.cpu_period, resources.memory_limit_in_bytes);
    if limits == Limits::default() {
        limits = Limits::of_pod(&annotations);
    }
    Ok(SandboxConfig {
        hostname: config.hostname,
        resolv_conf: resolv_conf(&config.dns_config.unwrap_or_default()),
        sysctls: config.linux.sysctls.clone(),
        annotations,
        limits,
        netns: netns(&request.netns_path, &config.linux)?,
        cgroups_path: cgroups_path(&config.linux.cgroup_parent, &request.sandbox_id),
    })
}

/// The pod's network namespace, if it has one of its own.
fn netns(path: &str, linux: &LinuxPodSandboxConfig) -> std::result::Result<Option<PathBuf>, TaskError> {
    if linux.security_context.namespace_options.network.enum_value() == Ok(NamespaceMode::NODE) {
        return Err(TaskError::Unsupported(HOST_NETWORK));
    }
    Ok(Some(PathBuf::from(path)).filter(|path| !path.as_os_str().is_empty()))
}

/// A cgroup below the pod's, in the form of the parent's: systemd's or the kernel's.
fn cgroups_path(parent: &str, id: &str) -> Option<PathBuf> {
    match parent.rsplit('/').next() {
        None | Some("") => None,
        Some(slice) if slice.ends_with(".slice") => Some(format!("{slice}:vmrun:{id}").into()),
        Some(_) => Some(Path::new(parent).join(id)),
    }
}

/// resolv.conf(5); nothing when the pod asks for nothing.
fn resolv_conf(dns: &DNSConfig) -> Option<String> {
    let mut lines: Vec<String> = Vec::new();
    if !dns.searches.is_empty() {
        lines.push(format!("search {}", dns.searches.join(" ")));
    }
    lines.extend(dns.servers.iter().map(|server| format!("nameserver {server}")));
    if !dns.options.is_empty() {
        lines.push(format!("options {}", dns.options.join(" ")));
    }
    let text: String = lines.into_iter().map(|line| line + "\n").collect();
    Some(text).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
    use protobuf::Message as _;
    use protobuf::well_known_types::any::Any;

    use super::sandbox_config;
    use crate::cri::Limits;
    use crate::error::TaskError;
    use crate::proto::cri::{NamespaceMode, PodSandboxConfig};

    fn request(config: &PodSandboxConfig) -> CreateSandboxRequest {
        let value = config.write_to_bytes().expect("encoded");
        let any = Any { type_url: "runtime.v1.PodSandboxConfig".to_owned(), value, ..Default::default() };
        CreateSandboxRequest { options: Some(any).into(), ..Default::default() }
    }

    #[test]
    fn the_network_of_the_host_is_refused_by_name() {
        let mut config = PodSandboxConfig::new();
        let security = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
        security.namespace_options.mut_or_insert_default().network = NamespaceMode::NODE.into();
        let refused = sandbox_config(&request(&config)).map(drop).expect_err("refused");
        assert!(matches!(refused, TaskError::Unsupported(what) if what.contains("hostNetwork")), "{refused}");
    }

    #[test]
    fn the_pods_configuration_is_read() {
        let mut config = PodSandboxConfig { hostname: "web".to_owned(), ..Default::default() };
        let dns = config.dns_config.mut_or_insert_default();
        (dns.servers, dns.searches) = (vec!["10.0.0.10".to_owned()], vec!["svc".to_owned(), "local".to_owned()]);
        dns.options = vec!["ndots:5".to_owned()];
        let linux = config.linux.mut_or_insert_default();
        linux.sysctls.insert("net.core.somaxconn".to_owned(), "64".to_owned());
        let resources = linux.resources.mut_or_insert_default();
        (resources.cpu_quota, resources.cpu_period, resources.memory_limit_in_bytes) = (50_000, 100_000, 1 << 28);
        let request = CreateSandboxRequest { netns_path: "/run/netns/a".to_owned(), ..request(&config) };
        let read = sandbox_config(&request).expect("read");
        assert_eq!(read.netns, Some("/run/netns/a".into()));
        assert_eq!((read.hostname.as_str(), read.limits), ("web", Limits { cpus: 0.5, memory_bytes: 1 << 28 }));
        assert_eq!(read.resolv_conf.as_deref(), Some("search svc local\nnameserver 10.0.0.10\noptions ndots:5\n"));
        assert_eq!(read.sysctls["net.core.somaxconn"], "64");
    }

    #[test]
    fn a_malformed_configuration_is_refused() {
        let any = Any { type_url: "runtime.v1.PodSandboxConfig".to_owned(), value: vec![0xff], ..Default::default() };
        let request = CreateSandboxRequest { options: Some(any).into(), ..Default::default() };
        sandbox_config(&request).map(drop).expect_err("refused");
    }
}
