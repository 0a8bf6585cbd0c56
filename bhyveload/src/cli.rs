//! The command line: bhyveload(8)'s, and what goes beyond it.

use crate::console::Console;
use crate::disks::Devices;
use crate::env::Environment;
use crate::error::LoadError;
use crate::freebsd::{FreeBsd, Module};
use crate::input::Input;
use crate::kld;
use crate::linux::Linux;
use crate::loader::{Loader, Outcome};
use crate::multiboot::Multiboot;
use bhyve_config::{Argument, ConfigError, Program};
use bhyve_sandbox::{Mode, Needs};
use clap::{ArgGroup, CommandFactory, Parser};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Loads a kernel into a VM without a BIOS, ready for bhyve to run.
#[derive(Debug, Parser)]
#[command(
    name = "bhyveload",
    version,
    disable_help_flag = true,
    override_usage = "bhyveload [-m SIZE] [-e NAME=VALUE]... -d IMAGE... VM\n       \
        bhyveload [...] -h DIR VM\n       \
        bhyveload [...] --kernel FILE [--module FILE[,type=T][,name=N][,args=A]]... [--mfsroot FILE] VM\n       \
        bhyveload [...] --linux BZIMAGE [--initrd FILE] [--cmdline TEXT] VM\n       \
        bhyveload [...] --multiboot FILE [--module FILE]... [--cmdline TEXT] VM\n       \
        bhyveload --config vm.toml [...] [VM]",
    group(ArgGroup::new("what").args(["host", "kernel", "linux", "multiboot"]))
)]
pub struct Cli {
    /// Memory of the VM: a number of MiB, or with one of k, m, g, t
    #[arg(short, value_name = "SIZE", default_value = "256m", value_parser = memory)]
    pub memory: u64,
    /// Sets a variable of the FreeBSD kernel's environment
    #[arg(short = 'e', value_name = "NAME=VALUE")]
    pub environment: Vec<String>,
    /// The loader's terminal: stdio (the default) or a terminal device
    #[arg(short = 'c', value_name = "CONSOLE", default_value = "stdio")]
    pub console: String,
    /// Wires the guest's memory, which passthrough needs
    #[arg(short = 'S')]
    pub wired: bool,
    /// Has guest memory in core dumps
    #[arg(short = 'C')]
    pub in_core: bool,
    /// Boots FreeBSD from a host folder that holds boot/kernel/kernel and boot/loader.conf; with
    /// -d it is one more device
    #[arg(short = 'h', value_name = "DIR")]
    pub host: Option<PathBuf>,
    /// Boots FreeBSD from a raw disk image, as its own loader would; given more than once: disk0,
    /// disk1, ...
    #[arg(short = 'd', value_name = "IMAGE", conflicts_with_all = ["kernel", "linux", "multiboot"])]
    pub disk: Vec<PathBuf>,
    /// Loader program of stock bhyveload: a userboot*.so is taken for the loader that is built in
    #[arg(short = 'l', value_name = "LOADER")]
    pub loader: Option<PathBuf>,
    /// Says what is loaded where
    #[arg(short, long)]
    pub verbose: bool,
    /// Boots this FreeBSD amd64 kernel
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// A file that goes with --kernel or --multiboot, as often as wanted
    #[arg(long, value_name = "FILE[,type=T][,name=N][,args=A]")]
    pub module: Vec<String>,
    /// A memory disk with the root file system, for --kernel, -d and -h
    #[arg(long, value_name = "FILE", conflicts_with_all = ["linux", "multiboot"])]
    pub mfsroot: Option<PathBuf>,
    /// Boots this Linux bzImage
    #[arg(long, value_name = "BZIMAGE")]
    pub linux: Option<PathBuf>,
    /// The initramfs for --linux
    #[arg(long, value_name = "FILE", requires = "linux")]
    pub initrd: Option<PathBuf>,
    /// The command line for --linux and --multiboot
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, conflicts_with_all = ["host", "kernel"])]
    pub cmdline: Option<String>,
    /// Boots this multiboot 1 kernel
    #[arg(long, value_name = "FILE")]
    pub multiboot: Option<PathBuf>,
    /// on (the default): files are read with everything out of reach that is not needed for it;
    /// log only names what is refused; off does without
    #[arg(long, value_name = "on|log|off", default_value = "on")]
    pub sandbox: Mode,
    /// Reads the VM's TOML file, which bhyve reads as well; options given beside it go before it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Prints this text
    #[arg(long, action = clap::ArgAction::Help)]
    pub help: Option<bool>,
    /// Name of the VM, which is made if it is not there
    #[arg(value_name = "VM")]
    pub vm: String,
}

