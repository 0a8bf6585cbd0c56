//! All functions of a VM, and the two ways into their configuration space.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::bar::Windows;
use super::catalog;
pub use super::catalog::Means;
use super::function::{FunctionError, PciFunction, Wiring};
use super::intx::{Route, Router};
use super::lpc::Lpc;
use super::{Bdf, ECAM_BASE, ECAM_SIZE};
use crate::bus::{BusError, Buses, MmioDevice, PortDevice, ones};
use crate::config::PciSlot;
use crate::machine::Machine;

/// Why the bus could not be built.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PciError {
    /// `-s` names something that is not there.
    #[error("-s {0},{1}: no such emulation; there is {list}", list = catalog::names())]
    Unknown(Bdf, String),
    /// Two LPC bridges.
    #[error("-s {0},lpc: only one LPC bridge is possible")]
    SecondLpc(Bdf),
    /// The device's host side, or what the rest of the option says of it.
    #[error("-s {0},{1}: {2}")]
    Device(Bdf, String, String),
    /// An LPC bridge that would not decode the legacy ports.
    #[error("-s {0},lpc: the LPC bridge must be on bus 0")]
    LpcBus(Bdf),
    /// The device cannot have an INTx line.
    #[error("-s {0}: the I/O APIC has no pins for PCI")]
    NoPins(Bdf),
    /// See [`FunctionError`].
    #[error("-s {0}: {1}")]
    Function(Bdf, FunctionError),
    /// Configuration ports or ECAM are taken.
    #[error("PCI configuration space: {0}")]
    Bus(#[from] BusError),
}

/// Addresses that one bus decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusWindows {
    /// Ports, first and one past the last.
    pub io: (u64, u64),
    /// Memory below 4 GiB.
    pub mem32: (u64, u64),
    /// Memory above.
    pub mem64: (u64, u64),
}

/// The root complex.
pub struct PciRoot {
    functions: BTreeMap<Bdf, Arc<PciFunction>>,
    windows: BTreeMap<u8, BusWindows>,
    address: AtomicU32,
}

/// Where INTx pins go: bus and slot, pin (0 for INTA), route.
pub type IntxMap = Vec<(Bdf, u8, Route)>;

impl PciRoot {
    /// Makes every function of `slots` and claims its ports and ECAM.
    /// BARs come out of `windows`.
    pub fn new(
        slots: &[PciSlot],
        mut windows: Windows,
        buses: &Arc<Buses>,
        machine: &Arc<dyn Machine>,
        router: &Arc<Router>,
        means: &Means<'_>,
    ) -> Result<Arc<PciRoot>, PciError> {
        let mut ordered: Vec<&PciSlot> = slots.iter().collect();
        ordered.sort_by_key(|s| s.at);
        let mut functions: BTreeMap<Bdf, Arc<PciFunction>> = BTreeMap::new();
        let mut bus_windows = BTreeMap::new();
        let mut pins: BTreeMap<(u8, u8), Vec<Route>> = BTreeMap::new();
        let mut at_bus = ordered.first().map_or(0, |s| s.at.bus);
        let mut start = windows;
        let mut lpc = None;
        for slot in ordered {
            if slot.at.bus != at_bus {
                close_window(&mut bus_windows, at_bus, start, &mut windows);
                (at_bus, start) = (slot.at.bus, windows);
            }
            let emulation = catalog::find(&slot.emulation)
                .ok_or_else(|| PciError::Unknown(slot.at, slot.emulation.clone()))?;
            let plan = catalog::plan(emulation, slot, means)
                .map_err(|why| PciError::Device(slot.at, slot.emulation.clone(), why))?;
            let Some((plan, device)) = plan else {
                // Last of all: its registers show every route.
                check_lpc(slot.at, lpc)?;
                lpc = Some(slot.at);
                continue;
            };
            let intx = match plan.intx {
                true => Some(pin(slot.at, &mut pins, router)?),
                false => None,
            };
            let wiring = Wiring {
                buses,
                machine,
                router,
                windows: &mut windows,
                intx,
            };
            let f = PciFunction::new(slot.at, plan, device, wiring)
                .map_err(|e| PciError::Function(slot.at, e))?;
            functions.insert(slot.at, f);
        }
        close_window(&mut bus_windows, at_bus, start, &mut windows);
        if let Some(at) = lpc {
            let (plan, device) = Lpc::new(Arc::clone(router));
            let wiring = Wiring {
                buses,
                machine,
                router,
                windows: &mut windows,
                intx: None,
            };
            let f = PciFunction::new(at, plan, Box::new(device), wiring)
                .map_err(|e| PciError::Function(at, e))?;
            functions.insert(at, f);
        }
        for (at, f) in &functions {
            if functions
                .keys()
                .any(|o| (o.bus, o.slot) == (at.bus, at.slot) && o != at)
            {
                f.set_multi_function();
            }
        }
        let root = Arc::new(PciRoot {
            functions,
            windows: bus_windows,
            address: AtomicU32::new(0),
        });
        // 0xcf9 between the two is the reset control register.
        let ports = buses.ports.claim(0xcf8, 1, root.clone())?;
        buses.ports.map(ports, 0xcfc, 4)?;
        buses.mmio.map(ECAM_BASE, ECAM_SIZE, root.clone())?;
        Ok(root)
    }

