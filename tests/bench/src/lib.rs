//! `cargo xtask bench`: what vmm.ko and bhyve cost, beside Linux's KVM under
//! the same devices and beside no hypervisor at all, all on the same emulated
//! machine, where the time-stamp counter counts instructions.
#![forbid(unsafe_code)]

pub mod baseline;
pub mod chart;
mod compile;
mod exits;
pub mod results;
mod session;
mod tools;
mod workload;

use anyhow::{Result, ensure};
use lab::dirs::Dirs;
use lab::host::Kit;
use lab::machine::Engine;

use results::{Column, Results};
use session::Session;

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Only what takes seconds: exits and disk, and no KVM.
    pub quick: bool,
}

/// Measures; shows progress on the way.
///
/// # Errors
/// The engine does not count instructions, or something does not run.
pub fn run(dirs: &Dirs, kit: &Kit, engine: Engine, plan: Plan) -> Result<Results> {
    ensure!(
        engine.counts_instructions(),
        "{engine} does not count instructions: only Bochs gives the same numbers twice"
    );
    let mut results = Results::default();
    let tools = tools::build(dirs)?;
    let files = workload::Files::build(dirs, kit, &tools, !plan.quick)?;
    let mut columns = vec![Column::Ours];
    if !plan.quick {
        columns.push(Column::Kvm);
    }
    for column in columns {
        let mut session = Session::boot(dirs, kit, engine, &tools, &files, column)?;
        exits::measure(&mut session, &mut results)?;
        workload::measure(&mut session, &files, &mut results, plan.quick)?;
    }
    if !plan.quick {
        workload::bare(dirs, kit, engine, &files, &mut results)?;
    }
    Ok(results)
}
