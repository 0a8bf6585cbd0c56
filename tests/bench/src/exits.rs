//! What an exit costs, by the guest that reads the counter around one
//! instruction, and a VM's first exit.

use std::time::Duration;

use anyhow::Result;
use lab::exitcost::{self, Kind};
use lab::first_exit;
use lab::guest::{Guest, Load};
use lab::host::SHORT;

use crate::results::{Column, Results};
use crate::session::Session;

const RUN: Duration = Duration::from_secs(300);

/// Runs the guest that measures.
///
/// # Errors
/// It does not come to its end.
pub fn costs(session: &mut Session, results: &mut Results) -> Result<()> {
    let load = Load::FreeBsd {
        mfsroot: None,
        modules: Vec::new(),
    };
    let mut guest = Guest::new("/guests/exitcost", load);
    guest.memory_mib = 128;
    session.start(guest, &[])?;
    let verdict = session
        .host
        .guest()
        .expect(r"(?m)^(PASS|FAIL|panic: .*)\r?$", RUN)?;
    for (kind, cost) in exitcost::costs(&verdict.before)? {
        let Kind { name, what, .. } = kind;
        results.add(session.column, name, what, "instructions", cost);
    }
    session.end()
}

/// Makes VMs and times their first exit.
///
/// # Errors
/// There is none.
pub fn first(session: &mut Session, results: &mut Results) -> Result<()> {
    let kind = if session.column == Column::Kvm {
        "kvm"
    } else {
        "vmm"
    };
    let text = session
        .host
        .must(&format!("/tools/first-exit {kind}"), SHORT)?;
    let ticks = first_exit::instructions(&text)?;
    results.add(
        session.column,
        "first_exit",
        "no VM to its first exit in userland",
        "instructions",
        ticks,
    );
    Ok(())
}
