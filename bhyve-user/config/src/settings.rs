//! What files and variables have said, before a program makes sense of it.

use crate::keys::{KEYS, Key, Opt};
use std::fmt;

/// Where something was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// The file, or the option.
    pub file: String,
    /// Line and column, from 1; column 0 where only the line is known, line 0
    /// where neither makes sense.
    pub place: (usize, usize),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.place {
            (0, _) => write!(f, "{}", self.file),
            (line, 0) => write!(f, "{}:{line}", self.file),
            (line, column) => write!(f, "{}:{line}:{column}", self.file),
        }
    }
}

/// A value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// A string or a number.
    Text(String),
    /// Yes or no.
    Bool(bool),
    /// Several strings.
    List(Vec<String>),
    /// Names with a string each.
    Table(Vec<(String, String)>),
}

/// A key and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Which.
    pub key: &'static Key,
    /// Its value, of the key's kind.
    pub value: Value,
    /// Where it is written.
    pub at: Origin,
}

/// A PCI device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Bus, slot and function.
    pub place: (u8, u8, u8),
    /// What it is.
    pub emulation: String,
    /// Its options, as `-s` has them behind the emulation's name.
    pub conf: String,
    /// Where it is written.
    pub at: Origin,
}

/// All that was said, each key once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// By key.
    pub values: Vec<Setting>,
    /// By place.
    pub devices: Vec<Device>,
}

/// Whose command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// bhyve(8).
    Bhyve,
    /// bhyveload(8).
    Bhyveload,
}

/// A piece of a command line: an option with its value, or the operand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Argument {
    /// Which key it is from; empty for a device.
    pub key: &'static str,
    /// The option; empty for the operand.
    pub option: &'static str,
    /// The option's value, or the operand.
    pub value: Option<String>,
    /// Where it is written.
    pub at: Origin,
}

impl Argument {
    /// As words of a command line.
    pub fn words(&self) -> impl Iterator<Item = String> + '_ {
        let option = (!self.option.is_empty()).then(|| self.option.to_owned());
        option.into_iter().chain(self.value.clone())
    }
}

impl Settings {
    /// The value of a key.
    pub fn get(&self, path: &str) -> Option<&Value> {
        self.values
            .iter()
            .find(|s| s.key.path == path)
            .map(|s| &s.value)
    }

    /// A string's value.
    pub fn text(&self, path: &str) -> Option<&str> {
        match self.get(path) {
            Some(Value::Text(t)) => Some(t),
            _ => None,
        }
    }

    /// Sets a key; what it was is forgotten. Entries of a table are merged.
    pub fn set(&mut self, new: Setting) {
        match self.values.iter_mut().find(|s| s.key == new.key) {
            None => self.values.push(new),
            Some(old) => match (&mut old.value, new.value) {
                (Value::Table(old), Value::Table(new)) => {
                    for (name, value) in new {
                        old.retain(|(n, _)| *n != name);
                        old.push((name, value));
                    }
                }
                (_, value) => {
                    old.value = value;
                    old.at = new.at;
                }
            },
        }
    }

    /// Puts a device in; the one at its place goes.
    pub fn set_device(&mut self, new: Device) {
        self.devices.retain(|d| d.place != new.place);
        self.devices.push(new);
    }

    /// Takes over what `later` says.
    pub fn merge(&mut self, later: Settings) {
        for setting in later.values {
            self.set(setting);
        }
        for device in later.devices {
            self.set_device(device);
        }
    }

    /// What a program is told by these settings: its options in the order of
    /// [`KEYS`], devices, the operand last. The parts of `-c` are one option.
    pub fn arguments(&self, program: Program) -> Vec<Argument> {
        let mut all = Vec::new();
        let mut operand = None;
        for key in KEYS {
            let Some(s) = self.values.iter().find(|s| s.key == key) else {
                continue;
            };
            let option = match program {
                Program::Bhyve => key.bhyve,
                Program::Bhyveload => key.bhyveload,
            };
            let mut put = |option, value| {
                all.push(Argument {
                    key: key.path,
                    option,
                    value,
                    at: s.at.clone(),
                });
            };
            match (option, &s.value) {
                (Opt::Operand, Value::Text(t)) => {
                    operand = Some(Argument {
                        key: key.path,
                        option: "",
                        value: Some(t.clone()),
                        at: s.at.clone(),
                    });
                }
                (Opt::Value(o), Value::Text(t)) => put(o, Some(t.clone())),
                (Opt::Value(o), Value::List(list)) => {
                    for t in list {
                        put(o, Some(t.clone()));
                    }
                }
                (Opt::Prefixed(o, prefix), Value::Text(t)) => put(o, Some(format!("{prefix}{t}"))),
                (Opt::Prefixed(o, prefix), Value::Bool(true)) => put(o, Some(prefix.to_owned())),
                (Opt::Flag(yes, no), Value::Bool(b)) => {
                    let o = if *b { yes } else { no };
                    if !o.is_empty() {
                        put(o, None);
                    }
                }
                (Opt::Pairs(o), Value::Table(pairs)) => {
                    for (name, value) in pairs {
                        put(o, Some(format!("{name}={value}")));
                    }
                }
                _ => {}
            }
        }
        join_topology(&mut all);
        if program == Program::Bhyve {
            for d in &self.devices {
                let (bus, slot, func) = d.place;
                let conf = if d.conf.is_empty() { "" } else { "," };
                all.push(Argument {
                    key: "",
                    option: "-s",
                    value: Some(format!(
                        "{bus}:{slot}:{func},{}{conf}{}",
                        d.emulation, d.conf
                    )),
                    at: d.at.clone(),
                });
            }
        }
        all.extend(operand);
        all
    }
}

/// `-c` sets the whole topology each time: its parts go together.
fn join_topology(all: &mut Vec<Argument>) {
    let is_part = |a: &Argument| a.option == "-c" && a.key.starts_with("cpu.");
    let Some(first) = all.iter().position(is_part) else {
        return;
    };
    let parts: Vec<String> = all
        .iter()
        .filter(|a| is_part(a))
        .filter_map(|a| a.value.clone())
        .collect();
    let mut seen = 0;
    all.retain(|a| {
        seen += usize::from(is_part(a));
        !is_part(a) || seen == 1
    });
    if let Some(a) = all.get_mut(first) {
        a.value = Some(parts.join(","));
    }
}

/// A place as `-s` has it: `slot`, `slot:function` or `bus:slot:function`.
pub fn parse_place(text: &str) -> Option<(u8, u8, u8)> {
    let numbers: Option<Vec<u8>> = text.split(':').map(|n| n.parse().ok()).collect();
    match *numbers?.as_slice() {
        [slot] => Some((0, slot, 0)),
        [slot, func] => Some((0, slot, func)),
        [bus, slot, func] => Some((bus, slot, func)),
        _ => None,
    }
    .filter(|(_, slot, func)| *slot <= 31 && *func <= 7)
}
