//! Credentials for registries from Docker's configuration file, as `docker login` leaves them: in the file, or with a helper.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use oci_client::secrets::RegistryAuth;
use serde::Deserialize;

/// Docker Hub's key in the file.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";
/// What a helper names a user who has a token in place of a password.
const TOKEN_USER: &str = "<token>";

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct DockerConfig {
    auths: HashMap<String, AuthEntry>,
    creds_store: Option<String>,
    cred_helpers: HashMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct AuthEntry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

/// What a helper answers (docker-credential-helpers, protocol of `get`).
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    username: String,
    secret: String,
}

/// The credentials for a registry.
pub(super) fn find(registry: &str) -> Result<RegistryAuth> {
    let folder = match (std::env::var_os("DOCKER_CONFIG"), std::env::var_os("HOME")) {
        (Some(folder), _) => PathBuf::from(folder),
        (None, Some(home)) => Path::new(&home).join(".docker"),
        (None, None) => return Ok(RegistryAuth::Anonymous),
    };
    let path = folder.join("config.json");
    let bytes = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(RegistryAuth::Anonymous),
        read => read.with_context(|| format!("cannot read {}", path.display()))?,
    };
    let config: DockerConfig =
        serde_json::from_slice(&bytes).with_context(|| format!("{} is not Docker's configuration", path.display()))?;
    find_in(&config, registry)
        .with_context(|| format!("cannot use the credentials for {registry} in {}", path.display()))
}

fn find_in(config: &DockerConfig, registry: &str) -> Result<RegistryAuth> {
    let key = if registry == "docker.io" { DOCKER_HUB_KEY } else { registry };
    if let Some(helper) = config.cred_helpers.get(key).or(config.creds_store.as_ref()) {
        return ask_helper(helper, key);
    }
    let entry = config.auths.iter().find(|(name, _)| *name == key || host_of(name) == host_of(key));
    entry.map_or(Ok(RegistryAuth::Anonymous), |(_, entry)| read_entry(entry))
}

/// Old versions of Docker wrote a URL.
fn host_of(key: &str) -> &str {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    key.split('/').next().unwrap_or(key)
}

fn read_entry(entry: &AuthEntry) -> Result<RegistryAuth> {
    if entry.identitytoken.as_ref().is_some_and(|token| !token.is_empty()) {
        bail!("identity tokens are not supported: log in with a password or an access token");
    }
    if let (Some(username), Some(password)) = (&entry.username, &entry.password) {
        return Ok(RegistryAuth::Basic(username.clone(), password.clone()));
    }
    let Some(auth) = entry.auth.as_ref().filter(|auth| !auth.is_empty()) else { return Ok(RegistryAuth::Anonymous) };
    let decoded = STANDARD.decode(auth).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    let decoded = decoded.context("auth is not base64")?;
    let (username, password) = decoded.split_once(':').context("auth is not USER:PASSWORD")?;
    Ok(RegistryAuth::Basic(username.to_owned(), password.trim_end_matches('\0').to_owned()))
}

fn ask_helper(helper: &str, key: &str) -> Result<RegistryAuth> {
    if !helper.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
        bail!("{helper:?} is not the name of a credential helper");
    }
    let program = format!("docker-credential-{helper}");
    let mut child = Command::new(&program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot run {program}"))?;
    child.stdin.take().map(|mut stdin| stdin.write_all(key.as_bytes())).transpose()?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let answer = String::from_utf8_lossy(&output.stdout);
        if answer.contains("not found") {
            return Ok(RegistryAuth::Anonymous);
        }
        bail!("{program} failed: {}", answer.trim());
    }
    let answer: HelperAnswer =
        serde_json::from_slice(&output.stdout).with_context(|| format!("bad answer of {program}"))?;
    if answer.username == TOKEN_USER {
        bail!("identity tokens are not supported: log in with a password or an access token");
    }
    Ok(RegistryAuth::Basic(answer.username, answer.secret))
}

#[cfg(test)]
mod tests {
    use oci_client::secrets::RegistryAuth;

    use super::{DockerConfig, find_in};

    fn auth(config: &str, registry: &str) -> RegistryAuth {
        let config: DockerConfig = serde_json::from_str(config).expect("configuration");
        find_in(&config, registry).expect("credentials")
    }

    #[test]
    fn credentials_are_found_under_each_of_dockers_keys() {
        let me = RegistryAuth::Basic("me".to_owned(), "pass:word".to_owned());
        let entry = r#"{"auth": "bWU6cGFzczp3b3Jk"}"#;
        let config = |key: &str| format!(r#"{{"auths": {{"{key}": {entry}}}}}"#);
        assert_eq!(auth(&config("https://index.docker.io/v1/"), "docker.io"), me);
        assert_eq!(auth(&config("localhost:5000"), "localhost:5000"), me);
        assert_eq!(auth(&config("https://example.org/v2/"), "example.org"), me);
        assert_eq!(auth(&config("example.org"), "other.example.org"), RegistryAuth::Anonymous);
    }

    #[test]
    fn an_entry_without_a_password_is_anonymous_and_a_bad_one_is_refused() {
        assert_eq!(auth(r#"{"auths": {"example.org": {}}}"#, "example.org"), RegistryAuth::Anonymous);
        for entry in [r#"{"auth": "%%"}"#, r#"{"auth": "bWU="}"#, r#"{"identitytoken": "t"}"#] {
            let config = serde_json::from_str(&format!(r#"{{"auths": {{"example.org": {entry}}}}}"#)).expect("json");
            assert!(find_in(&config, "example.org").is_err(), "{entry}");
        }
    }

    #[test]
    fn a_helper_is_a_name_and_not_a_path() {
        let config = serde_json::from_str(r#"{"credsStore": "../../bin/sh"}"#).expect("json");
        assert!(find_in(&config, "example.org").is_err());
    }
}
