//! What IMAGE on the command line may be, and what a container takes from it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use oci_spec::image::{ImageConfiguration, ImageIndex, ImageManifest};

mod child;
mod unpack;

pub(crate) use child::unpack_child;

/// An image ready to run: its layers on disk and what its author asked for.
#[derive(Debug)]
pub(crate) struct Image {
    /// Layer directories, topmost first, absolute or relative to `layer_dir`.
    pub(crate) layers: Vec<PathBuf>,
    /// Folder of the layers.
    pub(crate) layer_dir: PathBuf,
    /// `Entrypoint` of the image.
    pub(crate) entrypoint: Vec<String>,
    /// `Cmd` of the image.
    pub(crate) cmd: Vec<String>,
    /// `Env` of the image.
    pub(crate) env: Vec<String>,
    /// `WorkingDir` of the image.
    pub(crate) workdir: Option<String>,
    /// `User` of the image.
    pub(crate) user: Option<String>,
    /// `StopSignal` of the image.
    pub(crate) stop_signal: Option<String>,
}

/// Finds an image, unpacking it when that has not been done yet.
pub(crate) fn open(name: &str, data_root: &Path) -> Result<Image> {
    match name.split_once(':') {
        Some(("rootfs", dir)) => open_rootfs(Path::new(dir)),
        Some(("oci", rest)) => open_layout(rest, data_root),
        _ => bail!("image {name:?} has no known form; write rootfs:DIR or oci:DIR[:TAG]"),
    }
}

fn open_rootfs(dir: &Path) -> Result<Image> {
    let dir = fs::canonicalize(dir).with_context(|| format!("cannot use the root file system {}", dir.display()))?;
    if !dir.is_dir() {
        bail!("{} is not a directory", dir.display());
    }
    Ok(Image {
        layers: vec![dir],
        layer_dir: PathBuf::from("/"),
        entrypoint: Vec::new(),
        cmd: vec!["/bin/sh".to_owned()],
        env: Vec::new(),
        workdir: None,
        user: None,
        stop_signal: None,
    })
}

/// Image layout (OCI image-spec, image-layout.md).
fn open_layout(rest: &str, data_root: &Path) -> Result<Image> {
    let (dir, tag) = match rest.rsplit_once(':') {
        Some((dir, tag)) if !tag.contains('/') => (dir, Some(tag)),
        _ => (rest, None),
    };
    let dir = fs::canonicalize(dir).with_context(|| format!("cannot open the image layout {dir}"))?;
    let index: ImageIndex = read_json(&dir.join("index.json"))?;
    let manifests = index.manifests();
    let name_of = |m: &oci_spec::image::Descriptor| {
        m.annotations().as_ref().and_then(|a| a.get("org.opencontainers.image.ref.name").cloned())
    };
    let descriptor = match tag {
        Some(tag) => manifests.iter().find(|m| name_of(m).as_deref() == Some(tag)),
        None => manifests.first(),
    };
    let Some(descriptor) = descriptor else {
        let known: Vec<String> = manifests.iter().filter_map(name_of).collect();
        bail!("{} has no image {:?}; it has: {}", dir.display(), tag.unwrap_or("at all"), known.join(", "));
    };
    let manifest: ImageManifest =
        serde_json::from_slice(&unpack::read_blob(&dir, descriptor)?).context("bad manifest")?;
    let config_bytes = unpack::read_blob(&dir, manifest.config())?;
    let config: ImageConfiguration = serde_json::from_slice(&config_bytes).context("bad image configuration")?;
    let layer_dir = data_root.join("layers");
    let mut layers = Vec::new();
    for (layer, diff_id) in manifest.layers().iter().zip(config.rootfs().diff_ids()) {
        layers.push(unpack::layer(&dir, layer, diff_id, &layer_dir)?);
    }
    layers.reverse();
    let run = config.config().clone().unwrap_or_default();
    Ok(Image {
        layers,
        layer_dir,
        entrypoint: run.entrypoint().clone().unwrap_or_default(),
        cmd: run.cmd().clone().unwrap_or_default(),
        env: run.env().clone().unwrap_or_default(),
        workdir: run.working_dir().clone(),
        user: run.user().clone(),
        stop_signal: run.stop_signal().clone(),
    })
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("{} is not what it should be", path.display()))
}
