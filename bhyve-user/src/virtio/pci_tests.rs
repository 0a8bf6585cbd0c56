use std::time::{Duration, Instant};

use super::*;
use crate::bus::Buses;
use crate::machine::Machine;
use crate::machine::fake::{Event, Fake};
use crate::pci::Bdf;
use crate::pci::bar::Windows;
use crate::pci::function::Wiring;
use crate::pci::intx::Router;
use crate::virtio::Device;
use crate::virtio::queue::{Chain, Malformed, take_front};

#[path = "group_tests.rs"]
mod groups;

const IO: u16 = 0x2000;
const DEVICE_FEATURE: u64 = 1 << 5;

/// Writes back what it reads, and insists on one byte.
struct Echo;
impl Device for Echo {
    fn serve(
        &mut self,
        _: usize,
        chain: &mut Chain,
        memory: &GuestMemory,
        _: u64,
    ) -> Result<u32, Malformed> {
        let mut byte = [0];
        if !take_front(&mut chain.readable, memory, &mut byte) {
            return Err(Malformed::Request);
        }
        for b in &chain.writable {
            memory.fill(b.addr, b.len.into(), byte[0]).unwrap();
        }
        Ok(crate::virtio::queue::total(&chain.writable) as u32)
    }
}

struct Rig {
    f: Arc<PciFunction>,
    buses: Arc<Buses>,
    fake: Arc<Fake>,
    memory: GuestMemory,
    /// First address of the modern registers.
    modern: u64,
    msix: u64,
}

fn rig() -> Rig {
    rig_of(|identity| Built::single(identity, Echo))
}

fn rig_of(built: impl FnOnce(Identity) -> Built) -> Rig {
    let fake = Fake::new();
    let machine: Arc<dyn Machine> = fake.clone();
    let buses = Arc::new(Buses::default());
    let router = Arc::new(Router::new(machine.clone(), 24));
    let route = router.allocate().unwrap();
    let memory = GuestMemory::anonymous(1 << 20).unwrap();
    let identity = Identity {
        kind: 2,
        class: (1, 0),
        features: DEVICE_FEATURE,
        queues: vec![8, 8],
        config: vec![1, 2, 3, 4, 5, 6, 7, 8],
        writable: 4..8,
    };
    let built = built(identity);
    let (plan, device) = VirtioPci::new("test".into(), built, memory.clone(), false).unwrap();
    let wiring = Wiring {
        buses: &buses,
        machine: &machine,
        router: &router,
        windows: &mut Windows::new(0xc000_0000),
        intx: Some((0, route)),
    };
    let at = Bdf {
        bus: 0,
        slot: 2,
        func: 0,
    };
    let f = PciFunction::new(at, plan, Box::new(device), wiring).unwrap();
    fake.take();
    let modern = u64::from(f.config_read(0x18, 4));
    let msix = u64::from(f.config_read(0x14, 4));
    Rig {
        f,
        buses,
        fake,
        memory,
        modern,
        msix,
    }
}

