//! Makes the checksums of a bundle's files right, written from `docs/formats.md` alone.

const PAGE: usize = 4096;
const CHECKS: usize = 36;
const CHECKS_AT: usize = 28;

/// The text of a manifest up to and without its check, with the check that belongs to it.
pub fn sealed_text(text: &[u8]) -> Vec<u8> {
    let check = format!("{:08x}-{}", crc32c::crc32c(text), blake3::hash(text).to_hex());
    [text, b",\n  \"check\": \"", check.as_bytes(), b"\"\n}\n"].concat()
}

fn seal(page: &mut [u8], at: usize, context: &[u8]) -> [u8; 32] {
    let body = [&page[..at], &page[at + CHECKS..]].concat();
    let hash = *blake3::hash(&[context, &body].concat()).as_bytes();
    page[at..at + 4].copy_from_slice(&crc32c::crc32c(&body).to_le_bytes());
    page[at + 4..at + CHECKS].copy_from_slice(&hash);
    hash
}

/// Makes the checks of a segment of two pages or more right: header, descriptor pages, index,
/// trailer. Its header's hash and its root.
pub fn reseal_segment(bytes: &mut [u8]) -> ([u8; 32], [u8; 32]) {
    let context = seal(&mut bytes[..PAGE], PAGE - CHECKS, &[]);
    let last = bytes.len() / PAGE * PAGE - PAGE;
    let mut root = blake3::Hasher::new();
    for at in (PAGE..last).step_by(PAGE) {
        if bytes[at..].starts_with(b"DRBT") {
            root.update(&seal(&mut bytes[at..at + PAGE], CHECKS_AT, &context));
        }
    }
    let root = *root.finalize().as_bytes();
    let stated = u64::from_le_bytes(std::array::from_fn(|at| bytes[last + 16 + at]));
    let index_at = usize::try_from(stated).unwrap_or(last).min(last);
    let (index, trailer) = bytes[index_at..last + PAGE].split_at_mut(last - index_at);
    trailer[64..68].copy_from_slice(&crc32c::crc32c(index).to_le_bytes());
    trailer[72..104].copy_from_slice(blake3::hash(index).as_bytes());
    trailer[104..136].copy_from_slice(&root);
    seal(trailer, PAGE - CHECKS, &context);
    (context, root)
}
