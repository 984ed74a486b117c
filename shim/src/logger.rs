//! `binary://PATH?KEY=VALUE`: a program that takes a container's output, as containerd's runtime v2 describes it. It gets
//! standard output and error as descriptors 3 and 4, and closes or writes to 5 when it is ready.

use std::io::Read as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use command_fds::{CommandFdExt as _, FdMapping};
use tokio::net::unix::pipe;
use tokio::process::Command;

use crate::error::TaskError;

/// Time that a logger has to get ready.
const READY_DEADLINE: Duration = Duration::from_secs(10);

/// A logger that was asked for.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct Logger {
    program: PathBuf,
    arguments: Vec<String>,
}

impl Logger {
    /// The logger that an output names, if it names one.
    pub(crate) fn parse(name: &str) -> Result<Option<Self>, TaskError> {
        let Some(rest) = name.strip_prefix("binary://") else { return Ok(None) };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let invalid = || TaskError::Invalid(format!("{name:?} does not name a logger: it needs an absolute path"));
        let program = decode(path).filter(|path| path.starts_with('/')).ok_or_else(invalid)?.into();
        let mut arguments = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            for word in [key, value] {
                arguments.push(decode(&word.replace('+', " ")).ok_or_else(invalid)?);
            }
        }
        Ok(Some(Self { program, arguments }))
    }

    /// Starts it and waits until it is ready; returns where output and errors go.
    pub(crate) async fn start(&self, namespace: &str, id: &str) -> Result<(pipe::Sender, pipe::Sender), TaskError> {
        let failed = || TaskError::host(format!("start the logger {}", self.program.display()));
        let (stdout, logger_stdout) = std::io::pipe().map(|(reader, writer)| (writer, reader)).map_err(failed())?;
        let (stderr, logger_stderr) = std::io::pipe().map(|(reader, writer)| (writer, reader)).map_err(failed())?;
        let (mut ready, logger_ready) = std::io::pipe().map_err(failed())?;
        let fds = [
            FdMapping { parent_fd: logger_stdout.into(), child_fd: 3 },
            FdMapping { parent_fd: logger_stderr.into(), child_fd: 4 },
            FdMapping { parent_fd: logger_ready.into(), child_fd: 5 },
        ];
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).env("CONTAINER_ID", id).env("CONTAINER_NAMESPACE", namespace);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.fd_mappings(fds.into()).map_err(|error| TaskError::Invalid(error.to_string()))?;
        let mut child = command.spawn().map_err(failed())?;
        // Our copies of its descriptors are closed with the command.
        drop(command);
        let told = tokio::task::spawn_blocking(move || ready.read(&mut [0]));
        if tokio::time::timeout(READY_DEADLINE, told).await.is_err() {
            // It ends by itself when its pipes are closed, or is killed here.
            let _ = child.start_kill();
            return Err(TaskError::Invalid(format!(
                "the logger {} was not ready after {} ms",
                self.program.display(),
                READY_DEADLINE.as_millis()
            )));
        }
        // Reaps it, whenever it ends.
        tokio::spawn(async move { child.wait().await });
        let sender = |writer: std::io::PipeWriter| pipe::Sender::from_owned_fd(writer.into());
        Ok((sender(stdout).map_err(failed())?, sender(stderr).map_err(failed())?))
    }
}

/// Percent-encoding (RFC 3986, section 2.1).
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = tail.get(..2).filter(|digits| digits.iter().all(u8::is_ascii_hexdigit))?;
        bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
        rest = &tail[2..];
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use tokio::io::AsyncWriteExt as _;

    use super::Logger;

    #[test]
    fn keys_and_values_become_arguments() {
        let logger = Logger::parse("binary:///usr/bin/log%20er?--dir=/var/log&-v=").expect("parsed").expect("a logger");
        assert_eq!(logger.program.to_str(), Some("/usr/bin/log er"));
        assert_eq!(logger.arguments, ["--dir", "/var/log", "-v", ""]);
        assert_eq!(Logger::parse("/run/fifo").expect("parsed"), None);
        Logger::parse("binary://relative").expect_err("refused");
        Logger::parse("binary:///x%zz").expect_err("refused");
    }

    #[tokio::test]
    async fn a_logger_gets_output_and_says_when_it_is_ready() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (program, log) = (dir.path().join("logger"), dir.path().join("log"));
        let script = "#!/bin/sh\nexec 5>&-\nwhile read -r line <&3; do echo \"$CONTAINER_NAMESPACE/$CONTAINER_ID $line\"; done >\"$2.new\"\nmv \"$2.new\" \"$2\"\n";
        fs::write(&program, script).expect("a script");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("executable");
        let name = format!("binary://{}?--log={}", program.display(), log.display());
        let logger = Logger::parse(&name).expect("parsed").expect("a logger");
        let (mut stdout, stderr) = logger.start("default", "box").await.expect("started");
        stdout.write_all(b"hello\n").await.expect("written");
        drop((stdout, stderr));
        let written = async {
            while !log.exists() {
                tokio::task::yield_now().await;
            }
            fs::read_to_string(&log).expect("read")
        };
        let text = tokio::time::timeout(std::time::Duration::from_secs(20), written).await.expect("the log");
        assert_eq!(text, "default/box hello\n");
    }
}
