//! The key of an encrypted bundle, and what is derived from it.
//!
//! | derived | by HKDF-SHA256 with salt | and words | is |
//! |---|---|---|---|
//! | key check | bundle UUID | `dualrestore 1 key check` | in the begin manifest |
//! | manifest key | bundle UUID | `dualrestore 1 manifest` | of the HMAC-SHA256 in the manifest |
//! | segment keys | salt of segment | `dualrestore 1 segment`, bundle, number | see `checks` |
//!
//! Guarantees: a key is wiped when it is dropped, and no `Debug` shows it.
//! Does not know: age, files, where randomness comes from.

use std::fmt;

use ring::{hkdf, hmac};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::Hash;
use crate::error::{Error, ErrorKind, Result};

/// Bytes of a bundle key.
pub const KEY_BYTES: usize = 32;
/// Makes the keys of a segment its own. Never used twice.
pub type Salt = [u8; 32];

const TEXT_START: &str = "DUALRESTORE-BUNDLE-KEY-1";
/// Start, UUID and key in text, and room for spaces around them.
const TEXT_BYTES_MAX: usize = 256;
const KEY_CHECK: &[u8] = b"dualrestore 1 key check";
const MANIFEST: &[u8] = b"dualrestore 1 manifest";
const SEGMENT: &[u8] = b"dualrestore 1 segment";

/// See the module.
#[derive(Clone, PartialEq, Eq)]
pub struct BundleKey {
    bundle: Uuid,
    key: Zeroizing<[u8; KEY_BYTES]>,
}

impl fmt::Debug for BundleKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BundleKey(of {})", self.bundle)
    }
}

/// What a bundle that cannot be opened says.
#[must_use]
pub fn locked(words: impl Into<String>) -> Error {
    Error::new(ErrorKind::Locked, words)
}

impl BundleKey {
    /// A key for that bundle.
    #[must_use]
    pub fn new(bundle: Uuid, key: [u8; KEY_BYTES]) -> Self {
        Self { bundle, key: Zeroizing::new(key) }
    }

    /// The bundle that it is of.
    #[must_use]
    pub fn bundle(&self) -> Uuid {
        self.bundle
    }

    /// The line that `key.age` wraps.
    #[must_use]
    pub fn text(&self) -> Zeroizing<String> {
        // Room for all of it at once, so that no shorter copy is left behind.
        let mut text = Zeroizing::new(String::with_capacity(TEXT_BYTES_MAX));
        text.push_str(TEXT_START);
        text.push(' ');
        text.push_str(self.bundle.hyphenated().encode_lower(&mut Uuid::encode_buffer()));
        text.push(' ');
        for byte in self.key.iter() {
            for digit in [byte >> 4, byte & 15] {
                text.push(char::from_digit(digit.into(), 16).expect("below 16"));
            }
        }
        text.push('\n');
        text
    }

    /// Reads such a line. The error never repeats what it found.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let refused = || {
            locked(format!(
                "expected the key of a bundle ({TEXT_START}, a UUID, 64 hexadecimal digits), \
                 found something else: is key.age of this bundle?"
            ))
        };
        let text = (text.len() <= TEXT_BYTES_MAX).then_some(text).ok_or_else(refused)?;
        let text = std::str::from_utf8(text).map_err(|_| refused())?;
        let mut words = text.split_ascii_whitespace();
        let (start, bundle, digits) = (words.next(), words.next(), words.next());
        let digits = digits.filter(|digits| digits.len() == 2 * KEY_BYTES).ok_or_else(refused)?;
        if start != Some(TEXT_START) || words.next().is_some() {
            return Err(refused());
        }
        let bundle = bundle.and_then(|text| Uuid::try_parse(text).ok()).ok_or_else(refused)?;
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        for (byte, pair) in key.iter_mut().zip(digits.as_bytes().as_chunks::<2>().0) {
            let [high, low] = pair.map(|digit| char::from(digit).to_digit(16));
            let (high, low) = (high.ok_or_else(refused)?, low.ok_or_else(refused)?);
            *byte = (high << 4 | low) as u8;
        }
        Ok(Self { bundle, key })
    }

    /// Says which key it is without giving it away.
    #[must_use]
    pub fn check(&self) -> Hash {
        let mut check = [0; 32];
        self.derive(self.bundle.as_bytes(), &[KEY_CHECK], &mut check);
        check
    }

    /// The keys of a segment.
    pub(super) fn segment_keys(&self, salt: &Salt, number: u32) -> Zeroizing<[u8; 96]> {
        let mut keys = Zeroizing::new([0; 96]);
        let words = [SEGMENT, self.bundle.as_bytes(), &number.to_le_bytes()];
        self.derive(salt, &words, keys.as_mut());
        keys
    }

    fn manifest_key(&self) -> hmac::Key {
        let mut key = Zeroizing::new([0; 32]);
        self.derive(self.bundle.as_bytes(), &[MANIFEST], key.as_mut());
        hmac::Key::new(hmac::HMAC_SHA256, key.as_ref())
    }

    /// The HMAC of a manifest's text.
    #[must_use]
    pub fn seal_text(&self, text: &[u8]) -> Hash {
        let mut hash = [0; 32];
        hash.copy_from_slice(hmac::sign(&self.manifest_key(), text).as_ref());
        hash
    }

    /// Whether the HMAC is that of the text, compared in constant time.
    #[must_use]
    pub fn has_sealed_text(&self, text: &[u8], hash: &Hash) -> bool {
        hmac::verify(&self.manifest_key(), text, hash).is_ok()
    }

    fn derive(&self, salt: &[u8], words: &[&[u8]], out: &mut [u8]) {
        let key = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(self.key.as_ref());
        key.expand(words, Length(out.len()))
            .and_then(|derived| derived.fill(out))
            .expect("far fewer bytes than HKDF can give");
    }
}

