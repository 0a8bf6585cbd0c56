//! Debian's kernel as a guest: to a shell, without complaints, and off.

use super::{config, lifecycle};
use crate::console::Console;
use crate::guest::{Guest, Load, linux_cmdline, shell};
use crate::host::{Config, Host, SHORT};
use crate::machine::Engine;
use crate::runner::{Case, Group, Lab, Shared};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::time::Duration;

/// From bhyve's start to the shell.
const UP: Duration = Duration::from_secs(240);
/// A command in the guest.
const COMMAND: Duration = Duration::from_secs(60);
/// Memory that the guest's kernel does not count as usable, KiB: itself, and
/// what its page structures and reserves take.
const KERNEL_KIB: u32 = 52 << 10;

/// How a guest's run ends.
#[derive(Debug, Clone, Copy)]
enum End {
    /// `poweroff` in the guest: ACPI's S5.
    PowerOff,
    /// `reboot` in the guest.
    Reboot,
    /// SIGTERM to bhyve, of whose power button this guest takes no notice.
    Terminate,
}

#[derive(Debug, Clone, Copy)]
struct Variant {
    vcpus: u32,
    x2apic: bool,
    end: End,
}

/// The host and its tests.
pub fn group(lab: &Lab) -> Group {
    let bare = Shared::default();
    let variants = [
        (1, false, End::PowerOff),
        (1, true, End::Reboot),
        (2, false, End::Terminate),
        (2, true, End::PowerOff),
    ];
    let cases = variants.map(|(vcpus, x2apic, end)| {
        let name = format!(
            "linux-{vcpus}-vcpu-{}",
            if x2apic { "x2apic" } else { "xapic" }
        );
        let bare = bare.clone();
        let variant = Variant { vcpus, x2apic, end };
        Case::new(name, move |lab, host| {
            boot(lab, lab.engine, host, variant, &bare)
        })
    });
    let mut cases = Vec::from(cases);
    cases.push(Case::new("linux-config-boot", |_, host| config::boot(host)));
    Group {
        name: "linux".to_owned(),
        config: config_with_guest(lab, lab.engine),
        cases,
    }
}

/// A host on `engine`, which is not the run's own, and a few tests: one of each kind of
/// CPU is enough for what takes long.
pub fn few(lab: &Lab, engine: Engine) -> Group {
    let variant = Variant {
        vcpus: 2,
        x2apic: true,
        end: End::PowerOff,
    };
    let bare = Shared::default();
    let mut cases = vec![Case::new(
        format!("{engine}-linux-2-vcpu-x2apic"),
        move |lab, host| boot(lab, engine, host, variant, &bare),
    )];
    cases.extend(lifecycle::few(engine));
    Group {
        name: format!("{engine}-linux"),
        config: config_with_guest(lab, engine),
        cases,
    }
}

fn config_with_guest(lab: &Lab, engine: Engine) -> Config {
    let mut config = Config::new(engine, 256);
    config.file("guest/kernel", &lab.kit.kernel.image);
    config.file("guest/root", &lab.kit.guest_initrd);
    config
}

/// Debian's kernel and our initramfs, as the host has them.
pub fn guest() -> Guest {
    Guest::new(
        "/guest/kernel",
        Load::Linux {
            initrd: Some("/guest/root".to_owned()),
            cmdline: linux_cmdline(),
        },
    )
}

fn boot(
    lab: &Lab,
    engine: Engine,
    host: &mut Host,
    v: Variant,
    bare: &Shared<BTreeSet<String>>,
) -> Result<()> {
    let mut guest = guest();
    guest.vcpus = v.vcpus;
    if engine.is_amd()
        && let Load::Linux { cmdline, .. } = &mut guest.load
    {
        // TCG's TSC and HPET are read at different times, and Linux's watchdog takes
        // that for a fault of the TSC; the bare emulator gets the same parameter.
        cmdline.push(' ');
        cmdline.push_str(&engine.kernel_parameters());
    }
    if v.x2apic {
        guest.options.push_str("-x");
    }
    guest.start(host)?;
    let console = host.guest();
    let up = console.expect(
        // The kernel may write on the same line.
        r"guest userland: Linux \S+, (\d+) CPUs, clocksource ([a-z-]+)[^a-z-]",
        UP,
    )?;
    ensure!(
        up.group(1) == v.vcpus.to_string(),
        "the guest sees {} CPUs, not {}",
        up.group(1),
        v.vcpus
    );
    ensure!(
        // The latter until it is measured.
        ["tsc", "tsc-early"].contains(&up.group(2)),
        "the guest's clocksource is {}, not tsc",
        up.group(2)
    );
    shell(console, COMMAND)?;
    memory(console, guest.memory_mib)?;
    // QEMU emulates no invariant TSC, and without one there is no such clock.
    if engine != Engine::Qemu {
        paravirtual(console, v.vcpus)?;
    }
    if v.vcpus > 1 {
        both_cpus(console)?;
        hotplug(console)?;
    }
    // What a kernel says of clocks depends on how busy this machine is, the less the
    // engine counts instructions: beside another engine's tests nobody asks.
    let complaints = if engine == lab.engine {
        complaints(console)?
    } else {
        BTreeSet::new()
    };
    if !complaints.is_empty() {
        let known = bare.get(|| on_bare(lab, engine))?;
        // Two vCPUs take turns at the host's one CPU: while the other has it, a timer's
        // interrupt takes long. And so does QEMU, where another process has its CPU.
        let taken = |c: &&String| {
            v.vcpus > 1 && c.starts_with(TURNS)
                || engine == Engine::Qemu && c.starts_with(INTERRUPTED)
        };
        let new: Vec<&String> = complaints
            .difference(&known)
            .filter(|c| !taken(c))
            .collect();
        ensure!(
            new.is_empty(),
            "the guest's kernel complains as it does not on the bare emulator: {new:#?}"
        );
    }
    let status = match v.end {
        End::PowerOff => {
            console.send(b"poweroff\r")?;
            1
        }
        End::Reboot => {
            console.send(b"reboot\r")?;
            0
        }
        End::Terminate => {
            host.must("kill $(pidof bhyve)", SHORT)?;
            1
        }
    };
    guest.expect_exit(host, status, COMMAND)?;
    guest.destroy(host)
}

