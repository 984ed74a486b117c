//! `vmrun cp`: files between a running container and here, by Docker's rules.
//!
//! | source | destination | result |
//! |---|---|---|
//! | file | nothing, without a slash behind it | a file of that name |
//! | file | file | replaced |
//! | file, folder | folder | the source in it, under its own name |
//! | folder | nothing | a folder of that name |
//! | folder with `/.` behind it | folder | the contents of the source in it |
//!
//! The archive that comes out of a container is a guest's: it is unpacked below the destination only, under the name that was
//! asked for, and no device comes of it.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Write as _};
use std::net::Shutdown;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};

use crate::client::Client;
use crate::control::{Answer, PathKind, Request};

/// One side of a copy.
#[derive(Debug, Eq, PartialEq)]
enum Place<'a> {
    Container {
        name: &'a str,
        path: &'a str,
    },
    Here(&'a str),
    /// A tar archive on standard input or output.
    Archive,
}

/// Where in which folder a copy goes; `name` is `.` when the contents of a folder go into it.
#[derive(Debug, Eq, PartialEq)]
struct Target {
    folder: PathBuf,
    name: PathBuf,
}

pub(crate) fn cp(root: &Path, keep_owners: bool, source: &str, destination: &str) -> Result<u8> {
    match (place(source), place(destination)) {
        (Place::Container { name, path }, Place::Here(here)) => {
            copy_out(root, name, path, Path::new(here), keep_owners)?
        }
        (Place::Container { name, path }, Place::Archive) => {
            let base = base_name(path);
            receive(root, name, path, &base, |stream| Ok(io::copy(stream, &mut io::stdout().lock()).map(drop)?))?;
        }
        (Place::Here(here), Place::Container { name, path }) => {
            copy_in(root, name, Path::new(here), path, keep_owners)?
        }
        (Place::Archive, Place::Container { name, path }) => {
            ensure!(stat(root, name, path)? == PathKind::Folder, "{name}:{path} is not a folder");
            send(root, name, path, |stream| Ok(io::copy(&mut io::stdin().lock(), stream).map(drop)?))?;
        }
        (Place::Container { .. }, Place::Container { .. }) => bail!("copying between containers is not supported"),
        _ => bail!("one of {source:?} and {destination:?} must be CONTAINER:PATH"),
    }
    Ok(0)
}

/// A path with a colon is one of ours when it begins with a dot or a slash, as with Docker.
fn place(text: &str) -> Place<'_> {
    match text.split_once(':') {
        _ if text == "-" => Place::Archive,
        Some((name, path)) if !name.is_empty() && !name.starts_with(['.', '/']) && !name.contains('/') => {
            Place::Container { name, path: if path.is_empty() { "/" } else { path } }
        }
        _ => Place::Here(text),
    }
}

fn copy_out(root: &Path, name: &str, path: &str, here: &Path, keep_owners: bool) -> Result<()> {
    let path = absolute(path);
    let source = stat(root, name, &path)?;
    // A symbolic link that leads nowhere is a file as well; the agent says whether it is there.
    let is_folder = source == PathKind::Folder;
    let kind = kind_here(here);
    let target = target(&path, is_folder, here, kind)?;
    if is_folder && target.name == Path::new(".") && kind == PathKind::Nothing {
        fs::create_dir(&target.folder).with_context(|| format!("cannot make {}", target.folder.display()))?;
    }
    let shown = target.name.to_str().context("the destination is not UTF-8")?.to_owned();
    receive(root, name, &path, &shown, |stream| unpack(stream, &target, keep_owners))
}

/// Unpacks what a guest sends.
fn unpack(stream: &mut UnixStream, target: &Target, keep_owners: bool) -> Result<()> {
    let mut archive = tar::Archive::new(&mut *stream);
    archive.set_preserve_permissions(false);
    archive.set_preserve_ownerships(keep_owners);
    let mut folders = Vec::new();
    for entry in archive.entries()? {
        let mut entry = entry.context("the container sent a broken archive")?;
        let path = entry.path()?.into_owned();
        ensure!(is_below(&path, &target.name), "the container sent {}, which was not asked for", path.display());
        let kind = entry.header().entry_type();
        if kind.is_block_special() || kind.is_character_special() || kind.is_fifo() {
            writeln!(io::stderr(), "vmrun: left out {}: it is a device", path.display())?;
            continue;
        }
        if kind.is_dir() {
            // Their modes may forbid to write what follows.
            folders.push((target.folder.join(&path), entry.header().mode()? & 0o777));
            entry.set_mask(0o077);
        }
        let unpacked = entry.unpack_in(&target.folder).with_context(|| format!("cannot write {}", path.display()))?;
        ensure!(unpacked, "the container sent {}, which leads out of the destination", path.display());
    }
    for (folder, mode) in folders.into_iter().rev() {
        let mode: fs::Permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
        if fs::symlink_metadata(&folder)?.is_dir() {
            fs::set_permissions(&folder, mode)?;
        }
    }
    Ok(())
}