struct Length(usize);

impl hkdf::KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> BundleKey {
        BundleKey::new(Uuid::from_u128(7), std::array::from_fn(|at| at as u8 * 5))
    }

    #[test]
    fn a_key_reads_back_from_its_line_and_is_shown_nowhere() {
        let text = key().text();
        assert!(text.starts_with("DUALRESTORE-BUNDLE-KEY-1 00000000-0000-0000-0000-000000000007 "));
        assert!(BundleKey::parse(text.as_bytes()).expect("whole") == key());
        assert!(BundleKey::parse(text.trim_end().as_bytes()).expect("whole") == key());
        assert!(!format!("{:?}", key()).contains("050a0f"));
    }

    #[test]
    fn what_is_no_key_is_refused_without_being_repeated() {
        let whole = key().text();
        let long = format!("{}{}", whole.as_str(), " ".repeat(300));
        let other = whole.replace("KEY-1", "KEY-2");
        let (short, word) = (&whole[..whole.len() - 2], format!("{} x", whole.as_str()));
        let odd = whole.replace("050a", "05xa");
        for text in ["", "secret", short, &word, &long, &other, &odd] {
            let error = BundleKey::parse(text.as_bytes()).expect_err("no key");
            assert_eq!(error.kind(), ErrorKind::Locked);
            assert!(!error.to_string().contains("0f14"), "{error}");
        }
        assert!(BundleKey::parse(&[0xff; 64]).is_err());
    }

    #[test]
    fn everything_derived_depends_on_key_bundle_salt_and_number() {
        let other = BundleKey::new(Uuid::from_u128(8), *key().key);
        assert_ne!(key().check(), other.check());
        let keys = [
            key().segment_keys(&[1; 32], 0),
            key().segment_keys(&[2; 32], 0),
            key().segment_keys(&[1; 32], 1),
            other.segment_keys(&[1; 32], 0),
        ];
        for (at, one) in keys.iter().enumerate() {
            assert!(keys[..at].iter().all(|before| before[..32] != one[..32]));
            assert!(one[..32] != one[32..64] && one[32..64] != one[64..]);
        }
        let seal = key().seal_text(b"text");
        assert!(key().has_sealed_text(b"text", &seal));
        assert!(!key().has_sealed_text(b"Text", &seal) && !other.has_sealed_text(b"text", &seal));
    }

    /// The values were made with Python's `hmac`, so that `recover.py` can make them too.
    #[test]
    fn derivation_is_hkdf_of_rfc_5869() {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(hex(&key().check()), KNOWN_CHECK);
        assert_eq!(hex(&key().segment_keys(&[3; 32], 9)[..32]), KNOWN_SEGMENT);
    }

    const KNOWN_CHECK: &str = "12ce41fc15e68863d9dbb07e2288adf41c8f258308cb79123cc7f3fade3d7ffb";
    const KNOWN_SEGMENT: &str = "7f64ad7b30a762eff14a9d003f4043d6b00a4707ec76e2f2ac805c79b815544c";
}
