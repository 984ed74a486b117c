//! OCI image layouts (image-spec, image-layout.md): from a name to the documents and layers of an image. The layout is a
//! directory, an archive of one, or the store.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use oci_spec::image::{Descriptor, ImageConfiguration, ImageIndex, ImageManifest};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::archive::ArchiveFile;
use super::blob::Section;
use super::digest::Digest;
use super::layers::{Compression, Layer};

/// The annotation that names an image in an index (image-spec, annotations.md).
pub(super) const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Most layers of an image, as Docker's.
const MAX_LAYERS: usize = 127;
/// An index may hold indices.
const MAX_INDEX_DEPTH: usize = 3;

/// Where the files of a layout are.
pub(super) enum Layout {
    /// A directory.
    Directory(PathBuf),
    /// A tar archive.
    Archive(ArchiveFile),
}

/// The documents of an image, verified, and its layers, not yet.
pub(super) struct ImageSource {
    /// The manifest's descriptor and bytes; none where the archive has none.
    pub(super) manifest: Option<(Descriptor, Vec<u8>)>,
    pub(super) config: ImageConfiguration,
    pub(super) config_bytes: Vec<u8>,
    /// Lowest first, each with its media type if a manifest says it.
    pub(super) layers: Vec<Layer>,
}

impl Layout {
    /// Opens a file by its name in the layout.
    pub(super) fn file(&self, name: &str) -> Result<Section> {
        match self {
            Self::Directory(dir) => Section::open(&dir.join(name)),
            Self::Archive(archive) => archive.member(name),
        }
    }

    fn blob(&self, digest: &Digest) -> Result<Section> {
        self.file(&format!("blobs/sha256/{}", digest.hex()))
    }

    /// Reads a document and verifies it.
    pub(super) fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        let digest = Digest::parse(descriptor.digest().as_ref())?;
        self.blob(&digest)?.read_verified(&digest)
    }

    /// Reads `index.json`.
    pub(super) fn index(&self) -> Result<ImageIndex> {
        let bytes = self.file("index.json")?.read_document()?;
        serde_json::from_slice(&bytes).context("index.json is not an image index")
    }

    /// The image with a tag, or the only one.
    pub(super) fn image(&self, tag: Option<&str>) -> Result<ImageSource> {
        let index = self.index()?;
        self.resolve(select(index.manifests(), tag)?, 0)
    }

    /// The image of a descriptor: a manifest, or an index of manifests for several platforms.
    pub(super) fn resolve(&self, descriptor: &Descriptor, depth: usize) -> Result<ImageSource> {
        let bytes = self.document(descriptor)?;
        match document_kind(descriptor.media_type().as_ref(), &bytes)? {
            DocumentKind::Index if depth < MAX_INDEX_DEPTH => {
                let index: ImageIndex = serde_json::from_slice(&bytes).context("bad image index")?;
                self.resolve(select_platform(index.manifests())?, depth + 1)
            }
            DocumentKind::Index => bail!("indices are nested more than {MAX_INDEX_DEPTH} deep"),
            DocumentKind::Manifest => self.image_of_manifest(descriptor, bytes),
        }
    }

    fn image_of_manifest(&self, descriptor: &Descriptor, bytes: Vec<u8>) -> Result<ImageSource> {
        let manifest: ImageManifest = serde_json::from_slice(&bytes).context("bad manifest")?;
        let config_bytes = self.document(manifest.config()).context("cannot read the image's configuration")?;
        let config = parse_config(&config_bytes)?;
        check_layers(manifest.layers().len(), &config)?;
        let mut layers = Vec::new();
        for (layer, diff_id) in manifest.layers().iter().zip(config.rootfs().diff_ids()) {
            let digest = Digest::parse(layer.digest().as_ref())?;
            let compression = Compression::of_media_type(layer.media_type().as_ref())?;
            let content = self.blob(&digest)?;
            layers.push(Layer { digest: Some(digest), diff_id: Digest::parse(diff_id)?, compression, content });
        }
        Ok(ImageSource { manifest: Some((descriptor.clone(), bytes)), config, config_bytes, layers })
    }
}

/// Reads a configuration; refuses one for another platform.
pub(super) fn parse_config(bytes: &[u8]) -> Result<ImageConfiguration> {
    let config: ImageConfiguration = serde_json::from_slice(bytes).context("bad image configuration")?;
    let (os, arch) = (config.os().to_string(), config.architecture().to_string());
    if (os.as_str(), arch.as_str()) != ("linux", "amd64") {
        bail!("the image is for {os}/{arch}, and this host runs linux/amd64: use an image for that platform");
    }
    Ok(config)
}