impl Rig {
    fn outp(&self, offset: u16, size: u8, value: u32) {
        let port = self.buses.ports.get(IO + offset).unwrap();
        assert!(port.port_write(IO + offset, size, value));
    }
    fn inp(&self, offset: u16, size: u8) -> u32 {
        let port = self.buses.ports.get(IO + offset).unwrap();
        port.port_read(IO + offset, size).unwrap()
    }
    fn mwrite(&self, offset: u64, size: u8, value: u64) {
        let gpa = self.modern + offset;
        self.buses
            .mmio
            .get(gpa, size)
            .unwrap()
            .mmio_write(gpa, size, value);
    }
    fn mread(&self, offset: u64, size: u8) -> u64 {
        let gpa = self.modern + offset;
        self.buses.mmio.get(gpa, size).unwrap().mmio_read(gpa, size)
    }
    /// One request at `layout`'s start: a byte to read, `len` to write.
    fn request(&self, layout: Layout, n: u16, byte: u8) {
        self.memory.write(0x8000, &byte).unwrap();
        let d = |addr: u64, len: u64, flags: u64, next: u64| [addr, len | flags << 32 | next << 48];
        self.memory.write(layout.desc, &d(0x8000, 1, 1, 1)).unwrap();
        self.memory
            .write(layout.desc + 16, &d(0x9000, 4, 2, 0))
            .unwrap();
        let slot = layout.avail + 4 + 2 * u64::from((n - 1) % layout.size);
        self.memory.write(slot, &0_u16).unwrap();
        self.memory.write(layout.avail + 2, &n).unwrap();
    }
    fn wait(&self, what: &str, mut done: impl FnMut(&Rig) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(start.elapsed() < Duration::from_secs(20), "{what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    fn served(&self, layout: Layout, n: u16, byte: u8) {
        let used = layout.used + 2;
        self.wait("a request is served", |r| {
            r.memory.read::<u16>(used).unwrap() == n
        });
        assert_eq!(self.memory.read::<[u8; 4]>(0x9000).unwrap(), [byte; 4]);
    }
    /// Events up to the one that is waited for.
    fn event(&self, wanted: Event) {
        let mut seen = Vec::new();
        self.wait(&format!("{wanted:?}"), |r| {
            seen.extend(r.fake.take());
            seen.contains(&wanted)
        });
    }
}

fn legacy_start(r: &Rig) -> Layout {
    r.outp(0x12, 1, 3);
    r.outp(4, 4, r.inp(0, 4));
    r.outp(0xe, 2, 0);
    r.outp(8, 4, 4);
    Layout::legacy(4, 8)
}

fn modern_start(r: &Rig, layout: Layout) {
    r.mwrite(0x14, 1, 3);
    r.mwrite(8, 4, 0);
    r.mwrite(0xc, 4, DEVICE_FEATURE | feature::EVENT_IDX);
    r.mwrite(8, 4, 1);
    r.mwrite(0xc, 4, 1);
    r.mwrite(0x14, 1, 0xb);
    assert_eq!(r.mread(0x14, 1), 0xb, "the features are accepted");
    r.mwrite(0x16, 2, 1);
    r.mwrite(0x18, 2, layout.size.into());
    r.mwrite(0x20, 8, layout.desc);
    r.mwrite(0x28, 8, layout.avail);
    r.mwrite(0x30, 8, layout.used);
    r.mwrite(0x1c, 2, 1);
}

const MODERN: Layout = Layout {
    size: 4,
    desc: 0x1000,
    avail: 0x2000,
    used: 0x3000,
};

#[test]
fn a_transitional_device_has_both_interfaces() {
    let r = rig();
    assert_eq!(r.f.config_read(0, 4), 0x1001_1af4);
    assert_eq!(r.f.config_read(8, 1), 0, "revision");
    assert_eq!(r.f.config_read(0x2c, 4), 0x0002_1af4);
    let (mut at, mut kinds) = (r.f.config_read(0x34, 1) as u16, Vec::new());
    while at != 0 {
        if r.f.config_read(at, 1) == 9 {
            kinds.push(r.f.config_read(at + 3, 1));
        }
        at = r.f.config_read(at + 1, 1) as u16;
    }
    assert_eq!(kinds, [1, 2, 3, 4, 5]);
    assert_eq!(r.inp(0x14, 4), 0x0403_0201, "configuration without MSI-X");
    assert_eq!(r.mread(CONFIG + 4, 4), 0x0807_0605);
    assert_eq!(r.mread(CONFIG + 6, 4), 0x0807, "zeroes behind its end");
    assert_eq!((r.mread(0x12, 2), r.mread(0x18, 2)), (2, 8));
}

#[test]
fn a_legacy_driver_needs_no_driver_ok_and_gets_an_intx() {
    let r = rig();
    let layout = legacy_start(&r);
    assert_eq!(r.inp(8, 4), 4);
    r.request(layout, 1, 0x11);
    r.outp(0x10, 2, 0);
    r.served(layout, 1, 0x11);
    r.event(Event::IsaAssert(3, Some(16)));
    assert_eq!(r.inp(0x13, 1), 1);
    assert_eq!(r.fake.take(), [Event::IsaDeassert(3, Some(16))]);
    assert_eq!(r.inp(0x13, 1), 0, "reading has cleared it");
}

#[test]
fn a_modern_driver_gets_its_msi_x_and_nothing_before_driver_ok() {
    let r = rig();
    modern_start(&r, MODERN);
    r.request(MODERN, 1, 0x22);
    r.outp(0x10, 2, 1);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(r.memory.read::<u16>(MODERN.used + 2).unwrap(), 0);
    let table = r.buses.mmio.get(r.msix, 4).unwrap();
    table.mmio_write(r.msix + 16, 8, 0xfee0_0000);
    table.mmio_write(r.msix + 24, 8, 0x51);
    let cap = (0..64)
        .map(|i| 4 * i)
        .find(|&c| c >= 0x40 && r.f.config_read(c, 1) == 0x11);
    r.f.config_write(cap.unwrap() + 2, 2, 0x8000);
    r.mwrite(0x1a, 2, 1);
    assert_eq!(r.mread(0x1a, 2), 1);
    r.mwrite(0x1a, 2, 77);
    assert_eq!(r.mread(0x1a, 2), 0xffff, "there is no vector 77");
    r.mwrite(0x1a, 2, 1);
    r.mwrite(0x14, 1, 0xf);
    r.served(MODERN, 1, 0x22);
    r.event(Event::Msi(0xfee0_0000, 0x51));
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let r = rig();
    r.mwrite(0, 4, 0);
    assert_eq!(r.mread(4, 4), DEVICE_FEATURE | 7 << 27);
    r.mwrite(0, 4, 1);
    assert_eq!(r.mread(4, 4), 1);
    for (low, high) in [(1, 1), (DEVICE_FEATURE, 0), (0, 3)] {
        r.mwrite(0x14, 1, 0);
        r.mwrite(8, 4, 0);
        r.mwrite(0xc, 4, low);
        r.mwrite(8, 4, 1);
        r.mwrite(0xc, 4, high);
        r.mwrite(0x14, 1, 0xb);
        assert_eq!(r.mread(0x14, 1), 3, "{low:#x} {high:#x}");
    }
}

#[test]
fn a_malformed_request_stops_the_device_until_it_is_reset() {
    let r = rig();
    modern_start(&r, MODERN);
    r.mwrite(0x14, 1, 0xf);
    // No readable byte: not an Echo request.
    r.memory
        .write(MODERN.desc, &[0x9000_u64, 4 | 2 << 32])
        .unwrap();
    r.memory.write(MODERN.avail + 2, &1_u16).unwrap();
    r.outp(0x10, 2, 1);
    r.wait("NEEDS_RESET", |r| r.mread(0x14, 1) == 0x4f);
    r.event(Event::IsaAssert(3, Some(16)));
    assert_eq!(r.mread(ISR, 1), 2, "a configuration change");
    r.mwrite(0x14, 1, 0xf);
    assert_eq!(r.mread(0x14, 1), 0x4f, "only a reset helps");
    r.memory.fill(MODERN.avail, 64, 0).unwrap();
    r.memory.fill(MODERN.used, 64, 0).unwrap();
    r.mwrite(0x14, 1, 0);
    assert_eq!((r.mread(0x14, 1), r.mread(0x1c, 2)), (0, 0));
    modern_start(&r, MODERN);
    r.mwrite(0x14, 1, 0xf);
    r.request(MODERN, 1, 0x33);
    r.outp(0x10, 2, 1);
    r.served(MODERN, 1, 0x33);
}

#[test]
fn rings_outside_memory_need_a_reset() {
    let r = rig();
    let far = Layout {
        used: 1 << 40,
        ..MODERN
    };
    modern_start(&r, far);
    r.mwrite(0x14, 1, 0xf);
    assert_eq!(r.mread(0x14, 1), 0x4f);
    let r = rig();
    r.outp(0xe, 2, 0);
    r.outp(8, 4, u32::MAX);
    assert_eq!(r.inp(0x12, 1), 0x40);
}

#[test]
fn a_reset_leaves_memory_alone_from_then_on() {
    let r = rig();
    let layout = legacy_start(&r);
    for n in 1..=50 {
        r.request(layout, n, n as u8);
        r.outp(0x10, 2, 0);
    }
    r.outp(0x12, 1, 0);
    r.memory.fill(0, 1 << 20, 0).unwrap();
    r.outp(0x10, 2, 0);
    std::thread::sleep(Duration::from_millis(20));
    let mut all = vec![0xff; 1 << 20];
    r.memory.read_bytes(0, &mut all).unwrap();
    assert!(all.iter().all(|&b| b == 0));
    assert_eq!(r.inp(8, 4), 0);
}

#[test]
fn no_access_is_fatal() {
    let r = rig();
    let mut value = 0x9e37_79b9_u32;
    for round in 0..40_000_u32 {
        value = value.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let size = 1 << (value >> 30).min(2);
        let written = value.rotate_left(7) & [1, 0xf, 0xff, u32::MAX][round as usize % 4];
        r.outp((value >> 8) as u16 & 0x7f, size, written);
        r.inp((value >> 16) as u16 & 0x7f, size);
        let offset = u64::from(value >> 4) & 0x3f & !u64::from(size - 1);
        r.mwrite(offset, size, written.into());
        r.mread(offset, size);
    }
    // And it still works.
    r.outp(0x12, 1, 0);
    r.memory.fill(0, 1 << 20, 0).unwrap();
    let layout = legacy_start(&r);
    r.request(layout, 1, 0x44);
    r.outp(0x10, 2, 0);
    r.served(layout, 1, 0x44);
}

#[test]
fn the_bars_are_reachable_through_configuration_space() {
    let r = rig();
    let cap = (0x40..0x100)
        .step_by(4)
        .find(|&c| r.f.config_read(c, 1) == 9 && r.f.config_read(c + 3, 1) == 5)
        .unwrap();
    let aim = |bar: u32, offset: u32, length: u32| {
        r.f.config_write(cap + 4, 1, bar);
        r.f.config_write(cap + 8, 4, offset);
        r.f.config_write(cap + 12, 4, length);
    };
    aim(2, CONFIG as u32 + 4, 4);
    assert_eq!(r.f.config_read(cap + 16, 4), 0x0807_0605);
    aim(2, CONFIG as u32 + 1, 1);
    assert_eq!(r.f.config_read(cap + 16, 4), 2);
    aim(2, 0x16, 2);
    r.f.config_write(cap + 16, 4, 0xffff_0001);
    assert_eq!(r.mread(0x16, 2), 1, "queue select");
    aim(0, 0xe, 2);
    assert_eq!(r.f.config_read(cap + 16, 2), 1, "in I/O ports too");
    // Nowhere: the MSI-X table, no BAR, odd, over the end.
    for (bar, offset, length) in [
        (1, 0, 4),
        (3, 0, 4),
        (255, 0, 4),
        (2, 2, 4),
        (2, 0, 3),
        (2, 0, 0),
        (2, 0xffff_fffc, 4),
        (2, MODERN_SIZE as u32, 4),
    ] {
        aim(bar, offset, length);
        r.f.config_write(cap + 16, 4, u32::MAX);
        assert_eq!(
            r.f.config_read(cap + 16, 4),
            0,
            "{bar} {offset:#x} {length}"
        );
    }
    r.f.config_write(cap, 4, u32::MAX);
    assert_eq!(r.f.config_read(cap, 1), 9);
}

/// Does itself what starts with an even byte, at once; the rest is the
/// thread's.
struct Half {
    by_vcpu: Arc<Mutex<Vec<bool>>>,
    thread: std::thread::ThreadId,
}
impl Half {
    fn note(&self) {
        let vcpu = std::thread::current().id() == self.thread;
        lock(&self.by_vcpu).push(vcpu);
    }
}
impl Device for Half {
    fn serve(
        &mut self,
        queue: usize,
        chain: &mut Chain,
        memory: &GuestMemory,
        features: u64,
    ) -> Result<u32, Malformed> {
        self.note();
        Echo.serve(queue, chain, memory, features)
    }
    fn at_once(&self) -> bool {
        true
    }
    fn try_turn(
        &mut self,
        queue: usize,
        cx: &mut crate::virtio::Cx<'_>,
    ) -> Result<crate::virtio::Attempt, Malformed> {
        cx.try_serve_one(queue, |chain, memory, features| {
            let byte: u8 = memory.read(chain.readable[0].addr).unwrap();
            if !byte.is_multiple_of(2) {
                return Ok(None);
            }
            self.serve(queue, chain, memory, features).map(Some)
        })
    }
}

#[test]
fn what_needs_no_waiting_is_done_before_the_notification_returns() {
    let by_vcpu = Arc::new(Mutex::new(Vec::new()));
    let half = Half {
        by_vcpu: Arc::clone(&by_vcpu),
        thread: std::thread::current().id(),
    };
    let r = rig_of(|identity| Built::single(identity, half));
    assert_eq!(r.fake.bells(), [], "the vCPU is wanted itself");
    let layout = legacy_start(&r);
    r.request(layout, 1, 0x22);
    r.outp(0x10, 2, 0);
    assert_eq!(r.memory.read::<u16>(layout.used + 2).unwrap(), 1);
    r.served(layout, 1, 0x22);
    r.event(Event::IsaAssert(3, Some(16)));
    // One that is not for it is found whole by the thread.
    r.request(layout, 2, 0x23);
    r.outp(0x10, 2, 0);
    r.served(layout, 2, 0x23);
    assert_eq!(*lock(&by_vcpu), [true, false]);
    // A malformed chain stops the device there as well.
    r.memory.write(layout.desc + 14, &9_u16).unwrap();
    r.memory.write(layout.avail + 2, &3_u16).unwrap();
    r.outp(0x10, 2, 0);
    assert_eq!(r.inp(0x12, 1) & 0x40, 0x40, "NEEDS_RESET");
}

#[cfg(target_os = "linux")]
#[test]
fn a_doorbell_in_the_kernel_reaches_the_thread() {
    let r = rig();
    let any = |port| vec![(port, None)];
    assert_eq!(r.fake.bells(), any(IO + 0x10), "one thread, any queue");
    let layout = legacy_start(&r);
    for n in 1..=20 {
        r.request(layout, n, n as u8);
        r.fake.ring(IO + 0x10);
        r.served(layout, n, n as u8);
    }
    // It follows the BAR, and goes with it.
    r.f.config_write(0x10, 4, 0x3000);
    assert_eq!(r.fake.bells(), any(0x3010));
    r.f.config_write(4, 2, 0);
    assert_eq!(r.fake.bells(), []);
}
