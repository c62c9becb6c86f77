//! Bitmaps that survive a crash: map files in two-slot pages, the intent log, the overwrite map.

mod file;
mod header;
mod intent;
mod offline;
mod overwrite;
mod renewing;

pub use crate::format::map::{MapIdentity, MapRole};
pub use file::{Capture, MapFile};
pub use intent::{IntentLog, Intents};
pub use offline::{INTENT_LOG_NAME, OVERWRITE_MAP_NAME, OfflineMap};
pub use overwrite::{CURRENT, LINK_ONLY, OverwriteMap, Recovery, UNSENT};
