//! What the command line says, and what the guest may do to configuration space.

use std::path::PathBuf;
use std::str::FromStr;

use vmmapi::host_pci::PciAddress;

use crate::pci::config::*;

/// Which function of the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// The one at this place.
    At(PciAddress),
    /// `pptN`.
    Unit(u64),
}

/// `passthru,WHICH[,rom=FILE]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The function.
    pub which: Which,
    /// An expansion ROM for it.
    pub rom: Option<PathBuf>,
}

/// What can stand for the function.
const FORMS: &str = "bus/slot/function as 5/0/0, pci0:5:0:0, ppt0, or Linux's 0000:05:00.0";

impl FromStr for Options {
    type Err = String;
    fn from_str(s: &str) -> Result<Options, String> {
        let mut words = s.split(',');
        let which = words.next().unwrap_or_default();
        let mut options = Options {
            which: parse_which(which)
                .ok_or_else(|| format!("\"{which}\" is no PCI function: {FORMS}"))?,
            rom: None,
        };
        for word in words {
            match word.split_once('=') {
                Some(("rom", path)) if !path.is_empty() => options.rom = Some(path.into()),
                _ => return Err(format!("\"{word}\": there is only rom=FILE")),
            }
        }
        Ok(options)
    }
}

/// A function as any of the programs that know one writes it; see `FORMS`.
pub fn parse_which(s: &str) -> Option<Which> {
    if let Some(unit) = s.strip_prefix("ppt") {
        return unit.parse().ok().map(Which::Unit);
    }
    let decimal = |words: &[&str]| match words {
        [b, s, f] => address(b.parse().ok()?, s.parse().ok()?, f.parse().ok()?),
        _ => None,
    };
    let at = if let Some(rest) = s.strip_prefix("pci") {
        match rest.split(':').collect::<Vec<_>>().as_slice() {
            // Only the first segment.
            [segment, rest @ ..] if rest.len() == 3 => {
                (segment.parse() == Ok(0)).then(|| decimal(rest))?
            }
            rest => decimal(rest),
        }
    } else if s.contains('/') {
        decimal(&s.split('/').collect::<Vec<_>>())
    } else {
        parse_linux(s)
    };
    at.map(Which::At)
}

/// `0000:05:00.0`, hexadecimal, the segment 0 or left out.
pub fn parse_linux(s: &str) -> Option<PciAddress> {
    let hex = |t: &str| u32::from_str_radix(t, 16).ok();
    let (rest, func) = s.rsplit_once('.')?;
    let mut words = rest.rsplit(':');
    let (slot, bus) = (words.next()?, words.next()?);
    let segment = words.next();
    if words.next().is_some() || segment.is_some_and(|t| hex(t) != Some(0)) {
        return None;
    }
    address(hex(bus)?, hex(slot)?, hex(func)?)
}

fn address(bus: u32, slot: u32, func: u32) -> Option<PciAddress> {
    let at = PciAddress {
        bus: u8::try_from(bus).ok()?,
        slot: u8::try_from(slot).ok()?,
        func: u8::try_from(func).ok()?,
    };
    (at.slot < 32 && at.func < 8).then_some(at)
}

/// Who answers a byte of configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Byte {
    /// Ours; the guest may change these bits, and nobody but it hears of that.
    Ours(u8),
    /// The device; these bits are cleared by writing them.
    Clears(u8),
    /// The device.
    Theirs,
}

/// An MSI capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiCapability {
    /// Where it is.
    pub at: u16,
    /// Its address has 64 bits.
    pub wide: bool,
}

/// An MSI-X capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixCapability {
    /// Where it is.
    pub at: u16,
    /// Entries.
    pub vectors: u16,
    /// BAR and offset of the table.
    pub table: (usize, u64),
    /// BAR and offset of the pending bits.
    pub pba: (usize, u64),
}

/// A write for the device: offset, size, value.
pub type Write = (u16, u8, u32);

/// The rules of one function's configuration space.
#[derive(Clone, Debug)]
pub struct Rules {
    bytes: [Byte; 256],
    /// MSI, if the device has it.
    pub msi: Option<MsiCapability>,
    /// MSI-X, likewise.
    pub msix: Option<MsixCapability>,
}

/// Length of a capability that is the same for all devices, or of what of it is
/// known; the others are hidden up to the next.
fn length(id: u8, image: &[u8; 256], at: u16) -> u16 {
    let control = u16::from_le_bytes([byte(image, at + 2), byte(image, at + 3)]);
    match id {
        CAP_PM => 8,
        // 64-bit address: 4 more; mask and pending bits: 8 or 10 more.
        CAP_MSI => match (control & MSI_WIDE != 0, control & MSI_MASKS != 0) {
            (false, false) => 10,
            (true, false) => 14,
            (false, true) => 20,
            (true, true) => 24,
        },
        CAP_MSIX => 12,
        CAP_SSVID => 8,
        // Version 1 ends behind the link's registers of an endpoint.
        CAP_PCIE if control & 0xf < 2 => 0x14,
        CAP_PCIE => 0x3c,
        CAP_VENDOR => u16::from(byte(image, at + 2)).max(3),
        _ => 4,
    }
}

