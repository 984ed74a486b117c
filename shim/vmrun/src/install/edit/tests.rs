//! Round trips of the main file, and what counts as a change.

use std::path::Path;

use super::{
    Format, drop_in, handlers_of, is_handler_name, is_ours, only_handler_is_new, with_handler, with_import,
    without_ours,
};

const DEBIANS: &str = "version = 2\n\n[plugins]\n  [plugins.\"io.containerd.grpc.v1.cri\"]\n    [plugins.\"io.containerd.grpc.v1.cri\".cni]\n      bin_dir = \"/usr/lib/cni\"\n";
const PATTERN: &str = "/etc/containerd/conf.d/*.toml";

fn table(text: &str) -> toml::Table {
    text.parse().expect("TOML")
}

fn none() -> toml::Table {
    toml::Table::new()
}

#[test]
fn each_way_is_taken_back_to_the_letter() {
    let inside = with_handler(DEBIANS, Format::V2, "vm", &none()).expect("TOML");
    assert_ne!(inside, DEBIANS);
    assert_eq!(without_ours(&inside), DEBIANS);
    let importing = with_import(DEBIANS, Format::V2, Path::new(PATTERN)).expect("TOML").expect("no other imports");
    assert_eq!(table(&importing)["imports"][0].as_str(), Some(PATTERN));
    assert_eq!(without_ours(&importing), DEBIANS);
    assert_eq!(without_ours(DEBIANS), DEBIANS);
}

#[test]
fn a_file_that_was_not_there_names_its_version_and_vanishes() {
    let text = with_import("", Format::V3, Path::new(PATTERN)).expect("TOML").expect("no imports");
    assert_eq!(table(&text)["version"].as_integer(), Some(3));
    assert_eq!(without_ours(&text), "");
    assert!(is_ours(&drop_in(Format::V3, "vm", &none()).expect("TOML")));
}

#[test]
fn imports_of_others_are_not_changed() {
    let others = "version = 2\nimports = [\"/etc/other/*.toml\"]\n";
    assert_eq!(with_import(others, Format::V2, Path::new(PATTERN)).expect("TOML"), None);
    let covering = format!("version = 2\nimports = [\"{PATTERN}\"]\n");
    assert_eq!(with_import(&covering, Format::V2, Path::new(PATTERN)).expect("TOML").as_deref(), Some(&*covering));
}

#[test]
fn a_section_that_would_be_lost_is_named() {
    let before = table(DEBIANS);
    let lost =
        only_handler_is_new(&before, table(&drop_in(Format::V2, "vm", &none()).expect("TOML")), Format::V2, "vm");
    let text = lost.expect_err("the CNI settings are gone").to_string();
    assert!(text.contains("/plugins/io.containerd.grpc.v1.cri/cni"), "{text}");
    let with = format!("{DEBIANS}[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n");
    let after = table(&with_handler(&with, Format::V2, "vm", &none()).expect("TOML"));
    only_handler_is_new(&table(&with), after, Format::V2, "vm").expect("nothing else changed");
}

#[test]
fn versions_that_are_not_known_are_refused() {
    assert_eq!(Format::of("", 1).expect("empty"), Format::V2);
    assert_eq!(Format::of("", 2).expect("empty"), Format::V3);
    assert_eq!(Format::of(DEBIANS, 2).expect("2"), Format::V2);
    let old = Format::of("root = \"/x\"\n", 1).expect_err("version 1").to_string();
    assert!(old.contains("config migrate"), "{old}");
    Format::of("version = 9\n", 2).expect_err("unknown");
}

#[test]
fn handlers_are_dns_labels() {
    assert!(is_handler_name("vm") && is_handler_name("vm-2"));
    assert!(!is_handler_name("") && !is_handler_name("-vm") && !is_handler_name("v.m") && !is_handler_name("a]\nb"));
}

#[test]
fn handlers_that_containerd_has_by_itself_are_named_beside_ours() {
    let runc = table(
        "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n",
    );
    let kept = handlers_of(&runc, Format::V2);
    let text = with_handler("version = 2\n", Format::V2, "vm", &kept).expect("TOML");
    let all = handlers_of(&table(&text), Format::V2);
    assert_eq!(all.keys().collect::<Vec<_>>(), ["runc", "vm"]);
    assert_eq!(all["runc"]["runtime_type"].as_str(), Some("io.containerd.runc.v2"));
}
