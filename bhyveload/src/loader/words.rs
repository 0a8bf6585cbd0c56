//! A command line's words.

use crate::conf::expand;

/// Longest command line.
pub const LONGEST_LINE: usize = 1024;
/// Most words.
const MOST_WORDS: usize = 128;

/// Splits a line: blanks separate, quotes of both kinds and backslashes protect,
/// `$name` and `${name}` are put in (not between single quotes), `#` at the start of
/// a word begins a comment.
///
/// # Errors
/// A quote is not closed, or there are too many words.
pub fn split<'a>(
    line: &str,
    value: impl Fn(&str) -> Option<&'a str>,
) -> Result<Vec<String>, &'static str> {
    let mut words = Vec::new();
    let mut chars = line.chars().peekable();
    loop {
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        match chars.peek() {
            None | Some('#') => return Ok(words),
            Some(_) if words.len() == MOST_WORDS => return Err("too many words"),
            Some(_) => {}
        }
        let mut word = String::new();
        // What may still have variables in it.
        let mut open = String::new();
        let mut quote = None;
        loop {
            let c = match chars.next() {
                Some(c) => c,
                None if quote.is_some() => return Err("a quote is not closed"),
                None => break,
            };
            match (quote, c) {
                (Some(q), c) if c == q => {
                    if q == '"' {
                        word.push_str(&expand(&std::mem::take(&mut open), &value));
                    }
                    quote = None;
                }
                (Some('\''), c) => word.push(c),
                (_, '\\') => {
                    word.push_str(&expand(&std::mem::take(&mut open), &value));
                    word.extend(chars.next());
                }
                (None, '"' | '\'') => {
                    word.push_str(&expand(&std::mem::take(&mut open), &value));
                    quote = Some(c);
                }
                (None, c) if c.is_whitespace() => break,
                (_, c) => open.push(c),
            }
        }
        word.push_str(&expand(&open, &value));
        words.push(word);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_split_as_the_loader_splits_them() {
        let value = |name: &str| (name == "v").then_some("a b");
        for (line, words) in [
            ("set a=1  b", &["set", "a=1", "b"][..]),
            ("set a=\"x y\"", &["set", "a=x y"]),
            (
                "echo '$v' \"$v\" $v ${v}c",
                &["echo", "$v", "a b", "a b", "a bc"],
            ),
            ("a\\ b \\\"c", &["a b", "\"c"]),
            ("  # nothing", &[]),
            ("a #b", &["a"]),
            ("a\"\"", &["a"]),
            ("\"\"", &[""]),
        ] {
            assert_eq!(split(line, value).unwrap(), words, "{line}");
        }
        assert!(split("set a=\"x", value).is_err());
        assert!(split(&"a ".repeat(1000), value).is_err());
    }
}
