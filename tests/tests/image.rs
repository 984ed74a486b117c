//! Images in every form: run, pulled, loaded, listed, removed; and images that are not what they should be.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tar::EntryType;
use tests::image::{Image, Layer, pack};
use tests::registry::Registry;
use tests::{Outcome, Story, outcome};

/// Prints a line with the image's name.
fn hello(name: &str) -> Image {
    Image::new(
        vec![Layer::busybox(), Layer::new().file("name", name.as_bytes(), 0o644)],
        json!({"Cmd": ["cat", "/name"]}),
    )
}

fn layout(story: &Story, image: &Image) -> PathBuf {
    let dir = story.volume().join("layout");
    image.write_layout(&dir, "hello:1");
    dir
}

fn run(story: &Story, image: &str, command: &[&str]) -> Outcome {
    story.finish(&[&["run", "--rm", image][..], command].concat())
}

/// Fails, and leaves neither a layer nor a blob.
fn assert_refused(story: &Story, arguments: &[&str], words: &[&str]) {
    let ran = story.finish(arguments);
    // As with Docker: 125 is `run`'s.
    assert_eq!(ran.code, if arguments[0] == "run" { 125 } else { 1 }, "{ran:?}");
    words.iter().for_each(|word| assert!(ran.stderr.contains(word), "no {word:?} in {ran:?}"));
    assert_eq!(ran.stderr.lines().filter(|line| line.starts_with("vmrun:")).count(), 1, "{ran:?}");
    assert_nothing_is_kept(story);
}

fn assert_nothing_is_kept(story: &Story) {
    for folder in ["layers", "images/blobs/sha256", "images/ingest"] {
        let left: Vec<_> = fs::read_dir(story.data_root().join(folder)).into_iter().flatten().flatten().collect();
        assert!(left.is_empty(), "left behind: {left:?}");
    }
}

/// The largest blob of a layout: its lowest layer.
fn largest_blob(layout: &Path) -> PathBuf {
    let blobs = fs::read_dir(layout.join("blobs/sha256")).expect("blobs");
    blobs
        .map(|entry| entry.expect("entry").path())
        .max_by_key(|path| path.metadata().expect("blob").len())
        .expect("a blob")
}

/// The blob that the index names.
fn manifest_blob(layout: &Path) -> PathBuf {
    let index: Value = serde_json::from_slice(&fs::read(layout.join("index.json")).expect("index")).expect("JSON");
    let digest = index["manifests"][0]["digest"].as_str().expect("digest").replace(':', "/");
    layout.join("blobs").join(digest)
}

#[test]
fn an_image_runs_from_each_local_form() {
    let story = Story::new();
    let dir = layout(&story, &hello("local\n"));
    let (tar, gz, saved) =
        (story.volume().join("oci.tar"), story.volume().join("oci.tar.gz"), story.volume().join("saved.tar"));
    pack(&dir, &tar);
    pack(&dir, &gz);
    hello("local\n").write_docker_archive(&saved, "example.org/hello:1");
    for image in [
        format!("oci:{}", dir.display()),
        format!("oci:{}:hello:1", dir.display()),
        format!("oci-archive:{}", tar.display()),
        format!("oci-archive:{}", gz.display()),
        format!("docker-archive:{}", saved.display()),
        format!("docker-archive:{}:example.org/hello:1", saved.display()),
    ] {
        assert_eq!(run(&story, &image, &[]).success(), "local\n", "{image}");
    }
}

#[test]
fn an_image_is_pulled_run_listed_and_removed() {
    let story = Story::new();
    let registry = Registry::start(&story.volume());
    let name = registry.push(&layout(&story, &hello("pulled\n")), "hello:1");
    let ran = run(&story, &name, &[]);
    assert_eq!(ran.success(), "pulled\n");
    assert!(ran.stderr.contains("Unable to find image"), "{ran:?}");
    let listed: Value = serde_json::from_str(story.finish(&["images", "--json"]).success()).expect("JSON");
    assert_eq!((&listed[0]["repository"], &listed[0]["tag"]), (&json!(name.trim_end_matches(":1")), &json!("1")));
    let id = listed[0]["id"].as_str().expect("id").trim_start_matches("sha256:")[..12].to_owned();
    assert_eq!(story.finish(&["images", "-q"]).success(), format!("{id}\n"));
    let by_id = story.finish(&["run", "--rm", "--pull", "never", &id]);
    assert_eq!((by_id.success(), by_id.stderr.as_str()), ("pulled\n", ""));
    assert!(story.finish(&["rmi", &name]).success().starts_with(&format!("Untagged: {name}\nDeleted: sha256:{id}")));
    assert_nothing_is_kept(&story);
    assert_refused(&story, &["run", "--rm", "--pull", "never", &name], &["not here", "vmrun pull"]);
}

