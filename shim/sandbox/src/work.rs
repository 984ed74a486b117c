//! Work off the threads that answer requests, which goes on when whoever waits for it gives up.

use std::sync::Arc;

use tokio::sync::Mutex;
use tokio::task::{JoinError, spawn_blocking};

/// One piece of work at a time.
#[derive(Debug, Default)]
pub(crate) struct Work(Arc<Mutex<()>>);

impl Work {
    /// Does something that blocks. When this call is given up, what the work makes is dropped at its end.
    ///
    /// # Errors
    /// When the work panicked.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, JoinError> {
        let busy = self.0.clone().lock_owned().await;
        // What was made is dropped before the guard, as the parts of a tuple are.
        let (made, _busy) = spawn_blocking(move || (work(), busy)).await?;
        Ok(made)
    }

    /// Waits until no work goes on, and nothing of given up work is left.
    pub(crate) async fn finished(&self) {
        drop(self.0.lock().await);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, mpsc};

    use super::Work;

    struct Made(Arc<AtomicBool>);

    impl Drop for Made {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    #[tokio::test]
    async fn what_given_up_work_makes_is_gone_when_it_is_finished() {
        let (work, is_dropped) = (Work::default(), Arc::new(AtomicBool::new(false)));
        let (made, (go_on, wait)) = (Made(is_dropped.clone()), mpsc::channel::<()>());
        let running = work.run(move || {
            wait.recv().expect("told to go on");
            made
        });
        tokio::select! {
            biased;
            _ = running => panic!("it waits"),
            () = tokio::task::yield_now() => {}
        }
        assert!(!is_dropped.load(Ordering::SeqCst));
        go_on.send(()).expect("it waits");
        work.finished().await;
        assert!(is_dropped.load(Ordering::SeqCst));
    }

    #[tokio::test]
    async fn work_that_is_waited_for_gives_its_result() {
        let work = Work::default();
        assert_eq!(work.run(|| 7).await.expect("it does not panic"), 7);
        work.finished().await;
    }
}
