//! Resolves `--user` in the container's own `/etc/passwd` and `/etc/group`. Those files are an image's bytes: read with a
//! bound, parsed with tolerance, and a number that does not fit is refused, never taken as root.

use std::io::Read as _;
use std::os::fd::OwnedFd;

use anyhow::{Context as _, Result, bail};

/// Longest passwd or group file that is read, in bytes.
const MAX_FILE_LEN: u64 = 1 << 20;

/// Who the command runs as.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) additional_gids: Vec<u32>,
    pub(crate) home: Option<String>,
}

/// Looks a `USER[:GROUP]` up in a root file system.
pub(crate) fn resolve(tree: &OwnedFd, user: &str) -> Result<User> {
    resolve_in(user, &read_bounded(tree, "etc/passwd")?, &read_bounded(tree, "etc/group")?)
}

fn read_bounded(tree: &OwnedFd, path: &str) -> Result<String> {
    // An image without the file has no names; numbers still work.
    let Ok(file) = sandbox::share::open_in_tree(tree, path) else { return Ok(String::new()) };
    let mut bytes = Vec::new();
    file.take(MAX_FILE_LEN).read_to_end(&mut bytes).with_context(|| format!("cannot read /{path} of the image"))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn resolve_in(user: &str, passwd: &str, group: &str) -> Result<User> {
    let (name, group_name) = match user.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (user, None),
    };
    let entry = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.len() >= 6 && (fields[0] == name || fields[2] == name));
    let (uid, own_gid, home, login) = match &entry {
        Some(fields) => (number(fields[2])?, number(fields[3])?, Some(fields[5].to_owned()), Some(fields[0])),
        None if name.bytes().all(|b| b.is_ascii_digit()) && !name.is_empty() => (number(name)?, 0, None, None),
        None => bail!("the image has no user {name:?}: add it to /etc/passwd of the image, or give a number"),
    };
    let gid = match group_name {
        None => own_gid,
        Some(text) => match groups(group).find(|(group, ..)| group == text) {
            Some((_, gid, _)) => number(&gid)?,
            None if text.bytes().all(|b| b.is_ascii_digit()) && !text.is_empty() => number(text)?,
            None => bail!("the image has no group {text:?}: add it to /etc/group of the image, or give a number"),
        },
    };
    let mut additional_gids = Vec::new();
    if let (Some(login), None) = (login, group_name) {
        for (_, gid, members) in groups(group) {
            if members.split(',').any(|member| member == login) {
                additional_gids.push(number(&gid)?);
            }
        }
    }
    Ok(User { uid, gid, additional_gids, home })
}

fn groups(file: &str) -> impl Iterator<Item = (String, String, String)> + '_ {
    file.lines().filter_map(|line| {
        let mut fields = line.splitn(4, ':');
        let (name, _, gid, members) = (fields.next()?, fields.next()?, fields.next()?, fields.next().unwrap_or(""));
        Some((name.to_owned(), gid.to_owned(), members.to_owned()))
    })
}

fn number(text: &str) -> Result<u32> {
    text.parse::<u32>()
        .ok()
        .filter(|n| *n != u32::MAX)
        .with_context(|| format!("{text:?} is not a user or group number"))
}

#[cfg(test)]
mod tests {
    use super::{User, resolve_in};

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nwww:x:33:33:www:/var/www:/bin/false\n";
    const GROUP: &str = "root:x:0:\nwww:x:33:\nadm:x:4:www,other\n";

    #[test]
    fn a_name_brings_its_groups_and_home() {
        let expected = User { uid: 33, gid: 33, additional_gids: vec![4], home: Some("/var/www".to_owned()) };
        assert_eq!(resolve_in("www", PASSWD, GROUP).expect("resolved"), expected);
    }

    #[test]
    fn numbers_need_no_file() {
        let user = resolve_in("1000:1001", "", "").expect("resolved");
        assert_eq!((user.uid, user.gid), (1000, 1001));
    }

    #[test]
    fn what_is_unknown_or_does_not_fit_is_refused() {
        for user in ["nobody", "4294967296", "4294967295", "-1", "0x0", "", "0:nogroup"] {
            assert!(resolve_in(user, PASSWD, GROUP).is_err(), "{user:?}");
        }
    }
}
