//! The drivers of guest-patches, in FreeBSD 12.1 with two vCPUs.

use crate::command::output;
use crate::guest::{Guest, Load};
use crate::host::{Config, Host};
use crate::machine::Engine;
use crate::runner::{Case, Lab};
use crate::{apt, images, kmod_freebsd};
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// In the order in which they are loaded; the last measures.
const DRIVERS: [&str; 3] = ["pvclock", "pvapic", "pvbench"];
const NAME: &str = "freebsd-drivers";

/// The test, and the drivers in the host's file system; skipped where there is
/// nothing to build them against.
pub fn case(lab: &Lab, config: &mut Config) -> Case {
    let Some(sys) = images::find(&lab.dirs, "host/sys") else {
        return Case::skipped(
            NAME,
            "no host/sys (FreeBSD's sources) in an image directory",
        );
    };
    if lab.engine == Engine::Qemu {
        return Case::skipped(NAME, "QEMU emulates no invariant TSC, which pvclock needs");
    }
    match build(lab, &sys) {
        Ok(modules) => {
            for (name, module) in DRIVERS.iter().zip(&modules) {
                config.file(&format!("guest/{name}.ko"), module);
            }
            Case::new(NAME, |_, host| run(host))
        }
        // The failure is the test's.
        Err(e) => Case::new(NAME, move |_, _| Err(anyhow::anyhow!("{e:#}"))),
    }
}

/// Builds the drivers.
///
/// # Errors
/// The script refuses, or the compiler.
fn build(lab: &Lab, sys: &Path) -> Result<Vec<PathBuf>> {
    apt::ensure_installed(&kmod_freebsd::PACKAGES)?;
    let out = lab.dirs.fresh("guest-patches")?;
    output(
        Command::new("sh")
            .arg(lab.dirs.root.join("guest-patches/build"))
            .arg("--sys")
            .arg(sys)
            .arg("--out")
            .arg(&out)
            .args(DRIVERS),
    )
    .context("guest-patches/build")?;
    Ok(DRIVERS
        .iter()
        .map(|name| out.join(format!("{name}.ko")))
        .collect())
}

fn run(host: &mut Host) -> Result<()> {
    let mut guest = Guest::new(
        "/guest/kernel",
        Load::FreeBsd {
            mfsroot: Some("/guest/root".to_owned()),
            modules: DRIVERS.map(|name| format!("/guest/{name}.ko")).to_vec(),
        },
    );
    guest.vcpus = 2;
    guest.environment.push("bhyvers.poweroff=1".to_owned());
    guest.start(host)?;
    let up = host.guest().expect(
        r"(?s)pvapic:( end of interrupt)? IPIs.*pvclock: TSC at (\d+) Hz.*pvbench: tlb-shootdown (\d+).*timecounter\.hardware: (\S+).*clock_gettime\(CLOCK_MONOTONIC\) mean=(\d+).*GUEST UP ncpu=2",
        Duration::from_secs(300),
    )?;
    ensure!(
        up.group(4) == "pvclock",
        "the guest's timecounter is {}, not pvclock",
        up.group(4)
    );
    // 2,824 with the HPET that it takes of itself.
    let clock: u32 = up.group(5).parse()?;
    ensure!(clock <= 300, "clock_gettime takes {clock} instructions");
    guest.expect_exit(host, 1, Duration::from_secs(120))?;
    guest.destroy(host)
}
