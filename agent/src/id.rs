//! Names that come from outside and end up in paths.

use thiserror::Error;

/// A name that is not one.
#[derive(Debug, Error)]
#[error("{0:?} is not a valid id: letters, digits, `_`, `.` and `-`, a letter or digit first, at most 128")]
pub(crate) struct InvalidId(String);

/// Checks the id of a container or exec.
pub(crate) fn check(id: &str) -> Result<&str, InvalidId> {
    let tail_ok = id.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
    let head_ok = id.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    if head_ok && tail_ok && id.len() <= 128 { Ok(id) } else { Err(InvalidId(id.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn ids_cannot_leave_their_folder() {
        for id in ["..", "a/b", "", "-rf", "a\nb"] {
            assert!(check(id).is_err(), "{id:?}");
        }
        assert!(check("exec1").is_ok());
    }
}
