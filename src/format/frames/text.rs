//! Names and words that cross the link.
//!
//! Guarantees: text that was read is UTF-8 without control characters and within its limit, so it
//! can be logged and shown; text that is written is made so. A name is a key of a table, never a
//! path.

use crate::error::{Error, Result};
use crate::limits::{LINK_NAME_BYTES_MAX, LINK_TEXT_BYTES_MAX};

/// `text` as it may be written: control characters become spaces, the end is cut at the limit.
pub(super) fn clean(text: &str) -> String {
    let mut clean = String::with_capacity(text.len().min(LINK_TEXT_BYTES_MAX));
    for character in text.chars() {
        let character = if character.is_control() { ' ' } else { character };
        if clean.len() + character.len_utf8() > LINK_TEXT_BYTES_MAX {
            break;
        }
        clean.push(character);
    }
    clean
}

pub(super) fn read(bytes: &[u8], what: &str) -> Result<String> {
    read_within(bytes, LINK_TEXT_BYTES_MAX, what)
}

/// A name of a volume or a label: not empty unless `may_be_empty`.
pub(super) fn read_name(bytes: &[u8], may_be_empty: bool, what: &str) -> Result<String> {
    if bytes.is_empty() && !may_be_empty {
        return Err(Error::format(format!("{what}: expected a name, found none")));
    }
    read_within(bytes, LINK_NAME_BYTES_MAX, what)
}

/// Whether `read_name` would take it.
pub(super) fn is_name(name: &str) -> bool {
    name.len() <= LINK_NAME_BYTES_MAX && !name.chars().any(char::is_control)
}

/// Whether `read` would take it.
pub(super) fn is_text(text: &str) -> bool {
    text.len() <= LINK_TEXT_BYTES_MAX && !text.chars().any(char::is_control)
}

fn read_within(bytes: &[u8], bytes_max: usize, what: &str) -> Result<String> {
    if bytes.len() > bytes_max {
        return Err(Error::format(format!(
            "{what}: expected at most {bytes_max} bytes of text, found {}",
            bytes.len()
        )));
    }
    let text = std::str::from_utf8(bytes)
        .map_err(|_| Error::format(format!("{what}: expected UTF-8, found other bytes")))?;
    if text.chars().any(char::is_control) {
        return Err(Error::format(format!("{what}: expected text, found a control character")));
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_text_is_always_readable() {
        let long = "ä\n\u{1b}[31m".repeat(LINK_TEXT_BYTES_MAX);
        let clean = clean(&long);
        assert!(clean.len() <= LINK_TEXT_BYTES_MAX && clean.len() + 2 > LINK_TEXT_BYTES_MAX);
        assert_eq!(read(clean.as_bytes(), "text").expect("clean"), clean);
    }

    #[test]
    fn names_that_are_empty_long_or_not_text_are_refused() {
        for bad in [&b""[..], &[b'a'; 256], b"a\0b", b"\xff", b"a\nb"] {
            assert!(read_name(bad, false, "volume name").is_err(), "{bad:?}");
        }
        assert_eq!(read_name(b"../x", false, "volume name").expect("only a key"), "../x");
        assert_eq!(read_name(b"", true, "label").expect("allowed"), "");
    }
}