/// What is to be loaded, read from its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Guest {
    /// A FreeBSD kernel.
    FreeBsd(Box<FreeBsd>),
    /// A Linux kernel.
    Linux(Box<Linux>),
    /// A multiboot kernel.
    Multiboot(Box<Multiboot>),
}

fn memory(text: &str) -> Result<u64, String> {
    const MIB: u64 = 1 << 20;
    match vmmapi::parse_memsize(text) {
        Some(size) if size >= 2 * MIB => Ok(size),
        Some(_) => Err("a VM needs at least 2 MiB".to_owned()),
        None => Err("give a number and one of k, m, g, t".to_owned()),
    }
}

/// A `--module` argument: the path, and what follows it.
struct ModuleArgument<'a> {
    path: &'a str,
    kind: Option<&'a str>,
    name: Option<&'a str>,
    args: Option<&'a str>,
}

fn module_argument(text: &str) -> Result<ModuleArgument<'_>, LoadError> {
    let mut words = text.split(',');
    let mut module = ModuleArgument {
        path: words.next().unwrap_or_default(),
        kind: None,
        name: None,
        args: None,
    };
    for word in words {
        match word.split_once('=') {
            Some(("type", value)) if !value.is_empty() => module.kind = Some(value),
            Some(("name", value)) if !value.is_empty() => module.name = Some(value),
            Some(("args", value)) => module.args = Some(value),
            _ => {
                return Err(LoadError::new(
                    "--module",
                    word,
                    "is not type=, name= or args=",
                ));
            }
        }
    }
    Ok(module)
}

/// The path by which the guest knows a file that was given directly: the host's
/// own path is none of its business.
fn guest_path(folder: &str, input: &Input) -> String {
    let base = input.base_name();
    format!("{folder}/{}", base.strip_suffix(".gz").unwrap_or(base))
}

fn raw_input(path: &Path, limit: u64) -> Result<Input, LoadError> {
    let input = Input::open(path, limit)?;
    if input.name.ends_with(".gz") {
        return input.decompressed(limit);
    }
    Ok(input)
}

/// Options of which one stands for what is booted: one on the command line puts
/// all of a file's out of force.
const SOURCES: [&str; 5] = ["-d", "-h", "--kernel", "--linux", "--multiboot"];
/// Options of the file that go with its source.
const WITH_SOURCE: [&str; 4] = ["--module", "--mfsroot", "--initrd", "--cmdline"];

/// Whether `given` has a value from the command line for an option as a user
/// writes it.
fn is_given(command: &clap::Command, given: &clap::ArgMatches, option: &str) -> bool {
    command.get_arguments().any(|a| {
        let long = a.get_long().is_some_and(|l| option == format!("--{l}"));
        let short = a.get_short().is_some_and(|s| option == format!("-{s}"));
        (long || short)
            && given.value_source(a.get_id().as_str())
                == Some(clap::parser::ValueSource::CommandLine)
    })
}

