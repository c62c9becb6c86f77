//! Shape of the files: how they begin, how long they and their functions are, what they may not
//! leave behind, how they and their tests are named.

use crate::source::{Source, has_word, read_tree};
use crate::{Violations, assert_caught, assert_tidy, violation};

const RUST: &[&str] = &["src", "tests", "benches", "fuzz"];
const PYTHON: &[&str] = &["python", "tests", "benches"];

/// Lines of a file of the product, and of its tests, which repeat themselves more.
const FILE_LINES_MAX: usize = 600;
const TEST_FILE_LINES_MAX: usize = 700;
const FUNCTION_LINES_MAX: usize = 70;
const LINE_CHARS_MAX: usize = 100;

/// Names that say nothing.
const EMPTY_NAMES: &[&str] =
    &["manager", "utils", "util", "helpers", "helper", "data", "info", "handle", "misc", "common"];

/// What an unfinished or silenced place looks like, in code, and what to do with it.
const LEFTOVERS: &[(&str, &str)] = &[
    ("todo!", "write it, or return an Error that says it is not supported"),
    ("unimplemented!", "write it, or return an Error that says it is not supported"),
    ("dbg!", "remove it"),
    ("#[allow(", "use #[expect(lint, reason = \"..\")], which fails when it is needless"),
    ("#![allow(", "use #![expect(lint, reason = \"..\")], which fails when it is needless"),
    ("#[ignore", "make the test run, or delete it"),
    (".unwrap()", "expect(\"why it holds\") for us, Error for the world"),
];

fn is_test(path: &str) -> bool {
    ["tests/", "benches/", "fuzz/"].iter().any(|place| path.starts_with(place))
}

fn length_violations(sources: &[Source]) -> Violations {
    let mut found = Violations::new();
    for source in sources {
        let most = if is_test(&source.path) { TEST_FILE_LINES_MAX } else { FILE_LINES_MAX };
        if source.lines.len() > most {
            let words = format!("a file of {} lines; split it by concept", source.lines.len());
            found.push(violation(source, source.lines.len(), &words));
        }
        for (at, line) in source.lines.iter().enumerate() {
            let chars = line.chars().count();
            if chars > LINE_CHARS_MAX {
                let words = format!("a line of {chars} columns, at most {LINE_CHARS_MAX}; wrap it");
                found.push(violation(source, at + 1, &words));
            }
        }
    }
    found
}

fn indentation(line: &str) -> usize {
    line.len() - line.trim_start().len()
}

/// Whether a line of formatted code begins a function.
fn begins_rust_function(line: &str) -> bool {
    let words = ["pub", "pub(crate)", "pub(super)", "const", "async", "unsafe", "extern"];
    let mut rest = line.split_whitespace().skip_while(|word| words.contains(word));
    rest.next() == Some("fn")
}

fn begins_python_function(line: &str) -> bool {
    let trimmed = line.trim_start();
    trimmed.starts_with("def ") || trimmed.starts_with("async def ")
}

/// The line after a function that begins at `start`: formatted code closes it at its own indent.
fn function_end(lines: &[String], start: usize, python: bool) -> usize {
    let indent = indentation(&lines[start]);
    for (at, line) in lines.iter().enumerate().skip(start + 1) {
        let level = indentation(line);
        if line.trim().is_empty() || level > indent || line.trim_start().starts_with(')') {
            continue;
        }
        if python {
            return at;
        }
        let closes = line.trim() == "}" || line.trim() == "},";
        if level == indent && closes {
            return at + 1;
        }
        if level < indent {
            return at;
        }
    }
    lines.len()
}

fn function_violations(sources: &[Source], python: bool) -> Violations {
    let mut found = Violations::new();
    for source in sources {
        let lines = if python { &source.lines } else { &source.code };
        for (at, line) in lines.iter().enumerate() {
            let begins =
                if python { begins_python_function(line) } else { begins_rust_function(line) };
            if !begins || line.trim_end().ends_with(';') {
                continue;
            }
            let length = function_end(lines, at, python) - at;
            if length > FUNCTION_LINES_MAX {
                let words = format!("a function of {length} lines; name its parts");
                found.push(violation(source, at + 1, &words));
            }
        }
    }
    found
}

