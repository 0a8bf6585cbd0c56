//! `loader.conf` (loader.conf(5)): the language, and what its lines ask for.

use std::collections::BTreeMap;

/// Longest value after variables have been put in.
const LONGEST_VALUE: usize = 4096;

/// A file's assignments, and its lines that are none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parsed {
    /// Names and values, in order.
    pub settings: Vec<(String, String)>,
    /// Numbers of the lines that were left out, and why.
    pub bad: Vec<(usize, &'static str)>,
}

/// Reads `name="value"` lines; `#` starts a comment. As with FreeBSD's loader, a
/// line that makes no sense does not keep the others from being read.
#[must_use]
pub fn parse(text: &str) -> Parsed {
    let mut parsed = Parsed::default();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        match assignment(line) {
            Ok(setting) => parsed.settings.push(setting),
            Err(problem) => parsed.bad.push((number + 1, problem)),
        }
    }
    parsed
}

fn assignment(line: &str) -> Result<(String, String), &'static str> {
    let (name, rest) = line.split_once('=').ok_or("is not name=\"value\"")?;
    let name = name.trim_end();
    let good = |c: char| c.is_ascii_alphanumeric() || "_.-%,/+:".contains(c);
    if name.is_empty() || !name.chars().all(good) {
        return Err("has no usable name before the =");
    }
    let rest = rest.trim_start();
    let (value, after) = if let Some(quoted) = rest.strip_prefix('"') {
        unquote(quoted).ok_or("has no closing quote")?
    } else {
        let end = rest
            .find(|c: char| c.is_whitespace() || c == '#')
            .unwrap_or(rest.len());
        (rest[..end].to_owned(), &rest[end..])
    };
    let after = after.trim_start();
    if !after.is_empty() && !after.starts_with('#') {
        return Err("has something after the value");
    }
    Ok((name.to_owned(), value))
}

/// The text up to the closing quote, and what follows it.
fn unquote(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(chars.next()?.1),
            c => value.push(c),
        }
    }
    None
}

/// Puts variables in for `$name` and `${name}`; what has no value becomes nothing.
#[must_use]
pub fn expand<'a>(text: &str, value: impl Fn(&str) -> Option<&'a str>) -> String {
    let mut result = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        result.push_str(before);
        let braced = after.strip_prefix('{').and_then(|t| t.split_once('}'));
        let (name, behind) = braced.unwrap_or_else(|| {
            let end = after
                .find(|c: char| !c.is_ascii_alphanumeric() && !"_.".contains(c))
                .unwrap_or(after.len());
            after.split_at(end)
        });
        if name.is_empty() {
            result.push('$');
        } else {
            result.push_str(value(name).unwrap_or_default());
        }
        rest = behind;
    }
    result.push_str(rest);
    if result.len() > LONGEST_VALUE {
        let end = (0..=LONGEST_VALUE)
            .rev()
            .find(|&i| result.is_char_boundary(i));
        result.truncate(end.unwrap_or_default());
    }
    result
}

/// A module that `loader.conf` speaks of.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// `_load` says YES.
    pub load: bool,
    /// `_name`: the file, if not the module's own name.
    pub name: Option<String>,
    /// `_type`.
    pub kind: Option<String>,
    /// `_flags`.
    pub flags: Option<String>,
    /// `_before`: a command.
    pub before: Option<String>,
    /// `_after`: a command.
    pub after: Option<String>,
    /// `_error`: a command.
    pub error: Option<String>,
}

/// The modules, in the order in which they were first named.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Modules {
    wanted: BTreeMap<String, Wanted>,
    order: Vec<String>,
}

impl Modules {
    /// Takes a setting, if it is about a module; says if it was.
    pub fn take(&mut self, name: &str, value: &str) -> bool {
        let suffixes = [
            "_load", "_name", "_type", "_flags", "_before", "_after", "_error",
        ];
        let Some((module, suffix)) = suffixes
            .iter()
            .find_map(|s| Some((name.strip_suffix(s).filter(|m| !m.is_empty())?, *s)))
        else {
            return false;
        };
        if !self.wanted.contains_key(module) {
            self.order.push(module.to_owned());
        }
        let wanted = self.wanted.entry(module.to_owned()).or_default();
        let text = Some(value.to_owned());
        match suffix {
            "_load" => wanted.load = value.eq_ignore_ascii_case("yes"),
            "_name" => wanted.name = text,
            "_type" => wanted.kind = text,
            "_flags" => wanted.flags = text,
            "_before" => wanted.before = text,
            "_after" => wanted.after = text,
            _ => wanted.error = text,
        }
        true
    }