/// What a shell line in the guest says.
fn ask(console: &mut Console, line: &str) -> Result<String> {
    // The quotes keep the echo of the line from looking like its output.
    console.send(format!("{line}; echo said-'all'\r").as_bytes())?;
    let said = console.expect("said-all", COMMAND)?.before;
    console.expect("guest# ", COMMAND)?;
    Ok(said)
}

/// The number behind `label` at the start of a line.
fn number(text: &str, label: &str) -> Result<u32> {
    text.lines()
        .find_map(|l| {
            l.trim()
                .strip_prefix(label)?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .with_context(|| format!("no number behind {label:?} in {text:?}"))
}

fn memory(console: &mut Console, mib: u32) -> Result<()> {
    let total = number(&ask(console, "cat /proc/meminfo")?, "MemTotal:")?;
    ensure!(
        (mib * 1024 - KERNEL_KIB..mib * 1024).contains(&total),
        "of {mib} MiB the guest sees {total} KiB"
    );
    Ok(())
}

/// The paravirtual interface is used, as far as Linux says so: the clock on
/// each CPU, IPIs with more than one.
fn paravirtual(console: &mut Console, vcpus: u32) -> Result<()> {
    let said = ask(console, "dmesg | grep -iE 'kvm-clock|PV IPIs'")?;
    let clock = said.contains("kvm-clock: Using msrs 4b564d01 and 4b564d00");
    let ipis = said.contains("setup PV IPIs");
    ensure!(
        clock && (ipis || vcpus == 1),
        "the guest does not use the paravirtual clock or IPIs: {said}"
    );
    Ok(())
}

/// A process bound to a CPU runs there.
fn runs_on(console: &mut Console, cpu: u32) -> Result<()> {
    // Field 39 of stat is the CPU that ran the process last.
    let line = format!("taskset {} cut -d' ' -f39 /proc/self/stat", 1 << cpu);
    let said = ask(console, &line)?;
    ensure!(
        said.lines().any(|l| l.trim() == cpu.to_string()),
        "a process bound to CPU {cpu} did not run there: {said}"
    );
    Ok(())
}

/// Both CPUs work, and get their timer's interrupts and each other's.
fn both_cpus(console: &mut Console) -> Result<()> {
    runs_on(console, 0)?;
    runs_on(console, 1)?;
    let interrupts = ask(console, "cat /proc/interrupts")?;
    for name in ["LOC:", "CAL:"] {
        let line = interrupts
            .lines()
            .find_map(|l| l.trim().strip_prefix(name))
            .with_context(|| format!("no {name} in {interrupts}"))?;
        let counts: Vec<u64> = line
            .split_whitespace()
            .map_while(|w| w.parse().ok())
            .collect();
        ensure!(
            counts.len() == 2 && counts.iter().all(|&n| n > 0),
            "{name} interrupts: {counts:?}"
        );
    }
    for name in ["ERR:", "MIS:"] {
        let count = number(&interrupts, name)?;
        ensure!(count == 0, "{count} interrupts counted as {name}");
    }
    Ok(())
}

/// CPU 1 goes, and comes back by INIT and a start-up IPI.
fn hotplug(console: &mut Console) -> Result<()> {
    for (value, cpus) in [(0, "CPUs 1"), (1, "CPUs 2")] {
        let said = ask(
            console,
            &format!("echo {value} >/sys/devices/system/cpu/cpu1/online; echo CPUs $(nproc)"),
        )?;
        ensure!(
            said.lines().any(|l| l.trim() == cpus),
            "after {value} to cpu1/online, not {cpus}: {said}"
        );
    }
    runs_on(console, 1)
}

/// What a kernel says whose timer's interrupt took long.
const TURNS: &str = "hrtimer: interrupt took";
/// What a kernel says whose measurement of the TSC was interrupted, five times.
const INTERRUPTED: &str = "tsc: Unable to calibrate against PIT";

/// Warnings and errors, and what else smells of a clock or an interrupt
/// controller gone wrong, without what varies from boot to boot.
fn complaints(console: &mut Console) -> Result<BTreeSet<String>> {
    let text = ask(
        console,
        "dmesg -r | grep -iE '^<[0-4]>|unstable|firmware bug|out of sync|could not|lockup'",
    )?;
    Ok(text
        .lines()
        .filter(|l| l.starts_with('<'))
        .map(|l| {
            let message = l.split_once("] ").map_or(l, |(_, m)| m);
            message
                .chars()
                .filter(|c| !c.is_ascii_digit())
                .collect::<String>()
                .trim()
                .to_owned()
        })
        .collect())
}

fn on_bare(lab: &Lab, engine: Engine) -> Result<BTreeSet<String>> {
    let name = format!("linux-bare-{engine}");
    let mut machine = lab.bare(&name, engine, 1, &linux_cmdline())?;
    machine.com1.expect("guest userland: ", UP)?;
    shell(&mut machine.com1, COMMAND)?;
    complaints(&mut machine.com1)
}