const MSI_WIDE: u16 = 0x80;
const MSI_MASKS: u16 = 0x100;

fn byte(image: &[u8; 256], at: u16) -> u8 {
    image.get(usize::from(at)).copied().unwrap_or(0)
}

impl Rules {
    /// The rules for a device whose configuration space reads as `image`, and what
    /// of it the guest sees.
    pub fn new(image: &[u8; 256]) -> (Rules, Config) {
        let mut rules = Rules {
            bytes: [Byte::Theirs; 256],
            msi: None,
            msix: None,
        };
        let mut config = Config::default();
        for (at, value) in (0..).zip(image) {
            config.set8(at, *value);
        }
        rules.header(&mut config);
        let chain = chain(image);
        let mut last: Option<u16> = None;
        let mut taken = [false; 256];
        config.set8(CAP_POINTER, 0);
        for &(id, at) in &chain {
            let next = chain.iter().map(|c| c.1).filter(|o| *o > at).min();
            let end = at.saturating_add(length(id, image, at));
            // A list that overlaps itself is broken: the first has it.
            let room = (at..end).all(|o| taken.get(usize::from(o)) == Some(&false));
            if !room || !rules.capability(id, at, image, &mut config) {
                // What is unknown, or may harm, is neither shown nor reached.
                for o in at..next.unwrap_or(0x100) {
                    if taken.get(usize::from(o)) == Some(&false) {
                        config.set8(o, 0);
                        rules.set(o, Byte::Ours(0));
                    }
                }
                continue;
            }
            for o in at..end {
                if let Some(t) = taken.get_mut(usize::from(o)) {
                    *t = true;
                }
            }
            config.set8(at + 1, 0);
            match last.replace(at) {
                None => config.set8(CAP_POINTER, at as u8),
                Some(before) => config.set8(before + 1, at as u8),
            }
        }
        let status = config.get8(STATUS) & !STATUS_INTX;
        let caps = if last.is_some() { STATUS_CAPS as u8 } else { 0 };
        config.set8(STATUS, status & !(STATUS_CAPS as u8) | caps);
        (rules, config)
    }

    fn set(&mut self, at: u16, what: Byte) {
        if let Some(b) = self.bytes.get_mut(usize::from(at)) {
            *b = what;
        }
    }

    fn ours(&mut self, range: std::ops::Range<u16>) {
        range.for_each(|o| self.set(o, Byte::Ours(0)));
    }

    /// The first 64 bytes. Command, BARs and ROM are [`super::super::function`]'s.
    fn header(&mut self, config: &mut Config) {
        self.ours(0..0x40);
        config.set16(COMMAND, CMD_IO | CMD_MEMORY);
        // Errors that the device saw.
        self.set(STATUS + 1, Byte::Clears(0xf9));
        for o in [0x0c, 0x0d, INT_LINE] {
            self.set(o, Byte::Ours(0xff));
        }
        let one = config.get8(HEADER_TYPE) & 0x7f;
        config.set8(HEADER_TYPE, one);
        // No self-test: it may take the bus.
        config.set8(0x0f, 0);
        for o in (BAR0..BAR0 + 4 * BARS as u16).chain(ROM..ROM + 4) {
            config.set8(o, 0);
        }
        // CardBus CIS: in a BAR that is elsewhere now.
        config.set32(0x28, 0);
        config.set8(INT_LINE, 0xff);
        config.set8(INT_PIN, 0);
    }

