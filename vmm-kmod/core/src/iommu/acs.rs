//! Groups of functions that can reach each other without asking an IOMMU: those
//! of one device, or behind one bridge, where access control services (ACS, PCI
//! Express 6.0 §6.12) do not send all that they say up to the root. Of a group,
//! a guest gets what it is to have, and the host keeps nothing.

use core::ops::RangeInclusive;

use super::pci::{Config, HEADER, extended_capability};

const ACS: u16 = 0xd;
/// Single root I/O virtualization (§9.3.3).
const SR_IOV: u16 = 0x10;

/// ACS capability and control: source validation, request and completion
/// redirect, upstream forwarding (§7.7.11.2). What the capability lacks of
/// these either does not apply or is always so.
const NEEDED: u32 = 0x1d;

// Device and port types (§7.5.3.2).
const ENDPOINT: u8 = 0;
const LEGACY_ENDPOINT: u8 = 1;
const ROOT_PORT: u8 = 4;
const UPSTREAM: u8 = 5;
const DOWNSTREAM: u8 = 6;
const INTEGRATED_ENDPOINT: u8 = 9;
const EVENT_COLLECTOR: u8 = 10;

/// Offset of a function's ACS capability.
fn services(pci: &impl Config, rid: u16) -> Option<u16> {
    extended_capability(|at| pci.read(rid, at), ACS)
}

/// Requester IDs of one bus.
#[derive(Clone, Copy, Debug)]
pub struct Ids {
    bus: u16,
    has: [bool; 256],
}

impl Ids {
    /// All of the bus of this one.
    pub fn bus(id: u16) -> Self {
        Ids {
            bus: id & 0xff00,
            has: [true; 256],
        }
    }

    /// This one.
    pub fn one(id: u16) -> Self {
        let mut ids = Ids::bus(id);
        ids.has = [false; 256];
        ids.put(id, true);
        ids
    }

    fn put(&mut self, id: u16, value: bool) {
        if let Some(has) = self.has.get_mut(usize::from(id as u8)) {
            *has = value;
        }
    }

    /// Calls `f` with each of them.
    ///
    /// # Errors
    /// The first of `f`, which ends it.
    pub fn each<E>(&self, mut f: impl FnMut(u16) -> Result<(), E>) -> Result<(), E> {
        for (id, has) in (self.bus..=self.bus | 0xff).zip(&self.has) {
            if *has {
                f(id)?;
            }
        }
        Ok(())
    }
}

/// Requester IDs that a function could send under, as phantom functions do
/// (§7.5.3.3), and that no function has: those of its bus below the port, as source
/// validation looks at the bus alone (and lets pass those of further buses that the port
/// has reserved, too). `None`: it is behind no port (what is
/// there belongs to the chipset, which may have more there than it shows), or the host
/// keeps a function there whose virtual functions may be to come; `held` is whether
/// one is kept for guests.
pub fn strays(pci: &impl Config, rid: u16, held: &dyn Fn(u16) -> bool) -> Option<Ids> {
    let port = pci.bridge_to((rid >> 8) as u8)?;
    let (Some(ROOT_PORT | DOWNSTREAM), mut ids) = (pci.port_type(port), Ids::bus(rid)) else {
        return None;
    };
    for f in device(pci, rid).filter(|f| pci.exists(*f)) {
        ids.put(f, false);
        if !held(f) && extended_capability(|at| pci.read(f, at), SR_IOV).is_some() {
            return None;
        }
    }
    Some(ids)
}

/// Requester IDs that pass when a function is the host's again: its own; that of all
/// there is or will be on its bus if none of them is kept for guests; and where the host
/// now has a function there whose virtual functions may be to come, those of all that
/// are not kept.
pub fn returned(pci: &impl Config, rid: u16, held: &dyn Fn(u16) -> bool) -> Ids {
    let mut ids = Ids::bus(rid);
    let mut kept = false;
    for id in rid & 0xff00..=rid | 0xff {
        if held(id) {
            ids.put(id, false);
            kept = true;
        }
    }
    if kept && strays(pci, rid, held).is_some() {
        return Ids::one(rid);
    }
    ids
}

