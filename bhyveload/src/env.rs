//! The kernel environment: what `kenv(1)` shows in the guest.

use crate::error::LoadError;
use std::collections::BTreeMap;

/// The longest `name=value` a FreeBSD kernel keeps (KENV_MNAMELEN and
/// KENV_MVALLEN, 128 bytes each, of sys/kenv.h).
pub const LONGEST: usize = 128 + 1 + 128;

/// Names and values, in order of name so that the same input gives the same bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Environment {
    values: BTreeMap<String, String>,
}

/// The boot flags of sys/reboot.h by the variable that sets them (sys/boot.h).
const HOWTO: [(&str, u32); 11] = [
    ("boot_askname", 0x1),
    ("boot_single", 0x2),
    ("boot_dfltroot", 0x20),
    ("boot_ddb", 0x40),
    ("boot_verbose", 0x800),
    ("boot_serial", RB_SERIAL),
    ("boot_cdrom", 0x2000),
    ("boot_gdb", 0x8000),
    ("boot_mute", RB_MUTE),
    ("boot_pause", 0x10_0000),
    ("boot_multicons", RB_MULTIPLE),
];

const RB_SERIAL: u32 = 0x1000;
const RB_MUTE: u32 = 0x1_0000;
const RB_MULTIPLE: u32 = 0x2000_0000;

impl Environment {
    /// Sets a variable, over an earlier value.
    pub fn set(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.values.insert(name.into(), value.into());
    }

    /// Sets a variable that has no value yet.
    pub fn set_default(&mut self, name: &str, value: &str) {
        self.values
            .entry(name.to_owned())
            .or_insert_with(|| value.to_owned());
    }

    /// Takes a variable away.
    pub fn remove(&mut self, name: &str) {
        self.values.remove(name);
    }

    /// A variable's value.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.values.iter().map(|(n, v)| (n.as_str(), v.as_str()))
    }

    /// Sets a variable from `name=value`, as `-e` gives it.
    ///
    /// # Errors
    /// There is no name or no `=`, a NUL inside, or it is longer than the kernel keeps.
    pub fn set_from_argument(&mut self, argument: &str) -> Result<(), LoadError> {
        let bad = |problem: &str| LoadError::new("-e", argument, problem);
        let Some((name, value)) = argument.split_once('=') else {
            return Err(bad("is not name=value"));
        };
        if name.is_empty() || name.contains(char::is_whitespace) {
            return Err(bad("has no usable name before the ="));
        }
        check_length(name, value).map_err(|problem| bad(&problem))?;
        self.set(name, value.trim_matches('"'));
        Ok(())
    }

    /// The boot flags (MODINFOMD_HOWTO) that the `boot_*` and `console` variables ask for.
    #[must_use]
    pub fn howto(&self) -> u32 {
        let mut howto = 0;
        for (name, flag) in HOWTO {
            if self
                .get(name)
                .is_some_and(|value| !value.eq_ignore_ascii_case("no"))
            {
                howto |= flag;
            }
        }
        let consoles = self.get("console").unwrap_or_default();
        let mut video = false;
        for console in consoles.split([' ', ',']) {
            match console {
                "vidconsole" => video = true,
                "comconsole" => howto |= RB_SERIAL,
                "nullconsole" => howto |= RB_MUTE,
                _ => {}
            }
        }
        if video && howto & RB_SERIAL != 0 {
            howto |= RB_MULTIPLE;
        }
        if consoles == "vidconsole" {
            howto &= !RB_SERIAL;
        }
        howto
    }

    /// The environment as the kernel reads it: `name=value` strings, each ended
    /// by a NUL, and one more NUL.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (name, value) in &self.values {
            bytes.extend_from_slice(name.as_bytes());
            bytes.push(b'=');
            bytes.extend_from_slice(value.as_bytes());
            bytes.push(0);
        }
        bytes.push(0);
        bytes
    }
}

/// Whether a FreeBSD kernel would keep this variable; the reason if not.
///
/// # Errors
/// It is too long, or holds a NUL.
pub fn check_length(name: &str, value: &str) -> Result<(), String> {
    if name.contains('\0') || value.contains('\0') {
        return Err("holds a NUL byte".to_owned());
    }
    let length = name.len() + 1 + value.len();
    if length > LONGEST {
        return Err(format!(
            "is {length} bytes long, and a FreeBSD kernel ignores what is longer than {LONGEST}"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_value_wins_and_a_default_never_does() {
        let mut env = Environment::default();
        env.set_default("a", "1");
        env.set_from_argument("a=2").unwrap();
        env.set_default("a", "3");
        env.set_from_argument("b=x=y").unwrap();
        assert_eq!(env.encode(), b"a=2\0b=x=y\0\0");
    }

    #[test]
    fn an_argument_without_name_or_too_long_is_refused() {
        let mut env = Environment::default();
        for bad in ["novalue", "=x", "a b=c", "a=\0"] {
            let error = env.set_from_argument(bad).unwrap_err();
            assert_eq!(error.file, "-e", "{bad}");
        }
        let error = env
            .set_from_argument(&format!("a={}", "x".repeat(300)))
            .unwrap_err();
        assert!(error.problem.contains("302 bytes"), "{error}");
        assert_eq!(env, Environment::default());
    }

    #[test]
    fn howto_follows_the_boot_variables_and_the_console() {
        let howto = |pairs: &[(&str, &str)]| {
            let mut env = Environment::default();
            for (n, v) in pairs {
                env.set(*n, *v);
            }
            env.howto()
        };
        assert_eq!(howto(&[]), 0);
        assert_eq!(howto(&[("boot_serial", "1")]), 0x1000);
        assert_eq!(howto(&[("boot_serial", "NO"), ("boot_single", "YES")]), 2);
        assert_eq!(howto(&[("boot_verbose", ""), ("boot_ddb", "1")]), 0x840);
        assert_eq!(howto(&[("console", "comconsole,vidconsole")]), 0x2000_1000);
        assert_eq!(
            howto(&[("console", "vidconsole"), ("boot_serial", "1")]),
            0x2000_0000
        );
        assert_eq!(howto(&[("console", "nullconsole")]), 0x1_0000);
    }
}
