//! The command line: Docker's names where Docker has them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use sandbox::network::user::PortForward;
use sandbox::state::Protection;

use crate::device_rate::IoArgs;
use crate::image::{OpenOptions, PullPolicy};
use crate::install::{InstallTarget, UninstallTarget};
use crate::log::LogArgs;
use crate::network::{NetworkMode, parse_dns, parse_host, parse_ip, parse_ip6, parse_port};
use crate::port_forward::{Ports, parse_ports};

/// Run OCI containers, each in its own microVM.
#[derive(Debug, Parser)]
#[command(name = "vmrun", version, max_term_width = 100)]
pub(crate) struct Cli {
    /// Folder for the state of running containers.
    #[arg(long, global = true, default_value = "/run/vmrun", value_name = "DIR")]
    pub(crate) root: PathBuf,
    /// Folder for images and for what containers write.
    #[arg(long, global = true, default_value = "/var/lib/vmrun", value_name = "DIR")]
    pub(crate) data_root: PathBuf,
    /// Cgroup of the host below which each VM has its own.
    #[arg(long, global = true, default_value = "/vmrun", value_name = "PATH")]
    pub(crate) cgroup_parent: PathBuf,
    /// What to log on standard error: error, warn, info, debug or trace.
    #[arg(long, global = true, default_value = "warn", value_name = "LEVEL")]
    pub(crate) log_level: String,
    /// Be the supervisor of a detached container: a step of `run --detach`.
    #[arg(long, hide = true)]
    pub(crate) supervise: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a command in a new container, in a new microVM.
    Run(Box<RunArgs>),
    /// Run another command in a running container.
    Exec(ExecArgs),
    /// List containers.
    Ps(PsArgs),
    /// Print what a container wrote.
    Logs(LogsArgs),
    /// Print everything known about containers, as JSON.
    Inspect(NamesArgs),
    /// Send a signal to the command of containers.
    Kill {
        /// Name or number of the signal.
        #[arg(short, long, default_value = "KILL")]
        signal: String,
        #[command(flatten)]
        containers: NamesArgs,
    },
    /// Fetch an image from a registry.
    Pull {
        /// Print only the image's name.
        #[arg(short, long)]
        quiet: bool,
        /// Talk HTTP to the registry, not HTTPS.
        #[arg(long)]
        plain_http: bool,
        /// The image: [REGISTRY/]NAME[:TAG|@DIGEST].
        image: String,
    },
    /// List the images that were pulled or loaded.
    Images {
        /// Print a JSON array.
        #[arg(long)]
        json: bool,
        /// Print only ids.
        #[arg(short, long)]
        quiet: bool,
    },
    /// Remove images.
    Rmi {
        /// Remove an image with all of its names.
        #[arg(short, long)]
        force: bool,
        /// Names or ids.
        #[arg(required = true)]
        images: Vec<String>,
    },
    /// Keep the images of an archive that `docker save` wrote, or of an OCI layout in a tar file.
    Load {
        /// The archive; standard input without it.
        #[arg(short, long, value_name = "FILE")]
        input: Option<PathBuf>,
        /// Print no progress.
        #[arg(short, long)]
        quiet: bool,
    },
    /// Ask the command of containers to end, and kill it when it does not.
    Stop {
        /// Seconds until it is killed.
        #[arg(short = 't', long = "timeout", alias = "time", default_value_t = 10, value_name = "SECONDS")]
        patience_s: u64,
        /// Signal that asks, instead of the container's own.
        #[arg(short, long)]
        signal: Option<String>,
        #[command(flatten)]
        containers: NamesArgs,
    },
    /// Copy files between a running container and here.
    Cp {
        /// Keep the owners of the files.
        #[arg(short, long)]
        archive: bool,
        /// CONTAINER:PATH, a path, or `-` for a tar archive on standard input.
        #[arg(value_name = "SRC")]
        source: String,
        /// CONTAINER:PATH, a path, or `-` for a tar archive on standard output.
        #[arg(value_name = "DST")]
        destination: String,
    },
    /// Let ports of this host lead to ports of a container, until it ends.
    PortForward {
        /// Address to listen at.
        #[arg(long, default_value = "127.0.0.1", value_name = "ADDRESS")]
        address: IpAddr,
        /// Name of the container.
        name: String,
        /// Ports: one for both sides, one of each, or only the container's, for any that is free here.
        #[arg(required = true, value_name = "[[LOCAL]:]REMOTE", value_parser = parse_ports)]
        ports: Vec<Ports>,
    },
    /// Wait for containers to exit, and print their exit statuses.
    Wait(NamesArgs),
    /// Freeze every process of containers.
    Pause(NamesArgs),
    /// Let paused containers go on.
    Unpause(NamesArgs),
    /// Remove containers that have exited.
    Rm {
        /// Also containers that run; they are killed.
        #[arg(short, long)]
        force: bool,
        #[command(flatten)]
        containers: NamesArgs,
    },
    /// Show what containers use.
    Stats(StatsArgs),
    /// Remove what containers left whose owner was killed.
    Gc,
    /// Say whether this host can run microVMs, line by line.
    Check {
        /// Say instead whether it is fit for hostile guests.
        #[arg(long)]
        security: bool,
        /// Print a JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Make the runtime known to containerd.
    Install {
        /// For whom.
        #[command(subcommand)]
        target: InstallTarget,
    },
    /// Take back what `install` did.
    Uninstall {
        /// For whom.
        #[command(subcommand)]
        target: UninstallTarget,
    },
    /// Unpack a layer from standard input: a step of `run` in a process of its own.
    #[command(hide = true)]
    UnpackLayer {
        /// none, gzip or zstd.
        compression: String,
        /// An empty directory.
        target: PathBuf,
    },
    /// Print the completion script of a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
}

/// What the container is.
#[derive(Args, Debug)]
#[command(disable_help_flag = true)]
pub(crate) struct RunArgs {
    /// Print help.
    #[arg(long, action = clap::ArgAction::Help)]
    help: Option<bool>,
    /// Keep standard input open.
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give the command a terminal.
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Run in the background, and print the container's name.
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Remove the container when it exits.
    #[arg(long)]
    pub(crate) rm: bool,
    /// Name of the container.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Set an environment variable; without a value, pass ours on.
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// Read environment variables from a file of NAME=VALUE lines.
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// Working directory of the command.
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// User of the command: name or number, and group.
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// Host name of the container.
    #[arg(short, long)]
    pub(crate) hostname: Option<String>,
    /// Memory limit of the container, as 512m or 2g.
    #[arg(short, long, default_value = "512m", value_parser = parse_bytes)]
    pub(crate) memory: u64,
    /// CPU limit of the container.
    #[arg(long, default_value_t = 1.0)]
    pub(crate) cpus: f64,
    /// Most processes in the container.
    #[arg(long, value_name = "COUNT")]
    pub(crate) pids_limit: Option<i64>,
    #[command(flatten)]
    pub(crate) io: IoArgs,
    /// Share a host path with the container; OPTIONS: ro, rslave (what the host mounts below it later appears too).
    #[arg(short, long, value_name = "HOST:GUEST[:OPTIONS]")]
    pub(crate) volume: Vec<String>,
    /// Mount a tmpfs.
    #[arg(long, value_name = "GUEST[:OPTIONS]")]
    pub(crate) tmpfs: Vec<String>,
    /// Make the container's root read-only.
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Add a capability.
    #[arg(long, value_name = "CAPABILITY")]
    pub(crate) cap_add: Vec<String>,
    /// Drop a capability.
    #[arg(long, value_name = "CAPABILITY")]
    pub(crate) cap_drop: Vec<String>,
    /// Security option: no-new-privileges, seccomp=unconfined or seccomp=FILE.
    #[arg(long, value_name = "OPTION")]
    pub(crate) security_opt: Vec<String>,
    /// Run without a protection of the host that this one cannot give: cgroup (limits of all that the VM costs).
    #[arg(long, value_name = "NAME", value_parser = parse_protection)]
    pub(crate) allow_degraded: Vec<Protection>,
    /// Give the container every capability and device, and no seccomp profile. It stays in its VM.
    #[arg(long)]
    pub(crate) privileged: bool,
    /// Replace the image's entrypoint.
    #[arg(long, value_name = "COMMAND")]
    pub(crate) entrypoint: Option<String>,
    /// Set a kernel parameter in the guest.
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) sysctl: Vec<String>,
    /// Set a resource limit, as nofile=1024:2048.
    #[arg(long, value_name = "TYPE=SOFT[:HARD]")]
    pub(crate) ulimit: Vec<String>,
    /// Run the command below an init, which reaps processes and passes signals on.
    #[arg(long)]
    pub(crate) init: bool,
    /// Kill the command after this time, as 90s or 1h30m; the exit status is then 124.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub(crate) timeout: Option<Duration>,
    /// Signal that `stop` sends, instead of the image's.
    #[arg(long, value_name = "SIGNAL")]
    pub(crate) stop_signal: Option<String>,
    /// Seconds that `stop` waits when it is the supervisor that is stopped.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub(crate) stop_timeout: u64,
    #[command(flatten)]
    pub(crate) log: LogArgs,
    /// Network: none, user, bridge, or netns:PATH [default: user when a port or an address is given, else none].
    #[arg(long, alias = "net", value_name = "MODE")]
    pub(crate) network: Option<NetworkMode>,
    /// Let the host's kernel carry the frames, without the VMM's checks: for --network bridge and netns:PATH.
    #[arg(long)]
    pub(crate) vhost_net: bool,
    /// Let a port of the host reach one of the container; an IP of IPv6 is written as [::1].
    #[arg(short, long, value_name = "[IP:]HOST:GUEST[/udp]", value_parser = parse_port)]
    pub(crate) publish: Vec<PortForward>,
    /// Name server of the container, instead of the host's.
    #[arg(long, value_name = "ADDRESS", value_parser = parse_dns)]
    pub(crate) dns: Vec<IpAddr>,
    /// Add a line to the container's /etc/hosts.
    #[arg(long, value_name = "NAME:ADDRESS", value_parser = parse_host)]
    pub(crate) add_host: Vec<(String, IpAddr)>,
    /// IPv4 address of the container.
    #[arg(long, value_name = "ADDRESS", value_parser = parse_ip)]
    pub(crate) ip: Option<Ipv4Addr>,
    /// IPv6 address of the container: for --network bridge.
    #[arg(long, value_name = "ADDRESS", value_parser = parse_ip6)]
    pub(crate) ip6: Option<Ipv6Addr>,
    /// Print the stages of the start with their times on standard error.
    #[arg(long)]
    pub(crate) timing: bool,
    /// Print the guest's serial console on standard error.
    #[arg(long)]
    pub(crate) console: bool,
    /// When to ask the registry for the image.
    #[arg(long, value_enum, default_value = "missing", value_name = "WHEN")]
    pub(crate) pull: PullPolicy,
    /// Print no progress of fetching the image.
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Talk HTTP to the registry, not HTTPS.
    #[arg(long)]
    pub(crate) plain_http: bool,
    /// The image: NAME[:TAG] of a registry, oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:NAME], rootfs:DIR or
    /// bundle:DIR.
    pub(crate) image: String,
    /// The command and its arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

impl RunArgs {
    /// How to get the image.
    pub(crate) fn open_options(&self) -> OpenOptions {
        OpenOptions { pull: self.pull, quiet: self.quiet, plain_http: self.plain_http }
    }
}

/// What to run in which container.
#[derive(Args, Debug)]
pub(crate) struct ExecArgs {
    /// Run in the background.
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Keep standard input open.
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give the command a terminal.
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Set an environment variable; without a value, pass ours on.
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// Working directory of the command.
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// User of the command: name or number in the container, and group.
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// Name of the container.
    pub(crate) name: String,
    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

/// Which containers.
#[derive(Args, Debug)]
pub(crate) struct NamesArgs {
    /// Names of containers.
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<String>,
}

/// What to list.
#[derive(Args, Debug)]
pub(crate) struct PsArgs {
    /// Also those that have exited.
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Print names only.
    #[arg(short, long, conflicts_with = "json")]
    pub(crate) quiet: bool,
    /// Print a JSON array.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Which part of a log.
#[derive(Args, Debug)]
pub(crate) struct LogsArgs {
    /// Go on with what comes, until the container exits.
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Only the last lines: a number, or all.
    #[arg(short = 'n', long, default_value = "all", value_name = "COUNT", value_parser = parse_tail)]
    pub(crate) tail: Tail,
    /// Print the time before each line.
    #[arg(short, long)]
    pub(crate) timestamps: bool,
    /// Only lines since a time (2026-01-31T12:00:00Z) or for a duration (10m).
    #[arg(long, value_name = "TIME")]
    pub(crate) since: Option<String>,
    /// Name of the container.
    pub(crate) name: String,
}

/// What to show of what is used.
#[derive(Args, Debug)]
pub(crate) struct StatsArgs {
    /// Print once and end.
    #[arg(long)]
    pub(crate) no_stream: bool,
    /// Print JSON arrays, one a line.
    #[arg(long)]
    pub(crate) json: bool,
    /// Names of containers, or all that run.
    #[arg(value_name = "NAME")]
    pub(crate) names: Vec<String>,
}

/// How many lines of a log.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Tail {
    All,
    Last(usize),
}

fn parse_protection(name: &str) -> Result<Protection, String> {
    match name {
        "cgroup" => Ok(Protection::Cgroup),
        _ => Err("the only protection that a VM can do without is cgroup".to_owned()),
    }
}

fn parse_tail(text: &str) -> Result<Tail, String> {
    if text == "all" {
        return Ok(Tail::All);
    }
    text.parse().map(Tail::Last).map_err(|_| format!("{text:?} is neither a number nor all"))
}

/// Reads a duration: seconds, or numbers with units.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    if let Ok(seconds) = text.parse() {
        return Ok(Duration::from_secs(seconds));
    }
    humantime::parse_duration(text).map_err(|_| format!("{text:?} is not a duration; write for example 90s or 1h30m"))
}

/// Reads a size as Docker does: a number and b, k, m or g.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    let lower = lower.strip_suffix('b').unwrap_or(&lower);
    let (digits, shift) = match lower.chars().last() {
        Some('k') => (&lower[..lower.len() - 1], 10),
        Some('m') => (&lower[..lower.len() - 1], 20),
        Some('g') => (&lower[..lower.len() - 1], 30),
        Some('t') => (&lower[..lower.len() - 1], 40),
        _ => (lower, 0),
    };
    let number: u64 = digits.parse().map_err(|_| format!("{text:?} is not a size; write for example 512m or 2g"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is too large"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::{Cli, parse_bytes};

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_are_read_as_docker_reads_them() {
        assert_eq!(parse_bytes("512m"), Ok(512 << 20));
        assert_eq!(parse_bytes("2GB"), Ok(2 << 30));
        assert_eq!(parse_bytes("4096"), Ok(4096));
        assert!(parse_bytes("lots").is_err());
        assert!(parse_bytes("99999999999999g").is_err());
    }
}