#[test]
fn a_tag_that_moved_is_followed_when_asked() {
    let story = Story::new();
    let registry = Registry::start(&story.volume());
    let name = registry.push(&layout(&story, &hello("old\n")), "hello:1");
    assert_eq!(story.finish(&["pull", "-q", &name]).success(), format!("{name}\n"));
    fs::remove_dir_all(story.volume().join("layout")).expect("removed");
    let _ = registry.push(&layout(&story, &hello("new\n")), "hello:1");
    assert_eq!(run(&story, &name, &[]).success(), "old\n");
    assert_eq!(story.finish(&["run", "--rm", "--pull", "always", &name]).success(), "new\n");
    let listed = story.finish(&["images"]).success().to_owned();
    assert_eq!((listed.lines().count(), listed.matches("<none>").count()), (3, 2), "{listed}");
}

#[test]
fn a_registry_that_asks_for_a_password_gets_dockers() {
    let story = Story::new();
    let registry = Registry::start_locked(&story.volume());
    let name = registry.push(&layout(&story, &hello("secret\n")), "hello:1");
    assert_refused(&story, &["pull", &name], &["access denied", "docker login"]);
    let config = story.volume().join("docker");
    fs::create_dir(&config).expect("folder");
    let auths = json!({"auths": {(registry.address.clone()): {"auth": "dXNlcjpzZWNyZXQ="}}});
    fs::write(config.join("config.json"), auths.to_string()).expect("configuration");
    let mut pull = story.vmrun(&["pull", &name]);
    assert!(
        outcome({
            pull.env("DOCKER_CONFIG", &config);
            pull
        })
        .success()
        .contains("Digest: sha256:")
    );
}

#[test]
fn what_a_registry_does_not_have_is_named() {
    let story = Story::new();
    let registry = Registry::start(&story.volume());
    let missing = format!("{}/no/such:1", registry.address);
    assert_refused(&story, &["pull", &missing], &["not in the registry", "no/such:1"]);
    drop(registry);
    assert_refused(&story, &["pull", &missing], &["cannot reach the registry", "refused"]);
    assert_refused(&story, &["run", "--rm", "NOT A NAME"], &["not a reference", "rootfs:DIR"]);
}

#[test]
fn an_index_gives_the_image_of_this_platform() {
    let story = Story::new();
    let (dir, other) = (story.volume().join("layout"), story.volume().join("other"));
    hello("amd64\n").write_layout(&dir, "1");
    hello("arm64\n").for_architecture("arm64").write_layout(&other, "1");
    let mut manifests = Vec::new();
    for (layout, architecture) in [(&other, "arm64"), (&dir, "amd64")] {
        let bytes = fs::read(manifest_blob(layout)).expect("manifest");
        let digest = format!("sha256:{}", manifest_blob(layout).file_name().expect("name").display());
        manifests.push(json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": bytes.len(),
            "platform": {"os": "linux", "architecture": architecture},
        }));
    }
    fs::write(dir.join("index.json"), json!({"schemaVersion": 2, "manifests": manifests}).to_string()).expect("index");
    assert_eq!(run(&story, &format!("oci:{}", dir.display()), &[]).success(), "amd64\n");
    assert_refused(&Story::new(), &["run", &format!("oci:{}", other.display())], &["linux/arm64", "linux/amd64"]);
}

