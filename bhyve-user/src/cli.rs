//! bhyve(8)'s command line.

use std::str::FromStr;

use bhyve_config::keys::{Opt, nearest};
use bhyve_config::variables::Variables;
use bhyve_config::{Origin, Program, Settings, file, settings};

use crate::config::{BootRom, Config, PciSlot, Topology};
use crate::pci::{Bdf, catalog};
use crate::serial::backend::Spec;

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Run a VM.
    Run(Box<Config>),
    /// Print this and exit 0.
    Print(String),
    /// `-h`: print this on standard error, where libvirt reads it, and exit 0.
    Help(String),
}

/// A command line that cannot be followed; says which option and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

fn usage<T>(message: impl Into<String>) -> Result<T, UsageError> {
    Err(UsageError(message.into()))
}

/// The help text.
pub const USAGE: &str = "\
Usage: bhyve [-aAbCDehHPSuvwWxY]
             [-c [[cpus=]numcpus][,sockets=n][,cores=n][,threads=n]]
             [-g [address:]port] [-K layout] [-k file] [-l lpcdev[,conf]] [-m memsize[K|M|G|T]] [-o var=value]
             [-p vcpu:hostcpu] [-s [bus:]slot[:function],emulation[,conf]]
             [-U uuid] [--boot] [--config file] [--exit-stats file]
             [--no-pv] [--print-config] [--sandbox on|log|off]
             [--tsc-khz n] vmname
       bhyve --config vm.toml [--boot] [option ...] [vmname]
       -a: local APIC is in xAPIC mode (the default)
       -A: create ACPI tables
       -b: bhyve's first console, port 0x220, on standard input and output
       -c: number of CPUs and/or their topology
       -C: include guest memory in core files
       -D: destroy the VM when the guest has powered itself off
       -e: exit on access to an I/O port that nobody emulates
       -g: the debug port, 0x224: the gdb stub of the guest's kernel listens on
           this TCP port, of 127.0.0.1 without an address
       -h: help
       -H: leave the guest on HLT (always so here: an idle guest sleeps)
       -K: keyboard layout of VNC, without effect here
       -k: read variables from a file (bhyve_config(5))
       -l: LPC device: com1, com2 (stdio, pty, /dev/TTY, file:PATH, unix:PATH,
           tcp=ADDRESS:PORT), pc-testdev,
           bootrom (FIRMWARE[,VARIABLES]); \"-l help\" lists them
       -m: memory size, in MiB without a suffix (256M)
       -o: set a variable of bhyve_config(5), or a key of the --config file
       -p: pin a virtual CPU to a host CPU
       -P: leave the guest on PAUSE
       -s: PCI slot; \"-s help\" lists the emulations. A disk is
           virtio-blk,PATH[,ro][,sync][,direct][,nocache][,nodelete]
           [,serial=ID][,sectorsize=LOGICAL[/PHYSICAL]][,queues=N], PATH a raw
           file or a block device
       -S: wire guest memory, which passthru needs
       -u: RTC keeps UTC
       -U: UUID
       -v: say at the end what the guest was left for
       -w: ignore accesses to MSRs that nobody emulates
       -W: virtio uses MSI instead of MSI-X
       -x: local APIC is in x2APIC mode
       -Y: no MP table
       --boot: load the guest by bhyveload first, again after each reset, and
           destroy the VM at the end; what to load is in the file's [boot]
       --config: read the VM's TOML file; options given beside it go before it
       --exit-stats: write the counts of -v as JSON
       --no-pv: no paravirtual clock, end of interrupt and IPIs for the guest
       --print-config: print the file that says the same as this command line
       --sandbox: on (the default) gives up what is not needed any more before
           the guest runs, and ends when something beyond that is tried; log
           only names what is refused; off gives up nothing
       --tsc-khz: frequency of the guest's TSC, where the CPU can scale it
Exit status: 0 reset, 1 powered off, 2 halted, 3 triple fault, 4 error;
with --boot 0 powered off.
";

