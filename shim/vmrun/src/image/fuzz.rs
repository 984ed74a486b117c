//! What the fuzzers in `tests/fuzz` call: what an image is made of. Compiled for fuzzing and for the unit tests only.

use std::fs::{self, File};

use super::archive::ArchiveFile;
use super::layout::Layout;
use super::{docker_archive, entries, reference};

/// The archive of a layer, unpacked beside a file that must stay as it is. As root, or owners cannot be set.
///
/// # Panics
/// When something outside of the layer's folder changes.
pub fn layer(data: &[u8]) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let layer = dir.path().join("layer");
    fs::create_dir(&layer).expect("a folder");
    fs::write(dir.path().join("outside"), "kept").expect("a file");
    // What is wrong with an archive is an outcome like others.
    let _ = entries::unpack(data, File::open(&layer).expect("a folder").into());
    assert_eq!(fs::read(dir.path().join("outside")).expect("it is there"), b"kept");
    assert_eq!(fs::read_dir(dir.path()).expect("a folder").count(), 2);
}

/// An archive of an image: a layout, or what `docker save` writes. Its documents are read, its layers only found.
pub fn image_archive(data: &[u8]) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let Ok(archive) = ArchiveFile::copy_from(data, dir.path()) else { return };
    if let Ok(images) = docker_archive::images(&archive) {
        images.iter().for_each(|image| drop(docker_archive::source(&archive, image)));
    }
    let layout = Layout::Archive(archive);
    for descriptor in layout.index().iter().flat_map(|index| index.manifests()) {
        let _ = layout.resolve(descriptor, 0);
    }
}

/// A reference to an image.
///
/// # Panics
/// When the printed form means another image.
pub fn image_reference(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(reference) = reference::parse(text) {
        assert_eq!(reference::parse(&reference.to_string()).expect("full form"), reference);
        assert_eq!(reference::parse(&reference::familiar(&reference)).expect("short form"), reference);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_target_takes_its_bytes() {
        let inputs: [&[u8]; 4] = [b"", &[0; 1024], b"debian:12", &[0x1f, 0x8b, 8, 0]];
        for target in [super::layer, super::image_archive, super::image_reference] {
            inputs.into_iter().for_each(target);
        }
    }
}
