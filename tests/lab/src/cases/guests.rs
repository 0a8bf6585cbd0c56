//! Our own small guests (tests/guests), each for one question.

use crate::guest::{Guest, Load};
use crate::host::{Config, Host, SHORT};
use crate::machine::Engine;
use crate::progress::step;
use crate::runner::{Case, Group, Lab};
use crate::{baseline, exitcost, first_exit, kmod, size};
use anyhow::{Context, Result, ensure};
use std::path::PathBuf;
use std::time::Duration;

/// bhyve(8)'s exit status for a power-off.
const POWERED_OFF: i32 = 1;
/// bhyve(8)'s exit status for a triple fault.
const TRIPLE_FAULT: i32 = 3;
/// A guest's whole run.
const RUN: Duration = Duration::from_secs(120);
/// Where the program that times a VM's first exit is in the host.
const FIRST_EXIT: &str = "tools/first-exit";
/// Pages of 2 MiB to which `fetch` writes code, and that it is linked to and lies on.
const FETCH_AREAS: u64 = 8 + 2;
/// Where the module of the Debian package is in the host.
const DKMS: &str = "dkms/vmm.ko";
/// Host instructions that a CPUID exit may cost with VT-x, and with AMD-V on a CPU
/// that does not tell the instruction's length.
const CPUID_COST: u64 = 300;
const CPUID_COST_AMD: u64 = 1000;

/// Name and vCPUs.
const CHECKS: [(&str, u32); 6] = [
    ("apic", 2),
    ("exceptions", 1),
    ("msr", 1),
    ("xsave", 1),
    ("xsave", 2),
    ("hlt", 2),
];

/// The host on `engine` and its tests. On an engine that is not the run's own
/// they are fewer: one of each kind of CPU is enough for what takes long.
///
/// # Errors
/// A program does not compile.
pub fn group(lab: &Lab, engine: Engine) -> Result<Group> {
    let own = engine == lab.engine;
    let prefix = if own {
        String::new()
    } else {
        format!("{engine}-")
    };
    let mut config = Config::new(engine, 128);
    // They count instructions, and set timers to a few thousand of them.
    config.count_instructions = true;
    for guest in &lab.kit.guests {
        config.file(&format!("guests/{}", name(guest)), guest);
    }
    let mut cases = vec![Case::new(format!("{prefix}guest-preload"), preload)];
    for (guest, vcpus) in CHECKS {
        // It reads the TSC without end, which QEMU is slow at while it counts.
        if guest == "xsave" && !own {
            continue;
        }
        let name = match vcpus {
            1 => format!("{prefix}guest-{guest}"),
            n => format!("{prefix}guest-{guest}-{n}"),
        };
        cases.push(Case::new(name, move |_, host| {
            let mut spec = small(guest);
            spec.vcpus = vcpus;
            if engine.is_amd() {
                spec.environment.push("guest.tcg=1".to_owned());
            }
            // The guest insists on its other CPUs.
            spec.environment.push(format!("guest.cpus={vcpus}"));
            passes(host, &spec).map(drop)
        }));
    }
    cases.push(Case::new(
        format!("{prefix}guest-tsc-rate"),
        move |_, host| tsc_rate(engine, host),
    ));
    cases.push(Case::new(
        format!("{prefix}guest-triple-fault"),
        triple_fault,
    ));
    let name = format!("{prefix}guest-exit-cost");
    cases.push(Case::new(name, move |lab, host| {
        exit_cost(lab, engine, host)
    }));
    if own && engine.counts_instructions() {
        let program = step("first-exit", || first_exit::build(&lab.dirs))?;
        config.file(FIRST_EXIT, &program);
        cases.push(Case::new("vm-first-exit", vm_first_exit));
        cases.push(Case::new("size", sizes));
        let module = step("vmm.ko for DKMS", || {
            kmod::dkms(&lab.dirs, &lab.kit.kernel.headers)
        })?;
        config.file(DKMS, &module);
        cases.push(Case::new("guest-fetch", fetch));
        cases.push(Case::new("dkms-module", dkms_module));
    }
    Ok(Group {
        name: format!("{prefix}guests"),
        config,
        cases,
    })
}

