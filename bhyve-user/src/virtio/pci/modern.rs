//! The common configuration structure (virtio 1.2 §4.1.4.3).

use super::{Registers, VirtioPci, feature, lock, status};
use crate::virtio::queue::MAX_SIZE;

const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_VECTOR: u64 = 0x10;
const NUM_QUEUES: u64 = 0x12;
const STATUS: u64 = 0x14;
const GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;

/// Half `select` of 64 feature bits.
fn half(bits: u64, select: u32) -> u64 {
    match select {
        0 => bits & 0xffff_ffff,
        1 => bits >> 32,
        _ => 0,
    }
}

/// Replaces the low or the high half of an address.
fn set_half(address: &mut u64, high: bool, value: u64) {
    let shift = if high { 32 } else { 0 };
    *address = *address & !(0xffff_ffff << shift) | (value & 0xffff_ffff) << shift;
}

impl VirtioPci {
    pub(super) fn common_read(&self, offset: u64, size: u8) -> u64 {
        let r = lock(&self.registers);
        let select = usize::from(r.queue_select);
        // A queue that is not there has size 0.
        let q = r.queues.get(select).copied().unwrap_or_default();
        match (offset, size) {
            (DEVICE_FEATURE_SELECT, 4) => r.device_feature_select.into(),
            (DEVICE_FEATURE, 4) => half(self.features, r.device_feature_select),
            (DRIVER_FEATURE_SELECT, 4) => r.driver_feature_select.into(),
            (DRIVER_FEATURE, 4) => half(r.driver_features, r.driver_feature_select),
            (CONFIG_VECTOR, 2) => self.vector(self.config_source()).into(),
            (NUM_QUEUES, 2) => r.queues.len() as u64,
            (STATUS, 1) => (*lock(&self.shared.status)).into(),
            (GENERATION, 1) => self.shared.generation().into(),
            (QUEUE_SELECT, 2) => r.queue_select.into(),
            (QUEUE_SIZE, 2) => q.layout.size.into(),
            (QUEUE_VECTOR, 2) if select < r.queues.len() => self.vector(select).into(),
            (QUEUE_VECTOR, 2) => super::NO_VECTOR.into(),
            (QUEUE_ENABLE, 2) => q.enabled.into(),
            (QUEUE_NOTIFY_OFF, 2) => 0,
            (QUEUE_DESC, 4) => q.layout.desc & 0xffff_ffff,
            (0x24, 4) => q.layout.desc >> 32,
            (QUEUE_DRIVER, 4) => q.layout.avail & 0xffff_ffff,
            (0x2c, 4) => q.layout.avail >> 32,
            (QUEUE_DEVICE, 4) => q.layout.used & 0xffff_ffff,
            (0x34, 4) => q.layout.used >> 32,
            _ => 0,
        }
    }

    pub(super) fn common_write(&self, offset: u64, size: u8, value: u64) {
        let mut r = lock(&self.registers);
        let select = usize::from(r.queue_select);
        match (offset, size) {
            (DEVICE_FEATURE_SELECT, 4) => r.device_feature_select = value as u32,
            (DRIVER_FEATURE_SELECT, 4) => r.driver_feature_select = value as u32,
            (DRIVER_FEATURE, 4) => {
                // Once agreed on, features stay.
                let agreed = *lock(&self.shared.status) & status::FEATURES_OK != 0;
                let high = r.driver_feature_select == 1;
                if !agreed && r.driver_feature_select <= 1 {
                    set_half(&mut r.driver_features, high, value);
                }
            }
            (CONFIG_VECTOR, 2) => self.set_vector(self.config_source(), value as u16),
            (STATUS, 1) => self.set_status(&mut r, value as u8),
            (QUEUE_SELECT, 2) => r.queue_select = value as u16,
            (QUEUE_VECTOR, 2) if select < r.queues.len() => {
                self.set_vector(select, value as u16);
            }
            _ => self.queue_write(&mut r, select, offset, size, value),
        }
    }

    fn queue_write(&self, r: &mut Registers, select: usize, offset: u64, size: u8, value: u64) {
        let most = self.identity.queues.get(select).copied().unwrap_or(0);
        let Some(q) = r.queues.get_mut(select) else {
            return;
        };
        // A queue that runs stays as it is until the device is reset.
        if q.enabled {
            return;
        }
        let l = &mut q.layout;
        match (offset, size) {
            (QUEUE_SIZE, 2) => {
                let size = value as u16;
                if size.is_power_of_two() && size <= most.min(MAX_SIZE) {
                    l.size = size;
                }
            }
            (QUEUE_ENABLE, 2) if value == 1 => {
                q.enabled = true;
                // Before DRIVER_OK no buffer may be consumed (§3.1.1).
                if *lock(&self.shared.status) & status::DRIVER_OK != 0 {
                    self.start_queue(r, select);
                }
            }
            (QUEUE_DESC | 0x24, 4) => set_half(&mut l.desc, offset != QUEUE_DESC, value),
            (QUEUE_DRIVER | 0x2c, 4) => set_half(&mut l.avail, offset != QUEUE_DRIVER, value),
            (QUEUE_DEVICE | 0x34, 4) => set_half(&mut l.used, offset != QUEUE_DEVICE, value),
            _ => {}
        }
    }

    /// A write to the device status, of either interface (§3.1).
    pub(super) fn set_status(&self, r: &mut Registers, value: u8) {
        if value == 0 {
            self.reset(r);
            return;
        }
        let before = {
            let mut status = lock(&self.shared.status);
            let before = *status;
            let mut new = value & !status::NEEDS_RESET | before & status::NEEDS_RESET;
            // Features that cannot be: the driver reads the bit back as clear.
            let refused = r.driver_features & feature::VERSION_1 == 0
                || r.driver_features & !self.features != 0;
            if before & status::FEATURES_OK == 0 && refused {
                new &= !status::FEATURES_OK;
            }
            *status = new;
            before
        };
        if value & !before & status::DRIVER_OK == 0 {
            return;
        }
        let enabled = |i: &usize| r.queues.get(*i).is_some_and(|q| q.enabled);
        let queues: Vec<usize> = (0..r.queues.len()).filter(enabled).collect();
        // A legacy driver's queues run from the moment that they have a place.
        if r.driver_features & feature::VERSION_1 != 0 {
            for &index in &queues {
                self.start_queue(r, index);
            }
        }
        self.shared.activate(r.driver_features);
        for index in queues {
            // Buffers may be there already.
            self.shared.notify(index);
        }
    }
}
