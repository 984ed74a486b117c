//! A pod without a VM: what is refused, and that nothing stays of what was refused.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::runtime::Spec;
use serde_json::json;

use super::{Pod, SandboxConfig};
use crate::config::Config;
use crate::container::Container;
use crate::cri::Role;
use crate::error::TaskError;
use crate::hooks::Hooks;
use crate::stdio::Stdio;
use crate::translate::CreateContainer;

fn pod() -> Arc<Pod> {
    Arc::new(Pod::new("pod".to_owned(), "default".to_owned(), PathBuf::from("/"), Config::default()))
}

fn member() -> CreateContainer {
    CreateContainer {
        id: "a".to_owned(),
        bundle: PathBuf::from("/"),
        role: Role::Member,
        stdio: Stdio::default(),
        rootfs: Vec::new(),
        spec: Spec::default(),
        netns: None,
        io_limits: Vec::new(),
        hooks: Hooks::default(),
    }
}

#[tokio::test]
async fn a_member_of_a_pod_without_a_vm_is_refused_and_forgotten() {
    let pod = pod();
    let error = pod.create(member(), Vec::new()).await.expect_err("no VM");
    assert!(matches!(error, TaskError::NoVm { .. }), "{error}");
    assert!(matches!(pod.container("a").map(drop), Err(TaskError::NotFound { .. })));
    assert_eq!(pod.events.topics(), Vec::<String>::new());
}

#[tokio::test]
async fn hooks_of_the_host_are_refused_unless_they_are_allowed() {
    let mut spec =
        serde_json::from_value(json!({ "hooks": { "poststop": [{ "path": "/bin/true" }] } })).expect("a spec");
    let request = CreateContainer { hooks: Hooks::take(&mut spec, "a", Path::new("/")), ..member() };
    let error = pod().create(request, Vec::new()).await.expect_err("refused");
    assert!(matches!(error, TaskError::HooksForbidden), "{error}");
}

#[tokio::test]
async fn the_server_goes_on_while_somebody_has_a_container() {
    let pod = pod();
    pod.reserve(&member()).map(drop).expect("the id is free");
    assert!(matches!(pod.reserve(&member()).map(drop), Err(TaskError::Exists { .. })));
    pod.shut_down_if_unused();
    tokio::select! {
        biased;
        () = pod.shutdown.notified() => panic!("a container is there"),
        () = std::future::ready(()) => {}
    }
    pod.containers().clear();
    pod.shut_down_if_unused();
    pod.shutdown.notified().await;
}

#[tokio::test]
async fn a_creation_that_is_given_up_is_over_when_nothing_is_left() {
    let tags = sandbox::plan::ShareTags::only();
    let container = Container::new(&member(), tags);
    let creation = async {
        container.abandoned().await;
        container.set_gone();
    };
    tokio::join!(container.abandon(), creation);
}

/// As the CRI plugin makes it for a pod whose files it has not written: folders, in place of files that are missing.
#[tokio::test]
async fn a_folder_that_stands_for_a_file_of_the_pod_is_replaced() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (folder, kept) = (dir.path().join("hosts-of-nobody"), dir.path().join("hosts-of-kubelet"));
    fs::create_dir(&folder).expect("a folder");
    fs::write(&kept, "192.0.2.1 kubelet\n").expect("a file");
    let pod = Pod::new("pod".to_owned(), "default".to_owned(), dir.path().to_owned(), Config::default());
    let config =
        SandboxConfig { hostname: "web".to_owned(), resolv_conf: Some("x\n".to_owned()), ..Default::default() };
    pod.create_sandbox("pod", config).expect("created");
    let sources = |source: &Path| {
        let mount = json!({ "destination": "/etc/hosts", "type": "bind", "source": source });
        let mut spec: Spec =
            serde_json::from_value(json!({ "ociVersion": "1.1.0", "mounts": [mount] })).expect("a spec");
        pod.apply_sandbox(&mut spec, Role::Member).expect("applied");
        let mounts = spec.mounts().clone().unwrap_or_default();
        mounts.iter().map(|mount| mount.source().clone().unwrap_or_default()).collect::<Vec<_>>()
    };
    let own = |name: &str| dir.path().join(name);
    assert_eq!(sources(&folder), [own("hosts"), own("hostname"), own("resolv.conf")]);
    assert!(fs::read_to_string(own("hosts")).expect("written").contains("127.0.1.1\tweb\n"));
    assert_eq!(sources(&kept)[0], kept);
}
