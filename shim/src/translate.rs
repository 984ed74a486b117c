//! From containerd's messages to what we do, and back: the only place that knows both.

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use containerd_shim_protos::api::{CreateTaskRequest, ExecProcessRequest, Mount, StateResponse, Status};
use oci_spec::runtime::{
    LinuxNamespace, LinuxNamespaceType, LinuxResources, LinuxThrottleDevice, Process as ProcessSpec, Spec,
};
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use sandbox::io_limit::{Disk, IoKind, IoLimit};
use sandbox::share::HostMount;

use crate::container::Container;
use crate::cri::{self, Role};
use crate::error::TaskError;
use crate::hooks::Hooks;
use crate::process::{Phase, Process};
use crate::stdio::Stdio;

/// What a VM cannot have.
pub(crate) const HOST_NETWORK: &str = "the host's network (hostNetwork) in a VM";
/// What a VM cannot tell apart.
const THROTTLE_IN_POD: &str =
    "linux.resources.blockIO.throttle... of a container in a pod, whose I/O the host sees as the pod's";

/// A container that containerd asks for.
#[derive(Clone, Debug)]
pub(crate) struct CreateContainer {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) role: Role,
    pub(crate) stdio: Stdio,
    /// What its root is mounted from; nothing when `bundle` has it already.
    pub(crate) rootfs: Vec<HostMount>,
    pub(crate) spec: Spec,
    /// Programs of the host, which are not in `spec` any more.
    pub(crate) hooks: Hooks,
    /// The network namespace that was made for it, as CNI does for a pod.
    pub(crate) netns: Option<PathBuf>,
    /// Of the VM, which are not in `spec` any more.
    pub(crate) io_limits: Vec<IoLimit>,
}

impl CreateContainer {
    /// Annotations of the spec.
    pub(crate) fn annotations(&self) -> HashMap<String, String> {
        self.spec.annotations().clone().unwrap_or_default()
    }
}

/// A container from its request and the spec in its folder.
pub(crate) fn create_container(request: &CreateTaskRequest, mut spec: Spec) -> Result<CreateContainer, TaskError> {
    if !request.checkpoint.is_empty() {
        return Err(TaskError::Unsupported("a container from a checkpoint"));
    }
    let annotations = spec.annotations().clone().unwrap_or_default();
    let mut role = cri::role(&annotations);
    if role == Role::Member && cri::sandbox_id(&annotations).is_none() {
        role = Role::Alone;
    }
    let netns = netns(&spec)?;
    let resources = spec.linux_mut().as_mut().and_then(|linux| linux.resources_mut().as_mut());
    let io_limits = resources.map_or(Ok(Vec::new()), |resources| take_io_limits(resources, role))?;
    let hooks = Hooks::take(&mut spec, &request.id, Path::new(&request.bundle));
    Ok(CreateContainer {
        id: request.id.clone(),
        bundle: PathBuf::from(&request.bundle),
        role,
        stdio: Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        },
        rootfs: request.rootfs.iter().map(host_mount).collect(),
        netns,
        io_limits,
        hooks,
        spec: guest_spec(spec, request.terminal, role),
    })
}

/// The network namespace of a spec, if somebody has made it. A spec without one wants the host's.
fn netns(spec: &Spec) -> Result<Option<PathBuf>, TaskError> {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().clone()).unwrap_or_default();
    let found = namespaces.iter().find(|namespace| namespace.typ() == LinuxNamespaceType::Network);
    found.map(|namespace| namespace.path().clone()).ok_or(TaskError::Unsupported(HOST_NETWORK))
}

