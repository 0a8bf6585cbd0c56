//! `cargo xtask bench`: what vmm.ko and bhyve cost, beside Linux's KVM under
//! the same devices and beside no hypervisor at all, all on the same emulated
//! machine, where the time-stamp counter counts instructions.
#![forbid(unsafe_code)]

pub mod baseline;
pub mod chart;
mod compile;
mod exits;
mod files;
pub mod results;
mod session;
mod tools;
mod workload;

use anyhow::{Result, ensure};
use lab::machine::Engine;
use lab::progress::step;
use lab::runner::Lab;

use files::Files;
use results::{Column, Results};
use session::Session;
use tools::Tools;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Whose numbers.
    pub columns: Vec<Column>,
    /// Only the parts whose name contains one of these; all if there is none.
    pub only: Vec<String>,
}

impl Plan {
    /// The parts that there are, in their order.
    pub fn parts() -> impl Iterator<Item = &'static str> {
        ["exits", "first-exit"].into_iter().chain(workload::PARTS)
    }

    /// Whether a part is asked for.
    pub fn wants(&self, part: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|o| part.contains(o.as_str()))
    }

    /// Whether any part of the guest's day is.
    fn wants_day(&self) -> bool {
        workload::PARTS.iter().any(|p| self.wants(p))
    }
}

/// What came of a run.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The numbers.
    pub results: Results,
    /// Parts that failed, and how.
    pub failures: Vec<String>,
}

/// Measures; shows progress on the way. A part that fails takes nothing but
/// its own numbers with it.
///
/// # Errors
/// The engine does not count instructions, or something cannot be built.
pub fn run(lab: &Lab, plan: &Plan) -> Result<Outcome> {
    // QEMU counts too, on request, but has no idle time to count in a day.
    ensure!(
        lab.engine.counts_instructions() || lab.engine == Engine::Qemu && !plan.wants_day(),
        "{} does not count instructions as Bochs does, which gives the same numbers twice",
        lab.engine
    );
    ensure!(
        Plan::parts().any(|p| plan.wants(p)),
        "nothing to measure; there is: {}",
        Plan::parts().collect::<Vec<_>>().join(", ")
    );
    let mut outcome = Outcome::default();
    let tools = tools::build(&lab.dirs, plan.columns.contains(&Column::Kvm))?;
    let files = Files::build(&lab.dirs, &lab.kit, &tools)?;
    for column in [Column::Ours, Column::Kvm] {
        if plan.columns.contains(&column)
            && let Err(e) = hypervisor(lab, &tools, &files, plan, column, &mut outcome)
        {
            outcome.failures.push(format!("{}: {e:#}", column.name()));
        }
    }
    if plan.columns.contains(&Column::Bare) && plan.wants_day() {
        let done = workload::bare(lab, &files, plan, &mut outcome.results);
        if let Err(e) = done {
            outcome.failures.push(format!("bare machine: {e:#}"));
        }
    }
    workload::ratios(&mut outcome.results);
    Ok(outcome)
}

fn hypervisor(
    lab: &Lab,
    tools: &Tools,
    files: &Files,
    plan: &Plan,
    column: Column,
    outcome: &mut Outcome,
) -> Result<()> {
    let name = column.name();
    let mut session = Session::boot(lab, tools, files, column)?;
    if plan.wants("exits") {
        step(&format!("{name}: exits"), || {
            exits::costs(&mut session, &mut outcome.results)
        })?;
    }
    if plan.wants("first-exit") {
        step(&format!("{name}: first-exit"), || {
            exits::first(&mut session, &mut outcome.results)
        })?;
    }
    if plan.wants_day() {
        workload::day(&mut session, plan, outcome)?;
    }
    Ok(())
}
