//! Digests of content: `sha256:` and 64 hexadecimal digits, the only algorithm that images are named by in practice.

use std::fmt;
use std::io::{self, Read};

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// A checked digest; safe as the name of a file.
#[derive(Clone, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Digest(String);

impl Digest {
    /// Reads `sha256:...`.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        match text.strip_prefix("sha256:") {
            Some(hash)
                if hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) =>
            {
                Ok(Self(hash.to_owned()))
            }
            _ => bail!("{text:?} is not a sha256 digest"),
        }
    }

    /// The digest of some bytes.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self(hex(&Sha256::digest(bytes)))
    }

    /// The hexadecimal digits.
    pub(crate) fn hex(&self) -> &str {
        &self.0
    }

    /// Docker's short form.
    pub(crate) fn short(&self) -> &str {
        &self.0[..12]
    }

    /// Fails unless `actual` is this digest.
    pub(crate) fn verify(&self, actual: &Self) -> Result<()> {
        if self != actual {
            bail!("wrong digest: {self} was asked for, the content is {actual}; fetch the image again");
        }
        Ok(())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "sha256:{}", self.0)
    }
}

impl TryFrom<String> for Digest {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text).map_err(|error| error.to_string())
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

/// Hashes what is read through it.
pub(crate) struct HashingReader<R> {
    input: R,
    hasher: Sha256,
    len: u64,
}

impl<R: Read> HashingReader<R> {
    pub(crate) fn new(input: R) -> Self {
        Self { input, hasher: Sha256::new(), len: 0 }
    }

    /// Digest and number of the bytes so far.
    pub(crate) fn finish(self) -> (Digest, u64) {
        (Digest(hex(&self.hasher.finalize())), self.len)
    }

    /// Bytes so far.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        self.len += count as u64;
        Ok(count)
    }
}

/// Hashes bytes that arrive in pieces.
#[derive(Default)]
pub(crate) struct HashingWriter(Sha256);

impl HashingWriter {
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of all pieces.
    pub(crate) fn finish(self) -> Digest {
        Digest(hex(&self.0.finalize()))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::Digest;

    #[test]
    fn only_lower_case_sha256_is_a_digest() {
        let hash = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::parse(&format!("sha256:{hash}")).expect("digest"), Digest::of(b""));
        for text in ["", hash, "sha512:00", "sha256:", &format!("sha256:{}", hash.to_uppercase()), "sha256:../../etc"] {
            assert!(Digest::parse(text).is_err(), "{text:?}");
        }
    }
}
