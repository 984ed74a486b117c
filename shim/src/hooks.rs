//! Hooks that run on the host (OCI runtime specification, "POSIX-platform Hooks"): `prestart` and `createRuntime` when the container is
//! there and does not run yet, `poststart`, `poststop`. They are how some engines wire a network. A spec names any program of the host in
//! them, so they run only where the configuration allows it; those for the container's own namespaces are the agent's to refuse.

use std::fs;
use std::io;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use oci_spec::runtime::{ContainerState, Hook, Spec, State};
use thiserror::Error;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

/// Longest run of a hook that names no `timeout`.
const DEADLINE: Duration = Duration::from_secs(60);
/// File in a container's folder from its first hook on, until those of its deletion have run.
const OWED: &str = "vmrun.hooks";
/// Most that is told of what a failed hook said, in bytes.
const MAX_SAID: u64 = 1024;

/// Why a hook failed.
#[derive(Debug, Error)]
pub(crate) enum HookError {
    /// It did not start, or could not be waited for.
    #[error("it cannot be run")]
    Run(#[from] io::Error),
    /// It took too long and was killed.
    #[error("it took more than {} s", .0.as_secs())]
    Deadline(Duration),
    /// It failed.
    #[error("{status}: {said}")]
    Failed { status: ExitStatus, said: String },
}

/// When hooks run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Moment {
    /// The container is made, with its VM.
    Created,
    /// Its process runs.
    Started,
    /// It is deleted.
    Deleted,
}

/// The hooks of a container, and what each is told of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Hooks {
    created: Vec<Hook>,
    started: Vec<Hook>,
    deleted: Vec<Hook>,
    state: State,
}

impl Hooks {
    /// Takes them out of a spec, which the guest gets without them.
    pub(crate) fn take(spec: &mut Spec, id: &str, bundle: &Path) -> Self {
        let mut state = State::default();
        state.set_version(spec.version().clone()).set_id(id.to_owned()).set_bundle(bundle.to_owned());
        state.set_annotations(spec.annotations().clone());
        let Some(hooks) = spec.hooks_mut() else { return Self { state, ..Self::default() } };
        let mut created = hooks.prestart_mut().take().unwrap_or_default();
        created.extend(hooks.create_runtime_mut().take().unwrap_or_default());
        let started = hooks.poststart_mut().take().unwrap_or_default();
        let deleted = hooks.poststop_mut().take().unwrap_or_default();
        Self { created, started, deleted, state }
    }

    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        [&self.created, &self.started, &self.deleted].into_iter().all(Vec::is_empty)
    }

    /// Whether those of the deletion are still to run: by the server, or when that is gone by who cleans up behind it.
    pub(crate) fn are_owed(&self) -> bool {
        self.state.bundle().join(OWED).exists()
    }

    fn set_owed(&self, owed: bool) {
        let path = self.state.bundle().join(OWED);
        let done = if owed { fs::write(path, "") } else { fs::remove_file(path) };
        if let Err(error) = done {
            tracing::warn!(%error, "it is not known whether the hooks of a container's deletion have run");
        }
    }

    /// Runs those of a moment one after the other, to the first that fails. `pid` is the process that stands for the container: the VMM's,
    /// whose network namespace is the container's where the spec names none.
    ///
    /// # Errors
    /// Which hook failed, and why.
    pub(crate) async fn run(&self, moment: Moment, pid: Option<u32>) -> Result<(), (Hook, HookError)> {
        if moment == Moment::Created && !self.is_empty() {
            self.set_owed(true);
        }
        let (hooks, status) = match moment {
            Moment::Created => (&self.created, ContainerState::Created),
            Moment::Started => (&self.started, ContainerState::Running),
            Moment::Deleted => (&self.deleted, ContainerState::Stopped),
        };
        let mut state = self.state.clone();
        state.set_status(status).set_pid(pid.and_then(|pid| i32::try_from(pid).ok()));
        for hook in hooks {
            run(hook, &state).await.map_err(|error| (hook.clone(), error))?;
        }
        Ok(())
    }

    /// As [`Self::run`] for moments that a failure does not stop: it is logged.
    pub(crate) async fn run_all_the_same(&self, moment: Moment, pid: Option<u32>) {
        if let Err((hook, error)) = self.run(moment, pid).await {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, path = %hook.path().display(), "a hook failed");
        }
        if moment == Moment::Deleted && self.are_owed() {
            self.set_owed(false);
        }
    }
}

