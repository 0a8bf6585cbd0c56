//! The adapter's registers (AHCI 1.3.1 §3.1) and its place on the PCI bus.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread;

use vmmapi::GuestMemory;

use super::media::Media;
use super::port::Port;
use crate::pci::PciDevice;
use crate::pci::bar::BarKind;
use crate::pci::catalog::Plan;
use crate::pci::config::PROG_IF;
use crate::pci::function::{Blueprint, PciFunction};
use crate::status::show_rings;

/// AHCI's BAR (§2.1.11).
const BAR: usize = 5;
const BAR_SIZE: u64 = 0x2000;
/// Port registers.
const PORTS: u64 = 0x100;
const PORT_SIZE: u64 = 0x80;

const CAP: u64 = 0x00;
const GHC: u64 = 0x04;
const IS: u64 = 0x08;
const PI: u64 = 0x0c;
const VS: u64 = 0x10;
const CAP2: u64 = 0x24;

const GHC_HR: u32 = 1;
const GHC_IE: u32 = 2;
const GHC_AE: u32 = 1 << 31;
/// AHCI 1.3.1.
const VERSION: u32 = 0x0001_0301;
/// 64-bit addresses, queued commands, command list override, AHCI only, 6
/// Gbit/s, 32 slots.
const CAPABILITIES: u32 = 1 << 31 | 1 << 30 | 1 << 24 | 1 << 18 | 3 << 20 | 31 << 8;

struct Shared {
    ports: Vec<Arc<Port>>,
    ghc: AtomicU32,
    /// Ports with something to tell, latched.
    is: AtomicU32,
    function: OnceLock<Weak<PciFunction>>,
    ended: AtomicBool,
}

impl Shared {
    /// Tells the guest what the ports have to say (§10.6.2): news only, or
    /// with `again` all of it.
    fn update(&self, again: bool) {
        let Some(f) = self.function.get().and_then(Weak::upgrade) else {
            return;
        };
        let mut due = 0;
        for (n, port) in self.ports.iter().enumerate() {
            due |= u32::from(port.interrupts()) << n;
        }
        let before = self.is.fetch_or(due, Ordering::AcqRel);
        let wanted = self.ghc.load(Ordering::Acquire) & GHC_IE != 0;
        let now = before | due;
        if now == 0 || !wanted {
            f.set_intx(false);
        } else if (again || due & !before != 0) && !f.message(0) {
            f.set_intx(true);
        }
    }

    fn reset(&self) {
        for port in &self.ports {
            port.reset();
        }
        self.ghc.store(GHC_AE, Ordering::Release);
        self.is.store(0, Ordering::Release);
        self.update(false);
    }
}

/// The adapter in its slot.
pub struct Ahci {
    shared: Arc<Shared>,
}

impl Ahci {
    /// The adapter's function, and a thread for each drive.
    ///
    /// # Errors
    /// The host has no more threads.
    pub fn plan(name: &str, media: Vec<Media>, memory: &GuestMemory) -> io::Result<Plan> {
        let ports = media.into_iter().map(|m| Port::new(m, memory.clone()));
        let ports: Vec<Arc<Port>> = ports.collect();
        show_rings(name, ports.iter().map(|p| p.counter()).collect());
        let shared = Arc::new(Shared {
            ports,
            ghc: AtomicU32::new(GHC_AE),
            is: AtomicU32::new(0),
            function: OnceLock::new(),
            ended: AtomicBool::new(false),
        });
        for (n, port) in shared.ports.iter().enumerate() {
            let weak = Arc::downgrade(&shared);
            let spawned = thread::Builder::new()
                .name(format!("{name} {n}"))
                .spawn(move || {
                    crate::sandbox::join();
                    loop {
                        thread::park();
                        let Some(shared) = weak.upgrade() else {
                            return;
                        };
                        if shared.ended.load(Ordering::Acquire) {
                            return;
                        }
                        let Some(port) = shared.ports.get(n) else {
                            return;
                        };
                        while port.turn() {
                            shared.update(false);
                        }
                    }
                })?;
            port.set_thread(spawned.thread().clone());
        }
        let mut plan = Blueprint::default();
        let c = &mut plan.config;
        // ICH8's, as in bhyve; mass storage, SATA, AHCI.
        c.identify(0x8086, 0x2821, 1, 6);
        c.set8(PROG_IF, 1);
        plan.intx = true;
        plan.msi(0);
        plan.bar(BAR, BarKind::Mem32, BAR_SIZE);
        Ok((plan, Box::new(Ahci { shared })))
    }

    fn port(&self, offset: u64) -> Option<(&Arc<Port>, u64)> {
        let at = offset.checked_sub(PORTS)?;
        let port = self
            .shared
            .ports
            .get(usize::try_from(at / PORT_SIZE).ok()?)?;
        Some((port, at % PORT_SIZE))
    }

    fn read(&self, offset: u64) -> u32 {
        let s = &*self.shared;
        if let Some((port, register)) = self.port(offset) {
            return port.read(register);
        }
        let ports = s.ports.len() as u32;
        match offset {
            CAP => CAPABILITIES | ports.saturating_sub(1),
            GHC => s.ghc.load(Ordering::Acquire),
            IS => s.is.load(Ordering::Acquire),
            PI => u32::MAX.checked_shr(32 - ports).unwrap_or(0),
            VS => VERSION,
            CAP2 => 0,
            _ => 0,
        }
    }

    fn write(&self, offset: u64, value: u32) {
        let s = &*self.shared;
        if let Some((port, register)) = self.port(offset) {
            port.write(register, value);
            s.update(false);
            return;
        }
        match offset {
            GHC if value & GHC_HR != 0 => s.reset(),
            GHC => {
                s.ghc.store(value & GHC_IE | GHC_AE, Ordering::Release);
                s.update(true);
            }
            IS => {
                s.is.fetch_and(!value, Ordering::AcqRel);
                s.update(false);
            }
            _ => {}
        }
    }
}

impl PciDevice for Ahci {
    fn bar_read(&self, _: &PciFunction, bar: usize, offset: u64, size: u8) -> u64 {
        if bar != BAR {
            return 0;
        }
        let value = self.read(offset & !3) >> (8 * (offset & 3));
        u64::from(value) & crate::bus::ones(size)
    }

    fn bar_write(&self, _: &PciFunction, bar: usize, offset: u64, size: u8, value: u64) {
        // Registers are written whole (§3).
        if bar == BAR && size == 4 && offset.is_multiple_of(4) {
            self.write(offset, value as u32);
        }
    }

    fn attached(&self, function: &Arc<PciFunction>) {
        let _ = self.shared.function.set(Arc::downgrade(function));
    }
}

impl Drop for Ahci {
    fn drop(&mut self) {
        // The threads find the end, or nobody left.
        self.shared.ended.store(true, Ordering::Release);
        for port in &self.shared.ports {
            port.wake();
        }
    }
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
