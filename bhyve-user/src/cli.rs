//! bhyve(8)'s command line.

use std::str::FromStr;

use crate::config::{Config, PciSlot, Topology};
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
Usage: bhyve [-aACehHPSuvwWxY]
             [-c [[cpus=]numcpus][,sockets=n][,cores=n][,threads=n]] [-K layout]
             [-l lpcdev[,conf]] [-m memsize[K|M|G|T]] [-p vcpu:hostcpu]
             [-s [bus:]slot[:function],emulation[,conf]] [-U uuid]
             [--exit-stats file] vmname
       -a: local APIC is in xAPIC mode (the default)
       -A: create ACPI tables
       -c: number of CPUs and/or their topology
       -C: include guest memory in core files
       -e: exit on access to an I/O port that nobody emulates
       -h: help
       -H: leave the guest on HLT (always so here: an idle guest sleeps)
       -K: keyboard layout of VNC, without effect here
       -l: LPC device: com1, com2 (stdio, pty, /dev/TTY, file:PATH, unix:PATH,
           tcp=ADDRESS:PORT), pc-testdev; \"-l help\" lists them
       -m: memory size, in MiB without a suffix (256M)
       -p: pin a virtual CPU to a host CPU
       -P: leave the guest on PAUSE
       -s: PCI slot; \"-s help\" lists the emulations. A disk is
           virtio-blk,PATH[,ro][,sync][,nocache][,nodelete][,serial=ID]
           [,sectorsize=LOGICAL[/PHYSICAL]], PATH a raw file or a block device
       -S: wire guest memory
       -u: RTC keeps UTC
       -U: UUID
       -v: say at the end what the guest was left for
       -w: ignore accesses to MSRs that nobody emulates
       -W: virtio uses MSI instead of MSI-X
       -x: local APIC is in x2APIC mode
       -Y: no MP table
       --exit-stats: write the counts of -v as JSON
Exit status: 0 reset, 1 powered off, 2 halted, 3 triple fault, 4 error.
";

/// Parses the arguments after the program's name.
pub fn parse(args: impl IntoIterator<Item = String>) -> Result<Command, UsageError> {
    let mut args = args.into_iter();
    let mut config = Config::new("");
    let mut names: Vec<String> = Vec::new();
    let mut options = true;
    while let Some(arg) = args.next() {
        match arg.strip_prefix('-') {
            Some("-") if options => options = false,
            Some("-help") if options => return Ok(Command::Print(USAGE.into())),
            Some(long) if options && long.starts_with('-') => {
                long_option(&mut config, long, &mut args)?
            }
            Some(short) if options && !short.is_empty() => {
                if let Some(command) = short_options(&mut config, short, &mut args)? {
                    return Ok(command);
                }
            }
            // As getopt(3) has it, the first operand ends the options.
            _ => {
                options = false;
                names.push(arg);
            }
        }
    }
    match names.as_slice() {
        [name] => config.name.clone_from(name),
        [] => return usage("which VM? Its name comes last"),
        [_, extra, ..] => {
            return usage(format!(
                "\"{extra}\" after the VM's name: options come first"
            ));
        }
    }
    check(&config)?;
    Ok(Command::Run(Box::new(config)))
}

fn long_option(
    config: &mut Config,
    long: &str,
    args: &mut impl Iterator<Item = String>,
) -> Result<(), UsageError> {
    let (name, value) = match long.split_once('=') {
        Some((n, v)) => (n, Some(v.to_owned())),
        None => (long, None),
    };
    match name {
        "-exit-stats" => {
            let file = value.or_else(|| args.next());
            config.exit_stats = Some(
                file.ok_or_else(|| UsageError("--exit-stats needs a file".into()))?
                    .into(),
            );
            Ok(())
        }
        "-config" => usage("--config: configuration files are not supported"),
        _ => usage(format!("-{name}: no such option")),
    }
}

fn short_options(
    config: &mut Config,
    flags: &str,
    args: &mut impl Iterator<Item = String>,
) -> Result<Option<Command>, UsageError> {
    let mut rest = flags.chars();
    while let Some(flag) = rest.next() {
        if "cGgkKlmnopsU".contains(flag) {
            let attached = rest.as_str();
            let value = if attached.is_empty() {
                args.next()
            } else {
                Some(attached.to_owned())
            };
            let value = value.ok_or_else(|| UsageError(format!("-{flag} needs an argument")))?;
            return Ok(with_value(config, flag, &value)?.map(Command::Print));
        }
        match flag {
            'a' => config.x2apic = false,
            'A' => config.acpi = true,
            'C' => config.core_memory = true,
            'e' => config.strict_io = true,
            'h' => return Ok(Some(Command::Help(USAGE.into()))),
            'H' => config.halt_exits = true,
            // Asked for an I/O APIC once; there is always one.
            'I' => {}
            'P' => config.pause_exits = true,
            'S' => config.wired = true,
            'u' => config.utc = true,
            'v' => config.verbose = true,
            'w' => config.strict_msr = false,
            'W' => config.virtio_msi = true,
            'x' => config.x2apic = true,
            'Y' => config.mptable = false,
            'b' | 'B' | 'D' | 'M' => {
                return usage(format!(
                    "-{flag}: not supported; the console is a 16550, see -l com1,stdio"
                ));
            }
            _ => return usage(format!("-{flag}: no such option")),
        }
    }
    Ok(None)
}

fn with_value(config: &mut Config, flag: char, value: &str) -> Result<Option<String>, UsageError> {
    match flag {
        'c' => config.topology = topology(value)?,
        'g' | 'G' => return usage(format!("-{flag} {value}: there is no debug server")),
        // The keyboard of a VNC client, where there is a frame buffer.
        'K' => {}
        'n' => return usage(format!("-{flag} {value}: there are no NUMA domains")),
        'k' | 'o' => {
            return usage(format!(
                "-{flag} {value}: configuration files are not supported"
            ));
        }
        'l' if value == "help" => return Ok(Some("com1\ncom2\npc-testdev\n".into())),
        'l' => lpc_device(config, value)?,
        'm' => config.memory = memory_size(value)?,
        'p' => config.pins.push(pin(value)?),
        's' if value == "help" => return Ok(Some(catalog::help())),
        's' => {
            let slot = pci_slot(value)?;
            if config.slots.iter().any(|s| s.at == slot.at) {
                return usage(format!("-s {value}: {} is already occupied", slot.at));
            }
            config.slots.push(slot);
        }
        _ => config.uuid = Some(uuid(value)?),
    }
    Ok(None)
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
    let numbers: Option<Vec<u8>> = place.split(':').map(|n| n.parse().ok()).collect();
    let (bus, slot, func) = match numbers.as_deref() {
        Some([slot]) => (0, *slot, 0),
        Some([slot, func]) => (0, *slot, *func),
        Some([bus, slot, func]) => (*bus, *slot, *func),
        _ => return Err(bad("a place is slot, slot:function or bus:slot:function")),
    };
    if slot > 31 || func > 7 {
        return Err(bad("slots go to 31 and functions to 7"));
    }
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
            // libvirt looks for the first words.
            return usage(format!(
                "invalid lpc device configuration '{value}': there is no boot ROM here; \
                 load the guest's kernel with bhyveload"
            ));
        }
        _ => {
            return usage(format!(
                "invalid lpc device configuration '{value}': no LPC device \"{device}\"; \
                 there is com1, com2, pc-testdev"
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
