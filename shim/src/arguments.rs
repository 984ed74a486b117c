//! The command line, as Go's `flag` package has it: `-name value`, `-name=value`, one or two dashes, the action last.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

/// What this process is for.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) enum Action {
    /// Find or start the server of a pod, print its address, end.
    Start,
    /// Remove what a dead server left behind.
    Delete,
    /// Be the server.
    #[default]
    Serve,
    /// Say what is supported.
    Info,
    /// Say the version.
    Version,
}

/// What containerd says.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Arguments {
    /// containerd's namespace.
    pub(crate) namespace: String,
    /// Id of the container or sandbox.
    pub(crate) id: String,
    /// Socket of containerd's gRPC services.
    pub(crate) address: String,
    /// containerd's program.
    pub(crate) publish_binary: String,
    /// Folder of the container; the working directory when absent.
    pub(crate) bundle: Option<PathBuf>,
    /// Socket that the server answers at; of our own use.
    pub(crate) socket: String,
    /// Log more.
    pub(crate) debug: bool,
    /// What to do.
    pub(crate) action: Action,
}

impl Arguments {
    /// Reads the words after the program's name.
    pub(crate) fn parse(words: impl Iterator<Item = OsString>) -> Result<Self> {
        let mut arguments = Self::default();
        let mut words = words.map(|word| word.into_string().ok().context("an argument is not UTF-8"));
        while let Some(word) = words.next().transpose()? {
            let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
                arguments.action = action(&word)?;
                break;
            };
            let (name, mut value) = flag.split_once('=').map_or((flag, None), |(n, v)| (n, Some(v.to_owned())));
            let mut text = || match value.take() {
                Some(value) => Ok(value),
                None => words.next().transpose()?.with_context(|| format!("-{name} needs a value")),
            };
            match name {
                "namespace" => arguments.namespace = text()?,
                "id" => arguments.id = text()?,
                "address" => arguments.address = text()?,
                "publish-binary" => arguments.publish_binary = text()?,
                "bundle" => arguments.bundle = Some(text()?.into()),
                "socket" => arguments.socket = text()?,
                "debug" => arguments.debug = value.is_none_or(|value| value == "true"),
                "info" => arguments.action = Action::Info,
                "v" | "version" => arguments.action = Action::Version,
                _ => bail!("unknown flag -{name}"),
            }
        }
        arguments.check()?;
        Ok(arguments)
    }

    fn check(&self) -> Result<()> {
        if matches!(self.action, Action::Info | Action::Version) {
            return Ok(());
        }
        for (name, value) in [("namespace", &self.namespace), ("id", &self.id)] {
            // Both become parts of paths.
            let plain = value.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
            if value.is_empty() || !plain || value.starts_with('.') {
                bail!(
                    "-{name} {value:?} is not one: containerd starts this program, `containerd-shim-vm-v2 -v` tells its version"
                );
            }
        }
        Ok(())
    }

    /// Folder of the container.
    pub(crate) fn bundle(&self) -> Result<PathBuf> {
        match &self.bundle {
            Some(bundle) if !bundle.as_os_str().is_empty() => Ok(std::path::absolute(bundle)?),
            _ => std::env::current_dir().context("cannot find the bundle"),
        }
    }
}

fn action(word: &str) -> Result<Action> {
    match word {
        "start" => Ok(Action::Start),
        "delete" => Ok(Action::Delete),
        _ => bail!("unknown action {word:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::{Action, Arguments};

    fn parse(line: &str) -> anyhow::Result<Arguments> {
        Arguments::parse(line.split(' ').map(Into::into))
    }

    #[test]
    fn flags_come_in_every_spelling_of_go() {
        let spelled =
            parse("-namespace default --id=box -debug -address=/run/c.sock -bundle /b delete").expect("parsed");
        assert_eq!((spelled.namespace.as_str(), spelled.id.as_str(), spelled.debug), ("default", "box", true));
        assert_eq!((spelled.action, spelled.bundle), (Action::Delete, Some("/b".into())));
        assert_eq!(parse("-namespace a -id b").expect("parsed").action, Action::Serve);
        assert_eq!(parse("-info").expect("parsed").action, Action::Info);
    }

    #[test]
    fn id_that_would_leave_its_folder_is_refused() {
        parse("-namespace default -id ../x start").expect_err("refused");
        parse("-namespace a/b -id x start").expect_err("refused");
        parse("-namespace default start").expect_err("refused");
        parse("-namespace default -id x stop").expect_err("refused");
        parse("-nonsense").expect_err("refused");
    }
}
