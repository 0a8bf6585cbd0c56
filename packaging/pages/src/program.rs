//! The options of a program, read from what it says of itself with `-h`.

use bhyve::cli::{self, Command};
use clap::CommandFactory;

/// An option.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Opt {
    /// `c` of `-c`.
    pub short: Option<char>,
    /// `config` of `--config`.
    pub long: Option<String>,
    /// What its argument is called, if it takes one.
    pub argument: Option<String>,
    /// What it does, a sentence; empty where the help only lists it.
    pub help: String,
}

impl Opt {
    /// As it is written: `-c`, or `--config` where there is no letter.
    #[must_use]
    pub fn name(&self) -> String {
        match (self.short, &self.long) {
            (Some(letter), _) => format!("-{letter}"),
            (None, long) => format!("--{}", long.as_deref().unwrap_or_default()),
        }
    }

    /// Every way to write it.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let short = self.short.map(|letter| format!("-{letter}"));
        let long = self.long.as_ref().map(|word| format!("--{word}"));
        short.into_iter().chain(long).collect()
    }
}

/// A program.
#[derive(Clone, Debug)]
pub struct Program {
    /// Its name.
    pub name: &'static str,
    /// What it is called with besides options.
    pub operand: Option<&'static str>,
    /// Its options, in the help's order.
    pub options: Vec<Opt>,
    /// What it prints as help.
    pub help: String,
}

