//! What comes into a running VM and leaves it again, and the VM's own controls, through the host library.

use std::fs::{self, File};

use sandbox::share::{Rootfs, Share, rootfs_tree};
use sandbox::{CachePolicy, VmState};
use serde_json::{Value, json};
use tests::Story;
use tests::pod::Pod;

fn volume(story: &Story, cache: CachePolicy) -> Share {
    let directory = Rootfs::Directory { path: story.volume(), read_only: false };
    Share::of_tree("extra", rootfs_tree(directory, &story.scratch()).expect("the volume is shared"), cache)
}

/// Puts the share into a container.
fn mount_share(spec: &mut Value) {
    let mount = json!({ "destination": "/mnt", "type": "bind", "source": "/run/share/extra", "options": ["bind"] });
    spec["mounts"].as_array_mut().expect("mounts").push(mount);
}

#[tokio::test(flavor = "current_thread")]
async fn a_share_is_plugged_in_used_pulled_out_and_plugged_in_again() {
    let story = Story::new();
    fs::write(story.volume().join("a"), "plugged\n").expect("a file");
    let pod = Pod::boot(&story).await;
    pod.0.add_share(volume(&story, CachePolicy::Auto)).await.expect("plugged in");
    let first = pod.run("first", "cat /mnt/a; echo one > /mnt/b", mount_share).await;
    assert_eq!(first, (0, "plugged\n".to_owned()));
    assert_eq!(fs::read_to_string(story.volume().join("b")).expect("written by the guest"), "one\n");
    let twice = pod.0.add_share(volume(&story, CachePolicy::Auto)).await.expect_err("the tag is taken");
    assert!(twice.to_string().contains("already"), "{twice}");
    pod.0.remove_share("extra").await.expect("pulled out");
    pod.0.remove_share("extra").await.expect_err("gone");
    let attached = File::open(story.volume()).expect("a folder").into();
    let attached = Share::of_tree("extra", attached, CachePolicy::Auto);
    let refused = pod.0.add_share(attached).await.expect_err("its parent is the host's");
    assert!(refused.to_string().contains("has a parent"), "{refused}");
    pod.0.add_share(volume(&story, CachePolicy::Never)).await.expect("plugged in again");
    let second = pod.run("second", "cat /mnt/b; ls /sys/bus/pci/devices | wc -l", mount_share).await;
    assert_eq!(second, (0, "one\n3\n".to_owned()));
    pod.0.stop().await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_vm_is_paused_resumed_and_counted_while_its_containers_live() {
    let story = Story::new();
    let pod = Pod::boot(&story).await;
    assert_eq!(pod.0.vm_state().await.expect("answered"), VmState::Running);
    pod.0.pause_vm().await.expect("paused");
    assert_eq!(pod.0.vm_state().await.expect("answered"), VmState::Paused);
    let paused = pod.0.vm_stats().await.expect("answered");
    assert_eq!(pod.0.vm_stats().await.expect("answered"), paused);
    assert!(paused.mmio_exits > 0 && paused.port_exits > 0, "{paused:?}");
    pod.0.resume_vm().await.expect("resumed");
    assert_eq!(pod.run("after", "echo on", |_| ()).await, (0, "on\n".to_owned()));
    pod.0.stop().await;
}
