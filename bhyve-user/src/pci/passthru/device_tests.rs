use super::*;
use crate::bus::Buses;
use crate::machine::fake::Fake;
use crate::pci::bar::Windows;
use crate::pci::function::Wiring;
use crate::pci::intx::Router;
use crate::pci::passthru::msix::Entry;
use crate::pci::passthru::request::tests::card;
use crate::pci::{Bdf, ECAM_BASE};
use std::sync::Arc;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Did {
    Config(u16, u8, u32),
    Port(usize, u64, u8, u32),
    Register(usize, u64, u8, u32),
    Map(u64, u64, u64),
    Unmap(u64, u64, u64),
    Msi(u64, u64, u32),
    Msix(u16, Entry),
    MsixOff,
}

/// A host's function that writes down what happens to it.
struct Card {
    image: [u8; 256],
    bars: Vec<HostBar>,
    did: Arc<Mutex<Vec<Did>>>,
    opened: Vec<(usize, u64, u64)>,
    /// A vmm.ko without VM_UNMAP_PPTDEV_MMIO and VM_PPTDEV_DISABLE_MSIX.
    old: bool,
}

impl Card {
    fn push(&self, d: Did) {
        lock(&self.did).push(d);
    }
}

fn enotty() -> vmmapi::Error {
    vmmapi::Error::Request {
        vm: "vm".into(),
        vcpu: None,
        request: "VM_UNMAP_PPTDEV_MMIO",
        source: std::io::Error::from_raw_os_error(nix::libc::ENOTTY),
    }
}

impl Backend for Card {
    fn name(&self) -> String {
        "5/0/0".into()
    }
    fn bars(&self) -> Vec<HostBar> {
        self.bars.clone()
    }
    fn config_read(&self, offset: u16, size: u8) -> u32 {
        let bytes = self.image.iter().skip(offset.into()).take(size.into());
        bytes.rev().fold(0, |v, b| v << 8 | u32::from(*b))
    }
    fn config_write(&self, offset: u16, size: u8, value: u32) {
        self.push(Did::Config(offset, size, value));
    }
    fn port_read(&self, bar: usize, offset: u64, _: u8) -> u32 {
        bar as u32 * 0x100 + offset as u32
    }
    fn port_write(&self, bar: usize, offset: u64, size: u8, value: u32) {
        self.push(Did::Port(bar, offset, size, value));
    }
    fn open_registers(&mut self, bar: usize, offset: u64, len: u64) -> Result<(), String> {
        self.opened.push((bar, offset, len));
        Ok(())
    }
    fn register_read(&self, bar: usize, offset: u64, _: u8) -> u32 {
        let mut open = self.opened.iter();
        let open = open.any(|o| o.0 == bar && (o.1..o.1 + o.2).contains(&offset));
        if open { 0x5000 + offset as u32 } else { 0 }
    }
    fn register_write(&self, bar: usize, offset: u64, size: u8, value: u32) {
        self.push(Did::Register(bar, offset, size, value));
    }
    fn map(&self, gpa: u64, hpa: u64, len: u64) -> vmmapi::Result<()> {
        self.push(Did::Map(gpa, hpa, len));
        Ok(())
    }
    fn unmap(&self, gpa: u64, hpa: u64, len: u64) -> vmmapi::Result<()> {
        if self.old {
            return Err(enotty());
        }
        self.push(Did::Unmap(gpa, hpa, len));
        Ok(())
    }
    fn msi(&self, address: u64, data: u64, count: u32) -> vmmapi::Result<()> {
        self.push(Did::Msi(address, data, count));
        Ok(())
    }
    fn msix(&self, index: u16, entry: Entry) -> vmmapi::Result<()> {
        self.push(Did::Msix(index, entry));
        Ok(())
    }
    fn msix_off(&self) -> vmmapi::Result<()> {
        if self.old {
            return Err(enotty());
        }
        self.push(Did::MsixOff);
        Ok(())
    }
}

const MEMORY: HostBar = HostBar {
    index: 0,
    io: false,
    wide: false,
    prefetchable: false,
    base: 0xfebc_0000,
    size: 0x2_0000,
};
const PORTS: HostBar = HostBar {
    index: 2,
    io: true,
    base: 0xc080,
    size: 0x20,
    ..MEMORY
};
/// The MSI-X table is its first 80 bytes, the pending bits are at 0x2000.
const TABLE: HostBar = HostBar {
    index: 3,
    wide: true,
    prefetchable: true,
    base: 0xfebe_0000,
    size: 0x4000,
    ..MEMORY
};

struct Guest {
    function: Arc<PciFunction>,
    buses: Arc<Buses>,
    did: Arc<Mutex<Vec<Did>>>,
}

