//! Devices of userland: what a guest writes to their registers.

use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use bhyve::bus::Buses;
use bhyve::config::PciSlot;
use bhyve::machine::Machine;
use bhyve::pci::Bdf;
use bhyve::pci::bar::Windows;
use bhyve::pci::intx::Router;
use bhyve::pci::root::{Means, PciRoot};
use bhyve::serial::uart::Uart;
use vmmapi::GuestMemory;

use crate::machine::Silent;

/// Most steps of one input: enough to get anywhere, few enough to be fast.
const STEPS: usize = 256;

/// Steps of type `T` until the input ends.
pub fn steps<T: for<'a> Arbitrary<'a>>(data: &[u8], mut each: impl FnMut(T)) {
    let mut input = Unstructured::new(data);
    for _ in 0..STEPS {
        if input.is_empty() {
            return;
        }
        let Ok(step) = T::arbitrary(&mut input) else {
            return;
        };
        each(step);
    }
}

#[derive(Arbitrary, Debug)]
enum UartStep {
    Read(u8, bool),
    Write(u8, u8, bool),
    Receive(Vec<u8>),
    Drained,
}

/// The 16550's registers, and input from the host's side.
pub fn uart(data: &[u8]) {
    let mut uart = Uart::default();
    steps(data, |step| {
        match step {
            UartStep::Read(register, room) => {
                let _ = uart.read(register & 7, room);
            }
            UartStep::Write(register, value, room) => {
                let _ = uart.write(register & 7, value, room);
            }
            UartStep::Receive(bytes) => {
                let room = uart.rx_room();
                let taken = uart.receive(&bytes);
                assert!(taken <= bytes.len() && taken <= room.max(1));
            }
            UartStep::Drained => uart.tx_drained(),
        }
        let _ = (uart.interrupt(), uart.constant_lsr(true));
    });
}

#[derive(Arbitrary, Debug)]
enum PciStep {
    /// Slot and function, register, value: by port or by ECAM.
    ConfigWrite(u8, u16, u8, u32, bool),
    ConfigRead(u8, u16, u8, bool),
    /// A BAR of a function, wherever it is now.
    BarWrite(u8, u8, u16, u8, u64),
    BarRead(u8, u8, u16, u8),
    PortWrite(u16, u8, u32),
    PortRead(u16, u8),
}

fn slot(at: u8, emulation: &str) -> PciSlot {
    PciSlot {
        at: Bdf {
            bus: 0,
            slot: at,
            func: 0,
        },
        emulation: emulation.into(),
        conf: String::new(),
    }
}

