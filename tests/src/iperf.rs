//! A stream of TCP from one pod to another for ten seconds, by the `iperf3` in their root file system.

use sandbox::ProcessId;
use serde_json::Value;
use tokio::io::AsyncReadExt as _;

use crate::pod::Pod;

/// Path of the program on the host.
pub const PROGRAM: &str = "/usr/bin/iperf3";
/// And in a root file system (see [`crate::Story::add_program`]).
const INSIDE: &str = "/opt/iperf3";

/// Streams to the server's `address`, and asserts that the connection lasts and carries bytes. Returns the client's report.
///
/// # Panics
/// When it does not.
pub async fn stream(server: &Pod, client: &Pod, address: &str) -> Value {
    let serve = format!("exec {INSIDE} --server --one-off --forceflush");
    let streams = server.create("iperf-server", &serve, |_| {}).await.expect("created");
    server.0.start("iperf-server").await.expect("started");
    let mut served = streams.stdout.expect("standard output");
    // Its first line, once it listens.
    served.read_exact(&mut [0; 1]).await.expect("iperf3 listens");
    let send = format!("{INSIDE} --client {address} --time 10 --json");
    let (code, report) = client.run("iperf-client", &send, |_| {}).await;
    assert_eq!(code, 0, "{report}");
    let report: Value = serde_json::from_str(&report).expect("JSON");
    let received = &report["end"]["sum_received"];
    assert!(received["seconds"].as_f64().is_some_and(|seconds| seconds > 9.0), "{received}");
    assert!(received["bytes"].as_u64().is_some_and(|bytes| bytes > 1 << 20), "{received}");
    let mut rest = String::new();
    served.read_to_string(&mut rest).await.expect("its report");
    let init = ProcessId::init("iperf-server");
    let exit = server.0.wait(&init).await.expect("waited");
    assert_eq!(exit.exit_code, 0, "{rest}");
    server.0.delete(&init, false).await.expect("deleted");
    report
}

/// What a segment of such a stream carries at an MTU: a packet less the headers of IP and of TCP with time stamps (RFC 7323).
#[must_use]
pub fn segment_len(mtu: u32, address: &str) -> u32 {
    mtu - if address.contains(':') { 72 } else { 52 }
}
