//! Archives made here, unpacked into a folder that has neighbours; as root, because owners and devices are part of it.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};

use proptest::prelude::*;
use rustix::fs::CWD;
use tar::{Builder, Header};
use tempfile::TempDir;

use super::*;

/// An entry to write; the name and link go into the header as they are.
#[derive(Clone, Debug)]
struct Member {
    kind: EntryType,
    name: String,
    link: String,
    data: Vec<u8>,
    mode: u32,
    device: (u32, u32),
}

fn member(kind: EntryType, name: &str, link: &str) -> Member {
    Member { kind, name: name.to_owned(), link: link.to_owned(), data: Vec::new(), mode: 0o755, device: (1, 3) }
}

fn file(name: &str, data: &[u8]) -> Member {
    Member { data: data.to_owned(), mode: 0o644, ..member(EntryType::Regular, name, "") }
}

fn dir(name: &str) -> Member {
    member(EntryType::Directory, name, "")
}

fn header(member: &Member) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(member.kind);
    header.set_size(member.data.len() as u64);
    header.set_mode(member.mode);
    header.set_uid(1000);
    header.set_gid(1001);
    header.set_mtime(1_000_000);
    header.set_device_major(member.device.0).expect("gnu");
    header.set_device_minor(member.device.1).expect("gnu");
    // Not set_path, which refuses what an attacker would write.
    let old = header.as_old_mut();
    let (name, link) = (member.name.as_bytes(), member.link.as_bytes());
    old.name[..name.len()].copy_from_slice(name);
    old.linkname[..link.len()].copy_from_slice(link);
    header.set_cksum();
    header
}

fn archive(members: &[Member]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for member in members {
        builder.append(&header(member), member.data.as_slice()).expect("appended");
    }
    builder.into_inner().expect("finished")
}

/// A folder `layer` beside files that must not change.
struct Target(TempDir);

impl Target {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        fs::create_dir(dir.path().join("layer")).expect("layer");
        fs::create_dir(dir.path().join("etc")).expect("etc");
        fs::write(dir.path().join("etc/canary"), "alive").expect("canary");
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join("layer").join(name)
    }

    fn unpack(&self, members: &[Member]) -> Result<Vec<PathBuf>> {
        self.unpack_bytes(&archive(members))
    }

    fn unpack_bytes(&self, bytes: &[u8]) -> Result<Vec<PathBuf>> {
        let root = openat(CWD, self.path(""), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).expect("target");
        unpack(bytes, root)
    }

    fn refusal(&self, members: &[Member]) -> String {
        format!("{:#}", self.unpack(members).expect_err("refused"))
    }

    fn assert_neighbours_are_unharmed(&self) {
        let names: BTreeSet<_> =
            fs::read_dir(self.0.path()).expect("list").map(|e| e.expect("entry").file_name()).collect();
        assert_eq!(names, BTreeSet::from(["etc".into(), "layer".into()]));
        assert_eq!(fs::read_dir(self.0.path().join("etc")).expect("list").count(), 1);
        let canary = fs::metadata(self.0.path().join("etc/canary")).expect("canary");
        assert_eq!((canary.uid(), canary.nlink(), canary.mode() & 0o7777), (0, 1, 0o644));
        assert_eq!(fs::read(self.0.path().join("etc/canary")).expect("canary"), b"alive");
    }

    fn is_whiteout(&self, name: &str) -> bool {
        fs::symlink_metadata(self.path(name)).is_ok_and(|m| m.file_type().is_char_device() && m.rdev() == 0)
    }
}

#[test]
fn owner_mode_time_and_content_are_the_archives() {
    let target = Target::new();
    let setuid = Member { mode: 0o4755, ..file("bin/su", b"program") };
    target.unpack(&[Member { mode: 0o1777, ..dir("bin") }, setuid]).expect("unpacked");
    let su = fs::metadata(target.path("bin/su")).expect("su");
    assert_eq!((su.uid(), su.gid(), su.mode() & 0o7777, su.mtime()), (1000, 1001, 0o4755, 1_000_000));
    assert_eq!(fs::read(target.path("bin/su")).expect("su"), b"program");
    let bin = fs::metadata(target.path("bin")).expect("bin");
    assert_eq!((bin.uid(), bin.mode() & 0o7777, bin.mtime()), (1000, 0o1777, 1_000_000));
}

#[test]
fn devices_fifos_and_links_are_made() {
    let target = Target::new();
    let members = [
        file("a", b"x"),
        member(EntryType::Link, "b", "/a"),
        member(EntryType::Symlink, "c", "/etc/passwd"),
        member(EntryType::Char, "null", ""),
        member(EntryType::Fifo, "fifo", ""),
    ];
    target.unpack(&members).expect("unpacked");
    assert_eq!(fs::metadata(target.path("b")).expect("b").nlink(), 2);
    assert_eq!(fs::read_link(target.path("c")).expect("c"), Path::new("/etc/passwd"));
    assert_eq!(fs::symlink_metadata(target.path("c")).expect("c").uid(), 1000);
    let null = fs::metadata(target.path("null")).expect("null");
    assert_eq!((null.rdev(), null.mode() & 0o7777), (rustix::fs::makedev(1, 3), 0o755));
    assert!(fs::metadata(target.path("fifo")).expect("fifo").file_type().is_fifo());
}

