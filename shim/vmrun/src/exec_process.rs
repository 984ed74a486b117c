//! The process of an exec: the container's own, changed where the request says so, as with Docker.

use std::os::fd::OwnedFd;

use anyhow::Result;
use oci_spec::runtime::{Capabilities, LinuxCapabilitiesBuilder, Process, UserBuilder};

use crate::control::ExecRequest;
use crate::spec::set_all;
use crate::user;

/// Builds the process of `request` on that of the container's command.
pub(crate) fn exec_process(init: &Process, tree: &OwnedFd, request: &ExecRequest) -> Result<Process> {
    let mut process = init.clone();
    let mut env = init.env().clone().unwrap_or_default();
    if let Some(user) = &request.user {
        let user = user::resolve(tree, user)?;
        if let Some(home) = &user.home {
            set_all(&mut env, [format!("HOME={home}")]);
        }
        let builder = UserBuilder::default().uid(user.uid).gid(user.gid).additional_gids(user.additional_gids);
        process.set_user(builder.build()?);
        restrict_capabilities(&mut process, user.uid)?;
    }
    if request.terminal.is_some() && !env.iter().any(|variable| variable.starts_with("TERM=")) {
        env.push("TERM=xterm".to_owned());
    }
    set_all(&mut env, request.env.iter().cloned());
    process.set_args(Some(request.command.clone()));
    process.set_env(Some(env));
    process.set_terminal(Some(request.terminal.is_some()));
    if let Some(workdir) = &request.workdir {
        process.set_cwd(workdir.into());
    }
    Ok(process)
}

/// A user other than root has the bounding set only; root has it whole.
fn restrict_capabilities(process: &mut Process, uid: u32) -> Result<()> {
    let bounding = process.capabilities().as_ref().and_then(|sets| sets.bounding().clone()).unwrap_or_default();
    let held = if uid == 0 { bounding.clone() } else { Capabilities::new() };
    let sets = LinuxCapabilitiesBuilder::default().bounding(bounding).effective(held.clone()).permitted(held);
    process.set_capabilities(Some(sets.inheritable(Capabilities::new()).ambient(Capabilities::new()).build()?));
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::OwnedFd;

    use oci_spec::runtime::{Capability, Process, ProcessBuilder, UserBuilder};

    use super::exec_process;
    use crate::control::ExecRequest;

    fn init() -> Process {
        let user = UserBuilder::default().uid(1000_u32).gid(1000_u32).build().expect("user");
        let process =
            ProcessBuilder::default().args(["sleep".to_owned()]).env(["A=1".to_owned()]).cwd("/srv").user(user);
        process.build().expect("process")
    }

    fn tree(dir: &tempfile::TempDir) -> OwnedFd {
        fs::create_dir(dir.path().join("etc")).expect("folder");
        fs::write(dir.path().join("etc/passwd"), "www:x:33:34::/var/www:/bin/sh\n").expect("passwd");
        fs::File::open(dir.path()).expect("open").into()
    }

    #[test]
    fn what_is_not_asked_for_is_inherited() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let request = ExecRequest { command: vec!["id".to_owned()], ..ExecRequest::default() };
        let process = exec_process(&init(), &tree(&dir), &request).expect("process");
        assert_eq!((process.cwd(), process.user()), (init().cwd(), init().user()));
        assert_eq!(process.env(), init().env());
        assert_eq!(process.args().as_deref(), Some(&["id".to_owned()][..]));
    }

    #[test]
    fn a_user_is_looked_up_in_the_container_and_loses_capabilities() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (user, env) = (Some("www".to_owned()), vec!["A=2".to_owned()]);
        let request = ExecRequest { command: vec!["id".to_owned()], user, env, ..ExecRequest::default() };
        let process = exec_process(&init(), &tree(&dir), &request).expect("process");
        assert_eq!((process.user().uid(), process.user().gid()), (33, 34));
        assert_eq!(process.env().as_deref(), Some(&["HOME=/var/www".to_owned(), "A=2".to_owned()][..]));
        let sets = process.capabilities().clone().expect("capabilities");
        assert!(!sets.effective().clone().expect("set").contains(&Capability::Chown));
    }
}
