//! Writes what a target begins from into a directory: `seeds TARGET DIRECTORY`.

#![expect(clippy::disallowed_methods, reason = "a program: arguments, and files that are no state")]

use std::path::Path;

use dualrestore_fuzz::TARGETS;

fn main() -> std::io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, directory] = &arguments[..] else {
        return Err(std::io::Error::other("expected a target and a directory"));
    };
    let target = TARGETS.iter().find(|target| target.name == name);
    let target = target.ok_or_else(|| std::io::Error::other(format!("no target {name}")))?;
    for (number, seed) in (target.seeds)().iter().enumerate() {
        std::fs::write(Path::new(directory).join(format!("seed-{number}")), seed)?;
    }
    Ok(())
}
