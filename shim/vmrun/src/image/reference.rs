//! References to images in registries, as Docker reads and prints them.

use anyhow::{Context as _, Result, bail};
use oci_spec::distribution::Reference;

/// Reads a reference in any of Docker's short forms: `debian` is `docker.io/library/debian:latest`.
pub(crate) fn parse(text: &str) -> Result<Reference> {
    let parsed: Result<Reference, _> = text.parse();
    let reference = parsed.with_context(|| format!("{text:?} is not a reference to an image"))?;
    // A registry of one word with capitals is taken, and its full form, which the store keeps, is not.
    if reference.to_string().parse::<Reference>().ok().as_ref() != Some(&reference) {
        bail!("{text:?} is not a reference to an image: write the registry in full");
    }
    match reference.digest() {
        Some(digest) if !digest.starts_with("sha256:") => bail!("{text:?}: only sha256 digests are supported"),
        // As Docker: with both, the digest decides and the tag is a remark.
        Some(digest) => Ok(reference.clone_with_digest(digest.to_owned())),
        None => Ok(reference),
    }
}

/// The repository as Docker shows it: without what is understood.
pub(crate) fn familiar_repository(reference: &Reference) -> String {
    match (reference.registry(), reference.repository()) {
        ("docker.io", repository) => repository.strip_prefix("library/").unwrap_or(repository).to_owned(),
        (registry, repository) => format!("{registry}/{repository}"),
    }
}

/// The whole reference as Docker shows it.
pub(crate) fn familiar(reference: &Reference) -> String {
    let repository = familiar_repository(reference);
    match (reference.digest(), reference.tag()) {
        (Some(digest), _) => format!("{repository}@{digest}"),
        (None, tag) => format!("{repository}:{}", tag.unwrap_or("latest")),
    }
}

/// Whether a registry is on this machine, where HTTP is used.
pub(crate) fn is_loopback(registry: &str) -> bool {
    let host = registry.split(':').next().unwrap_or_default();
    matches!(host, "localhost" | "127.0.0.1")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{familiar, is_loopback, parse};

    #[test]
    fn short_names_are_dockers() {
        let full = |text| parse(text).expect("reference").to_string();
        assert_eq!(full("debian"), "docker.io/library/debian:latest");
        assert_eq!(full("me/tool:1.2"), "docker.io/me/tool:1.2");
        assert_eq!(full("localhost:5000/a/b"), "localhost:5000/a/b:latest");
        assert_eq!(full("example.org/a:b"), "example.org/a:b");
        assert_eq!(full("index.docker.io/library/debian"), "docker.io/library/debian:latest");
    }

    #[test]
    fn a_digest_decides_over_a_tag() {
        let digest = format!("sha256:{}", "a".repeat(64));
        let reference = parse(&format!("debian:12@{digest}")).expect("reference");
        assert_eq!(reference.to_string(), format!("docker.io/library/debian@{digest}"));
        assert_eq!(familiar(&reference), format!("debian@{digest}"));
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        for text in
            ["", "UPPER", "a b", "-x", "debian:", "debian@sha256:12", "a//b", "../up", "debian:tag:tag", "a\nb", "C/k"]
        {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn only_this_machines_registries_are_loopback() {
        assert!(["localhost:5000", "127.0.0.1:5000", "localhost"].iter().all(|r| is_loopback(r)));
        assert!(!["docker.io", "localhost.example.org", "10.0.0.1:5000"].iter().any(|r| is_loopback(r)));
    }

    proptest! {
        #[test]
        fn a_printed_reference_is_read_back(text in "[a-z0-9./:@-]{1,40}") {
            if let Ok(reference) = parse(&text) {
                prop_assert_eq!(parse(&reference.to_string()).expect("full form"), reference.clone());
                prop_assert_eq!(parse(&familiar(&reference)).expect("short form"), reference);
            }
        }

        #[test]
        fn any_text_is_read_or_refused(text in ".*") {
            let _ = parse(&text);
        }
    }
}
