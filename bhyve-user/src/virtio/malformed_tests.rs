//! What makes no sense stops every device, and ends nothing else: chains that
//! lead out of memory, into themselves or out of their table (virtio 1.2
//! §2.1.2).

use std::sync::Arc;

use vmmapi::GuestMemory;

use super::Built;
use super::testbed::{Bed, wait};
use crate::config::PciSlot;
use crate::machine::Machine;
use crate::machine::fake::Fake;
use crate::pci::catalog::{Builder, EMULATIONS, Means};

const MEMORY: u64 = 32 << 20;

/// Options for a device by its emulation's name, and the queues that it reads
/// from as soon as it is notified.
fn options(name: &str, dir: &std::path::Path) -> (String, &'static [usize]) {
    let path = |file: &str| dir.join(file).display().to_string();
    match name {
        "virtio-blk" => {
            std::fs::write(dir.join("disk"), vec![0; 1 << 20]).unwrap();
            (path("disk"), &[0])
        }
        "virtio-9p" => (format!("share={}", dir.display()), &[0]),
        // Queue 0 is read when a packet has come.
        "virtio-net" => ("slirp".into(), &[1, 2]),
        "virtio-balloon" => (String::new(), &[0, 1, 2, 3]),
        // Sending by the first port, and control.
        "virtio-console" => (format!("port={}", path("port")), &[1, 3]),
        "virtio-vsock" => (format!("path={}", path("vsock")), &[1]),
        "virtio-rnd" => (String::new(), &[0]),
        other => panic!("which queues of {other} are read at once?"),
    }
}

fn build(name: &str, conf: String, memory: &GuestMemory) -> Built {
    let machine: Arc<dyn Machine> = Fake::new();
    let means = Means {
        vm: "test",
        cpus: 1,
        machine: &machine,
        memory,
        virtio_msi: false,
    };
    let slot = PciSlot {
        at: crate::pci::Bdf {
            bus: 0,
            slot: 3,
            func: 0,
        },
        emulation: name.into(),
        conf,
    };
    let found = EMULATIONS.iter().find(|e| e.name == name);
    match found.map(|e| e.builder) {
        Some(Builder::Virtio(build)) => build(&slot, &means).unwrap(),
        _ => panic!("{name} is no virtio device"),
    }
}

#[test]
fn chains_without_sense_stop_every_device() {
    const NEXT: u64 = 1 << 32;
    const WRITE: u64 = 2 << 32;
    const INDIRECT: u64 = 4 << 32;
    // A descriptor: address; length, flags and next.
    let chains: [(&str, u64, u64); 5] = [
        ("outside of memory", MEMORY - 8, 64),
        ("around the end of addresses", u64::MAX - 8, 64 | WRITE),
        ("into itself", 0x1000, 64 | NEXT),
        ("out of its table", 0x1000, 64 | NEXT | 0x4000 << 48),
        ("through a table of odd size", 0x1000, 17 | INDIRECT),
    ];
    let virtio = EMULATIONS
        .iter()
        .filter(|e| matches!(e.builder, Builder::Virtio(_)));
    let mut devices = 0;
    for e in virtio {
        devices += 1;
        let dir = tempfile::tempdir().unwrap();
        let (conf, queues) = options(e.name, dir.path());
        for &queue in queues {
            for (what, address, rest) in chains {
                let memory = GuestMemory::anonymous(MEMORY).unwrap();
                let built = build(e.name, conf.clone(), &memory);
                let mut bed = Bed::new(built, memory, u64::MAX);
                bed.raw(queue, address, rest);
                let name = e.name;
                wait(
                    &format!("{name}, queue {queue}: a chain that leads {what}"),
                    || bed.broken(),
                );
            }
        }
    }
    assert!(devices >= 7);
}
