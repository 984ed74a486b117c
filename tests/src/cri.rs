//! The kubelet's side of the CRI: a client of containerd's CRI plugin, and pods as the kubelet describes them.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    ContainerConfig, ContainerMetadata, ContainerStatus, ContainerStatusRequest, CreateContainerRequest, DnsConfig,
    ExecSyncRequest, ImageSpec, LinuxContainerConfig, LinuxContainerResources, LinuxContainerSecurityContext,
    LinuxPodSandboxConfig, LinuxSandboxSecurityContext, ListPodSandboxRequest, Mount, NamespaceMode, NamespaceOption,
    PodSandboxConfig, PodSandboxMetadata, PodSandboxStatus, PodSandboxStatusRequest, RemoveContainerRequest,
    RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest, StatusRequest, StopContainerRequest,
    StopPodSandboxRequest, UpdateContainerResourcesRequest,
};
use tonic::transport::Channel;
use tonic::{IntoRequest, Request, Status};

use crate::becomes_true;
use crate::containerd::{BUSYBOX, Containerd};

mod channels;
mod usage;

pub use channels::Channels;
pub use usage::holds_a_guest;

/// Longest wait for an answer: VMs start on an emulated host.
const DEADLINE: Duration = Duration::from_secs(240);

/// Sandbox or container states of the CRI: CONTAINER_EXITED.
pub const CONTAINER_EXITED: i32 = 2;
/// CONTAINER_RUNNING.
pub const CONTAINER_RUNNING: i32 = 1;
/// SANDBOX_READY.
pub const SANDBOX_READY: i32 = 0;
/// SANDBOX_NOTREADY.
pub const SANDBOX_NOTREADY: i32 = 1;

/// A script that says that it runs, and does until it is told to end.
pub const WAIT: &str = "echo up; trap 'exit 0' TERM; while true; do sleep 0.2; done";

/// The handler of the stories' runtime.
#[must_use]
pub fn handler() -> &'static str {
    if Containerd::runtime() == "io.containerd.runc.v2" { "runc" } else { "vm" }
}

/// A connection to the CRI plugin; clones share it.
#[derive(Clone)]
pub struct Cri {
    channel: Channel,
    runtime: RuntimeServiceClient<Channel>,
    dir: PathBuf,
    cgroup_parent: String,
}

