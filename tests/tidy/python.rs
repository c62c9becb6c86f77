//! The Python side: who may import the extension module, print, and read the environment.

use crate::source::{Source, has_word, read_tree};
use crate::{Violations, assert_caught, assert_tidy, violation};

const PACKAGE: &str = "python/dualrestore/";

/// A pattern, the places below the package where it may stand, and what to do elsewhere.
struct Door {
    matches: fn(&str) -> bool,
    places: &'static [&'static str],
    words: &'static str,
}

const DOORS: &[Door] = &[
    Door {
        matches: |line| {
            let trimmed = line.trim_start();
            (trimmed.starts_with("import ") || trimmed.starts_with("from "))
                && has_word(line, "_core")
        },
        places: &["core/"],
        words: "imports _core; import it from dualrestore.core, the only door",
    },
    Door {
        matches: |line| line.trim_start().starts_with("print("),
        places: &["cli/"],
        words: "prints; the library returns values, cli/ prints them",
    },
    Door {
        matches: |line| line.contains("os.environ") || line.contains("os.getenv"),
        places: &["config.py"],
        words: "reads the environment; config.py does, and passes values on",
    },
];

fn door_violations(sources: &[Source]) -> Violations {
    let mut found = Violations::new();
    for source in sources {
        let inside = source.path.strip_prefix(PACKAGE).unwrap_or(&source.path);
        for (at, line) in source.lines.iter().enumerate() {
            for door in DOORS {
                let allowed = door.places.iter().any(|place| inside.starts_with(place));
                if !allowed && (door.matches)(line) {
                    found.push(violation(source, at + 1, door.words));
                }
            }
        }
    }
    found
}

fn skip_violations(sources: &[Source]) -> Violations {
    let mut found = Violations::new();
    for source in sources {
        for (at, line) in source.lines.iter().enumerate() {
            let patterns = ["pytest.skip(", "mark.skip", "mark.xfail", "importorskip("];
            if patterns.iter().any(|pattern| line.contains(pattern)) {
                let words = "a test that may not run; tests/run installs what it needs";
                found.push(violation(source, at + 1, words));
            }
        }
    }
    found
}

fn made_up(path: &str, text: &str) -> Vec<Source> {
    vec![Source::new(path, text)]
}

#[test]
fn only_one_file_imports_the_extension_and_only_the_command_line_prints() {
    assert_tidy(&door_violations(&read_tree(&["python"], ".py")));
}

#[test]
fn a_second_door_to_the_extension_is_caught() {
    let caught = |path, text| door_violations(&made_up(path, text));
    assert_caught(&caught("python/dualrestore/jobs/merge.py", "from dualrestore import _core"), 1);
    assert_tidy(&caught("python/dualrestore/core/maps.py", "from dualrestore import _core"));
    assert_caught(&caught("python/dualrestore/model.py", "\nprint(1)"), 2);
    assert_tidy(&caught("python/dualrestore/cli/printer.py", "print(1)"));
    assert_caught(&caught("python/dualrestore/cli/serve.py", "x = os.environ.get(\"A\")"), 1);
}

#[test]
fn no_python_test_is_skipped() {
    assert_tidy(&skip_violations(&read_tree(&["python", "tests", "benches"], ".py")));
    assert_caught(&skip_violations(&made_up("tests/a.py", "@pytest.mark.skip")), 1);
}