#[test]
fn layers_are_seen_in_the_guest_as_their_authors_made_them() {
    let story = Story::new();
    let lower = Layer::busybox()
        .file("gone", b"", 0o644)
        .dir("kept", 0o755)
        .file("kept/old", b"", 0o644)
        .dir("replaced", 0o755)
        .file("replaced/old", b"", 0o644);
    let upper = Layer::new()
        .file(".wh.gone", b"", 0o644)
        .file("kept/new", b"", 0o644)
        .dir("replaced", 0o755)
        .file("replaced/.wh..wh..opq", b"", 0o644)
        .file("replaced/new", b"", 0o644)
        .owned(EntryType::Regular, "tool", b"tool", 0o4750, 1234)
        .link(EntryType::Link, "other-name", "tool")
        .entry(EntryType::Fifo, "fifo", b"", 0o600);
    let dir = layout(&story, &Image::new(vec![lower, upper], json!({"Cmd": ["sh"]})));
    let script = "ls -d /gone; ls /kept /replaced; stat -c '%a %u %g %h %Y' /tool /other-name; stat -c %F /fifo";
    let ran = run(&story, &format!("oci:{}", dir.display()), &["sh", "-c", script]);
    let tool = "4750 1234 1234 2 1000000000\n";
    assert_eq!(ran.success(), format!("/kept:\nnew\nold\n\n/replaced:\nnew\n{tool}{tool}fifo\n"), "{ran:?}");
}

#[test]
fn a_layer_may_be_there_twice_and_may_hide_all_below() {
    let story = Story::new();
    let twice = || Layer::new().file("twice", b"", 0o644);
    let dir = layout(
        &story,
        &Image::new(vec![Layer::busybox(), twice(), Layer::new().file("x", b"", 0o644), twice()], json!({})),
    );
    assert_eq!(run(&story, &format!("oci:{}", dir.display()), &["ls", "/twice", "/x"]).success(), "/twice\n/x\n");
    let hiding = Layer::busybox().file(".wh..wh..opq", b"", 0o644);
    let dir = story.volume().join("hiding");
    Image::new(vec![Layer::new().file("below", b"", 0o644), hiding], json!({})).write_layout(&dir, "1");
    assert_eq!(run(&story, &format!("oci:{}", dir.display()), &["ls", "/below"]).code, 1);
}

#[test]
fn the_configuration_of_an_image_is_honoured() {
    let story = Story::new();
    let base =
        Layer::busybox().file("etc/passwd", b"app:x:77:78::/home/app:/bin/sh\n", 0o644).file("etc/group", b"", 0o644);
    let config = json!({
        "Entrypoint": ["sh", "-c"], "Cmd": ["echo $COLOUR; pwd; id -u; id -g; echo $HOME; touch /data/x && echo written; stat -c %a /made/here"],
        "Env": ["COLOUR=blue"], "WorkingDir": "/tmp", "User": "app", "Volumes": {"/data": {}, "/made/here": {}}, "StopSignal": "SIGINT",
        "Labels": {"a": "b"},
    });
    let base = base.owned(EntryType::Directory, "data", b"", 0o755, 77);
    let dir = layout(&story, &Image::new(vec![base], config));
    let image = format!("oci:{}", dir.display());
    assert_eq!(run(&story, &image, &[]).success(), "blue\n/tmp\n77\n78\n/home/app\nwritten\n755\n");
    let read_only = story.finish(&["run", "--rm", "--read-only", "--user", "0", &image, "touch /data/x && ! touch /x"]);
    assert_eq!(read_only.code, 0, "{read_only:?}");
}

#[test]
fn an_archive_is_loaded_under_its_names() {
    let story = Story::new();
    let (saved, tar) = (story.volume().join("saved.tar.gz"), story.volume().join("oci.tar"));
    let plain = story.volume().join("saved.tar");
    hello("saved\n").write_docker_archive(&plain, "hello:saved");
    assert!(Command::new("gzip").arg(&plain).status().expect("gzip").success());
    pack(&layout(&story, &hello("oci\n")), &tar);
    let loaded = story.finish(&["load", "-i", saved.to_str().expect("path")]);
    assert_eq!(loaded.success(), "Loaded image: hello:saved\n");
    let mut from_stdin = story.vmrun(&["load"]);
    from_stdin.stdin(fs::File::open(&tar).expect("archive"));
    assert_eq!(outcome(from_stdin).success(), "Loaded image: hello:1\n");
    assert_eq!(run(&story, "hello:saved", &[]).success(), "saved\n");
    assert!(story.finish(&["images"]).success().contains("hello        1       "));
    // The lower layer is the other image's too.
    assert_eq!(story.finish(&["rmi", "hello:saved"]).code, 0);
    assert_eq!(run(&story, "hello:1", &[]).success(), "oci\n");
}

