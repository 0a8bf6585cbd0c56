//! A device's options: a table of keys on one side, the string of `-s` on the
//! other. No emulation is known by its options here, so that any works.

/// An option's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionValue {
    /// `true` is the key alone, `false` nothing.
    Bool(bool),
    /// `key=value`; several are repeated.
    Text(Vec<String>),
}

/// A device's options by name, in order.
pub type Options = Vec<(String, OptionValue)>;

/// What a network device's first word is called.
fn first_key(emulation: &str) -> &'static str {
    if emulation.contains("net") || emulation == "e1000" {
        "backend"
    } else {
        "path"
    }
}

/// The string of `-s` behind the emulation's name.
///
/// # Errors
/// A value that the string cannot hold; says which.
pub fn to_conf(emulation: &str, options: &Options) -> Result<String, String> {
    let find = |name: &str| options.iter().find(|(n, _)| n == name).map(|(_, v)| v);
    if let Some(conf) = find("conf") {
        return match (conf, options.len()) {
            (OptionValue::Text(t), 1) if t.len() == 1 => Ok(t.concat()),
            (_, 1) => Err("conf is a string".into()),
            _ => Err("conf stands for all options: no other key beside it".into()),
        };
    }
    let mut parts = Vec::new();
    let mut used: Vec<&str> = Vec::new();
    match emulation {
        // bhyve(8): sharename=path.
        "virtio-9p" => {
            if let (Some(OptionValue::Text(name)), Some(OptionValue::Text(path))) =
                (find("sharename"), find("path"))
            {
                parts.push(format!("{}={}", name.concat(), path.concat()));
                used = vec!["sharename", "path"];
            }
        }
        // bhyve(8): bus/slot/function.
        "passthru" => {
            let number = |name| match find(name) {
                Some(OptionValue::Text(t)) => Some(t.concat()),
                _ => None,
            };
            if let (Some(b), Some(s), Some(f)) = (number("bus"), number("slot"), number("func")) {
                parts.push(format!("{b}/{s}/{f}"));
                used = vec!["bus", "slot", "func"];
            } else if let Some(name) = number("pptdev") {
                parts.push(name);
                used = vec!["pptdev"];
            }
        }
        _ => {}
    }
    if used.is_empty()
        && let Some(name) = ["backend", "path"].iter().find(|n| find(n).is_some())
        && let Some(OptionValue::Text(words)) = find(name)
    {
        parts.extend(words.iter().cloned());
        used = vec![name];
    }
    for (name, value) in options.iter().filter(|(n, _)| !used.contains(&n.as_str())) {
        match value {
            OptionValue::Bool(true) => parts.push(name.clone()),
            OptionValue::Bool(false) => {}
            OptionValue::Text(values) => parts.extend(values.iter().map(|v| format!("{name}={v}"))),
        }
    }
    if let Some(bad) = parts.iter().find(|p| p.contains(',')) {
        return Err(format!(
            "\"{bad}\": a comma ends an option of a device; give the whole string with conf if it is meant so"
        ));
    }
    Ok(parts.join(","))
}