/// Configuration space, BARs that move, MSI-X tables, of every device that
/// needs nothing of the host.
pub fn pci_config(data: &[u8]) {
    let machine: Arc<dyn Machine> = Arc::new(Silent);
    let buses = Arc::new(Buses::default());
    let router = Arc::new(Router::new(Arc::clone(&machine), 24));
    let Ok(memory) = GuestMemory::anonymous(1 << 16) else {
        return;
    };
    let slots = [
        slot(0, "hostbridge"),
        slot(1, "virtio-rnd"),
        slot(31, "lpc"),
    ];
    let means = Means {
        vm: "fuzz",
        cpus: 1,
        machine: &machine,
        memory: &memory,
        virtio_msi: data.first().is_some_and(|b| b & 1 != 0),
    };
    let windows = Windows::new(0xc000_0000);
    let root = PciRoot::new(&slots, windows, &buses, &machine, &router, &means)
        .unwrap_or_else(|e| panic!("{e}"));
    let size = |s: u8| 1_u8 << (s % 3);
    // Slots that are there more often than others.
    let at = |n: u8| match n % 8 {
        0 | 1 => 0,
        2..=4 => 1 << 3,
        5 | 6 => 31 << 3,
        _ => u64::from(n),
    };
    let config = |n: u8, register: u16, s: u8, value: Option<u32>, ecam: bool| {
        let register = register & 0xfff & !(u16::from(s) - 1);
        if ecam {
            let gpa = bhyve::pci::ECAM_BASE + (at(n) << 12) + u64::from(register);
            if let Some(device) = buses.mmio.get(gpa, s) {
                match value {
                    Some(v) => device.mmio_write(gpa, s, v.into()),
                    None => drop(device.mmio_read(gpa, s)),
                }
            }
            return;
        }
        let address = 0x8000_0000 | (at(n) as u32) << 8 | u32::from(register & 0xfc);
        let port = 0xcfc + (register & 3);
        if let Some(device) = buses.ports.get(0xcf8) {
            device.port_write(0xcf8, 4, address);
        }
        if let Some(device) = buses.ports.get(port) {
            match value {
                Some(v) => drop(device.port_write(port, s, v)),
                None => drop(device.port_read(port, s)),
            }
        }
    };
    let bar = |n: u8, index: u8, offset: u16, s: u8, value: Option<u64>| {
        let Some(function) = root
            .functions()
            .find(|f| (u64::from(f.at.slot) << 3) == at(n))
        else {
            return;
        };
        let low = function.config_read(0x10 + 4 * u16::from(index % 6), 4);
        if low & 1 != 0 {
            let port = (low as u16 & !3).wrapping_add(offset & 0x7f);
            if let Some(device) = buses.ports.get(port) {
                match value {
                    Some(v) => drop(device.port_write(port, s, v as u32)),
                    None => drop(device.port_read(port, s)),
                }
            }
        } else {
            let s = if offset & 0x8000 != 0 { 8 } else { s };
            let gpa = u64::from(low & !0xf) + u64::from(offset & 0x3fff & !(u16::from(s) - 1));
            if let Some(device) = buses.mmio.get(gpa, s) {
                match value {
                    Some(v) => device.mmio_write(gpa, s, v),
                    None => drop(device.mmio_read(gpa, s)),
                }
            }
        }
    };
    steps(data, |step| match step {
        PciStep::ConfigWrite(n, register, s, value, ecam) => {
            config(n, register, size(s), Some(value), ecam);
        }
        PciStep::ConfigRead(n, register, s, ecam) => config(n, register, size(s), None, ecam),
        PciStep::BarWrite(n, index, offset, s, value) => {
            bar(n, index, offset, size(s), Some(value));
        }
        PciStep::BarRead(n, index, offset, s) => bar(n, index, offset, size(s), None),
        PciStep::PortWrite(port, s, value) => {
            if let Some(device) = buses.ports.get(port) {
                device.port_write(port, size(s), value);
            }
        }
        PciStep::PortRead(port, s) => {
            if let Some(device) = buses.ports.get(port) {
                device.port_read(port, size(s));
            }
        }
    });
    root.detach();
}

#[derive(Arbitrary, Debug)]
enum PassedStep {
    /// Register in units of four bytes, value.
    Config(u8, u32),
    /// Offset in the MSI-X table, its size, value.
    Table(u16, u8, u32),
    /// MSI-X's control word.
    Control(u16),
}

/// A passed function: a configuration space that may be anything, what the guest
/// writes to it, and to the MSI-X table.
pub fn passthru(data: &[u8]) {
    use bhyve::pci::passthru::msix::Table;
    use bhyve::pci::passthru::request::Rules;

    let mut image = [0; 256];
    let (head, rest) = data.split_at(data.len().min(256));
    for (i, b) in image.iter_mut().zip(head) {
        *i = *b;
    }
    let (rules, mut config) = Rules::new(&image);
    let mut table = Table::new(rules.msix.map_or(1, |m| m.vectors));
    let own: Vec<u16> = [rules.msi.map(|m| m.at), rules.msix.map(|m| m.at)]
        .into_iter()
        .flatten()
        .collect();
    steps(rest, |step| match step {
        PassedStep::Config(register, value) => {
            let offset = u16::from(register % 64) * 4;
            rules.merge(offset, 4, config.get(offset, 4), value);
            for (at, size, _) in rules.write(&mut config, offset, 4, value) {
                let reached = at..at + u16::from(size);
                assert!(
                    !reached.clone().any(|o| o < 6 || (0x10..0x28).contains(&o)),
                    "a BAR or the command register of the device is written"
                );
                assert!(
                    !own.iter().any(|c| reached.contains(&(c + 2))),
                    "MSI's or MSI-X's control of the device is written"
                );
            }
        }
        PassedStep::Table(offset, size, value) => {
            let size = 1 << (size % 3);
            table.read(offset.into(), size);
            table.write(offset.into(), size, value);
        }
        PassedStep::Control(value) => drop(table.control(value)),
    });
}

