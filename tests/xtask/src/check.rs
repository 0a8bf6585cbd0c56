//! `cargo xtask test`: format, lints, documentation, unit tests, lab tests.

use crate::boot::EngineName;
use crate::pages;
use anyhow::Result;
use clap::Args;
use lab::command::output;
use lab::core_src::CoreSource;
use lab::dirs::Dirs;
use lab::host::{self, Kit};
use lab::kmod_freebsd::Headers;
use lab::machine::Engine;
use lab::progress::step;
use lab::runner::{self, Lab, Tally};
use lab::{apt, core_src, kmod, kmod_freebsd, programs_freebsd, ziglang};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

/// Options of `cargo xtask test`.
#[derive(Debug, Args)]
pub struct Options {
    /// Only lab tests whose name contains this, and nothing else
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Only the lab tests
    #[arg(long)]
    lab: bool,
    /// Everything but the lab tests
    #[arg(long, conflicts_with_all = ["only", "lab"])]
    no_lab: bool,
    /// What runs the hosts
    #[arg(long, default_value = "auto")]
    engine: EngineName,
}

/// Checks and tests everything; the last line is the tally.
pub fn run(dirs: &Dirs, options: &Options) -> Result<ExitCode> {
    let mut tally = Tally::default();
    let engine = options.engine.resolve();
    // Hosts on Bochs come with one on QEMU, for AMD-V.
    let also = [engine, Engine::Qemu];
    host::prerequisites(match engine {
        Engine::Bochs if !options.no_lab => &also,
        _ => &also[..1],
    })?;
    if !options.lab && options.only.is_none() {
        checks(dirs, &mut tally)?;
    }
    if !options.no_lab {
        match Kit::build(dirs).and_then(|kit| kit.with_guests(dirs)) {
            Ok(kit) => {
                let lab = Lab {
                    dirs: dirs.clone(),
                    kit,
                    engine,
                };
                tally += runner::run(&lab, options.only.as_deref().unwrap_or_default())?;
            }
            Err(e) => {
                println!("build for the lab: FAILED\n{e:#}");
                tally.failed += 1;
            }
        }
    }
    println!("{tally}");
    Ok(if tally.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// rustup's minimal profile comes without these.
fn components() -> Result<()> {
    for (component, verb) in [("rustfmt", "fmt"), ("clippy", "clippy")] {
        if output(Command::new("cargo").args([verb, "--version"])).is_err() {
            step(&format!("{component} from rustup"), || {
                output(Command::new("rustup").args(["component", "add", component])).map(drop)
            })?;
        }
    }
    Ok(())
}

/// What unit tests make disk images with.
const IMAGE_PACKAGES: [&str; 3] = ["makefs", "xorriso", "fdisk"];

fn checks(dirs: &Dirs, tally: &mut Tally) -> Result<()> {
    components()?;
    apt::ensure_installed(&IMAGE_PACKAGES)?;
    let source = core_src::ensure(dirs)?;
    let kernel = |dirs: &Dirs, source: &CoreSource, args: &[&str]| {
        kmod::cargo(dirs, source, "vmm-kmod/kmod", "kmod", args)
    };
    let guests = |dirs: &Dirs, source: &CoreSource, args: &[&str]| {
        kmod::cargo(dirs, source, "tests/guests", "guests", args)
    };
    let cargo = |args: &[&str]| {
        let mut command = Command::new("cargo");
        command.args(args).current_dir(&dirs.root);
        command
    };
    check("rustfmt", cargo(&["fmt", "--all", "--check"]), tally)?;
    check(
        "rustfmt of the kernel piece",
        kernel(dirs, &source, &["fmt", "--all", "--check"]),
        tally,
    )?;
    check(
        "rustfmt of the guests",
        guests(dirs, &source, &["fmt", "--check"]),
        tally,
    )?;
    check(
        "clippy",
        cargo(&[
            "clippy",
            "--workspace",
            "--all-targets",
            "--quiet",
            "--",
            "-D",
            "warnings",
        ]),
        tally,
    )?;
    for (name, features) in [
        ("clippy of the kernel piece", ""),
        ("clippy of the kernel piece for FreeBSD", "freebsd"),
    ] {
        let args = ["clippy", "--workspace", "--quiet", "--features", features];
        let args = [&args[..], &["--", "-D", "warnings"]].concat();
        check(name, kernel(dirs, &source, &args), tally)?;
    }
    check(
        "clippy of the guests",
        guests(
            dirs,
            &source,
            &["clippy", "--quiet", "--bins", "--", "-D", "warnings"],
        ),
        tally,
    )?;
    let mut doc = cargo(&["doc", "--workspace", "--no-deps", "--quiet"]);
    doc.env("RUSTDOCFLAGS", "-D warnings");
    check("documentation", doc, tally)?;
    unit_tests(cargo(&["test", "--workspace", "--no-fail-fast"]), tally)?;
    apt::ensure_installed(&pages::PACKAGES)?;
    step_of("manual pages and completions", tally, || pages::check(dirs));
    freebsd(dirs, tally);
    Ok(())
}

/// What is FreeBSD's alone compiles and links, against a newer FreeBSD than the
/// lab's.
fn freebsd(dirs: &Dirs, tally: &mut Tally) {
    let (module, programs) = ("vmm.ko for FreeBSD 15", "programs for FreeBSD 14");
    let zig = match ziglang::ensure(dirs) {
        Ok(zig) => zig,
        Err(e) => {
            for name in [module, programs] {
                println!("{name}: skipped: {e:#}");
                tally.skipped += 1;
            }
            return;
        }
    };
    step_of(module, tally, || {
        kmod_freebsd::build(dirs, &Headers::Zig(zig)).map(drop)
    });
    step_of(programs, tally, || programs_freebsd::check(dirs));
}

/// A check that is no single command.
fn step_of(name: &str, tally: &mut Tally, check: impl FnOnce() -> Result<()>) {
    let started = Instant::now();
    let result = check();
    let seconds = started.elapsed().as_secs_f64();
    match result {
        Ok(()) => {
            println!("{name}: ok ({seconds:.1} s)");
            tally.passed += 1;
        }
        Err(e) => {
            println!("{name}: FAILED ({seconds:.1} s)\n{e:#}");
            tally.failed += 1;
        }
    }
}

fn check(name: &str, mut command: Command, tally: &mut Tally) -> Result<()> {
    let started = Instant::now();
    let ok = command.stdin(Stdio::null()).status()?.success();
    let seconds = started.elapsed().as_secs_f64();
    if ok {
        println!("{name}: ok ({seconds:.1} s)");
        tally.passed += 1;
    } else {
        println!("{name}: FAILED ({seconds:.1} s)");
        tally.failed += 1;
    }
    Ok(())
}

/// Unit tests count one by one; cargo says how many there were.
fn unit_tests(mut command: Command, tally: &mut Tally) -> Result<()> {
    let started = Instant::now();
    let out = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()?;
    let text = String::from_utf8_lossy(&out.stdout);
    let mut sum = Tally::default();
    for line in text.lines().filter(|l| l.starts_with("test result:")) {
        let count = |what: &str| {
            line.split([';', '.'])
                .find_map(|part| part.trim().strip_suffix(what)?.trim().parse::<u32>().ok())
                .unwrap_or(0)
        };
        sum.passed += count("passed");
        sum.failed += count("failed");
        sum.skipped += count("ignored");
    }
    if !out.status.success() {
        println!("{text}");
        // What did not even compile has no result line.
        sum.failed = sum.failed.max(1);
    }
    println!(
        "unit tests: {sum} ({:.1} s)",
        started.elapsed().as_secs_f64()
    );
    *tally += sum;
    Ok(())
}