/// Options that want a value.
const WITH_VALUE: &str = "cGgkKlmnopsU";
/// Long options.
const LONG: [&str; 8] = [
    "--boot",
    "--config",
    "--exit-stats",
    "--help",
    "--no-pv",
    "--print-config",
    "--sandbox",
    "--tsc-khz",
];
/// Those that want a value.
const LONG_WITH_VALUE: [&str; 4] = ["--config", "--exit-stats", "--sandbox", "--tsc-khz"];

/// An option as it was given.
struct Given {
    option: String,
    value: Option<String>,
}

/// Parses the arguments after the program's name. Files and variables are read
/// first, wherever they stand: an option goes before them.
pub fn parse(args: impl IntoIterator<Item = String>) -> Result<Command, UsageError> {
    let (given, names) = split(args)?;
    for g in &given {
        let help = g.value.as_deref() == Some("help");
        match g.option.as_str() {
            "-h" | "--help" => return Ok(Command::Help(USAGE.into())),
            "-s" if help => return Ok(Command::Print(catalog::help())),
            "-l" if help => return Ok(Command::Print("com1\ncom2\npc-testdev\nbootrom\n".into())),
            _ => {}
        }
    }
    let (settings, mut print) = read_settings(&given)?;
    let mut config = Config::new("");
    for arg in settings.arguments(Program::Bhyve) {
        if arg.option.is_empty() {
            config.name = arg.value.unwrap_or_default();
            continue;
        }
        apply(&mut config, arg.option, arg.value.as_deref()).map_err(|UsageError(text)| {
            // The place says it better than the option.
            let text = text.strip_prefix(arg.option).unwrap_or(&text).trim_start();
            let key = if arg.key.is_empty() {
                "device"
            } else {
                arg.key
            };
            UsageError(format!("{}: {key}: {text}", arg.at))
        })?;
    }
    config.load = settings
        .values
        .into_iter()
        .filter(|s| s.key.bhyve == Opt::None)
        .collect();
    let mut slots: Vec<Bdf> = Vec::new();
    let mut serial = [false; 2];
    for g in &given {
        let value = g.value.as_deref();
        match g.option.as_str() {
            "--config" | "-k" | "-o" => continue,
            "--print-config" => print = true,
            "-s" => {
                let slot = pci_slot(value.unwrap_or_default())?;
                if slots.contains(&slot.at) {
                    return usage(format!(
                        "-s {}: {} is already occupied",
                        value.unwrap_or_default(),
                        slot.at
                    ));
                }
                slots.push(slot.at);
                config.slots.retain(|s| s.at != slot.at);
                config.slots.push(slot);
            }
            option => {
                // A port that the command line gives stdio takes it from a file's.
                let port = ["com1", "com2"].iter().position(|p| {
                    option == "-l" && value.is_some_and(|v| v.to_ascii_lowercase().starts_with(p))
                });
                if let Some(port) = port {
                    let other = 1 - port.min(1);
                    if let (Some(s), Some(false)) =
                        (config.serial.get_mut(other), serial.get(other))
                        && *s == Some(Spec::Stdio)
                        && value.is_some_and(|v| v.ends_with(",stdio"))
                    {
                        *s = None;
                    }
                    if let Some(s) = serial.get_mut(port) {
                        *s = true;
                    }
                }
                apply(&mut config, option, value)?;
            }
        }
    }
    match names.as_slice() {
        [name] => config.name.clone_from(name),
        [] if print || !config.name.is_empty() => {}
        [] => return usage("which VM? Its name comes last"),
        [_, extra, ..] => {
            return usage(format!(
                "\"{extra}\" after the VM's name: options come first"
            ));
        }
    }
    if print && config.name.is_empty() {
        return Ok(Command::Print(bhyve_config::print::toml(
            &config.settings(),
        )));
    }
    check(&config)?;
    if print {
        return Ok(Command::Print(bhyve_config::print::toml(
            &config.settings(),
        )));
    }
    Ok(Command::Run(Box::new(config)))
}

