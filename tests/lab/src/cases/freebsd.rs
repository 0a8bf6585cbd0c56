//! FreeBSD 12.1, unpatched, from a memory-disk root to power-off.

use super::{debug_port, disk, guest_drivers};
use crate::guest::{Guest, Load};
use crate::host::{Config, Host};
use crate::images;
use crate::machine::Engine;
use crate::runner::{Case, Group, Lab};
use anyhow::{Result, ensure};
use std::time::Duration;

/// The host and its tests.
pub fn group(lab: &Lab) -> Group {
    let mut config = Config::new(lab.engine, 256);
    let names = [1, 2].map(|vcpus| (vcpus, format!("freebsd-{vcpus}-vcpu")));
    let mut cases: Vec<Case> = match images::local_freebsd(&lab.dirs) {
        None => {
            let why = "no freebsd-12.1-smp.kernel in an image directory";
            names
                .map(|(_, name)| Case::skipped(name, why))
                .into_iter()
                .collect()
        }
        Some(image) => {
            config.file("guest/kernel", &image.kernel);
            if let Some(root) = &image.mfsroot {
                config.file("guest/root", root);
            }
            let root = image.mfsroot.is_some();
            let drivers = root.then(|| guest_drivers::case(lab, &mut config));
            let debugged = root.then(|| debug_port::case(lab, &mut config));
            names
                .map(|(vcpus, name)| {
                    Case::new(name, move |lab, host| to_power_off(lab, host, vcpus, root))
                })
                .into_iter()
                .chain(drivers)
                .chain(debugged)
                .collect()
        }
    };
    let (case, image) = disk::case(lab);
    if let Some((name, path)) = image {
        config.file(name, &path);
    }
    cases.push(case);
    Group {
        name: "freebsd".to_owned(),
        config,
        cases,
    }
}

fn to_power_off(lab: &Lab, host: &mut Host, vcpus: u32, root: bool) -> Result<()> {
    let mut guest = Guest::new(
        "/guest/kernel",
        Load::FreeBsd {
            mfsroot: root.then(|| "/guest/root".to_owned()),
            modules: Vec::new(),
        },
    );
    guest.vcpus = vcpus;
    // The memory disk's /etc/rc obeys it.
    guest.environment.push("bhyvers.poweroff=1".to_owned());
    guest.start(host)?;
    let console = host.guest();
    let up = console.expect(
        r"(?s)FreeBSD 12\.1.*timecounter\.hardware: (\S+).*clock_gettime\(CLOCK_MONOTONIC\) mean=(\d+).*GUEST UP ncpu=(\d+)",
        Duration::from_secs(300),
    )?;
    // With more than one CPU, FreeBSD 12.1 takes no TSC under any hypervisor
    // (test_tsc in sys/x86/x86/tsc.c), with one only an invariant one, which QEMU has not.
    let tsc = vcpus == 1 && lab.engine != Engine::Qemu;
    let timecounter = if tsc { "TSC" } else { "HPET" };
    ensure!(
        up.group(1) == timecounter,
        "the guest's timecounter is {}, not {timecounter}",
        up.group(1)
    );
    let clock: u32 = up.group(2).parse()?;
    ensure!(
        clock <= 300 || !tsc,
        "clock_gettime takes {clock} instructions"
    );
    ensure!(
        up.group(3) == vcpus.to_string(),
        "the guest has {} CPUs, not {vcpus}",
        up.group(3)
    );
    guest.expect_exit(host, 1, Duration::from_secs(120))?;
    guest.destroy(host)
}
