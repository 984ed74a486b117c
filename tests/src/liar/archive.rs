//! Archives that lead out of the folder that they are unpacked to, or are none.

/// Lies about files.
#[derive(Clone, Copy, Debug)]
pub enum Archive {
    /// A name that leads out.
    Parent,
    /// A name from the root.
    Absolute,
    /// A link that leads out, and a file behind it.
    ThroughLink,
    /// A hard link to a file of the host.
    HardLink,
    /// A device.
    Device,
    /// A size that the archive does not have.
    WrongSize,
    /// No archive.
    Garbage,
    /// An end in the middle.
    Cut,
}

pub(super) const ARCHIVES: [(&str, Archive); 8] = [
    ("archive-parent", Archive::Parent),
    ("archive-absolute", Archive::Absolute),
    ("archive-through-link", Archive::ThroughLink),
    ("archive-hard-link", Archive::HardLink),
    ("archive-device", Archive::Device),
    ("archive-wrong-size", Archive::WrongSize),
    ("archive-garbage", Archive::Garbage),
    ("archive-cut", Archive::Cut),
];

impl Archive {
    pub(super) fn bytes(self) -> Vec<u8> {
        match self {
            Self::Parent => entry("../../escaped", b'0', "", 4, b"evil"),
            Self::Absolute => entry("/tmp/escaped-by-a-liar", b'0', "", 4, b"evil"),
            Self::ThroughLink => {
                [entry("file", b'2', "/tmp", 0, b""), entry("file/escaped-by-a-liar", b'0', "", 4, b"evil")].concat()
            }
            Self::HardLink => entry("file", b'1', "/etc/shadow", 0, b""),
            Self::Device => entry("file", b'4', "", 0, b""),
            Self::WrongSize => entry("file", b'0', "", 1 << 40, b"short"),
            Self::Garbage => vec![0xa5; 4096],
            Self::Cut => entry("file", b'0', "", 6, b"honest")[..300].to_vec(),
        }
    }
}

/// One entry of a tar archive (POSIX ustar), with whatever name and size.
pub(super) fn entry(name: &str, kind: u8, link: &str, size: u64, content: &[u8]) -> Vec<u8> {
    let mut header = [0; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..108].copy_from_slice(b"0000644\0");
    header[108..124].copy_from_slice(b"0000000\x000000000\0");
    let octal = format!("{size:011o}");
    header[124..124 + octal.len().min(12)].copy_from_slice(&octal.as_bytes()[..octal.len().min(12)]);
    header[136..148].copy_from_slice(b"00000000000\0");
    header[148..156].fill(b' ');
    header[156] = kind;
    header[157..157 + link.len()].copy_from_slice(link.as_bytes());
    header[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut bytes = header.to_vec();
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(512) + 1024, 0);
    bytes
}
