//! Signals: their names, and those that this process gets and passes on to the command that it runs.

use anyhow::{Context as _, Result, bail};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

pub(crate) const SIGHUP: u32 = 1;
pub(crate) const SIGINT: u32 = 2;
pub(crate) const SIGKILL: u32 = 9;
pub(crate) const SIGTERM: u32 = 15;
pub(crate) const SIGWINCH: u32 = 28;

/// Reads a name, with or without SIG, or a number.
pub(crate) fn parse(text: &str) -> Result<u32> {
    if let Ok(number) = text.parse::<u32>() {
        if (1..=64).contains(&number) {
            return Ok(number);
        }
        bail!("signal {number} does not exist: write a name or 1 to 64");
    }
    let upper = text.to_ascii_uppercase();
    let name = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    let signal: nix::sys::signal::Signal =
        name.parse().ok().with_context(|| format!("signal {text:?} does not exist"))?;
    Ok(u32::try_from(signal as i32).unwrap_or_default())
}

/// Whether a user who sends this wants the command to end.
pub(crate) fn asks_to_end(signal: u32) -> bool {
    [SIGHUP, SIGINT, SIGTERM].contains(&signal)
}

/// The signals that this process gets.
pub(crate) struct Signals(mpsc::UnboundedReceiver<u32>);

impl Signals {
    /// Begins to take signals; call it on a `LocalSet`.
    pub(crate) fn listen() -> Result<Self> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let kinds = [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
            SignalKind::quit(),
            SignalKind::user_defined1(),
            SignalKind::user_defined2(),
            SignalKind::window_change(),
        ];
        for kind in kinds {
            let (sender, mut signals) = (sender.clone(), signal(kind)?);
            let number = u32::try_from(kind.as_raw_value()).unwrap_or_default();
            tokio::task::spawn_local(
                async move { while signals.recv().await.is_some() && sender.send(number).is_ok() {} },
            );
        }
        Ok(Self(receiver))
    }

    /// The next one.
    pub(crate) async fn next(&mut self) -> u32 {
        match self.0.recv().await {
            Some(signal) => signal,
            // The senders live as long as the `LocalSet`.
            None => std::future::pending().await,
        }
    }

    /// Waits for one that wants an end.
    pub(crate) async fn asked_to_end(&mut self) {
        while !asks_to_end(self.next().await) {}
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn signals_have_names_and_numbers() {
        assert_eq!(parse("KILL").expect("signal"), 9);
        assert_eq!(parse("sigterm").expect("signal"), 15);
        assert_eq!(parse("10").expect("signal"), 10);
        assert!(parse("NOPE").is_err());
        assert!(parse("99").is_err());
    }
}