/// Takes limits on disks of the host, which the guest does not have, out of a container's resources. They bound the VM, so only a
/// container that is alone in one can have them.
pub(crate) fn take_io_limits(resources: &mut LinuxResources, role: Role) -> Result<Vec<IoLimit>, TaskError> {
    let Some(io) = resources.block_io_mut() else { return Ok(Vec::new()) };
    let throttles = [
        (IoKind::ReadBps, io.throttle_read_bps_device().clone()),
        (IoKind::WriteBps, io.throttle_write_bps_device().clone()),
        (IoKind::ReadIops, io.throttle_read_iops_device().clone()),
        (IoKind::WriteIops, io.throttle_write_iops_device().clone()),
    ];
    io.set_throttle_read_bps_device(None).set_throttle_write_bps_device(None);
    io.set_throttle_read_iops_device(None).set_throttle_write_iops_device(None);
    let mut limits = Vec::new();
    for (kind, throttles) in throttles {
        for throttle in throttles.into_iter().flatten() {
            if role != Role::Alone {
                return Err(TaskError::Unsupported(THROTTLE_IN_POD));
            }
            limits.push(io_limit(kind, throttle)?);
        }
    }
    Ok(limits)
}

fn io_limit(kind: IoKind, throttle: LinuxThrottleDevice) -> Result<IoLimit, TaskError> {
    let number = |number: i64| u32::try_from(number).ok();
    let numbers = number(throttle.major()).zip(number(throttle.minor())).zip(NonZeroU64::new(throttle.rate()));
    let Some(((major, minor), rate)) = numbers else {
        return Err(TaskError::Invalid(format!("linux.resources.blockIO has {throttle:?}")));
    };
    Ok(IoLimit { disk: Disk::of(major, minor)?, kind, rate })
}

fn host_mount(mount: &Mount) -> HostMount {
    HostMount {
        fstype: mount.type_.clone(),
        source: mount.source.clone(),
        target: mount.target.clone(),
        options: mount.options.clone(),
    }
}

/// The spec without what names the host: its namespaces, its security modules. The guest's kernel is the pod's own, and so
/// are the namespaces that the host's spec shares with a pod.
fn guest_spec(mut spec: Spec, terminal: bool, role: Role) -> Spec {
    let mut kept = Vec::new();
    if let Some(linux) = spec.linux_mut() {
        let listed = linux.namespaces().clone().unwrap_or_default();
        let namespaces: Vec<LinuxNamespace> = listed.into_iter().filter(|namespace| is_own(namespace, role)).collect();
        kept = namespaces.iter().map(LinuxNamespace::typ).collect();
        linux.set_namespaces(Some(namespaces)).set_mount_label(None);
    }
    if !kept.contains(&LinuxNamespaceType::Uts) {
        spec.set_hostname(None).set_domainname(None);
    }
    if let Some(process) = spec.process_mut() {
        process.set_terminal(Some(terminal)).set_selinux_label(None).set_apparmor_profile(None);
    }
    spec
}

/// The guest's network is the container's or pod's; what has a path is shared with the pod, which is the guest.
fn is_own(namespace: &LinuxNamespace, role: Role) -> bool {
    match namespace.typ() {
        LinuxNamespaceType::Network => false,
        LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts if role == Role::Member => false,
        _ => namespace.path().is_none(),
    }
}

/// An exec that containerd asks for.
pub(crate) fn exec_process(request: &ExecProcessRequest) -> Result<(Stdio, ProcessSpec), TaskError> {
    let mut spec: ProcessSpec = json(&request.spec, "the process")?;
    spec.set_terminal(Some(request.terminal)).set_selinux_label(None).set_apparmor_profile(None);
    let stdio = Stdio {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
    };
    Ok((stdio, spec))
}

/// Limits of an update. The CRI plugin of containerd sends all of the container's resources; the device rules among them are those that
/// the container was made with, and are left out.
pub(crate) fn resources(any: &protobuf::MessageField<Any>) -> Result<LinuxResources, TaskError> {
    let mut resources: LinuxResources = json(any, "the resources")?;
    resources.set_devices(None);
    Ok(resources)
}

