//! Names, owners and orphans.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::thread;

use super::{State, StateDir, StateError, Status, is_owned, list, orphans, read, remove};

fn state(name: &str) -> State {
    State {
        name: name.to_owned(),
        image: "rootfs:/srv".to_owned(),
        command: vec!["true".to_owned()],
        created_at_ms: 1,
        started_at_ms: None,
        finished_at_ms: None,
        owner_pid: 1,
        vmm_pid: None,
        data_dir: PathBuf::from("/data"),
        cgroup: None,
        degraded: Vec::new(),
        io_limits: Vec::new(),
        auto_remove: false,
        error: None,
        status: Status::Creating,
    }
}

fn exited(name: &str) -> State {
    State { status: Status::Exited { exit_code: 3, oom_killed: false }, ..state(name) }
}

fn root() -> tempfile::TempDir {
    tempfile::tempdir().expect("temporary directory")
}

#[test]
fn a_state_is_read_as_it_was_written() {
    let root = root();
    let dir = StateDir::create(root.path(), &state("one")).expect("create");
    assert_eq!(read(root.path(), "one").expect("read"), state("one"));
    dir.write(&exited("one")).expect("write");
    assert_eq!(list(root.path()).expect("list"), [exited("one")]);
}

#[test]
fn a_name_is_taken_while_its_owner_lives_and_while_it_is_kept() {
    let root = root();
    let dir = StateDir::create(root.path(), &state("one")).expect("create");
    let refused = || StateDir::create(root.path(), &state("one")).err().expect("refused");
    assert!(matches!(refused(), StateError::NameInUse { .. }));
    dir.write(&exited("one")).expect("write");
    drop(dir);
    assert!(matches!(refused(), StateError::NameInUse { .. }));
    assert_eq!(remove(root.path(), "one").expect("removed"), Some(exited("one")));
    StateDir::create(root.path(), &state("one")).expect("the name is free again");
}

#[test]
fn the_folder_of_a_dead_owner_is_an_orphan_and_is_replaced() {
    let root = root();
    drop(StateDir::create(root.path(), &state("one")).expect("create"));
    assert_eq!(orphans(root.path()).expect("orphans"), ["one"]);
    let _dir = StateDir::create(root.path(), &state("one")).expect("the name is free again");
    assert!(is_owned(root.path(), "one"));
    assert!(orphans(root.path()).expect("orphans").is_empty());
}

#[test]
fn a_folder_that_was_only_begun_is_an_orphan() {
    let root = root();
    fs::create_dir(root.path().join("half")).expect("folder");
    assert_eq!(orphans(root.path()).expect("orphans"), ["half"]);
    assert_eq!(remove(root.path(), "half").expect("removed"), None);
}

#[test]
fn a_running_container_is_not_removed() {
    let root = root();
    let _dir = StateDir::create(root.path(), &state("one")).expect("create");
    let error = remove(root.path(), "one").expect_err("refused");
    assert!(matches!(error, StateError::Owned { .. }), "{error}");
}

#[test]
fn of_many_who_want_a_name_one_gets_it() {
    let root = root();
    drop(StateDir::create(root.path(), &state("one")).expect("an orphan to replace"));
    let barrier = Barrier::new(16);
    let attempt = |path: &Path| {
        barrier.wait();
        StateDir::create(path, &state("one")).ok()
    };
    let kept: Vec<StateDir> = thread::scope(|scope| {
        let threads: Vec<_> = (0..16).map(|_| scope.spawn(|| attempt(root.path()))).collect();
        threads.into_iter().filter_map(|thread| thread.join().expect("no panic")).collect()
    });
    assert_eq!(kept.len(), 1);
}

#[test]
fn names_cannot_leave_the_root() {
    let root = root();
    for name in ["..", "a/b", "", "-rf", "a\nb"] {
        let error = StateDir::create(root.path(), &state(name)).err().expect("refused");
        assert!(matches!(error, StateError::InvalidName { .. }), "{name:?}: {error}");
    }
}

#[test]
fn folders_are_closed_to_other_users() {
    let dir = root();
    let root = dir.path().join("made/run");
    let one = StateDir::create(&root, &state("one")).expect("create");
    for folder in [dir.path().join("made").as_path(), &root, one.path()] {
        let mode = fs::metadata(folder).expect("a folder").permissions().mode();
        assert_eq!(mode & 0o7777, 0o700, "{}", folder.display());
    }
}

#[test]
fn a_link_in_the_place_of_a_folder_is_replaced_and_not_followed() {
    let (root, elsewhere) = (root(), root());
    fs::write(elsewhere.path().join("file"), "kept").expect("a file");
    symlink(elsewhere.path(), root.path().join("one")).expect("a link");
    let dir = StateDir::create(root.path(), &state("one")).expect("create");
    assert!(fs::symlink_metadata(dir.path()).expect("a folder").is_dir());
    // Nor is one that comes later, at the folder or in it.
    symlink(elsewhere.path(), dir.path().join("link")).expect("a link");
    dir.remove().expect("removed");
    symlink(elsewhere.path(), root.path().join("one")).expect("a link");
    assert_eq!(remove(root.path(), "one").expect("removed"), None);
    assert_eq!(fs::read_dir(root.path()).expect("the root").count(), 0);
    let names: Vec<_> = fs::read_dir(elsewhere.path()).expect("a folder").flatten().map(|e| e.file_name()).collect();
    assert_eq!(names, ["file"]);
}
