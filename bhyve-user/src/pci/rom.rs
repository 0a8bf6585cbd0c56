//! An expansion ROM: a read-only image behind the ROM base address register
//! (PCI Local Bus Specification 3.0 §6.2.5.2). Reads of it are exits: it is copied
//! once, if at all.

use std::sync::{Arc, Mutex};

use super::bar::{BarKind, Windows};
use super::config::{Config, ROM};
use super::function::FunctionError;
use crate::bus::{Buses, MmioDevice};
use crate::lock;

const ENABLE: u32 = 1;
/// The smallest that a guest need handle.
const LEAST: u64 = 2048;

struct Image(Vec<u8>);

/// The ROM of a function.
pub(super) struct Rom {
    device: Arc<dyn MmioDevice>,
    /// Bytes of address space, a power of two.
    size: u64,
    /// Where it is on the bus.
    mapped: Mutex<Option<u64>>,
}

impl Rom {
    pub(super) fn new(
        image: &[u8],
        config: &mut Config,
        windows: &mut Windows,
    ) -> Result<Rom, FunctionError> {
        let size = (image.len() as u64).max(LEAST);
        // The number of no BAR.
        let full = FunctionError::NoRoom(6, size);
        let bar = windows.allocate(BarKind::Mem32, size).ok_or(full)?;
        config.set32(ROM, bar.addr as u32);
        Ok(Rom {
            device: Arc::new(Image(image.to_vec())),
            size: bar.size,
            mapped: Mutex::new(None),
        })
    }

    /// A write of the register.
    pub(super) fn write(&self, config: &mut Config, value: u32, decodes: bool, buses: &Buses) {
        let address = value & !(self.size - 1) as u32;
        config.set32(ROM, address | value & ENABLE);
        self.update(config, decodes, buses);
    }

    /// Makes the bus agree with the register. `decodes`: the function decodes
    /// memory.
    pub(super) fn update(&self, config: &Config, decodes: bool, buses: &Buses) {
        let register = config.get(ROM, 4);
        let address = u64::from(register & !ENABLE);
        let wanted = (decodes && register & ENABLE != 0).then_some(address);
        let mut mapped = lock(&self.mapped);
        if *mapped == wanted {
            return;
        }
        if let Some(old) = mapped.take() {
            buses.mmio.unmap(old, &self.device);
        }
        if let Some(at) = wanted {
            let done = buses.mmio.map(at, self.size, Arc::clone(&self.device));
            // Over another device it stays invisible, as a BAR does.
            *mapped = done.is_ok().then_some(at);
        }
    }
}

impl MmioDevice for Image {
    fn mmio_read(&self, gpa: u64, size: u8) -> u64 {
        // The address is aligned to the power of two above the image's length.
        let space = (self.0.len() as u64).max(LEAST).next_power_of_two();
        let at = usize::try_from(gpa & (space - 1)).unwrap_or(usize::MAX);
        let bytes = self.0.get(at..).unwrap_or_default();
        let mut value = u64::MAX.to_le_bytes();
        for (v, b) in value.iter_mut().zip(bytes).take(size.into()) {
            *v = *b;
        }
        u64::from_le_bytes(value)
    }
    fn mmio_write(&self, _: u64, _: u8, _: u64) {}
}