    /// Functions in order of bus, slot and function.
    pub fn functions(&self) -> impl Iterator<Item = &Arc<PciFunction>> {
        self.functions.values()
    }

    /// Takes every function off the buses; see [`PciFunction::detach`].
    pub fn detach(&self) {
        for f in self.functions.values() {
            f.detach();
        }
    }

    /// Buses with functions, and what they decode. Bus 0 is always there.
    pub fn buses(&self) -> &BTreeMap<u8, BusWindows> {
        &self.windows
    }

    /// Whether there is an LPC bridge: a device of class 6, subclass 1.
    pub fn has_lpc(&self) -> bool {
        self.functions
            .values()
            .any(|f| f.config_read(0x0a, 2) == 0x0601)
    }

    /// INTx pins in use, each once, in order.
    pub fn intx_map(&self) -> IntxMap {
        let mut map: IntxMap = Vec::new();
        for f in self.functions.values() {
            if let Some((pin, route)) = f.intx() {
                let at = Bdf { func: 0, ..f.at };
                if !map.iter().any(|(a, p, _)| (*a, *p) == (at, pin)) {
                    map.push((at, pin, route));
                }
            }
        }
        map.sort_by_key(|(a, p, _)| (*a, *p));
        map
    }

    fn config_read(&self, at: Bdf, offset: u16, size: u8) -> u32 {
        match self.functions.get(&at) {
            Some(f) if offset.is_multiple_of(u16::from(size)) => f.config_read(offset, size),
            _ => ones(size) as u32,
        }
    }

    fn config_write(&self, at: Bdf, offset: u16, size: u8, value: u32) {
        if let Some(f) = self.functions.get(&at)
            && offset.is_multiple_of(u16::from(size))
        {
            f.config_write(offset, size, value);
        }
    }

    /// The function and register that port 0xcfc + `byte` reaches now.
    fn selected(&self, byte: u16) -> Option<(Bdf, u16)> {
        let a = self.address.load(Ordering::Relaxed);
        let at = Bdf {
            bus: (a >> 16) as u8,
            slot: (a >> 11) as u8 & 0x1f,
            func: (a >> 8) as u8 & 7,
        };
        (a & 0x8000_0000 != 0).then_some((at, (a & 0xfc) as u16 + byte))
    }
}

fn close_window(all: &mut BTreeMap<u8, BusWindows>, bus: u8, start: Windows, now: &mut Windows) {
    now.add_slack();
    let w = BusWindows {
        io: (start.io, now.io),
        mem32: (start.mem32, now.mem32),
        mem64: (start.mem64, now.mem64),
    };
    all.insert(bus, w);
}

fn check_lpc(at: Bdf, before: Option<Bdf>) -> Result<(), PciError> {
    match (before, at.bus) {
        (Some(_), _) => Err(PciError::SecondLpc(at)),
        (None, 0) => Ok(()),
        _ => Err(PciError::LpcBus(at)),
    }
}

/// A pin of the slot: a new one while there are four, then shared.
fn pin(
    at: Bdf,
    pins: &mut BTreeMap<(u8, u8), Vec<Route>>,
    router: &Router,
) -> Result<(u8, Route), PciError> {
    let used = pins.entry((at.bus, at.slot)).or_default();
    if used.len() < 4 {
        let route = router.allocate().ok_or(PciError::NoPins(at))?;
        used.push(route);
        return Ok((used.len() as u8 - 1, route));
    }
    let pin = at.func % 4;
    let route = used
        .get(usize::from(pin))
        .copied()
        .ok_or(PciError::NoPins(at))?;
    Ok((pin, route))
}

impl PortDevice for PciRoot {
    fn port_read(&self, port: u16, size: u8) -> Option<u32> {
        if port < 0xcfc {
            return (port == 0xcf8 && size == 4).then(|| self.address.load(Ordering::Relaxed));
        }
        match self.selected(port - 0xcfc) {
            Some((at, offset)) => Some(self.config_read(at, offset, size)),
            None => Some(ones(size) as u32),
        }
    }

    fn port_write(&self, port: u16, size: u8, value: u32) -> bool {
        if port < 0xcfc {
            let address = port == 0xcf8 && size == 4;
            if address {
                self.address.store(value & 0x80ff_fffc, Ordering::Relaxed);
            }
            return address;
        }
        if let Some((at, offset)) = self.selected(port - 0xcfc) {
            self.config_write(at, offset, size, value);
        }
        true
    }
}

/// ECAM: bus in bits 20 to 27, slot in 15 to 19, function in 12 to 14.
fn ecam(gpa: u64) -> (Bdf, u16) {
    let at = Bdf {
        bus: (gpa >> 20) as u8,
        slot: (gpa >> 15) as u8 & 0x1f,
        func: (gpa >> 12) as u8 & 7,
    };
    (at, gpa as u16 & 0xfff)
}

