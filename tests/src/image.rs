//! Images made by a test: layers with chosen entries, written as an OCI layout or as what `docker save` writes.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

/// One layer: the bytes of its archive.
pub struct Layer(Builder<Vec<u8>>);

impl Default for Layer {
    fn default() -> Self {
        Self::new()
    }
}

impl Layer {
    /// A layer without entries.
    #[must_use]
    pub fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    /// A layer with busybox and its links in `bin`.
    ///
    /// # Panics
    /// When busybox-static is not installed.
    #[must_use]
    pub fn busybox() -> Self {
        let program = fs::read("/bin/busybox").expect("busybox-static is installed");
        let mut layer = Self::new();
        for folder in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
            layer = layer.dir(folder, 0o755);
        }
        layer = layer.file("bin/busybox", &program, 0o755);
        crate::applets()
            .iter()
            .fold(layer, |layer, name| layer.link(EntryType::Symlink, &format!("bin/{name}"), "busybox"))
    }

    /// Adds an entry of root's.
    #[must_use]
    pub fn entry(self, kind: EntryType, name: &str, data: &[u8], mode: u32) -> Self {
        self.owned(kind, name, data, mode, 0)
    }

    /// Adds an entry of a user and their group.
    ///
    /// # Panics
    /// When the name cannot be written.
    #[must_use]
    pub fn owned(mut self, kind: EntryType, name: &str, data: &[u8], mode: u32, owner: u64) -> Self {
        let mut header = header(kind, data.len(), mode, owner);
        self.0.append_data(&mut header, name, data).expect("an entry");
        self
    }

    /// Adds a directory.
    #[must_use]
    pub fn dir(self, name: &str, mode: u32) -> Self {
        self.entry(EntryType::Directory, name, b"", mode)
    }

    /// Adds a file.
    #[must_use]
    pub fn file(self, name: &str, data: &[u8], mode: u32) -> Self {
        self.entry(EntryType::Regular, name, data, mode)
    }

    /// Adds a symbolic or hard link.
    ///
    /// # Panics
    /// When a name cannot be written.
    #[must_use]
    pub fn link(mut self, kind: EntryType, name: &str, target: &str) -> Self {
        self.0.append_link(&mut header(kind, 0, 0o777, 0), name, target).expect("a link");
        self
    }

    /// Gives the next entry extended attributes.
    ///
    /// # Panics
    /// Never.
    #[must_use]
    pub fn xattr(mut self, name: &str, value: &[u8]) -> Self {
        let key = format!("SCHILY.xattr.{name}");
        self.0.append_pax_extensions([(key.as_str(), value)]).expect("an extended header");
        self
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().expect("an archive")
    }
}

fn header(kind: EntryType, len: usize, mode: u32, owner: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(len as u64);
    header.set_mode(mode);
    header.set_uid(owner);
    header.set_gid(owner);
    header.set_mtime(1_000_000_000);
    header
}

/// An image to write.
pub struct Image {
    layers: Vec<Vec<u8>>,
    config: Value,
    architecture: &'static str,
}

impl Image {
    /// An image of layers, the lowest first, with the `config` part of its configuration.
    #[must_use]
    pub fn new(layers: Vec<Layer>, config: Value) -> Self {
        Self { layers: layers.into_iter().map(Layer::bytes).collect(), config, architecture: "amd64" }
    }

    /// The same for another processor.
    #[must_use]
    pub fn for_architecture(mut self, architecture: &'static str) -> Self {
        self.architecture = architecture;
        self
    }

    /// The digests of its layers' archives, the lowest first.
    #[must_use]
    pub fn diff_ids(&self) -> Vec<String> {
        self.layers.iter().map(|layer| digest(layer)).collect()
    }

    fn config(&self) -> Vec<u8> {
        let diff_ids = self.diff_ids();
        let config = json!({
            "architecture": self.architecture, "os": "linux", "created": "2024-01-02T03:04:05Z",
            "config": self.config, "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        config.to_string().into_bytes()
    }

    /// Writes an OCI layout whose layers are compressed with gzip.
    ///
    /// # Panics
    /// When the disk says no.
    pub fn write_layout(&self, dir: &Path, tag: &str) {
        fs::create_dir_all(dir.join("blobs/sha256")).expect("folders");
        let layers: Vec<_> = self
            .layers
            .iter()
            .map(|layer| add_blob(dir, &gzip(layer), "application/vnd.oci.image.layer.v1.tar+gzip"))
            .collect();
        let config = add_blob(dir, &self.config(), "application/vnd.oci.image.config.v1+json");
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": layers});
        let mut manifest = add_blob(dir, manifest.to_string().as_bytes(), media_type);
        manifest["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
        let index = json!({"schemaVersion": 2, "manifests": [manifest]});
        fs::write(dir.join("index.json"), index.to_string()).expect("index");
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion": "1.0.0"}"#).expect("marker");
    }

    /// Writes what `docker save` wrote before Docker 25.
    ///
    /// # Panics
    /// When the disk says no.
    pub fn write_docker_archive(&self, path: &Path, name: &str) {
        let mut archive = Layer::new();
        let mut names = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            let folder = format!("{index:064}");
            let name = format!("{folder}/layer.tar");
            archive = archive.dir(&folder, 0o755).file(&name, layer, 0o644);
            names.push(name);
        }
        let config = self.config();
        let config_name = format!("{}.json", digest(&config).trim_start_matches("sha256:"));
        let manifest = json!([{"Config": config_name, "RepoTags": [name], "Layers": names}]);
        let archive = archive.file(&config_name, &config, 0o644);
        fs::write(path, archive.file("manifest.json", manifest.to_string().as_bytes(), 0o644).bytes())
            .expect("archive");
    }
}

/// Packs a directory into an archive, compressed when its name says so.
///
/// # Panics
/// When the disk says no.
pub fn pack(dir: &Path, path: &Path) {
    let mut builder = Builder::new(Vec::new());
    builder.append_dir_all(".", dir).expect("a layout");
    let bytes = builder.into_inner().expect("an archive");
    let is_compressed = path.extension().is_some_and(|extension| extension == "gz");
    fs::write(path, if is_compressed { gzip(&bytes) } else { bytes }).expect("archive");
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).expect("compressed");
    encoder.finish().expect("compressed")
}

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

fn add_blob(dir: &Path, bytes: &[u8], media_type: &str) -> Value {
    let digest = digest(bytes);
    let mut file = File::create(dir.join("blobs").join(digest.replace(':', "/"))).expect("blob");
    file.write_all(bytes).expect("blob");
    json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
}
