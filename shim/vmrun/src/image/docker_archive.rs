//! What `docker save` writes: `manifest.json` beside the configurations and layers. Since Docker 25 the archive is an OCI
//! layout too; `manifest.json` is there all the same, and names the images in full.

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use super::archive::ArchiveFile;
use super::digest::Digest;
use super::layers::{Compression, Layer};
use super::layout::{ImageSource, check_layers, parse_config};
use super::reference;

/// One image of `manifest.json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct SavedImage {
    config: String,
    /// Names of the image; null for one without.
    pub(super) repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// Reads `manifest.json`.
pub(super) fn images(archive: &ArchiveFile) -> Result<Vec<SavedImage>> {
    let bytes = archive.member("manifest.json")?.read_document()?;
    serde_json::from_slice(&bytes).context("manifest.json is not what `docker save` writes")
}

/// The image with a name, or the only one.
pub(super) fn select<'a>(images: &'a [SavedImage], name: Option<&str>) -> Result<&'a SavedImage> {
    let tags = |image: &'a SavedImage| image.repo_tags.iter().flatten();
    let known = || images.iter().flat_map(tags).cloned().collect::<Vec<_>>().join(", ");
    match (name, images) {
        (_, []) => bail!("manifest.json names no image"),
        (None, [one]) => Ok(one),
        (None, _) => bail!("there are several images, add the name of one: {}", known()),
        (Some(name), _) => {
            let wanted = reference::parse(name)?;
            let is_wanted = |tag: &String| reference::parse(tag).is_ok_and(|tag| tag == wanted);
            let found = images.iter().find(|image| tags(image).any(is_wanted));
            found.with_context(|| format!("no image is named {name:?}; it has: {}", known()))
        }
    }
}

/// The documents and layers of an image.
pub(super) fn source(archive: &ArchiveFile, image: &SavedImage) -> Result<ImageSource> {
    let config_bytes = archive.member(&image.config)?.read_document()?;
    if let Some(digest) = digest_in(&image.config) {
        digest.verify(&Digest::of(&config_bytes)).with_context(|| format!("bad file {:?}", image.config))?;
    }
    let config = parse_config(&config_bytes)?;
    check_layers(image.layers.len(), &config)?;
    let mut layers = Vec::new();
    for (name, diff_id) in image.layers.iter().zip(config.rootfs().diff_ids()) {
        let content = archive.member(name)?;
        let compression = Compression::of_content(&content)?;
        // The old form names folders, not contents: there the diff id alone says what the layer must be.
        let digest = name.starts_with("blobs/").then(|| digest_in(name)).flatten();
        layers.push(Layer { digest, diff_id: Digest::parse(diff_id)?, compression, content });
    }
    Ok(ImageSource { manifest: None, config, config_bytes, layers })
}

/// The digest that is a file's name: `blobs/sha256/<digits>` or `<digits>.json`.
fn digest_in(name: &str) -> Option<Digest> {
    let last = name.rsplit('/').next()?;
    Digest::parse(&format!("sha256:{}", last.strip_suffix(".json").unwrap_or(last))).ok()
}