    /// Those to be loaded, by key, in order.
    #[must_use]
    pub fn to_load(&self) -> Vec<(String, Wanted)> {
        self.order
            .iter()
            .filter_map(|key| {
                Some((
                    key.clone(),
                    self.wanted.get(key).filter(|w| w.load)?.clone(),
                ))
            })
            .collect()
    }

    /// Whether a module is to be loaded.
    pub fn set_load(&mut self, key: &str, load: bool) {
        self.take(&format!("{key}_load"), if load { "YES" } else { "NO" });
    }
}

/// Where `/` is by an `/etc/fstab`: what `vfs.root.mountfrom` wants, and the options.
#[must_use]
pub fn root_of_fstab(text: &str) -> Option<(String, String)> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (device, place, kind) = (words.next()?, words.next()?, words.next()?);
        let options = words.next().unwrap_or("rw");
        (place == "/" && !device.starts_with('#'))
            .then(|| (format!("{kind}:{device}"), options.to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_the_loader_reads_them() {
        let text =
            "# c\n\na=\"1\"\n b = 2 # c\nc=\"x \\\"y\\\" # z\" # c\nhint.uart.0.at=\"isa\"\nd=\n";
        let parsed = parse(text);
        let pairs: Vec<_> = parsed
            .settings
            .iter()
            .map(|(n, v)| (n.as_str(), v.as_str()))
            .collect();
        assert_eq!(
            pairs,
            [
                ("a", "1"),
                ("b", "2"),
                ("c", "x \"y\" # z"),
                ("hint.uart.0.at", "isa"),
                ("d", "")
            ]
        );
        assert_eq!(parsed.bad, []);
    }

    #[test]
    fn a_bad_line_is_named_and_the_others_are_read() {
        for (text, line) in [
            ("a=\"1\"\nnonsense\n", 2),
            ("a=\"1", 1),
            ("a=\"1\" b", 1),
            ("=1", 1),
            ("\n\na b=1", 3),
            ("a=\"\\", 1),
        ] {
            let parsed = parse(&format!("{text}\nlast=\"1\""));
            assert_eq!(parsed.bad.len(), 1, "{text:?}");
            assert_eq!(parsed.bad[0].0, line, "{text:?}");
            assert_eq!(parsed.settings.last().unwrap().0, "last");
        }
    }

    #[test]
    fn variables_are_put_in_and_do_not_grow_without_end() {
        let value = |name: &str| match name {
            "a" => Some("1"),
            "b.c" => Some("2"),
            "long" => Some("xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"),
            _ => None,
        };
        assert_eq!(expand("$a-${b.c}-$none-$", value), "1-2--$");
        assert_eq!(expand("${unclosed $a", value), "${unclosed 1");
        assert_eq!(expand(&"$long".repeat(1000), value).len(), LONGEST_VALUE);
    }

    #[test]
    fn modules_are_kept_in_their_order_with_all_that_is_said_of_them() {
        let mut modules = Modules::default();
        for (name, value) in [
            ("b_load", "YES"),
            ("off_load", "NO"),
            ("a_load", "yes"),
            ("a_type", "md_image"),
            ("a_name", "/boot/a"),
            ("b_flags", "-x 1"),
        ] {
            assert!(modules.take(name, value));
        }
        assert!(!modules.take("kern.hz", "100") && !modules.take("_load", "YES"));
        let list = modules.to_load();
        assert_eq!(list[0].0, "b");
        assert_eq!(list[0].1.flags.as_deref(), Some("-x 1"));
        assert_eq!(list[1].1.kind.as_deref(), Some("md_image"));
        assert_eq!(list.len(), 2);
    }

    #[test]
    fn the_root_is_what_fstab_mounts_there() {
        let fstab = "#/dev/ada0p2 / ufs rw 1 1\n/dev/vtbd0p3 none swap sw 0 0\n/dev/vtbd0p2\t/\tufs\trw,noatime\t1\t1\n";
        let (device, options) = root_of_fstab(fstab).unwrap();
        assert_eq!(
            (device.as_str(), options.as_str()),
            ("ufs:/dev/vtbd0p2", "rw,noatime")
        );
        assert_eq!(root_of_fstab("/dev/x /usr ufs\nrubbish"), None);
    }
}
