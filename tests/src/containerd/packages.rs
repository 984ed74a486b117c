//! Where the unpacked packages are: containerd of three Debian releases, runc, Docker and the CNI plugins.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// A Debian release whose containerd the stories run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// containerd 1.6: task service v2, CRI without a sandbox service.
    Bookworm,
    /// containerd 1.7: task service v2, the first sandbox service.
    Trixie,
    /// containerd 2: task service v3, configuration version 3.
    Sid,
}

impl Release {
    /// How many there are.
    pub(super) const COUNT: usize = 3;

    /// Its name, which is the folder's.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
            Self::Sid => "sid",
        }
    }
}

/// `PATH` for containerd and `ctr` of a release: their own programs, runc, Docker, the link to the shim, the system's.
pub(super) fn path(release: Release) -> String {
    let packages = packages();
    let containerd = packages.join(release.name()).join("usr/bin");
    let others = ["runc/usr/sbin", "docker/usr/sbin", "docker/usr/bin"].map(|folder| packages.join(folder));
    let [runc, dockerd, docker] = others.each_ref().map(|folder| folder.display());
    format!("{}:{runc}:{dockerd}:{docker}:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", containerd.display())
}

/// The CNI plugins.
pub(super) fn cni_plugins() -> PathBuf {
    packages().join("cni/usr/lib/cni")
}

/// `make test` unpacked them before; this asks where.
fn packages() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("containerd-packages");
        let printed = Command::new(script).stderr(Stdio::inherit()).output().expect("tests/containerd-packages starts");
        assert!(printed.status.success(), "tests/containerd-packages failed");
        let cached = PathBuf::from(String::from_utf8(printed.stdout).expect("a path").trim_end());
        if crate::is_emulated() { copy_to_memory(&cached) } else { cached }
    })
}

/// Copies the programs once to a tmpfs of the emulated host: a Go program starts there in 1 s, and from virtiofs in 6 s.
fn copy_to_memory(cached: &Path) -> PathBuf {
    const COPY: &str = r#"
set -e
exec 9>"$2.lock"
flock 9
[ -e "$2" ] && exit
rm -rf "$2.new"
mkdir "$2.new"
cd "$1"
tar -c */usr/bin */usr/sbin */usr/lib/cni 2>/dev/null | tar -x -C "$2.new"
mv "$2.new" "$2"
"#;
    let copy = Path::new("/tmp").join("containerd-packages").with_extension(cached.file_name().expect("a name"));
    let copied = Command::new("sh").args(["-c", COPY, "sh"]).arg(cached).arg(&copy).status().expect("sh starts");
    assert!(copied.success(), "{} was not copied", cached.display());
    copy
}
