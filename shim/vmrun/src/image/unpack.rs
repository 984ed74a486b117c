//! Layers on disk: each is verified by digest and unpacked once, into a folder named by its diff id.
//!
//! Unpacking is done by a child that has changed its root to the target: no path in an archive, and no symbolic link that
//! an earlier entry made, leads anywhere else. A layer appears under its name only when it is complete.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use oci_spec::image::{Descriptor, MediaType};
use sha2::{Digest as _, Sha256};

/// Reads a small blob (manifest, configuration) and verifies it.
pub(super) fn read_blob(layout: &Path, descriptor: &Descriptor) -> Result<Vec<u8>> {
    const MAX_LEN: u64 = 4 << 20;
    let path = blob_path(layout, descriptor)?;
    let mut bytes = Vec::new();
    let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
    file.take(MAX_LEN + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_LEN {
        bail!("{} is larger than {MAX_LEN} bytes, the most for a manifest or configuration", path.display());
    }
    verify(descriptor.digest().as_ref(), &hex(&Sha256::digest(&bytes)))?;
    Ok(bytes)
}

/// Makes sure that a layer is unpacked; returns its folder's name in `layer_dir`.
pub(super) fn layer(layout: &Path, descriptor: &Descriptor, diff_id: &str, layer_dir: &Path) -> Result<PathBuf> {
    let Some(hash) =
        diff_id.strip_prefix("sha256:").filter(|h| h.len() == 64 && h.bytes().all(|b| b.is_ascii_hexdigit()))
    else {
        bail!("diff id {diff_id:?} is not a sha256 digest");
    };
    // Short names keep overlayfs's options below its limit of one page.
    let name = PathBuf::from(&hash[..24]);
    if layer_dir.join(&name).exists() {
        return Ok(name);
    }
    fs::create_dir_all(layer_dir).with_context(|| format!("cannot make {}", layer_dir.display()))?;
    let path = blob_path(layout, descriptor)?;
    verify_file(&path, descriptor.digest().as_ref())?;
    let temporary = tempfile::Builder::new().prefix(".unpack-").tempdir_in(layer_dir)?;
    fs::set_permissions(temporary.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    unpack_in_child(&path, descriptor.media_type(), temporary.path())
        .with_context(|| format!("cannot unpack layer {}", descriptor.digest()))?;
    let unpacked = temporary.keep();
    fs::rename(&unpacked, layer_dir.join(&name)).context("cannot put the layer in place")?;
    Ok(name)
}

fn blob_path(layout: &Path, descriptor: &Descriptor) -> Result<PathBuf> {
    let digest = descriptor.digest().to_string();
    match digest.split_once(':') {
        Some(("sha256", hash)) if hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit()) => {
            Ok(layout.join("blobs/sha256").join(hash))
        }
        _ => bail!("digest {digest:?} is not a sha256 digest"),
    }
}

fn verify_file(path: &Path, digest: &str) -> Result<()> {
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut hasher = Sha256::new();
    io::copy(&mut file, &mut hasher).with_context(|| format!("cannot read {}", path.display()))?;
    verify(digest, &hex(&hasher.finalize()))
}

fn verify(expected: &str, actual: &str) -> Result<()> {
    if expected.strip_prefix("sha256:") != Some(actual) {
        bail!("wrong digest: {expected} was asked for, the content is sha256:{actual}; fetch the image again");
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Runs [`super::child::unpack_child`] in a process of its own, whose standard error is the cause of a failure.
fn unpack_in_child(archive: &Path, media_type: &MediaType, target: &Path) -> Result<()> {
    let file = File::open(archive)?;
    let compression = match media_type {
        MediaType::ImageLayer => "none",
        MediaType::ImageLayerGzip => "gzip",
        MediaType::ImageLayerZstd => "zstd",
        other => bail!("layers of type {other} are not supported"),
    };
    let output = std::process::Command::new(std::env::current_exe()?)
        .args(["unpack-layer", compression])
        .arg(target)
        .env_clear()
        .stdin(file)
        .output()?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim().trim_start_matches("vmrun: "));
    }
    Ok(())
}
