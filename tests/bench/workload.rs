//! What the bench of files does in a guest, in a folder that the host shares. Each part waits for the file `go-PART`, so that the host can count
//! from there on, and ends with the file `done-PART`: how many operations, and the nanoseconds of all.
//! Compiled by `files`, not by cargo.

use std::error::Error;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

type Part = fn(&Path, u64) -> std::io::Result<u64>;

const PARTS: [(&str, Part); 7] = [
    ("sequential-write", sequential_write),
    ("sequential-read", sequential_read),
    ("random-write", random_write),
    ("random-read", random_read),
    ("create", create),
    ("stat", stat),
    ("unlink", unlink),
];

const FILE_LEN: u64 = 64 << 20;
const CHUNK_LEN: usize = 1 << 20;
const BLOCK_LEN: usize = 4 << 10;
/// Of x86: past the page cache of the guest.
const O_DIRECT: i32 = 0o40000;
/// A prime, so that one block after the other is far away and none comes twice.
const STRIDE: u64 = 7919;

fn main() -> Result<(), Box<dyn Error>> {
    let mut words = std::env::args().skip(1);
    let folder = PathBuf::from(words.next().ok_or("FOLDER is missing")?);
    let count = words.next().ok_or("COUNT is missing")?.parse()?;
    for (name, part) in PARTS {
        fs::write("/proc/sys/vm/drop_caches", "3")?;
        while !folder.join(format!("go-{name}")).exists() {
            thread::sleep(Duration::from_millis(50));
        }
        let began = Instant::now();
        let operations = part(&folder, count)?;
        let took = began.elapsed().as_nanos();
        fs::write(folder.join("new"), format!("{operations} {took}"))?;
        fs::rename(folder.join("new"), folder.join(format!("done-{name}")))?;
    }
    Ok(())
}

fn sequential_write(folder: &Path, _: u64) -> std::io::Result<u64> {
    let mut file = File::create(folder.join("data"))?;
    let chunk = vec![0x5a; CHUNK_LEN];
    let operations = FILE_LEN / CHUNK_LEN as u64;
    (0..operations).try_for_each(|_| file.write_all(&chunk))?;
    file.sync_all()?;
    Ok(operations)
}

fn sequential_read(folder: &Path, _: u64) -> std::io::Result<u64> {
    let mut file = File::open(folder.join("data"))?;
    let mut chunk = vec![0; CHUNK_LEN];
    let operations = FILE_LEN / CHUNK_LEN as u64;
    (0..operations).try_for_each(|_| file.read_exact(&mut chunk))?;
    Ok(operations)
}

fn offsets(count: u64) -> impl Iterator<Item = u64> {
    let blocks = FILE_LEN / BLOCK_LEN as u64;
    (0..count).map(move |number| number * STRIDE % blocks * BLOCK_LEN as u64)
}

/// File systems that take `O_DIRECT` want it so.
#[repr(align(4096))]
struct Block([u8; BLOCK_LEN]);

fn open_direct(folder: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT).open(folder.join("data"))
}

fn random_write(folder: &Path, count: u64) -> std::io::Result<u64> {
    let (file, block) = (open_direct(folder)?, Block([0xa5; BLOCK_LEN]));
    offsets(count).try_for_each(|offset| file.write_all_at(&block.0, offset))?;
    Ok(count)
}

fn random_read(folder: &Path, count: u64) -> std::io::Result<u64> {
    let (file, mut block) = (open_direct(folder)?, Block([0; BLOCK_LEN]));
    offsets(count).try_for_each(|offset| file.read_exact_at(&mut block.0, offset))?;
    Ok(count)
}

fn small_files(folder: &Path, count: u64) -> impl Iterator<Item = PathBuf> {
    let folder = folder.join("files");
    (0..count).map(move |number| folder.join(format!("file-{number}")))
}

fn create(folder: &Path, count: u64) -> std::io::Result<u64> {
    fs::create_dir(folder.join("files"))?;
    small_files(folder, count).try_for_each(|path| File::create(path).map(drop))?;
    Ok(count)
}

fn stat(folder: &Path, count: u64) -> std::io::Result<u64> {
    small_files(folder, count).try_for_each(|path| fs::metadata(path).map(drop))?;
    Ok(count)
}

fn unlink(folder: &Path, count: u64) -> std::io::Result<u64> {
    small_files(folder, count).try_for_each(fs::remove_file)?;
    Ok(count)
}
