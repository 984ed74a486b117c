//! The command line of `install` and `uninstall`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// For whom the runtime is installed.
#[derive(Debug, Subcommand)]
pub(crate) enum InstallTarget {
    /// Add a handler to containerd's configuration, link the shim, and run a container to see that it works.
    Containerd(InstallArgs),
}

/// For whom it is taken back.
#[derive(Debug, Subcommand)]
pub(crate) enum UninstallTarget {
    /// Take out of containerd's configuration what `install` added, and the link to the shim.
    Containerd(UninstallArgs),
}

/// Where containerd is, and what it gets.
#[derive(Args, Debug)]
pub(crate) struct InstallArgs {
    /// containerd's configuration.
    #[arg(long, default_value = "/etc/containerd/config.toml", value_name = "FILE")]
    pub(crate) config: PathBuf,
    /// containerd's program, where it is not in PATH.
    #[arg(long, value_name = "FILE")]
    pub(crate) containerd: Option<PathBuf>,
    /// containerd's socket.
    #[arg(long, default_value = "/run/containerd/containerd.sock", value_name = "SOCKET")]
    pub(crate) address: PathBuf,
    /// Name of the handler, which a RuntimeClass names.
    #[arg(long, default_value = "vm", value_name = "NAME")]
    pub(crate) handler: String,
    /// A folder of containerd's PATH, which gets the link to the shim.
    #[arg(long, default_value = "/usr/local/bin", value_name = "DIR")]
    pub(crate) bin_dir: PathBuf,
    /// Run no container.
    #[arg(long)]
    pub(crate) no_check: bool,
}

/// Where containerd is.
#[derive(Args, Debug)]
pub(crate) struct UninstallArgs {
    /// containerd's configuration.
    #[arg(long, default_value = "/etc/containerd/config.toml", value_name = "FILE")]
    pub(crate) config: PathBuf,
    /// The folder with the link to the shim.
    #[arg(long, default_value = "/usr/local/bin", value_name = "DIR")]
    pub(crate) bin_dir: PathBuf,
}