impl Guest {
    fn with(card: Card) -> Guest {
        let machine: Arc<dyn Machine> = Fake::new();
        let router = Arc::new(Router::new(Arc::clone(&machine), 24));
        let buses = Arc::new(Buses::default());
        let did = Arc::clone(&card.did);
        let (plan, device) = Passthrough::plan(Box::new(card), vec![0x55, 0xaa, 3]).unwrap();
        assert!(!plan.intx);
        let wiring = Wiring {
            buses: &buses,
            machine: &machine,
            router: &router,
            windows: &mut Windows::new(0xc000_0000),
            intx: None,
        };
        let at = Bdf {
            bus: 0,
            slot: 5,
            func: 0,
        };
        let function = PciFunction::new(at, plan, device, wiring).unwrap();
        Guest {
            function,
            buses,
            did,
        }
    }
    fn new() -> Guest {
        Guest::with(nic())
    }
    fn take(&self) -> Vec<Did> {
        std::mem::take(&mut *lock(&self.did))
    }
    fn bar(&self, index: u16) -> u64 {
        u64::from(self.function.config_read(0x10 + 4 * index, 4) & !0xf)
    }
    fn write(&self, gpa: u64, size: u8, value: u64) {
        let device = self.buses.mmio.get(gpa, size).unwrap();
        device.mmio_write(gpa, size, value);
    }
    fn read(&self, gpa: u64, size: u8) -> u64 {
        self.buses.mmio.get(gpa, size).unwrap().mmio_read(gpa, size)
    }
}

fn nic() -> Card {
    Card {
        image: card(),
        bars: vec![MEMORY, PORTS, TABLE],
        did: Arc::default(),
        opened: Vec::new(),
        old: false,
    }
}

#[test]
fn bars_are_shown_but_for_the_page_of_the_msix_table() {
    let g = Guest::new();
    let (bar0, bar3) = (g.bar(0), g.bar(3));
    assert_eq!(
        g.take(),
        [
            // Decoding, no bus mastering, no INTx.
            Did::Config(4, 2, 0x0403),
            Did::Map(bar0, MEMORY.base, MEMORY.size),
            Did::Map(bar3 + 0x1000, TABLE.base + 0x1000, 0x3000),
        ]
    );
    assert_eq!(
        g.function.config_read(0x1c, 4) & 0xf,
        0xc,
        "64 bits, prefetchable"
    );
    assert_eq!(g.function.config_read(0x10, 4) & 0xf, 0);
    // In the table's page: the table is ours, the rest the device's.
    assert_eq!(g.read(bar3 + 12, 4), 1, "masked");
    assert_eq!(g.read(bar3 + 80, 4), 0x5000 + 80);
    g.write(bar3 + 0x100, 4, 7);
    assert_eq!(g.take(), [Did::Register(3, 0x100, 4, 7)]);
}

#[test]
fn ports_are_reached_by_their_offset() {
    let g = Guest::new();
    g.take();
    let port = (g.function.config_read(0x18, 4) & !3) as u16;
    let device = g.buses.ports.get(port + 4).unwrap();
    assert_eq!(device.port_read(port + 4, 4), Some(0x204));
    assert!(device.port_write(port + 8, 2, 0x1234));
    assert_eq!(g.take(), [Did::Port(2, 8, 2, 0x1234)]);
}

#[test]
fn a_bar_moves_and_is_hidden_with_the_guests_writes() {
    let g = Guest::new();
    g.take();
    let old = g.bar(0);
    // Sizing with decoding on: passes over the chipset's addresses, unseen.
    g.function.config_write(0x10, 4, u32::MAX);
    assert_eq!(g.function.config_read(0x10, 4), !(MEMORY.size as u32 - 1));
    g.function.config_write(0x10, 4, 0xd000_0000);
    assert_eq!(
        g.take(),
        [
            Did::Unmap(old, MEMORY.base, MEMORY.size),
            Did::Map(0xd000_0000, MEMORY.base, MEMORY.size),
        ]
    );
    // Decoding off: hidden from the guest, on in the device.
    g.function.config_write(4, 2, 0x0404);
    let did = g.take();
    assert_eq!(did[0], Did::Config(4, 2, 0x0407));
    assert!(did.contains(&Did::Unmap(0xd000_0000, MEMORY.base, MEMORY.size)));
    g.function.config_write(4, 2, 0x0006);
    let did = g.take();
    assert_eq!(did[0], Did::Config(4, 2, 0x0407), "INTx stays off");
    assert!(did.contains(&Did::Map(0xd000_0000, MEMORY.base, MEMORY.size)));
    assert_eq!(g.function.config_read(4, 2), 0x0006);
}

#[test]
fn a_kernel_that_cannot_hide_bars_gets_them_once() {
    let g = Guest::with(Card { old: true, ..nic() });
    g.take();
    g.function.config_write(4, 2, 0);
    g.function.config_write(4, 2, 6);
    let maps = |did: &[Did]| did.iter().filter(|d| matches!(d, Did::Map(..))).count();
    assert_eq!(maps(&g.take()), 0);
}

