//! A pod without a VM: what is refused, and that nothing stays of what was refused.

use std::path::PathBuf;
use std::sync::Arc;

use super::Pod;
use crate::config::Config;
use crate::container::Container;
use crate::cri::Role;
use crate::error::TaskError;
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
        spec: oci_spec::runtime::Spec::default(),
        netns: None,
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
    let container = Container::new("a", PathBuf::from("/"), Role::Alone, Stdio::default(), tags);
    let creation = async {
        container.abandoned().await;
        container.set_gone();
    };
    tokio::join!(container.abandon(), creation);
}
