//! Writes numbered records to a virtio disk, one after the other, and says so of
//! each when it is durable: the console's `powercut: record N` is what a power
//! cut must not take back.
//!
//! Record N is 4 KiB of [`word`]s at byte 4096 * (N + 1) of the disk. Variables:
//! `powercut.records`, how many; `powercut.seed`, which keeps one run's records
//! from another's; `powercut.flush=1`, a flush after each write;
//! `powercut.feature=1`, the driver knows of flushes (VIRTIO_BLK_F_FLUSH).
#![no_std]
#![no_main]

use core::sync::atomic::{Ordering, fence};
use guests::report::Report;
use guests::{cpu, memory, preload, println, trap};

/// PCI configuration, mechanism 1.
const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;
/// A transitional virtio-blk (virtio 1.2 §4.1.2.1): device and vendor.
const BLK: u32 = 0x1001_1af4;
/// The legacy registers (§4.1.4.8), in the BAR 0 of ports.
const DRIVER_FEATURES: u16 = 4;
const QUEUE_PFN: u16 = 8;
const QUEUE_SIZE: u16 = 12;
const QUEUE_SELECT: u16 = 14;
const NOTIFY: u16 = 16;
const STATUS: u16 = 18;
/// ACKNOWLEDGE, DRIVER, DRIVER_OK.
const DRIVER_OK: u8 = 7;
const F_FLUSH: u32 = 1 << 9;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
/// Bytes and sectors of a record.
const RECORD: usize = 4096;
const SECTORS: u64 = 8;
/// The largest queue that there is room for.
const MOST: u16 = 256;
/// TSC ticks that a request may take.
const PATIENCE: u64 = 60_000_000_000;

#[repr(C, align(4096))]
struct Ring([u8; 16384]);

#[repr(C, align(4096))]
struct Buffers {
    record: [u64; RECORD / 8],
    header: [u32; 4],
    status: u8,
}

static mut RING: Ring = Ring([0; 16384]);
static mut BUFFERS: Buffers = Buffers {
    record: [0; RECORD / 8],
    header: [0; 4],
    status: 0,
};

/// Word `at` of record `number`.
fn word(seed: u64, number: u64, at: u64) -> u64 {
    let n = seed.wrapping_add(number << 16).wrapping_add(at);
    n.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn config_read(slot: u32, register: u32) -> u32 {
    cpu::outl(ADDRESS, 1 << 31 | slot << 11 | register);
    cpu::inl(DATA)
}

fn config_write(slot: u32, register: u32, value: u32) {
    cpu::outl(ADDRESS, 1 << 31 | slot << 11 | register);
    cpu::outl(DATA, value);
}

/// A disk with one queue.
struct Disk {
    ports: u16,
    size: u16,
    issued: u16,
}

impl Disk {
    fn find(features: u32) -> Option<Disk> {
        let slot = (0..32).find(|&s| config_read(s, 0) == BLK)?;
        // Ports and bus mastering.
        config_write(slot, 4, 5);
        let ports = (config_read(slot, 0x10) & 0xfffc) as u16;
        cpu::outb(ports + STATUS, 0);
        cpu::outb(ports + STATUS, 3);
        cpu::outl(ports + DRIVER_FEATURES, features);
        cpu::outw(ports + QUEUE_SELECT, 0);
        let size = cpu::inw(ports + QUEUE_SIZE);
        if size == 0 || size > MOST {
            return None;
        }
        let ring = memory::physical(&raw const RING);
        cpu::outl(ports + QUEUE_PFN, (ring >> 12) as u32);
        cpu::outb(ports + STATUS, DRIVER_OK);
        Some(Disk {
            ports,
            size,
            issued: 0,
        })
    }

    /// Does a request; its status.
    fn request(&mut self, kind: u32, sector: u64) -> Option<u8> {
        let n = usize::from(self.size);
        let ring = &raw mut RING as *mut u8;
        let buffers = &raw mut BUFFERS;
        let at = |p: *const u8| p as u64 - guests::KERNBASE;
        let data = kind == T_OUT;
        // SAFETY: the ring has room for `size` descriptors, the available ring
        // behind them and the used ring at the next page; one request at a time
        // is under way, so that nobody else uses them or the buffers now.
        unsafe {
            (*buffers).header = [kind, 0, sector as u32, (sector >> 32) as u32];
            (*buffers).status = 0xff;
            let descriptors = [
                (
                    at((&raw const (*buffers).header).cast()),
                    16,
                    1_u16,
                    if data { 1 } else { 2 },
                ),
                (
                    at((&raw const (*buffers).record).cast()),
                    RECORD as u32,
                    1,
                    2,
                ),
                (at(&raw const (*buffers).status), 1, 2, 0_u16),
            ];
            for (i, (addr, len, flags, next)) in descriptors.into_iter().enumerate() {
                let d = ring.add(16 * i);
                d.cast::<u64>().write_volatile(addr);
                d.add(8).cast::<u32>().write_volatile(len);
                d.add(12).cast::<u16>().write_volatile(flags);
                d.add(14).cast::<u16>().write_volatile(next);
            }
            let avail = ring.add(16 * n);
            // No interrupts; head 0.
            avail.cast::<u16>().write_volatile(1);
            let entry = avail.add(4 + 2 * usize::from(self.issued % self.size));
            entry.cast::<u16>().write_volatile(0);
            fence(Ordering::SeqCst);
            self.issued = self.issued.wrapping_add(1);
            avail.add(2).cast::<u16>().write_volatile(self.issued);
            fence(Ordering::SeqCst);
            cpu::outw(self.ports + NOTIFY, 0);
            let used = ring.add((16 * n + 6 + 2 * n).next_multiple_of(4096) + 2);
            let start = cpu::rdtsc();
            while used.cast::<u16>().read_volatile() != self.issued {
                if cpu::rdtsc() - start > PATIENCE {
                    return None;
                }
                cpu::pause();
            }
            fence(Ordering::SeqCst);
            Some((&raw const (*buffers).status).read_volatile())
        }
    }

    fn write(&mut self, seed: u64, number: u64) -> Option<u8> {
        let record = &raw mut BUFFERS;
        for at in 0..RECORD / 8 {
            // SAFETY: no request is under way.
            unsafe { (*record).record[at] = word(seed, number, at as u64) };
        }
        self.request(T_OUT, (number + 1) * SECTORS)
    }
}

fn number(name: &str) -> u64 {
    preload::variable(name).map_or(0, |v| v.parse().unwrap_or(0))
}

#[unsafe(no_mangle)]
extern "C" fn guest_main() -> ! {
    let mut r = Report::new("powercut");
    trap::init();
    memory::init();
    let (records, seed) = (number("powercut.records"), number("powercut.seed"));
    let flush = number("powercut.flush") == 1;
    let features = if number("powercut.feature") == 1 {
        F_FLUSH
    } else {
        0
    };
    let Some(mut disk) = Disk::find(features) else {
        r.check("there is a disk", false);
        r.finish()
    };
    for n in 0..records {
        let mut status = disk.write(seed, n);
        if status == Some(0) && flush {
            status = disk.request(T_FLUSH, 0);
        }
        if status != Some(0) {
            println!("powercut: record {n} has status {status:?}");
            r.check("records are written", false);
            r.finish()
        }
        println!("powercut: record {n}");
    }
    // Closing the disk would be kinder than a power cut is.
    println!("powercut: all records are written");
    loop {
        cpu::disable_interrupts();
        cpu::halt();
    }
}
