//! Settings as a file.

use crate::device::{OptionValue, from_conf};
use crate::keys::KEYS;
use crate::settings::{Settings, Value};
use std::fmt::Write as _;

fn quoted(text: &str) -> String {
    toml::Value::String(text.into()).to_string()
}

fn array(texts: &[String]) -> String {
    let all: Vec<String> = texts.iter().map(|t| quoted(t)).collect();
    format!("[{}]", all.join(", "))
}

/// A name that need not be quoted is not.
fn bare(name: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if !name.is_empty() && name.chars().all(plain) {
        return name.into();
    }
    // A key may be a basic string, but not all that a value may be.
    let mut out = String::from("\"");
    for c in name.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => {
                let _ = write!(out, "\\U{:08X}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

fn value(v: &Value) -> String {
    match v {
        // Numbers look better bare, where they come back as they are.
        Value::Text(t) if t.parse::<u32>().is_ok_and(|n| n.to_string() == *t) => t.clone(),
        Value::Text(t) => quoted(t),
        Value::Bool(b) => b.to_string(),
        Value::List(l) => array(l),
        Value::Table(pairs) => {
            let all: Vec<String> = pairs
                .iter()
                .map(|(n, v)| format!("{} = {}", bare(n), quoted(v)))
                .collect();
            format!("{{ {} }}", all.join(", "))
        }
    }
}

/// The TOML of these settings. Reading it gives the same settings again.
pub fn toml(settings: &Settings) -> String {
    let mut out = String::new();
    let mut section = "";
    for key in KEYS {
        let Some(v) = settings.get(key.path) else {
            continue;
        };
        let (s, name) = key.path.split_once('.').unwrap_or(("", key.path));
        if s != section {
            let _ = writeln!(out, "\n[{s}]");
            section = s;
        }
        let text = match key.kind {
            crate::keys::Kind::Number => value(v),
            // A string key takes no bare number.
            _ => match v {
                Value::Text(t) => quoted(t),
                v => value(v),
            },
        };
        let _ = writeln!(out, "{name} = {text}");
    }
    for d in &settings.devices {
        let (bus, slot, func) = d.place;
        let place = match (bus, func) {
            (0, 0) => slot.to_string(),
            (0, _) => format!("\"{slot}:{func}\""),
            _ => format!("\"{bus}:{slot}:{func}\""),
        };
        let _ = writeln!(
            out,
            "\n[[device]]\nslot = {place}\nemulation = {}",
            quoted(&d.emulation)
        );
        for (name, v) in from_conf(&d.emulation, &d.conf) {
            if d.conf.is_empty() {
                break;
            }
            let text = match v {
                OptionValue::Bool(b) => b.to_string(),
                OptionValue::Text(t) if t.len() == 1 => quoted(&t.concat()),
                OptionValue::Text(t) => array(&t),
            };
            let _ = writeln!(out, "{} = {text}", bare(&name));
        }
    }
    out.trim_start().to_owned()
}

#[cfg(test)]
mod tests {
    use crate::file::parse;
    use crate::keys::{KEYS, Kind};
    use crate::settings::{Device, Origin, Setting, Settings, Value};
    use proptest::prelude::*;

    fn any_value(kind: Kind) -> BoxedStrategy<Value> {
        match kind {
            Kind::Text | Kind::Number => ".{0,12}".prop_map(Value::Text).boxed(),
            Kind::Bool => any::<bool>().prop_map(Value::Bool).boxed(),
            Kind::List => prop::collection::vec(".{0,8}", 0..4)
                .prop_map(Value::List)
                .boxed(),
            Kind::Table => prop::collection::btree_map(".{1,8}", ".{0,8}", 0..4)
                .prop_map(|m| Value::Table(m.into_iter().collect()))
                .boxed(),
        }
    }

    prop_compose! {
        fn any_settings()(
            values in prop::collection::vec(
                (0..KEYS.len()).prop_flat_map(|i| any_value(KEYS[i].kind).prop_map(move |v| (i, v))), 0..12),
            devices in prop::collection::btree_map(
                (0u8..3, 0u8..32, 0u8..8), ("[a-z-]{1,8}", ".{0,20}"), 0..5),
        ) -> Settings {
            let mut s = Settings::default();
            for (i, value) in values {
                s.set(Setting { key: &KEYS[i], value, at: Origin::default() });
            }
            for (place, (emulation, conf)) in devices {
                s.set_device(Device { place, emulation, conf, at: Origin::default() });
            }
            s.values.sort_by_key(|s| KEYS.iter().position(|k| k == s.key));
            s
        }
    }

    fn nowhere(mut s: Settings) -> Settings {
        s.values.iter_mut().for_each(|s| s.at = Origin::default());
        s.devices.iter_mut().for_each(|d| d.at = Origin::default());
        s
    }

    proptest! {
        #[test]
        fn what_is_printed_reads_back_the_same(settings in any_settings()) {
            let text = super::toml(&settings);
            let read = parse("x", &text).map_err(|e| TestCaseError::fail(format!("{e}\n{text}")))?;
            let read = nowhere(read);
            // A merged table has its entries in the order of their setting.
            let sorted = |mut s: Settings| {
                for v in &mut s.values {
                    if let Value::Table(t) = &mut v.value { t.sort() }
                }
                s
            };
            prop_assert_eq!(sorted(read), sorted(settings), "{}", text);
        }
    }
}
