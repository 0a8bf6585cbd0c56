//! The commands of the prompt, of `exec=` lines and of included files.

use super::{Loader, MOST_STEPS};
use crate::error::LoadError;
use crate::fs::FileType;
use crate::loader::words;

/// Largest file that `include` and `more` read.
const LARGEST_TEXT: u64 = 1 << 20;
/// How deep files may include files.
const DEEPEST: usize = 8;

/// What is to happen after a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    /// The next command.
    Next,
    /// The kernel is to be entered.
    Boot,
    /// bhyveload is to end with this status.
    Leave(u8),
}

/// Commands with a line of help each, in the order of `help`.
const HELP: [(&str, &str, &str); 22] = [
    ("help", "[command]", "this list, or a command's line of it"),
    (
        "boot",
        "[-acdDghmprsv] [kernel [arguments]]",
        "load what loader.conf says, unless a kernel is loaded, and start it; -s single user, -v verbose",
    ),
    ("autoboot", "[seconds [prompt]]", "boot after a delay"),
    (
        "boot-conf",
        "[kernel]",
        "forget what is loaded and load by loader.conf again",
    ),
    (
        "load",
        "[-t type] file [arguments]",
        "load a kernel, then modules with their dependencies, or a file of a type",
    ),
    ("unload", "", "forget all that is loaded"),
    ("lsmod", "", "what is loaded"),
    (
        "enable-module",
        "name",
        "load a module with boot, as name_load=YES does",
    ),
    ("disable-module", "name", "do not"),
    (
        "set",
        "name=value",
        "set a variable; the kernel gets them all",
    ),
    ("unset", "name", "take a variable away"),
    ("show", "[name]", "variables and their values"),
    (
        "ls",
        "[-l] [path]",
        "a folder's files; a path may begin with a device, as in disk0p2:/boot",
    ),
    ("more", "file ...", "a file's text, a page at a time"),
    ("lsdev", "", "devices, and what is on them"),
    ("include", "file ...", "obey a file's lines"),
    ("read-conf", "file", "read a file as loader.conf is read"),
    ("echo", "[-n] text", "print"),
    ("pwd", "", "the current device"),
    ("reboot", "", "end with exit status 2, loading nothing"),
    ("quit", "", "end with exit status 1, loading nothing"),
    ("?", "", "the same as help"),
];

fn wrong(command: &str, problem: &str) -> LoadError {
    LoadError::new(command, "arguments", problem)
}

