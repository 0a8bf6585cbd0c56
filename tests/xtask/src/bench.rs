//! `cargo xtask bench`.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use bench::results::{Column, Results};
use bench::{Plan, baseline, chart};
use clap::Args;
use lab::baseline as committed;
use lab::dirs::Dirs;
use lab::host::{self, Kit};
use lab::machine::Engine;
use lab::runner::Lab;

/// Options of `cargo xtask bench`.
#[derive(Debug, Args)]
pub struct Options {
    /// Only ours, without the compiler
    #[arg(long)]
    quick: bool,
    /// Only the parts whose name contains one of these: exits, first-exit,
    /// compile-memory, idle, blk, net, compile-disk
    #[arg(
        long,
        value_name = "TEXT,...",
        value_delimiter = ',',
        conflicts_with = "quick"
    )]
    only: Vec<String>,
    /// Only these: ours, kvm, bare
    #[arg(
        long,
        value_name = "COLUMN,...",
        value_delimiter = ',',
        conflicts_with = "quick"
    )]
    columns: Vec<ColumnName>,
    /// The exits on QEMU's AMD-V instead, ours and KVM's; baseline and bars are VT-x's
    #[arg(long, conflicts_with_all = ["quick", "only", "columns", "from", "save"])]
    amd: bool,
    /// Write all numbers as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write charts into this folder
    #[arg(long, value_name = "FOLDER")]
    charts: Option<PathBuf>,
    /// Measure nothing: show what --json has written
    #[arg(long, value_name = "FILE", conflicts_with_all = ["quick", "only", "columns", "json"])]
    from: Option<PathBuf>,
    /// Make our numbers the committed baseline
    #[arg(long)]
    save: bool,
}

/// A column of the table.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum ColumnName {
    /// vmm.ko and bhyve
    Ours,
    /// Linux's KVM under bhyve's devices
    Kvm,
    /// No hypervisor
    Bare,
}

impl From<ColumnName> for Column {
    fn from(name: ColumnName) -> Self {
        match name {
            ColumnName::Ours => Self::Ours,
            ColumnName::Kvm => Self::Kvm,
            ColumnName::Bare => Self::Bare,
        }
    }
}

impl Options {
    fn plan(&self) -> Plan {
        if self.amd {
            return Plan {
                columns: vec![Column::Ours, Column::Kvm],
                only: vec!["exits".to_owned()],
            };
        }
        if self.quick {
            let only = ["exits", "first-exit", "idle", "blk", "net"];
            return Plan {
                columns: vec![Column::Ours],
                only: only.map(str::to_owned).to_vec(),
            };
        }
        let columns = if self.columns.is_empty() {
            Column::ALL.to_vec()
        } else {
            self.columns.iter().map(|c| Column::from(*c)).collect()
        };
        Plan {
            columns,
            only: self.only.clone(),
        }
    }
}

/// Measures and compares; fails where a number is worse than the baseline.
///
/// # Errors
/// Something cannot be built or does not run.
pub fn run(dirs: &Dirs, options: &Options) -> Result<ExitCode> {
    if let Some(file) = &options.from {
        let text =
            fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        let results: Results = serde_json::from_str(&text)
            .with_context(|| format!("{} is no result of --json", file.display()))?;
        return shown(dirs, options, &results, true);
    }
    let engine = if options.amd {
        Engine::Qemu
    } else {
        Engine::Bochs
    };
    host::prerequisites(&[engine])?;
    let lab = Lab {
        dirs: dirs.clone(),
        kit: Kit::build(dirs)?.with_guests(dirs)?,
        engine,
    };
    let outcome = bench::run(&lab, &options.plan())?;
    let results = outcome.results;
    for line in &outcome.failures {
        println!("failed: {line}");
    }
    if let Some(file) = &options.json {
        let text = serde_json::to_string_pretty(&results)? + "\n";
        fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
    }
    shown(dirs, options, &results, outcome.failures.is_empty())
}

/// The table, the charts, and what the baseline makes of them; `good` if nothing
/// failed.
fn shown(dirs: &Dirs, options: &Options, results: &Results, good: bool) -> Result<ExitCode> {
    println!("{results}");
    if let Some(folder) = &options.charts {
        charts(folder, results)?;
    }
    if options.amd {
        return Ok(if good {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        });
    }
    let file = committed::file(&dirs.root);
    if options.save {
        baseline::save(&file, results)?;
        return Ok(if good {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        });
    }
    let worse = baseline::regressions(&committed::read(&file)?, results);
    for line in &worse {
        println!("worse than the baseline: {line}");
    }
    Ok(if good && worse.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn charts(folder: &std::path::Path, results: &Results) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    type Choice = (&'static str, &'static str, fn(&str) -> bool);
    let all: [Choice; 4] = [
        ("exits.svg", "What an exit costs", |n| {
            n.starts_with("exit_") && n != "exit_ept"
        }),
        ("io.svg", "A disk's requests, a network's packets", |n| {
            (n.starts_with("blk_") || n.starts_with("net_")) && !n.ends_with("_least")
        }),
        ("boot.svg", "A VM's start and a Linux boot", |n| {
            n.starts_with("boot") || ["first_exit", "exit_ept"].contains(&n)
        }),
        ("work.svg", "A compile, an idle guest, memory", |n| {
            n.starts_with("compile") || n.starts_with("idle") || n == "resident"
        }),
    ];
    for (name, title, chosen) in all {
        let file = folder.join(name);
        fs::write(&file, chart::svg(title, results, chosen))
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}
