//! `vmrun exec`: another process in a running container. The owner of the sandbox starts it; its streams are ours.

use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use anyhow::{Context as _, Result, bail};

use crate::cli::ExecArgs;
use crate::control::{Answer, Client, Request};
use crate::{spec, stdio};

pub(crate) fn exec(root: &Path, args: ExecArgs) -> Result<u8> {
    let process = spec::exec_process(&args)?;
    let mut client = Client::connect(root, &args.name)?;
    let terminal = args.tty.then(stdio::window_size);
    client.send(&Request::Exec { process: Box::new(process), stdin: args.interactive, terminal })?;
    let (answer, streams) = client.receive()?;
    match answer {
        Answer::Started => {}
        Answer::Failed(cause) => return Ok(spec::report_start_failure(&cause)),
        other => bail!("unexpected answer of the container's owner: {other:?}"),
    }
    let raw =
        if args.tty { stdio::RawTerminal::enter().context("cannot switch the terminal to raw mode")? } else { None };
    if args.tty {
        forward_window_size(client.sender()?)?;
    }
    let mut streams = streams.into_iter().map(|fd| {
        let stream = UnixStream::from(fd);
        stream.set_nonblocking(false).map(|()| stream)
    });
    if args.interactive {
        stdio::copy_stdin(streams.next().context("no standard input came")??)?;
    }
    let stdout = stdio::copy_output(streams.next().context("no standard output came")??, io::stdout().as_fd())?;
    let stderr = streams.next().transpose()?.map(|s| stdio::copy_output(s, io::stderr().as_fd())).transpose()?;
    let (answer, _) = client.receive()?;
    for thread in [Some(stdout), stderr].into_iter().flatten() {
        let _ = thread.join();
    }
    drop(raw);
    match answer {
        Answer::Exited(code) => Ok(code),
        Answer::Failed(cause) => bail!("{cause}"),
        other => bail!("unexpected answer of the container's owner: {other:?}"),
    }
}

/// Tells the owner each new size of our terminal.
fn forward_window_size(mut client: Client) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    thread::Builder::new().name("window-size".to_owned()).spawn(move || {
        runtime.block_on(async move {
            let Ok(mut changed) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::window_change()) else {
                return;
            };
            while changed.recv().await.is_some() {
                let (rows, columns) = stdio::window_size();
                if client.send(&Request::Resize(rows, columns)).is_err() {
                    return;
                }
            }
        });
    })?;
    Ok(())
}
