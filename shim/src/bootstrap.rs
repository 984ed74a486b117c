//! `start`: finds or starts the server of a pod and prints where it answers. Quick, and silent but for the answer: containerd
//! waits for the end of our output, and before 2.3 takes standard error for a part of the address.
//!
//! ```text
//!   containerd up to 2.2   stdin: the runtime's options as an `Any`, or nothing   stdout: the address
//!   containerd from 2.3    stdin: `BootstrapParams`                               stdout: `BootstrapResult`
//! ```

use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use protobuf::Message as _;
use protobuf::well_known_types::any::Any;
use sha2::{Digest as _, Sha256};

use crate::arguments::Arguments;
use crate::config::{self, Config};
use crate::cri;
use crate::proto::runtimeoptions;

/// Where sockets are unless containerd says otherwise: short, because the name of a socket has at most 107 bytes.
const SOCKET_DIR: &str = "/run/containerd/s";
/// Most bytes that are read from standard input.
const MAX_INPUT: u64 = 4 << 20;
/// Version of the task API that an answer in the old form stands for, and the newest.
const NEWEST_TASK_API: i32 = containerd_shim_protos::TASK_API_VERSION;

/// What containerd asks for on standard input.
#[derive(Debug, PartialEq)]
enum Request {
    /// Up to 2.2.
    Legacy { options: Option<Any> },
    /// From 2.3.
    Bootstrap(Box<BootstrapParams>),
}

impl Request {
    /// An `Any` also parses as `BootstrapParams`, with its type as the id and its value as the namespace: only the right id
    /// and namespace make it one.
    fn parse(input: &[u8], arguments: &Arguments) -> Result<Self> {
        let params = BootstrapParams::parse_from_bytes(input).ok();
        if let Some(params) = params.clone()
            && params.instance_id == arguments.id
            && params.namespace == arguments.namespace
        {
            return Ok(Self::Bootstrap(Box::new(params)));
        }
        let other_fields = params.is_some_and(|params| {
            let ids = BootstrapParams {
                instance_id: params.instance_id.clone(),
                namespace: params.namespace.clone(),
                ..Default::default()
            };
            params != ids
        });
        if other_fields {
            bail!("standard input is for another container than -id {}", arguments.id);
        }
        let any = Any::parse_from_bytes(input).context("standard input is neither BootstrapParams nor an Any")?;
        Ok(Self::Legacy { options: Some(any).filter(|any| !any.type_url.is_empty()) })
    }

    fn options(&self) -> Option<Any> {
        match self {
            Self::Legacy { options } => options.clone(),
            Self::Bootstrap(params) => {
                let values = params.extensions.iter().filter_map(|extension| extension.value.clone().into_option());
                values.into_iter().find(|any| is_runtime_options(&any.type_url))
            }
        }
    }
}

fn is_runtime_options(type_url: &str) -> bool {
    type_url.rsplit('/').next() == Some("runtimeoptions.v1.Options")
}

/// The configuration file that containerd's configuration names (`ConfigPath`). Options of another runtime are not ours.
fn config_path(options: Option<&Any>) -> Result<Option<PathBuf>> {
    let Some(any) = options.filter(|any| is_runtime_options(&any.type_url)) else { return Ok(None) };
    let options =
        runtimeoptions::Options::parse_from_bytes(&any.value).context("the runtime's options are malformed")?;
    Ok(Some(options.config_path).filter(|path| !path.is_empty()).map(PathBuf::from))
}

/// Finds or starts the server.
pub(crate) fn start(arguments: &Arguments) -> Result<()> {
    let mut input = Vec::new();
    io::stdin().take(MAX_INPUT).read_to_end(&mut input).context("cannot read standard input")?;
    let request = Request::parse(&input, arguments)?;
    let bundle = arguments.bundle()?;
    let group = cri::sandbox_of_bundle(&bundle)?.unwrap_or_else(|| arguments.id.clone());
    let socket = socket_path(&request, arguments, &group);
    if UnixStream::connect(&socket).is_err() {
        launch(&request, arguments, &bundle, &socket)?;
    }
    let address = format!("unix://{}", socket.display());
    // containerd 1.x finds the server by this file after a restart.
    fs::write(bundle.join("address"), &address).context("cannot write the address")?;
    let answer = match request {
        // A bare address stands for version 2, which every containerd understands, with pods of either kind.
        Request::Legacy { .. } => address.into_bytes(),
        Request::Bootstrap(_) => {
            BootstrapResult { version: NEWEST_TASK_API, address, protocol: "ttrpc".to_owned(), ..Default::default() }
                .write_to_bytes()?
        }
    };
    io::stdout().write_all(&answer).context("cannot answer")
}

/// The name says which containerd, namespace and pod the server is for.
fn socket_path(request: &Request, arguments: &Arguments, group: &str) -> PathBuf {
    let folder = match request {
        Request::Bootstrap(params) => params.socket_dir.as_deref().filter(|dir| !dir.is_empty()).unwrap_or(SOCKET_DIR),
        Request::Legacy { .. } => SOCKET_DIR,
    };
    let named = format!("{}/{}/{group}", arguments.address.trim_end_matches('/'), arguments.namespace);
    let digest: String = Sha256::digest(named).iter().map(|byte| format!("{byte:02x}")).collect();
    Path::new(folder).join(digest)
}

