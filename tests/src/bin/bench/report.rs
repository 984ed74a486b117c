//! A Markdown table of every count. A figure is the median of the rounds, and behind it the spread where there is one.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use crate::counts::Counts;

/// The counts of each round, by subject.
pub(crate) type Samples = BTreeMap<&'static str, Vec<Counts>>;

/// The table.
pub(crate) fn markdown(samples: &Samples) -> String {
    let mut text = String::new();
    let subjects: Vec<&str> = samples.keys().copied().collect();
    writeln!(text, "| count | {} |\n|---{}|", subjects.join(" | "), "|---".repeat(subjects.len()))
        .expect("a string grows");
    let names: BTreeSet<&String> = samples.values().flatten().flat_map(Counts::keys).collect();
    for name in names {
        let figures: Vec<String> = subjects.iter().map(|subject| figure(samples, subject, name)).collect();
        writeln!(text, "| {name} | {} |", figures.join(" | ")).expect("a string grows");
    }
    text
}

/// All values in ascending order.
fn values(samples: &Samples, subject: &str, count: &str) -> Vec<u64> {
    let mut values: Vec<u64> =
        samples.get(subject).into_iter().flatten().filter_map(|run| run.get(count).copied()).collect();
    values.sort_unstable();
    values
}

fn figure(samples: &Samples, subject: &str, count: &str) -> String {
    let values = values(samples, subject, count);
    match (values.first(), values.get(values.len() / 2), values.last()) {
        (Some(least), Some(median), Some(most)) if least != most => format!("{median} ({least} to {most})"),
        (Some(only), ..) => only.to_string(),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::{Samples, figure, markdown};

    fn samples() -> Samples {
        let run = |value| [("agent.userspace exits".to_owned(), value)].into();
        Samples::from([("vmrun run", vec![run(30), run(10), run(20)]), ("qemu", vec![run(80)])])
    }

    #[test]
    fn a_figure_is_the_median_and_the_spread() {
        assert_eq!(figure(&samples(), "vmrun run", "agent.userspace exits"), "20 (10 to 30)");
        assert_eq!(figure(&samples(), "qemu", "agent.userspace exits"), "80");
        assert_eq!(figure(&samples(), "qemu", "no such count"), "");
    }

    #[test]
    fn a_count_has_a_figure_of_each_subject() {
        let table = "| count | qemu | vmrun run |\n|---|---|---|\n| agent.userspace exits | 80 | 20 (10 to 30) |\n";
        assert_eq!(markdown(&samples()), table);
    }
}
