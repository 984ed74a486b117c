//! What the fuzzers in `tests/fuzz` call: bytes of a guest's agent, of a VMM that a guest has taken over, and of whoever writes
//! a container's spec. Compiled for fuzzing and for the unit tests only.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use agent_api::SHARE_DIR;
use oci_spec::runtime::Spec;
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixStream;
use vmm_api::control::Message;

use crate::agent_client::AgentClient;
use crate::plan::{self, ShareTags};
use crate::{ProcessId, text};

/// What an agent sends in place of its answers, until it hangs up.
///
/// # Panics
/// When an answer has text that a terminal would obey.
pub fn agent_answers(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (ours, mut theirs) = UnixStream::pair().expect("a socket pair");
        let agent = AgentClient::new(ours, Duration::ZERO);
        let id = ProcessId::init("box");
        let asked = async {
            let (events, state, stats, processes) =
                tokio::join!(agent.next_events(), agent.state(&id), agent.stats("box"), agent.list_processes("box"));
            let errors = [events.err(), state.err(), stats.err(), processes.err()];
            let texts = errors.into_iter().flatten().map(|error| error.to_string());
            assert!(texts.into_iter().all(|text| !text.contains(char::is_control)));
        };
        let told = async {
            // A client that has given up reads no more.
            let _ = theirs.write_all(data).await;
            let _ = theirs.shutdown().await;
            drop(theirs);
        };
        tokio::join!(asked, told);
    });
}

/// A line on a VMM's control socket.
///
/// # Panics
/// When the reason of an end has text that a terminal would obey.
pub fn vmm_messages(data: &[u8]) {
    if let Ok(Message::Exited(exit)) = serde_json::from_slice(data) {
        let exit = text::clean(exit);
        assert!(!exit.reason.to_string().contains(char::is_control));
        assert!(!exit.console_tail.contains(|c: char| c.is_control() && c != '\n'));
    }
}

/// An OCI spec, as JSON.
///
/// # Panics
/// When a bind mount of the plan has a source on the host.
pub fn plan(data: &[u8]) {
    let Ok(spec) = serde_json::from_slice::<Spec>(data) else { return };
    let Ok(plan) = plan::plan(spec, &ShareTags::only(), &HashMap::new()) else { return };
    let mounts = plan.spec.mounts().iter().flatten();
    let is_bind = |options: &Option<Vec<String>>| options.iter().flatten().any(|o| o == "bind" || o == "rbind");
    for mount in mounts.filter(|mount| mount.typ().as_deref() == Some("bind") || is_bind(mount.options())) {
        let source = mount.source().as_deref().expect("a bind mount has one");
        assert!(source.starts_with(SHARE_DIR) || source == Path::new("/dev/shm"), "{}", source.display());
    }
    assert!(plan.volumes.values().flatten().all(|volume| !volume.source.starts_with("/proc")));
    assert_eq!(plan.spec.root().as_ref().expect("a root").path(), &ShareTags::only().guest_rootfs());
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_target_takes_its_bytes() {
        let ended = br#"{"exited":{"reason":{"why":"vmm-error","detail":"a\u001b[2J"},"console_tail":"\u0007"}}"#;
        let bound = br#"{"ociVersion":"1.0.2","mounts":[{"destination":"/d","type":"bind","source":"/srv"}]}"#;
        let inputs: [&[u8]; 4] = [b"", &[0; 64], ended, bound];
        for target in [super::agent_answers, super::vmm_messages, super::plan] {
            inputs.into_iter().for_each(target);
        }
    }
}
