//! Linux remaps interrupts by the VT-d unit and leaves DMA to us: our driver uses the
//! unit beside Linux's, and Linux's queue.

use super::{Wrong, config, cycles, own, remapped};
use crate::host::{Host, SHORT};
use crate::machine::Iommu;
use crate::runner::{Case, Group, Lab};
use anyhow::{Result, ensure};

use super::left::Driver;

/// The host and its test.
///
/// # Errors
/// An image cannot be made.
pub fn group(lab: &Lab) -> Result<Group> {
    let name = "passthru-shared-vtd";
    let mut config = config(lab, "shared", 128, Iommu::Intel { interrupts: true })?;
    // The other CPU has Linux change its table for interrupts all the time.
    config.cpus = 2;
    config.count_instructions = false;
    config.cmdline = "intel_iommu=off no_timer_check".to_owned();
    Ok(Group {
        name: name.to_owned(),
        config,
        cases: vec![Case::new(name, |_, host| shared(host))],
    })
}

/// The console's interrupt, which an I/O APIC has.
const CONSOLE: &str =
    "console=$(sed -n 's/^ *\\([0-9]*\\):.*IR-IO-APIC.*ttyS0.*/\\1/p' /proc/interrupts)";

fn shared(host: &mut Host) -> Result<()> {
    let interrupts = host.must("cat /proc/interrupts", SHORT)?;
    ensure!(
        interrupts.contains("IR-IO-APIC") && interrupts.contains("IR-PCI-MSI"),
        "the host does not remap interrupts:\n{interrupts}"
    );
    host.must(
        &format!(
            "{CONSOLE}; [ -n \"$console\" ] && touch /tmp/go && \
             (n=0; cpu=1; while [ -e /tmp/go ]; do cpu=$((3-cpu)); \
             echo $cpu >/proc/irq/$console/smp_affinity && n=$((n+1)); echo $n >/tmp/moves; done) >/dev/null 2>&1 &"
        ),
        SHORT,
    )?;
    // Faults are Linux's handler's.
    own(host, &["[00:05.0] fault addr 0xa000000"])?;
    // The first entry of Linux's table, which is an I/O APIC's, in the format for
    // remapping (VT-d 4.1 §5.1.2.2).
    remapped(
        host,
        &Wrong {
            own: None,
            at: 0x44,
            bytes: "\\020\\0\\340\\376",
        },
    )?;
    cycles(Driver::Own, host)?;
    moves(host)
}

/// Linux's own interrupt goes where Linux sends it.
fn moves(host: &mut Host) -> Result<()> {
    let text = host.must("rm /tmp/go; cat /tmp/moves", SHORT)?;
    let moved: u64 = text.trim().parse()?;
    println!("passthru-shared-vtd: the console's interrupt was told {moved} times to move");
    ensure!(moved > 100, "Linux let it be moved {moved} times only");
    for (mask, column) in [(1, 2), (2, 3), (1, 2)] {
        // What is printed makes interrupts, of which the CPU's column is to tell.
        let line = format!(
            "{CONSOLE}; sleep 1; echo {mask} >/proc/irq/$console/smp_affinity; \
             count() {{ set -- $(grep \"^ *$console:\" /proc/interrupts); eval n=\\${column}; }}; \
             count; m=$n; i=0; while [ $n -le $((m+20)) ] && [ $i -lt 300 ]; do i=$((i+1)); echo $i; sleep 0.1; count; done; \
             [ $n -gt $((m+20)) ]"
        );
        host.must(&line, SHORT)?;
    }
    Ok(())
}
