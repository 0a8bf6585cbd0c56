//! The loader: what FreeBSD's loader(8) does between power-on and its kernel, for
//! a guest's image or folder.
//!
//! Its state is here; [`config`] reads `loader.conf`, [`files`] finds and loads
//! kernels and modules, [`commands`] obeys command lines, [`prompt`] counts down
//! and talks.

pub mod commands;
pub mod config;
pub mod files;
pub mod prompt;
pub mod words;

use crate::conf::Modules;
use crate::console::Console;
use crate::disks::Devices;
use crate::env::Environment;
use crate::error::LoadError;
use crate::freebsd::{FreeBsd, Module};
use crate::input::Input;
use crate::kldmeta::Metadata;
use crate::linkerhints::Hint;
use crate::volume::Volume;
use std::collections::BTreeMap;

/// Most commands that files on an image may give in answer to one of the user's.
const MOST_STEPS: u32 = 1000;

/// What `console` may name. As with stock bhyveload another is refused: a kernel
/// told to talk to a video card only would be silent.
const CONSOLES: [&str; 3] = ["comconsole", "nullconsole", "userboot"];

/// What the user wants after the loader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The guest.
    Boot(Box<FreeBsd>),
    /// bhyveload is to end; its exit status. Stock bhyveload's are 1 after `quit`
    /// and 2 after `reboot`.
    Leave(u8),
}

/// A file that is to go into guest memory.
#[derive(Debug, Clone)]
struct Loaded {
    /// The path by which the guest knows it.
    name: String,
    /// The type; `None`: a kernel module (or the kernel, which is the first).
    kind: Option<String>,
    args: Option<String>,
    input: Input,
    metadata: Metadata,
}

/// The state of the loader.
pub struct Loader<'a> {
    console: &'a mut dyn Console,
    devices: Devices,
    /// The device that paths without one are on.
    current: usize,
    environment: Environment,
    /// `-e`: stronger than what `loader.conf` says.
    fixed: Vec<(String, String)>,
    modules: Modules,
    files: Vec<Loaded>,
    hints: BTreeMap<String, Vec<Hint>>,
    /// Bytes that may be loaded in all.
    limit: u64,
    steps: u32,
    /// Folder of the loaded kernel.
    kernel_folder: Option<String>,
}

impl std::fmt::Debug for Loader<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loader")
            .field("environment", &self.environment)
            .field("files", &self.files.len())
            .finish_non_exhaustive()
    }
}

impl<'a> Loader<'a> {
    /// A loader over `devices`; `fixed` are the variables given on the command
    /// line, `limit` the most bytes that it may load.
    ///
    /// # Errors
    /// There is nothing to boot from.
    pub fn new(
        console: &'a mut dyn Console,
        devices: Devices,
        fixed: Vec<(String, String)>,
        limit: u64,
    ) -> Result<Self, LoadError> {
        let current = devices.choose()?;
        let mut loader = Self {
            console,
            devices,
            current,
            environment: Environment::default(),
            fixed,
            modules: Modules::default(),
            files: Vec::new(),
            hints: BTreeMap::new(),
            limit,
            steps: 0,
            kernel_folder: None,
        };
        loader.enter_device(current);
        for (name, value) in loader.fixed.clone() {
            loader.set(&name, &value)?;
        }
        Ok(loader)
    }

    /// Reads the configuration, counts down, obeys, until there is an outcome.
    ///
    /// # Errors
    /// The console is gone, or its input ends while the loader waits for a command.
    pub fn run(&mut self) -> Result<Outcome, LoadError> {
        for warning in self.devices.warnings.clone() {
            self.print(&format!("{warning}\n"))?;
        }
        let device = &self.devices.list[self.current];
        let line = format!("Booting from {} ({})\n", device.name, device.what);
        self.print(&line)?;
        self.configure()?;
        self.converse()
    }

    fn print(&mut self, text: &str) -> Result<(), LoadError> {
        self.console.print(text)
    }

    fn enter_device(&mut self, number: usize) {
        self.current = number;
        let name = format!("{}:", self.devices.list[number].name);
        self.environment.set("currdev", name.as_str());
        self.environment.set("loaddev", name);
        self.hints.clear();
    }

    /// The volume that a path is on, and the path in it: `disk0p2:/boot` or `/boot`.
    fn locate<'p>(&self, path: &'p str) -> Result<(&dyn Volume, &'p str), LoadError> {
        let (number, rest) = match path.split_once(':') {
            Some((name, rest)) => match self.devices.find(name) {
                Some(number) => (number, rest),
                None => {
                    return Err(
                        LoadError::new(path, "device", format!("there is no {name}"))
                            .hint("lsdev shows what there is"),
                    );
                }
            },
            None => (self.current, path),
        };
        let device = &self.devices.list[number];
        let volume = device.volume.as_deref().ok_or_else(|| {
            LoadError::new(
                path,
                "device",
                format!("nothing can be read on {} ({})", device.name, device.what),
            )
        })?;
        Ok((volume, rest))
    }

    /// Sets a variable, as `set` does.
    fn set(&mut self, name: &str, value: &str) -> Result<(), LoadError> {
        if self.modules.take(name, value) {
            return Ok(());
        }
        if name == "currdev" {
            let Some(number) = self.devices.find(value) else {
                return Err(LoadError::new(value, "currdev", "there is no such device")
                    .hint("lsdev shows what there is"));
            };
            self.enter_device(number);
            return Ok(());
        }
        if name == "console" && !value.split([' ', ',']).any(|c| CONSOLES.contains(&c)) {
            return Err(LoadError::new(
                "environment",
                name,
                format!("there is no {value} before the guest runs"),
            )
            .hint("the kernel keeps the serial console; comconsole and nullconsole can be set"));
        }
        crate::env::check_length(name, value)
            .map_err(|problem| LoadError::new("environment", name, problem))?;
        self.environment.set(name, value);
        Ok(())
    }

    /// Whether a variable says YES.
    fn says(&self, name: &str, word: &str) -> bool {
        self.environment
            .get(name)
            .is_some_and(|value| value.eq_ignore_ascii_case(word))
    }

    /// Bytes that may still be loaded.
    fn room(&self) -> u64 {
        let taken: u64 = self.files.iter().map(|f| f.input.data.len() as u64).sum();
        self.limit.saturating_sub(taken)
    }

    /// What has been loaded, as the guest it makes.
    fn guest(&mut self) -> Result<FreeBsd, LoadError> {
        self.mount_root()?;
        let mut files = std::mem::take(&mut self.files).into_iter();
        let Some(kernel) = files.next() else {
            return Err(LoadError::new("boot", "kernel", "none has been loaded"));
        };
        let mut environment = self.environment.clone();
        // The loader's own.
        for name in ["currdev", "loaddev", "prompt"] {
            environment.remove(name);
        }
        Ok(FreeBsd {
            kernel: kernel.input,
            kernel_name: kernel.name,
            kernel_args: kernel.args,
            modules: files
                .map(|file| Module {
                    input: file.input,
                    name: file.name,
                    kind: file.kind,
                    args: file.args,
                })
                .collect(),
            environment,
        })
    }
}
