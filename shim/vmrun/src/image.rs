//! What IMAGE on the command line may be, and what a container takes from it. `vmrun run` calls [`open`].

use std::fs::{self, DirBuilder};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use oci_spec::distribution::Reference;
use oci_spec::image::ImageConfiguration;
use oci_spec::runtime::Spec;

mod archive;
mod blob;
mod bundle;
mod child;
mod credentials;
mod digest;
mod docker_archive;
mod entries;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod layers;
mod layout;
mod lock;
mod progress;
mod reference;
mod registry;
mod store;

use archive::ArchiveFile;
pub(crate) use bundle::container as bundle_container;
pub(crate) use child::unpack_child;
use layers::UnpackedLayer;
use layout::{ImageSource, Layout};
use progress::Progress;
pub(crate) use reference::{familiar, familiar_repository};
use store::Store;
pub(crate) use store::StoredImage;

/// An image ready to run: its layers on disk and what its author asked for.
#[derive(Debug, Default)]
pub(crate) struct Image {
    /// Layer directories, topmost first, absolute or relative to `layer_dir`.
    pub(crate) layers: Vec<PathBuf>,
    /// Folder of the layers.
    pub(crate) layer_dir: PathBuf,
    /// Digest of the configuration; none for a plain directory.
    pub(crate) id: Option<String>,
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
    /// `Volumes` of the image: directories that must be writable.
    pub(crate) volumes: Vec<String>,
    /// The specification of a bundle, which is used in place of all the above.
    pub(crate) bundle: Option<Box<Spec>>,
    /// As long as these live, nobody removes the layers: keep the image until its container has ended.
    in_use: Vec<UnpackedLayer>,
}

impl Image {
    /// Makes the directories of the image's volumes that it has not.
    pub(crate) fn make_volumes(&self, tree: &OwnedFd) -> Result<()> {
        for path in &self.volumes {
            sandbox::share::make_dirs_in_tree(tree, Path::new(path))
                .with_context(|| format!("cannot make the image's volume {path}"))?;
        }
        Ok(())
    }
}

/// When to ask a registry.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum PullPolicy {
    /// Each time.
    Always,
    /// When the image is not in the store.
    #[default]
    Missing,
    /// Not at all.
    Never,
}

/// How to get an image.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct OpenOptions {
    /// When to ask a registry.
    pub(crate) pull: PullPolicy,
    /// No progress on standard error.
    pub(crate) quiet: bool,
    /// HTTP, also with a registry that is not on this machine.
    pub(crate) plain_http: bool,
}

/// Finds an image, fetching and unpacking it when that has not been done yet.
pub(crate) fn open(name: &str, data_root: &Path, options: OpenOptions) -> Result<Image> {
    let (form, rest) = name.split_once(':').unwrap_or_default();
    let source = match form {
        "rootfs" => return open_rootfs(Path::new(rest)),
        "bundle" => return bundle::open(Path::new(rest)),
        "oci" => open_layout(rest),
        "oci-archive" => open_oci_archive(rest, data_root),
        "docker-archive" => open_docker_archive(rest, data_root),
        _ => return open_stored(name, data_root, options),
    };
    let source = source.with_context(|| format!("cannot use the image {name}"))?;
    unpack(&source, data_root, &Progress::new(options.quiet))
}

fn open_layout(rest: &str) -> Result<ImageSource> {
    let (dir, tag) = layout::split_name(rest);
    Layout::Directory(fs::canonicalize(dir).with_context(|| format!("cannot open {}", dir.display()))?).image(tag)
}

fn open_oci_archive(rest: &str, data_root: &Path) -> Result<ImageSource> {
    let (path, tag) = layout::split_name(rest);
    Layout::Archive(ArchiveFile::open(path, &temporary(data_root)?)?).image(tag)
}

fn open_docker_archive(rest: &str, data_root: &Path) -> Result<ImageSource> {
    let (path, name) = layout::split_name(rest);
    let archive = ArchiveFile::open(path, &temporary(data_root)?)?;
    docker_archive::source(&archive, docker_archive::select(&docker_archive::images(&archive)?, name)?)
}

fn open_stored(name: &str, data_root: &Path, options: OpenOptions) -> Result<Image> {
    let store = Store::open(data_root)?;
    let found = if options.pull == PullPolicy::Always { None } else { store.find(name)? };
    let stored = match found {
        Some(stored) => stored,
        None => {
            let reference = reference::parse(name).context(FORMS)?;
            if options.pull == PullPolicy::Never {
                bail!("image {name} is not here: fetch it with `vmrun pull {name}`, or leave --pull never out");
            }
            if options.pull == PullPolicy::Missing && !options.quiet {
                eprintln!("Unable to find image '{}' locally", familiar(&reference));
            }
            fetch(&store, &reference, options)?
        }
    };
    unpack(&store.source(&stored)?, data_root, &Progress::new(options.quiet))
}

/// What IMAGE may be.
const FORMS: &str = "an image is NAME[:TAG] in a registry, oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:NAME], \
                     rootfs:DIR or bundle:DIR";

/// Fetches an image from its registry.
pub(crate) fn pull(name: &str, data_root: &Path, options: OpenOptions) -> Result<StoredImage> {
    require_root()?;
    let reference = reference::parse(name)?;
    fetch(&Store::open(data_root)?, &reference, options)
}

fn fetch(store: &Store, reference: &Reference, options: OpenOptions) -> Result<StoredImage> {
    let progress = Progress::new(options.quiet);
    registry::pull(reference, options.plain_http, store, &progress)
        .and_then(|manifest| store.add(manifest, Some(reference), &progress))
        .with_context(|| format!("cannot pull {}", familiar(reference)))
        .inspect_err(|_| store.clean_up())
}

