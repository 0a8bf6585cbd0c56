//! A driver for tests: queues in memory of its own, a device on its threads.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vmmapi::GuestMemory;

use super::Built;
use super::queue::{Layout, Queue};
use super::worker::Shared;

/// Entries of each queue.
pub const SIZE: u16 = 64;
/// Buffers start here.
const BUFFERS: u64 = 4 << 20;

/// A device and its driver.
pub struct Bed {
    pub shared: Arc<Shared>,
    pub memory: GuestMemory,
    queues: Vec<Side>,
    next: u64,
}

#[derive(Default)]
struct Side {
    offered: u16,
    seen: u16,
    desc: u16,
}

/// What was offered.
#[derive(Clone, Debug)]
pub struct Offer {
    /// Its head.
    pub head: u16,
    /// Writable buffers, address and length.
    pub room: Vec<(u64, u32)>,
}

pub fn layout(queue: usize) -> Layout {
    let base = 0x10000 * (queue as u64 + 1);
    Layout {
        size: SIZE,
        desc: base,
        avail: base + 0x4000,
        used: base + 0x6000,
    }
}

impl Bed {
    /// A driver that accepts `features` of those offered.
    pub fn new(built: Built, memory: GuestMemory, features: u64) -> Bed {
        let features = features & built.identity.features;
        let (identity, shared) = Shared::start("test".into(), built, memory.clone()).unwrap();
        let bed = Bed {
            shared,
            memory,
            queues: identity.queues.iter().map(|_| Side::default()).collect(),
            next: BUFFERS,
        };
        for q in 0..bed.queues.len() {
            let queue = Queue::new(&bed.memory, layout(q), false, true).unwrap();
            bed.shared.set_queue(q, Some(queue), features);
        }
        *crate::lock(&bed.shared.status) = 0xf;
        bed.shared.activate(features);
        bed
    }

    /// Offers a chain of what is to be read and room to write.
    pub fn offer(&mut self, q: usize, out: &[&[u8]], room: &[u32]) -> Offer {
        let l = layout(q);
        let total = (out.len() + room.len()) as u16;
        let side = &mut self.queues[q];
        let head = side.desc % SIZE;
        let mut offer = Offer {
            head,
            room: Vec::new(),
        };
        let lens = out.iter().map(|b| (b.len() as u32, Some(*b)));
        let all = lens.chain(room.iter().map(|&n| (n, None)));
        for (i, (len, data)) in all.enumerate() {
            let at = self.next;
            self.next += u64::from(len).next_multiple_of(64).max(64);
            match data {
                Some(bytes) => self.memory.write_bytes(at, bytes).unwrap(),
                None => offer.room.push((at, len)),
            }
            let index = side.desc % SIZE;
            side.desc += 1;
            let more = u64::from(i as u16 + 1 < total);
            let flags = more | if data.is_none() { 2 } else { 0 };
            let next = u64::from((index + 1) % SIZE);
            let rest = u64::from(len) | flags << 32 | next << 48;
            let slot = l.desc + 16 * u64::from(index);
            self.memory.write(slot, &[at, rest]).unwrap();
        }
        let slot = l.avail + 4 + 2 * u64::from(side.offered % SIZE);
        self.memory.write(slot, &head).unwrap();
        side.offered += 1;
        self.memory.write(l.avail + 2, &side.offered).unwrap();
        self.shared.notify(q);
        offer
    }

    /// Offers descriptor 0 as it stands: its address, the rest of it.
    pub fn raw(&mut self, q: usize, address: u64, rest: u64) {
        let l = layout(q);
        self.memory.write(l.desc, &[address, rest]).unwrap();
        self.memory.write(l.avail + 4, &0_u16).unwrap();
        self.memory.write(l.avail + 2, &1_u16).unwrap();
        self.shared.notify(q);
    }

    /// The next chain that comes back: its head and length.
    pub fn used(&mut self, q: usize) -> (u16, u32) {
        let l = layout(q);
        let seen = self.queues[q].seen;
        wait("a chain comes back", || {
            self.memory.read::<u16>(l.used + 2).unwrap() != seen
        });
        self.queues[q].seen += 1;
        let slot = l.used + 4 + 8 * u64::from(seen % SIZE);
        let [head, len]: [u32; 2] = self.memory.read(slot).unwrap();
        (head as u16, len)
    }

    /// Whether nothing comes back, for a while.
    pub fn quiet(&self, q: usize) -> bool {
        std::thread::sleep(Duration::from_millis(30));
        self.memory.read::<u16>(layout(q).used + 2).unwrap() == self.queues[q].seen
    }

    /// Offers and waits; the bytes written.
    pub fn exchange(&mut self, q: usize, out: &[&[u8]], room: &[u32]) -> Vec<u8> {
        let offer = self.offer(q, out, room);
        let (head, len) = self.used(q);
        assert_eq!(head, offer.head);
        self.bytes(&offer, len)
    }

    /// The first bytes of an offer's room.
    pub fn bytes(&self, offer: &Offer, len: u32) -> Vec<u8> {
        let mut all = Vec::new();
        for &(at, n) in &offer.room {
            let mut part = vec![0; n as usize];
            self.memory.read_bytes(at, &mut part).unwrap();
            all.extend(part);
        }
        assert!(all.len() >= len as usize);
        all.truncate(len as usize);
        all
    }

    /// Whether the device has asked for a reset.
    pub fn broken(&self) -> bool {
        *crate::lock(&self.shared.status) & super::status::NEEDS_RESET != 0
    }
}

pub fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