/// Options and operands, as getopt(3) takes them: the first operand ends the
/// options.
fn split(args: impl IntoIterator<Item = String>) -> Result<(Vec<Given>, Vec<String>), UsageError> {
    let mut args = args.into_iter();
    let (mut given, mut names) = (Vec::new(), Vec::new());
    while let Some(arg) = args.next() {
        if arg == "--" || !arg.starts_with('-') || arg == "-" {
            names.extend((arg != "--").then_some(arg));
            names.extend(args.by_ref());
        } else if arg.starts_with("--") {
            let (option, mut value) = match arg.split_once('=') {
                Some((o, v)) => (o.to_owned(), Some(v.to_owned())),
                None => (arg, None),
            };
            if LONG_WITH_VALUE.contains(&option.as_str()) {
                value = value.or_else(|| args.next());
                if value.is_none() {
                    return usage(format!("{option} needs an argument"));
                }
            } else if !LONG.contains(&option.as_str()) {
                return usage(unknown(&option));
            } else if value.is_some() {
                return usage(format!("{option} takes no argument"));
            }
            given.push(Given { option, value });
        } else {
            let mut rest = arg.chars().skip(1);
            while let Some(flag) = rest.next() {
                let option = format!("-{flag}");
                let value = if WITH_VALUE.contains(flag) {
                    let attached: String = rest.by_ref().collect();
                    let value = Some(attached)
                        .filter(|a| !a.is_empty())
                        .or_else(|| args.next());
                    Some(value.ok_or_else(|| UsageError(format!("{option} needs an argument")))?)
                } else {
                    None
                };
                given.push(Given { option, value });
            }
        }
    }
    Ok((given, names))
}

/// What `--config`, `-k` and `-o` say, in their order, and whether it is only to be
/// printed.
fn read_settings(given: &[Given]) -> Result<(Settings, bool), UsageError> {
    let fail = |e: bhyve_config::ConfigError| UsageError(e.to_string());
    let mut settings = Settings::default();
    let mut variables = Variables::default();
    for g in given {
        let value = g.value.as_deref().unwrap_or_default();
        match g.option.as_str() {
            "--config" => settings.merge(file::read(value.as_ref()).map_err(fail)?),
            "-k" => variables.read(value.as_ref()).map_err(fail)?,
            "-o" => {
                let at = Origin {
                    file: "-o".into(),
                    ..Origin::default()
                };
                variables.set(value, at).map_err(fail)?;
            }
            _ => {}
        }
    }
    let dump = variables.take_dump();
    let (said, warnings) = variables.settings().map_err(fail)?;
    for warning in warnings {
        eprintln!("bhyve: warning: {warning}");
    }
    settings.merge(said);
    Ok((settings, dump))
}

/// Does what one option says.
fn apply(config: &mut Config, option: &str, value: Option<&str>) -> Result<(), UsageError> {
    let text = value.unwrap_or_default();
    match option {
        "-a" => config.x2apic = false,
        "-A" => config.acpi = true,
        "-C" => config.core_memory = true,
        "-D" => config.destroy_on_poweroff = true,
        "-e" => config.strict_io = true,
        "-H" => config.halt_exits = true,
        // Asked for an I/O APIC once; there is always one.
        "-I" => {}
        // The keyboard of a VNC client, where there is a frame buffer.
        "-K" => {}
        "-n" => return usage(format!("{option} {text}: there are no NUMA domains")),
        "-P" => config.pause_exits = true,
        "-S" => config.wired = true,
        "-u" => config.utc = true,
        "-v" => config.verbose = true,
        "-w" => config.strict_msr = false,
        "-W" => config.virtio_msi = true,
        "-x" => config.x2apic = true,
        "-Y" => config.mptable = false,
        "-c" => config.topology = topology(text)?,
        "-l" => lpc_device(config, text)?,
        "-m" => config.memory = memory_size(text)?,
        "-p" => config.pins.push(pin(text)?),
        "-s" => config.slots.push(pci_slot(text)?),
        "-U" => config.uuid = Some(uuid(text)?),
        "--tsc-khz" => config.tsc_khz = Some(tsc_khz(text)?),
        "--exit-stats" => config.exit_stats = Some(text.into()),
        "--sandbox" => {
            config.sandbox = text
                .parse()
                .map_err(|e| UsageError(format!("--sandbox {text}: {e}")))?;
        }
        "--boot" => config.boot = true,
        "--no-pv" => config.pv = false,
        "-b" => config.bvmcons = true,
        "-B" | "-M" => {
            return usage(format!(
                "{option}: not supported; the console is a 16550, see -l com1,stdio"
            ));
        }
        "-g" => {
            config.debug = Some(
                text.parse()
                    .map_err(|e| UsageError(format!("-g {text}: {e}")))?,
            );
        }
        "-G" => {
            return usage(format!(
                "-G {text}: there is no debug server; -g is for a kernel that has one"
            ));
        }
        _ => return usage(unknown(option)),
    }
    Ok(())
}