/// Where the functions of a function's device are. Behind a port there is one
/// device, which with alternative routing-IDs (ARI, §6.13), or virtual functions,
/// has functions all over its bus.
fn device(pci: &impl Config, rid: u16) -> RangeInclusive<u16> {
    let port = pci.bridge_to((rid >> 8) as u8).map(|b| pci.port_type(b));
    match port {
        Some(Some(ROOT_PORT | DOWNSTREAM)) => rid & 0xff00..=rid | 0xff,
        _ => rid & !7..=rid | 7,
    }
}

/// Whether its device has more functions than one.
fn has_siblings(pci: &impl Config, rid: u16) -> bool {
    rid & 7 != 0
        || pci.read(rid, HEADER) >> 23 & 1 != 0
        || device(pci, rid).any(|other| other != rid && pci.exists(other))
}

/// Whether a function can be told to send all that goes through it, or from it
/// to its siblings, up to the root.
fn isolates(pci: &impl Config, rid: u16) -> bool {
    match pci.port_type(rid) {
        Some(ROOT_PORT | DOWNSTREAM) => services(pci, rid).is_some(),
        Some(ENDPOINT | LEGACY_ENDPOINT | UPSTREAM | INTEGRATED_ENDPOINT | EVENT_COLLECTOR) => {
            !has_siblings(pci, rid) || services(pci, rid).is_some()
        }
        // To, from and on conventional PCI everybody hears everybody.
        _ => false,
    }
}

/// The bridges above a function, the nearest first.
fn above(pci: &impl Config, rid: u16) -> impl Iterator<Item = u16> {
    let mut at = rid;
    core::iter::from_fn(move || {
        at = pci.bridge_to((at >> 8) as u8)?;
        Some(at)
    })
}

/// The first of the functions of a function's group: two are in one group if this
/// is the same.
pub fn group(pci: &impl Config, rid: u16) -> u16 {
    // What is below a bridge that lets it through can reach all else below that.
    let top = above(pci, rid)
        .filter(|bridge| !isolates(pci, *bridge))
        .last()
        .unwrap_or(rid);
    if isolates(pci, top) || !has_siblings(pci, top) {
        return top;
    }
    let first = device(pci, top).find(|s| pci.exists(*s) && !isolates(pci, *s));
    first.unwrap_or(top)
}

/// All functions of a function's group, itself and bridges among them.
pub fn members(pci: &impl Config, rid: u16) -> impl Iterator<Item = u16> {
    let first = group(pci, rid);
    let device = device(pci, first);
    device.filter(|s| pci.exists(*s)).flat_map(move |s| {
        let buses = pci.buses(s).map(|(from, to)| from..=to);
        let below = buses
            .into_iter()
            .flatten()
            .flat_map(|bus| (0..=0xff).map(move |n| u16::from(bus) << 8 | n));
        core::iter::once(s)
            .chain(below.filter(|b| pci.exists(*b)))
            .filter(move |m| group(pci, *m) == first)
    })
}

