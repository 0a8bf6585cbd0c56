//! `cargo xtask bench`.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use bench::results::Results;
use bench::{Plan, baseline, chart};
use clap::Args;
use lab::dirs::Dirs;
use lab::host::{self, Kit};
use lab::machine::Engine;

/// Options of `cargo xtask bench`.
#[derive(Debug, Args)]
pub struct Options {
    /// Only exits, boot and disk, without KVM and the compiler
    #[arg(long)]
    quick: bool,
    /// Write all numbers as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write charts into this folder
    #[arg(long, value_name = "FOLDER")]
    charts: Option<PathBuf>,
    /// Make our numbers the committed baseline
    #[arg(long)]
    save: bool,
}

/// Measures and compares; fails where a number is worse than the baseline.
///
/// # Errors
/// Something cannot be built or does not run.
pub fn run(dirs: &Dirs, options: &Options) -> Result<ExitCode> {
    host::prerequisites(&[Engine::Bochs])?;
    let kit = Kit::build(dirs)?.with_guests(dirs)?;
    let plan = Plan {
        quick: options.quick,
    };
    let results = bench::run(dirs, &kit, Engine::Bochs, plan)?;
    println!("{results}");
    if let Some(file) = &options.json {
        let text = serde_json::to_string_pretty(&results)? + "\n";
        fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
    }
    if let Some(folder) = &options.charts {
        charts(folder, &results)?;
    }
    let file = dirs.root.join("tests/bench/baseline.json");
    if options.save {
        baseline::save(&file, &results)?;
        return Ok(ExitCode::SUCCESS);
    }
    let worse = baseline::regressions(&baseline::read(&file)?, &results);
    for line in &worse {
        println!("worse than the baseline: {line}");
    }
    Ok(if worse.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn charts(folder: &std::path::Path, results: &Results) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    type Choice = (&'static str, &'static str, fn(&str) -> bool);
    let all: [Choice; 3] = [
        ("exits.svg", "What an exit costs", |n| {
            n.starts_with("exit_") && n != "exit_ept"
        }),
        ("disk.svg", "A disk request", |n| n.starts_with("blk_")),
        ("work.svg", "Boot and compile", |n| {
            ["boot", "compile", "compile_disk", "first_exit", "exit_ept"].contains(&n)
        }),
    ];
    for (name, title, chosen) in all {
        let file = folder.join(name);
        fs::write(&file, chart::svg(title, results, chosen))
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}