fn unknown(option: &str) -> String {
    match nearest(option, LONG.iter().copied()).filter(|_| option.starts_with("--")) {
        Some(l) => format!("{option}: no such option; did you mean {l}?"),
        None => format!("{option}: no such option"),
    }
}

fn check(config: &Config) -> Result<(), UsageError> {
    if config.name.contains('/') || config.name.is_empty() {
        return usage(format!("\"{}\" cannot be a VM's name", config.name));
    }
    let cpus = config.topology.cpus();
    if let Some((vcpu, host)) = config.pins.iter().find(|(v, _)| *v >= cpus) {
        return usage(format!(
            "-p {vcpu}:{host}: there are only CPUs 0 to {}",
            cpus.saturating_sub(1)
        ));
    }
    if config.bvmcons && config.serial.contains(&Some(Spec::Stdio)) {
        return usage("-b: a serial port has standard input and output already");
    }
    Ok(())
}

/// `-c`.
fn topology(value: &str) -> Result<Topology, UsageError> {
    let bad = |why: &str| UsageError(format!("-c {value}: {why}"));
    let (mut cpus, mut t) = (
        None,
        Topology {
            sockets: 1,
            cores: 1,
            threads: 1,
        },
    );
    let mut shaped = false;
    for part in value.split(',').filter(|p| !p.is_empty()) {
        let (key, number) = part.split_once('=').unwrap_or(("cpus", part));
        let n: u16 = number
            .parse()
            .ok()
            .filter(|&n| n > 0)
            .ok_or_else(|| bad("counts go from 1 to 65535"))?;
        shaped |= key != "cpus";
        match key {
            "cpus" => cpus = Some(n),
            "sockets" => t.sockets = n,
            "cores" => t.cores = n,
            "threads" => t.threads = n,
            _ => return Err(bad("only cpus=, sockets=, cores= and threads= are known")),
        }
    }
    if !shaped {
        t.sockets = cpus.unwrap_or(1);
    }
    let all = u64::from(t.sockets) * u64::from(t.cores) * u64::from(t.threads);
    if all > u64::from(u16::MAX) {
        return Err(bad("more than 65535 CPUs"));
    }
    if cpus.is_some_and(|c| u64::from(c) != all) {
        return Err(bad(&format!("sockets × cores × threads is {all}")));
    }
    Ok(t)
}

/// `-m`: a number, MiB without a suffix; below 1 MiB's worth it is taken for
/// a count of MiB, as libvmmapi does.
fn memory_size(value: &str) -> Result<u64, UsageError> {
    let bad = || {
        UsageError(format!(
            "-m {value}: a size is a number with K, M, G or T, and at least 1M"
        ))
    };
    let digits = value.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match value.get(digits.len()..).unwrap_or_default() {
        "" => 20,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        "b" | "B" => 0,
        _ => return Err(bad()),
    };
    let n: u64 = digits.parse().map_err(|_| bad())?;
    let bytes = n.checked_mul(1 << shift).ok_or_else(bad)?;
    let bytes = if shift == 20 && digits.len() == value.len() && n >= 1 << 20 {
        n
    } else {
        bytes
    };
    if !(1 << 20..=1 << 45).contains(&bytes) {
        return Err(bad());
    }
    Ok(bytes.next_multiple_of(4096))
}

/// `--tsc-khz`.
fn tsc_khz(value: &str) -> Result<u32, UsageError> {
    match value.parse() {
        Ok(khz @ 1_000..) => Ok(khz),
        _ => usage(format!(
            "--tsc-khz {value}: a number of kHz from 1000 on, as 2400000"
        )),
    }
}

/// `-p vcpu:hostcpu`.
fn pin(value: &str) -> Result<(u32, usize), UsageError> {
    let parts = value
        .split_once(':')
        .and_then(|(v, h)| Some((v.parse().ok()?, h.parse().ok()?)));
    parts.ok_or_else(|| UsageError(format!("-p {value}: two CPU numbers, vcpu:hostcpu")))
}

