//! What the bench of vsock does in a guest, whose first process it is: connects to the host's port 1024 and does what it is told there, until the
//! connection ends. Each order is a letter and a number of bytes: `e`, with a second number, to echo so many so often; `r` to read so many and
//! say so with one byte; `w` to write so many.
//! Compiled by `vsock`, not by cargo.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::FromRawFd;

const AF_VSOCK: i32 = 40;
const SOCK_STREAM: i32 = 1;
const HOST_CID: u32 = 2;
const PORT: u32 = 1024;
const CHUNK_LEN: usize = 64 << 10;

/// `struct sockaddr_vm`.
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    zero: [u8; 4],
}

unsafe extern "C" {
    fn socket(domain: i32, kind: i32, protocol: i32) -> i32;
    fn connect(socket: i32, address: *const Address, len: u32) -> i32;
}

fn dial() -> io::Result<File> {
    let address = Address { family: AF_VSOCK as u16, reserved: 0, port: PORT, cid: HOST_CID, zero: [0; 4] };
    let len = u32::try_from(size_of::<Address>()).expect("small");
    // SAFETY: both calls read what they are given, and the descriptor is nobody else's.
    unsafe {
        let fd = socket(AF_VSOCK, SOCK_STREAM, 0);
        if fd < 0 || connect(fd, &address, len) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(File::from_raw_fd(fd))
    }
}

fn main() -> io::Result<()> {
    let mut host = dial()?;
    let mut chunk = vec![0x5a; CHUNK_LEN];
    loop {
        let mut order = [0; 9];
        host.read_exact(&mut order)?;
        let count = u64::from_le_bytes(order[1..].try_into().expect("eight bytes"));
        let mut left = usize::try_from(count).expect("a 64-bit guest");
        match order[0] {
            b'e' => {
                let mut rounds = [0; 8];
                host.read_exact(&mut rounds)?;
                for _ in 0..u64::from_le_bytes(rounds) {
                    host.read_exact(&mut chunk[..left])?;
                    host.write_all(&chunk[..left])?;
                }
            }
            b'r' => {
                while left > 0 {
                    let most = left.min(CHUNK_LEN);
                    left -= host.read(&mut chunk[..most])?;
                }
                host.write_all(b"r")?;
            }
            _ => {
                while left > 0 {
                    let most = left.min(CHUNK_LEN);
                    left -= host.write(&chunk[..most])?;
                }
            }
        }
    }
}