/// Whether an entry is what was asked for, or in it.
fn is_below(path: &Path, name: &Path) -> bool {
    let plain = path.components().all(|component| matches!(component, Component::Normal(_) | Component::CurDir));
    plain && (name == Path::new(".") || path.starts_with(name))
}

fn copy_in(root: &Path, name: &str, here: &Path, path: &str, keep_owners: bool) -> Result<()> {
    let source = fs::symlink_metadata(here).with_context(|| format!("cannot read {}", here.display()))?;
    let text = here.to_str().context("the source is not UTF-8")?;
    let is_folder = source.is_dir() || text.ends_with('/') && here.is_dir();
    let path = absolute(path);
    let kind = stat(root, name, &path)?;
    let mut target = target(text, is_folder, Path::new(&path), kind)?;
    if target.name == Path::new(".") && kind == PathKind::Nothing {
        // The folder itself is the first entry of the archive.
        let whole = target.folder.clone();
        target.name = whole.file_name().map_or_else(|| PathBuf::from("."), PathBuf::from);
        target.folder = whole.parent().map_or_else(|| PathBuf::from("/"), Path::to_owned);
    }
    let folder = target.folder.to_str().context("the destination is not UTF-8")?.to_owned();
    ensure!(stat(root, name, &folder)? == PathKind::Folder, "{name}:{folder} is not a folder");
    let source = if text.ends_with('/') || text.ends_with("/.") { fs::canonicalize(here)? } else { here.to_owned() };
    send(root, name, &folder, |stream| pack(stream, &source, &target.name, keep_owners))
}

fn pack(stream: &mut UnixStream, source: &Path, name: &Path, keep_owners: bool) -> Result<()> {
    let mut archive = tar::Builder::new(io::BufWriter::new(stream));
    archive.follow_symlinks(false);
    let mut waiting = vec![(source.to_owned(), name.to_owned())];
    while let Some((source, name)) = waiting.pop() {
        let shown = || format!("cannot copy {}", source.display());
        let metadata = fs::symlink_metadata(&source).with_context(shown)?;
        let kind = metadata.file_type();
        if kind.is_socket() || kind.is_block_device() || kind.is_char_device() || kind.is_fifo() {
            writeln!(io::stderr(), "vmrun: left out {}: it is neither a file nor a folder", source.display())?;
            continue;
        }
        append(&mut archive, &source, &name, &metadata, keep_owners).with_context(shown)?;
        if kind.is_dir() {
            for entry in fs::read_dir(&source).with_context(shown)? {
                let entry = entry.with_context(shown)?;
                waiting.push((entry.path(), name.join(entry.file_name())));
            }
        }
    }
    archive.into_inner()?.flush()?;
    Ok(())
}

fn append(
    archive: &mut tar::Builder<impl io::Write>,
    source: &Path,
    name: &Path,
    metadata: &fs::Metadata,
    keep_owners: bool,
) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_metadata(metadata);
    if !keep_owners {
        header.set_uid(0);
        header.set_gid(0);
    }
    if metadata.is_symlink() {
        return archive.append_link(&mut header, name, fs::read_link(source)?);
    }
    if metadata.is_dir() {
        return archive.append_data(&mut header, name, io::empty());
    }
    archive.append_data(&mut header, name, fs::File::open(source)?)
}

/// Applies the table above.
fn target(source: &str, is_folder: bool, destination: &Path, kind: PathKind) -> Result<Target> {
    let shown = destination.display();
    let wants_folder = destination.as_os_str().as_encoded_bytes().ends_with(b"/");
    let contents = is_folder && (source.ends_with("/.") || source == ".");
    let parent = || destination.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let named = || destination.file_name().map(PathBuf::from).with_context(|| format!("{shown} has no name"));
    match kind {
        PathKind::Folder if contents => Ok(Target { folder: destination.to_owned(), name: ".".into() }),
        PathKind::Folder => Ok(Target { folder: destination.to_owned(), name: base_name(source).into() }),
        PathKind::File if is_folder => bail!("cannot copy a folder onto the file {shown}"),
        PathKind::Nothing if is_folder => Ok(Target { folder: destination.to_owned(), name: ".".into() }),
        PathKind::File | PathKind::Nothing if wants_folder => bail!("{shown} is not a folder"),
        PathKind::File | PathKind::Nothing => Ok(Target { folder: parent().to_owned(), name: named()? }),
    }
}

