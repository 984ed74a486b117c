//! What the guest finds in `/` before the agent has mounted anything. A table and no logic; [`crate::image`] packs it.

/// One file of the image. Everything belongs to root.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    /// Path without the leading slash.
    pub(crate) path: &'static str,
    /// What kind of file it is.
    pub(crate) kind: Kind,
    /// Permission bits.
    pub(crate) permissions: u32,
}

/// The kinds of file an image holds.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// An empty directory, something to mount on.
    Directory,
    /// The agent's binary.
    Agent,
}

/// The whole image. The console that becomes the agent's standard streams is not in it: the kernel opens that before it
/// mounts the image.
pub(crate) const ENTRIES: &[Entry] = &[
    directory("dev"),
    // Where the agent mounts the root that it moves to.
    directory("newroot"),
    Entry { path: "init", kind: Kind::Agent, permissions: 0o755 },
];

const fn directory(path: &'static str) -> Entry {
    Entry { path, kind: Kind::Directory, permissions: 0o755 }
}