/// Each layer has one diff id.
pub(super) fn check_layers(layer_count: usize, config: &ImageConfiguration) -> Result<()> {
    let diff_id_count = config.rootfs().diff_ids().len();
    if layer_count != diff_id_count {
        bail!("the manifest names {layer_count} layers, the configuration {diff_id_count}");
    }
    if layer_count == 0 || layer_count > MAX_LAYERS {
        bail!("the image has {layer_count} layers: it must have 1 to {MAX_LAYERS}");
    }
    Ok(())
}

/// What a descriptor leads to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum DocumentKind {
    Index,
    Manifest,
}

/// Decides by media type, and refuses a document that could be read as the other kind (CVE-2021-41190).
pub(super) fn document_kind(media_type: &str, bytes: &[u8]) -> Result<DocumentKind> {
    #[derive(Deserialize)]
    struct Shape {
        manifests: Option<IgnoredAny>,
        layers: Option<IgnoredAny>,
        config: Option<IgnoredAny>,
    }
    let shape: Shape = serde_json::from_slice(bytes).context("a manifest is not JSON")?;
    let is_index = shape.manifests.is_some();
    let is_manifest = shape.layers.is_some() || shape.config.is_some();
    match media_type {
        "application/vnd.oci.image.index.v1+json" | "application/vnd.docker.distribution.manifest.list.v2+json"
            if is_index && !is_manifest =>
        {
            Ok(DocumentKind::Index)
        }
        "application/vnd.oci.image.manifest.v1+json" | "application/vnd.docker.distribution.manifest.v2+json"
            if is_manifest && !is_index =>
        {
            Ok(DocumentKind::Manifest)
        }
        other if is_index == is_manifest => bail!("a document of type {other:?} is neither a manifest nor an index"),
        other => bail!("a document has the media type {other:?} and the content of something else"),
    }
}

/// The name that an index gives to one of its images.
pub(super) fn name_of(descriptor: &Descriptor) -> Option<&str> {
    descriptor.annotations().as_ref()?.get(REF_NAME).map(String::as_str)
}

fn select<'a>(manifests: &'a [Descriptor], tag: Option<&str>) -> Result<&'a Descriptor> {
    let names = || manifests.iter().filter_map(name_of).collect::<Vec<_>>().join(", ");
    match (tag, manifests) {
        (_, []) => bail!("the index names no image"),
        (Some(tag), _) => {
            let named: Vec<_> = manifests.iter().filter(|m| name_of(m) == Some(tag)).collect();
            match named.as_slice() {
                [] => bail!("no image is tagged {tag:?}; it has: {}", names()),
                [one] => Ok(*one),
                several => select_platform(several.iter().copied()),
            }
        }
        (None, [one]) => Ok(one),
        (None, several) if several.iter().all(|m| name_of(m) == name_of(&several[0])) => select_platform(several),
        (None, _) => bail!("there are several images, add the tag of one: {}", names()),
    }
}

/// The manifest for this platform.
pub(super) fn select_platform<'a>(manifests: impl IntoIterator<Item = &'a Descriptor>) -> Result<&'a Descriptor> {
    let mut others = Vec::new();
    for manifest in manifests {
        let Some(platform) = manifest.platform() else { continue };
        let (os, arch) = (platform.os().to_string(), platform.architecture().to_string());
        if (os.as_str(), arch.as_str()) == ("linux", "amd64") {
            return Ok(manifest);
        }
        others.push(format!("{os}/{arch}"));
    }
    bail!("the image is not there for linux/amd64; it has: {}", others.join(", "))
}

/// Splits `PATH[:NAME]`, where both may have colons and slashes: the path is the longest part that exists.
pub(super) fn split_name(text: &str) -> (&Path, Option<&str>) {
    if Path::new(text).exists() {
        return (Path::new(text), None);
    }
    let split = text.char_indices().filter(|(_, c)| *c == ':').map(|(at, _)| (&text[..at], &text[at + 1..]));
    let found = split.rev().find(|(path, _)| Path::new(path).exists());
    found.map_or((Path::new(text), None), |(path, name)| (Path::new(path), Some(name)))
}

#[cfg(test)]
mod tests;
