//! Variables of bhyve_config(5): `-k FILE` and `-o NAME=VALUE` of newer bhyves.
//! Keys of the TOML file are understood in their place, too.

use crate::ConfigError;
use crate::device::{OptionValue, Options, to_conf};
use crate::file::text_of;
use crate::keys::{KEYS, Kind, by_variable, find, nearest};
use crate::settings::{Device, Origin, Setting, Settings, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// A device's variables, without the part that names the device.
type Node = Vec<(String, String)>;

/// Variables in the order in which they were set.
#[derive(Clone, Debug, Default)]
pub struct Variables {
    all: Vec<(String, String, Origin)>,
}

fn error(at: &Origin, what: impl Into<String>) -> ConfigError {
    ConfigError {
        at: at.clone(),
        what: what.into(),
    }
}

impl Variables {
    /// Sets one, given as `NAME=VALUE`.
    ///
    /// # Errors
    /// There is no `=`.
    pub fn set(&mut self, text: &str, at: Origin) -> Result<(), ConfigError> {
        let (name, value) = text
            .split_once('=')
            .filter(|(n, _)| !n.trim().is_empty())
            .ok_or_else(|| error(&at, format!("\"{text}\" is not NAME=VALUE")))?;
        let (name, value) = (name.trim(), value.trim());
        self.all.retain(|(n, _, _)| n != name);
        self.all.push((name.into(), value.into(), at));
        Ok(())
    }

    /// Reads a file with one `NAME=VALUE` a line; `#` starts a comment.
    ///
    /// # Errors
    /// It cannot be read, or a line is neither.
    pub fn read(&mut self, path: &Path) -> Result<(), ConfigError> {
        self.parse(&path.display().to_string(), &text_of(path)?)
    }

    /// Reads a file's text; `file` is its name, for errors.
    ///
    /// # Errors
    /// A line is no `NAME=VALUE`.
    pub fn parse(&mut self, file: &str, text: &str) -> Result<(), ConfigError> {
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if !line.is_empty() && !line.starts_with('#') {
                let at = Origin {
                    file: file.into(),
                    place: (number + 1, 0),
                };
                self.set(line, at)?;
            }
        }
        Ok(())
    }

    /// A value with `%(name)` replaced, `%%` being one `%`.
    fn expand(&self, value: &str, at: &Origin, depth: u32) -> Result<String, ConfigError> {
        if depth > 8 {
            return Err(error(at, format!("\"{value}\" refers to itself")));
        }
        let mut out = String::new();
        let mut rest = value;
        while let Some((before, after)) = rest.split_once('%') {
            out.push_str(before);
            if let Some(tail) = after.strip_prefix('%') {
                out.push('%');
                rest = tail;
            } else if let Some((name, tail)) =
                after.strip_prefix('(').and_then(|r| r.split_once(')'))
            {
                let found = self.all.iter().find(|(n, _, _)| n == name);
                let (_, value, _) = found
                    .ok_or_else(|| error(at, format!("%({name}): no such variable is set")))?;
                out.push_str(&self.expand(value, at, depth + 1)?);
                if out.len() > 1 << 16 {
                    return Err(error(at, format!("\"{value}\" becomes too long")));
                }
                rest = tail;
            } else {
                out.push('%');
                rest = after;
            }
        }
        out.push_str(rest);
        Ok(out)
    }

    /// What they say. The second value holds warnings: names that mean nothing
    /// here, which stock bhyve takes without a word.
    ///
    /// # Errors
    /// A value that cannot be, or a reference to nothing.
    pub fn settings(&self) -> Result<(Settings, Vec<String>), ConfigError> {
        let mut settings = Settings::default();
        let mut warnings = Vec::new();
        let mut nodes: BTreeMap<(u8, u8, u8), (Origin, Node)> = BTreeMap::new();
        for (name, value, at) in &self.all {
            let value = self.expand(value, at, 0)?;
            if let Some((place, rest)) = pci_node(name) {
                let node = nodes
                    .entry(place)
                    .or_insert_with(|| (at.clone(), Vec::new()));
                node.1.push((rest.to_owned(), value));
            } else if let Some((key, opposite)) =
                find(name).map(|k| (k, false)).or_else(|| by_variable(name))
            {
                let value = match key.kind {
                    Kind::Text | Kind::Number => Value::Text(value),
                    Kind::Bool => Value::Bool(
                        yes(&value).ok_or_else(|| {
                            error(at, format!("{name}={value}: true or false is wanted"))
                        })? != opposite,
                    ),
                    Kind::List => Value::List(value.split_whitespace().map(Into::into).collect()),
                    Kind::Table => {
                        return Err(error(at, format!("{name}: give {name}.NAME=VALUE")));
                    }
                };
                settings.set(Setting {
                    key,
                    value,
                    at: at.clone(),
                });
            } else if let Some(variable) = name.strip_prefix("boot.environment.")
                && let Some(key) = find("boot.environment")
            {
                settings.set(Setting {
                    key,
                    value: Value::Table(vec![(variable.into(), value)]),
                    at: at.clone(),
                });
            } else if name.starts_with("gdb.") {
                return Err(error(at, format!("{name}: there is no debug server")));
            } else if !self.is_referred_to(name) {
                let known = KEYS.iter().flat_map(|k| [k.path, k.variable]);
                let hint = nearest(name, known.filter(|k| !k.is_empty()))
                    .map_or(String::new(), |k| format!("; did you mean {k}?"));
                warnings.push(format!("{at}: {name} means nothing to this bhyve{hint}"));
            }
        }
        for (place, (at, node)) in nodes {
            settings.set_device(device(place, &at, node)?);
        }
        Ok((settings, warnings))
    }

    /// Whether `config.dump` asks for the configuration to be printed, which is
    /// then forgotten.
    pub fn take_dump(&mut self) -> bool {
        let before = self.all.len();
        let dump = |n: &str, v: &str| n == "config.dump" && yes(v) == Some(true);
        self.all.retain(|(n, v, _)| !dump(n, v));
        self.all.len() != before
    }

    fn is_referred_to(&self, name: &str) -> bool {
        let reference = format!("%({name})");
        self.all.iter().any(|(_, v, _)| v.contains(&reference))
    }
}

