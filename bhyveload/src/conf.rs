//! `loader.conf` and what it says to load from a host folder (loader.conf(5)).

use crate::env::{Environment, check_length};
use crate::error::LoadError;
use crate::freebsd::{FreeBsd, Module};
use crate::hostdir::HostDir;
use crate::input::Input;
use std::collections::BTreeMap;

/// Largest configuration file that is read.
const LARGEST_CONF: u64 = 1 << 20;

/// Reads `name="value"` lines; `#` starts a comment.
///
/// # Errors
/// A line is neither empty, a comment nor an assignment; the error names it.
pub fn parse(file: &str, text: &str) -> Result<Vec<(String, String)>, LoadError> {
    let mut settings = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let bad = |problem: &str| LoadError::new(file, format!("line {}", number + 1), problem);
        let (name, rest) = line
            .split_once('=')
            .ok_or_else(|| bad("is not name=\"value\""))?;
        let name = name.trim_end();
        let good = |c: char| c.is_ascii_alphanumeric() || "_.-%,/+:".contains(c);
        if name.is_empty() || !name.chars().all(good) {
            return Err(bad("has no usable name before the ="));
        }
        let rest = rest.trim_start();
        let (value, after) = if let Some(quoted) = rest.strip_prefix('"') {
            unquote(quoted).ok_or_else(|| bad("has no closing quote"))?
        } else {
            let end = rest
                .find(|c: char| c.is_whitespace() || c == '#')
                .unwrap_or(rest.len());
            (rest[..end].to_owned(), &rest[end..])
        };
        let after = after.trim_start();
        if !after.is_empty() && !after.starts_with('#') {
            return Err(bad("has something after the value"));
        }
        settings.push((name.to_owned(), value));
    }
    Ok(settings)
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

#[derive(Debug, Default)]
struct Wanted {
    load: bool,
    name: Option<String>,
    kind: Option<String>,
    flags: Option<String>,
}

#[derive(Debug, Default)]
struct Settings {
    environment: Environment,
    wanted: BTreeMap<String, Wanted>,
    /// Modules in the order in which they were first named.
    order: Vec<String>,
    warnings: Vec<String>,
}

impl Settings {
    fn take(&mut self, file: &str, name: String, value: String) {
        const COMMANDS: [&str; 3] = ["exec", "password", "bootlock_password"];
        const SUFFIXES: [&str; 7] = [
            "_load", "_name", "_type", "_flags", "_before", "_after", "_error",
        ];
        if COMMANDS.contains(&name.as_str()) {
            return;
        }
        let Some((module, suffix)) = SUFFIXES
            .iter()
            .find_map(|s| Some((name.strip_suffix(s)?.to_owned(), *s)))
        else {
            match check_length(&name, &value) {
                Ok(()) => self.environment.set(name, value),
                Err(problem) => self
                    .warnings
                    .push(format!("{file}: {name}: {problem}; left out")),
            }
            return;
        };
        if !self.wanted.contains_key(&module) {
            self.order.push(module.clone());
        }
        let wanted = self.wanted.entry(module).or_default();
        match suffix {
            "_load" => wanted.load = value.eq_ignore_ascii_case("yes"),
            "_name" => wanted.name = Some(value),
            "_type" => wanted.kind = Some(value),
            "_flags" => wanted.flags = Some(value),
            _ => {}
        }
    }

    fn read(&mut self, host: &HostDir, path: &str) -> Result<(), LoadError> {
        let Some(input) = host.read(path, LARGEST_CONF).or_else(|error| {
            // An empty file says nothing, and that is allowed.
            if error.problem == "is empty" {
                Ok(None)
            } else {
                Err(error)
            }
        })?
        else {
            return Ok(());
        };
        let text = String::from_utf8(input.data)
            .map_err(|_| LoadError::new(input.name.as_str(), "file", "is not text (UTF-8)"))?;
        for (name, value) in parse(&input.name, &text)? {
            self.take(&input.name, name, value);
        }
        Ok(())
    }
}

fn find(
    host: &HostDir,
    candidates: &[String],
    limit: u64,
) -> Result<Option<(String, Input)>, LoadError> {
    for path in candidates {
        if let Some(input) = host.read(path, limit)? {
            return Ok(Some((path.clone(), input)));
        }
    }
    Ok(None)
}