#[test]
fn an_image_in_use_is_not_removed() {
    let story = Story::new();
    let saved = story.volume().join("saved.tar");
    hello("x\n").write_docker_archive(&saved, "hello:1");
    assert_eq!(story.finish(&["load", "-i", saved.to_str().expect("path")]).code, 0);
    let mut container = story.start_image("one", "hello:1", &["sh", "-c", "echo up; exec sleep 1000"]);
    let refused = story.finish(&["rmi", "hello:1"]);
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("used by container one"), "{refused:?}");
    assert_eq!(story.finish(&["kill", "one"]).code, 0);
    assert_eq!(container.wait(), 137);
    assert_eq!(story.finish(&["rmi", "hello:1"]).code, 0);
    assert_nothing_is_kept(&story);
}

#[test]
fn one_layer_is_unpacked_by_two_processes_at_once() {
    let story = Story::new();
    let saved = story.volume().join("saved.tar");
    hello("x\n").write_docker_archive(&saved, "hello:1");
    let load = || story.vmrun(&["load", "-q", "-i", saved.to_str().expect("path")]).spawn().expect("vmrun starts");
    let children = [load(), load(), load()];
    for mut child in children {
        assert!(child.wait().expect("wait").success());
    }
    assert_eq!(fs::read_dir(story.data_root().join("layers")).expect("layers").count(), 2);
}

#[test]
fn what_a_killed_process_left_is_neither_used_nor_kept() {
    let story = Story::new();
    let dir = layout(&story, &hello("whole\n"));
    let image = format!("oci:{}", dir.display());
    assert_eq!(run(&story, &image, &[]).success(), "whole\n");
    // As if it had been killed while it unpacked the layers again.
    let layers = story.data_root().join("layers");
    for entry in fs::read_dir(&layers).expect("layers").flatten() {
        let name = format!(".{}.new", entry.file_name().display());
        fs::rename(entry.path(), layers.join(name)).expect("renamed");
    }
    fs::create_dir(layers.join(".0123456789abcdef01234567.new")).expect("another");
    assert_eq!(run(&story, &image, &[]).success(), "whole\n");
    let hidden = fs::read_dir(&layers)
        .expect("layers")
        .flatten()
        .filter(|e| e.file_name().display().to_string().starts_with('.'));
    assert_eq!(hidden.count(), 0);
}

#[test]
fn a_damaged_image_is_refused_with_its_cause() {
    let story = Story::new();
    let dir = layout(&story, &hello("x\n"));
    let image = format!("oci:{}", dir.display());
    let refused = |words: &[&str]| assert_refused(&story, &["run", "--rm", &image], words);
    let damage = |path: &Path, at: u64| {
        let file = fs::OpenOptions::new().read(true).write(true).open(path).expect("blob");
        let mut byte = [0; 1];
        file.read_exact_at(&mut byte, at).expect("byte");
        file.write_all_at(&[!byte[0]], at).expect("byte");
    };
    let (layer, manifest) = (largest_blob(&dir), manifest_blob(&dir));
    damage(&layer, 5000);
    refused(&["wrong digest", "fetch the image again"]);
    damage(&layer, 5000);
    damage(&manifest, 10);
    refused(&["wrong digest"]);
    damage(&manifest, 10);
    fs::rename(&layer, dir.join("moved")).expect("moved");
    refused(&["cannot open", "No such file"]);
    fs::rename(dir.join("moved"), &layer).expect("moved");
    assert_refused(&story, &["run", &format!("{image}:other")], &["no image is tagged \"other\"", "hello:1"]);
    fs::write(dir.join("index.json"), "{").expect("index");
    refused(&["index.json is not an image index"]);
    assert_refused(&story, &["run", "oci:/no/such"], &["/no/such", "No such file"]);
}