/// Options that [`to_conf`] makes this very string of.
pub fn from_conf(emulation: &str, conf: &str) -> Options {
    let mut options: Options = Vec::new();
    for (i, part) in conf.split(',').enumerate().filter(|_| !conf.is_empty()) {
        match part.split_once('=') {
            Some((name, value)) => {
                match options.iter_mut().find(|(n, _)| n == name) {
                    Some((_, OptionValue::Text(values))) => values.push(value.into()),
                    _ => options.push((name.into(), OptionValue::Text(vec![value.into()]))),
                };
            }
            None if i == 0 && emulation == "passthru" && part.starts_with("ppt") => {
                options.push(("pptdev".into(), OptionValue::Text(vec![part.into()])));
            }
            None if i == 0 => options.push((
                first_key(emulation).into(),
                OptionValue::Text(vec![part.into()]),
            )),
            None => options.push((part.into(), OptionValue::Bool(true))),
        }
    }
    let reserved = ["slot", "emulation", "conf", ""];
    let plain = options.iter().all(|(n, _)| !reserved.contains(&n.as_str()));
    let mut names: Vec<&str> = options.iter().map(|(n, _)| n.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    if plain && names.len() == options.len() && to_conf(emulation, &options).as_deref() == Ok(conf)
    {
        return options;
    }
    vec![("conf".into(), OptionValue::Text(vec![conf.into()]))]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(v: &str) -> OptionValue {
        OptionValue::Text(vec![v.into()])
    }

    #[test]
    fn options_are_the_string_of_minus_s() {
        for (emulation, options, conf) in [
            (
                "virtio-blk",
                vec![
                    ("ro", OptionValue::Bool(true)),
                    ("path", text("/a.img")),
                    ("serial", text("X")),
                    ("sync", OptionValue::Bool(false)),
                ],
                "/a.img,ro,serial=X",
            ),
            (
                "virtio-net",
                vec![("backend", text("tap0")), ("path", text("x"))],
                "tap0,path=x",
            ),
            (
                "virtio-9p",
                vec![
                    ("sharename", text("home")),
                    ("path", text("/home")),
                    ("ro", OptionValue::Bool(true)),
                ],
                "home=/home,ro",
            ),
            (
                "passthru",
                vec![("bus", text("2")), ("slot", text("0")), ("func", text("1"))],
                "2/0/1",
            ),
            (
                "virtio-net",
                vec![
                    ("backend", text("slirp")),
                    (
                        "hostfwd",
                        OptionValue::Text(vec!["tcp:1-2".into(), "tcp:3-4".into()]),
                    ),
                ],
                "slirp,hostfwd=tcp:1-2,hostfwd=tcp:3-4",
            ),
            ("anything", vec![("conf", text("a,b=,c"))], "a,b=,c"),
        ] {
            let options: Options = options.into_iter().map(|(n, v)| (n.into(), v)).collect();
            assert_eq!(to_conf(emulation, &options).as_deref(), Ok(conf));
        }
    }

    /// `slot` is a device's own place in a file, so a function is given by `path`.
    #[test]
    fn a_passed_function_has_a_table() {
        for (conf, keys) in [
            ("5/0/1,rom=/a.rom", ["path", "rom"]),
            ("ppt2,rom=x", ["pptdev", "rom"]),
        ] {
            let options = from_conf("passthru", conf);
            let names: Vec<&str> = options.iter().map(|(n, _)| n.as_str()).collect();
            assert_eq!(names, keys);
            assert_eq!(to_conf("passthru", &options).as_deref(), Ok(conf));
        }
    }

    #[test]
    fn a_comma_and_two_ways_at_once_are_refused() {
        let comma = vec![("path".to_owned(), text("/a,b"))];
        assert!(to_conf("virtio-blk", &comma).unwrap_err().contains("/a,b"));
        let both = vec![
            ("conf".to_owned(), text("x")),
            ("ro".to_owned(), OptionValue::Bool(true)),
        ];
        assert!(to_conf("virtio-blk", &both).is_err());
    }

    proptest! {
        #[test]
        fn any_string_survives(
            emulation in prop::sample::select(vec!["virtio-blk", "virtio-net", "virtio-9p", "passthru", "x"]),
            conf in "([0-9a-z/:]{0,6}(=[a-z0-9/=]{0,5})?,?){0,5}",
        ) {
            let options = from_conf(emulation, &conf);
            prop_assert_eq!(to_conf(emulation, &options), Ok(conf));
            let mut names: Vec<_> = options.iter().map(|(n, _)| n).collect();
            names.sort();
            names.dedup();
            prop_assert_eq!(names.len(), options.len(), "a table has each key once");
        }
    }
}