#[test]
fn whiteouts_become_overlayfs_marks() {
    let target = Target::new();
    let opaque = target.unpack(&[dir("d"), file("d/.wh..wh..opq", b""), file("d/.wh.gone", b"")]).expect("unpacked");
    assert_eq!(opaque, [PathBuf::from("d")]);
    assert!(target.is_whiteout("d/gone"));
}

#[test]
fn a_whiteout_leaves_what_its_own_layer_has() {
    let target = Target::new();
    let before = [file("f", b"new"), file(".wh.f", b""), dir("d"), file("d/x", b""), file(".wh.d", b"")];
    assert_eq!(target.unpack(&before).expect("unpacked"), [PathBuf::from("d")]);
    assert_eq!(fs::read(target.path("f")).expect("f"), b"new");
    assert!(target.path("d/x").exists());

    let target = Target::new();
    let after =
        [file(".wh.f", b""), file("f", b"new"), file(".wh.d", b""), file("d/x", b""), file(".wh.e", b""), dir("e")];
    assert_eq!(target.unpack(&after).expect("unpacked"), [PathBuf::from("d"), PathBuf::from("e")]);
    assert_eq!(fs::read(target.path("f")).expect("f"), b"new");
    assert!(target.path("d/x").exists());
}

#[test]
fn names_that_are_no_whiteout_are_refused() {
    for name in [".wh.", ".wh..", "d/.wh..."] {
        let refusal = Target::new().refusal(&[file(name, b"")]);
        assert!(refusal.contains("not a whiteout"), "{name}: {refusal}");
    }
    Target::new().unpack(&[file(".wh..wh.plnk", b"")]).expect("a note of AUFS is skipped");
}

#[test]
fn a_hard_link_to_what_is_not_in_the_layer_is_refused() {
    let link = member(EntryType::Link, "b", "a");
    assert!(Target::new().refusal(&[file(".wh.a", b""), link.clone()]).contains("which this layer deletes"));
    assert!(Target::new().refusal(&[link]).contains("not in this layer"));
    assert!(Target::new().refusal(&[member(EntryType::Link, "b", "no/such")]).contains("not in this layer"));
}

#[test]
fn later_entries_replace_earlier_ones_of_any_kind() {
    let target = Target::new();
    let members = [
        dir("d"),
        file("d/inside", b""),
        file("d", b"file now"),
        member(EntryType::Symlink, "l", "d"),
        file("l", b"no link now"),
        file("f", b""),
        dir("f"),
        file("f/inside", b""),
    ];
    target.unpack(&members).expect("unpacked");
    assert_eq!(fs::read(target.path("d")).expect("d"), b"file now");
    assert_eq!(fs::read(target.path("l")).expect("l"), b"no link now");
    assert!(target.path("f/inside").exists());
}

#[test]
fn a_directory_that_became_a_link_out_is_never_followed() {
    let target = Target::new();
    let etc = target.0.path().join("etc").display().to_string();
    for out in [etc.as_str(), "../etc", "/", ".."] {
        let members =
            [dir("d"), file("d/inside", b""), member(EntryType::Symlink, "d", out), file("d/canary", b"dead")];
        // What it names may or may not exist within the layer.
        let _ = target.unpack(&members);
        target.assert_neighbours_are_unharmed();
    }
    let etc_mtime = fs::metadata(target.0.path().join("etc")).expect("etc").mtime();
    assert_ne!(etc_mtime, 1_000_000, "a directory's time was set through a link");
}

#[test]
fn links_are_followed_within_the_layer() {
    let target = Target::new();
    let members = [dir("usr"), dir("usr/lib"), member(EntryType::Symlink, "lib", "/usr/lib"), file("lib/x", b"x")];
    target.unpack(&members).expect("unpacked");
    assert!(target.path("usr/lib/x").exists());
}

#[test]
fn names_that_lead_out_are_refused_and_absolute_ones_start_at_the_root() {
    for name in ["../etc/canary", "a/../../etc/canary", ".."] {
        let target = Target::new();
        assert!(target.refusal(&[file(name, b"dead")]).contains("leads out"), "{name}");
        target.assert_neighbours_are_unharmed();
    }
    let target = Target::new();
    target.unpack(&[file("/etc/canary", b"inside")]).expect("unpacked");
    assert_eq!(fs::read(target.path("etc/canary")).expect("file"), b"inside");
    target.assert_neighbours_are_unharmed();
    assert!(Target::new().refusal(&[member(EntryType::Link, "a", "../etc/canary")]).contains("leads out"));
}