#[test]
fn a_damaged_archive_is_refused_with_its_cause() {
    let story = Story::new();
    let tar = story.volume().join("oci.tar");
    pack(&layout(&story, &hello("x\n")), &tar);
    let len = fs::metadata(&tar).expect("archive").len();
    fs::OpenOptions::new().write(true).open(&tar).expect("archive").set_len(len / 2).expect("cut off");
    let path = tar.to_str().expect("path");
    assert_refused(&story, &["run", &format!("oci-archive:{path}")], &["not a complete tar archive"]);
    assert_refused(&story, &["load", "-i", path], &["not a complete tar archive"]);
    let saved = story.volume().join("saved.tar");
    hello("x\n").write_docker_archive(&saved, "hello:1");
    let wrong = format!("docker-archive:{}:hello:2", saved.display());
    assert_refused(&story, &["run", &wrong], &["no image is named \"hello:2\"", "hello:1"]);
    let bytes = fs::read(&saved).expect("archive");
    let at =
        bytes.windows(7).position(|window| window == b"busybox").expect("within the lowest layer") as u64 + 100_000;
    fs::OpenOptions::new().write(true).open(&saved).expect("archive").write_all_at(b"damage", at).expect("written");
    assert_refused(&story, &["load", "-i", saved.to_str().expect("path")], &["wrong digest", "configuration names"]);
}

#[test]
fn a_full_disk_is_said_and_nothing_is_left_on_it() {
    let story = Story::new();
    let dir = layout(&story, &hello("x\n"));
    fs::create_dir(story.data_root()).expect("data root");
    let mounted =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=1500k", "small"]).arg(story.data_root()).status();
    assert!(mounted.expect("mount").success());
    assert_refused(&story, &["run", &format!("oci:{}", dir.display())], &["No space left", "--data-root"]);
    assert!(Command::new("umount").arg(story.data_root()).status().expect("umount").success());
}

#[test]
fn a_bundle_runs_as_its_specification_says() {
    let story = Story::new();
    let bundle = story.volume().join("bundle");
    fs::create_dir(&bundle).expect("bundle");
    fs::rename(story.rootfs(), bundle.join("rootfs")).expect("rootfs");
    let mut spec = json!({
        "ociVersion": "1.0.2", "root": {"path": "rootfs"}, "hostname": "from-bundle",
        "process": {"args": ["sh", "-c", "hostname; id -u; echo $A; pwd"], "cwd": "/tmp", "env": ["PATH=/bin", "A=b"],
            "user": {"uid": 1000, "gid": 1000}},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        ],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "uts"}, {"type": "ipc"}]},
    });
    let write = |spec: &Value| fs::write(bundle.join("config.json"), spec.to_string()).expect("specification");
    write(&spec);
    let image = format!("bundle:{}", bundle.display());
    assert_eq!(run(&story, &image, &[]).success(), "from-bundle\n1000\nb\n/tmp\n");
    assert_eq!(run(&story, &image, &["echo", "other"]).success(), "other\n");
    let refused = |arguments: &[&str], word: &str| assert_refused(&story, arguments, &[word]);
    refused(&["run", "--env", "A=c", &image], "--env");
    spec["linux"]["namespaces"][0]["path"] = json!("/proc/1/ns/pid");
    write(&spec);
    refused(&["run", &image], "linux.namespaces[].path");
    fs::write(bundle.join("config.json"), "{").expect("specification");
    refused(&["run", &image], "not an OCI specification");
}

/// `tests/debian-image` made it before; each form but the first shares the unpacked layer.
#[test]
fn the_debian_image_runs_python_in_every_form() {
    let story = Story::new();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("debian-image");
    let dir = outcome(Command::new(script)).success().trim().to_owned();
    let oci_archive = format!("oci-archive:{}", story.volume().join("oci.tar").display());
    let docker_archive = format!("docker-archive:{}", story.volume().join("saved.tar").display());
    for target in [format!("{oci_archive}:debian"), format!("{docker_archive}:debian:python")] {
        let mut copy = Command::new("skopeo");
        copy.args(["--insecure-policy", "--tmpdir"]).arg(story.volume()).args([
            "copy",
            "-q",
            &format!("oci:{dir}"),
            &target,
        ]);
        assert_eq!(outcome(copy).code, 0);
    }
    for image in [format!("oci:{dir}"), oci_archive, docker_archive] {
        assert_eq!(run(&story, &image, &["python3", "-c", "print(6 * 7)"]).success(), "42\n", "{image}");
    }
}