/// Starts the server with the socket as its standard input. Whoever connects from now on waits until it answers.
fn launch(request: &Request, arguments: &Arguments, bundle: &Path, socket: &Path) -> Result<()> {
    let config_path = config_path(request.options().as_ref())?;
    let config = match &config_path {
        Some(path) => Config::read(path, true)?,
        None => Config::load()?,
    };
    let listener = bind(socket)?;
    let mut command = Command::new(std::env::current_exe().context("cannot find our own program")?);
    command.args(["-namespace", &arguments.namespace, "-id", &arguments.id, "-address", &arguments.address]);
    command.args(["-publish-binary", &arguments.publish_binary]).arg("-bundle").arg(bundle).arg("-socket").arg(socket);
    command.stdin(OwnedFd::from(listener)).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
    command.envs(config.artifacts.variables().map(|(variable, path)| (variable, path.as_os_str())));
    // glibc would give each thread that comes with a container memory of its own, and keep it when the thread is gone.
    command.env("MALLOC_ARENA_MAX", "1");
    if let Some(path) = config_path {
        command.env(config::VARIABLE, path);
    }
    let mut debug = arguments.debug;
    if let Request::Bootstrap(params) = request {
        command.env("TTRPC_ADDRESS", &params.containerd_ttrpc_address);
        debug |= params.log_level.value() < 0;
    }
    if debug {
        command.arg("-debug");
    }
    let spawned = command.spawn().context("cannot start the server");
    if spawned.is_err() {
        let _ = fs::remove_file(socket);
    }
    spawned.map(drop)
}

/// Its folder is containerd's, unless containerd has none yet. Only root connects, whatever the umask of who starts us.
fn bind(socket: &Path) -> Result<UnixListener> {
    let folder = socket.parent().unwrap_or(Path::new("/"));
    let made = DirBuilder::new().recursive(true).mode(0o711).create(folder);
    made.with_context(|| format!("cannot make {}", folder.display()))?;
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot remove the stale socket {}", socket.display()));
        }
        _ => {}
    }
    let bound = UnixListener::bind(socket).with_context(|| format!("cannot bind {}", socket.display()))?;
    fs::set_permissions(socket, Permissions::from_mode(0o600))
        .with_context(|| format!("cannot close {} to other users", socket.display()))?;
    Ok(bound)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::Path;

    use containerd_shim_protos::bootstrap_api::{BootstrapParams, Extension};
    use proptest::prelude::{any, proptest};
    use protobuf::Message as _;
    use protobuf::well_known_types::any::Any;

    use super::{Request, bind, config_path, socket_path};
    use crate::arguments::Arguments;
    use crate::proto::runtimeoptions::Options;

    fn arguments() -> Arguments {
        Arguments {
            namespace: "k8s.io".to_owned(),
            id: "box".to_owned(),
            address: "/run/containerd/containerd.sock".to_owned(),
            ..Arguments::default()
        }
    }

    fn options() -> Any {
        let options = Options { config_path: "/etc/other.toml".to_owned(), ..Default::default() };
        Any {
            type_url: "runtimeoptions.v1.Options".to_owned(),
            value: options.write_to_bytes().expect("encoded"),
            ..Default::default()
        }
    }

    fn params(id: &str) -> BootstrapParams {
        BootstrapParams {
            instance_id: id.to_owned(),
            namespace: "k8s.io".to_owned(),
            containerd_ttrpc_address: "/run/c.ttrpc".to_owned(),
            extensions: vec![Extension { value: Some(options()).into(), ..Default::default() }],
            ..Default::default()
        }
    }

    #[test]
    fn options_of_the_old_protocol_are_not_taken_for_the_new_one() {
        let input = options().write_to_bytes().expect("encoded");
        let request = Request::parse(&input, &arguments()).expect("parsed");
        assert_eq!(request, Request::Legacy { options: Some(options()) });
        assert_eq!(config_path(request.options().as_ref()).expect("path"), Some("/etc/other.toml".into()));
        assert_eq!(Request::parse(&[], &arguments()).expect("parsed"), Request::Legacy { options: None });
    }

    #[test]
    fn parameters_of_the_new_protocol_carry_options_too() {
        let request = Request::parse(&params("box").write_to_bytes().expect("encoded"), &arguments()).expect("parsed");
        assert!(matches!(request, Request::Bootstrap(_)), "{request:?}");
        assert_eq!(config_path(request.options().as_ref()).expect("path"), Some("/etc/other.toml".into()));
    }

    #[test]
    fn parameters_of_another_container_are_refused() {
        let input = params("other").write_to_bytes().expect("encoded");
        Request::parse(&input, &arguments()).expect_err("refused");
    }

    #[test]
    fn options_of_another_runtime_name_no_configuration() {
        let any = Any { type_url: "containerd.runc.v1.Options".to_owned(), value: vec![8, 1], ..Default::default() };
        assert_eq!(config_path(Some(&any)).expect("none"), None);
    }

    #[test]
    fn a_socket_is_closed_to_other_users() {
        let dir = tempfile::tempdir().expect("a folder");
        let socket = dir.path().join("s/socket");
        let _bound = bind(&socket).expect("bound");
        let mode = |path: &Path| fs::metadata(path).expect("it is there").permissions().mode() & 0o7777;
        assert_eq!((mode(&dir.path().join("s")) & 0o066, mode(&socket)), (0, 0o600));
    }

    #[test]
    fn a_socket_belongs_to_one_containerd_namespace_and_pod() {
        let request = Request::Legacy { options: None };
        let path = socket_path(&request, &arguments(), "box");
        let digest = "/run/containerd/containerd.sock/k8s.io/box";
        assert!(path.starts_with("/run/containerd/s"), "{}", path.display());
        assert_eq!(path, socket_path(&request, &arguments(), "box"), "{digest}");
        assert_ne!(path, socket_path(&request, &arguments(), "other"));
        assert!(path.as_os_str().len() < 108);
    }

    proptest! {
        #[test]
        fn no_input_makes_it_panic(input in any::<Vec<u8>>()) {
            let _ = Request::parse(&input, &arguments());
        }
    }
}