impl Cri {
    /// Connects.
    ///
    /// # Panics
    /// When the plugin does not answer.
    pub async fn connect(containerd: &Containerd) -> Self {
        let channel = containerd_client::connect(containerd.socket()).await.expect("containerd listens");
        let mut runtime = RuntimeServiceClient::new(channel.clone());
        // For a moment after its start the plugin refuses everything; the kubelet asks again as well.
        let initialized = async {
            while let Err(status) = runtime.status(limited(StatusRequest::default())).await {
                assert!(status.message().contains("not initialized"), "{status}");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        tokio::time::timeout(DEADLINE, initialized).await.expect("the plugin is initialized");
        let cgroup_parent = format!("/{}", containerd.namespace());
        Self { channel, runtime, dir: containerd.path("logs"), cgroup_parent }
    }

    /// Runs a pod's sandbox; returns the pod.
    ///
    /// # Errors
    /// What the plugin says.
    pub async fn run_pod(&mut self, config: PodSandboxConfig, handler: &str) -> Result<Pod, Status> {
        fs::create_dir_all(&config.log_directory).expect("a folder for logs");
        let request = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.to_owned() };
        let id = self.runtime.run_pod_sandbox(limited(request)).await?.into_inner().pod_sandbox_id;
        Ok(Pod { id, config })
    }

    /// The configuration of a pod, as the kubelet writes it.
    #[must_use]
    pub fn pod_config(&self, name: &str) -> PodSandboxConfig {
        let metadata = PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            namespace: "default".to_owned(),
            attempt: 0,
        };
        let namespaces = NamespaceOption {
            network: NamespaceMode::Pod.into(),
            pid: NamespaceMode::Container.into(),
            ..Default::default()
        };
        let security = LinuxSandboxSecurityContext { namespace_options: Some(namespaces), ..Default::default() };
        PodSandboxConfig {
            metadata: Some(metadata),
            hostname: name.to_owned(),
            log_directory: self.dir.join(name).display().to_string(),
            dns_config: Some(DnsConfig {
                servers: vec!["192.0.2.53".to_owned()],
                searches: vec!["story.example.org".to_owned()],
                options: vec!["ndots:5".to_owned()],
            }),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: self.cgroup_parent.clone(),
                security_context: Some(security),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// Makes and starts a container; returns its id.
    ///
    /// # Errors
    /// What the plugin says.
    pub async fn start(&mut self, pod: &Pod, config: ContainerConfig) -> Result<String, Status> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        let container_id = self.runtime.create_container(limited(request)).await?.into_inner().container_id;
        self.runtime.start_container(limited(StartContainerRequest { container_id: container_id.clone() })).await?;
        Ok(container_id)
    }

    /// Runs a command in a container: exit status, standard output, standard error.
    ///
    /// # Errors
    /// What the plugin says.
    pub async fn exec(&mut self, container: &str, command: &[&str]) -> Result<(i32, String, String), Status> {
        let cmd = command.iter().map(|word| (*word).to_owned()).collect();
        let request = ExecSyncRequest { container_id: container.to_owned(), cmd, timeout: 120 };
        let done = self.runtime.exec_sync(limited(request)).await?.into_inner();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok((done.exit_code, text(&done.stdout), text(&done.stderr)))
    }

    /// What a shell script prints in a container.
    ///
    /// # Panics
    /// When it fails.
    pub async fn shell(&mut self, container: &str, script: &str) -> String {
        let (exit_code, stdout, stderr) = self.exec(container, &["sh", "-c", script]).await.expect("executed");
        assert_eq!(exit_code, 0, "{script}: {stdout}{stderr}");
        stdout
    }

    /// The status of a container.
    ///
    /// # Panics
    /// When there is none.
    pub async fn status(&mut self, container: &str) -> ContainerStatus {
        let request = ContainerStatusRequest { container_id: container.to_owned(), verbose: false };
        let answer = self.runtime.container_status(limited(request)).await.expect("a status");
        answer.into_inner().status.expect("a status")
    }

    /// The status of a pod.
    ///
    /// # Panics
    /// When there is none.
    pub async fn pod_status(&mut self, pod: &Pod) -> PodSandboxStatus {
        let request = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: false };
        let answer = self.runtime.pod_sandbox_status(limited(request)).await.expect("a status");
        answer.into_inner().status.expect("a status")
    }

    /// Waits until a pod is not ready, as the kubelet finds one that ended by itself.
    ///
    /// # Panics
    /// When it is ready for too long.
    pub async fn until_not_ready(&mut self, pod: &Pod) {
        for _ in 0..100 {
            if self.pod_status(pod).await.state == SANDBOX_NOTREADY {
                return;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        panic!("{} is still ready", pod.id);
    }

    /// What the runtime tells of a pod's sandbox, name by name.
    ///
    /// # Panics
    /// When there is none.
    pub async fn pod_info(&mut self, pod: &Pod) -> HashMap<String, String> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: true };
        self.runtime.pod_sandbox_status(limited(request)).await.expect("a status").into_inner().info
    }

