//! `cargo xtask fuzz`: runs a fuzz target with libFuzzer. Not by cargo-fuzz,
//! which wants a nightly compiler for the address sanitizer; code without
//! `unsafe` gains nothing by that, and the coverage that guides libFuzzer is
//! in the stable compiler. (`cargo fuzz run --fuzz-dir tests/fuzz --features
//! libfuzzer NAME` works for those who have both.)

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use clap::Args;
use lab::apt;
use lab::dirs::Dirs;
use lab::progress::step;

/// Coverage counters and compared values, as libFuzzer wants them; overflow
/// and debug assertions count as findings.
const RUSTFLAGS: &[&str] = &[
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
    "-Cdebug-assertions=on",
    "-Coverflow-checks=on",
    "-Clto=off",
    // Where it stopped must be seen.
    "-Cdebuginfo=1",
    "-Cstrip=none",
    "--cfg=fuzzing",
];
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Options of `cargo xtask fuzz`.
#[derive(Debug, Args)]
pub struct Options {
    /// Targets; all of them one after the other if none is named
    names: Vec<String>,
    /// Seconds for each target
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Print the targets' names
    #[arg(long)]
    list: bool,
    /// Afterwards keep what reached new code in the committed corpus
    #[arg(long)]
    keep: bool,
}

/// Runs the targets; the last line is the tally.
///
/// # Errors
/// A name is unknown, or a program cannot be built.
pub fn run(dirs: &Dirs, options: &Options) -> Result<ExitCode> {
    let known = names(dirs)?;
    if options.list {
        println!("{}", known.join("\n"));
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(bad) = options.names.iter().find(|n| !known.contains(n)) {
        bail!(
            "no fuzz target is called \"{bad}\"; there are {}",
            known.join(", ")
        );
    }
    let chosen = if options.names.is_empty() {
        &known
    } else {
        &options.names
    };
    // libFuzzer comes as C++.
    apt::ensure_installed(&["g++"])?;
    step("fuzz targets", || build(dirs, chosen))?;
    let mut failed = 0;
    for name in chosen {
        if !fuzz(dirs, name, options)? {
            failed += 1;
        }
    }
    println!("{} passed, {failed} failed", chosen.len() - failed);
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn root(dirs: &Dirs) -> PathBuf {
    dirs.root.join("tests/fuzz")
}

/// A target is a file in `fuzz_targets`.
fn names(dirs: &Dirs) -> Result<Vec<String>> {
    let dir = root(dirs).join("fuzz_targets");
    let mut names = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("no {}", dir.display()))? {
        let path = entry?.path();
        if let Some(stem) = path.file_stem() {
            names.push(stem.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn build(dirs: &Dirs, names: &[String]) -> Result<()> {
    let mut cargo = Command::new("cargo");
    cargo
        .args(["build", "--release", "--package", "fuzz"])
        .args(["--features", "libfuzzer", "--target", TARGET])
        .arg("--target-dir")
        .arg(dirs.target.join("fuzz"))
        .env("CARGO_ENCODED_RUSTFLAGS", RUSTFLAGS.join("\x1f"))
        .env_remove("RUSTFLAGS")
        .current_dir(&dirs.root);
    for name in names {
        cargo.args(["--bin", name]);
    }
    lab::command::output(&mut cargo).map(drop)
}

/// True if the target stood.
fn fuzz(dirs: &Dirs, name: &str, options: &Options) -> Result<bool> {
    let program = dirs
        .target
        .join("fuzz")
        .join(TARGET)
        .join("release")
        .join(name);
    let work = dirs.target.join("fuzz/corpus").join(name);
    let findings = dirs.target.join("fuzz/findings").join(name);
    let committed = root(dirs).join("corpus").join(name);
    for dir in [&work, &findings, &committed] {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    println!("{name}: {} s", options.seconds);
    let log = findings.join("log");
    let status = Command::new(&program)
        .arg(format!("-max_total_time={}", options.seconds))
        .arg(format!("-artifact_prefix={}/", findings.display()))
        // A single input has no business taking this long or this much.
        .args(["-timeout=10", "-rss_limit_mb=1024", "-print_final_stats=1"])
        .args([&work, &committed])
        .stdin(Stdio::null())
        .stderr(fs::File::create(&log)?)
        .status()
        .with_context(|| format!("cannot run {}", program.display()))?;
    let text = fs::read(&log)?;
    let text = String::from_utf8_lossy(&text);
    if !status.success() {
        let from = text.lines().count().saturating_sub(60);
        for line in text.lines().skip(from) {
            println!("    {line}");
        }
        println!(
            "{name}: FAILED. The input is in {}; put it into {} as a regression test",
            findings.display(),
            committed.display()
        );
        return Ok(false);
    }
    let last = |what: &str| {
        text.lines()
            .rev()
            .find_map(|l| l.split_once(what).map(|(_, rest)| rest.trim()))
            .and_then(|rest| rest.split_whitespace().next())
            .unwrap_or("?")
            .to_owned()
    };
    println!(
        "{name}: clean, {} runs, coverage {}",
        last("stat::number_of_executed_units:"),
        last("cov:")
    );
    if options.keep {
        merge(&program, &committed, &work)?;
    }
    Ok(true)
}

/// Adds to `committed` what `work` covers beyond it.
fn merge(program: &Path, committed: &Path, work: &Path) -> Result<()> {
    let out = Command::new(program)
        .args(["-merge=1", "-timeout=10"])
        .args([committed, work])
        .stdin(Stdio::null())
        .output()?;
    if !out.status.success() {
        bail!(
            "{}: merging failed\n{}",
            program.display(),
            String::from_utf8_lossy(&out.stderr)
        );
    }
    Ok(())
}
