//! What configuration space tells of functions and of the bridges above them.

/// Segment 0 of a host's PCI, by requester ID (bus, slot and function).
pub trait Config {
    /// Four bytes of a function's configuration space, at a multiple of four;
    /// `None`: there is no such function. Where the host does not show extended
    /// configuration space, it is all ones.
    fn config(&self, rid: u16, at: u16) -> Option<u32>;

    /// As [`Config::config`], all ones where there is nothing.
    fn read(&self, rid: u16, at: u16) -> u32 {
        self.config(rid, at).unwrap_or(u32::MAX)
    }

    /// Whether there is such a function.
    fn exists(&self, rid: u16) -> bool {
        self.config(rid, HEADER).is_some()
    }

    /// Secondary and subordinate bus of a bridge (PCI-to-PCI Bridge Architecture
    /// 1.2 §3.2.5); `None`: it is none.
    fn buses(&self, rid: u16) -> Option<(u8, u8)> {
        let header = self.config(rid, HEADER)? >> 16 & 0x7f;
        let value = self.config(rid, BUSES)?;
        (header == 1).then_some(((value >> 8) as u8, (value >> 16) as u8))
    }

    /// The bridge that a bus is behind, if it is no root bus.
    fn bridge_to(&self, bus: u8) -> Option<u16> {
        // A bridge's own bus comes before those behind it. A device whose first
        // function is not there has no bridges.
        (0..u16::from(bus) << 5)
            .map(|slot| slot << 3)
            .filter(|first| self.exists(*first))
            .flat_map(|first| first..first + 8)
            .find(|rid| {
                self.buses(*rid)
                    .is_some_and(|(secondary, _)| secondary == bus)
            })
    }

    /// Device and port type of a PCI Express function (PCI Express 6.0 §7.5.3.2).
    fn port_type(&self, rid: u16) -> Option<u8> {
        const EXPRESS: u8 = 0x10;
        let at = capability(|at| self.read(rid, at), EXPRESS)?;
        Some((self.read(rid, at) >> 20 & 0xf) as u8)
    }
}

impl<C: Config> Config for &C {
    fn config(&self, rid: u16, at: u16) -> Option<u32> {
        (**self).config(rid, at)
    }
}

/// A host's PCI with its bridges looked for once: [`Config::bridge_to`] asks for all
/// functions of all buses before, which may each cost a walk through a list.
pub struct Bridges<C> {
    pci: C,
    /// By secondary bus; `NONE`: it is behind none.
    above: [u16; 256],
}

/// No bridge: the last function of the last bus, behind which none can be.
const NONE: u16 = u16::MAX;

impl<C: Config> Bridges<C> {
    /// As the bridges are set up now.
    pub fn new(pci: C) -> Self {
        let mut above = [NONE; 256];
        let slots = (0..=u16::MAX >> 3).map(|slot| slot << 3);
        for first in slots.filter(|first| pci.exists(*first)) {
            for rid in first..=first | 7 {
                if let Some((secondary, _)) = pci.buses(rid)
                    && u16::from(secondary) > rid >> 8
                    && let Some(at) = above.get_mut(usize::from(secondary))
                    && *at == NONE
                {
                    *at = rid;
                }
            }
        }
        Bridges { pci, above }
    }
}

impl<C: Config> Config for Bridges<C> {
    fn config(&self, rid: u16, at: u16) -> Option<u32> {
        self.pci.config(rid, at)
    }

    fn bridge_to(&self, bus: u8) -> Option<u16> {
        let at = self.above.get(usize::from(bus)).copied();
        at.filter(|rid| *rid != NONE)
    }
}

/// Header type, the third byte of this word (PCI Local Bus 3.0 §6.2.1).
pub(super) const HEADER: u16 = 0xc;
const BUSES: u16 = 0x18;

/// Offset of a capability (PCI Local Bus 3.0 §6.7).
pub fn capability(config: impl Fn(u16) -> u32, id: u8) -> Option<u16> {
    const STATUS: u16 = 4;
    const POINTER: u16 = 0x34;
    if config(STATUS) >> 20 & 1 == 0 {
        return None;
    }
    let mut at = config(POINTER) as u16 & 0xfc;
    // Twice as many as there is room for: a list may be a ring.
    for _ in 0..96 {
        if at < 0x40 {
            return None;
        }
        let word = config(at);
        if word as u8 == id {
            return Some(at);
        }
        at = (word >> 8) as u16 & 0xfc;
    }
    None
}

/// Offset of an extended capability (PCI Express 6.0 §7.6.3).
pub fn extended_capability(config: impl Fn(u16) -> u32, id: u16) -> Option<u16> {
    let mut at = 0x100;
    // As many as there is room for.
    for _ in 0..0xf00 / 8 {
        let word = config(at);
        if word == 0 || word == u32::MAX {
            return None;
        }
        if word as u16 == id {
            return Some(at);
        }
        at = (word >> 20) as u16 & 0xffc;
        if at < 0x100 {
            return None;
        }
    }
    None
}
