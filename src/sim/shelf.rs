//! Bundles made of snapshots, on their way to the primary.
//!
//! Guarantees: a bundle is one of the product's, in memory; what is damaged of it is known to be.
//! Does not know: who merges it.

use std::ops::ControlFlow;
use std::sync::Arc;

use uuid::Uuid;

use super::world::World;
use crate::bundle::{Bundle, BundleWriter, RandomReader, WriterOptions};
use crate::device::{Folder, RamFolder};

const CARRIED_MAX: usize = 3;

/// A bundle on the shelf.
#[derive(Clone)]
pub struct Carried {
    pub reader: Arc<RandomReader>,
    /// Some of its bytes were changed on the way.
    pub damaged: bool,
}

impl World {
    /// Makes a bundle of one of the snapshots.
    pub fn make_bundle(&mut self) {
        if self.snapshots.imaged.is_empty() || self.shelf.len() >= CARRIED_MAX {
            return;
        }
        let at = self.chance.index(self.snapshots.imaged.len());
        let id = self.snapshots.imaged[at].id;
        let Some(view) = self.view(id) else { return };
        let folder = RamFolder::new();
        let bundle = Uuid::from_u128(u128::from(self.new_id()) << 64);
        let options = WriterOptions { bundle, threads: 1, ..WriterOptions::default() };
        let made =
            BundleWriter::create_in(&folder, &view, &options, &mut |_| ControlFlow::Continue(()));
        self.look();
        if made.is_err() {
            return;
        }
        let damaged = self.setting.rotten_bundles && self.chance.one_in(2) && self.damage(&folder);
        let Ok(reader) = Bundle::open_in(Arc::new(folder)).and_then(RandomReader::new) else {
            assert!(damaged, "a bundle that was just made cannot be opened");
            return;
        };
        self.note(|| format!("bundle of {id}, damaged: {damaged}"));
        self.shelf.push(Carried { reader: Arc::new(reader), damaged });
    }

    /// Changes a bit of a segment; `false` if there is none.
    fn damage(&mut self, folder: &RamFolder) -> bool {
        let names = folder.names().unwrap_or_default();
        let Some(name) = names.iter().find(|name| name.ends_with(".drs")) else {
            return false;
        };
        let mut bytes = folder.contents(name).expect("it was listed");
        let at = self.chance.index(bytes.len());
        bytes[at] ^= 1 << self.chance.below(8);
        folder.replace(name, bytes);
        true
    }
}
