//! The agent's binary: reads it and refuses what cannot run as the only file of a root file system.
//!
//! Without this check the mistake shows up much later, as a guest that panics with "No working init found".

use std::fs;
use std::io;
use std::path::Path;

use thiserror::Error;

/// Why a file cannot be the agent.
#[derive(Debug, Error)]
pub(crate) enum AgentError {
    #[error("cannot read it; build the agent first, or correct --agent")]
    Read(#[source] io::Error),
    #[error("it is not a 64-bit little-endian ELF program; give the path of the agent's release binary")]
    NotElf,
    #[error("its ELF program headers lie outside the file, which is probably cut short; build it again")]
    Truncated,
    #[error(
        "it is dynamically linked (it asks for the loader {interpreter}), and the image holds no libraries; \
         build it with RUSTFLAGS='-C target-feature=+crt-static' and an explicit --target"
    )]
    Dynamic { interpreter: String },
}

/// Reads the agent, and returns its bytes if a kernel can start it with nothing else in the file system.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, AgentError> {
    let bytes = fs::read(path).map_err(AgentError::Read)?;
    check_static(&bytes)?;
    Ok(bytes)
}

/// A program that needs a loader names it in a PT_INTERP segment. A static-pie program has PT_DYNAMIC but no PT_INTERP.
fn check_static(bytes: &[u8]) -> Result<(), AgentError> {
    if !bytes.starts_with(ELF64_LITTLE_ENDIAN) {
        return Err(AgentError::NotElf);
    }
    let table = number(bytes, E_PHOFF, 8)?;
    let entry_len = number(bytes, E_PHENTSIZE, 2)?;
    for index in 0..number(bytes, E_PHNUM, 2)? {
        let header = index.checked_mul(entry_len).and_then(|offset| offset.checked_add(table));
        let header = bytes.get(header.ok_or(AgentError::Truncated)?..).ok_or(AgentError::Truncated)?;
        if number(header, P_TYPE, 4)? == PT_INTERP {
            let interpreter = slice(bytes, number(header, P_OFFSET, 8)?, number(header, P_FILESZ, 8)?)?;
            let interpreter = String::from_utf8_lossy(interpreter).trim_end_matches('\0').to_owned();
            return Err(AgentError::Dynamic { interpreter });
        }
    }
    Ok(())
}

/// The little-endian number of `len` bytes, at most 8, at `offset`.
fn number(bytes: &[u8], offset: usize, len: usize) -> Result<usize, AgentError> {
    let mut wide = [0; 8];
    wide[..len].copy_from_slice(slice(bytes, offset, len)?);
    usize::try_from(u64::from_le_bytes(wide)).map_err(|_| AgentError::Truncated)
}

fn slice(bytes: &[u8], offset: usize, len: usize) -> Result<&[u8], AgentError> {
    let end = offset.checked_add(len).ok_or(AgentError::Truncated)?;
    bytes.get(offset..end).ok_or(AgentError::Truncated)
}

// System V ABI, object files: e_ident, then offsets into Elf64_Ehdr and Elf64_Phdr.
const ELF64_LITTLE_ENDIAN: &[u8] = b"\x7fELF\x02\x01";
const E_PHOFF: usize = 32;
const E_PHENTSIZE: usize = 54;
const E_PHNUM: usize = 56;
const P_TYPE: usize = 0;
const P_OFFSET: usize = 8;
const P_FILESZ: usize = 32;
const PT_INTERP: usize = 3;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A header of 64 bytes and one program header of the given type, which covers the text behind it.
    fn program(segment_type: u32, text: &str) -> Vec<u8> {
        let mut bytes = vec![0; 120];
        bytes[..6].copy_from_slice(ELF64_LITTLE_ENDIAN);
        bytes[E_PHOFF] = 64;
        bytes[E_PHENTSIZE] = 56;
        bytes[E_PHNUM] = 1;
        bytes[64..68].copy_from_slice(&segment_type.to_le_bytes());
        bytes[64 + P_OFFSET] = 120;
        bytes[64 + P_FILESZ] = u8::try_from(text.len()).expect("the texts below are short");
        bytes.extend(text.as_bytes());
        bytes
    }

    #[test]
    fn accepts_static_program() {
        let load = program(1, "");
        assert!(check_static(&load).is_ok());
    }

    #[test]
    fn accepts_static_pie_program() {
        let dynamic = program(2, "");
        assert!(check_static(&dynamic).is_ok());
    }

    #[test]
    fn refuses_dynamic_program_and_says_what_to_do() {
        let error = check_static(&program(3, "/lib64/ld.so\0")).expect_err("it names a loader").to_string();
        assert!(error.contains("/lib64/ld.so)"), "{error}");
        assert!(error.contains("+crt-static"), "{error}");
    }

    #[test]
    fn refuses_script() {
        assert!(matches!(check_static(b"#!/bin/sh\n"), Err(AgentError::NotElf)));
    }

    #[test]
    fn refuses_truncated_program() {
        let whole = program(3, "/lib64/ld.so\0");
        assert!(matches!(check_static(&whole[..100]), Err(AgentError::Truncated)));
    }

    proptest! {
        #[test]
        fn never_panics_on_foreign_bytes(tail in prop::collection::vec(any::<u8>(), 0..200)) {
            let bytes = [ELF64_LITTLE_ENDIAN, &tail].concat();
            let _verdict = check_static(&bytes);
        }
    }
}
