//! What the guest finds in `/` before the agent has mounted anything. A table and no logic; [`crate::image`] packs it.

/// One file of the image. Everything belongs to root.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    /// Path without the leading slash, as the archive format wants it.
    pub(crate) path: &'static str,
    /// What kind of file it is.
    pub(crate) kind: Kind,
    /// Permission bits, with the sticky bit where it applies.
    pub(crate) permissions: u32,
}

/// The kinds of file an image holds.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// An empty directory, something to mount on.
    Directory,
    /// A character device.
    Device { major: u32, minor: u32 },
    /// The agent's binary.
    Agent,
}

/// The whole image, parents before children: the kernel unpacks front to back and creates no missing directory.
pub(crate) const ENTRIES: &[Entry] = &[
    directory("dev", 0o755),
    // The kernel opens this as descriptors 0, 1 and 2 of /init. Without it the agent starts with none, and the first
    // three files that it opens become its standard streams.
    Entry { path: "dev/console", kind: Kind::Device { major: 5, minor: 1 }, permissions: 0o600 },
    directory("proc", 0o555),
    directory("run", 0o755),
    directory("sys", 0o555),
    directory("tmp", 0o1777),
    Entry { path: "init", kind: Kind::Agent, permissions: 0o755 },
];

const fn directory(path: &'static str, permissions: u32) -> Entry {
    Entry { path, kind: Kind::Directory, permissions }
}
