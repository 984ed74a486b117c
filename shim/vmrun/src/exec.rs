//! `vmrun exec`: another process in a running container. The owner of the sandbox starts it; its streams are ours.

use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use anyhow::{Context as _, Result, bail};

use crate::cli::ExecArgs;
use crate::client::Client;
use crate::control::{Answer, ExecRequest, Request};
use crate::{complain, spec, stdio};

pub(crate) fn exec(root: &Path, args: ExecArgs) -> Result<u8> {
    stdio::check_terminal(args.interactive && !args.detach, args.tty)?;
    let mut client = Client::connect(root, &args.name)?;
    let request = ExecRequest {
        env: args.env.iter().filter_map(|variable| spec::with_value(variable)).collect(),
        stdin: args.interactive && !args.detach,
        terminal: args.tty.then(stdio::window_size),
        command: args.command,
        workdir: args.workdir,
        user: args.user,
        detach: args.detach,
    };
    let (tty, stdin, detach) = (request.terminal.is_some(), request.stdin, request.detach);
    client.send(&Request::Exec(Box::new(request)))?;
    let (answer, streams) = client.receive()?;
    match answer {
        Answer::Started if detach => return Ok(0),
        Answer::Started => {}
        Answer::Failed(cause) => {
            complain(&cause);
            return Ok(spec::start_failure_code(&cause));
        }
        other => bail!("unexpected answer of the container's owner: {other:?}"),
    }
    let raw = if tty { stdio::RawTerminal::enter().context("cannot switch the terminal to raw mode")? } else { None };
    if tty {
        forward_window_size(client.sender()?)?;
    }
    let mut streams = streams.into_iter().map(|fd| {
        let stream = UnixStream::from(fd);
        stream.set_nonblocking(false).map(|()| stream)
    });
    if stdin {
        stdio::copy_stdin(streams.next().context("no standard input came")??)?;
    }
    let outputs = [io::stdout().as_fd().try_clone_to_owned()?, io::stderr().as_fd().try_clone_to_owned()?];
    let mut copying = Vec::new();
    for (stream, output) in streams.zip(outputs) {
        copying.push(stdio::copy_output(stream?, stdio::Sink { output: Some(output), log: None })?);
    }
    let (answer, _) = client.receive()?;
    copying.into_iter().for_each(stdio::Output::wait);
    drop(raw);
    match answer {
        Answer::Exited(code) => Ok(code),
        Answer::Failed(cause) => {
            complain(&cause);
            Ok(spec::start_failure_code(&cause))
        }
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
