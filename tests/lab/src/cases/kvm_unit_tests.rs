//! kvm-unit-tests, where the image directory has them built. docs/conformance.md
//! compares with the bare emulator.

use crate::guest::{Guest, Load};
use crate::host::{Config, Host, SHORT};
use crate::images;
use crate::machine::Engine;
use crate::runner::{Case, Group, Lab};
use anyhow::{Result, ensure};
use std::path::Path;
use std::time::Duration;

/// A program to run.
#[derive(Debug, Clone, Copy)]
struct Test {
    name: &'static str,
    file: &'static str,
    vcpus: u32,
    /// For bhyve.
    options: &'static str,
}

const fn test(name: &'static str, file: &'static str, vcpus: u32, options: &'static str) -> Test {
    Test {
        name,
        file,
        vcpus,
        options,
    }
}

/// xapic has one vCPU: with two it sends 10,000 IPIs and waits a million ticks
/// for each.
const ONE: [Test; 10] = [
    test("setjmp", "setjmp", 1, ""),
    test("memory", "memory", 1, ""),
    test("smap", "smap", 1, ""),
    test("idt_test", "idt_test", 1, ""),
    test("eventinj", "eventinj", 1, ""),
    test("tsc", "tsc", 1, ""),
    test("realmode", "realmode", 1, ""),
    test("emulator", "emulator", 1, ""),
    test("msr", "msr", 1, ""),
    test("xapic", "apic", 1, ""),
];

/// vCPUs that wait for each other in loops without PAUSE, so each has a CPU.
const TWO: [Test; 3] = [
    test("smptest", "smptest", 2, ""),
    test("ioapic", "ioapic", 2, ""),
    test("x2apic", "apic", 2, "-x"),
];

/// Takes as long as all others.
const LONG: [Test; 1] = [test("sieve", "sieve", 1, "")];

const MEMORY_MIB: u32 = 256;
const RUN: Duration = Duration::from_secs(600);

/// A host for each kind.
pub fn groups(lab: &Lab) -> Result<Vec<Group>> {
    let folder = images::find(&lab.dirs, "kvm-unit-tests");
    let kinds: [(&str, u32, &[Test]); 3] = [("1", 1, &ONE), ("2", 2, &TWO), ("sieve", 1, &LONG)];
    Ok(kinds
        .into_iter()
        .map(|(suffix, cpus, tests)| group(lab, folder.as_deref(), suffix, cpus, tests))
        .collect())
}

fn group(lab: &Lab, folder: Option<&Path>, suffix: &str, cpus: u32, tests: &[Test]) -> Group {
    let mut config = Config::new(lab.engine, MEMORY_MIB);
    config.cpus = cpus;
    let mut cases = Vec::new();
    for &test in tests {
        let Test { name, file, .. } = test;
        let name = format!("kvm-unit-tests-{name}");
        let path = folder.map(|f| f.join(format!("{file}.flat")));
        match path.filter(|p| p.is_file()) {
            None => cases.push(Case::skipped(
                name,
                format!("no kvm-unit-tests/{file}.flat in an image directory"),
            )),
            Some(path) => {
                config.file(&format!("kut/{file}.flat"), &path);
                cases.push(Case::new(name, move |lab, host| one(lab, host, test)));
            }
        }
    }
    Group {
        name: format!("kvm-unit-tests-{suffix}"),
        config,
        cases,
    }
}

fn one(lab: &Lab, host: &mut Host, test: Test) -> Result<()> {
    let Test {
        name,
        file,
        vcpus,
        options,
    } = test;
    // With a test device, apic makes a hypercall of KVM's; on AMD-V that has
    // not been run yet.
    let device = u32::from(file != "apic" || lab.engine != Engine::Qemu);
    let environment = format!(
        "NR_CPUS={vcpus}\\nMEMSIZE={MEMORY_MIB}\\nMEMLIMIT={MEMORY_MIB}\\nTEST_DEVICE={device}\\n"
    );
    host.must(&format!("printf '{environment}' >/tmp/env"), SHORT)?;
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
    let failed: Vec<&str> = console.lines().filter(|l| l.starts_with("FAIL")).collect();
    ensure!(
        status == 1 && failed.is_empty() && console.contains(last_words(file)),
        "{name} ended with status {status}, {failed:#?}: {}",
        tail(&console)
    );
    Ok(())
}

/// What the program says when it has come to its end.
fn last_words(file: &str) -> &'static str {
    match file {
        "realmode" => "PASS: xadd",
        // The primes below 10^8.
        "sieve" => "virtual:5761455 out of 100000000",
        _ => "SUMMARY: ",
    }
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

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}