/// `-s [bus:]slot[:function],emulation[,conf]`.
fn pci_slot(value: &str) -> Result<PciSlot, UsageError> {
    let bad = |why: &str| UsageError(format!("-s {value}: {why}"));
    let (place, device) = value
        .split_once(',')
        .ok_or_else(|| bad("a slot and an emulation, as in 0,hostbridge"))?;
    let (emulation, conf) = device.split_once(',').unwrap_or((device, ""));
    let (bus, slot, func) = settings::parse_place(place).ok_or_else(|| {
        bad("a place is slot, slot:function or bus:slot:function; slots go to 31 and functions to 7")
    })?;
    if catalog::find(emulation).is_none() {
        // libvirt looks for these words, slot and function only.
        return usage(format!(
            "pci slot {slot}:{func}: unknown device \"{emulation}\"; -s {value} can have {}",
            catalog::names()
        ));
    }
    Ok(PciSlot {
        at: Bdf { bus, slot, func },
        emulation: emulation.into(),
        conf: conf.into(),
    })
}

/// `-l bootrom,FILE[,VARIABLES][,fwcfg=KIND]`.
fn bootrom(value: &str, conf: &str) -> Result<BootRom, UsageError> {
    let mut words = conf.split(',');
    let mut firmware = match words.next() {
        None | Some("") => return usage(format!("-l {value}: which firmware? bootrom,FILE")),
        Some(file) => BootRom {
            rom: file.into(),
            variables: None,
            qemu: false,
        },
    };
    for word in words {
        match word {
            "fwcfg=bhyve" => firmware.qemu = false,
            "fwcfg=qemu" => firmware.qemu = true,
            file if !file.is_empty() && !file.contains('=') && firmware.variables.is_none() => {
                firmware.variables = Some(file.into());
            }
            _ => {
                return usage(format!(
                    "-l {value}: \"{word}\"? bootrom,FILE[,VARIABLES][,fwcfg=bhyve|qemu]"
                ));
            }
        }
    }
    Ok(firmware)
}

/// `-l`.
fn lpc_device(config: &mut Config, value: &str) -> Result<(), UsageError> {
    let (device, conf) = value.split_once(',').unwrap_or((value, ""));
    let unit = match device.to_ascii_lowercase().as_str() {
        "com1" => 0,
        "com2" => 1,
        "pc-testdev" => {
            config.testdev = true;
            return Ok(());
        }
        "bootrom" => {
            config.bootrom = Some(bootrom(value, conf)?);
            return Ok(());
        }
        _ => {
            return usage(format!(
                "invalid lpc device configuration '{value}': no LPC device \"{device}\"; \
                 there is com1, com2, pc-testdev, bootrom"
            ));
        }
    };
    let spec = Spec::from_str(conf).map_err(|e| UsageError(format!("-l {value}: {e}")))?;
    let taken = spec == Spec::Stdio
        && config
            .serial
            .iter()
            .enumerate()
            .any(|(i, s)| i != unit && *s == Some(Spec::Stdio));
    if taken {
        return usage(format!("-l {value}: stdio is already the other port's"));
    }
    if let Some(s) = config.serial.get_mut(unit) {
        *s = Some(spec);
    }
    Ok(())
}

/// A UUID of 32 digits, hyphens where they like.
fn uuid(value: &str) -> Result<[u8; 16], UsageError> {
    let digits: Vec<u8> = value
        .chars()
        .filter(|c| *c != '-')
        .filter_map(|c| c.to_digit(16).map(|d| d as u8))
        .collect();
    let valid = digits.len() == 32 && value.chars().all(|c| c == '-' || c.is_ascii_hexdigit());
    if !valid {
        return usage(format!("-U {value}: a UUID has 32 hexadecimal digits"));
    }
    let mut out = [0; 16];
    for (o, d) in out.iter_mut().zip(digits.chunks_exact(2)) {
        *o = d.iter().fold(0, |v, d| v << 4 | d);
    }
    Ok(out)
}

#[cfg(test)]
#[path = "cli_tests.rs"]
mod tests;
