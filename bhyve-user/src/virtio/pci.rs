//! Virtio over PCI: the transitional kind where there is one (virtio 1.2 §4.1), so
//! that drivers from before 1.0 (FreeBSD up to 12) find the interface that they
//! know, and later ones the modern one.
//!
//! BAR 0 is the legacy register block in I/O ports, BAR 1 the MSI-X table,
//! BAR 2 the modern registers. Modern drivers notify through BAR 0 too: an OUT
//! needs no instruction decoded, as a write to memory would.

mod legacy;
mod modern;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use vmmapi::GuestMemory;

use super::queue::{Layout, Queue};
use super::worker::{NO_VECTOR, Shared};
use super::{Built, Identity, feature, status};
use crate::lock;
use crate::machine::Machine;
use crate::pci::PciDevice;
use crate::pci::bar::BarKind;
use crate::pci::config::{CAP_VENDOR, REVISION, SUBSYSTEM, SUBSYSTEM_VENDOR};
use crate::pci::function::{Blueprint, PciFunction};

/// The vendor of all virtio devices (§4.1.2).
const VENDOR: u16 = 0x1af4;
/// BARs.
const BAR_LEGACY: usize = 0;
const BAR_MSIX: usize = 1;
const BAR_MODERN: usize = 2;
/// Ports: registers, then up to 104 bytes of the device's own.
const LEGACY_SIZE: u64 = 128;
/// Parts of the modern BAR, a page each.
const PART: u64 = 0x1000;
const COMMON: u64 = 0;
const ISR: u64 = PART;
const CONFIG: u64 = 2 * PART;
const MODERN_SIZE: u64 = 4 * PART;
/// Bytes of the common configuration structure up to `queue_reset`.
const COMMON_SIZE: u32 = 0x3c;
/// The features of all devices here.
const FEATURES: u64 =
    feature::ANY_LAYOUT | feature::INDIRECT_DESC | feature::EVENT_IDX | feature::VERSION_1;

/// A queue's registers.
#[derive(Clone, Copy, Debug, Default)]
struct QueueRegs {
    /// The size that the driver chose, at most the device's.
    layout: Layout,
    enabled: bool,
    /// Legacy page number.
    pfn: u32,
}

/// What the driver selected and negotiated.
#[derive(Clone, Debug, Default)]
struct Registers {
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<QueueRegs>,
}

/// A virtio device in its slot.
pub struct VirtioPci {
    identity: Identity,
    features: u64,
    /// The legacy registers are there, not only the notify port.
    transitional: bool,
    registers: Mutex<Registers>,
    shared: Arc<Shared>,
}

