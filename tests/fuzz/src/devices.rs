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
fn steps<T: for<'a> Arbitrary<'a>>(data: &[u8], mut each: impl FnMut(T)) {
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