    /// A capability that is shown; false for one that is not.
    fn capability(&mut self, id: u8, at: u16, image: &[u8; 256], config: &mut Config) -> bool {
        let len = length(id, image, at);
        if id != CAP_VENDOR {
            self.ours(at..at + len);
        } else {
            self.ours(at..at + 3);
        }
        match id {
            CAP_PM => {
                // No wake-up. The state is only written down: the device stays on, as
                // leaving D3 might reset what the host has set.
                config.set8(at + 3, image_bits(image, at + 3, 0x07));
                config.set16(at + 4, PM_NO_SOFT_RESET);
                config.set16(at + 6, 0);
                self.set(at + 4, Byte::Ours(0x03));
            }
            CAP_MSI => {
                let control = config.get16(at + 2);
                let wide = control & MSI_WIDE != 0;
                // No mask bits: there is no telling the kernel of them.
                for o in at + 2..at + len {
                    config.set8(o, 0);
                }
                config.set16(at + 2, control & (MSI_WIDE | 0x0e));
                self.set(at + 2, Byte::Ours(0x71));
                self.set(at + 4, Byte::Ours(0xfc));
                let data = if wide { at + 12 } else { at + 8 };
                (at + 5..data + 2).for_each(|o| self.set(o, Byte::Ours(0xff)));
                self.msi = self.msi.or(Some(MsiCapability { at, wide }));
            }
            CAP_MSIX => {
                let control = config.get16(at + 2) & 0x7ff;
                config.set16(at + 2, control);
                self.set(at + 3, Byte::Ours(0xc0));
                let place = |o: u16| {
                    let v = config.get(o, 4);
                    ((v & 7) as usize, u64::from(v & !7))
                };
                self.msix = self.msix.or(Some(MsixCapability {
                    at,
                    vectors: control + 1,
                    table: place(at + 4),
                    pba: place(at + 8),
                }));
            }
            CAP_PCIE => {
                // No function-level reset by the guest: the host does one for it.
                let flr = config.get8(at + 7) & !0x10;
                config.set8(at + 7, flr);
                // What the host has agreed on with the bus stays; the guest may think
                // what it likes.
                let control = config.get8(at + 9) & 0x7f;
                config.set8(at + 9, control);
                self.set(at + 8, Byte::Ours(0xff));
                self.set(at + 9, Byte::Ours(0x7f));
                self.set(at + 0x0a, Byte::Clears(0x0f));
                self.set(at + 0x0b, Byte::Clears(0));
                self.set(at + 0x10, Byte::Ours(0xff));
                self.set(at + 0x11, Byte::Ours(0xff));
                self.set(at + 0x12, Byte::Clears(0));
                self.set(at + 0x13, Byte::Clears(0));
                if len > 0x14 {
                    // An endpoint has no slot and is no root.
                    (at + 0x14..at + 0x24).for_each(|o| config.set8(o, 0));
                    for o in [0x28, 0x29, 0x30, 0x31] {
                        self.set(at + o, Byte::Ours(0xff));
                    }
                }
            }
            CAP_SSVID | CAP_VENDOR => {}
            _ => return false,
        }
        true
    }

    /// Whether the device has a part in the answer to a read.
    pub fn reads_device(&self, offset: u16, size: u8) -> bool {
        self.range(offset, size)
            .any(|(_, b)| !matches!(b, Byte::Ours(_)))
    }

    fn range(&self, offset: u16, size: u8) -> impl Iterator<Item = (u16, Byte)> {
        let size = usize::from(size);
        let bytes = self.bytes.get(usize::from(offset)..).unwrap_or_default();
        (offset..).zip(bytes.iter().copied()).take(size)
    }

    /// The value of a read: ours where it is ours, the device's where not.
    pub fn merge(&self, offset: u16, size: u8, ours: u32, theirs: u32) -> u32 {
        let mut value = ours.to_le_bytes();
        let theirs = theirs.to_le_bytes();
        for ((v, t), (_, b)) in value.iter_mut().zip(theirs).zip(self.range(offset, size)) {
            if !matches!(b, Byte::Ours(_)) {
                *v = t;
            }
        }
        u32::from_le_bytes(value)
    }

    /// A write: changes what is ours, and says what the device is to get.
    pub fn write(&self, config: &mut Config, offset: u16, size: u8, value: u32) -> Vec<Write> {
        let whole = self
            .range(offset, size)
            .all(|(_, b)| matches!(b, Byte::Theirs));
        if whole {
            return vec![(offset, size, value)];
        }
        let mut device = Vec::new();
        for ((at, b), v) in self.range(offset, size).zip(value.to_le_bytes()) {
            match b {
                Byte::Ours(mask) => {
                    let old = config.get8(at);
                    config.set8(at, old & !mask | v & mask);
                }
                Byte::Clears(mask) if v & mask != 0 => device.push((at, 1, u32::from(v & mask))),
                Byte::Clears(_) => {}
                Byte::Theirs => device.push((at, 1, v.into())),
            }
        }
        device
    }
}

fn image_bits(image: &[u8; 256], at: u16, mask: u8) -> u8 {
    byte(image, at) & mask
}

const PM_NO_SOFT_RESET: u16 = 0x0008;
/// An INTx is pending.
const STATUS_INTX: u8 = 0x08;

/// The capabilities of a device, each once, in the order of its list; it may be
/// broken: at most 48, where there is room, aligned.
fn chain(image: &[u8; 256]) -> Vec<(u8, u16)> {
    let mut found: Vec<(u8, u16)> = Vec::new();
    let listed = u16::from(byte(image, STATUS)) & STATUS_CAPS != 0;
    let mut at = u16::from(byte(image, CAP_POINTER) & !3);
    while listed && at >= 0x40 && !found.iter().any(|c| c.1 == at) {
        found.push((byte(image, at), at));
        at = u16::from(byte(image, at + 1) & !3);
    }
    found
}

#[cfg(test)]
#[path = "request_tests.rs"]
pub(super) mod tests;