    /// Waits until a container has exited; returns its status.
    ///
    /// # Panics
    /// When it does not in time.
    pub async fn until_exited(&mut self, container: &str) -> ContainerStatus {
        for _ in 0..600 {
            let status = self.status(container).await;
            if status.state == CONTAINER_EXITED {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        panic!("{container} does not exit: {:?}", self.status(container).await);
    }

    /// Changes the limits of a container.
    ///
    /// # Errors
    /// What the plugin says.
    pub async fn update(&mut self, container: &str, linux: LinuxContainerResources) -> Result<(), Status> {
        let request = UpdateContainerResourcesRequest {
            container_id: container.to_owned(),
            linux: Some(linux),
            ..Default::default()
        };
        self.runtime.update_container_resources(limited(request)).await.map(drop)
    }

    /// Stops a container with SIGKILL and removes it.
    ///
    /// # Errors
    /// What the plugin says.
    pub async fn remove(&mut self, container: &str) -> Result<(), Status> {
        let container_id = container.to_owned();
        self.runtime
            .stop_container(limited(StopContainerRequest { container_id: container_id.clone(), timeout: 0 }))
            .await?;
        self.runtime.remove_container(limited(RemoveContainerRequest { container_id })).await.map(drop)
    }

    /// Stops and removes a pod with its containers.
    ///
    /// # Errors
    /// What the plugin says.
    pub async fn remove_pod(&mut self, pod: &Pod) -> Result<(), Status> {
        let pod_sandbox_id = pod.id.clone();
        self.runtime
            .stop_pod_sandbox(limited(StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() }))
            .await?;
        self.runtime.remove_pod_sandbox(limited(RemovePodSandboxRequest { pod_sandbox_id })).await.map(drop)
    }

    /// How many pods there are.
    ///
    /// # Errors
    /// What the plugin says.
    pub async fn pod_count(&mut self) -> Result<usize, Status> {
        Ok(self.runtime.list_pod_sandbox(limited(ListPodSandboxRequest::default())).await?.into_inner().items.len())
    }
}

fn limited<T>(message: T) -> Request<T> {
    let mut request = message.into_request();
    request.set_timeout(DEADLINE);
    request
}

/// A pod that runs.
pub struct Pod {
    /// Its id.
    pub id: String,
    /// Its configuration.
    pub config: PodSandboxConfig,
}

impl Pod {
    /// What a container of this pod logged so far: the kubelet's format without its first three columns.
    #[must_use]
    pub fn log(&self, container: &str) -> String {
        let path = Path::new(&self.config.log_directory).join(format!("{container}.log"));
        let text = fs::read_to_string(path).unwrap_or_default();
        // `TIME STREAM TAG CONTENT` (kubernetes, CRI logging).
        text.lines().filter_map(|line| line.splitn(4, ' ').nth(3)).fold(String::new(), |all, line| all + line + "\n")
    }

    /// Waits until a container's log has a text.
    ///
    /// # Panics
    /// When it does not come.
    pub fn log_shows(&self, container: &str, text: &str) {
        let shown = becomes_true(Duration::from_secs(60), || self.log(container).contains(text));
        assert!(shown, "the log of {container} has no {text:?}: {:?}", self.log(container));
    }
}

/// A container of busybox that runs a shell script.
#[must_use]
pub fn container(name: &str, script: &str) -> ContainerConfig {
    let namespaces = NamespaceOption {
        network: NamespaceMode::Pod.into(),
        pid: NamespaceMode::Container.into(),
        ..Default::default()
    };
    let security = LinuxContainerSecurityContext { namespace_options: Some(namespaces), ..Default::default() };
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(ImageSpec { image: BUSYBOX.to_owned(), ..Default::default() }),
        command: vec!["sh".to_owned(), "-c".to_owned(), script.to_owned()],
        log_path: format!("{name}.log"),
        linux: Some(LinuxContainerConfig {
            resources: Some(LinuxContainerResources::default()),
            security_context: Some(security),
        }),
        ..Default::default()
    }
}

/// A mount of a host path.
#[must_use]
pub fn mount(host_path: &Path, container_path: &str, readonly: bool) -> Mount {
    Mount {
        host_path: host_path.display().to_string(),
        container_path: container_path.to_owned(),
        readonly,
        ..Default::default()
    }
}

/// A volume as the kubelet writes ConfigMaps and Secrets: names are links to `..data`, a link to a folder of a generation.
pub struct ConfigVolume {
    dir: PathBuf,
    generation: u32,
}

impl ConfigVolume {
    /// Makes one with a file.
    ///
    /// # Panics
    /// When the disk says no.
    #[must_use]
    pub fn create(dir: PathBuf, file: &str, text: &str) -> Self {
        fs::create_dir_all(&dir).expect("a folder");
        symlink(Path::new("..data").join(file), dir.join(file)).expect("a link");
        let mut volume = Self { dir, generation: 0 };
        volume.update(file, text);
        volume
    }

    /// Replaces what is in it at once, as the kubelet's atomic writer does.
    ///
    /// # Panics
    /// When the disk says no.
    pub fn update(&mut self, file: &str, text: &str) {
        let old = format!("..generation-{}", self.generation);
        self.generation += 1;
        let new = format!("..generation-{}", self.generation);
        fs::create_dir(self.dir.join(&new)).expect("a folder");
        fs::write(self.dir.join(&new).join(file), text).expect("a file");
        symlink(&new, self.dir.join("..data_tmp")).expect("a link");
        fs::rename(self.dir.join("..data_tmp"), self.dir.join("..data")).expect("renamed");
        let _ = fs::remove_dir_all(self.dir.join(old));
    }

    /// Its folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.dir
    }
}
