//! Many short containers in one VM: each one's last bytes arrive, and nothing of them stays in the guest.

use std::time::Duration;

use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use sandbox::network::Network;
use sandbox::plan::VmSize;
use sandbox::{CallError, ProcessId};
use tests::Story;
use tests::pod::Pod;
use tokio::io::AsyncReadExt as _;

/// Containers in all.
const CONTAINER_COUNT: usize = 1000;
/// Containers that run at once.
const CONCURRENCY: usize = 4;
/// Bytes before the last line: more than one packet of vsock.
const OUTPUT_LEN: usize = 100_000;
/// Time in which a VM that broke a call tells why.
const END_DEADLINE: Duration = Duration::from_secs(5);

/// Runs one container to its end; returns its exit status and output.
async fn run(pod: &Pod, id: &str) -> Result<(u32, Vec<u8>), CallError> {
    let script = format!("head -c {OUTPUT_LEN} /dev/zero; echo last of {id}");
    let streams = pod.create(id, &script, |_| {}).await?;
    pod.0.start(id).await?;
    let mut output = Vec::new();
    streams.stdout.expect("standard output").read_to_end(&mut output).await.expect("read");
    let init = ProcessId::init(id);
    let exit = pod.0.wait(&init).await?;
    pod.0.delete(&init, false).await?;
    Ok((exit.exit_code, output))
}

#[tokio::test(flavor = "current_thread")]
async fn the_last_bytes_of_many_short_containers_arrive() {
    let story = Story::new();
    let pod = Pod::boot_with(&story, VmSize { vcpus: 2, memory_mib: 512 }, Network::default()).await;
    let runs = stream::iter(0..CONTAINER_COUNT).map(async |number| {
        let id = format!("c{number}");
        let (status, output) = run(&pod, &id).await?;
        let last_line = format!("last of {id}\n");
        assert_eq!((status, output.len()), (0, OUTPUT_LEN + last_line.len()), "{id}");
        assert!(output.ends_with(last_line.as_bytes()), "{id}");
        Ok::<_, CallError>(())
    });
    let done = runs.buffer_unordered(CONCURRENCY).try_fold(0, async |count, ()| Ok(count + 1)).await;
    match done {
        Ok(count) => assert_eq!(count, CONTAINER_COUNT),
        Err(error) => panic!("{error}; the VM: {:?}", tokio::time::timeout(END_DEADLINE, pod.0.ended()).await),
    }
    pod.0.stop().await;
}
