//! What tests of disks share: an image, hosts that fail, and a PCI function in
//! its slot with guest memory beside it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use vmmapi::GuestMemory;

use crate::bus::Buses;
use crate::machine::Machine;
use crate::machine::fake::Fake;
use crate::pci::Bdf;
use crate::pci::bar::Windows;
use crate::pci::catalog::Plan;
use crate::pci::function::{PciFunction, Wiring};
use crate::pci::intx::Router;

static NEXT: AtomicU32 = AtomicU32::new(0);
/// Bytes of a [`Rig`]'s disk.
pub const DISK: usize = 1 << 20;

/// A disk image that goes away with the test.
pub struct Image(pub PathBuf);

impl Image {
    pub fn new(content: &[u8]) -> Image {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("bhyve-disk-{}-{n}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::write(&path, content).unwrap();
        Image(path)
    }
    pub fn content(&self) -> Vec<u8> {
        fs::read(&self.0).unwrap()
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Bytes of which no two sectors are alike.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i * 7 + i / 512) as u8).collect()
}

/// A host on which every write is ENOSPC.
pub fn full() -> File {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/full")
        .unwrap()
}

/// A host on which every read and write is EIO: this process's memory, of which
/// the first pages are not there.
#[cfg(target_os = "linux")]
pub fn broken() -> File {
    let path = Path::new("/proc/self/mem");
    let options = File::options().read(true).write(true).open(path);
    options.unwrap()
}

/// A host that takes every write and makes none durable: fsync(2) is EINVAL.
pub fn fleeting() -> File {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .unwrap()
}

/// Waits for something that other threads do.
pub fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < until, "{what}");
        std::thread::yield_now();
    }
}

/// A controller with a disk of [`DISK`] bytes.
pub struct Rig {
    pub image: Image,
    pub f: Arc<PciFunction>,
    pub fake: Arc<Fake>,
    pub memory: GuestMemory,
    pub buses: Arc<Buses>,
    /// Where the registers are.
    pub bar: u64,
}

impl Rig {
    /// What `build` makes of the image's path, its registers at the BAR of
    /// configuration offset `bar`.
    pub fn new(bar: u16, build: impl FnOnce(&Path, &GuestMemory) -> Plan) -> Rig {
        let image = Image::new(&pattern(DISK));
        let fake = Fake::new();
        let machine: Arc<dyn Machine> = fake.clone();
        let buses = Arc::new(Buses::default());
        let router = Arc::new(Router::new(machine.clone(), 24));
        let route = router.allocate().unwrap();
        let memory = GuestMemory::anonymous(4 << 20).unwrap();
        let (plan, device) = build(&image.0, &memory);
        let wiring = Wiring {
            buses: &buses,
            machine: &machine,
            router: &router,
            windows: &mut Windows::new(0xc000_0000),
            intx: Some((0, route)),
        };
        let at = Bdf {
            bus: 0,
            slot: 3,
            func: 0,
        };
        let f = PciFunction::new(at, plan, device, wiring).unwrap();
        f.config_write(4, 2, 6);
        let low = f.config_read(bar, 4);
        // Bit 2 says that the next register is its upper half.
        let high = if low & 4 != 0 {
            f.config_read(bar + 4, 4)
        } else {
            0
        };
        let bar = u64::from(low & !0xf) | u64::from(high) << 32;
        fake.take();
        Rig {
            image,
            f,
            fake,
            memory,
            buses,
            bar,
        }
    }

    /// Writes a register.
    pub fn write(&self, offset: u64, value: u32) {
        let at = self.bar + offset;
        let d = self.buses.mmio.get(at, 4).unwrap();
        d.mmio_write(at, 4, value.into());
    }
    /// Reads a register.
    pub fn read(&self, offset: u64) -> u32 {
        let at = self.bar + offset;
        self.buses.mmio.get(at, 4).unwrap().mmio_read(at, 4) as u32
    }
    /// Guest memory.
    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut b = vec![0; len];
        self.memory.read_bytes(at, &mut b).unwrap();
        b
    }
}