impl Loader<'_> {
    /// Obeys a line that the user typed.
    pub(super) fn obey(&mut self, line: &str) -> Result<Flow, LoadError> {
        self.steps = MOST_STEPS;
        self.command(line, 0)
    }

    /// Obeys a line of a configuration file; what goes wrong is told. Only the user
    /// says when to boot.
    pub(super) fn obey_quietly(&mut self, line: &str) -> Result<(), LoadError> {
        let problem = match self.command(line, 0) {
            Ok(Flow::Next) => return Ok(()),
            Ok(_) => "not in a configuration file".to_owned(),
            Err(error) => error.to_string(),
        };
        self.print(&format!("{line}: {problem}\n"))
    }

    fn command(&mut self, line: &str, depth: usize) -> Result<Flow, LoadError> {
        self.steps = self.steps.checked_sub(1).ok_or_else(|| {
            LoadError::new(
                "include",
                "file",
                format!("more than {MOST_STEPS} commands"),
            )
        })?;
        if line.len() > words::LONGEST_LINE {
            return Err(wrong("line", "is too long"));
        }
        let words = words::split(line, |name| self.environment.get(name))
            .map_err(|problem| wrong("line", problem))?;
        let Some((command, arguments)) = words.split_first() else {
            return Ok(Flow::Next);
        };
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        match command.as_str() {
            "boot" => return self.boot(&arguments),
            "autoboot" => return self.autoboot_command(&arguments),
            "reboot" => return Ok(Flow::Leave(2)),
            "quit" | "exit" => return Ok(Flow::Leave(1)),
            "include" => {
                for file in &arguments {
                    let flow = self.include(file, depth)?;
                    if flow != Flow::Next {
                        return Ok(flow);
                    }
                }
            }
            "help" | "?" => self.help(&arguments)?,
            "load" => self.load_command(&arguments)?,
            "unload" => self.unload(),
            "boot-conf" => {
                self.unload();
                if let Some(kernel) = arguments.first() {
                    self.set("kernel", kernel)?;
                }
                self.load_configured()?;
            }
            "lsmod" => self.lsmod()?,
            "enable-module" | "disable-module" => {
                let [name] = arguments[..] else {
                    return Err(wrong(command, "give the name of one module"));
                };
                self.modules.set_load(name, command == "enable-module");
            }
            "set" => self.set_command(&arguments)?,
            "unset" => {
                for name in arguments {
                    self.environment.remove(name);
                    self.fixed.retain(|(fixed, _)| fixed != name);
                }
            }
            "show" => self.show(&arguments)?,
            "ls" => self.ls(&arguments)?,
            "more" => {
                for file in arguments {
                    if !self.more(file)? {
                        break;
                    }
                }
            }
            "lsdev" => self.lsdev()?,
            "read-conf" => {
                let [file] = arguments[..] else {
                    return Err(wrong(command, "give one file"));
                };
                self.read_conf_command(file)?;
            }
            "echo" => {
                let (text, end) = match arguments.split_first() {
                    Some((&"-n", rest)) => (rest.join(" "), ""),
                    _ => (arguments.join(" "), "\n"),
                };
                self.print(&format!("{text}{end}"))?;
            }
            "pwd" => {
                let device = self.environment.get("currdev").unwrap_or_default();
                let line = format!("{device}/\n");
                self.print(&line)?;
            }
            other => {
                return Err(LoadError::new(other, "command", "is not known")
                    .hint("help lists those that are"));
            }
        }
        Ok(Flow::Next)
    }

    fn help(&mut self, arguments: &[&str]) -> Result<(), LoadError> {
        let mut text = String::new();
        for (name, form, line) in HELP {
            if arguments.first().is_none_or(|wanted| *wanted == name) {
                let command = format!("{name} {form}");
                text.push_str(&format!("{command}\n    {line}\n"));
            }
        }
        if text.is_empty() {
            text = "there is no such command\n".to_owned();
        }
        self.page(&text).map(drop)
    }

    pub(super) fn unload(&mut self) {
        self.files.clear();
        self.kernel_folder = None;
        self.hints.clear();
    }

    /// `boot [-flags] [kernel [arguments]]`.
    fn boot(&mut self, arguments: &[&str]) -> Result<Flow, LoadError> {
        let mut rest = arguments;
        if let Some((kernel, more)) = rest.split_first().filter(|(k, _)| !k.starts_with('-')) {
            if !self.files.is_empty() {
                return Err(wrong("boot", "a kernel is loaded already: unload it first"));
            }
            self.set("kernel", kernel)?;
            rest = more;
        }
        let flags = rest.join(" ");
        self.boot_flags(&flags);
        if self.files.is_empty() {
            self.load_configured()?;
        }
        if let Some(kernel) = self.files.first_mut().filter(|_| !flags.is_empty()) {
            kernel.args = Some(flags);
        }
        Ok(Flow::Boot)
    }

    fn load_command(&mut self, arguments: &[&str]) -> Result<(), LoadError> {
        let (kind, rest) = match arguments {
            ["-t", kind, rest @ ..] => (Some(*kind), rest),
            rest => (None, rest),
        };
        let Some((file, args)) = rest.split_first().filter(|(f, _)| !f.starts_with('-')) else {
            return Err(wrong(
                "load",
                "give a file: load [-t type] file [arguments]",
            ));
        };
        let args = Some(args.join(" ")).filter(|a| !a.is_empty());
        self.load(file, kind, args)
    }

    fn lsmod(&mut self) -> Result<(), LoadError> {
        let mut text = String::new();
        for (i, file) in self.files.iter().enumerate() {
            let kind = match file.kind.as_deref() {
                Some(kind) => kind,
                None if i == 0 => "elf kernel",
                None => "elf obj module",
            };
            let args = file.args.as_deref().unwrap_or_default();
            let size = file.input.data.len();
            text.push_str(&format!("{} ({kind}, {size} bytes) {args}\n", file.name));
            if i > 0 {
                for (module, version) in &file.metadata.provides {
                    text.push_str(&format!("    {module}.{version}\n"));
                }
            }
        }
        self.page(&text).map(drop)
    }

    fn set_command(&mut self, arguments: &[&str]) -> Result<(), LoadError> {
        let Some((first, rest)) = arguments.split_first() else {
            return Err(wrong("set", "give name=value"));
        };
        let (name, value) = first.split_once('=').unwrap_or((first, ""));
        let value = [&[value], rest].concat().join(" ");
        let good = |c: char| c.is_ascii_graphic();
        if name.is_empty() || !name.chars().all(good) {
            return Err(wrong("set", "has no usable name before the ="));
        }
        self.fixed.retain(|(fixed, _)| fixed != name);
        self.set(name, &value)
    }

    fn show(&mut self, arguments: &[&str]) -> Result<(), LoadError> {
        let mut text = String::new();
        match arguments.first() {
            Some(name) => match self.environment.get(name) {
                Some(value) => text.push_str(&format!("{value}\n")),
                None => {
                    return Err(LoadError::new(*name, "variable", "is not set"));
                }
            },
            None => {
                for (name, value) in self.environment.iter() {
                    text.push_str(&format!("{name}={value}\n"));
                }
                for (key, module) in self.modules.to_load() {
                    let name = module.name.as_deref().unwrap_or(&key);
                    text.push_str(&format!("{key}_load=YES ({name})\n"));
                }
            }
        }
        self.page(&text).map(drop)
    }

    fn ls(&mut self, arguments: &[&str]) -> Result<(), LoadError> {
        let (long, rest) = match arguments {
            ["-l", rest @ ..] => (true, rest),
            rest => (false, rest),
        };
        let path = rest.first().copied().unwrap_or("/");
        let (volume, inner) = self.locate(path)?;
        let Some(list) = volume.list(inner)? else {
            let what = match volume.attributes(inner)? {
                Some(_) => "is no folder",
                None => "is not there",
            };
            return Err(LoadError::new(volume.describe(inner), "ls", what));
        };
        let mut text = String::new();
        for entry in list {
            let mark = match entry.kind {
                FileType::Directory => 'd',
                FileType::Symlink => 'l',
                FileType::Other => '?',
                FileType::File => ' ',
            };
            let name = &entry.name;
            text.push_str(&if long {
                format!(" {mark} {:>10} {name}\n", entry.size)
            } else {
                format!(" {mark} {name}\n")
            });
        }
        self.page(&text).map(drop)
    }

    /// Shows a file; says if the user wants the next one too.
    fn more(&mut self, path: &str) -> Result<bool, LoadError> {
        let text = self.text_file(path)?;
        self.page(&text)
    }

    fn text_file(&self, path: &str) -> Result<String, LoadError> {
        let (volume, inner) = self.locate(path)?;
        match volume.read(inner, LARGEST_TEXT)? {
            Some(input) => Ok(String::from_utf8_lossy(&input.data).into_owned()),
            None => Err(LoadError::new(
                volume.describe(inner),
                "file",
                "there is no such file",
            )),
        }
    }

    fn lsdev(&mut self) -> Result<(), LoadError> {
        let mut text = String::new();
        for (i, device) in self.devices.list.iter().enumerate() {
            let mark = if i == self.current { '*' } else { ' ' };
            text.push_str(&format!("{mark} {}: {}\n", device.name, device.what));
        }
        self.page(&text).map(drop)
    }

    fn include(&mut self, path: &str, depth: usize) -> Result<Flow, LoadError> {
        if depth == DEEPEST {
            return Err(LoadError::new(
                path,
                "include",
                "is included by too many files",
            ));
        }
        let text = self.text_file(path)?;
        for (number, line) in text.lines().enumerate() {
            // `@` says not to echo the line, `-` not to mind if it fails.
            let line = line.trim().trim_start_matches('@');
            let (line, minds) = match line.strip_prefix('-') {
                Some(line) => (line, false),
                None => (line, true),
            };
            match self.command(line, depth + 1) {
                Ok(Flow::Next) => {}
                Ok(flow) => return Ok(flow),
                Err(_) if !minds => {}
                Err(error) => {
                    return Err(LoadError {
                        field: format!("line {}: {}: {}", number + 1, error.file, error.field),
                        file: path.to_owned(),
                        ..error
                    });
                }
            }
        }
        Ok(Flow::Next)
    }
}
