//! Lists as one string.

/// The parts of `list` between ASCII characters `by`. What `str::split` does with all of
/// Unicode is half a page of code.
pub fn parts(list: &str, by: u8) -> impl Iterator<Item = &str> {
    debug_assert!(by.is_ascii());
    let mut rest = Some(list);
    core::iter::from_fn(move || {
        let list = rest?;
        match list.bytes().position(|b| b == by) {
            Some(n) => {
                rest = list.get(n + 1..);
                list.get(..n)
            }
            None => {
                rest = None;
                Some(list)
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn all_parts_in_turn() {
        let of = |list| parts(list, b',').collect::<Vec<&str>>();
        assert_eq!(of("cs,ds,tr"), ["cs", "ds", "tr"]);
        assert_eq!(of("one"), ["one"]);
        assert_eq!(of(",\u{e9},"), ["", "\u{e9}", ""]);
    }
}
