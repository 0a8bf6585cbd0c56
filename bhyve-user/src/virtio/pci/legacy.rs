//! The legacy register block (virtio 1.2 §4.1.4.8). A legacy driver starts a
//! queue by giving its page number, and may use it before DRIVER_OK.

use super::{VirtioPci, feature, lock};
use crate::pci::function::PciFunction;
use crate::virtio::queue::Layout;

const DEVICE_FEATURES: u64 = 0x00;
const DRIVER_FEATURES: u64 = 0x04;
const QUEUE_PFN: u64 = 0x08;
const QUEUE_SIZE: u64 = 0x0c;
const QUEUE_SELECT: u64 = 0x0e;
/// Queue notify, which modern drivers use too.
pub(super) const NOTIFY: u64 = 0x10;
const STATUS: u64 = 0x12;
const ISR: u64 = 0x13;
const CONFIG_VECTOR: u64 = 0x14;
const QUEUE_VECTOR: u64 = 0x16;
/// The device's own configuration, with MSI-X enabled and without.
const CONFIG_MSIX: u64 = 0x18;
const CONFIG: u64 = 0x14;

impl VirtioPci {
    pub(super) fn legacy_read(&self, f: &PciFunction, offset: u64, size: u8) -> u64 {
        if !self.transitional {
            return 0;
        }
        let msix = offset >= CONFIG && f.msix_enabled();
        let config = if msix { CONFIG_MSIX } else { CONFIG };
        if offset >= config {
            return self.shared.config_read(offset - config, size);
        }
        let r = lock(&self.registers);
        let select = usize::from(r.queue_select);
        let queue = r.queues.get(select).copied().unwrap_or_default();
        match (offset, size) {
            (DEVICE_FEATURES, 4) => self.features & 0xffff_ffff,
            (DRIVER_FEATURES, 4) => r.driver_features & 0xffff_ffff,
            (QUEUE_PFN, 4) => queue.pfn.into(),
            (QUEUE_SIZE, 2) => queue.layout.size.into(),
            (QUEUE_SELECT, 2) => r.queue_select.into(),
            (STATUS, 1) => (*lock(&self.shared.status)).into(),
            (ISR, 1) => self.shared.take_isr().into(),
            (CONFIG_VECTOR, 2) => self.vector(self.config_source()).into(),
            (QUEUE_VECTOR, 2) if select < r.queues.len() => self.vector(select).into(),
            (QUEUE_VECTOR, 2) => super::NO_VECTOR.into(),
            _ => 0,
        }
    }

    pub(super) fn legacy_write(&self, f: &PciFunction, offset: u64, size: u8, value: u64) {
        if (offset, size) == (NOTIFY, 2) || (offset, size) == (NOTIFY, 4) {
            self.notify(value as u16);
            return;
        }
        if !self.transitional {
            return;
        }
        let msix = offset >= CONFIG && f.msix_enabled();
        let config = if msix { CONFIG_MSIX } else { CONFIG };
        if offset >= config {
            self.config_write(offset - config, size, value);
            return;
        }
        let mut r = lock(&self.registers);
        let select = usize::from(r.queue_select);
        match (offset, size) {
            (DRIVER_FEATURES, 4) => {
                let legacy = value & 0xffff_ffff & !feature::VERSION_1;
                r.driver_features = legacy & self.features;
            }
            (QUEUE_PFN, 4) => {
                let Some(q) = r.queues.get_mut(select) else {
                    return;
                };
                q.pfn = value as u32;
                q.layout = Layout::legacy(q.pfn, q.layout.size);
                q.enabled = q.pfn != 0;
                if q.enabled {
                    self.start_queue(&r, select);
                } else {
                    self.shared.set_queue(select, None, r.driver_features);
                }
            }
            (QUEUE_SELECT, 2) => r.queue_select = value as u16,
            (STATUS, 1) => self.set_status(&mut r, value as u8),
            (CONFIG_VECTOR, 2) => self.set_vector(self.config_source(), value as u16),
            (QUEUE_VECTOR, 2) if select < r.queues.len() => {
                self.set_vector(select, value as u16);
            }
            _ => {}
        }
    }
}