fn beginning_violations(sources: &[Source], beginning: &str) -> Violations {
    sources
        .iter()
        .filter(|source| !source.lines.is_empty())
        .filter(|source| {
            let first = source.lines.iter().find(|line| !line.starts_with("#!"));
            !first.is_some_and(|line| line.starts_with(beginning))
        })
        .map(|source| {
            let words = format!("begin with `{beginning}`: what it is, guarantees, does not know");
            violation(source, 1, &words)
        })
        .collect()
}

fn leftover_violations(sources: &[Source]) -> Violations {
    let mut found = Violations::new();
    for source in sources {
        for (at, line) in source.code.iter().enumerate() {
            for (pattern, instead) in LEFTOVERS {
                if line.contains(pattern) {
                    found.push(violation(source, at + 1, &format!("`{pattern}`; {instead}")));
                }
            }
        }
        for (at, comment) in source.comments.iter().enumerate() {
            for word in ["TODO", "FIXME", "XXX"] {
                if has_word(comment, word) {
                    let words = format!("`{word}` in a comment; do it now or file an issue");
                    found.push(violation(source, at + 1, &words));
                }
            }
        }
    }
    found
}

fn name_violations(sources: &[Source]) -> Violations {
    let mut found = Violations::new();
    for source in sources {
        for part in source.path.split('/') {
            let stem = part.split('.').next().unwrap_or(part);
            if EMPTY_NAMES.contains(&stem) {
                let words = format!("`{stem}` says nothing; name the concept");
                found.push(violation(source, 1, &words));
            }
        }
        for (at, line) in source.code.iter().enumerate() {
            if let Some(name) = declared_type(line) {
                let lower = name.to_lowercase();
                if EMPTY_NAMES.iter().any(|empty| lower.ends_with(empty)) {
                    let words = format!("type `{name}`; name what it is");
                    found.push(violation(source, at + 1, &words));
                }
            }
        }
    }
    found
}

/// The name in `struct NAME`, `enum NAME`, `trait NAME` or `class NAME`.
fn declared_type(line: &str) -> Option<String> {
    let mut words = line.split_whitespace().skip_while(|word| word.starts_with("pub"));
    let kind = words.next()?;
    if !["struct", "enum", "trait", "class"].contains(&kind) {
        return None;
    }
    let name = words.next()?;
    Some(name.chars().take_while(|symbol| crate::source::is_word(*symbol)).collect())
}

fn module_violations(sources: &[Source]) -> Violations {
    let mut found = Violations::new();
    for source in sources.iter().filter(|source| source.stem() == "mod") {
        for (number, line) in source.production_code() {
            if line.starts_with("impl") || begins_rust_function(line) && indentation(line) == 0 {
                let words = "mod.rs holds words and names only; move the code to a file";
                found.push(violation(source, number, words));
            }
        }
    }
    found
}

fn test_name_violations(sources: &[Source]) -> Violations {
    let mut found = Violations::new();
    for source in sources {
        for (at, pair) in source.code.windows(2).enumerate() {
            let Some(rest) = pair[1].trim_start().strip_prefix("fn ") else { continue };
            if pair[0].trim() != "#[test]" {
                continue;
            }
            let name = rest.split('(').next().unwrap_or(rest);
            if name.starts_with("test_") || name.matches('_').count() < 2 {
                let words = format!("test `{name}`: name it as the sentence that it proves");
                found.push(violation(source, at + 2, &words));
            }
        }
    }
    found
}