fn json<T: serde::de::DeserializeOwned>(any: &protobuf::MessageField<Any>, what: &str) -> Result<T, TaskError> {
    let any = any.as_ref().ok_or_else(|| TaskError::Invalid(format!("{what} is missing")))?;
    serde_json::from_slice(&any.value).map_err(|error| TaskError::Invalid(format!("{what} is malformed: {error}")))
}

/// Reads the spec in a container's folder.
pub(crate) fn read_spec(bundle: &Path) -> Result<Spec, TaskError> {
    let path = bundle.join("config.json");
    let text = std::fs::read(&path).map_err(TaskError::host(format!("read {}", path.display())))?;
    serde_json::from_slice(&text)
        .map_err(|error| TaskError::Invalid(format!("{} is not a spec: {error}", path.display())))
}

/// What a process is doing, as containerd names it.
pub(crate) fn status(container: &Container, process: &Process) -> Status {
    match process.phase() {
        Phase::Creating | Phase::Created => Status::CREATED,
        Phase::Starting | Phase::Running if container.is_paused() => Status::PAUSED,
        Phase::Starting => Status::CREATED,
        Phase::Running => Status::RUNNING,
        Phase::Exited => Status::STOPPED,
    }
}

/// The answer to State.
pub(crate) fn state(container: &Container, process: &Process) -> StateResponse {
    let mut state = StateResponse {
        id: container.id.clone(),
        exec_id: process.id.exec_id.clone(),
        bundle: container.bundle.display().to_string(),
        pid: process.pid(),
        status: status(container, process).into(),
        stdin: process.stdio.stdin.clone(),
        stdout: process.stdio.stdout.clone(),
        stderr: process.stdio.stderr.clone(),
        terminal: process.stdio.terminal,
        ..Default::default()
    };
    if let Some(exit) = process.exit() {
        state.exit_status = exit.code;
        state.exited_at = timestamp(exit.at);
    }
    state
}

