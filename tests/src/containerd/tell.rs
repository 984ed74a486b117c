//! Tells the checks of a story file to one containerd, one after the other.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use super::{Containerd, Release};

/// A check and its name.
pub type Check = (&'static str, fn(&mut Containerd));

/// Names checks for [`tell`].
#[macro_export]
macro_rules! checks {
    ($($check:ident),+ $(,)?) => { &[$((stringify!($check), $check as fn(&mut $crate::containerd::Containerd))),+] };
}

/// Makes a test of each release, which tells its containerd its share of the checks (see [`share_of`]); without a short list, all.
#[macro_export]
macro_rules! tell_each_release {
    ($checks:expr) => {
        $crate::tell_each_release!($checks, $checks);
    };
    ($checks:expr, $short:expr) => {
        #[test]
        fn bookworm() {
            $crate::containerd::tell_share($crate::containerd::Release::Bookworm, $checks, $short);
        }

        #[test]
        fn trixie() {
            $crate::containerd::tell_share($crate::containerd::Release::Trixie, $checks, $short);
        }

        #[test]
        fn sid() {
            $crate::containerd::tell_share($crate::containerd::Release::Sid, $checks, $short);
        }
    };
}

/// What a release is told: all. In the emulated KVM host, which takes ten seconds for each VM, unless `STORY_FULL` is set, it is the short
/// list, and of the others every third, so that each is told to one release.
#[must_use]
pub fn share_of(release: Release, checks: &[Check], short: &[Check]) -> Vec<Check> {
    let is_all = crate::tells_all() || std::env::var_os("STORY_CHECK").is_some();
    let is_told = |at: usize, name: &str| {
        is_all || at % Release::COUNT == release as usize || short.iter().any(|(known, _)| *known == name)
    };
    checks.iter().enumerate().filter(|(at, (name, _))| is_told(*at, name)).map(|(_, check)| *check).collect()
}

/// Tells a release its share.
///
/// # Panics
/// As [`tell`].
pub fn tell_share(release: Release, checks: &[Check], short: &[Check]) {
    tell(release, &share_of(release, checks, short));
}

/// Runs the checks, or the one that `STORY_CHECK` names, with containerd of a release. Each one that fails is printed with the end of the log; the others go on with a new
/// containerd. In the emulated KVM host a check has a second attempt (`kvm-host/README.md`, Limits), which is printed.
///
/// # Panics
/// When a check failed; the message names each.
pub fn tell(release: Release, checks: &[Check]) {
    let mut containerd = Some(Containerd::start(release));
    let mut failed = Vec::new();
    let only = std::env::var("STORY_CHECK").ok();
    assert!(
        only.is_none() || checks.iter().any(|(name, _)| only.as_deref() == Some(*name)),
        "no check is named {only:?}"
    );
    for (name, check) in checks.iter().filter(|(name, _)| only.as_deref().is_none_or(|only| only == *name)) {
        let passes = |containerd: &mut Option<Containerd>| attempt(containerd, release, name, *check);
        if passes(&mut containerd) {
            continue;
        }
        println!("{}: second attempt: {name}", release.name());
        if !crate::is_emulated() || !passes(&mut containerd) {
            failed.push(*name);
        }
    }
    // Asserts that nothing is left.
    drop(containerd);
    assert!(failed.is_empty(), "{} failed: {failed:?}", release.name());
}

fn attempt(slot: &mut Option<Containerd>, release: Release, name: &str, check: fn(&mut Containerd)) -> bool {
    let mut containerd = slot.take().unwrap_or_else(|| Containerd::start(release));
    let started = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(|| {
        check(&mut containerd);
        containerd.assert_idle();
    }));
    let verdict = if result.is_ok() { "ok" } else { "FAILED" };
    println!("{}: {name} ... {verdict} ({:.1} s)", release.name(), started.elapsed().as_secs_f64());
    match result {
        Ok(()) => *slot = Some(containerd),
        Err(_) => containerd.scrap(),
    }
    slot.is_some()
}
