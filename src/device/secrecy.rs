//! Keeps what this process holds out of core dumps, and other processes of its user out of it.

use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit,
};

use crate::error::{Error, Result};

/// From now on, until it ends, the process writes no core dump and cannot be looked into by others
/// of its user. For good, because freed memory may still hold what was secret.
pub fn hide_memory() -> Result<()> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|errno| Error::device("forbid core dumps", &errno.into()))?;
    let limit = Rlimit { current: Some(0), ..getrlimit(Resource::Core) };
    setrlimit(Resource::Core, limit)
        .map_err(|errno| Error::device("forbid core dumps", &errno.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::dumpable_behavior;

    #[test]
    fn a_process_that_hides_its_memory_dumps_no_core() {
        hide_memory().expect("allowed to everybody");
        assert_eq!(dumpable_behavior().expect("told"), DumpableBehavior::NotDumpable);
        assert_eq!(getrlimit(Resource::Core).current, Some(0));
        hide_memory().expect("twice is once");
    }
}
