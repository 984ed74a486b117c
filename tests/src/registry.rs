//! A registry on loopback: Debian's `docker-registry`, with its files in the story's folder.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// User and password that a registry with a lock accepts.
pub const CREDENTIALS: &str = "user:secret";
/// bcrypt of the password.
const HTPASSWD: &str = "user:$2y$04$XCb8loK6DX6tKfbPHFdjpOdaKfcrb/jI8.vMlL4UHLvdhU.Yvp3GC\n";

/// A running registry, ended when dropped.
pub struct Registry {
    child: Child,
    /// HOST:PORT.
    pub address: String,
}

impl Registry {
    /// Starts one that everybody may use.
    #[must_use]
    pub fn start(dir: &Path) -> Self {
        Self::start_with(dir, "")
    }

    /// Starts one that asks for [`CREDENTIALS`].
    ///
    /// # Panics
    /// When the disk says no.
    #[must_use]
    pub fn start_locked(dir: &Path) -> Self {
        let users = dir.join("htpasswd");
        fs::write(&users, HTPASSWD).expect("htpasswd");
        Self::start_with(dir, &format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", users.display()))
    }

    fn start_with(dir: &Path, more: &str) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("address").port();
        let address = format!("127.0.0.1:{port}");
        let storage = dir.join("registry");
        let config = format!(
            "version: 0.1\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"{address}\"}}\n{more}",
            storage.display()
        );
        let path = dir.join("registry.yml");
        fs::write(&path, config).expect("configuration");
        let mut child = Command::new("docker-registry")
            .arg("serve")
            .arg(&path)
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("docker-registry is installed: use `make test`");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        lines
            .find(|line| line.as_ref().is_ok_and(|line| line.contains("listening on")))
            .expect("it listens")
            .expect("log");
        // A full pipe would stop it.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, address }
    }

    /// Pushes an OCI layout with skopeo; returns the reference.
    ///
    /// # Panics
    /// When skopeo fails.
    #[must_use]
    pub fn push(&self, layout: &Path, name: &str) -> String {
        let reference = format!("{}/{name}", self.address);
        let output = Command::new("skopeo")
            .args(["--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false", "--dest-creds", CREDENTIALS])
            .arg(format!("oci:{}", layout.display()))
            .arg(format!("docker://{reference}"))
            .output()
            .expect("skopeo is installed: use `make test`");
        assert!(output.status.success(), "{output:?}");
        reference
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It runs until now.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