#[derive(Arbitrary, Debug)]
enum NvmeStep {
    /// A submission entry: queue, opcode, flags, namespace, PRPs, dwords.
    Command(u8, u8, u8, u32, [u16; 2], [u32; 3]),
    /// A word of guest memory, where lists and queues are.
    Memory(u16, u64),
}

/// An NVMe controller's commands, its queues made before it starts.
pub fn nvme(data: &[u8]) {
    use bhyve::nvme::controller::{Controller, Doorbells, Turn};
    use std::cell::Cell;

    /// Every queue holds one command more than was fetched.
    struct Bells {
        tails: [Cell<u32>; 4],
    }
    impl Doorbells for Bells {
        fn sq_tail(&self, queue: u16) -> u32 {
            self.tails
                .get(usize::from(queue))
                .map_or(0, |tail| tail.get())
        }
        fn cq_head(&self, _: u16) -> u32 {
            u32::MAX
        }
        fn fresh_sq(&self, queue: u16) {
            if let Some(tail) = self.tails.get(usize::from(queue)) {
                tail.set(0);
            }
        }
        fn fresh_cq(&self, _: u16) {}
    }

    thread_local! {
        static IMAGE: std::path::PathBuf = {
            let path = std::env::temp_dir().join(format!("fuzz-nvme-{}", std::process::id()));
            if let Err(e) = std::fs::write(&path, vec![0x5a; 64 << 10]) {
                panic!("{}: {e}", path.display());
            }
            path
        };
    }
    const QUEUE: u64 = 0x1000;
    let Ok(memory) = GuestMemory::anonymous(1 << 20) else {
        return;
    };
    let conf = IMAGE.with(|image| format!("{},maxq=3,qsz=16", image.display()));
    let mut controller = conf
        .parse()
        .map_err(|e: String| e)
        .and_then(|options| Controller::open(&options, memory.clone()).map_err(|e| e.to_string()))
        .unwrap_or_else(|e| panic!("{e}"));
    assert!(controller.enable((QUEUE, 16), (QUEUE * 2, 16)));
    let bells = Bells {
        tails: Default::default(),
    };
    let mut sizes = 0_u32;
    steps(data, |step| match step {
        NvmeStep::Memory(at, value) => {
            let _ = memory.write(u64::from(at) << 3 & 0xffff8, &value);
        }
        NvmeStep::Command(queue, opcode, flags, nsid, prps, dw) => {
            let queue = u16::from(queue & 3);
            let mut words = [0_u32; 16];
            words[0] = u32::from(opcode) | u32::from(flags) << 8 | sizes << 16;
            words[1] = nsid;
            words[6] = u32::from(prps[0]) << 4;
            words[8] = u32::from(prps[1]) << 4;
            words[10..13].copy_from_slice(&dw);
            // A queue that was made by an earlier command starts at a page.
            for base in [QUEUE, QUEUE * 3, QUEUE * 4] {
                let slot = u64::from(bells.sq_tail(queue)) * 64;
                for (i, word) in (0_u64..).zip(&words) {
                    let _ = memory.write(base + slot + 4 * i, word);
                }
            }
            sizes = sizes.wrapping_add(1) & 0xffff;
            if let Some(tail) = bells.tails.get(usize::from(queue)) {
                tail.set((tail.get() + 1) % 16);
            }
            // One command was given, so at most one turn does something, and
            // what another queue has from before.
            for _ in 0..16 {
                if matches!(controller.turn(queue, &bells), Turn::Idle | Turn::Fatal) {
                    break;
                }
            }
        }
    });
}

