//! OCI bundles (runtime-spec, bundle.md): the specification is used as it is, on a copy-on-write view of its root.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use oci_spec::runtime::Spec;

use super::Image;
use super::blob::Section;
use crate::cli::RunArgs;

/// Opens a bundle.
pub(super) fn open(dir: &Path) -> Result<Image> {
    let dir = fs::canonicalize(dir).with_context(|| format!("cannot use the bundle {}", dir.display()))?;
    let path = dir.join("config.json");
    let bytes = Section::open(&path)?.read_document().with_context(|| format!("cannot read {}", path.display()))?;
    let mut spec: Spec =
        serde_json::from_slice(&bytes).with_context(|| format!("{} is not an OCI specification", path.display()))?;
    if let Some(field) = unsupported(&spec) {
        bail!("{} asks for {field}, which is not supported", path.display());
    }
    let root = spec.root().as_ref().map_or(Path::new("rootfs"), |root| root.path());
    let rootfs =
        fs::canonicalize(dir.join(root)).with_context(|| format!("cannot use the root of {}", path.display()))?;
    if !rootfs.is_dir() {
        bail!("{} is not a directory", rootfs.display());
    }
    resolve_sources(&mut spec, &dir);
    let cmd = spec.process().as_ref().and_then(|process| process.args().clone()).unwrap_or_default();
    Ok(Image {
        layers: vec![rootfs],
        layer_dir: PathBuf::from("/"),
        cmd,
        bundle: Some(Box::new(spec)),
        ..Image::default()
    })
}

/// The field that nothing here or in the guest can honour. The agent refuses more, of which it knows.
fn unsupported(spec: &Spec) -> Option<&'static str> {
    let linux = spec.linux().as_ref();
    let has_path = |spec: &Spec| {
        let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().clone()).unwrap_or_default();
        namespaces.iter().any(|namespace| namespace.path().is_some())
    };
    let process = spec.process().as_ref();
    let is_set = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    match () {
        () if process.is_none() => Some("no process"),
        () if spec.hooks().is_some() => Some("hooks"),
        () if spec.windows().is_some() => Some("windows"),
        () if spec.solaris().is_some() => Some("solaris"),
        () if spec.vm().is_some() => Some("vm"),
        () if has_path(spec) => Some("linux.namespaces[].path"),
        () if linux.is_some_and(|linux| linux.intel_rdt().is_some()) => Some("linux.intelRdt"),
        () if linux.is_some_and(|linux| is_set(linux.mount_label())) => Some("linux.mountLabel"),
        () if process.is_some_and(|process| is_set(process.apparmor_profile())) => Some("process.apparmorProfile"),
        () if process.is_some_and(|process| is_set(process.selinux_label())) => Some("process.selinuxLabel"),
        () => None,
    }
}

/// Sources of bind mounts are relative to the bundle (runtime-spec, config.md, Mounts).
fn resolve_sources(spec: &mut Spec, dir: &Path) {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in &mut mounts {
        let is_bind = mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind");
        if let (true, Some(source)) = (is_bind || mount.typ().as_deref() == Some("bind"), mount.source().clone()) {
            mount.set_source(Some(dir.join(source)));
        }
    }
    spec.set_mounts(Some(mounts));
}

/// The specification of a container of a bundle.
pub(crate) fn container(bundle: &Spec, args: &RunArgs, name: &str, command: &[String]) -> Result<Spec> {
    refuse_options(args)?;
    let mut spec = bundle.clone();
    let mut process = spec.process().clone().context("the bundle has no process")?;
    process.set_args(Some(command.to_vec())).set_terminal(Some(args.tty));
    spec.set_process(Some(process));
    let mut linux = spec.linux().clone().unwrap_or_default();
    linux.set_cgroups_path(Some(PathBuf::from(format!("/containers/{name}"))));
    spec.set_linux(Some(linux));
    Ok(spec)
}

/// Options that would change the specification, which is used as it is.
fn refuse_options(args: &RunArgs) -> Result<()> {
    let given = [
        ("--env", !args.env.is_empty()),
        ("--env-file", !args.env_file.is_empty()),
        ("--workdir", args.workdir.is_some()),
        ("--user", args.user.is_some()),
        ("--hostname", args.hostname.is_some()),
        ("--pids-limit", args.pids_limit.is_some()),
        ("--volume", !args.volume.is_empty()),
        ("--tmpfs", !args.tmpfs.is_empty()),
        ("--cap-add", !args.cap_add.is_empty()),
        ("--cap-drop", !args.cap_drop.is_empty()),
        ("--security-opt", !args.security_opt.is_empty()),
        ("--sysctl", !args.sysctl.is_empty()),
        ("--ulimit", !args.ulimit.is_empty()),
    ];
    match given.iter().find(|(_, is_given)| *is_given) {
        Some((option, _)) => {
            bail!("a bundle's specification is used as it is: write into its config.json what {option} asks for")
        }
        None => Ok(()),
    }
}
