//! The counts that SECURITY.md tells below "What is tried against it": each is compared with what was counted, by the story that counts
//! or by the architecture test.

/// The number before `unit` in the row of that name.
///
/// # Panics
/// When there is none.
#[must_use]
pub fn told(row: &str, unit: &str) -> usize {
    let begin = format!("| {row} |");
    let security = include_str!("../../SECURITY.md");
    let line = security.lines().find(|line| line.starts_with(&begin)).unwrap_or_else(|| panic!("no row {row:?}"));
    let number = line.split_once(unit).and_then(|(before, _)| before.split_whitespace().last()?.parse().ok());
    number.unwrap_or_else(|| panic!("no number before {unit:?}: {line}"))
}
