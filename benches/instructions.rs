//! The hot kernels, one per run, for counting instructions under callgrind (`instructions.py`).
//!
//! `instructions KERNEL` prepares fixed input, runs the kernel once inside `measured` (the only
//! function whose instructions are counted) and checks its answer. Without a name it runs all.

mod kernels;

use std::hint::black_box;

/// Everything counted happens in here. Not inlined, so that callgrind finds it by name.
#[inline(never)]
fn measured(kernel: &dyn Fn() -> u64) -> u64 {
    black_box(kernel())
}

/// Fixed input, what is measured, and the answer that shows that it was done.
pub struct Kernel {
    pub name: &'static str,
    pub run: fn() -> u64,
    pub expected: u64,
}

fn main() -> Result<(), String> {
    let wanted: Vec<String> = arguments();
    let chosen: Vec<&Kernel> = kernels::KERNELS
        .iter()
        .filter(|kernel| wanted.is_empty() || wanted.iter().any(|name| name == kernel.name))
        .collect();
    if chosen.is_empty() {
        return Err(format!("no kernel of {wanted:?}"));
    }
    for kernel in chosen {
        let found = (kernel.run)();
        if found != kernel.expected {
            return Err(format!("{}: expected {}, found {found}", kernel.name, kernel.expected));
        }
    }
    Ok(())
}

/// The names given; cargo adds options of its own.
#[expect(clippy::disallowed_methods, reason = "a program of its own, not the core")]
fn arguments() -> Vec<String> {
    std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect()
}
