//! Rate limits: a bucket of bytes and one of frames for each direction, filled as time passes.

use std::time::{Duration, Instant};

use vmm_api::net::RateLimit;

/// What a bucket holds at most, as a part of a second.
const BURST_PARTS: u64 = 10;
const NANOS_PER_S: u128 = 1_000_000_000;

/// The limit of one direction. A frame passes when something is left in both buckets; a large one leaves a debt.
#[derive(Debug)]
pub(super) struct Limiter {
    buckets: [Option<Bucket>; 2],
}

#[derive(Debug)]
struct Bucket {
    per_s: u64,
    // level <= per_s / BURST_PARTS
    level: i128,
    filled_at: Instant,
}

impl Limiter {
    /// Full buckets.
    pub(super) fn new(limit: RateLimit, now: Instant) -> Self {
        let bucket = |per_s: u64| (per_s > 0).then(|| Bucket { per_s, level: burst(per_s), filled_at: now });
        Self { buckets: [bucket(limit.bytes_per_s), bucket(limit.frames_per_s)] }
    }

    /// Whether there is no limit.
    pub(super) fn is_none(&self) -> bool {
        self.buckets.iter().all(Option::is_none)
    }

    /// How long the next frame has to wait, if it has to.
    pub(super) fn wait(&mut self, now: Instant) -> Option<Duration> {
        self.buckets.iter_mut().flatten().filter_map(|bucket| bucket.wait(now)).max()
    }

    /// Takes a frame out.
    pub(super) fn take(&mut self, bytes: usize) {
        for (bucket, amount) in self.buckets.iter_mut().zip([bytes, 1]) {
            if let Some(bucket) = bucket {
                bucket.level -= amount as i128;
            }
        }
    }
}

impl Bucket {
    fn wait(&mut self, now: Instant) -> Option<Duration> {
        let elapsed_ns = now.saturating_duration_since(self.filled_at).as_nanos();
        let gained = i128::try_from(elapsed_ns * u128::from(self.per_s) / NANOS_PER_S).unwrap_or(i128::MAX);
        if gained > 0 {
            self.level = self.level.saturating_add(gained).min(burst(self.per_s));
            self.filled_at = now;
        }
        if self.level > 0 {
            return None;
        }
        let missing = (1 - self.level).unsigned_abs();
        let wait_ns = missing * NANOS_PER_S / u128::from(self.per_s);
        Some(Duration::from_nanos(u64::try_from(wait_ns).unwrap_or(u64::MAX)).max(Duration::from_micros(1)))
    }
}

fn burst(per_s: u64) -> i128 {
    i128::from((per_s / BURST_PARTS).max(1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn no_limit_never_waits() {
        let now = Instant::now();
        let mut limiter = Limiter::new(RateLimit::default(), now);
        limiter.take(usize::MAX >> 1);
        assert!(limiter.is_none() && limiter.wait(now).is_none());
    }

    #[test]
    fn a_debt_is_paid_by_waiting() {
        let now = Instant::now();
        let mut limiter = Limiter::new(RateLimit { bytes_per_s: 1000, frames_per_s: 0 }, now);
        limiter.take(1100);
        let wait = limiter.wait(now).expect("a debt of 1000 bytes");
        assert!((Duration::from_millis(1000)..Duration::from_millis(1003)).contains(&wait), "{wait:?}");
        assert_eq!(limiter.wait(now + wait + Duration::from_millis(1)), None);
    }

    proptest! {
        #[test]
        fn no_more_passes_than_the_limit_and_its_burst(
            frames in prop::collection::vec((1_usize..70_000, 0_u64..50), 1..200),
            bytes_per_s in 1_000_u64..10_000_000,
        ) {
            let start = Instant::now();
            let mut limiter = Limiter::new(RateLimit { bytes_per_s, frames_per_s: 0 }, start);
            let (mut now, mut passed, mut last) = (start, 0, 0);
            for (bytes, pause_ms) in frames {
                now += Duration::from_millis(pause_ms);
                if limiter.wait(now).is_none() {
                    limiter.take(bytes);
                    passed += bytes as u128;
                    last = bytes as u128;
                }
            }
            let allowed = u128::from(bytes_per_s) * now.duration_since(start).as_nanos() / NANOS_PER_S;
            prop_assert!(passed <= allowed + u128::from(bytes_per_s / BURST_PARTS).max(1) + last);
        }
    }
}
