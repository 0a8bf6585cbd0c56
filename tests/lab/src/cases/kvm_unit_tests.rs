//! kvm-unit-tests, where the image directory has them built: each must pass
//! whatever it passes on the bare emulator.

use crate::guest::{Guest, Load};
use crate::host::{Config, Host, SHORT};
use crate::images;
use crate::iso;
use crate::machine::Machine;
use crate::runner::{Case, Group, Lab};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Name, file, vCPUs, options for bhyve.
const TESTS: [(&str, &str, u32, &str); 14] = [
    ("setjmp", "setjmp", 1, ""),
    ("sieve", "sieve", 1, ""),
    ("memory", "memory", 1, ""),
    ("smap", "smap", 1, ""),
    ("idt_test", "idt_test", 1, ""),
    ("apic", "apic", 2, ""),
    ("x2apic", "apic", 2, "-x"),
    ("ioapic", "ioapic", 2, ""),
    ("eventinj", "eventinj", 1, ""),
    ("smptest", "smptest", 2, ""),
    ("tsc", "tsc", 1, ""),
    ("realmode", "realmode", 1, ""),
    ("emulator", "emulator", 1, ""),
    ("msr", "msr", 1, ""),
];

const MEMORY_MIB: u32 = 256;
const RUN: Duration = Duration::from_secs(600);

/// Two hosts, so that both workers have a share.
pub fn groups(lab: &Lab) -> Result<Vec<Group>> {
    let folder = images::find(&lab.dirs, "kvm-unit-tests");
    let (first, second) = TESTS.split_at(TESTS.len() / 2);
    Ok([("a", first), ("b", second)]
        .into_iter()
        .map(|(suffix, tests)| group(lab, folder.as_deref(), suffix, tests))
        .collect())
}

fn group(
    lab: &Lab,
    folder: Option<&Path>,
    suffix: &str,
    tests: &[(&'static str, &'static str, u32, &'static str)],
) -> Group {
    let mut config = Config::new(lab.engine, MEMORY_MIB);
    let mut cases = Vec::new();
    for &(test, file, vcpus, options) in tests {
        let name = format!("kvm-unit-tests-{test}");
        let path = folder.map(|f| f.join(format!("{file}.flat")));
        match path.filter(|p| p.is_file()) {
            None => cases.push(Case::skipped(
                name,
                format!("no kvm-unit-tests/{file}.flat in an image directory"),
            )),
            Some(path) => {
                config.file(&format!("kut/{file}.flat"), &path);
                cases.push(Case::new(name, move |lab, host| {
                    one(lab, host, test, file, &path, vcpus, options)
                }));
            }
        }
    }
    Group {
        name: format!("kvm-unit-tests-{suffix}"),
        config,
        cases,
    }
}

fn environment(vcpus: u32) -> String {
    format!("NR_CPUS={vcpus}\\nMEMSIZE={MEMORY_MIB}\\nMEMLIMIT={MEMORY_MIB}\\nTEST_DEVICE=1\\n")
}

fn one(
    lab: &Lab,
    host: &mut Host,
    test: &str,
    file: &str,
    path: &Path,
    vcpus: u32,
    options: &str,
) -> Result<()> {
    host.must(&format!("printf '{}' >/tmp/env", environment(vcpus)), SHORT)?;
    let mut guest = Guest::new(
        &format!("/kut/{file}.flat"),
        Load::Multiboot {
            modules: vec!["/tmp/env".to_owned()],
        },
    );
    guest.vcpus = vcpus;
    guest.memory_mib = MEMORY_MIB;
    guest.options = format!("-l pc-testdev {options}");
    // What the test before has left on the console is not this one's.
    host.guest().take(Duration::ZERO);
    guest.start(host)?;
    let status = wait(host)?;
    std::thread::sleep(Duration::from_millis(300));
    let console = host.guest().take(Duration::ZERO).unwrap_or_default();
    let console = String::from_utf8_lossy(&console).into_owned();
    guest.destroy(host)?;
    // The exit port gives (v << 1) | 1: 1 says that all is well.
    if status == 1 {
        return Ok(());
    }
    let failed = failures(&console);
    ensure!(
        status == 3 && !failed.is_empty(),
        "{test} ended with status {status}: {}",
        tail(&console)
    );
    let bare = on_bare(lab, test, path, vcpus)?;
    let new: Vec<&String> = failed.difference(&bare).collect();
    ensure!(
        new.is_empty(),
        "fails here and not on the bare emulator: {new:#?}"
    );
    Ok(())
}

fn wait(host: &mut Host) -> Result<i32> {
    let deadline = std::time::Instant::now() + RUN;
    loop {
        if let Some(status) = host.guest_exit(Duration::from_millis(200))? {
            return Ok(status);
        }
        ensure!(
            std::time::Instant::now() < deadline,
            "no end within {} s; console:\n{}",
            RUN.as_secs(),
            host.guest().tail()
        );
    }
}

fn failures(console: &str) -> BTreeSet<String> {
    console
        .lines()
        .filter(|l| l.starts_with("FAIL"))
        .map(|l| l.trim().to_owned())
        .collect()
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

/// The tests that fail on the emulator itself.
fn on_bare(lab: &Lab, test: &str, path: &Path, vcpus: u32) -> Result<BTreeSet<String>> {
    let dir = lab.dirs.fresh(&format!("bare-{test}"))?;
    let env: PathBuf = dir.join("env");
    std::fs::write(&env, environment(vcpus).replace("\\n", "\n"))?;
    let image = iso::build_multiboot(&dir, path, &env)?;
    let mut machine = Machine::start_cd(lab.engine, vcpus, MEMORY_MIB, &image, &dir)?;
    machine
        .com1
        .expect("SUMMARY: .*\n", RUN)
        .context("on the bare emulator")?;
    Ok(failures(&machine.com1.text()))
}
