//! `vmrun install containerd` and `vmrun uninstall containerd`: a handler in containerd's configuration, and the shim where containerd
//! looks for it. Called by `main`.
//!
//! ```text
//!  dump ─► drop-in ─► dump: only the handler is new? ─yes─► link the shim ─► run a container ─► say what to do
//!             └─no: undo ─► lines in the main file ─► dump ─no: undo, refuse
//! ```
//! containerd itself says what a configuration means (`containerd config dump`): 1.x lets a drop-in replace the whole section of a
//! plugin that the main file has, so a drop-in which is right for one host takes the CNI settings from another. Nothing is kept that
//! changes more than the handler. Undoing needs no record: what is ours says so.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, io};

use anyhow::{Context as _, Result, bail, ensure};

pub(crate) use args::{InstallArgs, InstallTarget, UninstallArgs, UninstallTarget};
use edit::Format;

mod args;
mod edit;

/// The shim's file name, which containerd makes from the runtime's.
const SHIM: &str = "containerd-shim-vm-v2";
const RUNTIME: &str = "io.containerd.vm.v2";
/// Below the folder of the main file.
const DROP_IN: &str = "conf.d/vmrun.toml";

pub(crate) fn install(args: &InstallArgs) -> Result<u8> {
    let containerd = Containerd::find(args.containerd.as_deref(), &args.config)?;
    ensure!(edit::is_handler_name(&args.handler), "the handler {:?} is not a DNS label", args.handler);
    let before = containerd.dump()?;
    let format = Format::of(&read_or_empty(&args.config)?, containerd.major)?;
    if edit::has_handler(&before, format, &args.handler) {
        bail!(
            "{} has the handler {} already; `vmrun uninstall containerd` removes it",
            args.config.display(),
            args.handler
        );
    }
    let shim = env::current_exe().context("cannot tell where vmrun is")?.with_file_name(SHIM);
    ensure!(shim.exists(), "{} is not there: build it with `make build`", shim.display());

    let undo = configure(&containerd, format, &args.handler, &before)?;
    let linked = link(&shim, &args.bin_dir);
    let checked = linked.and_then(|()| if args.no_check { Ok(None) } else { check(&args.address) });
    match checked {
        Ok(ran) => print(args, ran),
        Err(error) => {
            unlink(&args.bin_dir)?;
            undo.undo()?;
            return Err(error.context("nothing was installed"));
        }
    }
    Ok(0)
}

pub(crate) fn uninstall(args: &UninstallArgs) -> Result<u8> {
    let mut removed = Vec::new();
    let drop_in = args.config.with_file_name(DROP_IN);
    if edit::is_ours(&read_or_empty(&drop_in)?) {
        remove_drop_in(&drop_in)?;
        removed.push(drop_in);
    }
    let text = read_or_empty(&args.config)?;
    let without = edit::without_ours(&text);
    if without != text {
        write_or_remove(&args.config, &without)?;
        removed.push(args.config.clone());
    }
    removed.extend(unlink(&args.bin_dir)?);
    for path in &removed {
        println!("restored {}", path.display());
    }
    let advice = if removed.is_empty() {
        "nothing of vmrun was there"
    } else {
        "restart containerd: systemctl restart containerd"
    };
    println!("{advice}");
    Ok(0)
}

/// The daemon's program and its main file.
struct Containerd<'a> {
    program: &'a Path,
    config: &'a Path,
    major: u32,
}

impl<'a> Containerd<'a> {
    fn find(program: Option<&'a Path>, config: &'a Path) -> Result<Self> {
        let program = program.unwrap_or(Path::new("containerd"));
        // `containerd github.com/containerd/containerd VERSION REVISION`
        let printed = output(Command::new(program).arg("--version"))
            .with_context(|| format!("cannot run {}; name it with --containerd", program.display()))?;
        let version = printed.split_whitespace().nth(2).unwrap_or_default().trim_start_matches('v');
        let major = version.split('.').next().and_then(|major| major.parse().ok());
        let major = major.with_context(|| format!("{} says no version that is known: {printed}", program.display()))?;
        Ok(Self { program, config, major })
    }

    /// The configuration as containerd understands it.
    fn dump(&self) -> Result<toml::Table> {
        let mut command = Command::new(self.program);
        if self.config.exists() {
            command.arg("--config").arg(self.config);
        } else {
            // Without a file the defaults count, also in a place that is not the usual one.
            command.args(["--config", "/dev/null"]);
        }
        let printed =
            output(command.args(["config", "dump"])).context("containerd does not accept its configuration")?;
        printed.parse().context("containerd printed a configuration that is not TOML")
    }
}

/// What takes back a change of the configuration.
struct Undo<'a> {
    config: &'a Path,
    /// Nothing when there was no file.
    main: Option<String>,
    drop_in: Option<PathBuf>,
}

impl Undo<'_> {
    fn undo(self) -> Result<()> {
        if let Some(drop_in) = &self.drop_in {
            remove_drop_in(drop_in)?;
        }
        write_or_remove(self.config, self.main.as_deref().unwrap_or_default())
    }
}

