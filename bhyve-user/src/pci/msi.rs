//! Message-signalled interrupts: the capabilities and the MSI-X table
//! (PCI Local Bus Specification 3.0 §6.8).

use super::config::{CAP_MSI, CAP_MSIX, Config};

/// An entry's size in the MSI-X table.
pub const MSIX_ENTRY: u64 = 16;
const VECTOR_MASKED: u32 = 1;
const MSI_ENABLE: u16 = 1;
const MSI_MULTIPLE: u16 = 0x70;
const MSIX_ENABLE: u16 = 0x8000;
const MSIX_MASK_ALL: u16 = 0x4000;

/// A message: where it is written and what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// Address.
    pub address: u64,
    /// Data.
    pub data: u64,
}

/// Adds an MSI capability for `1 << log2` messages with 64-bit addresses.
pub fn add_msi(config: &mut Config, log2: u8) -> Option<u16> {
    let control = 0x80 | u16::from(log2.min(5)) << 1;
    let mut body = [0; 12];
    body[..2].copy_from_slice(&control.to_le_bytes());
    config.add_capability(CAP_MSI, &body)
}

/// Adds an MSI-X capability with table and PBA in BAR `bar`.
pub fn add_msix(config: &mut Config, vectors: u16, bar: u8) -> Option<u16> {
    let mut body = [0; 10];
    body[..2].copy_from_slice(&vectors.saturating_sub(1).to_le_bytes());
    body[2..6].copy_from_slice(&u32::from(bar & 7).to_le_bytes());
    body[6..].copy_from_slice(&(pba_offset(vectors) as u32 | u32::from(bar & 7)).to_le_bytes());
    config.add_capability(CAP_MSIX, &body)
}

/// Where the pending-bit array is, behind the table.
pub fn pba_offset(vectors: u16) -> u64 {
    (u64::from(vectors) * MSIX_ENTRY).next_multiple_of(4096)
}

/// Bytes of BAR that table and PBA take.
pub fn msix_bar_size(vectors: u16) -> u64 {
    pba_offset(vectors) + u64::from(vectors).div_ceil(64) * 8
}

/// Writes to an MSI or MSI-X capability at `cap`: all but the enable, mask
/// and message fields is read-only. True if the enabling may have changed.
pub fn config_write(
    config: &mut Config,
    id: u8,
    cap: u16,
    offset: u16,
    size: u8,
    value: u32,
) -> bool {
    let writable: &[u8] = match id {
        CAP_MSI => &[
            0, 0, 0x71, 0, 0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
        ],
        CAP_MSIX => &[0, 0, 0, 0xc0],
        _ => &[],
    };
    let mut touched = false;
    for (at, byte) in (offset..).zip(value.to_le_bytes()).take(usize::from(size)) {
        let mask = at
            .checked_sub(cap)
            .and_then(|i| writable.get(usize::from(i)))
            .copied()
            .unwrap_or(0);
        if mask != 0 {
            let old = config.get8(at);
            config.set8(at, (old & !mask) | (byte & mask));
            touched |= at - cap < 4;
        }
    }
    touched
}

/// The message that MSI vector `index` sends now, if MSI is enabled.
pub fn msi_message(config: &Config, cap: u16, index: u16) -> Option<Message> {
    let control = config.get16(cap + 2);
    let count = 1_u16 << ((control & MSI_MULTIPLE) >> 4).min(5);
    if control & MSI_ENABLE == 0 || index >= count {
        return None;
    }
    let address = u64::from(config.get(cap + 4, 4)) | u64::from(config.get(cap + 8, 4)) << 32;
    // With several messages the low bits of the data are the index.
    let data = config.get16(cap + 12) & !(count - 1) | index;
    Some(Message {
        address,
        data: data.into(),
    })
}

/// Whether MSI is enabled.
pub fn msi_enabled(config: &Config, cap: u16) -> bool {
    config.get16(cap + 2) & MSI_ENABLE != 0
}

/// Whether MSI-X is enabled, and whether all its vectors are masked.
pub fn msix_state(config: &Config, cap: u16) -> (bool, bool) {
    let control = config.get16(cap + 2);
    (control & MSIX_ENABLE != 0, control & MSIX_MASK_ALL != 0)
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    message: Message,
    control: u32,
    pending: bool,
}

/// An MSI-X table and its pending bits.
#[derive(Clone, Debug)]
pub struct MsixTable {
    entries: Vec<Entry>,
}

impl MsixTable {
    /// A table of masked vectors.
    pub fn new(vectors: u16) -> MsixTable {
        let empty = Entry {
            message: Message::default(),
            control: VECTOR_MASKED,
            pending: false,
        };
        MsixTable {
            entries: vec![empty; usize::from(vectors)],
        }
    }

    fn vectors(&self) -> u16 {
        self.entries.len() as u16
    }

    /// Reads 1, 2, 4 or 8 bytes of table or PBA.
    pub fn read(&self, offset: u64, size: u8) -> u64 {
        let dword = |o: u64| u64::from(self.dword(o & !3));
        let shift = (offset & 3) * 8;
        match size {
            8 => dword(offset) | dword(offset + 4) << 32,
            4 => dword(offset),
            2 => (dword(offset) >> shift) & 0xffff,
            _ => (dword(offset) >> shift) & 0xff,
        }
    }

