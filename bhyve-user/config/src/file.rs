//! The file: TOML, every key known, every value of its key's kind.

use crate::ConfigError;
use crate::device::{OptionValue, to_conf};
use crate::keys::{KEYS, Kind, find, nearest};
use crate::settings::{Device, Origin, Setting, Settings, Value, parse_place};
use std::ops::Range;
use std::path::Path;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// The largest file that is read, bytes.
const LARGEST: u64 = 1 << 20;

/// Reads a file.
///
/// # Errors
/// It cannot be read, or something in it is wrong.
pub fn read(path: &Path) -> Result<Settings, ConfigError> {
    parse(&path.display().to_string(), &text_of(path)?)
}

/// The text of a configuration file.
pub(crate) fn text_of(path: &Path) -> Result<String, ConfigError> {
    use std::io::Read;
    let fail = |what: String| ConfigError {
        at: Origin {
            file: path.display().to_string(),
            place: (0, 0),
        },
        what,
    };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(|e| fail(e.to_string()))?;
    file.take(LARGEST + 1)
        .read_to_string(&mut text)
        .map_err(|e| fail(e.to_string()))?;
    if text.len() as u64 > LARGEST {
        return Err(fail("is larger than any configuration file".into()));
    }
    Ok(text)
}

struct Source<'a> {
    name: &'a str,
    text: &'a str,
}

impl Source<'_> {
    fn at(&self, span: &Range<usize>) -> Origin {
        let before = self.text.get(..span.start).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        let start = before.rfind('\n').map_or(0, |n| n + 1);
        let column = before.get(start..).map_or(0, |l| l.chars().count()) + 1;
        Origin {
            file: self.name.into(),
            place: (line, column),
        }
    }

    fn fail<T>(&self, span: &Range<usize>, what: impl Into<String>) -> Result<T, ConfigError> {
        Err(ConfigError {
            at: self.at(span),
            what: what.into(),
        })
    }
}

/// Parses a file's text; `name` is the file's, for errors.
///
/// # Errors
/// No TOML, an unknown key (with what was probably meant), or a value of the
/// wrong kind.
pub fn parse(name: &str, text: &str) -> Result<Settings, ConfigError> {
    let source = Source { name, text };
    let table = DeTable::parse(text).map_err(|e| ConfigError {
        at: source.at(&e.span().unwrap_or(0..0)),
        what: e.message().replace('\n', ", "),
    })?;
    let mut settings = Settings::default();
    walk(&source, "", table.get_ref(), &mut settings)?;
    Ok(settings)
}

fn walk(
    source: &Source<'_>,
    prefix: &str,
    table: &DeTable<'_>,
    settings: &mut Settings,
) -> Result<(), ConfigError> {
    for (key, value) in table {
        let name = key.get_ref().as_ref();
        let path = match prefix {
            "" => name.to_owned(),
            _ => format!("{prefix}.{name}"),
        };
        if path == "device" {
            devices(source, value, settings)?;
        } else if let Some(key) = find(&path) {
            let value_of = value_of(source, key.kind, &path, value)?;
            settings.set(Setting {
                key,
                value: value_of,
                at: source.at(&value.span()),
            });
        } else if let Some(inner) = value.get_ref().as_table()
            && KEYS.iter().any(|k| k.path.starts_with(&format!("{path}.")))
        {
            walk(source, &path, inner, settings)?;
        } else {
            return source.fail(&key.span(), unknown(&path));
        }
    }
    Ok(())
}

fn unknown(path: &str) -> String {
    let sections = KEYS.iter().filter_map(|k| k.path.split_once('.'));
    let all = KEYS
        .iter()
        .map(|k| k.path)
        .chain(sections.map(|(s, _)| s))
        .chain(["device"]);
    let last = |p: &str| p.rsplit('.').next().map(str::to_owned);
    // A key in the wrong section, or a slip of the pen.
    let elsewhere = KEYS.iter().map(|k| k.path);
    let meant = elsewhere
        .filter(|k| last(k) == last(path))
        .min_by_key(|k| strsim::damerau_levenshtein(k, path))
        .or_else(|| nearest(path, all));
    let hint = meant.map_or(String::new(), |key| format!("; did you mean {key}?"));
    format!("there is no key \"{path}\"{hint}")
}