fn last_violations(sources: &[Source]) -> Violations {
    let mut found = Violations::new();
    for source in sources {
        let mut rest = source.code.iter().enumerate().skip(source.production);
        let closing = rest.find(|(_, line)| line.trim_end() == "}");
        let after = rest.find(|(_, line)| !line.trim().is_empty());
        if let (Some(_), Some((at, _))) = (closing, after) {
            found.push(violation(source, at + 1, "code after the unit tests; tests stand last"));
        }
    }
    found
}

fn made_up(path: &str, text: &str) -> Vec<Source> {
    vec![Source::new(path, text)]
}

#[test]
fn files_functions_and_lines_are_short() {
    let rust = read_tree(RUST, ".rs");
    let python = read_tree(PYTHON, ".py");
    assert_tidy(&length_violations(&rust));
    assert_tidy(&length_violations(&python));
    assert_tidy(&function_violations(&rust, false));
    assert_tidy(&function_violations(&python, true));
}

#[test]
fn a_long_file_function_or_line_is_caught() {
    let long = "x\n".repeat(601);
    assert_caught(&length_violations(&made_up("src/a.rs", &long)), 601);
    assert_tidy(&length_violations(&made_up("tests/a.rs", &long)));
    assert_caught(&length_violations(&made_up("src/a.rs", &"é".repeat(101))), 1);
    let body = "    x();\n".repeat(70);
    let rust = format!("fn short() {{\n}}\n\npub fn long(\n    a: u8,\n) {{\n{body}}}\n");
    assert_caught(&function_violations(&made_up("src/a.rs", &rust), false), 4);
    let python = format!("def long(\n    a,\n) -> None:\n{body}\ndef short():\n    pass\n");
    assert_caught(&function_violations(&made_up("a.py", &python), true), 1);
}

#[test]
fn every_file_begins_with_what_it_is() {
    assert_tidy(&beginning_violations(&read_tree(RUST, ".rs"), "//!"));
    assert_tidy(&beginning_violations(&read_tree(PYTHON, ".py"), "\"\"\""));
    assert_caught(&beginning_violations(&made_up("src/a.rs", "use std::io;"), "//!"), 1);
    assert_tidy(&beginning_violations(&made_up("a.py", "#!/bin/x\n\"\"\"A."), "\"\"\""));
}

#[test]
fn nothing_unfinished_or_silenced_is_left_behind() {
    assert_tidy(&leftover_violations(&read_tree(RUST, ".rs")));
    assert_caught(&leftover_violations(&made_up("src/a.rs", "fn a() {\n    todo!()\n}")), 2);
    assert_caught(&leftover_violations(&made_up("src/a.rs", "// FIXME: soon")), 1);
    assert_tidy(&leftover_violations(&made_up("src/a.rs", "let a = \"todo!\";")));
}

#[test]
fn names_say_what_a_thing_is() {
    assert_tidy(&name_violations(&read_tree(RUST, ".rs")));
    assert_tidy(&name_violations(&read_tree(PYTHON, ".py")));
    assert_caught(&name_violations(&made_up("src/utils.rs", "")), 1);
    assert_caught(&name_violations(&made_up("src/a.rs", "\npub struct BlockManager;")), 2);
    assert_tidy(&name_violations(&made_up("src/a.rs", "enum Metadatum {}")));
}

#[test]
fn a_mod_file_holds_words_and_names_only() {
    assert_tidy(&module_violations(&read_tree(&["src"], ".rs")));
    assert_caught(&module_violations(&made_up("src/map/mod.rs", "mod a;\nfn b() {}")), 2);
}

#[test]
fn tests_are_named_as_sentences_and_stand_last() {
    let sources = read_tree(RUST, ".rs");
    assert_tidy(&test_name_violations(&sources));
    assert_tidy(&last_violations(&sources));
    assert_caught(&test_name_violations(&made_up("src/a.rs", "#[test]\nfn test_it() {}")), 2);
    let text = "#[cfg(test)]\nmod tests {\n    x\n}\nfn late() {}\n";
    assert_caught(&last_violations(&made_up("src/a.rs", text)), 5);
}
