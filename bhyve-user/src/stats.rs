//! What the guest was left for, counted where it costs a load and a store.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use vmmapi::{Exit, Inout};

use crate::lock;
use crate::status::VcpuStatus;

/// Names of the kinds of exits, by their number in the interface.
const KINDS: [&str; 27] = [
    "inout",
    "vmx",
    "bogus",
    "rdmsr",
    "wrmsr",
    "hlt",
    "mtrap",
    "pause",
    "paging",
    "inst_emul",
    "spinup_ap",
    "deprecated1",
    "rendezvous",
    "ioapic_eoi",
    "suspended",
    "inout_str",
    "task_switch",
    "monitor",
    "mwait",
    "svm",
    "reqidle",
    "debug",
    "vminsn",
    "bpt",
    "ipi",
    "db",
    "unknown",
];

/// Name of an exit's kind.
pub fn kind(exit: &Exit) -> &'static str {
    let n = exit.code() as usize;
    KINDS.get(n).copied().unwrap_or("unknown")
}

/// Counts of 256 ports, made when the first of them is used.
type PortPage = OnceLock<Box<[AtomicU32; 256]>>;
/// Counts of all ports, by the high byte of their number.
type Ports = [PortPage; 256];

/// Counts of one vCPU, written by its thread only.
#[derive(Debug)]
pub struct VcpuStats {
    id: u32,
    kinds: [AtomicU64; KINDS.len()],
    /// Accesses a port, where wanted.
    ports: Option<Box<Ports>>,
}

