//! The texts of containerd's configuration: what is added, found and taken out. Pure; `install` reads and writes.

use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use toml::{Table, Value};

#[cfg(test)]
mod tests;

const BEGIN: &str = "# vmrun: begin; `vmrun uninstall containerd` removes these lines\n";
const END: &str = "# vmrun: end\n";

/// A format of containerd's configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// `version = 2`, containerd 1.3 and newer.
    V2,
    /// `version = 3`, containerd 2.
    V3,
}

impl Format {
    /// The format of a text; of an empty one the newest that this containerd reads.
    pub(super) fn of(text: &str, containerd_major: u32) -> Result<Self> {
        let table: Table = text.parse().context("containerd's configuration is not TOML")?;
        match table.get("version").and_then(Value::as_integer) {
            None if table.is_empty() && containerd_major >= 2 => Ok(Self::V3),
            None if table.is_empty() => Ok(Self::V2),
            Some(2) => Ok(Self::V2),
            Some(3) => Ok(Self::V3),
            Some(other) => bail!("containerd's configuration has version {other}, and 2 and 3 are known"),
            None => bail!(
                "containerd's configuration names no version, so it is version 1: `containerd config migrate` makes a newer one"
            ),
        }
    }

    fn version(self) -> u32 {
        match self {
            Self::V2 => 2,
            Self::V3 => 3,
        }
    }

    /// The plugin that has the handlers.
    fn plugin(self) -> &'static str {
        match self {
            Self::V2 => "io.containerd.grpc.v1.cri",
            Self::V3 => "io.containerd.cri.v1.runtime",
        }
    }
}

/// A handler's name is that of a RuntimeClass's, a DNS label (RFC 1123).
pub(super) fn is_handler_name(name: &str) -> bool {
    let is_inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    !name.is_empty() && name.len() <= 63 && name.bytes().all(is_inner) && !name.starts_with('-') && !name.ends_with('-')
}

/// The handler's table, and those of the handlers that containerd has by itself as long as none is named.
fn handler_tables(format: Format, handler: &str, kept: &Table) -> Result<String> {
    let mut ours = Table::new();
    ours.insert("runtime_type".to_owned(), super::RUNTIME.into());
    ours.insert("privileged_without_host_devices".to_owned(), true.into());
    let mut tables = kept.clone();
    tables.insert(handler.to_owned(), ours.into());
    for name in ["runtimes", "containerd", format.plugin(), "plugins"] {
        tables = Table::from_iter([(name.to_owned(), Value::Table(tables))]);
    }
    toml::to_string(&tables).context("a handler of containerd cannot be written as TOML")
}

/// The handlers that containerd has before any is added.
pub(super) fn handlers_of(dumped: &Table, format: Format) -> Table {
    handlers(&mut dumped.clone(), dumped_format(dumped, format)).map(|handlers| handlers.clone()).unwrap_or_default()
}

/// A drop-in with the handler.
pub(super) fn drop_in(format: Format, handler: &str, kept: &Table) -> Result<String> {
    Ok(format!("{BEGIN}version = {}\n\n{}{END}", format.version(), handler_tables(format, handler, kept)?))
}

/// The main file with the handler at its end.
pub(super) fn with_handler(text: &str, format: Format, handler: &str, kept: &Table) -> Result<String> {
    let version = if text.is_empty() { format!("version = {}\n", format.version()) } else { String::new() };
    let newline = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    Ok(format!("{text}{newline}{BEGIN}{version}{}{END}", handler_tables(format, handler, kept)?))
}

/// The main file importing files of this pattern; nothing when it imports others, for its list is not ours to change.
pub(super) fn with_import(text: &str, format: Format, pattern: &Path) -> Result<Option<String>> {
    let table: Table = text.parse().context("containerd's configuration is not TOML")?;
    let pattern = pattern.to_str().context("the path of the configuration is not UTF-8")?;
    if let Some(imports) = table.get("imports").and_then(Value::as_array).filter(|imports| !imports.is_empty()) {
        let covers = imports.iter().any(|import| import.as_str() == Some(pattern));
        return Ok(covers.then(|| text.to_owned()));
    }
    if table.contains_key("imports") {
        return Ok(None);
    }
    let version = if text.is_empty() { format!("version = {}\n", format.version()) } else { String::new() };
    // Before the first table, where a key is one of the whole file's.
    Ok(Some(format!("{BEGIN}{version}imports = [{pattern:?}]\n{END}{text}")))
}

/// Whether a file was written by the installation.
pub(super) fn is_ours(text: &str) -> bool {
    text.starts_with(BEGIN)
}

/// The text without the lines that the installation added.
pub(super) fn without_ours(text: &str) -> String {
    let mut rest = text;
    let mut kept = String::new();
    while let Some((before, after)) = rest.split_once(BEGIN) {
        let Some((_, after)) = after.split_once(END) else { break };
        kept.push_str(before);
        rest = after;
    }
    kept + rest
}

fn handlers(config: &mut Table, format: Format) -> Option<&mut Table> {
    let plugin = config.get_mut("plugins")?.get_mut(format.plugin())?;
    plugin.get_mut("containerd")?.get_mut("runtimes")?.as_table_mut()
}

/// Whether containerd has a handler of that name.
pub(super) fn has_handler(dumped: &Table, format: Format, handler: &str) -> bool {
    handlers_of(dumped, format).contains_key(handler)
}

/// Whether two dumps differ in the handler, and in nothing else but what is imported.
pub(super) fn only_handler_is_new(before: &Table, mut after: Table, format: Format, handler: &str) -> Result<()> {
    let added = handlers(&mut after, dumped_format(before, format)).and_then(|handlers| handlers.remove(handler));
    let added = added.with_context(|| format!("containerd does not see the handler {handler}"))?;
    let runtime_type = added.get("runtime_type").and_then(Value::as_str);
    ensure!(runtime_type == Some(super::RUNTIME), "containerd has another runtime for {handler}: {runtime_type:?}");
    let mut before = before.clone();
    for dump in [&mut before, &mut after] {
        dump.remove("imports");
    }
    let changed: Vec<_> = differences(&Value::Table(before), &Value::Table(after), "");
    ensure!(changed.is_empty(), "it would also change {}", changed.join(", "));
    Ok(())
}

/// containerd 2 dumps a version 2 file as version 3.
fn dumped_format(dumped: &Table, format: Format) -> Format {
    match dumped.get("version").and_then(Value::as_integer) {
        Some(3) => Format::V3,
        Some(2) => Format::V2,
        _ => format,
    }
}

/// The paths of what differs, not below what one of both lacks.
fn differences(left: &Value, right: &Value, path: &str) -> Vec<String> {
    let (Value::Table(left), Value::Table(right)) = (left, right) else {
        return if left == right { Vec::new() } else { vec![path.to_owned()] };
    };
    let mut names: Vec<_> = left.keys().chain(right.keys()).collect();
    names.sort();
    names.dedup();
    let below = |name: &String| {
        let path = format!("{path}/{name}");
        match (left.get(name), right.get(name)) {
            (Some(left), Some(right)) => differences(left, right, &path),
            _ => vec![path],
        }
    };
    names.into_iter().flat_map(below).collect()
}