/// A string, or a number as one.
fn text(value: &DeValue<'_>, numbers: bool) -> Option<String> {
    match value {
        DeValue::String(s) => Some(s.as_ref().to_owned()),
        DeValue::Integer(n) if numbers && n.radix() == 10 => Some(n.as_str().to_owned()),
        DeValue::Integer(n) if numbers => i64::from_str_radix(n.as_str(), n.radix())
            .ok()
            .map(|n| n.to_string()),
        _ => None,
    }
}

fn value_of(
    source: &Source<'_>,
    kind: Kind,
    path: &str,
    value: &Spanned<DeValue<'_>>,
) -> Result<Value, ConfigError> {
    let inner = value.get_ref();
    let wrong = |wanted: &str| {
        let is = inner.type_str();
        source.fail(
            &value.span(),
            format!("{path} is {wanted}, not of type {is}"),
        )
    };
    match kind {
        Kind::Text | Kind::Number => match text(inner, kind == Kind::Number) {
            Some(t) => Ok(Value::Text(t)),
            None => wrong(if kind == Kind::Text {
                "a string"
            } else {
                "a number or a string"
            }),
        },
        Kind::Bool => inner
            .as_bool()
            .map_or_else(|| wrong("true or false"), |b| Ok(Value::Bool(b))),
        Kind::List => {
            if let Some(one) = text(inner, false) {
                return Ok(Value::List(vec![one]));
            }
            let Some(array) = inner.as_array() else {
                return wrong("a string or an array of strings");
            };
            let all: Option<Vec<String>> = array.iter().map(|v| text(v.get_ref(), false)).collect();
            all.map_or_else(|| wrong("an array of strings"), |l| Ok(Value::List(l)))
        }
        Kind::Table => {
            let Some(table) = inner.as_table() else {
                return wrong("a table of strings");
            };
            let mut pairs = Vec::new();
            flatten(source, "", table, &mut pairs)?;
            Ok(Value::Table(pairs))
        }
    }
}

/// Entries of a table of strings. Dotted names are one name here: `hw.model`
/// unquoted is a table in TOML.
fn flatten(
    source: &Source<'_>,
    prefix: &str,
    table: &DeTable<'_>,
    pairs: &mut Vec<(String, String)>,
) -> Result<(), ConfigError> {
    for (key, value) in table {
        let name = format!("{prefix}{}", key.get_ref());
        let inner = value.get_ref();
        if let Some(t) = text(inner, true) {
            pairs.push((name, t));
        } else if let Some(table) = inner.as_table() {
            flatten(source, &format!("{name}."), table, pairs)?;
        } else {
            let is = inner.type_str();
            return source.fail(
                &value.span(),
                format!("{name} is a string, not of type {is}"),
            );
        }
    }
    Ok(())
}

fn devices(
    source: &Source<'_>,
    value: &Spanned<DeValue<'_>>,
    settings: &mut Settings,
) -> Result<(), ConfigError> {
    let what = "devices are tables: [[device]], then slot and emulation";
    let Some(array) = value.get_ref().as_array() else {
        return source.fail(&value.span(), what);
    };
    for element in array {
        let Some(table) = element.get_ref().as_table() else {
            return source.fail(&element.span(), what);
        };
        let new = device(source, &element.span(), table)?;
        if let Some(d) = settings.devices.iter().find(|d| d.place == new.place) {
            let (bus, slot, func) = new.place;
            let line = d.at.place.0;
            return source.fail(
                &element.span(),
                format!(
                    "slot {bus}:{slot}:{func} is already occupied, by the {} of line {line}",
                    d.emulation
                ),
            );
        }
        settings.devices.push(new);
    }
    Ok(())
}