async fn run(hook: &Hook, state: &State) -> Result<(), HookError> {
    let text = serde_json::to_vec(state).map_err(io::Error::from)?;
    let mut words = hook.args().iter().flatten();
    let mut command = Command::new(hook.path());
    if let Some(name) = words.next() {
        command.arg0(name);
    }
    let variables = hook.env().iter().flatten().filter_map(|variable| variable.split_once('='));
    command.args(words).env_clear().envs(variables).current_dir(state.bundle()).kill_on_drop(true);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let (stdin, stderr) = (child.stdin.take(), child.stderr.take());
    let tell = async move {
        if let Some(mut stdin) = stdin {
            // A hook need not read it.
            let _ = stdin.write_all(&text).await;
        }
    };
    let listen = async move {
        let (mut said, mut rest) = (Vec::new(), tokio::io::sink());
        if let Some(mut stderr) = stderr {
            (&mut stderr).take(MAX_SAID).read_to_end(&mut said).await?;
            tokio::io::copy(&mut stderr, &mut rest).await?;
        }
        Ok::<_, io::Error>(said)
    };
    let asked = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok()).map(Duration::from_secs);
    let deadline = asked.unwrap_or(DEADLINE);
    let ended = async { tokio::join!(tell, listen, child.wait()) };
    let ((), said, status) = tokio::time::timeout(deadline, ended).await.map_err(|_| HookError::Deadline(deadline))?;
    let status = status?;
    if status.success() {
        return Ok(());
    }
    Err(HookError::Failed { status, said: String::from_utf8_lossy(&said?).trim().to_owned() })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use oci_spec::runtime::Spec;
    use serde_json::{Value, json};

    use super::{HookError, Hooks, Moment};

    fn hooks(bundle: &Path, hooks: Value) -> (Hooks, Spec) {
        let spec = json!({ "ociVersion": "1.1.0", "annotations": { "a": "b" }, "hooks": hooks });
        let mut spec: Spec = serde_json::from_value(spec).expect("a spec");
        (Hooks::take(&mut spec, "one", bundle), spec)
    }

    fn shell(script: &str) -> Value {
        json!({ "path": "/bin/sh", "args": ["hook", "-c", script], "env": ["X=of the hook"], "timeout": 20 })
    }

    #[tokio::test]
    async fn a_hook_is_told_the_state_and_has_its_environment_alone() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let script = "read -r state; echo \"$0 $X $HOME $state\" >told";
        let (hooks, spec) =
            hooks(dir.path(), json!({ "createRuntime": [shell(script)], "startContainer": [shell("")] }));
        assert!(
            spec.hooks()
                .as_ref()
                .is_some_and(|left| left.create_runtime().is_none() && left.start_container().is_some())
        );
        hooks.run(Moment::Started, Some(7)).await.expect("there is none");
        assert!(!hooks.are_owed());
        hooks.run(Moment::Created, Some(7)).await.expect("run");
        assert!(hooks.are_owed());
        let told = fs::read_to_string(dir.path().join("told")).expect("the hook ran in the bundle");
        let state = told.strip_prefix("hook of the hook  ").expect("its name, its variable, and no other");
        let state: Value = serde_json::from_str(state).expect("JSON");
        let bundle = dir.path();
        let wanted = json!({
            "ociVersion": "1.1.0", "id": "one", "status": "created", "pid": 7, "bundle": bundle, "annotations": { "a": "b" }
        });
        assert_eq!(state, wanted);
        hooks.run_all_the_same(Moment::Deleted, None).await;
        assert!(!hooks.are_owed());
    }

    #[tokio::test]
    async fn a_hook_that_fails_or_takes_too_long_ends_the_others() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let (hooks, _) = hooks(
            dir.path(),
            json!({
                "prestart": [shell("echo no such network >&2; exit 3"), shell("echo >second")],
                "poststop": [{ "path": "/bin/sleep", "args": ["sleep", "100"], "timeout": 1 }]
            }),
        );
        let (hook, error) = hooks.run(Moment::Created, None).await.expect_err("it fails");
        assert_eq!(
            (hook.path().as_path(), error.to_string()),
            (Path::new("/bin/sh"), "exit status: 3: no such network".to_owned())
        );
        assert!(!dir.path().join("second").exists());
        let (_, error) = hooks.run(Moment::Deleted, None).await.expect_err("it takes too long");
        assert!(matches!(error, HookError::Deadline(_)), "{error}");
    }
}