/// The words of the command line with those of its `--config` file put before
/// them, but for what they say themselves.
///
/// # Errors
/// The file cannot be read, or something in it is wrong.
pub fn with_config(words: Vec<OsString>) -> Result<Vec<OsString>, ConfigError> {
    let command = Cli::command().ignore_errors(true);
    let given = command.clone().get_matches_from(&words);
    let Some(path) = given.get_one::<PathBuf>("config") else {
        return Ok(words);
    };
    let settings = bhyve_config::file::read(path)?;
    let mut all: Vec<OsString> = words.first().cloned().into_iter().collect();
    let has_source = SOURCES.iter().any(|s| is_given(&command, &given, s));
    let has_name = given.get_one::<String>("vm").is_some();
    let mut name = None;
    for argument in settings.arguments(Program::Bhyveload) {
        let option = argument.option;
        if option.is_empty() {
            name = argument.value;
            continue;
        }
        let replaced = has_source && (SOURCES.contains(&option) || WITH_SOURCE.contains(&option));
        // Of the environment both are taken, the command line's last.
        let given_too = option != "-e" && is_given(&command, &given, option);
        if !(replaced || given_too) {
            all.extend(joined(&argument));
        }
    }
    all.extend(words.into_iter().skip(1));
    all.extend(name.filter(|_| !has_name).map(OsString::from));
    Ok(all)
}

/// An option and its value as one word where the value could pass for an option.
fn joined(argument: &Argument) -> Vec<OsString> {
    match &argument.value {
        Some(value) if argument.option.starts_with("--") => {
            vec![format!("{}={value}", argument.option).into()]
        }
        Some(value) => vec![format!("{}{value}", argument.option).into()],
        None => vec![argument.option.into()],
    }
}

impl Cli {
    /// What of the host's files the options name.
    #[must_use]
    pub fn needs(&self) -> Needs {
        let module = |m: &String| PathBuf::from(m.split(',').next().unwrap_or_default());
        let files = [
            &self.host,
            &self.kernel,
            &self.mfsroot,
            &self.linux,
            &self.initrd,
            &self.multiboot,
        ];
        let write = BTreeSet::from([
            PathBuf::from("/dev/vmmctl"),
            Path::new("/dev/vmm").join(&self.vm),
        ]);
        Needs {
            read: files
                .into_iter()
                .flatten()
                .chain(&self.disk)
                .cloned()
                .chain(self.module.iter().map(module))
                .collect(),
            write,
            ..Needs::default()
        }
    }

    /// Refuses a loader program that nothing here stands for, and a command line with
    /// nothing to load. The value is a warning.
    ///
    /// # Errors
    /// Such a command line was given.
    pub fn check(&self) -> Result<Option<String>, LoadError> {
        let mut warning = None;
        if let Some(loader) = &self.loader {
            let name = loader.display().to_string();
            let base = loader.file_name().map(|n| n.to_string_lossy().into_owned());
            let stock = base.is_some_and(|n| n.starts_with("userboot") && n.ends_with(".so"));
            if !stock {
                return Err(
                    LoadError::new("-l", name, "this bhyveload runs no loader program").hint(
                        "leave -l away: FreeBSD's loader is built in, and --linux and \
                         --multiboot load other kernels",
                    ),
                );
            }
            warning = Some(format!(
                "-l {name}: is not run; the built-in loader reads loader.conf, and no scripts"
            ));
        }
        if !self.has_loader()
            && self.kernel.is_none()
            && self.linux.is_none()
            && self.multiboot.is_none()
        {
            return Err(
                LoadError::new("command line", "kernel", "there is nothing to load").hint(
                    "give -d IMAGE, -h DIR, --kernel, --linux or --multiboot; --help explains them",
                ),
            );
        }
        Ok(warning)
    }

    /// Whether the guest is found by the loader, on images or in a folder.
    #[must_use]
    pub fn has_loader(&self) -> bool {
        !self.disk.is_empty() || self.host.is_some()
    }

