//! What happened in a life, in words, for whoever asks.
//!
//! Does not know: who reads it.

use std::sync::{Arc, Mutex, PoisonError};

/// Clones share the lines. Nothing is put into words unless they are kept.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    lines: Option<Arc<Mutex<Vec<String>>>>,
}

impl Trace {
    /// One that keeps what it is told.
    pub fn keeping() -> Self {
        Self { lines: Some(Arc::default()) }
    }

    pub fn note(&self, words: impl FnOnce() -> String) {
        if let Some(lines) = &self.lines {
            lines.lock().unwrap_or_else(PoisonError::into_inner).push(words());
        }
    }

    pub fn take(&self) -> Vec<String> {
        let held = self.lines.as_ref();
        held.map_or_else(Vec::new, |lines| {
            std::mem::take(&mut *lines.lock().unwrap_or_else(PoisonError::into_inner))
        })
    }
}