/// A time as protobuf has it.
pub(crate) fn timestamp(time: SystemTime) -> protobuf::MessageField<Timestamp> {
    Some(Timestamp::from(time)).into()
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::api::{CreateTaskRequest, ExecProcessRequest};
    use oci_spec::runtime::{LinuxBlockIo, Spec};
    use protobuf::well_known_types::any::Any;
    use serde_json::json;

    use super::{CreateContainer, create_container, exec_process, resources, take_io_limits};
    use crate::cri::Role;
    use crate::error::TaskError;

    fn create(annotations: serde_json::Value) -> Result<CreateContainer, TaskError> {
        let spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.1.0",
            "hostname": "web",
            "root": { "path": "rootfs" },
            "process": {
                "user": { "uid": 0, "gid": 0 }, "args": ["sh"], "cwd": "/",
                "apparmorProfile": "cri-containerd.apparmor.d", "selinuxLabel": "system_u:system_r:container_t"
            },
            "annotations": annotations,
            "linux": {
                "mountLabel": "system_u:object_r:container_file_t",
                "namespaces": [
                    { "type": "pid" }, { "type": "ipc", "path": "/proc/77/ns/ipc" },
                    { "type": "uts", "path": "/proc/77/ns/uts" }, { "type": "mount" },
                    { "type": "network", "path": "/var/run/netns/cni-1" }
                ]
            }
        }))
        .expect("a spec");
        let request = CreateTaskRequest { id: "a".to_owned(), terminal: true, ..Default::default() };
        create_container(&request, spec)
    }

    fn namespaces(container: &CreateContainer) -> Vec<String> {
        let linux = container.spec.linux().clone().expect("linux");
        linux.namespaces().iter().flatten().map(|namespace| namespace.typ().to_string()).collect()
    }

    #[test]
    fn namespaces_and_labels_of_the_host_stay_there() {
        let member = json!({
            "io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "pod"
        });
        let container = create(member).expect("translated");
        assert_eq!(container.role, Role::Member);
        assert_eq!(namespaces(&container), ["pid", "mnt"]);
        assert_eq!(container.spec.hostname(), &None);
        let process = container.spec.process().clone().expect("a process");
        assert_eq!((process.selinux_label(), process.apparmor_profile()), (&None, &None));
        assert_eq!(process.terminal(), Some(true));
        assert_eq!(container.spec.linux().clone().expect("linux").mount_label(), &None);
    }

    #[test]
    fn the_network_is_the_namespace_that_was_made_and_never_the_host_s() {
        let pod = json!({ "io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "a" });
        assert_eq!(create(pod).expect("translated").netns, Some("/var/run/netns/cni-1".into()));
        let with = |namespaces| {
            let linux = json!({ "ociVersion": "1.1.0", "linux": { "namespaces": namespaces } });
            create_container(&CreateTaskRequest::default(), serde_json::from_value(linux).expect("a spec"))
        };
        assert_eq!(with(json!([{ "type": "network" }])).expect("translated").netns, None);
        let refused = with(json!([{ "type": "pid" }])).expect_err("the host's");
        assert!(matches!(refused, TaskError::Unsupported(what) if what.contains("hostNetwork")), "{refused}");
    }

    #[test]
    fn a_checkpoint_is_refused_by_name() {
        let request = CreateTaskRequest { checkpoint: "/c".to_owned(), ..Default::default() };
        let error = create_container(&request, Spec::default()).expect_err("refused");
        assert_eq!(error.to_string(), "a container from a checkpoint is not supported");
    }

    #[test]
    fn limits_of_io_are_the_vm_s_and_never_the_guest_s() {
        let take = |io: serde_json::Value, role| {
            let mut resources = serde_json::from_value(json!({ "blockIO": io })).expect("resources");
            take_io_limits(&mut resources, role).map(|limits| (limits.len(), resources))
        };
        let (count, kept) = take(json!({ "weight": 100 }), Role::Member).expect("weights are for the guest");
        assert_eq!((count, kept.block_io().clone().expect("kept").weight()), (0, Some(100)));
        let write = |major, rate| json!({ "throttleWriteBpsDevice": [{ "major": major, "minor": 0, "rate": rate }] });
        let refused = |io, role| take(io, role).expect_err("refused").to_string();
        assert!(refused(write(8, 1), Role::Member).contains("throttle... of a container in a pod"));
        assert!(refused(write(8, 0), Role::Alone).contains("rate: 0"));
        // No driver has this number.
        assert_eq!(refused(write(4095, 1), Role::Alone), "the host has no block device 4095:0");
        let cleared = json!({ "throttleWriteBpsDevice": [], "throttleReadIOPSDevice": [] });
        let (_, kept) = take(cleared, Role::Alone).expect("taken");
        assert_eq!(kept.block_io().clone().expect("kept"), LinuxBlockIo::default());
    }

    #[test]
    fn an_exec_needs_a_process() {
        let mut request = ExecProcessRequest::new();
        exec_process(&request).expect_err("missing");
        let value = br#"{"user":{"uid":1,"gid":1},"args":["ls"],"cwd":"/"}"#.to_vec();
        request.spec = Some(Any { value, ..Default::default() }).into();
        let (_, process) = exec_process(&request).expect("translated");
        assert_eq!(process.args().as_deref(), Some(&["ls".to_owned()][..]));
        request.spec = Some(Any { value: b"{".to_vec(), ..Default::default() }).into();
        exec_process(&request).expect_err("malformed");
    }

    #[test]
    fn an_update_has_the_limits_and_not_the_device_rules() {
        let sent = json!({ "devices": [{ "allow": false, "access": "rwm" }], "memory": { "limit": 1000 } });
        let any = Any { value: sent.to_string().into_bytes(), ..Default::default() };
        let kept = resources(&Some(any).into()).expect("resources");
        assert_eq!(kept.devices(), &None);
        assert_eq!(kept.memory().and_then(|memory| memory.limit()), Some(1000));
    }
}
