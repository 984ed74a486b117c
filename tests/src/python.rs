//! A Python in a container that answers one line at a time, so that a story can look at the guest and at the host in turn.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use crate::Story;

/// Evaluates (`?`) or executes (`!`) the string on each line; answers with the value, or with the name of the error.
const SERVER: &str = r"
import sys, os, errno
for line in sys.stdin:
    try:
        source = eval(line[1:])
        reply = eval(source, globals()) if line[0] == '?' else exec(source, globals())
    except OSError as error:
        reply = errno.errorcode.get(error.errno, str(error))
    except BaseException as error:
        reply = repr(error)
    print(str(reply).replace('\n', ' '), flush=True)
";

/// The running container; killed when dropped.
pub struct Python {
    vmrun: Child,
    replies: BufReader<ChildStdout>,
}

impl Python {
    /// Starts `vmrun run OPTIONS` with Python in the Debian image; waits until it answers.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn start(story: &Story, options: &[&str]) -> Self {
        Self::of(Self::command(story, options))
    }

    /// `vmrun run OPTIONS` with Python in the Debian image.
    ///
    /// # Panics
    /// When the image cannot be made.
    #[must_use]
    pub fn command(story: &Story, options: &[&str]) -> Command {
        let image = debian_image();
        let arguments = [&["run", "--rm", "-i"], options, &[&image, "python3", "-c", SERVER]].concat();
        story.vmrun(&arguments)
    }

    /// As [`Self::start`], from a command that runs it.
    ///
    /// # Panics
    /// When it does not answer.
    #[must_use]
    pub fn of(mut command: Command) -> Self {
        let mut vmrun = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("vmrun starts");
        let replies = BufReader::new(vmrun.stdout.take().expect("piped"));
        let mut python = Self { vmrun, replies };
        assert_eq!(python.eval("1 + 1"), "2");
        python
    }

    /// The value of an expression in the guest, or the name of the error that it raised.
    ///
    /// # Panics
    /// When the container has ended.
    pub fn eval(&mut self, expression: &str) -> String {
        self.ask('?', expression)
    }

    /// Executes statements in the guest; `None`, or the name of the error that they raised.
    ///
    /// # Panics
    /// When the container has ended.
    pub fn exec(&mut self, statements: &str) -> String {
        self.ask('!', statements)
    }

    /// Ends the container; returns its exit status.
    ///
    /// # Panics
    /// When it was killed.
    pub fn end(mut self) -> i32 {
        drop(self.vmrun.stdin.take());
        self.vmrun.wait().expect("wait").code().expect("an exit status")
    }

    fn ask(&mut self, kind: char, source: &str) -> String {
        let stdin = self.vmrun.stdin.as_mut().expect("open until the end");
        writeln!(stdin, "{kind}{source:?}").expect("the container reads");
        let mut reply = String::new();
        self.replies.read_line(&mut reply).expect("the container writes");
        assert!(reply.ends_with('\n'), "the container ended at {source:?}");
        reply.trim_end().to_owned()
    }
}

impl Drop for Python {
    fn drop(&mut self) {
        // It has usually ended.
        let _ = self.vmrun.kill();
        let _ = self.vmrun.wait();
    }
}

/// The unpacked Debian image with Python.
///
/// # Panics
/// When it cannot be made.
#[must_use]
pub fn debian_image() -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("debian-image");
    let made = Command::new(script).stderr(Stdio::inherit()).output().expect("tests/debian-image starts");
    let tree = PathBuf::from(String::from_utf8_lossy(&made.stdout).trim()).with_extension("rootfs");
    assert!(tree.join("usr/bin/python3").exists(), "{} is not complete", tree.display());
    format!("rootfs:{}", tree.display())
}
