//! Lists and texts of JSON documents from outside, refused while they are read if they are longer
//! than they may be: so that a document cannot ask for many times its own length in memory.
//!
//! Does not know: what they are of.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::limits::BUNDLE_NAME_BYTES_MAX;

/// A list that is refused as soon as it is longer than it may be.
pub fn at_most<'de, D, T, const MAX: usize>(
    deserializer: D,
) -> std::result::Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    struct AtMost<T, const MAX: usize>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for AtMost<T, MAX> {
        type Value = Vec<T>;

        fn expecting(&self, words: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(words, "a list of at most {MAX}")
        }

        fn visit_seq<A: SeqAccess<'de>>(
            self,
            mut items: A,
        ) -> std::result::Result<Vec<T>, A::Error> {
            let mut list = Vec::new();
            while let Some(item) = items.next_element()? {
                if list.len() == MAX {
                    return Err(A::Error::invalid_length(MAX + 1, &self));
                }
                list.push(item);
            }
            Ok(list)
        }
    }

    deserializer.deserialize_seq(AtMost::<T, MAX>(PhantomData))
}

/// A text that is no longer than a name.
pub fn name<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.len() <= BUNDLE_NAME_BYTES_MAX {
        return Ok(text);
    }
    let words = format!("a text of {} bytes, at most {BUNDLE_NAME_BYTES_MAX}", text.len());
    Err(D::Error::custom(words))
}