/// The help of a program has not the form that is expected of it.
#[derive(Debug, thiserror::Error)]
#[error("the help of {0} {1}")]
pub struct BadHelp(&'static str, String);

/// bhyve(8).
///
/// # Errors
/// Its help lists an option that the usage lines do not have.
pub fn bhyve() -> Result<Program, BadHelp> {
    let bad = |why: String| BadHelp("bhyve", why);
    let help = match cli::parse(["-h".into()]) {
        Ok(Command::Help(text) | Command::Print(text)) => text,
        other => return Err(bad(format!("is not printed: {other:?}"))),
    };
    let arguments = bracketed(&help);
    let mut options: Vec<Opt> = Vec::new();
    for line in help.lines() {
        let Some(indented) = line.strip_prefix("       ") else {
            continue;
        };
        let item = indented
            .split_once(": ")
            .filter(|(name, _)| name.starts_with('-') && !name.contains(' '));
        if let Some((name, text)) = item {
            let (short, long) = match name.strip_prefix("--") {
                Some(long) => (None, Some(long.to_owned())),
                None => (name.chars().nth(1), None),
            };
            let argument = match arguments.iter().find(|(option, _)| option == name) {
                Some((_, argument)) => Some(argument.clone()),
                None if short.is_some_and(|c| bundled(&help, c)) => None,
                None if help.contains(&format!("[{name}]")) => None,
                None => return Err(bad(format!("has {name}, but its usage lines do not"))),
            };
            options.push(Opt {
                short,
                long,
                argument,
                help: text.into(),
            });
        } else if let (Some(more), Some(last)) = (indented.strip_prefix("    "), options.last_mut())
            && !more.trim().is_empty()
        {
            last.help = format!("{} {}", last.help, more.trim());
        }
    }
    for (name, _) in &arguments {
        if !options.iter().any(|o| o.names().contains(name)) {
            return Err(bad(format!(
                "has {name} in its usage lines and does not explain it"
            )));
        }
    }
    Ok(Program {
        name: "bhyve",
        operand: Some("vmname"),
        options,
        help,
    })
}

/// `[-c CONF]` and `[--file FILE]` of the usage lines.
fn bracketed(help: &str) -> Vec<(String, String)> {
    let usage: Vec<&str> = help
        .lines()
        .take_while(|l| !l.trim_start().starts_with("-"))
        .map(str::trim)
        .collect();
    let usage = usage.join(" ");
    let (mut found, mut depth, mut start) = (Vec::new(), 0_u32, 0);
    for (at, c) in usage.char_indices() {
        match c {
            '[' => {
                if depth == 0 {
                    start = at + 1;
                }
                depth += 1;
            }
            ']' => {
                depth = depth.saturating_sub(1);
                if depth == 0
                    && let Some(inner) = usage.get(start..at)
                    && let Some((option, argument)) = inner.split_once([' ', '='])
                    && option.starts_with('-')
                    && !found.iter().any(|(o, _): &(String, String)| o == option)
                {
                    found.push((option.to_owned(), argument.to_owned()));
                }
            }
            _ => {}
        }
    }
    found
}

/// Whether the first group of the usage lines, `[-aAC]`, has this letter.
fn bundled(help: &str, letter: char) -> bool {
    help.split_once("[-")
        .and_then(|(_, rest)| rest.split_once(']'))
        .is_some_and(|(letters, _)| letters.contains(letter))
}

/// bhyvectl(8), whose help names options and says no more, as stock's.
///
/// # Errors
/// A line of its help is no option.
pub fn bhyvectl() -> Result<Program, BadHelp> {
    let help = bhyve::bhyvectl::usage();
    let mut options = vec![Opt {
        short: None,
        long: Some("vm".into()),
        argument: Some("vmname".into()),
        help: describe("vm").ok_or_else(|| BadHelp("bhyvectl", "lacks --vm".into()))?,
    }];
    for line in help.lines().skip(1) {
        let inner = line
            .trim()
            .strip_prefix("[--")
            .and_then(|l| l.strip_suffix(']'));
        let inner = inner.ok_or_else(|| BadHelp("bhyvectl", format!("has a line \"{line}\"")))?;
        let (long, argument) = match inner.split_once("=<") {
            Some((long, argument)) => (long, Some(argument.trim_end_matches('>').to_owned())),
            None => (inner, None),
        };
        let help = describe(long).ok_or_else(|| {
            BadHelp(
                "bhyvectl",
                format!("has --{long}, which DESCRIPTIONS does not explain"),
            )
        })?;
        options.push(Opt {
            short: None,
            long: Some(long.into()),
            argument,
            help,
        });
    }
    Ok(Program {
        name: "bhyvectl",
        operand: None,
        options,
        help,
    })
}

/// What the options of bhyvectl(8) do, of which its help says nothing.
const DESCRIPTIONS: &[(&str, &str)] = &[
    ("vm", "the VM to look into"),
    (
        "cpu",
        "the virtual CPU that is meant, 0 without this option",
    ),
    ("create", "create the VM"),
    (
        "destroy",
        "destroy the VM, at any moment; its bhyve(8) ends",
    ),
    (
        "get-all",
        "show everything that there is to show of the VM and the virtual CPU",
    ),
    ("get-stats", "show the statistics of the virtual CPU"),
    (
        "run",
        "run the virtual CPU until it leaves the kernel, and show why it did",
    ),
    ("capname", "the capability that --getcap and --setcap mean"),
    (
        "getcap",
        "show a capability of the virtual CPU, all without --capname",
    ),
    ("setcap", "turn a capability of the virtual CPU off or on"),
    ("desc-base", "base for --set-desc-*"),
    ("desc-limit", "limit for --set-desc-*"),
    ("desc-access", "access rights for --set-desc-*"),
    ("set-x2apic-state", "turn x2APIC mode off (0) or on (1)"),
    (
        "get-x2apic-state",
        "show whether the local APIC is in x2APIC mode",
    ),
    (
        "unassign-pptdev",
        "take a PCI device that was passed through from the VM",
    ),
    ("set-mem", "give a new VM this much memory"),
    ("get-lowmem", "show the memory below 4 GiB"),
    ("get-highmem", "show the memory from 4 GiB on"),
    ("get-memseg", "show the memory segments"),
    ("get-memmap", "show what of them is mapped where"),
    (
        "get-gpa-pmap",
        "show the nested page-table entries for a guest-physical address",
    ),
    (
        "assert-lapic-lvt",
        "raise a local interrupt of the local APIC",
    ),
    ("inject-nmi", "inject an NMI into the virtual CPU"),
    ("force-reset", "end the VM as if the guest had reset itself"),
    (
        "force-poweroff",
        "end the VM as if the guest had powered itself off",
    ),
    ("get-rtc-time", "show the time of the real-time clock"),
    (
        "set-rtc-time",
        "set the real-time clock, in seconds since 1970",
    ),
    (
        "get-rtc-nvram",
        "show the byte of the clock's memory that --rtc-nvram-offset names",
    ),
    ("set-rtc-nvram", "set it"),
    (
        "rtc-nvram-offset",
        "offset for --get-rtc-nvram and --set-rtc-nvram",
    ),
    ("get-active-cpus", "list the virtual CPUs that run"),
    ("get-suspended-cpus", "list those that are suspended"),
    ("get-debug-cpus", "list those that a debugger has stopped"),
    (
        "get-intinfo",
        "show the event that is pending for the virtual CPU",
    ),
    ("get-cpu-topology", "show sockets, cores and threads"),
    ("help", "print a list of options"),
];

/// The words for an option of bhyvectl(8).
fn describe(long: &str) -> Option<String> {
    if let Some((_, text)) = DESCRIPTIONS.iter().find(|(name, _)| *name == long) {
        return Some((*text).to_owned());
    }
    let upper = |name: &str| name.to_uppercase().replace(['-', '_'], " ");
    if let Some(register) = long.strip_prefix("set-desc-") {
        let register = upper(register);
        return Some(format!(
            "set the descriptor in {register} to --desc-base, --desc-limit, --desc-access"
        ));
    }
    if let Some(register) = long.strip_prefix("get-desc-") {
        return Some(format!("show the descriptor in {}", upper(register)));
    }
    for (prefix, of) in [
        ("get-vmcs-", "the VMCS (Intel)"),
        ("get-vmcb-", "the VMCB (AMD)"),
    ] {
        if let Some(field) = long.strip_prefix(prefix) {
            return Some(format!("show {} of {of}", upper(field)));
        }
    }
    let (verb, register) = long
        .strip_prefix("set-")
        .map(|r| ("set", r))
        .or_else(|| long.strip_prefix("get-").map(|r| ("show", r)))?;
    Some(format!("{verb} {}", upper(register)))
}

/// bhyveload(8).
#[must_use]
pub fn bhyveload() -> Program {
    let mut command = bhyveload::cli::Cli::command();
    let help = command.render_long_help().to_string();
    let options = command
        .get_arguments()
        .filter(|a| !a.is_positional() && !a.is_hide_set())
        .map(|a| Opt {
            short: a.get_short(),
            long: a.get_long().map(str::to_owned),
            argument: a
                .get_action()
                .takes_values()
                .then(|| a.get_value_names().and_then(|n| n.first()))
                .flatten()
                .map(ToString::to_string),
            help: a.get_help().map(ToString::to_string).unwrap_or_default(),
        })
        .collect();
    Program {
        name: "bhyveload",
        operand: Some("vmname"),
        options,
        help,
    }
}

/// All three.
///
/// # Errors
/// See [`mod@bhyve`] and [`bhyvectl`].
pub fn all() -> Result<[Program; 3], BadHelp> {
    Ok([bhyve()?, bhyvectl()?, bhyveload()])
}
