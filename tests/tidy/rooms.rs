//! The rooms of `src/`: their total order and what may be named in which of them.

use crate::source::{Source, has_word, read_tree, test_modules, word_positions};
use crate::{Violations, assert_caught, assert_tidy, violation};

/// Rooms and files, as path prefixes below `src/`, in which a name may be used in production code.
struct Door {
    name: &'static str,
    rooms: &'static [&'static str],
    instead: &'static str,
}

const DOORS: &[Door] = &[
    Door {
        name: "pyo3",
        rooms: &["python/"],
        instead: "the core knows no Python; declare it in src/python",
    },
    Door {
        name: "std::fs",
        rooms: &["device/", "bundle/"],
        instead: "go through device::Device (files) or bundle (directories of segments)",
    },
    Door {
        name: "std::net",
        rooms: &["nbd/"],
        instead: "sockets belong to Python; only NBD server threads get a descriptor",
    },
    Door {
        name: "std::os::unix::net",
        rooms: &["nbd/"],
        instead: "sockets belong to Python; only NBD server threads get a descriptor",
    },
    Door {
        name: "std::thread",
        rooms: &[
            "device/",
            "merge/",
            "bundle/",
            "volume/engine.rs",
            "nbd/",
            "sim/campaign.rs",
            "python/",
        ],
        instead: "a state machine returns actions; its driver holds the threads",
    },
    Door {
        name: "rustix",
        rooms: &["device/", "nbd/", "link/wake"],
        instead: "storage system calls live in src/device, socket calls in src/nbd",
    },
    Door { name: "std::env", rooms: &[], instead: "python/dualrestore/config.py reads it" },
    Door {
        name: "std::process",
        rooms: &["device/pool.rs"],
        instead: "return an Error; the CLI ends processes",
    },
    Door {
        name: "std::time::Instant",
        rooms: &["clock.rs", "nbd/connection.rs", "nbd/server.rs"],
        instead: "take a clock::Instant as an argument; only drivers read the clock",
    },
    Door {
        name: "std::time::SystemTime",
        rooms: &["clock.rs"],
        instead: "the date is for people only: clock::wall_clock_ms",
    },
    Door {
        name: "new_v4",
        rooms: &["device/", "bundle/", "volume/primary/volume.rs", "link/hub.rs", "python/"],
        instead: "randomness is an argument of a state machine",
    },
];

/// The files that may contain unsafe code: aligned buffers, io_uring, Python buffers, and the bare
/// loop that io_uring is measured by.
const UNSAFE_FILES: &[&str] = &[
    "src/device/buffer.rs",
    "src/device/uring.rs",
    "src/python/buffers.rs",
    "benches/bulk/bound.rs",
];

/// The order of rooms: the modules of `lib.rs` as they stand there.
fn order(lib: &Source) -> Vec<String> {
    let declared = |line: &String| {
        let rest = line.strip_prefix("pub mod ").or_else(|| line.strip_prefix("mod "))?;
        rest.strip_suffix(';').map(str::to_owned)
    };
    lib.code.iter().filter_map(|line| declared(&line.trim_end().to_owned())).collect()
}

/// The first names after `crate::` in a line: one, or those between braces.
fn imported(line: &str) -> Vec<String> {
    let mut names = Vec::new();
    for at in word_positions(line, "crate") {
        let Some(rest) = line[at + 5..].strip_prefix("::") else { continue };
        let list = rest.strip_prefix('{').unwrap_or(rest);
        let parts = if rest.starts_with('{') { list.split(',').collect() } else { vec![list] };
        for part in parts {
            let name: String =
                part.trim().chars().take_while(|symbol| crate::source::is_word(*symbol)).collect();
            if !name.is_empty() {
                names.push(name);
            }
        }
    }
    names
}

fn order_violations(order: &[String], sources: &[Source]) -> Violations {
    let place = |room: &str| order.iter().position(|name| name == room);
    let mut found = Violations::new();
    for source in sources.iter().filter(|source| source.path != "src/lib.rs") {
        let Some(own) = source.room().and_then(place) else {
            found.push(violation(source, 1, "in no room of src/lib.rs; declare it there in order"));
            continue;
        };
        for (number, line) in source.code.iter().enumerate() {
            for name in imported(line) {
                let words = match place(&name) {
                    Some(other) if other <= own => continue,
                    Some(_) => format!(
                        "imports `{name}`, a room to the right of `{}`; turn the need around or \
                         move the code",
                        order[own]
                    ),
                    None => format!("`crate::{name}` is no room; name the room it comes from"),
                };
                found.push(violation(source, number + 1, &words));
            }
        }
        for (number, line) in source.production_code() {
            let top = source.stem() == "mod" || source.path.matches('/').count() == 1;
            if line.contains("super::super") || (top && has_word(line, "super")) {
                found.push(violation(source, number, "climbs out of its room; say `crate::ROOM`"));
            }
        }
    }
    found
}

fn door_violations(sources: &[Source]) -> Violations {
    let mut found = Violations::new();
    let test_files = whole_test_files(sources);
    for source in sources.iter().filter(|source| !test_files.contains(&source.path)) {
        let inside = source.path.strip_prefix("src/").unwrap_or(&source.path);
        for (number, line) in source.production_code() {
            for door in DOORS {
                let named = has_word(line, door.name) || names_in_braces(line, door.name);
                if named && !door.rooms.iter().any(|room| inside.starts_with(room)) {
                    let words = format!("`{}` has no door here; {}", door.name, door.instead);
                    found.push(violation(source, number, &words));
                }
            }
        }
    }
    found
}