    /// Runs the loader on `console`: `-d` and `-h`. `limit` is the most bytes that
    /// it may load.
    ///
    /// # Errors
    /// An image or folder cannot be read or has nothing to boot, or the console is gone.
    pub fn run_loader(&self, console: &mut dyn Console, limit: u64) -> Result<Outcome, LoadError> {
        let devices = Devices::open(&self.disk, self.host.as_deref())?;
        let mut fixed = Vec::new();
        if self.mfsroot.is_some() {
            // Stronger than the folder's /etc/fstab.
            fixed.push(("vfs.root.mountfrom".to_owned(), "ufs:/dev/md0".to_owned()));
        }
        for text in &self.environment {
            let mut one = Environment::default();
            one.set_from_argument(text)?;
            fixed.extend(one.iter().map(|(n, v)| (n.to_owned(), v.to_owned())));
        }
        match Loader::new(console, devices, fixed, limit)?.run()? {
            Outcome::Boot(mut boot) => {
                self.add_modules(&mut boot, limit)?;
                Ok(Outcome::Boot(boot))
            }
            leave => Ok(leave),
        }
    }

    fn add_modules(&self, boot: &mut FreeBsd, limit: u64) -> Result<(), LoadError> {
        for text in &self.module {
            let argument = module_argument(text)?;
            let path = Path::new(argument.path);
            let is_kld = argument.kind.is_none_or(|kind| kind == kld::KIND);
            let input = if is_kld {
                Input::open(path, limit)?.decompressed(limit)?
            } else {
                raw_input(path, limit)?
            };
            boot.modules.push(Module {
                name: match argument.name {
                    Some(name) => name.to_owned(),
                    None => guest_path("/boot/kernel", &input),
                },
                kind: argument.kind.map(str::to_owned),
                args: argument.args.map(str::to_owned),
                input,
            });
        }
        if let Some(path) = &self.mfsroot {
            let input = raw_input(path, limit)?;
            boot.modules.push(Module {
                name: guest_path("/boot", &input),
                kind: Some("md_image".to_owned()),
                args: None,
                input,
            });
        }
        Ok(())
    }

    /// Reads the files given by name: `--kernel`, `--linux`, `--multiboot`. `limit` is
    /// the most bytes of one.
    ///
    /// # Errors
    /// An option or a file is wrong.
    pub fn read(&self, limit: u64) -> Result<Guest, LoadError> {
        let command_line = self.cmdline.clone().unwrap_or_default();
        if let Some(path) = &self.kernel {
            let kernel = Input::open(path, limit)?.decompressed(limit)?;
            let mut boot = FreeBsd {
                kernel_name: "/boot/kernel/kernel".to_owned(),
                kernel,
                kernel_args: None,
                modules: Vec::new(),
                environment: Environment::default(),
            };
            self.add_modules(&mut boot, limit)?;
            for text in &self.environment {
                boot.environment.set_from_argument(text)?;
            }
            return Ok(Guest::FreeBsd(Box::new(boot)));
        }
        if let Some(first) = self.environment.first() {
            return Err(LoadError::new(
                "-e",
                first.as_str(),
                "only a FreeBSD kernel has an environment",
            )
            .hint("use --cmdline"));
        }
        if let Some(path) = &self.linux {
            if let Some(module) = self.module.first() {
                return Err(LoadError::new(
                    "--module",
                    module.as_str(),
                    "Linux takes --initrd",
                ));
            }
            let initrd = self.initrd.as_deref().map(|p| Input::open(p, limit));
            let linux = Linux {
                kernel: Input::open(path, limit)?,
                initrd: initrd.transpose()?,
                command_line,
            };
            return Ok(Guest::Linux(Box::new(linux)));
        }
        let path = self.multiboot.as_deref().unwrap_or(Path::new(""));
        let mut modules = Vec::new();
        for text in &self.module {
            let argument = module_argument(text)?;
            let input = Input::open(Path::new(argument.path), limit)?;
            let name = argument.name.unwrap_or(input.base_name());
            let string = match argument.args {
                Some(args) => format!("{name} {args}"),
                None => name.to_owned(),
            };
            modules.push((input, string));
        }
        let multiboot = Multiboot {
            kernel: Input::open(path, limit)?.decompressed(limit)?,
            modules,
            command_line,
        };
        Ok(Guest::Multiboot(Box::new(multiboot)))
    }
}
