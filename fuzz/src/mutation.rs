//! Changes inputs at random, the same way for the same seed: bits, numbers that are at the edge of
//! something, lengths, pieces of other inputs, words of the dictionary.

/// Numbers that lengths and offsets go wrong at.
const EDGES: [u64; 14] = [
    0,
    1,
    7,
    0x7f,
    0xff,
    512,
    4095,
    4096,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    u64::MAX,
];

/// See the module.
#[derive(Debug)]
pub struct Mutator {
    state: u64,
    words: Vec<Vec<u8>>,
}

impl Mutator {
    #[must_use]
    pub fn new(seed: u64, words: Vec<Vec<u8>>) -> Self {
        Self { state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, words }
    }

    /// The words of a dictionary of libFuzzer: one a line, in quotes, bytes as `\xNN`.
    #[must_use]
    pub fn words_of(dictionary: &str) -> Vec<Vec<u8>> {
        let quoted = |line: &str| Some(line.split_once('"')?.1.rsplit_once('"')?.0.to_owned());
        dictionary
            .lines()
            .filter(|line| !line.trim_start().starts_with('#'))
            .filter_map(quoted)
            .map(|text| unescaped(&text))
            .collect()
    }

    /// From 0 up to but not including `below`.
    pub fn below(&mut self, below: usize) -> usize {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        ((self.state >> 16) as usize) % below.max(1)
    }

    /// One of the seeds, changed in one to eight places.
    pub fn mutated(&mut self, seeds: &[Vec<u8>], length_max: usize) -> Vec<u8> {
        let mut bytes = seeds[self.below(seeds.len())].clone();
        for _ in 0..=self.below(8) {
            self.change(&mut bytes, seeds);
        }
        bytes.truncate(length_max);
        bytes
    }

    fn change(&mut self, bytes: &mut Vec<u8>, seeds: &[Vec<u8>]) {
        let at = self.place(bytes.len());
        match self.below(9) {
            0 => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << self.below(8);
                }
            }
            1..=3 => self.number(bytes, at),
            4 => bytes.truncate(at),
            5 => {
                let end = (at + self.below(64)).min(bytes.len());
                bytes.drain(at..end);
            }
            6 => {
                let end = (at + self.below(512)).min(bytes.len());
                let again = bytes[at..end].to_vec();
                bytes.splice(at..at, again);
            }
            7 => {
                let other = &seeds[self.below(seeds.len())];
                let from = self.place(other.len());
                let piece = &other[from..(from + self.below(4096)).min(other.len())];
                let end = (at + piece.len()).min(bytes.len());
                bytes.splice(at..end, piece.iter().copied());
            }
            _ => {
                let count = self.words.len();
                if count > 0 {
                    let chosen = self.below(count);
                    let word = self.words[chosen].clone();
                    let end = (at + word.len() * self.below(2)).min(bytes.len());
                    bytes.splice(at..end, word);
                }
            }
        }
    }

    /// Headers stand in front: half of all places are among the first 256 bytes.
    fn place(&mut self, length: usize) -> usize {
        let near = self.below(2) == 0;
        self.below(if near { length.min(256) } else { length } + 1)
    }

    /// An edge, or one beside it, over a field of any width, mostly aligned, of either order.
    fn number(&mut self, bytes: &mut [u8], at: usize) {
        let width = 1 << self.below(4);
        let at = if self.below(4) == 0 { at } else { at / width * width };
        let edge = EDGES[self.below(EDGES.len())];
        let value = edge.wrapping_add(self.below(3) as u64).wrapping_sub(1);
        let Some(field) = bytes.get_mut(at..at + width) else { return };
        if self.below(2) == 0 {
            field.copy_from_slice(&value.to_le_bytes()[..width]);
        } else {
            field.copy_from_slice(&value.to_be_bytes()[8 - width..]);
        }
    }
}

fn unescaped(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, more)) = rest.split_first() {
        let hex = more.strip_prefix(b"x").and_then(|more| more.get(..2));
        let byte = hex.and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        (rest, bytes) = match (first, byte, more.split_first()) {
            (b'\\', Some(byte), _) => (&more[3..], [bytes, vec![byte]].concat()),
            (b'\\', None, Some((escaped, more))) => (more, [bytes, vec![*escaped]].concat()),
            _ => (more, [bytes, vec![*first]].concat()),
        };
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_dictionary_are_read() {
        let text = "# a comment \"x\"\nmagic=\"DR\\x4d\\x0d\"\n\"a\\\"b\\\\\"\n";
        assert_eq!(Mutator::words_of(text), [b"DRM\r".to_vec(), b"a\"b\\".to_vec()]);
    }

    #[test]
    fn the_same_seed_gives_the_same_inputs() {
        let seeds = [vec![1; 100], vec![2; 50]];
        let inputs = |seed| {
            let mut mutator = Mutator::new(seed, vec![b"word".to_vec()]);
            (0..50).map(|_| mutator.mutated(&seeds, 4096)).collect::<Vec<_>>()
        };
        assert_eq!(inputs(3), inputs(3));
        assert_ne!(inputs(3), inputs(4));
    }
}