/// Whether `use std::{fs, net};` names the path `std::fs`.
fn names_in_braces(line: &str, path: &str) -> bool {
    let Some((parent, name)) = path.rsplit_once("::") else { return false };
    let opening = format!("use {parent}::{{");
    line.find(&opening).is_some_and(|at| {
        line[at + opening.len()..].split(',').any(|part| {
            part.trim_matches(|symbol: char| !crate::source::is_word(symbol) && symbol != ':')
                .split("::")
                .next()
                == Some(name)
        })
    })
}

fn whole_test_files(sources: &[Source]) -> Vec<String> {
    let mut files = Vec::new();
    for source in sources {
        let directory = match source.stem() {
            "mod" | "lib" => source.path.rsplit_once('/').expect("below src").0.to_owned(),
            _ => source.path.trim_end_matches(".rs").to_owned(),
        };
        for module in test_modules(&source.lines) {
            files.push(format!("{directory}/{module}.rs"));
        }
    }
    files
}

fn unsafe_violations(sources: &[Source]) -> Violations {
    let mut found = Violations::new();
    for source in sources {
        for (at, line) in source.code.iter().enumerate() {
            if !has_word(line, "unsafe") {
                continue;
            }
            let reasoned = source.comments[at.saturating_sub(4)..=at]
                .iter()
                .any(|comment| comment.contains("SAFETY:"));
            if !UNSAFE_FILES.contains(&source.path.as_str()) {
                let words = format!("unsafe outside {UNSAFE_FILES:?}; find the safe way");
                found.push(violation(source, at + 1, &words));
            } else if !reasoned {
                found.push(violation(source, at + 1, "unsafe without `// SAFETY:` above it"));
            }
        }
    }
    found
}

fn unbounded_violations(sources: &[Source]) -> Violations {
    let mut found = Violations::new();
    for source in sources {
        for (number, line) in source.production_code() {
            if line.contains("mpsc::channel(") || line.contains("unbounded(") {
                let words = "an unbounded queue; give it a bound from limits.rs";
                found.push(violation(source, number, words));
            }
        }
    }
    found
}

fn made_up(path: &str, text: &str) -> Vec<Source> {
    vec![Source::new(path, text)]
}

#[test]
fn a_room_imports_only_rooms_to_its_left() {
    let sources = read_tree(&["src"], ".rs");
    let lib = sources.iter().find(|source| source.path == "src/lib.rs").expect("lib.rs exists");
    let order = order(lib);
    assert!(order.len() > 12, "the rooms were found in lib.rs: {order:?}");
    assert_tidy(&order_violations(&order, &sources));
}

#[test]
fn an_import_from_the_right_is_caught() {
    let order = ["bitmap".to_owned(), "device".to_owned()];
    let caught = |text| order_violations(&order, &made_up("src/bitmap/runs.rs", text));
    assert_caught(&caught("use std::io;\nuse crate::device::Device;"), 2);
    assert_caught(&caught("use crate::{bitmap::Runs, device};"), 1);
    assert_caught(&caught("use crate::elsewhere::Thing;"), 1);
    assert_tidy(&caught("use crate::bitmap::Runs; // crate::device"));
    assert_caught(
        &order_violations(&order, &made_up("src/bitmap/mod.rs", "use super::device;")),
        1,
    );
}

#[test]
fn only_a_room_with_the_door_touches_the_world() {
    assert_tidy(&door_violations(&read_tree(&["src"], ".rs")));
}

#[test]
fn touching_the_world_without_a_door_is_caught() {
    let caught = |text| door_violations(&made_up("src/volume/primary.rs", text));
    assert_caught(&caught("use std::time::Instant;"), 1);
    assert_caught(&caught("use std::{cmp, fs};"), 1);
    assert_caught(&caught("use std::time::{Duration, Instant};"), 1);
    assert_caught(&caught("\n    std::thread::spawn(run);"), 2);
    assert_tidy(&caught(
        "use std::time::Duration;\n#[cfg(test)]\nmod tests {\n    use std::fs;\n}",
    ));
    assert_tidy(&door_violations(&made_up("src/volume/engine.rs", "use std::thread;")));
}

#[test]
fn unsafe_stands_in_named_files_only_and_gives_its_reason() {
    assert_tidy(&unsafe_violations(&read_tree(&["src", "tests", "benches"], ".rs")));
}

#[test]
fn unsafe_elsewhere_or_without_a_reason_is_caught() {
    assert_caught(&unsafe_violations(&made_up("src/map/file.rs", "// SAFETY: no\nunsafe {}")), 2);
    assert_caught(&unsafe_violations(&made_up("src/device/buffer.rs", "unsafe {}")), 1);
    assert_tidy(&unsafe_violations(&made_up("src/device/buffer.rs", "// SAFETY: yes\nunsafe {}")));
}

#[test]
fn every_queue_has_a_bound() {
    assert_tidy(&unbounded_violations(&read_tree(&["src"], ".rs")));
    let text = "let (a, b) = crossbeam_channel::unbounded();";
    assert_caught(&unbounded_violations(&made_up("src/nbd/server.rs", text)), 1);
}
