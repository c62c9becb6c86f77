//! What is known of a bundle before it is opened: its key, and which manifest was signed.
//!
//! Guarantees: a manifest that passes was written by a holder of the key, or is the very one whose
//! signature was checked. From there the manifest vouches for all else, by hashes and keys.
//! Does not know: how signatures are checked, files.

use ring::digest::{SHA256, digest};

use crate::error::{Error, Result};
use crate::format::bundle::{BundleKey, Hash, Manifest};

/// See the module. Nothing is known of a bundle that is neither encrypted nor signed.
#[derive(Clone, Debug, Default)]
pub struct Trust {
    pub key: Option<BundleKey>,
    /// SHA-256 of the manifest whose signature was checked.
    pub manifest: Option<Hash>,
}

impl Trust {
    /// The key alone, if there is one.
    #[must_use]
    pub fn of_key(key: Option<&BundleKey>) -> Self {
        Self { key: key.cloned(), manifest: None }
    }

    /// The SHA-256 of a manifest.
    #[must_use]
    pub fn hash_of(manifest: &[u8]) -> Hash {
        let mut hash = [0; 32];
        hash.copy_from_slice(digest(&SHA256, manifest).as_ref());
        hash
    }

    /// Whether only what the manifest vouches for is to be believed.
    #[must_use]
    pub fn is_signed(&self) -> bool {
        self.manifest.is_some()
    }

    /// Refuses a manifest that is not what is known.
    pub fn check(&self, manifest: &Manifest, bytes: &[u8]) -> Result<()> {
        if self.manifest.is_some_and(|signed| signed != Self::hash_of(bytes)) {
            return Err(Error::integrity(
                "the manifest is another than the one whose signature was checked: somebody \
                 changes the medium meanwhile",
            ));
        }
        manifest.begin.expect_key(self.key.as_ref())?;
        self.key.as_ref().map_or(Ok(()), |key| manifest.check_mac(bytes, key))
    }
}