fn yes(value: &str) -> Option<bool> {
    match value.to_ascii_lowercase().as_str() {
        "true" | "on" | "yes" | "1" => Some(true),
        "false" | "off" | "no" | "0" => Some(false),
        _ => None,
    }
}

/// `pci.BUS.SLOT.FUNCTION.REST`.
fn pci_node(name: &str) -> Option<((u8, u8, u8), &str)> {
    let mut words = name.strip_prefix("pci.")?.splitn(4, '.');
    let mut number = || words.next()?.parse().ok();
    let place = (number()?, number()?, number()?);
    (place.1 <= 31 && place.2 <= 7).then_some(())?;
    Some((place, words.next()?))
}

/// A device's node: `device` and its settings. Those of ports become what `-s` has
/// for them.
fn device(place: (u8, u8, u8), at: &Origin, node: Node) -> Result<Device, ConfigError> {
    let mut emulation = None;
    let mut options: Options = Vec::new();
    let mut ports: BTreeMap<u32, BTreeMap<String, String>> = BTreeMap::new();
    for (name, value) in node {
        if name == "device" {
            emulation = Some(value);
        } else if let Some((n, rest)) = name.strip_prefix("port.").and_then(|r| r.split_once('.'))
            && let Ok(n) = n.parse()
        {
            ports.entry(n).or_default().insert(rest.into(), value);
        } else {
            let flag = yes(&value).filter(|_| value.parse::<i64>().is_err());
            options.push((
                name,
                flag.map_or(OptionValue::Text(vec![value]), OptionValue::Bool),
            ));
        }
    }
    let (bus, slot, func) = place;
    let mut emulation =
        emulation.ok_or_else(|| error(at, format!("pci.{bus}.{slot}.{func} has no device")))?;
    let get = |port: &BTreeMap<String, String>, name: &str| {
        port.get(name)
            .cloned()
            .ok_or_else(|| error(at, format!("pci.{bus}.{slot}.{func}: a port has no {name}")))
    };
    match (emulation.as_str(), ports.len()) {
        (_, 0) => {}
        ("ahci", 1) => {
            for port in ports.values() {
                emulation = format!("ahci-{}", get(port, "type")?);
                for (name, value) in port.iter().filter(|(n, _)| *n != "type") {
                    let flag = yes(value).filter(|_| value.parse::<i64>().is_err());
                    options.push((
                        name.clone(),
                        flag.map_or(OptionValue::Text(vec![value.clone()]), OptionValue::Bool),
                    ));
                }
            }
        }
        ("ahci", _) => {
            let mut all = Vec::new();
            for port in ports.values() {
                if port.len() > 2 {
                    return Err(error(
                        at,
                        format!(
                            "pci.{bus}.{slot}.{func}: of several ahci ports only type and path are understood"
                        ),
                    ));
                }
                all.push(format!("{}:{}", get(port, "type")?, get(port, "path")?));
            }
            options.push(("path".into(), OptionValue::Text(all)));
        }
        _ => {
            for port in ports.values() {
                let path = vec![get(port, "path")?];
                options.push((get(port, "name")?, OptionValue::Text(path)));
            }
        }
    }
    // -s would read what is behind a comma as options.
    if emulation.is_empty() || emulation.contains(',') {
        let what = format!("pci.{bus}.{slot}.{func}: {emulation:?} is no device's name");
        return Err(error(at, what));
    }
    let conf = to_conf(&emulation, &options).map_err(|e| error(at, format!("{emulation}: {e}")))?;
    Ok(Device {
        place,
        emulation,
        conf,
        at: at.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Argument, Program};

    fn line(text: &str) -> Result<(String, Vec<String>), String> {
        let mut variables = Variables::default();
        variables
            .parse("vm.conf", text)
            .map_err(|e| e.to_string())?;
        let (settings, warnings) = variables.settings().map_err(|e| e.to_string())?;
        let all = settings.arguments(Program::Bhyve);
        let words: Vec<String> = all.iter().flat_map(Argument::words).collect();
        Ok((words.join(" "), warnings))
    }

    #[test]
    fn a_device_has_a_name_that_a_slot_can_have() {
        let of = |text: &str| line(&format!("name=vm\n{text}\n")).unwrap_err();
        for (text, name) in [
            ("pci.0.3.0.device=", r#""""#),
            ("pci.0.3.0.device=lpc,x", r#""lpc,x""#),
            (
                "pci.0.3.0.device=ahci\npci.0.3.0.port.0.type=hd,nocache",
                r#""ahci-hd,nocache""#,
            ),
        ] {
            let said = of(text);
            assert!(said.starts_with("vm.conf:2"), "{said}");
            assert!(
                said.contains(&format!("pci.0.3.0: {name} is no device's name")),
                "{said}"
            );
        }
    }

    #[test]
    fn a_file_of_newer_bhyves_is_understood() {
        let (line, warnings) = line(
            "# a VM\nname=web\ncpus=2\nmemory.size=512M\nacpi_tables=on\nx86.mptable=false\n\
             rtc.use_localtime=no\nvirtio_msix=true\nlpc.com1.path=stdio\nbios.vendor=me\n\
             dir=/disks/%(name)\npci.0.31.0.device=lpc\npci.0.3.0.device=virtio-blk\n\
             pci.0.3.0.path=%(dir)/100%%.img\npci.0.3.0.ro=true\npci.0.4.0.device=ahci\n\
             pci.0.4.0.port.0.type=cd\npci.0.4.0.port.0.path=/x.iso\npci.0.5.0.device=virtio-console\n\
             pci.0.5.0.port.0.name=org.a\npci.0.5.0.port.0.path=/run/a.sock\npci.0.6.0.device=virtio-net\n\
             pci.0.6.0.backend=tap0\npci.0.6.0.mtu=9000\n",
        )
        .unwrap();
        assert_eq!(
            line,
            "-c cpus=2 -m 512M -A -Y -u -l com1,stdio -s 0:3:0,virtio-blk,/disks/web/100%.img,ro \
             -s 0:4:0,ahci-cd,/x.iso -s 0:5:0,virtio-console,org.a=/run/a.sock \
             -s 0:6:0,virtio-net,tap0,mtu=9000 -s 0:31:0,lpc web"
        );
        assert_eq!(
            warnings,
            ["vm.conf:10: bios.vendor means nothing to this bhyve"]
        );
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, message) in [
            ("\nmemory", "vm.conf:2: \"memory\" is not NAME=VALUE"),
            ("acpi_tables=maybe", "vm.conf:1: acpi_tables=maybe"),
            ("name=%(x)", "vm.conf:1: %(x): no such variable"),
            ("a=%(b)\nb=%(a)\nname=%(a)", "refers to itself"),
            ("gdb.port=1", "no debug server"),
            ("pci.0.1.0.path=/x", "pci.0.1.0 has no device"),
        ] {
            let e = line(text).unwrap_err();
            assert!(e.contains(message), "{text}: {e}");
        }
    }

    #[test]
    fn a_name_that_is_nearly_one_is_doubted() {
        let (_, warnings) = line("memory.sise=1G").unwrap();
        assert_eq!(
            warnings,
            ["vm.conf:1: memory.sise means nothing to this bhyve; did you mean memory.size?"]
        );
    }

    #[test]
    fn keys_of_the_toml_file_do_as_well() {
        let (line, _) = line("machine.acpi=true\nmemory.in_core=1\nboot.environment.a=b").unwrap();
        assert_eq!(line, "-C -A");
    }
}