/// Where `/` is, by the folder's `etc/fstab`, as the loader looks it up.
fn root_from_fstab(host: &HostDir) -> Result<Option<(String, String)>, LoadError> {
    let Ok(Some(input)) = host.read("etc/fstab", LARGEST_CONF) else {
        return Ok(None);
    };
    let text = String::from_utf8_lossy(&input.data).into_owned();
    Ok(text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (device, place, kind) = (words.next()?, words.next()?, words.next()?);
        let options = words.next().unwrap_or("rw");
        (place == "/" && !device.starts_with('#'))
            .then(|| (format!("{kind}:{device}"), options.to_owned()))
    }))
}

/// Everything a host folder says to boot, and warnings about what it says in vain.
///
/// `limit` is the most bytes that one file may have.
///
/// # Errors
/// A file is damaged, missing though it was asked for, or outside the folder.
pub fn from_host_dir(host: &HostDir, limit: u64) -> Result<(FreeBsd, Vec<String>), LoadError> {
    let mut settings = Settings::default();
    for path in [
        "boot/defaults/loader.conf",
        "boot/device.hints",
        "boot/loader.conf",
        "boot/loader.conf.local",
    ] {
        settings.read(host, path)?;
    }
    let Settings {
        mut environment,
        wanted,
        order,
        mut warnings,
    } = settings;

    let kernel = environment.get("kernel").unwrap_or("kernel").to_owned();
    let boot_file = environment.get("bootfile").unwrap_or("kernel").to_owned();
    let mut candidates = Vec::new();
    for file in boot_file.split([';', ',']).filter(|f| !f.is_empty()) {
        if file.starts_with('/') {
            candidates.push(file.to_owned());
        } else if kernel.starts_with('/') {
            candidates.push(format!("{kernel}/{file}"));
        } else {
            candidates.push(format!("/boot/{kernel}/{file}"));
        }
    }
    candidates.push(if kernel.starts_with('/') {
        kernel.clone()
    } else {
        format!("/boot/{kernel}")
    });
    let mut with_gz = Vec::new();
    for path in &candidates {
        with_gz.extend([path.clone(), format!("{path}.gz")]);
    }
    // A folder in place of the kernel is only the last guess gone wrong.
    let (kernel_name, input) = match find(host, &with_gz[..with_gz.len() - 2], limit)? {
        Some(found) => found,
        None => find(host, &with_gz[with_gz.len() - 2..], limit)
            .ok()
            .flatten()
            .ok_or_else(|| {
                LoadError::new(
                    host.describe(&candidates[0]),
                    "file",
                    "there is no kernel here",
                )
                .hint("name another with kernel= in boot/loader.conf, or use --kernel")
            })?,
    };
    let kernel_name = kernel_name.trim_end_matches(".gz").to_owned();
    let input = input.decompressed(limit)?;
    let folder = kernel_name
        .rsplit_once('/')
        .map_or("/boot/kernel", |(folder, _)| folder)
        .to_owned();

    let mut folders = vec![folder];
    let more = environment.get("module_path").unwrap_or("/boot/modules");
    folders.extend(more.split(';').filter(|f| !f.is_empty()).map(str::to_owned));
    environment.set_default("module_path", &folders.join(";"));

    let mut modules = Vec::new();
    for key in order {
        let Some(module) = wanted.get(&key).filter(|w| w.load) else {
            continue;
        };
        let name = module.name.as_deref().unwrap_or(&key);
        let suffixes: &[&str] = match module.kind {
            Some(_) => &["", ".gz"],
            None => &[".ko", "", ".ko.gz"],
        };
        let paths: Vec<String> = if name.contains('/') {
            suffixes.iter().map(|s| format!("{name}{s}")).collect()
        } else {
            folders
                .iter()
                .flat_map(|f| suffixes.iter().map(move |s| format!("{f}/{name}{s}")))
                .collect()
        };
        match find(host, &paths, limit)? {
            Some((path, input)) => {
                let zipped = module.kind.is_none() || path.ends_with(".gz");
                let input = if zipped {
                    input.decompressed(limit)?
                } else {
                    input
                };
                modules.push(Module {
                    name: path.trim_end_matches(".gz").to_owned(),
                    input,
                    kind: module.kind.clone(),
                    args: module.flags.clone(),
                });
            }
            None => {
                let missing = LoadError::new(
                    host.describe(name),
                    format!("{key}_load"),
                    format!("there is no such file in {}", folders.join(", ")),
                );
                // A guest without its disk or driver is not worth starting; one
                // without a cache of entropy is.
                match module.kind.as_deref() {
                    None | Some("md_image" | "mfs_root") => return Err(missing),
                    Some(_) => warnings.push(missing.to_string()),
                }
            }
        }
    }
    if environment.get("vfs.root.mountfrom").is_none()
        && let Some((device, options)) = root_from_fstab(host)?
    {
        environment.set("vfs.root.mountfrom", device);
        environment.set("vfs.root.mountfrom.options", options);
    }
    let kernel_args = environment
        .get("kernel_options")
        .filter(|o| !o.is_empty())
        .map(str::to_owned);
    let boot = FreeBsd {
        kernel: input,
        kernel_name,
        kernel_args,
        modules,
        environment,
    };
    Ok((boot, warnings))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn lines_are_read_as_the_loader_reads_them() {
        let text =
            "# c\n\na=\"1\"\n b = 2 # c\nc=\"x \\\"y\\\" # z\" # c\nhint.uart.0.at=\"isa\"\nd=\n";
        let pairs: Vec<(String, String)> = parse("f", text).unwrap();
        let pairs: Vec<_> = pairs
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
    }

    #[test]
    fn a_bad_line_is_named() {
        for (text, line) in [
            ("a=\"1\"\nnonsense\n", "line 2"),
            ("a=\"1", "line 1"),
            ("a=\"1\" b", "line 1"),
            ("=1", "line 1"),
            ("\n\na b=1", "line 3"),
            ("a=\"\\", "line 1"),
        ] {
            assert_eq!(parse("f", text).unwrap_err().field, line, "{text:?}");
        }
    }

    fn guest(files: &[(&str, &[u8])]) -> (tempfile::TempDir, HostDir) {
        let top = tempfile::tempdir().unwrap();
        for (path, data) in files {
            let path = top.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, data).unwrap();
        }
        let host = HostDir::open(top.path()).unwrap();
        (top, host)
    }

    #[test]
    fn modules_disks_and_variables_come_from_the_folder() {
        let conf = br#"
            kernel="GENERIC2"
            if_foo_load="YES"
            if_foo_flags="-x 1"
            off_load="NO"
            mfsroot_load="YES"
            mfsroot_type="md_image"
            mfsroot_name="/boot/mfs"
            entropy_cache_load="YES"
            entropy_cache_type="boot_entropy_cache"
            entropy_cache_name="/boot/entropy"
            kern.hz="100"
            exec="rm -rf /"
        "#;
        let (_top, host) = guest(&[
            ("boot/loader.conf", conf),
            ("boot/device.hints", b"hint.uart.0.at=\"isa\"\n"),
            ("boot/GENERIC2/kernel", b"K"),
            ("boot/GENERIC2/if_foo.ko", b"M"),
            ("boot/mfs", b"DISK"),
            ("etc/fstab", b"# x\n/dev/md0 / ufs ro 1 1\n"),
        ]);
        let (boot, warnings) = from_host_dir(&host, 1000).unwrap();
        assert_eq!(boot.kernel_name, "/boot/GENERIC2/kernel");
        assert_eq!(boot.kernel.data, b"K");
        let modules: Vec<_> = boot
            .modules
            .iter()
            .map(|m| (m.name.as_str(), m.kind.as_deref(), m.args.as_deref()))
            .collect();
        assert_eq!(
            modules,
            [
                ("/boot/GENERIC2/if_foo.ko", None, Some("-x 1")),
                ("/boot/mfs", Some("md_image"), None)
            ]
        );
        assert_eq!(boot.environment.get("kern.hz"), Some("100"));
        assert_eq!(boot.environment.get("hint.uart.0.at"), Some("isa"));
        assert_eq!(
            boot.environment.get("vfs.root.mountfrom"),
            Some("ufs:/dev/md0")
        );
        assert_eq!(boot.environment.get("exec"), None);
        assert_eq!(boot.environment.get("if_foo_load"), None);
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(warnings[0].contains("boot/entropy"), "{warnings:?}");
    }

    #[test]
    fn what_is_missing_or_outside_is_named() {
        let (_top, host) = guest(&[("boot/kernel/other", b"x")]);
        let error = from_host_dir(&host, 1000).unwrap_err();
        assert!(error.file.ends_with("/boot/kernel/kernel"), "{error}");

        let (_top, host) = guest(&[
            ("boot/kernel/kernel", b"K"),
            ("boot/loader.conf", b"foo_load=\"YES\"\n"),
        ]);
        let error = from_host_dir(&host, 1000).unwrap_err();
        assert_eq!(error.field, "foo_load");

        let (_top, host) = guest(&[
            ("boot/kernel/kernel", b"K"),
            (
                "boot/loader.conf",
                b"m_load=\"YES\"\nm_type=\"md_image\"\nm_name=\"/../../../etc/passwd\"\n",
            ),
        ]);
        let error = from_host_dir(&host, 1000).unwrap_err();
        assert_eq!(error.field, "path", "{error}");
    }
}