/// Calls `write` with what is to be written so that a function and the bridges
/// above it send all up to the root: whose, where (a multiple of four), and the
/// four bytes. A reset of the function undoes its part.
///
/// # Errors
/// The first of them, after all, that does not keep what was written.
pub fn enable(
    pci: &impl Config,
    rid: u16,
    mut write: impl FnMut(u16, u16, u32),
) -> Result<(), u16> {
    let mut done = Ok(());
    for f in core::iter::once(rid).chain(above(pci, rid)) {
        if let Some(at) = services(pci, f) {
            let at = at + 4;
            let both = pci.read(f, at);
            // The capability is the lower half, control the upper one.
            let control = (both & NEEDED) << 16;
            let wanted = both | control;
            if wanted != both {
                write(f, at, wanted);
                if pci.read(f, at) & control != control {
                    done = done.and(Err(f));
                }
            }
        }
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iommu::pci::Bridges;
    use std::cell::RefCell;
    use std::collections::BTreeMap;
    use std::vec;
    use std::vec::Vec;

    /// Functions by requester ID, each with its configuration space.
    #[derive(Default)]
    struct Host(BTreeMap<u16, Vec<u32>>);

    impl Config for Host {
        fn config(&self, rid: u16, at: u16) -> Option<u32> {
            Some(self.0.get(&rid)?[usize::from(at / 4)])
        }
    }

    impl Host {
        /// A function of this port type (16: conventional), with these services.
        fn add(&mut self, rid: u16, kind: u32, services: Option<u32>) -> &mut Vec<u32> {
            let mut c = vec![0; 1024];
            if kind < 16 {
                c[1] = 1 << 20;
                c[0x34 / 4] = 0x40;
                c[0x40 / 4] = 0x10 | kind << 20;
            }
            if let Some(services) = services {
                // Behind another one.
                c[0x100 / 4] = 1 | 1 << 16 | 0x140 << 20;
                c[0x140 / 4] = u32::from(ACS) | 1 << 16;
                c[0x144 / 4] = services;
            }
            if rid & 7 != 0 {
                // The slot's first one says so.
                let first = self.0.get_mut(&(rid & !7)).unwrap();
                first[3] |= 1 << 23;
            }
            self.0.insert(rid, c);
            self.0.get_mut(&rid).unwrap()
        }
        fn bridge(&mut self, rid: u16, kind: u32, services: Option<u32>, from: u32, to: u32) {
            let c = self.add(rid, kind, services);
            c[3] = 1 << 16;
            c[0x18 / 4] = from << 8 | to << 16;
        }
        fn members(&self, rid: u16) -> Vec<u16> {
            let all: Vec<u16> = members(self, rid).collect();
            let known: Vec<u16> = members(&Bridges::new(self), rid).collect();
            assert_eq!(known, all, "of {rid:x}, with the bridges looked for before");
            all
        }
    }

    const ALL: Option<u32> = Some(0x5f);

    fn at(bus: u16, slot: u16, function: u16) -> u16 {
        bus << 8 | slot << 3 | function
    }

    #[test]
    fn what_stands_alone_is_a_group_of_its_own() {
        let mut h = Host::default();
        h.add(at(0, 0, 0), 16, None);
        h.add(at(0, 2, 0), 9, None);
        h.bridge(at(0, 0x1c, 0), 4, ALL, 1, 1);
        h.add(at(1, 0, 0), 0, None);
        h.bridge(at(0, 0x1d, 0), 4, ALL, 2, 2);
        h.add(at(2, 0, 0), 0, None);
        for rid in h.0.keys() {
            assert_eq!(h.members(*rid), [*rid], "{rid:x}");
        }
    }

    #[test]
    fn functions_of_a_device_are_told_apart_by_services_alone() {
        let mut h = Host::default();
        h.bridge(at(0, 0x1c, 0), 4, ALL, 1, 1);
        for function in 0..4 {
            let services = if function == 2 { Some(0) } else { None };
            h.add(at(1, 0, function), 0, services);
        }
        let together = [at(1, 0, 0), at(1, 0, 1), at(1, 0, 3)];
        for rid in together {
            assert_eq!(h.members(rid), together);
        }
        assert_eq!(h.members(at(1, 0, 2)), [at(1, 0, 2)]);
        // A chipset's, which are conventional.
        for function in [0, 2, 3] {
            h.add(at(0, 0x1f, function), 16, None);
        }
        assert_eq!(h.members(at(0, 0x1f, 2)).len(), 3);
    }

    #[test]
    fn a_port_without_services_joins_all_that_is_below_it() {
        let mut h = Host::default();
        // A switch: its upstream port, two downstream ones, one of them without.
        h.bridge(at(0, 0x1c, 0), 4, ALL, 1, 5);
        h.bridge(at(1, 0, 0), 5, None, 2, 5);
        h.bridge(at(2, 0, 0), 6, ALL, 3, 3);
        h.bridge(at(2, 1, 0), 6, None, 4, 5);
        h.add(at(3, 0, 0), 0, None);
        h.add(at(4, 0, 0), 0, None);
        assert_eq!(h.members(at(3, 0, 0)), [at(3, 0, 0)]);
        assert_eq!(h.members(at(4, 0, 0)), [at(2, 1, 0), at(4, 0, 0)]);
        // Without it at the root port all of the switch is one.
        h.bridge(at(0, 0x1c, 0), 4, None, 1, 5);
        assert_eq!(h.members(at(3, 0, 0)).len(), 6);
        // And with the root port's sibling, which has none either, and what it has.
        h.bridge(at(0, 0x1c, 1), 4, None, 6, 6);
        h.0.get_mut(&at(0, 0x1c, 0)).unwrap()[3] |= 1 << 23;
        h.add(at(6, 0, 0), 0, None);
        let all = h.members(at(6, 0, 0));
        assert_eq!(all, h.members(at(4, 0, 0)));
        assert_eq!(all.len(), 8);
    }

    #[test]
    fn conventional_pci_is_one_group_behind_its_bridge() {
        let mut h = Host::default();
        h.bridge(at(0, 0x1c, 0), 4, ALL, 1, 2);
        h.bridge(at(1, 0, 0), 7, None, 2, 2);
        h.add(at(2, 0, 0), 16, None);
        h.add(at(2, 1, 0), 16, None);
        assert_eq!(
            h.members(at(2, 1, 0)),
            [at(1, 0, 0), at(2, 0, 0), at(2, 1, 0)]
        );
    }

    #[test]
    fn services_are_turned_on_all_the_way_up() {
        let mut h = Host::default();
        h.bridge(at(0, 0x1c, 0), 4, ALL, 1, 3);
        h.bridge(at(1, 0, 0), 5, None, 2, 3);
        h.bridge(at(2, 0, 0), 6, Some(0x1d_001d), 3, 3);
        h.add(at(3, 0, 0), 0, Some(0x4));
        let h = Live(RefCell::new(h));
        let written = RefCell::new(vec![]);
        let write = |rid, at, value| {
            written.borrow_mut().push((rid, at, value));
            h.write(rid, at, value);
        };
        assert_eq!(enable(&h, at(3, 0, 0), write), Ok(()));
        let endpoint = (at(3, 0, 0), 0x144, 0x4_0004);
        assert_eq!(
            written.take(),
            [endpoint, (at(0, 0x1c, 0), 0x144, 0x1d_005f)]
        );
        assert_eq!(enable(&h, at(3, 0, 0), write), Ok(()));
        assert_eq!(written.take(), [], "it is done");
        // A reset of the endpoint.
        h.write(at(3, 0, 0), 0x144, 0x4);
        assert_eq!(enable(&h, at(3, 0, 0), write), Ok(()));
        assert_eq!(written.take(), [endpoint]);
    }

    #[test]
    fn services_that_do_not_turn_on_are_told() {
        let mut h = Host::default();
        h.bridge(at(0, 0x1c, 0), 4, ALL, 1, 1);
        h.add(at(1, 0, 0), 0, Some(0x4));
        let h = Live(RefCell::new(h));
        let dead = at(0, 0x1c, 0);
        let write = |rid, at, value| {
            if rid != dead {
                h.write(rid, at, value);
            }
        };
        assert_eq!(enable(&h, at(1, 0, 0), write), Err(dead));
        // That of the others is done all the same.
        assert_eq!(h.read(at(1, 0, 0), 0x144), 0x4_0004);
    }

    /// Of which configuration space is written.
    struct Live(RefCell<Host>);

    impl Config for Live {
        fn config(&self, rid: u16, at: u16) -> Option<u32> {
            self.0.borrow().config(rid, at)
        }
    }

    impl Live {
        fn write(&self, rid: u16, at: u16, value: u32) {
            let mut h = self.0.borrow_mut();
            h.0.get_mut(&rid).unwrap()[usize::from(at / 4)] = value;
        }
    }

    #[test]
    fn functions_all_over_the_bus_are_one_device() {
        let mut h = Host::default();
        h.bridge(at(0, 0x1c, 0), 4, ALL, 1, 1);
        h.add(at(1, 0, 0), 0, None);
        assert_eq!(h.members(at(1, 0, 0)), [at(1, 0, 0)]);
        // ARI: function 9, which no bit of the first one tells of.
        h.add(at(1, 1, 0), 0, None);
        let both = [at(1, 0, 0), at(1, 1, 0)];
        assert_eq!(h.members(at(1, 0, 0)), both);
        assert_eq!(h.members(at(1, 1, 0)), both);
        // On a root bus slots are devices.
        h.add(at(0, 2, 0), 9, None);
        h.add(at(0, 3, 0), 9, None);
        assert_eq!(h.members(at(0, 3, 0)), [at(0, 3, 0)]);
    }

    #[test]
    fn strays_are_what_no_function_has_below_a_port() {
        let list = |ids: Ids| {
            let mut all = vec![];
            let _ = ids.each(|id| {
                all.push(id);
                Ok::<(), ()>(())
            });
            all
        };
        let strays = |h: &Host, rid, held: u16| super::strays(h, rid, &|f| f == held).map(list);
        let mut h = Host::default();
        h.add(at(0, 2, 0), 9, None);
        h.add(at(0, 2, 3), 9, None);
        assert_eq!(strays(&h, at(0, 2, 3), 0), None, "the chipset's");
        h.bridge(at(0, 0x1c, 0), 4, ALL, 1, 2);
        h.add(at(1, 0, 0), 0, None);
        h.add(at(1, 9, 0), 0, None);
        assert_eq!(
            list(Ids::bus(0xffee)),
            (0xff00..=0xffff).collect::<Vec<_>>()
        );
        assert_eq!(list(Ids::one(0xffff)), [0xffff]);
        let all: Vec<u16> = (0x100..0x200).collect();
        assert_eq!(list(Ids::bus(at(1, 9, 0))), all);
        let free = |id: &u16| ![at(1, 0, 0), at(1, 9, 0)].contains(id);
        let rest: Vec<u16> = all.into_iter().filter(free).collect();
        assert_eq!(rest.len(), 254);
        assert_eq!(strays(&h, at(1, 0, 0), 0), Some(rest.clone()));
        // Virtual functions to come: the host's, but not those of what is kept.
        h.0.get_mut(&at(1, 0, 0)).unwrap()[0x100 / 4] = u32::from(SR_IOV) | 1 << 16;
        assert_eq!(strays(&h, at(1, 9, 0), 0), None);
        assert_eq!(strays(&h, at(1, 9, 0), at(1, 0, 0)), Some(rest));
        // It goes back to the host, while its sibling is kept, then that one too.
        let returned = |h: &Host, rid, held: u16| list(super::returned(h, rid, &|f| f == held));
        let all: Vec<u16> = (0x100..0x200).collect();
        let others: Vec<u16> = all
            .iter()
            .copied()
            .filter(|id| *id != at(1, 9, 0))
            .collect();
        assert_eq!(returned(&h, at(1, 0, 0), at(1, 9, 0)), others);
        assert_eq!(returned(&h, at(1, 9, 0), at(1, 0, 0)), [at(1, 9, 0)]);
        assert_eq!(returned(&h, at(1, 9, 0), 0), all);
        // One of them on the bus behind, which no bridge leads to.
        h.add(at(2, 0, 0), 0, None);
        assert_eq!(strays(&h, at(2, 0, 0), 0), None);
        // Behind a bridge to conventional PCI.
        h.bridge(at(0, 0x1d, 0), 7, None, 3, 3);
        h.add(at(3, 0, 0), 16, None);
        assert_eq!(strays(&h, at(3, 0, 0), 0), None);
    }

    #[test]
    fn lists_that_lead_round_or_nowhere_end() {
        let mut h = Host::default();
        let c = h.add(at(0, 1, 0), 4, None);
        (c[0x100 / 4], c[0x140 / 4]) = (1 | 0x140 << 20, 2 | 0x100 << 20);
        assert!(!isolates(&h, at(0, 1, 0)));
        h.0.get_mut(&at(0, 1, 0)).unwrap()[0x100 / 4] = u32::MAX;
        assert!(!isolates(&h, at(0, 1, 0)));
        // A bridge to its own bus, and one to a bus before it.
        h.bridge(at(1, 0, 0), 4, None, 1, 255);
        h.bridge(at(2, 0, 0), 4, None, 1, 0);
        assert_eq!(group(&h, at(2, 0, 0)), at(2, 0, 0));
        assert_eq!(h.members(at(2, 0, 0)), [at(2, 0, 0)]);
    }
}
