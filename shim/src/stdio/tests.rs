//! Streams without a guest: a socket pair stands for each.

use std::path::Path;
use std::time::{Duration, Instant};

use sandbox::{ProcessId, ProcessStreams};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use super::{Copying, Stdio};

fn fifo(dir: &Path, name: &str) -> String {
    let path = dir.join(name);
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).expect("a FIFO");
    path.display().to_string()
}

/// What this process has used.
fn cpu_time() -> Duration {
    let clock = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(clock).expect("a positive time")
}

/// Starts to copy; returns the guest's ends of input and output.
async fn copy(stdio: &Stdio) -> (Copying, UnixStream, UnixStream) {
    let ends = stdio.open("default", &ProcessId::init("box")).await.expect("opened");
    let (stdin, guest_stdin) = UnixStream::pair().expect("a pair");
    let (stdout, guest_stdout) = UnixStream::pair().expect("a pair");
    let streams = ProcessStreams { stdin: Some(stdin), stdout: Some(stdout), stderr: None };
    let mut copying = ends.copy(streams);
    copying.begin_input();
    (copying, guest_stdin, guest_stdout)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn output_waits_for_a_reader_that_comes_late() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let stdio = Stdio { stdout: fifo(dir.path(), "out"), ..Stdio::default() };
    let (copying, _, mut guest) = copy(&stdio).await;
    guest.write_all(b"last words\n").await.expect("written");
    drop(guest);
    let path = stdio.stdout.clone();
    let reader = tokio::task::spawn_blocking(move || {
        std::thread::sleep(Duration::from_millis(100));
        std::fs::read_to_string(path).expect("read")
    });
    copying.finish().await;
    assert_eq!(reader.await.expect("joined"), "last words\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_reader_that_never_comes_holds_nothing_up_for_long() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let stdio = Stdio { stdout: fifo(dir.path(), "out"), ..Stdio::default() };
    let (copying, _, mut guest) = copy(&stdio).await;
    guest.write_all(&[0; 200_000]).await.expect("the socket and the FIFO take this much");
    let start = Instant::now();
    copying.finish().await;
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}

#[tokio::test]
async fn input_ends_when_it_is_closed_and_not_when_its_writer_goes() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let stdio = Stdio { stdin: fifo(dir.path(), "in"), ..Stdio::default() };
    let (mut copying, mut guest, _out) = copy(&stdio).await;
    for word in ["one", "two"] {
        std::fs::write(&stdio.stdin, word).expect("a writer that comes and goes");
        let mut read = [0; 3];
        guest.read_exact(&mut read).await.expect("read");
        assert_eq!(&read, word.as_bytes());
    }
    let cpu = cpu_time();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(cpu_time() - cpu < Duration::from_millis(100), "a FIFO without a writer is not asked again and again");
    copying.close_stdin();
    let mut rest = Vec::new();
    guest.read_to_end(&mut rest).await.expect("the end");
    assert_eq!(rest, b"");
}

#[tokio::test]
async fn a_file_is_appended_to() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("logs/out.log");
    let stdio = Stdio { stdout: format!("file://{}", path.display()), ..Stdio::default() };
    for _ in 0..2 {
        let (copying, _, mut guest) = copy(&stdio).await;
        guest.write_all(b"line\n").await.expect("written");
        drop(guest);
        copying.finish().await;
    }
    assert_eq!(std::fs::read_to_string(path).expect("read"), "line\nline\n");
}

#[tokio::test]
async fn an_unknown_scheme_is_refused() {
    let stdio = Stdio { stdout: "http://host/log".to_owned(), ..Stdio::default() };
    stdio.open("default", &ProcessId::init("box")).await.map(drop).expect_err("refused");
}