fn name(path: &std::path::Path) -> String {
    path.file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// A guest of ours by its name, with 128 MiB.
pub fn small(guest: &str) -> Guest {
    let load = Load::FreeBsd {
        mfsroot: None,
        modules: Vec::new(),
    };
    let mut spec = Guest::new(&format!("/guests/{guest}"), load);
    spec.memory_mib = 128;
    spec
}

/// A guest whose TSC is faster than the host's, and one whose TSC is slower: the rate,
/// and deadlines by it. QEMU's AMD-V has no TSC ratio, which is said.
fn tsc_rate(engine: Engine, host: &mut Host) -> Result<()> {
    for khz in [130_000, 20_000] {
        let mut spec = small("hlt");
        spec.vcpus = 2;
        spec.environment.push("guest.cpus=2".to_owned());
        spec.environment.push(format!("guest.tsc_khz={khz}"));
        spec.options = format!("--tsc-khz {khz}");
        if engine != Engine::Qemu {
            let said = passes(host, &spec)?;
            ensure!(
                said.contains("the TSC's rate is the one asked for")
                    && said.contains("CPUID says it"),
                "the guest did not look at its rate:\n{said}"
            );
            continue;
        }
        spec.start(host)?;
        spec.expect_exit(host, 4, SHORT)?;
        let error = host.must("cat /tmp/bhyve.err", SHORT)?;
        ensure!(error.contains("nor a TSC ratio"), "{error}");
        spec.destroy(host)?;
    }
    Ok(())
}

/// Runs a guest to its verdict and power-off; returns what it said.
///
/// # Errors
/// It fails, or does not end.
pub fn passes(host: &mut Host, guest: &Guest) -> Result<String> {
    guest.start(host)?;
    let console = host.guest();
    let verdict = console.expect(r"(?m)^(PASS|FAIL|panic: .*)\r?$", RUN)?;
    let text = verdict.before.clone();
    if verdict.group(1) != "PASS" {
        let bad: Vec<&str> = text
            .lines()
            .filter(|l| l.contains("FAIL") || l.contains("panic"))
            .collect();
        // The guest's own end, so that the VM can go.
        host.run("bhyvectl --destroy --vm=guest", SHORT)?;
        anyhow::bail!("the guest says:\n{}", bad.join("\n"));
    }
    guest.expect_exit(host, POWERED_OFF, SHORT)?;
    guest.destroy(host)?;
    Ok(text)
}

/// The loader's hand-over, with a root, a module and the user's variables.
fn preload(_: &Lab, host: &mut Host) -> Result<()> {
    host.must(
        "printf 123456789 >/tmp/root.img; printf hello >/tmp/some.file",
        SHORT,
    )?;
    let mut guest = small("preload");
    guest.load = Load::FreeBsd {
        mfsroot: Some("/tmp/root.img".to_owned()),
        modules: vec!["/tmp/some.file,type=some_type".to_owned()],
    };
    guest.environment.push("lab.answer=42 and more".to_owned());
    let text = passes(host, &guest)?;
    let line = |wanted: &[&str]| {
        text.lines()
            .any(|l| wanted.iter().all(|w| l.contains(w)))
            .then_some(())
            .with_context(|| format!("no line with {wanted:?} in:\n{text}"))
    };
    // CRC-32 of "123456789" and of "hello".
    line(&["preload: file", "root.img md_image 9 cbf43926"])?;
    line(&["preload: file", "some.file some_type 5 3610a686"])?;
    line(&["preload: env lab.answer=42 and more"])
}

fn triple_fault(_: &Lab, host: &mut Host) -> Result<()> {
    let guest = small("triple");
    guest.start(host)?;
    host.guest().expect("triple: now", RUN)?;
    guest.expect_exit(host, TRIPLE_FAULT, SHORT)?;
    guest.destroy(host)
}

fn exit_cost(lab: &Lab, engine: Engine, host: &mut Host) -> Result<()> {
    let text = passes(host, &small("exitcost"))?;
    if engine == Engine::Bochs {
        // A timer that is near is waited for awake: far less than to sleep and be woken.
        let costs = exitcost::costs(&text)?;
        let cost = |name| costs.iter().find(|c| c.0.name == name).map(|c| c.1);
        let (soon, wake) = (cost("exit_hlt_soon"), cost("exit_hlt_wake"));
        ensure!(
            soon.context("no HLT_SOON")? * 2.0 < wake.context("no HLT_WAKE")?,
            "a vCPU sleeps for a timer that is near: {soon:?} against {wake:?}"
        );
        let counts: Vec<(&str, f64)> = costs
            .into_iter()
            .filter_map(|(kind, cost)| kind.exact.then_some((kind.name, cost)))
            .collect();
        baseline::check(&lab.dirs.root, "exits", &counts)?;
    }
    cpuid_cost(engine, &text)
}

/// What a CPUID exit costs by what `exitcost` has said.
fn cpuid_cost(engine: Engine, text: &str) -> Result<()> {
    let minimum = text
        .lines()
        .find_map(|l| l.strip_prefix("exitcost CPUID ")?.split_whitespace().next())
        .context("exitcost has not measured CPUID")?;
    let minimum: u64 = minimum.parse()?;
    let bar = match engine {
        Engine::Bochs => CPUID_COST,
        Engine::Qemu => CPUID_COST_AMD,
        // Its ticks are no instructions.
        Engine::Kvm => return Ok(()),
    };
    ensure!(
        minimum <= bar,
        "a CPUID exit costs {minimum} instructions of the host, more than {bar}"
    );
    Ok(())
}

/// What is installed is small.
fn sizes(lab: &Lab, _: &mut Host) -> Result<()> {
    size::module(&lab.kit.module)?;
    let bhyve = lab.kit.programs.iter().find(|p| p.ends_with("bhyve"));
    size::bhyve(bhyve.context("no bhyve was built")?)
}

/// What it takes from no VM to its first exit in userland, by the committed
/// baseline.
fn vm_first_exit(lab: &Lab, host: &mut Host) -> Result<()> {
    let line = format!("chmod +x /{FIRST_EXIT} && /{FIRST_EXIT} vmm");
    let count = first_exit::instructions(&host.must(&line, SHORT)?)?;
    baseline::check(&lab.dirs.root, "first-exit", &[("first_exit", count)])
}

/// Large EPT pages that are not executable (CVE-2018-12207) become small ones that are where
/// the guest executes: each of its areas is an EPT violation more.
fn fetch(_: &Lab, host: &mut Host) -> Result<()> {
    let mut violations = |option: &str| {
        host.unload_vmm()?;
        host.load_vmm(option)?;
        let guest = small("fetch");
        guest.start(host)?;
        let verdict = host
            .guest()
            .expect(r"(?m)^(PASS|FAIL|panic: .*)\r?$", RUN)?;
        let passed = verdict.group(1) == "PASS";
        ensure!(passed, "the guest says:\n{}", verdict.before);
        guest.expect_exit(host, POWERED_OFF, SHORT)?;
        let stats = host.stats("guest", 1)?;
        guest.destroy(host)?;
        let count = stats.get("vm exits due to nested page fault").copied();
        count.context("no count of EPT violations")
    };
    let whole = violations("nx_huge_pages=0");
    let whole = whole?;
    let split = violations("nx_huge_pages=1")?;
    host.unload_vmm()?;
    host.load_vmm("")?;
    println!("EPT violations: {whole}, with nx_huge_pages {split}");
    ensure!(
        whole < split && split <= whole + FETCH_AREAS,
        "EPT violations: {whole}, with nx_huge_pages {split}, which has {FETCH_AREAS} areas to split"
    );
    Ok(())
}

/// The module of the Debian package, with the kernel's thunks for its returns and indirect
/// calls, runs guests as the other does.
fn dkms_module(lab: &Lab, host: &mut Host) -> Result<()> {
    let engine = lab.engine;
    host.unload_vmm()?;
    host.load_vmm_from(&format!("/{DKMS}"), "")?;
    let ran = passes(host, &small("exceptions"))
        .and_then(|_| passes(host, &small("exitcost")))
        .and_then(|text| cpuid_cost(engine, &text));
    ran?;
    host.unload_vmm()?;
    host.load_vmm("")?;
    let complaints = host.run("dmesg | grep -i \"unpatched\\|thunk in use\\|BUG:\"", SHORT)?;
    ensure!(complaints.status == 1, "the kernel: {}", complaints.text);
    Ok(())
}

/// Names of the guests' programs.
pub fn programs(dir: &std::path::Path) -> Vec<PathBuf> {
    [
        "apic",
        "edu",
        "exceptions",
        "exitcost",
        "fetch",
        "hlt",
        "msr",
        "powercut",
        "preload",
        "triple",
        "xsave",
    ]
    .iter()
    .map(|n| dir.join(n))
    .collect()
}
