//! The PIRQ router of a PIIX-like LPC bridge: INTx lines to eight links, links
//! to ISA interrupts (Intel 82371SB §4.1.7, PIRQRC), beside the I/O APIC pins
//! that the same lines drive.

use std::sync::{Arc, Mutex};

use crate::lock;
use crate::machine::Machine;

/// Link register: not routed.
const DISABLED: u8 = 0x80;
const IRQ: u8 = 0x0f;
/// ISA interrupts that a link may use: 3 to 7, 9 to 12, 14 and 15.
pub const PERMITTED: u16 = 0xdef8;
/// Links, LNKA to LNKH.
pub const LINKS: usize = 8;

/// Where one INTx pin of one slot goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// I/O APIC pin.
    pub ioapic: u8,
    /// Link, 0 for LNKA.
    pub link: u8,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    register: u8,
    users: u32,
    active: u32,
}

struct State {
    links: [Link; LINKS],
    /// Users of each ISA interrupt, `None` where a link may not go.
    isa: [Option<u32>; 16],
    /// The next I/O APIC pin, and how many there are behind the first 16.
    next_pin: u8,
    pins: u8,
}

/// The router.
pub struct Router {
    state: Mutex<State>,
    machine: Arc<dyn Machine>,
}

fn isa_of(register: u8) -> Option<u8> {
    let irq = register & IRQ;
    (register & DISABLED == 0 && PERMITTED & (1 << irq) != 0).then_some(irq)
}

impl Router {
    /// A router for an I/O APIC with `pins` pins.
    pub fn new(machine: Arc<dyn Machine>, pins: u8) -> Router {
        let isa = std::array::from_fn(|irq| (PERMITTED & (1 << irq) != 0).then_some(0));
        let link = Link {
            register: DISABLED,
            users: 0,
            active: 0,
        };
        let state = State {
            links: [link; LINKS],
            isa,
            next_pin: 0,
            pins: pins.saturating_sub(16),
        };
        Router {
            state: Mutex::new(state),
            machine,
        }
    }

    /// Keeps links away from an ISA interrupt that a device has for itself.
    pub fn reserve(&self, irq: u8) {
        if let Some(users) = lock(&self.state).isa.get_mut(usize::from(irq)) {
            *users = None;
        }
    }

    /// Counts a level-triggered user of an ISA interrupt, such as the SCI.
    pub fn share(&self, irq: u8) {
        if let Some(Some(users)) = lock(&self.state).isa.get_mut(usize::from(irq)) {
            *users += 1;
        }
    }

    /// A route for one more INTx pin: the next I/O APIC pin, the least used
    /// link, and for a new link the least used ISA interrupt.
    pub fn allocate(&self) -> Option<Route> {
        let mut state = lock(&self.state);
        if state.pins == 0 {
            return None;
        }
        let ioapic = 16 + state.next_pin;
        state.next_pin = (state.next_pin + 1) % state.pins;
        let (index, _) = state
            .links
            .iter()
            .enumerate()
            .min_by_key(|(_, l)| l.users)?;
        let best = state
            .isa
            .iter()
            .enumerate()
            .filter_map(|(i, u)| u.map(|u| (u, i)))
            .min();
        let link = state.links.get_mut(index)?;
        link.users += 1;
        if link.register == DISABLED {
            let (_, irq) = best?;
            link.register = irq as u8;
            if let Some(Some(users)) = state.isa.get_mut(irq) {
                *users += 1;
            }
            self.machine.isa_level_triggered(irq as u8);
        }
        Some(Route {
            ioapic,
            link: index as u8,
        })
    }

    /// A link's register (configuration space 0x60 to 0x63, 0x68 to 0x6b of
    /// the bridge).
    pub fn read(&self, link: u8) -> u8 {
        lock(&self.state)
            .links
            .get(usize::from(link))
            .map_or(DISABLED, |l| l.register)
    }

    /// Routes a link elsewhere; a line that is up moves with it.
    pub fn write(&self, link: u8, value: u8) {
        let mut state = lock(&self.state);
        let Some(l) = state.links.get_mut(usize::from(link)) else {
            return;
        };
        let value = value & (DISABLED | IRQ);
        if l.register == value {
            return;
        }
        if l.active > 0
            && let Some(irq) = isa_of(l.register)
        {
            self.machine.isa_deassert(irq, None);
        }
        l.register = value;
        if l.active > 0
            && let Some(irq) = isa_of(l.register)
        {
            self.machine.isa_assert(irq, None);
        }
    }

    /// The ISA interrupt of a route now, for the INTLINE register.
    pub fn isa(&self, route: Route) -> u8 {
        self.read(route.link) & IRQ
    }

    /// Raises an INTx line.
    pub fn assert(&self, route: Route) {
        let mut state = lock(&self.state);
        if let Some(l) = state.links.get_mut(usize::from(route.link)) {
            l.active += 1;
            if l.active == 1
                && let Some(irq) = isa_of(l.register)
            {
                self.machine.isa_assert(irq, Some(route.ioapic));
                return;
            }
        }
        self.machine.ioapic_assert(route.ioapic);
    }

    /// Lowers it.
    pub fn deassert(&self, route: Route) {
        let mut state = lock(&self.state);
        if let Some(l) = state.links.get_mut(usize::from(route.link)) {
            l.active = l.active.saturating_sub(1);
            if l.active == 0
                && let Some(irq) = isa_of(l.register)
            {
                self.machine.isa_deassert(irq, Some(route.ioapic));
                return;
            }
        }
        self.machine.ioapic_deassert(route.ioapic);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::fake::{Event, Fake};

    #[test]
    fn links_spread_and_avoid_reserved_interrupts() {
        let fake = Fake::new();
        let r = Router::new(fake.clone(), 32);
        r.reserve(3);
        r.reserve(4);
        r.share(9);
        let routes: Vec<Route> = (0..17).filter_map(|_| r.allocate()).collect();
        assert_eq!(
            routes[0],
            Route {
                ioapic: 16,
                link: 0
            }
        );
        assert_eq!(routes[15].ioapic, 31);
        assert_eq!(routes[16].ioapic, 16, "pins are shared when they run out");
        assert_eq!(r.isa(routes[0]), 5);
        for route in routes {
            assert!(![3, 4].contains(&r.isa(route)));
        }
        assert!(fake.take().contains(&Event::Level(5)));
    }

    #[test]
    fn a_line_that_is_up_follows_its_link() {
        let fake = Fake::new();
        let r = Router::new(fake.clone(), 24);
        let a = r.allocate().unwrap();
        fake.take();
        r.assert(a);
        r.write(a.link, 11);
        r.write(a.link, 0x80);
        r.deassert(a);
        assert_eq!(
            fake.take(),
            [
                Event::IsaAssert(3, Some(16)),
                Event::IsaDeassert(3, None),
                Event::IsaAssert(11, None),
                Event::IsaDeassert(11, None),
                Event::Deassert(16)
            ]
        );
    }

    #[test]
    fn forbidden_interrupts_are_never_driven() {
        let fake = Fake::new();
        let r = Router::new(fake.clone(), 24);
        let a = r.allocate().unwrap();
        fake.take();
        r.write(a.link, 0x0d);
        r.assert(a);
        assert_eq!(fake.take(), [Event::Assert(16)]);
    }
}