/// A vendor-specific capability (§4.1.4): structure `kind` at `offset` of `bar`.
fn capability(kind: u8, bar: usize, offset: u64, length: u32, extra: &[u8]) -> Vec<u8> {
    let mut body = vec![16 + extra.len() as u8, kind, bar as u8, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend(length.to_le_bytes());
    body.extend(extra);
    body
}

/// PCI device numbers of transitional devices (§4.1.2.1), which have their
/// type as the subsystem. Types that came later are modern only.
fn transitional(kind: u16) -> Option<u16> {
    match kind {
        1 => Some(0x1000),
        2 => Some(0x1001),
        5 => Some(0x1002),
        3 => Some(0x1003),
        8 => Some(0x1004),
        4 => Some(0x1005),
        9 => Some(0x1009),
        _ => None,
    }
}

impl VirtioPci {
    /// A device called `name`, and what it asks for; with `msi` it has MSI in
    /// place of MSI-X (`-W`).
    ///
    /// # Errors
    /// No thread for it.
    pub fn new(
        name: String,
        built: Built,
        memory: GuestMemory,
        msi: bool,
    ) -> std::io::Result<(Blueprint, VirtioPci)> {
        let (identity, shared) = Shared::start(name, built, memory)?;
        let count = identity.queues.len();
        let mut plan = Blueprint::default();
        let (class, subclass) = identity.class;
        let c = &mut plan.config;
        let old = transitional(identity.kind);
        let id = old.unwrap_or(0x1040_u16.saturating_add(identity.kind));
        c.identify(VENDOR, id, class, subclass);
        c.set8(REVISION, old.is_none().into());
        c.set16(SUBSYSTEM_VENDOR, VENDOR);
        c.set16(SUBSYSTEM, identity.kind);
        plan.intx = true;
        plan.bar(BAR_LEGACY, BarKind::Io, LEGACY_SIZE);
        if msi {
            plan.msi(0);
        } else {
            plan.msix(count as u16 + 1, BAR_MSIX);
        }
        plan.bar(BAR_MODERN, BarKind::Mem32, MODERN_SIZE);
        let config = identity.config.len() as u32;
        let mut parts = vec![
            capability(1, BAR_MODERN, COMMON, COMMON_SIZE, &[]),
            // A multiplier of 0: every queue is notified at the same port.
            capability(2, BAR_LEGACY, legacy::NOTIFY, 2, &0_u32.to_le_bytes()),
            capability(3, BAR_MODERN, ISR, 1, &[]),
        ];
        if config > 0 {
            parts.push(capability(4, BAR_MODERN, CONFIG, config, &[]));
        }
        for body in parts {
            plan.config.add_capability(CAP_VENDOR, &body);
        }
        plan.window();
        let features = identity.features | FEATURES;
        let queues = QueueRegs::fresh(&identity);
        let device = VirtioPci {
            features,
            identity,
            registers: Mutex::new(Registers {
                queues,
                ..Registers::default()
            }),
            transitional: old.is_some(),
            shared,
        };
        Ok((plan, device))
    }

    /// Resets the device (§2.4); the driver sees status 0 when it has stopped.
    fn reset(&self, r: &mut Registers) {
        self.shared.reset();
        *r = Registers {
            queues: QueueRegs::fresh(&self.identity),
            ..Registers::default()
        };
    }

    /// Starts the selected queue where the driver put it.
    fn start_queue(&self, r: &Registers, index: usize) {
        let Some(q) = r.queues.get(index) else { return };
        let event_idx = r.driver_features & feature::EVENT_IDX != 0;
        let indirect = r.driver_features & feature::INDIRECT_DESC != 0;
        match Queue::new(self.shared.memory(), q.layout, event_idx, indirect) {
            Ok(queue) => self.shared.set_queue(index, Some(queue), r.driver_features),
            Err(why) => self.shared.needs_reset(why),
        }
    }

    /// The driver has put buffers into a queue.
    fn notify(&self, queue: u16) {
        self.shared.notify(queue.into());
    }

    /// The vector of a queue (or, at the end, of configuration changes).
    fn vector(&self, source: usize) -> u16 {
        let v = self.shared.vectors.get(source);
        v.map_or(NO_VECTOR, |v| v.load(Ordering::Relaxed) as u16)
    }

    /// Sets it; a vector that is not there reads back as none (§4.1.5.1.2.2).
    fn set_vector(&self, source: usize, vector: u16) {
        let there = usize::from(vector) < self.shared.vectors.len();
        if let Some(v) = self.shared.vectors.get(source) {
            let vector = if there { vector } else { NO_VECTOR };
            v.store(vector.into(), Ordering::Relaxed);
        }
    }

    fn config_source(&self) -> usize {
        self.shared.vectors.len().saturating_sub(1)
    }

    /// The driver writes the device's configuration space.
    fn config_write(&self, offset: u64, size: u8, value: u64) {
        self.shared
            .config_write(offset, size, value, &self.identity.writable);
    }
}

impl QueueRegs {
    fn fresh(identity: &Identity) -> Vec<QueueRegs> {
        let regs = |&size| QueueRegs {
            layout: Layout {
                size,
                ..Layout::default()
            },
            ..QueueRegs::default()
        };
        identity.queues.iter().map(regs).collect()
    }
}

impl PciDevice for VirtioPci {
    fn attached(&self, function: &Arc<PciFunction>) {
        self.shared.attach(function);
    }

    fn bar_moved(&self, bar: usize, addr: Option<u64>, machine: &dyn Machine) {
        if bar == BAR_LEGACY {
            let port = addr.map(|a| (a + legacy::NOTIFY) as u16);
            self.shared.notified_at(port, machine);
        }
    }

    fn bar_read(&self, f: &PciFunction, bar: usize, offset: u64, size: u8) -> u64 {
        match bar {
            BAR_LEGACY => self.legacy_read(f, offset, size),
            BAR_MODERN => match offset & !(PART - 1) {
                COMMON => self.common_read(offset, size),
                ISR if offset == ISR => self.shared.take_isr().into(),
                CONFIG => self.shared.config_read(offset - CONFIG, size),
                _ => 0,
            },
            _ => 0,
        }
    }

    fn bar_write(&self, f: &PciFunction, bar: usize, offset: u64, size: u8, value: u64) {
        match bar {
            BAR_LEGACY => self.legacy_write(f, offset, size, value),
            BAR_MODERN => match offset & !(PART - 1) {
                COMMON => self.common_write(offset, size, value),
                CONFIG => self.config_write(offset - CONFIG, size, value),
                _ => {}
            },
            _ => {}
        }
    }
}

#[cfg(test)]
#[path = "pci_tests.rs"]
mod tests;
