//! Which pages are in the balloon. The host has guest memory in pieces of
//! 2 MiB; one goes back when all of its pages are in.

use std::collections::BTreeMap;

use super::request::PAGE;

/// Bytes of a piece.
pub const PIECE: u64 = 2 << 20;
const WORDS: usize = (PIECE / PAGE / 64) as usize;

/// Pages by piece, a bit each.
#[derive(Debug, Default)]
pub struct Ledger {
    pieces: BTreeMap<u64, Box<[u64; WORDS]>>,
}

impl Ledger {
    /// The page at `gpa` is in the balloon now; the address of its piece if
    /// that is complete by it.
    pub fn put(&mut self, gpa: u64) -> Option<u64> {
        let piece = gpa / PIECE;
        let words = self.pieces.entry(piece).or_default();
        let bit = gpa % PIECE / PAGE;
        let word = words.get_mut((bit / 64) as usize)?;
        let before = *word;
        *word |= 1 << (bit % 64);
        let complete = *word != before && words.iter().all(|w| *w == u64::MAX);
        complete.then_some(piece * PIECE)
    }

    /// The page at `gpa` is the guest's again.
    pub fn take(&mut self, gpa: u64) {
        let piece = gpa / PIECE;
        let Some(words) = self.pieces.get_mut(&piece) else {
            return;
        };
        let bit = gpa % PIECE / PAGE;
        if let Some(word) = words.get_mut((bit / 64) as usize) {
            *word &= !(1 << (bit % 64));
        }
        if words.iter().all(|w| *w == 0) {
            self.pieces.remove(&piece);
        }
    }

    /// Nothing is in the balloon.
    pub fn clear(&mut self) {
        self.pieces.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_is_complete_with_its_last_page_and_only_then() {
        let mut l = Ledger::default();
        let at = 6 << 20;
        for page in (0..512).rev().filter(|p| *p != 77) {
            assert_eq!(l.put(at + page * PAGE), None);
        }
        assert_eq!(l.put(at + 76 * PAGE), None, "again");
        assert_eq!(l.put(at + 77 * PAGE), Some(at));
        assert_eq!(l.put(at + 77 * PAGE), None, "told once");
        l.take(at);
        assert_eq!(l.put(at), Some(at), "and again when it was away");
        for page in 0..512 {
            l.take(at + page * PAGE);
        }
        assert!(l.pieces.is_empty());
        l.take(1 << 40);
    }
}