impl VcpuStats {
    /// Counts an exit that is no IN or OUT.
    pub fn count(&self, exit: &Exit) {
        let last = KINDS.len() - 1;
        if let Some(c) = self.kinds.get((exit.code() as usize).min(last)) {
            // One writer: no need for an atomic addition.
            c.store(c.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        }
    }

    /// Counts an IN or OUT.
    #[inline]
    pub fn count_inout(&self, io: &Inout) {
        // The kinds' numbers are the exit codes; INOUT's is 0.
        let [c, ..] = &self.kinds;
        c.store(c.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        if self.ports.is_some() {
            self.count_port(io);
        }
    }

    #[cold]
    fn count_port(&self, io: &Inout) {
        if let Some(ports) = &self.ports
            && let Some(page) = ports.get(usize::from(io.port >> 8))
            && let Some(c) = page
                .get_or_init(|| Box::new([const { AtomicU32::new(0) }; 256]))
                .get(usize::from(io.port & 0xff))
        {
            c.store(c.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        }
    }
}

/// Counts of all vCPUs.
#[derive(Debug, Default)]
pub struct Stats {
    vcpus: Mutex<Vec<Arc<VcpuStats>>>,
    with_ports: bool,
}

impl Stats {
    /// No vCPU yet; `with_ports` counts accesses a port too.
    pub fn new(with_ports: bool) -> Stats {
        Stats {
            vcpus: Mutex::default(),
            with_ports,
        }
    }

    /// Counters for one more vCPU.
    pub fn vcpu(&self, id: u32) -> Arc<VcpuStats> {
        let ports = self
            .with_ports
            .then(|| Box::new([const { PortPage::new() }; 256]));
        let stats = Arc::new(VcpuStats {
            id,
            kinds: [const { AtomicU64::new(0) }; KINDS.len()],
            ports,
        });
        lock(&self.vcpus).push(Arc::clone(&stats));
        stats
    }

    /// Counts of each vCPU by kind, without zeroes.
    pub fn by_vcpu(&self) -> Vec<VcpuStatus> {
        let vcpus = lock(&self.vcpus);
        let status = |v: &Arc<VcpuStats>| VcpuStatus {
            id: v.id,
            exits: KINDS
                .iter()
                .zip(&v.kinds)
                .map(|(kind, c)| ((*kind).to_owned(), c.load(Ordering::Relaxed)))
                .filter(|(_, n)| *n > 0)
                .collect(),
        };
        vcpus.iter().map(status).collect()
    }

    /// Sums by kind, without zeroes.
    pub fn kinds(&self) -> Vec<(&'static str, u64)> {
        let vcpus = lock(&self.vcpus);
        let sum = |i: usize| {
            vcpus
                .iter()
                .filter_map(|v| v.kinds.get(i))
                .map(|c| c.load(Ordering::Relaxed))
                .sum()
        };
        let all = KINDS.iter().enumerate().map(|(i, k)| (*k, sum(i)));
        all.filter(|(_, n)| *n > 0).collect()
    }

    /// Sums by port, without zeroes.
    pub fn ports(&self) -> BTreeMap<usize, u64> {
        let mut sums = BTreeMap::new();
        for vcpu in lock(&self.vcpus).iter() {
            for (high, page) in vcpu.ports.iter().flat_map(|p| p.iter().enumerate()) {
                for (low, c) in page.get().iter().flat_map(|p| p.iter().enumerate()) {
                    let n = c.load(Ordering::Relaxed);
                    if n > 0 {
                        *sums.entry(high << 8 | low).or_default() += u64::from(n);
                    }
                }
            }
        }
        sums
    }

    /// JSON: `exits` by kind, `userland_exits`, `ports`, and `kernel`, the
    /// kernel's own statistics.
    pub fn json(&self, kernel: &BTreeMap<String, u64>) -> String {
        let kinds = self.kinds();
        let total: u64 = kinds.iter().map(|(_, n)| n).sum();
        let mut out = String::from("{\n");
        object(
            &mut out,
            "exits",
            kinds.iter().map(|(k, n)| ((*k).to_owned(), *n)),
        );
        let _ = writeln!(out, "  \"userland_exits\": {total},");
        object(
            &mut out,
            "ports",
            self.ports().iter().map(|(p, n)| (format!("{p:#x}"), *n)),
        );
        object(
            &mut out,
            "kernel",
            kernel.iter().map(|(k, n)| (k.clone(), *n)),
        );
        // The last comma goes.
        out.truncate(out.trim_end_matches(",\n").len());
        out.push_str("\n}\n");
        out
    }
}

fn object(out: &mut String, name: &str, members: impl Iterator<Item = (String, u64)>) {
    let escape = |s: String| {
        s.chars()
            .filter(|c| !c.is_control())
            .flat_map(|c| {
                matches!(c, '"' | '\\')
                    .then_some('\\')
                    .into_iter()
                    .chain([c])
            })
            .collect::<String>()
    };
    let members: Vec<String> = members
        .map(|(k, n)| format!("\n    \"{}\": {n}", escape(k)))
        .collect();
    let end = if members.is_empty() { "" } else { "\n  " };
    let _ = writeln!(out, "  \"{name}\": {{{}{end}}},", members.join(","));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_all_vcpus_are_summed() {
        let stats = Stats::new(true);
        let (a, b) = (stats.vcpu(0), stats.vcpu(1));
        let io = Inout {
            port: 0x3f8,
            bytes: 1,
            ..Inout::default()
        };
        a.count_inout(&io);
        b.count_inout(&io);
        b.count(&Exit::Bogus);
        b.count(&Exit::Unknown {
            code: u32::MAX,
            payload: [0; _],
        });
        assert_eq!(stats.kinds(), [("inout", 2), ("bogus", 1), ("unknown", 1)]);
        let kernel = BTreeMap::from([("vm exits \"all\"".to_owned(), 9)]);
        let json: String = stats.json(&kernel).split_whitespace().collect();
        assert_eq!(
            json,
            "{\"exits\":{\"inout\":2,\"bogus\":1,\"unknown\":1},\"userland_exits\":4,\"ports\":{\"0x3f8\":2},\
             \"kernel\":{\"vmexits\\\"all\\\"\":9}}"
        );
    }
}