/// Adds the handler in the first way that changes nothing else.
fn configure<'a>(containerd: &Containerd<'a>, format: Format, handler: &str, before: &toml::Table) -> Result<Undo<'a>> {
    let config = containerd.config;
    let main = config.exists().then(|| read_or_empty(config)).transpose()?;
    let text = main.clone().unwrap_or_default();
    let drop_in = config.with_file_name(DROP_IN);
    let importing = edit::with_import(&text, format, &drop_in.with_file_name("*.toml"))?;
    // containerd 1.x has runc by itself only as long as no handler is named. Its copy comes last: it would hide later changes.
    let defaults = edit::handlers_of(before, format);
    let mut ways = Vec::new();
    for kept in [&toml::Table::new(), &defaults] {
        if let Some(importing) = &importing {
            ways.push((importing.clone(), Some((drop_in.clone(), edit::drop_in(format, handler, kept)?))));
        }
        ways.push((edit::with_handler(&text, format, handler, kept)?, None));
    }
    let mut refusal = anyhow::anyhow!("containerd's configuration has no place for a handler");
    for (main_text, drop_in) in ways {
        let undo = Undo { config, main: main.clone(), drop_in: drop_in.as_ref().map(|(path, _)| path.clone()) };
        if let Some((path, text)) = &drop_in {
            write(path, text)?;
        }
        write(config, &main_text)?;
        match containerd.dump().and_then(|after| edit::only_handler_is_new(before, after, format, handler)) {
            Ok(()) => return Ok(undo),
            Err(error) => {
                refusal = error;
                undo.undo()?;
            }
        }
    }
    Err(refusal.context(format!("cannot add a handler to {}; it is as it was", config.display())))
}

/// Puts the shim where containerd finds it.
fn link(shim: &Path, bin_dir: &Path) -> Result<()> {
    let link = bin_dir.join(SHIM);
    if fs::canonicalize(&link).is_ok_and(|there| fs::canonicalize(shim).is_ok_and(|ours| there == ours)) {
        return Ok(());
    }
    symlink(shim, &link).with_context(|| format!("cannot link {} to {}", link.display(), shim.display()))
}

/// Removes the link to the shim; a file that is no link is not ours.
fn unlink(bin_dir: &Path) -> Result<Option<PathBuf>> {
    let link = bin_dir.join(SHIM);
    if !fs::read_link(&link).is_ok_and(|target| target.file_name().is_some_and(|name| name == SHIM)) {
        return Ok(None);
    }
    fs::remove_file(&link).with_context(|| format!("cannot remove {}", link.display()))?;
    Ok(Some(link))
}

/// Runs `/bin/true` of this host, whose files the VM sees read-only; nothing when containerd does not run.
fn check(address: &Path) -> Result<Option<()>> {
    if std::os::unix::net::UnixStream::connect(address).is_err() {
        return Ok(None);
    }
    let id = format!("vmrun-check-{}", std::process::id());
    let mut ctr = Command::new("ctr");
    ctr.arg("--address").arg(address);
    ctr.args(["run", "--rm", "--runtime", RUNTIME, "--read-only", "--rootfs", "/", &id, "/bin/true"]);
    output(&mut ctr).context("a container did not run in a VM; `vmrun check` says what this host lacks")?;
    Ok(Some(()))
}

fn print(args: &InstallArgs, ran: Option<()>) {
    match ran {
        Some(()) => println!("a container ran in a VM"),
        None => println!(
            "no container was run: containerd does not answer at {}, or --no-check was given",
            args.address.display()
        ),
    }
    println!("use it now:        ctr run --rm --runtime {RUNTIME} IMAGE ID COMMAND");
    println!("for Kubernetes:    systemctl restart containerd, then a RuntimeClass with `handler: {}`", args.handler);
    println!("take it back with: vmrun uninstall containerd");
}

fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let done = command.output().with_context(|| format!("cannot start {name}"))?;
    let complaint = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "{name} failed, {}: {}", done.status, complaint.trim_end());
    String::from_utf8(done.stdout).with_context(|| format!("{name} printed what is not UTF-8"))
}

fn read_or_empty(path: &Path) -> Result<String> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        read => read.with_context(|| format!("cannot read {}", path.display())),
    }
}

fn remove_drop_in(path: &Path) -> Result<()> {
    fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))?;
    // The folder stays when others have files in it.
    let _ = path.parent().map(fs::remove_dir);
    Ok(())
}

/// An empty file is removed: it was made by the installation.
fn write_or_remove(path: &Path, text: &str) -> Result<()> {
    match (text.is_empty(), path.exists()) {
        (false, _) => write(path, text),
        (true, true) => fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display())),
        (true, false) => Ok(()),
    }
}

/// Replaces a file by rename, keeping its mode, so that a reader has the old or the new one.
fn write(path: &Path, text: &str) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let write = || -> io::Result<()> {
        let file = tempfile::NamedTempFile::new_in(folder)?;
        fs::write(file.path(), text)?;
        let mode = fs::metadata(path)
            .map_or_else(|_| std::os::unix::fs::PermissionsExt::from_mode(0o644), |m| m.permissions());
        fs::set_permissions(file.path(), mode)?;
        file.persist(path)?;
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}
