//! The images that `pull` and `load` keep: one OCI layout, whose blobs are shared by all images.
//!
//! ```text
//!   IMAGES/index.json        each image with its name, if it has one; written by rename
//!   IMAGES/blobs/sha256/...  complete and verified
//!   IMAGES/ingest/NAME       being written by the holder of .NAME.lock
//!   IMAGES/lock              held shared while images are added or opened, exclusive while they are removed
//!   IMAGES/.index.lock       held while index.json is changed; taken after `lock`
//! ```
//! An image is named last, when all of it is there: whatever dies before leaves blobs that no name leads to.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use oci_spec::distribution::Reference;
use oci_spec::image::{
    Descriptor, DescriptorBuilder, ImageIndex, ImageIndexBuilder, ImageManifest, ImageManifestBuilder, MediaType,
};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::digest::{Digest, HashingReader};
use super::layers::{self, Compression, Layer};
use super::layout::{self, ImageSource, Layout, REF_NAME};
use super::lock::NameLock;
use super::progress::Progress;
use super::reference;

/// The annotation of an image's size unpacked, in bytes.
const SIZE: &str = "vmrun.size";

/// The store below a data root, locked.
pub(crate) struct Store {
    root: PathBuf,
    layer_dir: PathBuf,
    lock: File,
}

/// An image in the store.
#[derive(Clone, Debug)]
pub(crate) struct StoredImage {
    /// Its name; none once another image has taken it.
    pub(crate) reference: Option<Reference>,
    /// Digest of its configuration.
    pub(crate) id: Digest,
    /// Digest of its manifest.
    pub(crate) digest: Digest,
    /// When it was made, as its author says.
    pub(crate) created: Option<String>,
    /// Bytes of its files.
    pub(crate) size: u64,
    descriptor: Descriptor,
}