fn device(
    source: &Source<'_>,
    span: &Range<usize>,
    table: &DeTable<'_>,
) -> Result<Device, ConfigError> {
    let (mut place, mut emulation) = (None, None);
    let mut options = Vec::new();
    for (key, value) in table {
        let (span, inner) = (value.span(), value.get_ref());
        match key.get_ref().as_ref() {
            "slot" => {
                place = text(inner, true).and_then(|t| parse_place(&t));
                if place.is_none() {
                    return source.fail(
                        &span,
                        "a slot is 0 to 31, \"slot:function\" or \"bus:slot:function\", functions from 0 to 7",
                    );
                }
            }
            "emulation" => match inner.as_str() {
                Some(name) if !name.is_empty() && !name.contains(',') => {
                    emulation = Some(name.to_owned());
                }
                _ => return source.fail(&span, "an emulation's name is a string"),
            },
            name => {
                let value = match inner {
                    DeValue::Boolean(b) => Some(OptionValue::Bool(*b)),
                    DeValue::Array(a) => a
                        .iter()
                        .map(|v| text(v.get_ref(), true))
                        .collect::<Option<_>>()
                        .map(OptionValue::Text),
                    other => text(other, true).map(|t| OptionValue::Text(vec![t])),
                };
                let Some(value) = value else {
                    return source.fail(
                        &span,
                        format!("a device's {name} is a string, a number, true, false, or an array of strings"),
                    );
                };
                options.push((name.to_owned(), value));
            }
        }
    }
    let at = source.at(span);
    let fail = |what: String| ConfigError {
        at: at.clone(),
        what,
    };
    let place = place.ok_or_else(|| fail("this device has no slot".into()))?;
    let Some(emulation) = emulation else {
        let hint = match nearest("emulation", options.iter().map(|(n, _)| n.as_str())) {
            Some(name) => format!("; is \"{name}\" meant for it?"),
            None => String::new(),
        };
        return Err(fail(format!("this device has no emulation{hint}")));
    };
    let conf = to_conf(&emulation, &options).map_err(|e| fail(format!("{emulation}: {e}")))?;
    Ok(Device {
        place,
        emulation,
        conf,
        at,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Argument, Program};

    fn error(text: &str) -> String {
        parse("vm.toml", text).unwrap_err().to_string()
    }

    const WEB: &str = r#"
name = "web"
[cpu]
count = 4
cores = 2
sockets = 2
pin = ["0:2", "1:3"]
[memory]
size = "1G"
wired = true
[machine]
acpi = true
mptable = false
[serial]
com1 = "stdio"
[[device]]
slot = 0
emulation = "hostbridge"
[[device]]
slot = "3:1"
emulation = "virtio-blk"
path = "/disks/a.img"
ro = true
[boot]
kernel = "/k"
modules = "m.ko"
environment = { "a.b" = "1", hw.model = "x y" }
"#;

    #[test]
    fn a_file_is_a_command_line_for_both() {
        let settings = parse("vm.toml", WEB).unwrap();
        let line = |p| {
            let all = settings.arguments(p);
            all.iter()
                .flat_map(Argument::words)
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(
            line(Program::Bhyve),
            "-c cpus=4,sockets=2,cores=2 -p 0:2 -p 1:3 -m 1G -S -A -Y -l com1,stdio -s 0:0:0,hostbridge \
             -s 0:3:1,virtio-blk,/disks/a.img,ro web"
        );
        assert_eq!(
            line(Program::Bhyveload),
            "-m 1G -S --kernel /k --module m.ko -e a.b=1 -e hw.model=x y web"
        );
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        for (text, message) in [
            (
                "name = \"a\"\n[memory]\n  sise = 3\n",
                "vm.toml:3:3: there is no key \"memory.sise\"; did you mean memory.size?",
            ),
            (
                "memroy.size = 3",
                "vm.toml:1:1: there is no key \"memroy\"; did you mean memory?",
            ),
            (
                "kernel = \"/k\"",
                "vm.toml:1:1: there is no key \"kernel\"; did you mean boot.kernel?",
            ),
            (
                "[machine]\nacpi = \"yes\"",
                "vm.toml:2:8: machine.acpi is true or false, not of type string",
            ),
            (
                "[[device]]\nslot = 32\nemulation = \"lpc\"",
                "vm.toml:2:8: a slot is 0 to 31",
            ),
            (
                "[[device]]\nslot = 1\nemulator = \"lpc\"",
                "vm.toml:1:1: this device has no emulation; is \"emulator\" meant for it?",
            ),
            (
                "[[device]]\nslot=1\nemulation=\"lpc\"\n[[device]]\nslot=\"0:1:0\"\nemulation=\"x\"",
                "vm.toml:4:1: slot 0:1:0 is already occupied, by the lpc of line 1",
            ),
            ("[device]\nslot=1", "vm.toml:1:1: devices are tables"),
            ("memory = 3", "vm.toml:1:1: there is no key \"memory\""),
            (
                "boot.modules = [1]",
                "vm.toml:1:16: boot.modules is an array of strings",
            ),
        ] {
            let e = error(text);
            assert!(e.starts_with(message), "{text}: {e}");
        }
        assert!(error("name = \"a\"\nname = \"b\"").starts_with("vm.toml:2:"));
        assert!(error("name = \n").starts_with("vm.toml:1:"));
    }
}
