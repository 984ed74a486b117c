//! `--device-read-bps PATH:RATE` and its like, as Docker has them: from the text to limits of the VM's cgroup.

use std::num::NonZeroU64;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use sandbox::cgroup;
use sandbox::io_limit::{Disk, IoKind, IoLimit};
use sandbox::state::Protection;

use crate::cli::parse_bytes;

/// Limits of what the VM reads from disks of the host and writes to them.
#[derive(Args, Debug)]
pub(crate) struct IoArgs {
    /// Limit what the VM reads from a disk of the host, in bytes a second, as /dev/sda:10mb.
    #[arg(long, value_name = "PATH:RATE", value_parser = parse_bps)]
    device_read_bps: Vec<DeviceRate>,
    /// Limit what the VM writes to a disk of the host, in bytes a second.
    #[arg(long, value_name = "PATH:RATE", value_parser = parse_bps)]
    device_write_bps: Vec<DeviceRate>,
    /// Limit the requests a second by which the VM reads from a disk of the host, as /dev/sda:100.
    #[arg(long, value_name = "PATH:RATE", value_parser = parse_iops)]
    device_read_iops: Vec<DeviceRate>,
    /// Limit the requests a second by which the VM writes to a disk of the host.
    #[arg(long, value_name = "PATH:RATE", value_parser = parse_iops)]
    device_write_iops: Vec<DeviceRate>,
}

/// A disk by its path, and a rate.
#[derive(Clone, Debug, Eq, PartialEq)]
struct DeviceRate {
    path: PathBuf,
    rate: NonZeroU64,
}

impl IoArgs {
    /// The limits of a VM that does without these protections.
    pub(crate) fn limits(&self, degraded: &[Protection]) -> Result<Vec<IoLimit>> {
        let kinds = [
            ("--device-read-bps", IoKind::ReadBps, &self.device_read_bps),
            ("--device-write-bps", IoKind::WriteBps, &self.device_write_bps),
            ("--device-read-iops", IoKind::ReadIops, &self.device_read_iops),
            ("--device-write-iops", IoKind::WriteIops, &self.device_write_iops),
        ];
        let mut limits = Vec::new();
        for (flag, kind, rates) in kinds {
            for DeviceRate { path, rate } in rates {
                let disk = Disk::at(path).context(flag)?;
                limits.push(IoLimit { disk, kind, rate: *rate });
            }
        }
        if !limits.is_empty() {
            if degraded.contains(&Protection::Cgroup) {
                bail!("limits of I/O are limits of the cgroup that --allow-degraded=cgroup does without");
            }
            cgroup::check_io()?;
        }
        Ok(limits)
    }
}

fn parse_bps(text: &str) -> Result<DeviceRate, String> {
    parse(text, parse_bytes)
}

fn parse_iops(text: &str) -> Result<DeviceRate, String> {
    parse(text, |rate| rate.parse().map_err(|_| format!("{rate:?} is not a number of requests")))
}

/// Paths have colons (`/dev/disk/by-path`), rates have none.
fn parse(text: &str, parse_rate: impl Fn(&str) -> Result<u64, String>) -> Result<DeviceRate, String> {
    let Some((path, rate)) = text.rsplit_once(':').filter(|(path, _)| path.starts_with('/')) else {
        return Err(format!("{text:?} is not PATH:RATE; write for example /dev/sda:10mb"));
    };
    let rate = NonZeroU64::new(parse_rate(rate)?).ok_or("a rate of 0 would let nothing through")?;
    Ok(DeviceRate { path: path.into(), rate })
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::{IoArgs, parse_bps, parse_iops};

    #[derive(clap::Parser)]
    struct Flags {
        #[command(flatten)]
        io: IoArgs,
    }

    fn refused(flag: &str) -> String {
        let flags = Flags::try_parse_from(["run", flag]).expect("flags");
        format!("{:#}", flags.io.limits(&[]).expect_err("refused"))
    }

    #[test]
    fn rates_are_read_as_docker_reads_them() {
        let bps = |text| parse_bps(text).map(|parsed| (parsed.path.display().to_string(), parsed.rate.get()));
        assert_eq!(bps("/dev/sda:10mb"), Ok(("/dev/sda".to_owned(), 10 << 20)));
        assert_eq!(
            bps("/dev/disk/by-path/pci-0000:00:1f.2:4096"),
            Ok(("/dev/disk/by-path/pci-0000:00:1f.2".to_owned(), 4096))
        );
        assert_eq!(parse_iops("/dev/sda:100").map(|parsed| parsed.rate.get()), Ok(100));
    }

    #[test]
    fn a_rate_that_is_none_is_refused_with_the_reason() {
        for text in ["/dev/sda", "/dev/sda:", "/dev/sda:fast", "/dev/sda:-1", "/dev/sda:1.5mb", "sda:1mb", ":1mb"] {
            parse_bps(text).expect_err(text);
        }
        parse_iops("/dev/sda:1k").expect_err("requests are not counted in thousands");
        assert_eq!(parse_bps("/dev/sda:0"), Err("a rate of 0 would let nothing through".to_owned()));
    }

    #[test]
    fn what_is_no_disk_is_named_with_its_flag() {
        assert_eq!(refused("--device-write-bps=/dev/null:1mb"), "--device-write-bps: /dev/null is no block device");
        let missing = refused("--device-read-iops=/does/not/exist:1");
        assert!(missing.starts_with("--device-read-iops: cannot look at /does/not/exist: "), "{missing}");
    }
}