impl MmioDevice for PciRoot {
    fn mmio_read(&self, gpa: u64, size: u8) -> u64 {
        let (at, offset) = ecam(gpa.wrapping_sub(ECAM_BASE));
        if size == 8 {
            let low = u64::from(self.config_read(at, offset, 4));
            return low | u64::from(self.config_read(at, offset + 4, 4)) << 32;
        }
        self.config_read(at, offset, size).into()
    }

    fn mmio_write(&self, gpa: u64, size: u8, value: u64) {
        let (at, offset) = ecam(gpa.wrapping_sub(ECAM_BASE));
        self.config_write(at, offset, size.min(4), value as u32);
        if size == 8 {
            self.config_write(at, offset + 4, 4, (value >> 32) as u32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::fake::Fake;
    use vmmapi::GuestMemory;

    fn slot(slot: u8, func: u8, emulation: &str) -> PciSlot {
        PciSlot {
            at: Bdf { bus: 0, slot, func },
            emulation: emulation.into(),
            conf: String::new(),
        }
    }

    fn build(slots: &[PciSlot]) -> Result<(Arc<Buses>, Arc<PciRoot>), PciError> {
        let machine: Arc<dyn Machine> = Fake::new();
        let router = Arc::new(Router::new(machine.clone(), 32));
        let buses = Arc::new(Buses::default());
        let means = Means {
            vm: "vm",
            cpus: 1,
            machine: &machine,
            memory: &GuestMemory::anonymous(1 << 20).unwrap(),
            virtio_msi: false,
        };
        let windows = Windows::new(0xc000_0000);
        let root = PciRoot::new(slots, windows, &buses, &machine, &router, &means)?;
        Ok((buses, root))
    }

    fn read(b: &Buses, slot: u32, func: u32, register: u32) -> u32 {
        let address = 0x8000_0000 | slot << 11 | func << 8 | register;
        assert!(b.ports.get(0xcf8).unwrap().port_write(0xcf8, 4, address));
        b.ports.get(0xcfc).unwrap().port_read(0xcfc, 4).unwrap()
    }

    #[test]
    fn both_ways_into_configuration_space_agree() {
        let (b, _) = build(&[slot(0, 0, "hostbridge"), slot(31, 0, "lpc")]).unwrap();
        assert_eq!(read(&b, 0, 0, 0), 0x1275_1275);
        assert_eq!(read(&b, 31, 0, 0), 0x7000_8086);
        assert_eq!(read(&b, 5, 0, 0), u32::MAX);
        let ecam = b.mmio.get(ECAM_BASE + (31 << 15), 4).unwrap();
        assert_eq!(ecam.mmio_read(ECAM_BASE + (31 << 15), 4), 0x7000_8086);
        assert_eq!(ecam.mmio_read(ECAM_BASE + (31 << 15) + 2, 2), 0x7000);
        assert_eq!(ecam.mmio_read(ECAM_BASE + (1 << 20), 4), 0xffff_ffff);
        assert_eq!(
            b.ports.get(0xcfe).unwrap().port_read(0xcfe, 2),
            Some(0xffff)
        );
        b.ports.get(0xcf8).unwrap().port_write(0xcf8, 4, 0);
        assert_eq!(
            b.ports.get(0xcfc).unwrap().port_read(0xcfc, 4),
            Some(u32::MAX)
        );
    }

    #[test]
    fn functions_of_one_slot_say_so() {
        let (b, _) = build(&[
            slot(0, 0, "hostbridge"),
            slot(1, 0, "amd_hostbridge"),
            slot(1, 3, "lpc"),
        ])
        .unwrap();
        assert_eq!(read(&b, 0, 0, 0x0c) >> 16, 0);
        assert_eq!(read(&b, 1, 0, 0x0c) >> 16, 0x80);
        assert_eq!(read(&b, 1, 3, 0x0c) >> 16, 0x80);
    }

    #[test]
    fn the_lpc_bridge_routes_links() {
        let (b, _) = build(&[slot(1, 0, "lpc")]).unwrap();
        assert_eq!(read(&b, 1, 0, 0x60), 0x8080_8080);
        b.ports.get(0xcfd).unwrap().port_write(0xcfd, 1, 0x7b);
        assert_eq!(read(&b, 1, 0, 0x60), 0x8080_0b80);
    }

    #[test]
    fn refusals_name_the_slot_and_what_exists() {
        let e = build(&[slot(4, 0, "virtio-9000")])
            .err()
            .unwrap()
            .to_string();
        let words = "-s 0:4:0,virtio-9000: no such emulation; there is hostbridge, ";
        assert!(e.starts_with(words), "{e}");
        assert!(matches!(
            build(&[slot(1, 0, "lpc"), slot(2, 0, "lpc")]),
            Err(PciError::SecondLpc(_))
        ));
    }
}
