//! What the guest of that name says: instructions that one kind of exit costs,
//! there and back.

use anyhow::{Context, Result};

/// A cost that is of interest.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// What the guest calls it.
    said: &'static str,
    /// Its name in the baseline and in the benchmark's results.
    pub name: &'static str,
    /// What it is.
    pub what: &'static str,
    /// The least of many is the same in every run: no clock and no scheduler of the
    /// host's is on the way.
    pub exact: bool,
}

const fn exact(said: &'static str, name: &'static str, what: &'static str) -> Kind {
    Kind {
        said,
        name,
        what,
        exact: true,
    }
}

/// All of them, in the order of the table.
pub const KINDS: [Kind; 17] = [
    exact("CPUID", "exit_cpuid", "CPUID"),
    exact("RDMSR_APIC_BASE", "exit_rdmsr", "RDMSR IA32_APIC_BASE"),
    exact("RDMSR_PAT", "exit_rdmsr_pat", "RDMSR IA32_PAT"),
    exact("WRMSR_PAT", "exit_wrmsr_pat", "WRMSR IA32_PAT"),
    exact("OUT_UNCLAIMED", "exit_out", "OUT to userland and back"),
    exact("IN_UNCLAIMED", "exit_in", "IN from userland"),
    exact("MMIO_PCI_READ", "exit_mmio", "MMIO read from userland"),
    exact(
        "OUT_8254_LATCH",
        "exit_out_8254",
        "OUT to the kernel's 8254",
    ),
    exact("IN_PM_TIMER", "exit_pm_timer", "IN from the PM timer"),
    exact("MMIO_LAPIC_READ", "exit_apic_read", "APIC register read"),
    exact("MMIO_LAPIC_WRITE", "exit_apic_write", "APIC register write"),
    exact("APIC_EOI", "exit_eoi", "EOI"),
    exact("APIC_IPI", "exit_ipi", "sending an IPI"),
    exact(
        "TSC_DEADLINE",
        "exit_tsc_deadline",
        "arming the TSC deadline",
    ),
    Kind {
        said: "HLT_WAKE",
        name: "exit_hlt_wake",
        what: "from HLT, timer to its handler",
        exact: false,
    },
    Kind {
        said: "HLT_SOON",
        name: "exit_hlt_soon",
        what: "from HLT, a timer less than 5,000 ticks off to its handler",
        exact: false,
    },
    Kind {
        said: "EPT_FIRST_TOUCH",
        name: "exit_ept",
        what: "EPT violation, first touch of a page (2 MiB here, 4 KiB by KVM)",
        exact: false,
    },
];

/// The least cost of each kind in the guest's output.
///
/// # Errors
/// A cost is no number.
pub fn costs(text: &str) -> Result<Vec<(&'static Kind, f64)>> {
    let mut costs = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some("exitcost"), Some(said), Some(value)) =
            (words.next(), words.next(), words.next())
        else {
            continue;
        };
        if let Some(kind) = KINDS.iter().find(|k| k.said == said) {
            let value = value.parse().context("a cost that is no number")?;
            costs.push((kind, value));
        }
    }
    Ok(costs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_is_the_cost() {
        let said = "exitcost OVERHEAD 3\r\nexitcost CPUID 218 mean 220\r\nexitcost\r\n";
        let costs = costs(said).unwrap();
        assert_eq!(costs.len(), 1);
        assert_eq!((costs[0].0.name, costs[0].1), ("exit_cpuid", 218.0));
    }
}
