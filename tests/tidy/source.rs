//! A source file as the rules see it: its lines, once without comments and the contents of
//! strings, once with nothing but comments, and where its tests begin.
//!
//! Guarantees: `code` and `comments` have as many lines as the file. Does not know: any rule.

#![expect(clippy::disallowed_methods, reason = "the rules read the repository")]

use std::fs;
use std::path::{Path, PathBuf};

/// One file of the repository.
pub struct Source {
    /// Relative to the top of the repository, with `/`.
    pub path: String,
    pub lines: Vec<String>,
    pub code: Vec<String>,
    pub comments: Vec<String>,
    /// Lines before this index are production code; the rest are unit tests.
    pub production: usize,
}

impl Source {
    pub fn new(path: &str, text: &str) -> Self {
        let (code, comments) = split_rust(text);
        let lines = owned_lines(text);
        let production = unit_tests_begin(&lines).unwrap_or(lines.len());
        Self {
            path: path.to_owned(),
            lines,
            code: owned_lines(&code),
            comments: owned_lines(&comments),
            production,
        }
    }

    /// The room of a file in `src/`: its first directory, or its own name.
    pub fn room(&self) -> Option<&str> {
        let inside = self.path.strip_prefix("src/")?;
        Some(inside.split('/').next().unwrap_or(inside).trim_end_matches(".rs"))
    }

    /// The file's name without directory and suffix.
    pub fn stem(&self) -> &str {
        let name = self.path.rsplit('/').next().unwrap_or(&self.path);
        name.split('.').next().unwrap_or(name)
    }

    /// Production lines without comments and strings, numbered from 1.
    pub fn production_code(&self) -> impl Iterator<Item = (usize, &str)> {
        self.code[..self.production].iter().enumerate().map(|(at, line)| (at + 1, line.as_str()))
    }
}

fn owned_lines(text: &str) -> Vec<String> {
    text.lines().map(str::to_owned).collect()
}

/// The line of `#[cfg(test)]` that stands over `mod NAME {`.
fn unit_tests_begin(lines: &[String]) -> Option<usize> {
    (0..lines.len()).find(|&at| {
        lines[at].trim() == "#[cfg(test)]"
            && lines[at + 1..]
                .iter()
                .find(|line| line.starts_with("mod ") || line.starts_with("pub mod "))
                .is_some_and(|line| line.ends_with('{'))
            && lines[at + 1..].iter().take(4).any(|line| line.starts_with("mod "))
    })
}

/// Modules declared as `#[cfg(test)] mod NAME;`: files that are tests as a whole.
pub fn test_modules(lines: &[String]) -> Vec<String> {
    lines
        .windows(2)
        .filter(|pair| pair[0].trim() == "#[cfg(test)]")
        .filter_map(|pair| pair[1].strip_prefix("mod ")?.strip_suffix(';').map(str::to_owned))
        .collect()
}

#[derive(Clone, Copy, PartialEq)]
enum Inside {
    Code,
    LineComment,
    BlockComment,
    Text,
    RawText(usize),
}

/// The text twice, blanked: without comments and string contents, and with comments alone.
fn split_rust(text: &str) -> (String, String) {
    let chars: Vec<char> = text.chars().collect();
    let (mut code, mut comments) = (String::new(), String::new());
    let mut inside = Inside::Code;
    let mut at = 0;
    while at < chars.len() {
        let (next, length, shown) = step(&chars, at, inside);
        for &symbol in &chars[at..at + length] {
            let line_end = symbol == '\n';
            code.push(if line_end || shown == Shown::Code { symbol } else { ' ' });
            comments.push(if line_end || shown == Shown::Comment { symbol } else { ' ' });
        }
        inside = next;
        at += length;
    }
    (code, comments)
}

#[derive(Clone, Copy, PartialEq)]
enum Shown {
    Code,
    Comment,
    Nothing,
}

