//! Rate limits: a bucket of bytes and one of frames for each direction of an interface, filled as time passes. All queue pairs
//! take out of the same ones, and they are what they were after a reset by the driver.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use vmm_api::net::RateLimit;

use crate::event_loop::lock;

/// What a bucket holds at most, as a part of a second.
const BURST_PARTS: u64 = 10;
/// A byte or a frame: levels are in billionths, so that no look at a bucket loses what a part of a second has brought.
const ONE: i128 = 1_000_000_000;

/// The limit of one direction. A frame passes when something is left in both buckets; a large one leaves a debt, and so do
/// pairs that find the same rest.
#[derive(Debug, Default)]
pub(super) struct Limiter {
    /// None where there is no limit: frames then take no lock and nobody looks at the time.
    buckets: Option<Mutex<[Option<Bucket>; 2]>>,
}

#[derive(Debug)]
struct Bucket {
    per_s: u64,
    // level <= burst(per_s)
    level: i128,
    filled_at: Instant,
}

impl Limiter {
    /// Full buckets.
    pub(super) fn new(limit: RateLimit, now: Instant) -> Self {
        let bucket = |per_s: u64| (per_s > 0).then(|| Bucket { per_s, level: burst(per_s), filled_at: now });
        let buckets = [bucket(limit.bytes_per_s), bucket(limit.frames_per_s)];
        let is_limit = buckets.iter().any(Option::is_some);
        Self { buckets: is_limit.then(|| Mutex::new(buckets)) }
    }

    /// How long the next frame has to wait, if it has to.
    pub(super) fn wait(&self, now: impl FnOnce() -> Instant) -> Option<Duration> {
        let mut buckets = lock(self.buckets.as_ref()?);
        // Under the lock, so that no pair comes with an earlier time than another.
        let now = now();
        buckets.iter_mut().flatten().filter_map(|bucket| bucket.wait(now)).max()
    }

    /// Takes a frame out.
    pub(super) fn take(&self, bytes: usize) {
        let Some(buckets) = &self.buckets else { return };
        for (bucket, amount) in lock(buckets).iter_mut().zip([bytes, 1]) {
            if let Some(bucket) = bucket {
                bucket.level -= amount as i128 * ONE;
            }
        }
    }
}

impl Bucket {
    fn wait(&mut self, now: Instant) -> Option<Duration> {
        let elapsed_ns = now.saturating_duration_since(self.filled_at).as_nanos();
        let gained = i128::try_from(elapsed_ns.saturating_mul(self.per_s.into())).unwrap_or(i128::MAX);
        self.level = self.level.saturating_add(gained).min(burst(self.per_s));
        self.filled_at = now;
        if self.level >= ONE {
            return None;
        }
        let wait_ns = (ONE - self.level).unsigned_abs().div_ceil(self.per_s.into());
        Some(Duration::from_nanos(u64::try_from(wait_ns).unwrap_or(u64::MAX)).max(Duration::from_micros(1)))
    }
}

fn burst(per_s: u64) -> i128 {
    i128::from((per_s / BURST_PARTS).max(1)) * ONE
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn no_limit_never_waits() {
        let now = Instant::now();
        let limiter = Limiter::new(RateLimit::default(), now);
        limiter.take(usize::MAX >> 1);
        assert!(limiter.wait(|| unreachable!("nobody looks at the time")).is_none());
    }

    #[test]
    fn a_debt_is_paid_by_waiting() {
        let now = Instant::now();
        let limiter = Limiter::new(RateLimit { bytes_per_s: 1000, frames_per_s: 0 }, now);
        limiter.take(1100);
        let wait = limiter.wait(|| now).expect("a debt of 1000 bytes");
        assert_eq!(wait, Duration::from_millis(1001));
        assert_eq!(limiter.wait(|| now + wait), None);
    }

    #[test]
    fn who_looks_often_loses_nothing() {
        let start = Instant::now();
        let limiter = Limiter::new(RateLimit { bytes_per_s: 0, frames_per_s: 10 }, start);
        limiter.take(60);
        let looks = (0..100).map(|look| limiter.wait(|| start + Duration::from_millis(look)));
        assert!(looks.into_iter().all(|wait| wait.is_some()));
        assert_eq!(limiter.wait(|| start + Duration::from_millis(100)), None);
    }

    proptest! {
        #[test]
        fn no_more_passes_than_the_limit_and_its_burst(
            frames in prop::collection::vec((1_usize..70_000, 0_u64..50), 1..200),
            bytes_per_s in 1_000_u64..10_000_000,
        ) {
            let start = Instant::now();
            let limiter = Limiter::new(RateLimit { bytes_per_s, frames_per_s: 0 }, start);
            let (mut now, mut passed, mut last) = (start, 0, 0);
            for (bytes, pause_ms) in frames {
                now += Duration::from_millis(pause_ms);
                if limiter.wait(|| now).is_none() {
                    limiter.take(bytes);
                    passed += bytes as u128;
                    last = bytes as u128;
                }
            }
            let allowed = u128::from(bytes_per_s) * now.duration_since(start).as_nanos() / 1_000_000_000;
            prop_assert!(passed <= allowed + u128::from(bytes_per_s / BURST_PARTS).max(1) + last);
        }
    }
}
