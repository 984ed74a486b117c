//! Images from registries (distribution-spec), by `oci-client`. Everything that arrives is checked against its digest and
//! size before it gets a name in the store.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use futures::{StreamExt as _, TryStreamExt as _};
use oci_client::Client;
use oci_client::client::{ClientConfig, ClientProtocol, LayerDescriptor};
use oci_client::errors::{OciDistributionError, OciErrorCode};
use oci_client::secrets::RegistryAuth;
use oci_spec::distribution::Reference;
use oci_spec::image::{Descriptor, ImageIndex, ImageManifest, MediaType};
use serde::Deserialize;

use super::digest::{Digest, HashingWriter};
use super::layers::Compression;
use super::layout::{self, DocumentKind};
use super::progress::Progress;
use super::store::Store;
use super::{credentials, reference};

/// Blobs that are fetched at the same time, as Docker.
const CONCURRENT_DOWNLOADS: usize = 3;
/// Times that a blob is asked for.
const MAX_ATTEMPTS: u32 = 3;
/// Longest time without a byte.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest time to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// Documents that are understood.
const ACCEPTED: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// Fetches an image into the store, without a name yet; returns its manifest's descriptor.
pub(super) fn pull(reference: &Reference, plain_http: bool, store: &Store, progress: &Progress) -> Result<Descriptor> {
    let work = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async { Puller::connect(reference, plain_http, store, progress)?.pull().await })
    };
    // A thread of its own, because the caller may be inside a runtime.
    let outcome = thread::scope(|scope| scope.spawn(work).join());
    outcome.unwrap_or_else(|_| Err(anyhow!("the thread that pulls panicked")))
}

/// One pull.
struct Puller<'a> {
    client: Client,
    auth: RegistryAuth,
    reference: &'a Reference,
    store: &'a Store,
    progress: &'a Progress,
}