    fn dword(&self, offset: u64) -> u32 {
        let pba = pba_offset(self.vectors());
        if let Some(bit) = offset.checked_sub(pba) {
            let first = usize::try_from(bit.saturating_mul(8)).unwrap_or(usize::MAX);
            let entries = self.entries.get(first..).unwrap_or_default();
            return entries
                .iter()
                .take(32)
                .enumerate()
                .fold(0, |v, (i, e)| v | u32::from(e.pending) << i);
        }
        let Some(e) = self.entries.get((offset / MSIX_ENTRY) as usize) else {
            return 0;
        };
        match offset % MSIX_ENTRY {
            0 => e.message.address as u32,
            4 => (e.message.address >> 32) as u32,
            8 => e.message.data as u32,
            _ => e.control,
        }
    }

    /// Writes 4 or 8 bytes of the table. Returns a message that was pending
    /// and is unmasked now.
    pub fn write(&mut self, offset: u64, size: u8, value: u64) -> Option<Message> {
        if !offset.is_multiple_of(u64::from(size.max(1))) || offset >= pba_offset(self.vectors()) {
            return None;
        }
        match size {
            4 => self.write_dword(offset, value as u32),
            8 => {
                self.write_dword(offset, value as u32);
                self.write_dword(offset + 4, (value >> 32) as u32)
            }
            _ => None,
        }
    }

    fn write_dword(&mut self, offset: u64, value: u32) -> Option<Message> {
        let e = self.entries.get_mut((offset / MSIX_ENTRY) as usize)?;
        let wide = u64::from(value);
        match offset % MSIX_ENTRY {
            0 => e.message.address = e.message.address & !0xffff_ffff | wide & !3,
            4 => e.message.address = e.message.address & 0xffff_ffff | wide << 32,
            8 => e.message.data = wide,
            _ => {
                e.control = value & VECTOR_MASKED;
                if e.control == 0 && std::mem::take(&mut e.pending) {
                    return Some(e.message);
                }
            }
        }
        None
    }

    /// The message of a vector, or `None` after noting it as pending.
    pub fn trigger(&mut self, vector: u16, mask_all: bool) -> Option<Message> {
        let e = self.entries.get_mut(usize::from(vector))?;
        if mask_all || e.control & VECTOR_MASKED != 0 {
            e.pending = true;
            return None;
        }
        Some(e.message)
    }

    /// Messages that waited for the function mask.
    pub fn unmask_all(&mut self) -> Vec<Message> {
        self.entries
            .iter_mut()
            .filter(|e| e.control & VECTOR_MASKED == 0)
            .filter_map(|e| std::mem::take(&mut e.pending).then_some(e.message))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn msi_sends_what_the_guest_programmed() {
        let mut c = Config::default();
        let cap = add_msi(&mut c, 2).unwrap();
        assert_eq!(msi_message(&c, cap, 0), None);
        config_write(&mut c, CAP_MSI, cap, cap + 4, 4, 0xfee0_1000);
        config_write(&mut c, CAP_MSI, cap, cap + 12, 2, 0x4031);
        assert!(config_write(&mut c, CAP_MSI, cap, cap, 4, 0x0021_ffff));
        assert_eq!(c.get8(cap), CAP_MSI, "identifier and pointer are read-only");
        assert_eq!(
            msi_message(&c, cap, 3),
            Some(Message {
                address: 0xfee0_1000,
                data: 0x4033
            })
        );
        assert_eq!(msi_message(&c, cap, 4), None);
    }

    #[test]
    fn a_masked_vector_waits_in_the_pba() {
        let mut t = MsixTable::new(70);
        assert_eq!(t.write(66 * 16, 8, 0xfee0_0000), None);
        assert_eq!(t.write(66 * 16 + 8, 4, 0x55), None);
        assert_eq!(t.trigger(66, false), None);
        assert_eq!(t.read(pba_offset(70) + 8, 4), 1 << 2);
        let message = Message {
            address: 0xfee0_0000,
            data: 0x55,
        };
        let m = Some(message);
        assert_eq!(t.write(66 * 16 + 12, 4, 0), m);
        assert_eq!(t.read(pba_offset(70) + 8, 4), 0);
        assert_eq!(t.trigger(66, false), m);
        assert_eq!(t.trigger(66, true), None);
        assert_eq!(t.unmask_all(), [message]);
    }

    #[test]
    fn accesses_outside_the_table_do_nothing() {
        let mut t = MsixTable::new(2);
        for offset in [1, 3, 32, 4095, 4096, 1 << 40, u64::MAX] {
            for size in [1, 2, 4, 8] {
                assert_eq!(t.write(offset, size, u64::MAX), None);
                t.read(offset.min(u64::MAX - 8), size);
            }
        }
        assert_eq!(t.trigger(2, false), None);
        assert_eq!(t.read(12, 4), 1);
    }

    #[test]
    fn the_capability_says_where_the_table_is() {
        let mut c = Config::default();
        let cap = add_msix(&mut c, 300, 4).unwrap();
        assert_eq!(c.get16(cap + 2), 299);
        assert_eq!(c.get(cap + 4, 4), 4);
        assert_eq!(c.get(cap + 8, 4), 0x2004);
        assert_eq!(msix_bar_size(300), 0x2000 + 40);
        config_write(&mut c, CAP_MSIX, cap, cap + 2, 2, 0xffff);
        assert_eq!(c.get16(cap + 2), 0xc000 | 299);
        assert_eq!(msix_state(&c, cap), (true, true));
    }
}
