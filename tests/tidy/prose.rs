//! Documents and comments: links that resolve, the words of the house, a change log that knows
//! the version.

#![expect(clippy::disallowed_methods, reason = "the rules read the repository")]

use std::fs;
use std::path::Path;

use crate::source::{Source, is_word, read_tree, word_positions};
use crate::{Violations, assert_caught, assert_tidy, violation};

/// Where documents live, beside those at the top.
const DOCUMENTS: &[&str] = &["docs", "tests", "benches"];
const TOP_DOCUMENTS: &[&str] =
    &["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"];

/// Words that mean several things, with what to say instead. A hit inside `backticks` is a name.
const WORDS: &[(&str, &str)] = &[
    ("dirty", "current, missing, unsent or changed"),
    ("sync", "flush, resync or mirror"),
    ("synced", "flushed, resynced or mirrored"),
    ("syncing", "flushing, resyncing or mirroring"),
    ("syncs", "flushes, resyncs or mirrors"),
    ("synchronise", "flush, resync or mirror"),
    ("synchronize", "flush, resync or mirror"),
];

/// The line with the contents of its code spans blanked.
fn without_code(line: &str) -> String {
    let mut code = false;
    line.chars()
        .map(|symbol| {
            code ^= symbol == '`';
            if code { ' ' } else { symbol }
        })
        .collect()
}

/// Lines that are prose: all outside fences of a document, the comments of a Rust file.
fn prose(source: &Source) -> Vec<String> {
    if source.path.ends_with(".rs") {
        return source.comments.iter().map(|line| without_code(line)).collect();
    }
    let mut fenced = false;
    source
        .lines
        .iter()
        .map(|line| {
            fenced ^= line.trim_start().starts_with("```");
            if fenced { String::new() } else { without_code(line) }
        })
        .collect()
}

fn word_violations(sources: &[Source]) -> Violations {
    let mut found = Violations::new();
    for source in sources {
        for (at, line) in prose(source).iter().enumerate() {
            for (word, instead) in WORDS {
                let foreign = |position: usize| {
                    let after = &line[position + word.len()..];
                    after.starts_with("-bitmap") || after.starts_with(" bitmap")
                };
                if word_positions(line, word).any(|position| !foreign(position)) {
                    found.push(violation(source, at + 1, &format!("`{word}`; say {instead}")));
                }
            }
        }
    }
    found
}

/// The targets of `[text](target)` in a line.
fn targets(line: &str) -> Vec<&str> {
    line.match_indices("](")
        .filter_map(|(at, _)| {
            let rest = &line[at + 2..];
            rest.find(')').map(|end| &rest[..end])
        })
        .collect()
}

/// The anchor that a heading gets: lower case, words joined by `-`, everything else dropped.
fn anchor(heading: &str) -> String {
    heading
        .trim_start_matches('#')
        .trim()
        .to_lowercase()
        .chars()
        .filter(|symbol| is_word(*symbol) || *symbol == ' ' || *symbol == '-')
        .map(|symbol| if symbol == ' ' { '-' } else { symbol })
        .collect()
}

fn link_violations(sources: &[Source], read: &dyn Fn(&Path) -> Option<String>) -> Violations {
    let mut found = Violations::new();
    for source in sources {
        let directory = Path::new(&source.path).parent().unwrap_or(Path::new(""));
        for (at, line) in prose(source).iter().enumerate() {
            for target in targets(line) {
                if target.contains("://") || target.starts_with("mailto:") {
                    continue;
                }
                let (file, wanted) = target.split_once('#').unwrap_or((target, ""));
                let path =
                    if file.is_empty() { source.path.clone().into() } else { directory.join(file) };
                let Some(text) = read(&path) else {
                    let words = format!("link to `{target}`, which is not there; mend or drop it");
                    found.push(violation(source, at + 1, &words));
                    continue;
                };
                let headed =
                    |line: &str| line.starts_with('#') && anchor(line) == wanted.to_lowercase();
                if !wanted.is_empty() && !text.lines().any(headed) {
                    let words = format!("`{file}` has no heading for `#{wanted}`; mend the link");
                    found.push(violation(source, at + 1, &words));
                }
            }
        }
    }
    found
}

/// The text of a file of the repository; empty for a directory or a file that is not text.
fn read_repository(path: &Path) -> Option<String> {
    let whole = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    whole.exists().then(|| fs::read_to_string(whole).unwrap_or_default())
}

fn documents() -> Vec<Source> {
    let mut found = read_tree(TOP_DOCUMENTS, ".md");
    found.extend(read_tree(DOCUMENTS, ".md"));
    found
}

fn made_up(path: &str, text: &str) -> Vec<Source> {
    vec![Source::new(path, text)]
}

#[test]
fn the_words_of_the_house_are_used() {
    assert_tidy(&word_violations(&documents()));
    assert_tidy(&word_violations(&read_tree(&["src", "tests", "benches"], ".rs")));
}

#[test]
fn a_word_of_many_meanings_is_caught() {
    assert_caught(&word_violations(&made_up("a.md", "\nThe block is dirty.")), 2);
    assert_caught(
        &word_violations(&made_up("src/a.rs", "// then sync the file\nlet sync = 1;")),
        1,
    );
    let allowed = "`qemu:dirty-bitmap:x`, a dirty bitmap, fsync, async\n```\ndirty\n```\n";
    assert_tidy(&word_violations(&made_up("a.md", allowed)));
}

#[test]
fn every_link_of_a_document_resolves() {
    let documents = documents();
    assert!(documents.len() >= TOP_DOCUMENTS.len(), "the documents at the top were found");
    assert_tidy(&link_violations(&documents, &read_repository));
}

#[test]
fn a_broken_link_is_caught() {
    let read =
        |path: &Path| (path == Path::new("docs/b.md")).then(|| "# One two: three\n".to_owned());
    let caught = |text| link_violations(&made_up("docs/a.md", text), &read);
    assert_tidy(&caught("[b](b.md) [c](b.md#one-two-three) [d](https://example.org/x)"));
    assert_caught(&caught("[b](c.md)"), 1);
    assert_caught(&caught("\n[b](b.md#four)"), 2);
}

#[test]
fn the_change_log_has_an_entry_for_the_version() {
    let log = read_repository(Path::new("CHANGELOG.md")).expect("CHANGELOG.md exists");
    let heading = format!("## {}", env!("CARGO_PKG_VERSION"));
    assert!(
        log.lines().any(|line| line.starts_with(&heading)),
        "CHANGELOG.md:1: no heading `{heading}`; write what changed for users"
    );
}
