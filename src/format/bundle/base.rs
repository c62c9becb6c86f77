//! What an incremental bundle goes on from, as its begin manifest says it.

use serde::{Deserialize, Serialize};

use super::manifest::{BeginManifest, Run, expect_runs};
use crate::error::{Error, Result};
use crate::units::Geometry;

/// What an incremental bundle goes on from: it holds what changed since then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseCut {
    pub generation: u64,
    pub cut: u64,
    /// Where changes were looked for, whole blocks; absent: everywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<Vec<Run>>,
}

/// Whether a manifest says of its base what can be. `named`: how often it names the feature.
pub(super) fn check_base(begin: &BeginManifest, named: usize, geometry: Geometry) -> Result<()> {
    if named != usize::from(begin.base.is_some()) {
        return Err(Error::format("expected a base cut in an incremental bundle, and only there"));
    }
    let Some(base) = &begin.base else { return Ok(()) };
    if (base.generation, base.cut) > (begin.generation, begin.cut) || begin.volume.is_none() {
        return Err(Error::format(
            "expected an incremental bundle to name its volume and an earlier base cut",
        ));
    }
    expect_runs(base.scope.as_deref().unwrap_or_default(), geometry, "scope")
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::units::BlockSize;

    fn begin(volume: u128, base_cut: u64, scope: Option<Vec<Run>>) -> BeginManifest {
        let geometry = Geometry::new(1 << 20, BlockSize::DEFAULT).expect("valid");
        let (bundle, volume) = (Uuid::from_u128(1), Uuid::from_u128(volume));
        let mut begin = BeginManifest::new(bundle, volume, geometry, 3, 4);
        begin.go_on_from(BaseCut { generation: 3, cut: base_cut, scope });
        begin
    }

    #[test]
    fn an_incremental_bundle_may_hold_nothing_and_says_what_it_goes_on_from() {
        for scope in [None, Some(vec![Run(0, 4096)])] {
            let whole = begin(2, 4, scope);
            assert_eq!(BeginManifest::parse(&whole.encode()).expect("whole"), whole);
        }
    }

    #[test]
    fn a_base_that_cannot_be_is_refused() {
        let mut unnamed = begin(2, 1, None);
        unnamed.features.clear();
        let mut without = begin(2, 1, None);
        without.base = None;
        for bad in [begin(2, 5, None), begin(0, 1, None), begin(2, 1, Some(vec![Run(1, 2)]))]
            .into_iter()
            .chain([unnamed, without])
        {
            assert!(BeginManifest::parse(&bad.encode()).is_err(), "{bad:?}");
        }
    }
}
