//! Debian's kernel as a guest: to a shell, without complaints, and off.

use crate::console::Console;
use crate::guest::{Guest, Load, linux_cmdline};
use crate::host::{Config, Host};
use crate::runner::{Case, Group, Lab, Shared};
use anyhow::{Result, ensure};
use std::collections::BTreeSet;
use std::time::Duration;

/// From bhyve's start to the shell.
const UP: Duration = Duration::from_secs(240);
/// A command in the guest.
const COMMAND: Duration = Duration::from_secs(60);

/// The host and its tests.
pub fn group(lab: &Lab) -> Group {
    let mut config = Config::new(lab.engine, 256);
    config.file("guest/kernel", &lab.kit.kernel.image);
    config.file("guest/root", &lab.kit.guest_initrd);
    let bare = Shared::default();
    let mut cases = Vec::new();
    for vcpus in [1, 2] {
        for x2apic in [false, true] {
            let name = format!(
                "linux-{vcpus}-vcpu-{}",
                if x2apic { "x2apic" } else { "xapic" }
            );
            let bare = bare.clone();
            cases.push(Case::new(name, move |lab, host| {
                boot_and_power_off(lab, host, vcpus, x2apic, &bare)
            }));
        }
    }
    Group {
        name: "linux".to_owned(),
        config,
        cases,
    }
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

fn boot_and_power_off(
    lab: &Lab,
    host: &mut Host,
    vcpus: u32,
    x2apic: bool,
    bare: &Shared<BTreeSet<String>>,
) -> Result<()> {
    let mut guest = guest();
    guest.vcpus = vcpus;
    if x2apic {
        guest.options.push_str("-x");
    }
    guest.start(host)?;
    let console = host.guest();
    let up = console.expect(
        r"guest userland: Linux \S+, (\d+) CPUs, clocksource (\w+)\r?\n",
        UP,
    )?;
    ensure!(
        up.group(1) == vcpus.to_string(),
        "the guest sees {} CPUs, not {vcpus}",
        up.group(1)
    );
    ensure!(
        up.group(2) == "tsc",
        "the guest's clocksource is {}, not tsc",
        up.group(2)
    );
    let complaints = complaints(console)?;
    if !complaints.is_empty() {
        let known = bare.get(|| on_bare(lab))?;
        let new: Vec<&String> = complaints.difference(&known).collect();
        ensure!(
            new.is_empty(),
            "the guest's kernel complains as it does not on the bare emulator: {new:#?}"
        );
    }
    host.guest().send(b"poweroff\r")?;
    guest.expect_exit(host, 1, COMMAND)?;
    guest.destroy(host)
}

/// Warnings and errors about time and interrupts, without what varies from
/// boot to boot.
fn complaints(console: &mut Console) -> Result<BTreeSet<String>> {
    console.expect("guest# ", COMMAND)?;
    // The quotes keep the echo of the line from looking like its output.
    console.send(
        b"dmesg -r | grep '^<[0-4]>' | grep -iE 'apic|tsc|clocksource|timer|nmi|hpet|lockup'; echo complaints-'end'\r",
    )?;
    let text = console.expect("complaints-end", COMMAND)?.before;
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

fn on_bare(lab: &Lab) -> Result<BTreeSet<String>> {
    let mut machine = lab.bare("linux-bare", 1, &linux_cmdline())?;
    machine.com1.expect("guest userland: ", UP)?;
    complaints(&mut machine.com1)
}
