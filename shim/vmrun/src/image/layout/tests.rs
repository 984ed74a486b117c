//! Indices and documents, made here.

use proptest::prelude::*;

use super::*;

fn descriptors(text: &str) -> Vec<Descriptor> {
    let digest = format!("sha256:{}", "0".repeat(64));
    let text = text.replace(
        '@',
        &format!(r#""mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": "{digest}", "size": 1"#),
    );
    serde_json::from_str(&text).expect("descriptors")
}

fn refusal(manifests: &[Descriptor], tag: Option<&str>) -> String {
    format!("{:#}", select(manifests, tag).expect_err("refused"))
}

#[test]
fn a_tag_is_found_and_a_missing_one_names_the_others() {
    let name = |name: &str| format!(r#"{{@, "annotations": {{"{REF_NAME}": "{name}"}}}}"#);
    let two = descriptors(&format!("[{}, {}]", name("one"), name("two")));
    assert_eq!(select(&two, Some("two")).expect("two"), &two[1]);
    assert!(refusal(&two, Some("three")).contains("one, two"));
    assert!(refusal(&two, None).contains("one, two"));
    assert_eq!(select(&two[..1], None).expect("the only one"), &two[0]);
    assert!(refusal(&[], None).contains("no image"));
}

#[test]
fn several_platforms_of_one_name_give_this_one() {
    let platform = |arch: &str| format!(r#"{{@, "platform": {{"os": "linux", "architecture": "{arch}"}}}}"#);
    let all = descriptors(&format!("[{}, {}]", platform("arm64"), platform("amd64")));
    assert_eq!(select(&all, None).expect("amd64"), &all[1]);
    assert!(format!("{:#}", select_platform(&all[..1]).expect_err("refused")).contains("linux/arm64"));
}

#[test]
fn a_document_that_is_two_things_is_refused() {
    let manifest = "application/vnd.oci.image.manifest.v1+json";
    assert_eq!(document_kind(manifest, br#"{"config": {}, "layers": []}"#).expect("manifest"), DocumentKind::Manifest);
    document_kind(manifest, br#"{"config": {}, "layers": [], "manifests": []}"#).expect_err("both");
    document_kind(manifest, br#"{"manifests": []}"#).expect_err("an index");
    document_kind("text/plain", br#"{"layers": []}"#).expect_err("an unknown type");
}

#[test]
fn a_configuration_for_another_platform_is_refused() {
    let config = |arch: &str, os: &str| {
        format!(r#"{{"architecture": "{arch}", "os": "{os}", "rootfs": {{"type": "layers", "diff_ids": ["a"]}}}}"#)
    };
    let amd64 = parse_config(config("amd64", "linux").as_bytes()).expect("amd64");
    check_layers(1, &amd64).expect("as many");
    check_layers(2, &amd64).expect_err("one more");
    for (arch, os) in [("arm64", "linux"), ("amd64", "windows"), ("", "")] {
        parse_config(config(arch, os).as_bytes()).expect_err("another platform");
    }
}

#[test]
fn a_path_is_the_longest_that_exists() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("a:b");
    std::fs::write(&path, "").expect("file");
    let text = path.to_str().expect("path");
    assert_eq!(split_name(text), (path.as_path(), None));
    assert_eq!(split_name(&format!("{text}:host:1/name:tag")), (path.as_path(), Some("host:1/name:tag")));
    assert_eq!(split_name("/no/such:tag"), (Path::new("/no/such:tag"), None));
}

proptest! {
    #[test]
    fn any_document_is_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = document_kind("application/vnd.oci.image.manifest.v1+json", &bytes);
        let _ = parse_config(&bytes);
    }
}