#[test]
fn long_names_and_extended_headers_are_read() {
    let target = Target::new();
    let long = format!("{}/{}", "d".repeat(150), "f".repeat(150));
    let mut builder = Builder::new(Vec::new());
    let (mut long_header, short_header) = (header(&file("", b"")), header(&file("short", b"")));
    builder.append_data(&mut long_header, &long, &b""[..]).expect("gnu long name");
    let capability: &[u8] = &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let extensions: [(&str, &[u8]); 4] = [
        ("path", b"named/in/pax"),
        ("mtime", b"1234.5"),
        ("SCHILY.xattr.security.capability", capability),
        ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
    ];
    builder.append_pax_extensions(extensions).expect("pax");
    builder.append(&short_header, &b""[..]).expect("entry");
    target.unpack_bytes(&builder.into_inner().expect("finished")).expect("unpacked");
    assert!(target.path(&long).exists());
    let named = target.path("named/in/pax");
    assert_eq!(
        (named.metadata().expect("file").mtime(), named.metadata().expect("file").mtime_nsec()),
        (1234, 500_000_000)
    );
    let mut value = [0; 32];
    assert_eq!(rustix::fs::getxattr(&named, "security.capability", &mut value).expect("capability"), 20);
    rustix::fs::getxattr(&named, "trusted.overlay.opaque", &mut value).expect_err("overlayfs's own attribute");
}

#[test]
fn zeros_become_holes() {
    let target = Target::new();
    let mut data = vec![0; 4 << 20];
    data[3 << 20] = 1;
    target.unpack(&[file("sparse", &data)]).expect("unpacked");
    let sparse = fs::metadata(target.path("sparse")).expect("file");
    assert_eq!(sparse.len(), 4 << 20);
    assert!(sparse.blocks() * 512 < 1 << 20, "{} blocks", sparse.blocks());
    assert_eq!(fs::read(target.path("sparse")).expect("file"), data);
}

#[test]
fn what_is_cut_off_or_damaged_is_an_error() {
    let bytes = archive(&[file("a", &[7; 2000])]);
    Target::new().unpack_bytes(&bytes[..1024]).expect_err("cut off within a file");
    let mut damaged = bytes.clone();
    damaged[0] ^= 1;
    Target::new().unpack_bytes(&damaged).expect_err("bad checksum");
    assert!(Target::new().refusal(&[member(EntryType::new(b'Z'), "a", "")]).contains("unknown"));
}

#[test]
fn depth_is_bounded_through_links_too() {
    let deep = vec!["d"; 40].join("/");
    let mut members = vec![dir(&deep)];
    for level in 0..8 {
        // Each link leads as deep again as the last.
        let from = if level == 0 { String::new() } else { format!("l{}/", level - 1) };
        members.push(member(EntryType::Symlink, &format!("l{level}"), &format!("{from}{deep}")));
        members.push(dir(&format!("l{level}/{deep}")));
    }
    let refusal = Target::new().refusal(&members);
    assert!(refusal.contains("deep"), "{refusal}");
}

fn any_member() -> impl Strategy<Value = Member> {
    let kind = prop::sample::select(vec![
        EntryType::Regular,
        EntryType::Directory,
        EntryType::Symlink,
        EntryType::Link,
        EntryType::Fifo,
        EntryType::Char,
    ]);
    let part =
        prop::sample::select(vec!["a", "b", "c", "..", ".", "etc", "canary", ".wh.a", ".wh.b", ".wh..wh..opq", ""]);
    let path = prop::collection::vec(part, 1..4).prop_map(|parts| parts.join("/"));
    let data = prop::collection::vec(any::<u8>(), 0..20);
    (kind, path.clone(), path, data, 0_u32..0o7777).prop_map(|(kind, name, link, data, mode)| {
        let data = if kind.is_file() { data } else { Vec::new() };
        Member { kind, name, link, data, mode, device: (1, 3) }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn no_sequence_of_entries_reaches_a_neighbour(members in prop::collection::vec(any_member(), 0..12)) {
        let target = Target::new();
        let _ = target.unpack(&members);
        target.assert_neighbours_are_unharmed();
    }

    #[test]
    fn any_bytes_are_unpacked_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
        let target = Target::new();
        let _ = target.unpack_bytes(&bytes);
        target.assert_neighbours_are_unharmed();
    }

    #[test]
    fn a_damaged_archive_is_unpacked_or_refused(
        members in prop::collection::vec(any_member(), 1..6), at in any::<prop::sample::Index>(), byte: u8,
    ) {
        let mut bytes = archive(&members);
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let target = Target::new();
        let _ = target.unpack_bytes(&bytes);
        target.assert_neighbours_are_unharmed();
    }

    #[test]
    fn files_come_back_as_they_were_packed(contents in prop::collection::btree_map("[a-z]{1,3}/[a-z]{1,3}x", prop::collection::vec(any::<u8>(), 0..600), 0..8)) {
        let target = Target::new();
        let members: Vec<Member> = contents.iter().map(|(name, data)| file(name, data)).collect();
        target.unpack(&members).expect("unpacked");
        for (name, data) in &contents {
            prop_assert_eq!(&fs::read(target.path(name)).expect("file"), data);
        }
    }
}
