//! Names of block status: which context a client means, and what it may see of it.
//!
//! Does not know: options, replies, volumes.

use crate::format::nbd::{STATE_HOLE, STATE_MARKED, STATE_ZERO};
use crate::volume::service::{StatusContext, StatusExtent};

pub(super) fn name(context: StatusContext) -> &'static str {
    match context {
        StatusContext::Allocation => "base:allocation",
        StatusContext::Missing => "qemu:dirty-bitmap:missing",
        StatusContext::Unsent => "qemu:dirty-bitmap:unsent",
        StatusContext::Changed => "qemu:dirty-bitmap:changed",
    }
}

/// The number by which replies name the context; never zero, stable within a build.
pub(super) fn identifier(context: StatusContext) -> u32 {
    match context {
        StatusContext::Allocation => 1,
        StatusContext::Missing => 2,
        StatusContext::Unsent => 3,
        StatusContext::Changed => 4,
    }
}

/// Whether a query of `LIST_META_CONTEXT` asks for the context: by name, or by the beginning of
/// it that ends in a colon.
pub(super) fn listed_by(context: StatusContext, query: &str) -> bool {
    let whole = name(context);
    whole == query || (query.ends_with(':') && whole.starts_with(query))
}

/// Whether a query of `SET_META_CONTEXT` selects the context: only by its name.
pub(super) fn selected_by(context: StatusContext, query: &str) -> bool {
    name(context) == query
}

/// The flags word of one run.
pub(super) fn flags(context: StatusContext, extent: &StatusExtent) -> u32 {
    if context == StatusContext::Allocation {
        return u32::from(extent.hole) * STATE_HOLE + u32::from(extent.zero) * STATE_ZERO;
    }
    u32::from(extent.marked) * STATE_MARKED
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wildcard_lists_and_a_name_lists_and_selects() {
        use StatusContext::{Allocation, Missing};
        for query in ["qemu:", "qemu:dirty-bitmap:", "qemu:dirty-bitmap:missing"] {
            assert!(listed_by(Missing, query), "{query}");
            assert!(!listed_by(Allocation, query), "{query}");
        }
        for query in ["", "qemu", "qemu:dirty", "base:", "base:allocation", ":"] {
            assert!(!listed_by(Missing, query), "{query}");
        }
        assert!(listed_by(Allocation, "base:"));
        assert!(selected_by(Allocation, "base:allocation"));
        assert!(!selected_by(Allocation, "base:"));
        assert!(!selected_by(Missing, "qemu:dirty-bitmap:"));
    }
}