/// What the characters at `at` are, how many they are, and what follows them.
fn step(chars: &[char], at: usize, inside: Inside) -> (Inside, usize, Shown) {
    let here = |pattern: &str| {
        pattern.chars().enumerate().all(|(offset, want)| chars.get(at + offset) == Some(&want))
    };
    match inside {
        Inside::LineComment if chars[at] == '\n' => (Inside::Code, 1, Shown::Nothing),
        Inside::LineComment => (Inside::LineComment, 1, Shown::Comment),
        Inside::BlockComment if here("*/") => (Inside::Code, 2, Shown::Nothing),
        Inside::BlockComment => (Inside::BlockComment, 1, Shown::Comment),
        Inside::Text if chars[at] == '\\' && at + 1 < chars.len() => {
            (Inside::Text, 2, Shown::Nothing)
        }
        Inside::Text if chars[at] == '"' => (Inside::Code, 1, Shown::Code),
        Inside::Text => (Inside::Text, 1, Shown::Nothing),
        Inside::RawText(hashes) if here(&format!("\"{}", "#".repeat(hashes))) => {
            (Inside::Code, 1 + hashes, Shown::Code)
        }
        Inside::RawText(hashes) => (Inside::RawText(hashes), 1, Shown::Nothing),
        Inside::Code if here("//") => (Inside::LineComment, 2, Shown::Nothing),
        Inside::Code if here("/*") => (Inside::BlockComment, 2, Shown::Nothing),
        Inside::Code if chars[at] == '"' => (Inside::Text, 1, Shown::Code),
        Inside::Code if chars[at] == '\'' => {
            (Inside::Code, character_length(chars, at), Shown::Code)
        }
        Inside::Code if chars[at] == 'r' && (at == 0 || !is_word(chars[at - 1])) => {
            let hashes = chars[at + 1..].iter().take_while(|symbol| **symbol == '#').count();
            if chars.get(at + 1 + hashes) == Some(&'"') {
                (Inside::RawText(hashes), 2 + hashes, Shown::Code)
            } else {
                (Inside::Code, 1, Shown::Code)
            }
        }
        Inside::Code => (Inside::Code, 1, Shown::Code),
    }
}

/// The length of a character literal at `at`, or 1 when the apostrophe begins a lifetime.
fn character_length(chars: &[char], at: usize) -> usize {
    if chars.get(at + 1) == Some(&'\\') {
        let rest = chars[at + 3..].iter().position(|symbol| *symbol == '\'');
        return rest.map_or(1, |position| position + 4);
    }
    if chars.get(at + 2) == Some(&'\'') { 3 } else { 1 }
}

pub fn is_word(symbol: char) -> bool {
    symbol.is_alphanumeric() || symbol == '_'
}

/// Byte positions at which `word` stands in `line` as a whole word.
pub fn word_positions<'a>(line: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    line.match_indices(word).map(|(at, _)| at).filter(move |&at| {
        !line[..at].chars().next_back().is_some_and(is_word)
            && !line[at + word.len()..].chars().next().is_some_and(is_word)
    })
}

pub fn has_word(line: &str, word: &str) -> bool {
    word_positions(line, word).next().is_some()
}

/// Every file under the given directories (and files) of the repository with one of the suffixes.
pub fn read_tree(places: &[&str], suffix: &str) -> Vec<Source> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = Vec::new();
    for place in places {
        collect(&top.join(place), suffix, &mut paths);
    }
    paths.sort();
    let read = |path: &PathBuf| {
        let text = fs::read_to_string(path).expect("a listed file can be read");
        let inside = path.strip_prefix(top).expect("collected below the top");
        Source::new(&inside.to_string_lossy(), &text)
    };
    paths.iter().map(read).collect()
}

fn collect(place: &Path, suffix: &str, paths: &mut Vec<PathBuf>) {
    let name = place.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if place.is_file() {
        if name.ends_with(suffix) {
            paths.push(place.to_path_buf());
        }
        return;
    }
    if name.starts_with('.') || name == "__pycache__" || name == "target" {
        return;
    }
    // A place that does not exist has no files to check.
    let Ok(entries) = fs::read_dir(place) else { return };
    for entry in entries.flatten() {
        collect(&entry.path(), suffix, paths);
    }
}

#[test]
fn comments_and_strings_are_told_from_code() {
    let source =
        Source::new("x.rs", "let a = \"unsafe\"; // unsafe\nlet b = r#\"x\"y\"#; let c = '\"';");
    assert!(!source.code[0].contains("unsafe"));
    assert!(source.comments[0].contains("unsafe"));
    assert_eq!(source.code[1].trim_end(), "let b = r#\"   \"#; let c = '\"';");
}

#[test]
fn unit_tests_begin_at_their_module_and_not_at_a_test_only_file() {
    let inline = Source::new("x.rs", "fn a() {}\n#[cfg(test)]\nmod tests {\n}\n");
    assert_eq!(inline.production, 1);
    let declared = Source::new("x.rs", "#[cfg(test)]\nmod figure;\nfn a() {}\n");
    assert_eq!(declared.production, 3);
    assert_eq!(test_modules(&declared.lines), ["figure"]);
}