impl Store {
    /// Opens the store, making it when it is not there, for adding and reading images.
    pub(crate) fn open(data_root: &Path) -> Result<Self> {
        let root = data_root.join("images");
        for dir in ["blobs/sha256", "ingest"] {
            let path = root.join(dir);
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
            made.with_context(|| format!("cannot make {}", path.display()))?;
        }
        let marker = root.join("oci-layout");
        if !marker.exists() {
            fs::write(&marker, r#"{"imageLayoutVersion":"1.0.0"}"#)
                .with_context(|| format!("cannot write {}", marker.display()))?;
        }
        let lock = File::create(root.join("lock")).context("cannot lock the image store")?;
        flock(&lock, FlockOperation::LockShared).context("cannot lock the image store")?;
        Ok(Self { root, layer_dir: super::layer_dir(data_root), lock })
    }

    /// Waits until nobody adds or opens images.
    fn lock_exclusive(&self) -> Result<()> {
        if flock(&self.lock, FlockOperation::NonBlockingLockExclusive) == Err(Errno::WOULDBLOCK) {
            eprintln!("vmrun: waiting for another vmrun that uses the image store");
            flock(&self.lock, FlockOperation::LockExclusive)?;
        }
        Ok(())
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }

    fn layout(&self) -> Layout {
        Layout::Directory(self.root.clone())
    }

    fn index(&self) -> Result<Vec<Descriptor>> {
        if !self.root.join("index.json").exists() {
            return Ok(Vec::new());
        }
        let index = self.layout().index().with_context(|| format!("bad image store {}", self.root.display()))?;
        Ok(index.manifests().clone())
    }

    fn write_index(&self, manifests: Vec<Descriptor>) -> Result<()> {
        let index: ImageIndex = ImageIndexBuilder::default()
            .schema_version(2_u32)
            .media_type(MediaType::ImageIndex)
            .manifests(manifests)
            .build()?;
        let (path, new) = (self.root.join("index.json"), self.root.join("index.json.new"));
        let write = || {
            let mut file = File::create(&new)?;
            file.write_all(&serde_json::to_vec_pretty(&index)?)?;
            file.sync_all()?;
            fs::rename(&new, &path)
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }

    /// Every image, in the order in which they came.
    pub(crate) fn list(&self) -> Result<Vec<StoredImage>> {
        self.index()?.into_iter().map(|descriptor| self.describe(descriptor)).collect()
    }

    fn describe(&self, descriptor: Descriptor) -> Result<StoredImage> {
        let source = self.layout().resolve(&descriptor, 0)?;
        let size = descriptor.annotations().as_ref().and_then(|a| a.get(SIZE)).and_then(|size| size.parse().ok());
        Ok(StoredImage {
            reference: layout::name_of(&descriptor).and_then(|name| reference::parse(name).ok()),
            id: Digest::of(&source.config_bytes),
            digest: Digest::parse(descriptor.digest().as_ref())?,
            created: source.config.created().clone(),
            size: size.unwrap_or_default(),
            descriptor,
        })
    }

    /// The image with a name, or with an id that begins so.
    pub(crate) fn find(&self, name: &str) -> Result<Option<StoredImage>> {
        let images = self.list()?;
        let reference = reference::parse(name).ok();
        if let Some(image) = images.iter().find(|image| reference.is_some() && image.reference == reference) {
            return Ok(Some(image.clone()));
        }
        let prefix = name.strip_prefix("sha256:").unwrap_or(name);
        if prefix.len() < 4 {
            return Ok(None);
        }
        let mut found = images.into_iter().filter(|image| image.id.hex().starts_with(prefix));
        let first = found.next();
        match (&first, found.find(|other| Some(&other.id) != first.as_ref().map(|first| &first.id))) {
            (Some(_), Some(_)) => bail!("several images have an id that begins with {prefix}: write more of it"),
            _ => Ok(first),
        }
    }

    /// The documents and layers of an image.
    pub(super) fn source(&self, image: &StoredImage) -> Result<ImageSource> {
        self.layout().resolve(&image.descriptor, 0)
    }

    /// The image of a manifest that is in the store and not yet in its index.
    pub(super) fn source_of(&self, manifest: &Descriptor) -> Result<ImageSource> {
        self.layout().resolve(manifest, 0)
    }

    /// Begins to write a blob; none when the store has it. Waits for a process that writes the same.
    pub(super) fn ingest(&self, name: &str, digest: Option<&Digest>) -> Result<Option<Ingest>> {
        let lock = NameLock::wait(&self.root.join("ingest"), name)?;
        if digest.is_some_and(|digest| self.blob_path(digest).exists()) {
            return Ok(None);
        }
        let path = self.root.join("ingest").join(name);
        let file = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Some(Ingest { path, file, _lock: lock }))
    }

    /// Puts a written blob in its place.
    pub(super) fn commit(&self, ingest: &Ingest, digest: &Digest) -> Result<()> {
        ingest.file.sync_all().context("cannot write the blob to the disk")?;
        fs::rename(&ingest.path, self.blob_path(digest)).context("cannot put the blob in place")
    }

    /// Copies a blob into the store.
    fn copy(&self, name: &str, digest: Option<&Digest>, content: impl io::Read) -> Result<(Digest, u64)> {
        let Some(mut ingest) = self.ingest(name, digest)? else {
            let digest = digest.context("a blob without a name cannot be there")?.clone();
            let len = fs::metadata(self.blob_path(&digest))?.len();
            return Ok((digest, len));
        };
        let mut content = HashingReader::new(content);
        io::copy(&mut content, &mut ingest.file).context("cannot copy it into the image store")?;
        let (actual, len) = content.finish();
        digest.map_or(Ok(()), |digest| digest.verify(&actual))?;
        self.commit(&ingest, &actual)?;
        Ok((actual, len))
    }

    /// Writes a document; returns its descriptor.
    pub(super) fn add_document(&self, media_type: MediaType, bytes: &[u8]) -> Result<Descriptor> {
        let digest = Digest::of(bytes);
        self.copy(digest.hex(), Some(&digest), bytes)?;
        descriptor(media_type, &digest, bytes.len() as u64)
    }

    /// Copies an image into the store, without a name yet; returns its manifest's descriptor.
    pub(crate) fn import(&self, source: &ImageSource) -> Result<Descriptor> {
        let config = self.add_document(MediaType::ImageConfig, &source.config_bytes)?;
        let mut layers = Vec::new();
        for layer in &source.layers {
            layers.push(self.import_layer(layer)?);
        }
        if let Some((manifest, bytes)) = &source.manifest {
            return self.add_document(manifest.media_type().clone(), bytes);
        }
        let manifest = ImageManifestBuilder::default()
            .schema_version(2_u32)
            .media_type(MediaType::ImageManifest)
            .config(config)
            .layers(layers)
            .build()?;
        self.add_document(MediaType::ImageManifest, &serde_json::to_vec(&manifest)?)
    }

    fn import_layer(&self, layer: &Layer) -> Result<Descriptor> {
        let name = match &layer.digest {
            Some(digest) => digest.hex().to_owned(),
            None => format!("diff-{}", layer.diff_id.hex()),
        };
        let shown = layer.digest.as_ref().unwrap_or(&layer.diff_id);
        let (digest, len) = self
            .copy(&name, layer.digest.as_ref(), layer.content.clone())
            .with_context(|| format!("cannot import layer {shown}"))?;
        let media_type = match layer.compression {
            Compression::None => MediaType::ImageLayer,
            Compression::Gzip => MediaType::ImageLayerGzip,
            Compression::Zstd => MediaType::ImageLayerZstd,
        };
        descriptor(media_type, &digest, len)
    }

    /// Unpacks the layers of an image that is in the store, then lists it under its name.
    pub(crate) fn add(
        &self,
        manifest: Descriptor,
        name: Option<&Reference>,
        progress: &Progress,
    ) -> Result<StoredImage> {
        let source = self.source_of(&manifest)?;
        let unpacked = layers::unpack_all(&source.layers, &self.layer_dir, progress)?;
        let size: u64 = unpacked.iter().map(|layer| layers::content_size(&self.layer_dir.join(&layer.name))).sum();
        let mut annotations = HashMap::from([(SIZE.to_owned(), size.to_string())]);
        annotations.extend(name.map(|name| (REF_NAME.to_owned(), name.to_string())));
        let mut listed = manifest;
        listed.set_annotations(Some(annotations));
        let _lock = NameLock::wait(&self.root, "index")?;
        let mut manifests = self.index()?;
        manifests.retain(|other| other.digest() != listed.digest() || layout::name_of(other).is_some());
        let known: BTreeSet<_> =
            manifests.iter().filter(|m| m.digest() == listed.digest()).filter_map(layout::name_of).collect();
        if name.is_none() && !known.is_empty() {
            return self.describe(listed);
        }
        release_name(&mut manifests, &listed);
        manifests.push(listed.clone());
        self.write_index(manifests)?;
        self.describe(listed)
    }

    /// Removes names or an image. `users` are containers and the image that each asked for. Returns what was done, in Docker's
    /// words.
    pub(crate) fn remove(&self, name: &str, force: bool, users: &[(String, String)]) -> Result<Vec<String>> {
        self.lock_exclusive()?;
        let Some(image) = self.find(name)? else {
            bail!("no such image: {name}; `vmrun images` lists those that are here")
        };
        let all: Vec<_> = self.list()?.into_iter().filter(|other| other.id == image.id).collect();
        let by_name = reference::parse(name).is_ok_and(|reference| image.reference.as_ref() == Some(&reference));
        let removed: Vec<_> = if by_name { vec![image.clone()] } else { all.clone() };
        let shown: Vec<_> = removed.iter().filter_map(|i| i.reference.as_ref()).map(reference::familiar).collect();
        if shown.len() > 1 && !force {
            bail!("image {name} has several names, {}: remove each by name, or all with --force", shown.join(", "));
        }
        let is_last = removed.len() == all.len();
        for (container, asked) in users {
            if is_last && self.find(asked)?.is_some_and(|used| used.id == image.id) {
                bail!("image {name} is used by container {container}: remove that with `vmrun rm {container}` first");
            }
        }
        let diff_ids = self.source(&image)?.layers.into_iter().map(|layer| layer.diff_id).collect();
        let mut manifests = self.index()?;
        manifests.retain(|manifest| !removed.iter().any(|image| image.descriptor == *manifest));
        self.write_index(manifests)?;
        let mut done: Vec<_> = shown.iter().map(|name| format!("Untagged: {name}")).collect();
        if is_last {
            self.remove_unused(&diff_ids)?;
            done.push(format!("Deleted: {}", image.id));
        }
        Ok(done)
    }

    /// After a failure: removes what no name leads to, unless another process is adding images.
    pub(crate) fn clean_up(&self) {
        if flock(&self.lock, FlockOperation::NonBlockingLockExclusive).is_ok()
            && let Err(error) = self.remove_unused(&BTreeSet::new())
        {
            tracing::warn!(error = format!("{error:#}"), "cannot remove what is left of an image");
        }
    }

    /// Fails unless the configuration of an image fits this host.
    pub(super) fn check_config(&self, manifest: &Descriptor) -> Result<()> {
        let layout = self.layout();
        let manifest: ImageManifest = serde_json::from_slice(&layout.document(manifest)?)?;
        let config = layout::parse_config(&layout.document(manifest.config())?)?;
        layout::check_layers(manifest.layers().len(), &config)
    }

    /// Like [`Store::add`], under each of several names, or without one.
    pub(crate) fn add_named(
        &self,
        manifest: &Descriptor,
        names: &[Reference],
        progress: &Progress,
    ) -> Result<Vec<StoredImage>> {
        if names.is_empty() {
            return Ok(vec![self.add(manifest.clone(), None, progress)?]);
        }
        names.iter().map(|name| self.add(manifest.clone(), Some(name), progress)).collect()
    }

    /// Removes blobs that no image has, and those of some layers that no image and no container has. The store is locked.
    fn remove_unused(&self, candidates: &BTreeSet<Digest>) -> Result<()> {
        let (mut blobs, mut diff_ids) = (BTreeSet::new(), BTreeSet::new());
        for descriptor in self.index()? {
            let source = self.source_of(&descriptor)?;
            blobs.insert(Digest::parse(descriptor.digest().as_ref())?);
            blobs.insert(Digest::of(&source.config_bytes));
            for layer in source.layers {
                blobs.extend(layer.digest);
                diff_ids.insert(layer.diff_id);
            }
        }
        for entry in fs::read_dir(self.root.join("blobs/sha256"))? {
            let entry = entry?;
            if !blobs.iter().any(|digest| entry.file_name() == digest.hex()) {
                fs::remove_file(entry.path()).with_context(|| format!("cannot remove {}", entry.path().display()))?;
            }
        }
        for unused in candidates.difference(&diff_ids) {
            layers::remove(&self.layer_dir, layers::folder_name(unused))?;
        }
        remove_dead_ingests(&self.root.join("ingest"));
        Ok(())
    }
}

/// A name belongs to one image: whichever had it stays, without a name unless it has another.
fn release_name(manifests: &mut Vec<Descriptor>, taker: &Descriptor) {
    let Some(name) = layout::name_of(taker) else { return };
    let Some(at) = manifests.iter().position(|m| layout::name_of(m) == Some(name)) else { return };
    let mut released = manifests.remove(at);
    if manifests.iter().chain([taker]).any(|other| other.digest() == released.digest()) {
        return;
    }
    let mut annotations = released.annotations().clone().unwrap_or_default();
    annotations.remove(REF_NAME);
    released.set_annotations(Some(annotations));
    manifests.push(released);
}

fn descriptor(media_type: MediaType, digest: &Digest, len: u64) -> Result<Descriptor> {
    let digest: oci_spec::image::Digest = digest.to_string().parse()?;
    Ok(DescriptorBuilder::default().media_type(media_type).digest(digest).size(len).build()?)
}

/// Removes what processes left that died while they wrote a blob.
fn remove_dead_ingests(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with('.')
            && let Ok(Some(_lock)) = NameLock::attempt(dir, &name)
        {
            // Another process may be faster.
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// A blob that is being written; removed when dropped before it is committed.
pub(super) struct Ingest {
    path: PathBuf,
    pub(super) file: File,
    _lock: NameLock,
}

impl Drop for Ingest {
    fn drop(&mut self) {
        // It is not there any more when it was committed.
        let _ = fs::remove_file(&self.path);
    }
}
