//! The MSI-X table that the guest sees, and which of its entries the kernel has to
//! be told of (PCI Local Bus Specification 3.0 §6.8.2).

/// Bytes of an entry.
pub const ENTRY: u64 = 16;
const MASKED: u32 = 1;
const ENABLE: u16 = 0x8000;
const MASK_ALL: u16 = 0x4000;

/// An entry as the kernel takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where the message goes.
    pub address: u64,
    /// The message.
    pub data: u32,
    /// None is sent.
    pub masked: bool,
}

impl Entry {
    /// One that sends nothing.
    pub const MASKED: Entry = Entry {
        address: 0,
        data: 0,
        masked: true,
    };
}

/// What the kernel is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Set an entry.
    Set(u16, Entry),
    /// Switch MSI-X off; these entries were not masked.
    Off(Vec<u16>),
}

/// The table.
#[derive(Clone, Debug)]
pub struct Table {
    entries: Vec<[u32; 4]>,
    /// What the kernel was told last.
    told: Vec<Option<Entry>>,
    control: u16,
}

impl Table {
    /// A table of masked entries.
    pub fn new(vectors: u16) -> Table {
        Table {
            entries: vec![[0, 0, 0, MASKED]; vectors.into()],
            told: vec![None; vectors.into()],
            control: 0,
        }
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.entries.len() as u64 * ENTRY
    }

    /// There are no entries, which no device has.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Reads 1, 2 or 4 aligned bytes.
    pub fn read(&self, offset: u64, size: u8) -> u32 {
        let entry = self.entries.get((offset / ENTRY) as usize);
        let word = entry.and_then(|e| e.get((offset % ENTRY / 4) as usize));
        let value = word.copied().unwrap_or(0) >> (8 * (offset & 3));
        value & crate::bus::ones(size) as u32
    }

    /// Writes four aligned bytes; other sizes are not to be used and do nothing.
    pub fn write(&mut self, offset: u64, size: u8, value: u32) -> Option<Order> {
        if size != 4 || !offset.is_multiple_of(4) {
            return None;
        }
        let index = u16::try_from(offset / ENTRY).ok()?;
        let entry = self.entries.get_mut(usize::from(index))?;
        *entry.get_mut((offset % ENTRY / 4) as usize)? = value;
        self.order(index)
    }

    /// The guest wrote the capability's control word.
    pub fn control(&mut self, control: u16) -> Vec<Order> {
        let was = std::mem::replace(&mut self.control, control) & ENABLE != 0;
        let is = control & ENABLE != 0;
        if was && !is {
            let told = self.told.iter().any(Option::is_some);
            let open = (0..)
                .zip(&self.told)
                .filter_map(|(n, t)| t.is_some_and(|e| !e.masked).then_some(n))
                .collect();
            self.told.fill(None);
            return told.then_some(Order::Off(open)).into_iter().collect();
        }
        let mut orders: Vec<Order> = (0..self.entries.len() as u16)
            .filter_map(|index| self.order(index))
            .collect();
        // So that it is on in the device as well, before any entry is unmasked: devices
        // look at that too. QEMU's NVMe has no interrupts for a queue that was made
        // while it was off, and Linux unmasks the vector after that.
        if is
            && !was
            && orders.is_empty()
            && let Some(told) = self.told.first_mut()
        {
            *told = Some(Entry::MASKED);
            orders.push(Order::Set(0, Entry::MASKED));
        }
        orders
    }

    /// Whether the guest has it enabled.
    pub fn enabled(&self) -> bool {
        self.control & ENABLE != 0
    }

    /// What the kernel does not know yet of an entry. One that was masked ever since
    /// is nobody's business.
    fn order(&mut self, index: u16) -> Option<Order> {
        if !self.enabled() {
            return None;
        }
        let [low, high, data, control] = *self.entries.get(usize::from(index))?;
        let told = self.told.get_mut(usize::from(index))?;
        let masked = control & MASKED != 0 || self.control & MASK_ALL != 0;
        let entry = Entry {
            address: u64::from(high) << 32 | u64::from(low),
            data,
            masked,
        };
        match told {
            None if masked => return None,
            // While it is masked the message does not matter.
            Some(t) if *t == entry || (t.masked && masked) => return None,
            _ => {}
        }
        *told = Some(entry);
        Some(Order::Set(index, entry))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNMASKED: Entry = Entry {
        address: 0xfee0_1000,
        data: 0x41,
        masked: false,
    };

    /// As Linux does it: enabled with all masked, entries filled, the mask of all
    /// taken away, entries unmasked.
    #[test]
    fn the_kernel_hears_of_an_entry_once_it_is_unmasked() {
        let mut t = Table::new(5);
        let on = [Order::Set(0, Entry::MASKED)];
        assert_eq!(t.control(ENABLE | MASK_ALL), on, "on in the device too");
        for (at, value) in [(0, 0xfee0_1000), (4, 0), (8, 0x41)] {
            assert_eq!(t.write(2 * ENTRY + at, 4, value), None);
        }
        assert_eq!(t.write(2 * ENTRY + 12, 4, 0), None, "all are masked still");
        assert_eq!(t.control(ENABLE), [Order::Set(2, UNMASKED)]);
        assert_eq!(t.control(ENABLE), [], "nothing new");
        let masked = Entry {
            masked: true,
            ..UNMASKED
        };
        let order = t.write(2 * ENTRY + 12, 4, 1);
        assert_eq!(order, Some(Order::Set(2, masked)));
        assert_eq!(t.write(2 * ENTRY + 8, 4, 0x52), None, "masked: later");
        let moved = Entry {
            data: 0x52,
            ..UNMASKED
        };
        let order = t.write(2 * ENTRY + 12, 4, 0);
        assert_eq!(order, Some(Order::Set(2, moved)));
        assert_eq!(t.control(0), [Order::Off(vec![2])]);
        assert_eq!(t.control(0), []);
        assert_eq!(
            t.control(ENABLE),
            [Order::Set(2, moved)],
            "it is still there"
        );
    }

    #[test]
    fn accesses_outside_or_of_odd_sizes_do_nothing() {
        let mut t = Table::new(2);
        t.control(ENABLE);
        for (offset, size) in [
            (32, 4),
            (1, 4),
            (12, 2),
            (12, 1),
            (u64::MAX - 3, 4),
            (1 << 20, 4),
        ] {
            assert_eq!(t.write(offset, size, 0), None, "{offset:#x}+{size}");
        }
        assert_eq!((t.read(12, 4), t.read(28, 1), t.read(32, 4)), (1, 1, 0));
        assert_eq!(t.len(), 32);
    }
}
