//! The house rules of `ARCHITECTURE.md` and `CONTRIBUTING.md` that no compiler and no linter
//! checks, as tests. A failure names file and line, what is wrong and what to do.
//!
//! Every rule is also shown to fail on a made-up file: a rule that cannot fail is none.

mod layout;
mod prose;
mod python;
mod rooms;
mod source;

use source::Source;

/// `path:line: what is wrong; what to do`.
pub type Violations = Vec<String>;

fn violation(source: &Source, line: usize, words: &str) -> String {
    format!("{}:{line}: {words}", source.path)
}

/// Fails with every violation on a line of its own.
#[track_caller]
fn assert_tidy(found: &Violations) {
    assert!(found.is_empty(), "\n{}\n", found.join("\n"));
}

/// Asserts that the rule finds exactly one fault, at `line` of the made-up file.
#[track_caller]
fn assert_caught(found: &Violations, line: usize) {
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].contains(&format!(":{line}: ")), "{found:?}");
}
