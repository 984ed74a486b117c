//! Archives of images, made here.

use proptest::prelude::*;
use tar::{Builder, EntryType, Header};

use super::*;
use crate::image::docker_archive;

fn write(members: &[(&str, EntryType, &[u8])]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (name, kind, data) in members {
        let mut header = Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(0o644);
        if kind.is_symlink() {
            header.set_size(0);
            builder.append_link(&mut header, name, std::str::from_utf8(data).expect("a name")).expect("link");
        } else {
            header.set_size(data.len() as u64);
            builder.append_data(&mut header, name, *data).expect("file");
        }
    }
    builder.into_inner().expect("archive")
}

fn open(bytes: &[u8]) -> Result<ArchiveFile> {
    ArchiveFile::copy_from(bytes, &std::env::temp_dir())
}

fn content(archive: &ArchiveFile, name: &str) -> Vec<u8> {
    archive.member(name).expect("member").read_document().expect("content")
}

#[test]
fn members_are_found_with_and_without_a_dot_and_through_links() {
    let members: [(&str, EntryType, &[u8]); 3] = [
        ("./a/layer.tar", EntryType::Regular, b"layer"),
        ("b/layer.tar", EntryType::Symlink, b"../a/layer.tar"),
        ("c/layer.tar", EntryType::Symlink, b"../../../../etc/passwd"),
    ];
    let archive = open(&write(&members)).expect("archive");
    assert_eq!(content(&archive, "a/layer.tar"), b"layer");
    assert_eq!(content(&archive, "b/layer.tar"), b"layer");
    archive.member("c/layer.tar").expect_err("a file of the host");
    archive.member("missing").expect_err("no such member");
}

#[test]
fn a_compressed_archive_is_read_as_what_it_holds() {
    let plain = write(&[("a", EntryType::Regular, b"content")]);
    let mut gzip = flate2::read::GzEncoder::new(plain.as_slice(), flate2::Compression::fast());
    let mut bytes = Vec::new();
    gzip.read_to_end(&mut bytes).expect("compressed");
    assert_eq!(content(&open(&bytes).expect("gzip"), "a"), b"content");
    open(&bytes[..bytes.len() / 2]).err().expect("cut off");
    let bytes = zstd::encode_all(plain.as_slice(), 1).expect("compressed");
    assert_eq!(content(&open(&bytes).expect("zstd"), "a"), b"content");
}

#[test]
fn what_is_cut_off_is_refused() {
    let bytes = write(&[("a", EntryType::Regular, &[1; 5000])]);
    for len in [0, 100, 600, 3000] {
        open(&bytes[..len]).err().expect("refused");
    }
}

#[test]
fn docker_archives_name_their_images() {
    let config = br#"{"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": ["sha256:0"]}}"#;
    let manifest = br#"[{"Config": "c.json", "RepoTags": ["debian:12", "me/tool:1"], "Layers": []}, {"Config": "d.json", "RepoTags": null, "Layers": []}]"#;
    let members: [(&str, EntryType, &[u8]); 2] =
        [("manifest.json", EntryType::Regular, manifest), ("c.json", EntryType::Regular, config)];
    let archive = open(&write(&members)).expect("archive");
    let images = docker_archive::images(&archive).expect("images");
    let found = docker_archive::select(&images, Some("docker.io/library/debian:12")).expect("found");
    let refusal = docker_archive::source(&archive, found).err().expect("one layer is missing");
    assert!(format!("{refusal:#}").contains("names 0 layers"), "{refusal:#}");
    let refusal = docker_archive::select(&images, Some("other")).expect_err("refused");
    assert!(format!("{refusal:#}").contains("debian:12, me/tool:1"), "{refusal:#}");
    docker_archive::select(&images, None).expect_err("there are two");
}

proptest! {
    #[test]
    fn any_bytes_are_an_archive_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
        let _ = open(&bytes);
    }

    #[test]
    fn any_manifest_is_read_or_refused(manifest in ".{0,200}") {
        let archive = open(&write(&[("manifest.json", EntryType::Regular, manifest.as_bytes())])).expect("archive");
        let _ = docker_archive::images(&archive).map(|images| docker_archive::select(&images, None).map(|_| ()));
    }
}