#[test]
fn msi_and_msix_go_to_the_kernel_and_never_to_the_device() {
    let g = Guest::new();
    let f = &g.function;
    g.take();
    f.config_write(0xd4, 4, 0xfee0_1000);
    f.config_write(0xd8, 4, 0);
    f.config_write(0xdc, 2, 0x4041);
    assert_eq!(g.take(), []);
    // It asks for 32 of 8.
    f.config_write(0xd2, 2, 0x0051);
    assert_eq!(g.take(), [Did::Msi(0xfee0_1000, 0x4041, 8)]);
    f.config_write(0xd2, 2, 0x0051);
    assert_eq!(g.take(), []);
    f.config_write(0xdc, 2, 0x4052);
    assert_eq!(g.take(), [Did::Msi(0xfee0_1000, 0x4052, 8)]);
    f.config_write(0xd2, 2, 0);
    assert_eq!(g.take(), [Did::Msi(0, 0, 0)]);
    // MSI-X: the second entry.
    let table = g.bar(3);
    f.config_write(0xa2, 2, 0xc000);
    g.write(table + 16, 8, 0xfee0_2000);
    g.write(table + 24, 4, 0x33);
    g.write(table + 28, 4, 0);
    assert_eq!(g.take(), [Did::Msix(0, Entry::MASKED)], "on, and silent");
    f.config_write(0xa2, 2, 0x8000);
    let entry = Entry {
        address: 0xfee0_2000,
        data: 0x33,
        masked: false,
    };
    assert_eq!(g.take(), [Did::Msix(1, entry)]);
    f.config_write(0xa2, 2, 0);
    assert_eq!(g.take(), [Did::MsixOff]);
}

/// Off is then every entry masked that was not.
#[test]
fn a_kernel_that_cannot_switch_msix_off_masks_its_entries() {
    let g = Guest::with(Card { old: true, ..nic() });
    let table = g.bar(3);
    g.function.config_write(0xa2, 2, 0x8000);
    for n in [1, 2] {
        g.write(table + n * 16, 8, 0xfee0_2000);
        g.write(table + n * 16 + 8, 4, 0x33);
        g.write(table + n * 16 + 12, 4, 0);
    }
    g.write(table + 2 * 16 + 12, 4, 1);
    g.take();
    g.function.config_write(0xa2, 2, 0);
    assert_eq!(g.take(), [Did::Msix(1, Entry::MASKED)]);
    g.function.config_write(0xa2, 2, 0x8000);
    let set = g.take();
    assert!(
        matches!(set[..], [Did::Msix(1, e)] if !e.masked),
        "and back: {set:?}"
    );
}

#[test]
fn the_rom_can_be_read_where_the_guest_puts_it() {
    let g = Guest::new();
    let f = &g.function;
    f.config_write(0x30, 4, 0xffff_f800);
    assert_eq!(f.config_read(0x30, 4), 0xffff_f800, "2 KiB");
    f.config_write(0x30, 4, 0xd100_0001);
    assert_eq!(g.read(0xd100_0000, 4) as u32, 0xff03_aa55);
    assert_eq!(g.read(0xd100_0004, 4) as u32, u32::MAX);
    f.config_write(4, 2, 0);
    assert!(g.buses.mmio.get(0xd100_0000, 4).is_none());
    f.config_write(4, 2, 2);
    f.config_write(0x30, 4, 0xd100_0000);
    assert!(g.buses.mmio.get(0xd100_0000, 4).is_none());
}

#[test]
fn a_small_bar_is_reached_by_exits_only() {
    let bar = HostBar {
        base: 0xfebf_1100,
        size: 0x100,
        ..MEMORY
    };
    let g = Guest::with(Card {
        bars: vec![bar],
        ..nic()
    });
    let maps = g.take();
    assert!(!maps.iter().any(|d| matches!(d, Did::Map(..))), "{maps:?}");
    assert_eq!(g.read(g.bar(0) + 0x10, 4), 0x5010);
}

#[test]
fn a_device_without_messages_is_refused_in_words() {
    let mut image = [0; 256];
    image[0] = 1;
    let dead = Card {
        image: [0xff; 256],
        ..nic()
    };
    let old = Card { image, ..nic() };
    let e = Passthrough::plan(Box::new(old), Vec::new()).err().unwrap();
    assert!(e.contains("5/0/0") && e.contains("INTx"), "{e}");
    let e = Passthrough::plan(Box::new(dead), Vec::new()).err().unwrap();
    assert!(e.contains("does not answer"), "{e}");
}

#[test]
fn extended_configuration_space_is_not_there() {
    let g = Guest::new();
    let at = ECAM_BASE + (5 << 15);
    assert!(g.buses.mmio.get(at, 4).is_none(), "only the root has it");
    assert_eq!(g.function.config_read(0x100, 4), 0);
    g.take();
    g.function.config_write(0x104, 4, 1);
    assert_eq!(g.take(), []);
}