/// Keeps the images of an archive; without a path, of standard input.
pub(crate) fn load(path: Option<&Path>, data_root: &Path, options: OpenOptions) -> Result<Vec<StoredImage>> {
    require_root()?;
    let (store, progress) = (Store::open(data_root)?, Progress::new(options.quiet));
    let archive = match path {
        Some(path) => ArchiveFile::open(path, data_root)?,
        None => ArchiveFile::copy_from(std::io::stdin().lock(), data_root)?,
    };
    load_archive(archive, &store, &progress).context("cannot load the archive").inspect_err(|_| store.clean_up())
}

fn load_archive(archive: ArchiveFile, store: &Store, progress: &Progress) -> Result<Vec<StoredImage>> {
    let mut loaded = Vec::new();
    if archive.has("manifest.json") {
        for saved in docker_archive::images(&archive)? {
            let names =
                saved.repo_tags.iter().flatten().map(|name| reference::parse(name)).collect::<Result<Vec<_>>>()?;
            let manifest = store.import(&docker_archive::source(&archive, &saved)?)?;
            loaded.extend(store.add_named(&manifest, &names, progress)?);
        }
        return Ok(loaded);
    }
    let layout = Layout::Archive(archive);
    for descriptor in layout.index()?.manifests() {
        // Tools differ in whether the annotation is a whole name or only a tag, which names nothing.
        let name = layout::name_of(descriptor).filter(|name| name.contains(['/', ':']));
        let names = name.map(reference::parse).transpose()?.into_iter().collect::<Vec<_>>();
        let manifest = store.import(&layout.resolve(descriptor, 0)?)?;
        loaded.extend(store.add_named(&manifest, &names, progress)?);
    }
    Ok(loaded)
}

/// The images of the store.
pub(crate) fn list(data_root: &Path) -> Result<Vec<StoredImage>> {
    Store::open(data_root)?.list()
}

/// Removes an image or one of its names; `users` are containers and the image that each asked for.
pub(crate) fn remove(name: &str, data_root: &Path, force: bool, users: &[(String, String)]) -> Result<Vec<String>> {
    Store::open(data_root)?.remove(name, force, users)
}

fn require_root() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("layers hold files of every owner: run it as root");
    }
    Ok(())
}

/// Folder of unpacked layers.
fn layer_dir(data_root: &Path) -> PathBuf {
    data_root.join("layers")
}

/// Folder for files that have no name.
fn temporary(data_root: &Path) -> Result<PathBuf> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(data_root)
        .with_context(|| format!("cannot make {}", data_root.display()))?;
    Ok(data_root.to_owned())
}

fn unpack(source: &ImageSource, data_root: &Path, progress: &Progress) -> Result<Image> {
    let layer_dir = layer_dir(data_root);
    layers::remove_unfinished(&layer_dir);
    let in_use = layers::unpack_all(&source.layers, &layer_dir, progress)?;
    let mut image = of_config(&source.config);
    image.id = Some(digest::Digest::of(&source.config_bytes).to_string());
    image.layers = stack(&in_use);
    tracing::debug!(id = image.id, layers = image.layers.len(), stop_signal = image.stop_signal, "image ready");
    image.layer_dir = layer_dir;
    image.in_use = in_use;
    Ok(image)
}

/// The layers for overlayfs, topmost first. It refuses a directory twice, of which the upper one says all; and it takes no
/// notice of a root that hides what is below.
fn stack(lowest_first: &[UnpackedLayer]) -> Vec<PathBuf> {
    let mut stacked: Vec<PathBuf> = Vec::new();
    for layer in lowest_first.iter().rev() {
        if !stacked.contains(&layer.name) {
            stacked.push(layer.name.clone());
        }
        if layer.opaque {
            break;
        }
    }
    stacked
}

fn of_config(config: &ImageConfiguration) -> Image {
    let run = config.config().clone().unwrap_or_default();
    let not_empty = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    Image {
        entrypoint: run.entrypoint().clone().unwrap_or_default(),
        cmd: run.cmd().clone().unwrap_or_default(),
        env: run.env().clone().unwrap_or_default(),
        workdir: not_empty(run.working_dir()),
        user: not_empty(run.user()),
        stop_signal: not_empty(run.stop_signal()),
        volumes: run.volumes().clone().unwrap_or_default(),
        ..Image::default()
    }
}

fn open_rootfs(dir: &Path) -> Result<Image> {
    let dir = fs::canonicalize(dir).with_context(|| format!("cannot use the root file system {}", dir.display()))?;
    if !dir.is_dir() {
        bail!("{} is not a directory", dir.display());
    }
    Ok(Image { layers: vec![dir], layer_dir: PathBuf::from("/"), cmd: vec!["/bin/sh".to_owned()], ..Image::default() })
}

#[cfg(test)]
mod tests {
    use super::{layout, of_config};

    #[test]
    fn labels_of_an_image_choose_nothing() {
        let image = |labels: &str| {
            let config = format!(
                r#"{{"architecture": "amd64", "os": "linux", "rootfs": {{"type": "layers", "diff_ids": ["a"]}},
                "config": {{"Cmd": ["true"], "Labels": {labels}}}}}"#
            );
            format!("{:?}", of_config(&layout::parse_config(config.as_bytes()).expect("a configuration")))
        };
        let labels = r#"{"containerd.io/restart.loguri": "binary:///bin/sh", "io.cri-containerd.image": "managed"}"#;
        assert_eq!(image(labels), image("{}"));
        assert!(image(labels).contains("true"));
    }
}