/// The last name of a path; the contents of the root have none.
fn base_name(path: &str) -> String {
    Path::new(path).file_name().and_then(OsStr::to_str).unwrap_or(".").to_owned()
}

/// Paths of a container begin at its root.
fn absolute(path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
}

fn kind_here(path: &Path) -> PathKind {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => PathKind::Folder,
        Ok(_) => PathKind::File,
        Err(_) => PathKind::Nothing,
    }
}

fn stat(root: &Path, name: &str, path: &str) -> Result<PathKind> {
    let mut client = Client::connect(root, name)?;
    client.send(&Request::StatPath(path.to_owned()))?;
    match client.receive()?.0 {
        Answer::Path(kind) => Ok(kind),
        Answer::Failed(cause) => bail!("{cause}"),
        other => bail!("unexpected answer of the container's owner: {other:?}"),
    }
}

fn receive(
    root: &Path,
    container: &str,
    path: &str,
    name: &str,
    work: impl FnOnce(&mut UnixStream) -> Result<()>,
) -> Result<()> {
    let (mut client, mut stream) =
        Client::open_stream(root, container, &Request::CopyOut { path: path.to_owned(), name: name.to_owned() })?;
    let worked = work(&mut stream);
    drop(stream);
    // The agent's word explains an archive that ends early.
    client.outcome()?;
    worked
}

fn send(root: &Path, container: &str, path: &str, work: impl FnOnce(&mut UnixStream) -> Result<()>) -> Result<()> {
    let (mut client, mut stream) = Client::open_stream(root, container, &Request::CopyIn { path: path.to_owned() })?;
    let worked = work(&mut stream);
    // The agent may have closed it because it failed, which it says next.
    let _ = stream.shutdown(Shutdown::Write);
    client.outcome()?;
    worked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn place_is_a_container_unless_it_looks_like_a_path() {
        assert_eq!(place("box:/etc"), Place::Container { name: "box", path: "/etc" });
        assert_eq!(place("box:"), Place::Container { name: "box", path: "/" });
        assert_eq!(place("./box:file"), Place::Here("./box:file"));
        assert_eq!(place("/a:b"), Place::Here("/a:b"));
        assert_eq!(place("-"), Place::Archive);
    }

    #[test]
    fn target_is_dockers() {
        let to = |source: &str, is_folder, destination: &str, kind| {
            target(source, is_folder, Path::new(destination), kind)
                .map(|found| (found.folder.display().to_string(), found.name.display().to_string()))
                .ok()
        };
        let pair = |folder: &str, name: &str| Some((folder.to_owned(), name.to_owned()));
        assert_eq!(to("/a/f", false, "/d/new", PathKind::Nothing), pair("/d", "new"));
        assert_eq!(to("/a/f", false, "/d/new/", PathKind::Nothing), None);
        assert_eq!(to("/a/f", false, "/d/old", PathKind::File), pair("/d", "old"));
        assert_eq!(to("/a/f", false, "new", PathKind::Nothing), pair(".", "new"));
        assert_eq!(to("/a/f", false, "/d", PathKind::Folder), pair("/d", "f"));
        assert_eq!(to("/a", true, "/d", PathKind::Folder), pair("/d", "a"));
        assert_eq!(to("/a/.", true, "/d", PathKind::Folder), pair("/d", "."));
        assert_eq!(to("/a", true, "/d", PathKind::Nothing), pair("/d", "."));
        assert_eq!(to("/a", true, "/d", PathKind::File), None);
    }

    #[test]
    fn guest_writes_only_what_was_asked_for() {
        assert!(is_below(Path::new("f/x"), Path::new("f")));
        assert!(is_below(Path::new("./x"), Path::new(".")));
        assert!(!is_below(Path::new("g"), Path::new("f")));
        assert!(!is_below(Path::new("f/../g"), Path::new("f")));
        assert!(!is_below(Path::new("/f"), Path::new("f")));
    }

    #[test]
    fn link_of_a_guest_does_not_lead_out_of_the_destination() {
        let outside = tempfile::tempdir().expect("a folder");
        let inside = tempfile::tempdir().expect("a folder");
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        archive.append_link(&mut header, "link", outside.path()).expect("a link");
        let mut header = tar::Header::new_gnu();
        header.set_size(4);
        header.set_mode(0o644);
        archive.append_data(&mut header, "link/file", &b"evil"[..]).expect("a file");
        let bytes = archive.into_inner().expect("an archive");
        let (mut ours, mut theirs) = UnixStream::pair().expect("sockets");
        theirs.write_all(&bytes).expect("written");
        drop(theirs);
        let target = Target { folder: inside.path().to_owned(), name: ".".into() };
        assert!(unpack(&mut ours, &target, false).is_err());
        assert!(!outside.path().join("file").exists());
    }
}