#[derive(Arbitrary, Debug)]
enum AhciStep {
    Register(u8, u32),
    Memory(u16, u64),
    /// Slot, command, LBA, count and features, ATAPI command, a buffer.
    Command(u8, u8, u32, [u8; 2], Option<[u8; 12]>, (u16, u16)),
}

/// A port of an AHCI adapter with a disk or a CD drive, its command list in
/// guest memory.
pub fn ahci(data: &[u8]) {
    use bhyve::ahci::media::Media;
    use bhyve::ahci::options::{Kind, parse};
    use bhyve::ahci::port::Port;

    thread_local! {
        static IMAGE: std::path::PathBuf = {
            let path = std::env::temp_dir().join(format!("fuzz-ahci-{}", std::process::id()));
            if let Err(e) = std::fs::write(&path, vec![0x5a; 64 << 10]) {
                panic!("{}: {e}", path.display());
            }
            path
        };
    }
    const LIST: u64 = 0x1000;
    const TABLES: u64 = 0x4000;
    let Ok(memory) = GuestMemory::anonymous(1 << 20) else {
        return;
    };
    let (first, data) = data.split_first().unwrap_or((&0, data));
    let kind = if first & 1 == 0 { Kind::Hd } else { Kind::Cd };
    let conf = IMAGE.with(|image| image.display().to_string());
    let drives = parse(&conf, Some(kind)).unwrap_or_else(|e| panic!("{e}"));
    let port = drives.first().map(|drive| {
        let media = Media::open(drive, 0).unwrap_or_else(|e| panic!("{e}"));
        Port::new(media, memory.clone())
    });
    let Some(port) = port else {
        return;
    };
    port.write(0x00, LIST as u32);
    port.write(0x08, 0x2000);
    port.write(0x18, 0x17);
    steps(data, |step| match step {
        AhciStep::Register(offset, value) => {
            port.write(u64::from(offset & 0x7c), value);
            let _ = (port.read(u64::from(offset & 0x7c)), port.interrupts());
            turns(&port);
        }
        AhciStep::Memory(at, value) => {
            let _ = memory.write(u64::from(at) << 3 & 0xffff8, &value);
        }
        AhciStep::Command(slot, command, lba, [count, features], cdb, (addr, len)) => {
            let slot = u64::from(slot & 31);
            let table = TABLES + slot * 0x100;
            let flags = 5 | u32::from(cdb.is_some()) << 5 | 1 << 16;
            let _ = memory.write(LIST + 32 * slot, &[flags, 0, table as u32, 0]);
            let l = lba.to_le_bytes();
            let fis = [
                0x27, 0x80, command, features, l[0], l[1], l[2], 0x40, 0, 0, 0, 0, count, 0, 0,
                l[3],
            ];
            let _ = memory.write(table, &fis);
            let _ = memory.write_bytes(table + 0x40, &cdb.unwrap_or_default());
            let entry = u128::from(addr) << 4 | u128::from(len) << 96;
            let _ = memory.write(table + 0x80, &entry.to_le_bytes());
            port.write(0x34, 1 << slot);
            port.write(0x38, 1 << slot);
            turns(&port);
            // As a driver after an error.
            if port.read(0x10) & 0x6000_0000 != 0 {
                port.write(0x10, u32::MAX);
                port.write(0x18, 0x16);
                port.write(0x18, 0x17);
            }
        }
    });

    /// Every slot's command ends or stops the port.
    fn turns(port: &Port) {
        for _ in 0..40 {
            if !port.turn() {
                return;
            }
        }
        panic!("a port never comes to rest");
    }
}