impl<'a> Puller<'a> {
    fn connect(reference: &'a Reference, plain_http: bool, store: &'a Store, progress: &'a Progress) -> Result<Self> {
        // It fails when it was done before.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let registry = reference.registry();
        let http = plain_http || reference::is_loopback(registry);
        let config = ClientConfig {
            protocol: if http { ClientProtocol::Http } else { ClientProtocol::Https },
            connect_timeout: Some(CONNECT_TIMEOUT),
            read_timeout: Some(READ_TIMEOUT),
            user_agent: concat!("vmrun/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        };
        let client = Client::try_from(config).map_err(|error| explain(error, reference))?;
        Ok(Self { client, auth: credentials::find(registry)?, reference, store, progress })
    }

    async fn pull(&self) -> Result<Descriptor> {
        let mut bytes = self.document(self.reference).await?;
        if kind_of(&bytes)?.0 == DocumentKind::Index {
            let index: ImageIndex = serde_json::from_slice(&bytes).context("bad image index")?;
            let chosen = layout::select_platform(index.manifests())?.digest().to_string();
            bytes = self.document(&self.reference.clone_with_digest(chosen)).await?;
        }
        let (DocumentKind::Manifest, media_type) = kind_of(&bytes)? else { bail!("indices are nested") };
        let manifest: ImageManifest = serde_json::from_slice(&bytes).context("bad manifest")?;
        for layer in manifest.layers() {
            Compression::of_media_type(layer.media_type().as_ref())?;
        }
        // The configuration says whether it is worth to fetch the layers.
        self.blob(manifest.config()).await?;
        let unique: BTreeMap<_, _> =
            manifest.layers().iter().map(|layer| (layer.digest().to_string(), layer)).collect();
        let downloads = futures::stream::iter(unique.into_values().map(|layer| self.blob(layer)));
        let manifest = self.store.add_document(media_type, &bytes)?;
        self.store.check_config(&manifest)?;
        downloads.buffer_unordered(CONCURRENT_DOWNLOADS).try_collect::<()>().await?;
        Ok(manifest)
    }

    /// A manifest or index, verified if the reference has a digest.
    async fn document(&self, reference: &Reference) -> Result<Vec<u8>> {
        let pulled = self.client.pull_manifest_raw(reference, &self.auth, &ACCEPTED).await;
        let (bytes, _) = pulled.map_err(|error| explain(error, self.reference))?;
        if let Some(digest) = reference.digest() {
            Digest::parse(digest)?.verify(&Digest::of(&bytes))?;
        }
        Ok(bytes.to_vec())
    }

    /// Fetches a blob, unless it is in the store.
    async fn blob(&self, descriptor: &Descriptor) -> Result<()> {
        let digest = Digest::parse(descriptor.digest().as_ref())?;
        let mut attempt = 1;
        loop {
            match self.download(&digest, descriptor.size()).await {
                Err(error) if attempt < MAX_ATTEMPTS && is_temporary(&error) => {
                    tracing::warn!(%digest, error = format!("{error:#}"), "a download broke off; trying again");
                    attempt += 1;
                }
                downloaded => return downloaded.with_context(|| format!("cannot fetch {digest}")),
            }
        }
    }

    async fn download(&self, digest: &Digest, size: u64) -> Result<()> {
        let Some(mut ingest) = self.store.ingest(digest.hex(), Some(digest))? else { return Ok(()) };
        let bar = self.progress.bar("downloading", digest, size);
        let name = digest.to_string();
        let layer = LayerDescriptor { digest: &name, urls: &None };
        let response = self.client.pull_blob_stream(self.reference, &layer).await;
        let mut stream = response.map_err(|error| explain(error, self.reference))?.stream;
        let (mut hasher, mut len) = (HashingWriter::default(), 0);
        while let Some(piece) = stream.next().await {
            let piece = piece.map_err(BrokenOff)?;
            len += piece.len() as u64;
            if len > size {
                bail!("it is longer than the manifest says, {size} bytes");
            }
            hasher.update(&piece);
            ingest.file.write_all(&piece).context("cannot write it into the image store")?;
            bar.advance(piece.len() as u64);
        }
        digest.verify(&hasher.finish())?;
        self.store.commit(&ingest, digest)
    }
}

/// A connection that ended too early.
#[derive(Debug, thiserror::Error)]
#[error("the download broke off")]
struct BrokenOff(#[source] std::io::Error);

fn is_temporary(error: &anyhow::Error) -> bool {
    error.downcast_ref::<BrokenOff>().is_some()
}

/// Kind and media type of a document, which may leave its type to the header that `oci-client` does not show.
fn kind_of(bytes: &[u8]) -> Result<(DocumentKind, MediaType)> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Head {
        media_type: Option<String>,
        manifests: Option<serde::de::IgnoredAny>,
    }
    let head: Head = serde_json::from_slice(bytes).context("the registry's answer is not a manifest")?;
    let assumed = if head.manifests.is_some() { MediaType::ImageIndex } else { MediaType::ImageManifest };
    let media_type = head.media_type.map_or(assumed, |text| MediaType::from(text.as_str()));
    Ok((layout::document_kind(media_type.as_ref(), bytes)?, media_type))
}

/// What went wrong with a registry, and what to do.
fn explain(error: OciDistributionError, reference: &Reference) -> anyhow::Error {
    use OciDistributionError as E;
    let registry = reference.registry();
    let denied = || anyhow!("access denied: {reference} does not exist, or `docker login {registry}` is needed first");
    let missing = || anyhow!("{reference} is not in the registry: check its name and tag");
    match error {
        E::AuthenticationFailure(_) | E::UnauthorizedError { .. } | E::ServerError { code: 401 | 403, .. } => denied(),
        E::ImageManifestNotFoundError(_) | E::ServerError { code: 404, .. } => missing(),
        E::ServerError { code: 429, .. } => anyhow!("{registry} allows no more requests for now: try again later"),
        E::RegistryError { envelope, .. } => match envelope.errors.first().map(|error| &error.code) {
            Some(OciErrorCode::Unauthorized | OciErrorCode::Denied) => denied(),
            Some(
                OciErrorCode::ManifestUnknown
                | OciErrorCode::NameUnknown
                | OciErrorCode::NotFound
                | OciErrorCode::BlobUnknown,
            ) => missing(),
            Some(OciErrorCode::Toomanyrequests) => {
                anyhow!("{registry} allows no more requests for now: try again later")
            }
            _ => anyhow!("{registry} refuses: {envelope}"),
        },
        E::RequestError(error) => {
            let error = anyhow::Error::from(error);
            anyhow!("cannot reach the registry {registry}: {}; check its name and the network", error.root_cause())
        }
        other => anyhow::Error::from(other),
    }
}

#[cfg(test)]
mod tests {
    use super::kind_of;
    use crate::image::layout::DocumentKind;

    #[test]
    fn a_document_is_what_it_says_and_holds() {
        assert_eq!(kind_of(br#"{"manifests": []}"#).expect("index").0, DocumentKind::Index);
        assert_eq!(kind_of(br#"{"config": {}, "layers": []}"#).expect("manifest").0, DocumentKind::Manifest);
        for bad in [
            r#"{"manifests": [], "layers": []}"#,
            r#"{"mediaType": "application/vnd.oci.image.manifest.v1+json", "manifests": []}"#,
            r#"{"mediaType": "text/html", "layers": []}"#,
            r#"{"schemaVersion": 1}"#,
            "<html>",
        ] {
            assert!(kind_of(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
