//! What an exit costs, by the guest that reads the counter around one
//! instruction, and a VM's first exit.

use std::time::Duration;

use anyhow::{Context, Result};
use lab::guest::{Guest, Load};
use lab::host::SHORT;
use lab::progress::step;

use crate::results::{Column, Results};
use crate::session::Session;

/// What the guest calls it, our name for it, and what it is.
const EXITS: [(&str, &str, &str); 14] = [
    ("CPUID", "exit_cpuid", "CPUID"),
    ("RDMSR_PAT", "exit_rdmsr_pat", "RDMSR IA32_PAT"),
    ("WRMSR_PAT", "exit_wrmsr_pat", "WRMSR IA32_PAT"),
    ("OUT_UNCLAIMED", "exit_out", "OUT to userland and back"),
    ("IN_UNCLAIMED", "exit_in", "IN from userland"),
    (
        "OUT_8254_LATCH",
        "exit_out_8254",
        "OUT to the kernel's 8254",
    ),
    ("IN_PM_TIMER", "exit_pm_timer", "IN from the PM timer"),
    ("MMIO_LAPIC_READ", "exit_apic_read", "APIC register read"),
    ("MMIO_LAPIC_WRITE", "exit_apic_write", "APIC register write"),
    (
        "TSC_DEADLINE",
        "exit_tsc_deadline",
        "arming the TSC deadline",
    ),
    ("X2APIC_ICR", "exit_ipi", "sending an IPI (x2APIC)"),
    ("X2APIC_EOI", "exit_eoi", "EOI (x2APIC)"),
    ("HLT_WAKE", "exit_hlt_wake", "timer to handler, from HLT"),
    ("EPT_FIRST_TOUCH", "exit_ept", "first touch of 2 MiB"),
];
const RUN: Duration = Duration::from_secs(300);

/// Runs both.
///
/// # Errors
/// The guest does not come to its end.
pub fn measure(session: &mut Session, results: &mut Results) -> Result<()> {
    step("exits", || costs(session, results))?;
    step("first exit", || first_exit(session, results))
}

fn costs(session: &mut Session, results: &mut Results) -> Result<()> {
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
    for line in verdict.before.lines() {
        let mut words = line.split_whitespace();
        let (Some("exitcost"), Some(name), Some(value)) =
            (words.next(), words.next(), words.next())
        else {
            continue;
        };
        if let Some((_, ours, what)) = EXITS.iter().find(|(n, ..)| *n == name) {
            let value: f64 = value.parse().context("a cost that is no number")?;
            results.add(session.column, ours, what, "instructions", value);
        }
    }
    session.end()
}

fn first_exit(session: &mut Session, results: &mut Results) -> Result<()> {
    let kind = if session.column == Column::Kvm {
        "kvm"
    } else {
        "vmm"
    };
    let text = session
        .host
        .must(&format!("/tools/first-exit {kind}"), SHORT)?;
    // The first VM also brings the program's pages in.
    let best = text
        .lines()
        .filter_map(|l| l.strip_prefix("first-exit ")?.trim().parse::<f64>().ok())
        .fold(f64::INFINITY, f64::min);
    anyhow::ensure!(best.is_finite(), "no first exit in:\n{text}");
    // The host's clock is the counter, at a rate that the lab tells it.
    let ticks = best * f64::from(lab::bochs::IPS) / 1e9;
    results.add(
        session.column,
        "first_exit",
        "no VM to its first exit in userland",
        "instructions",
        ticks,
    );
    Ok(())
}
