use super::*;

const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const SIZE: u16 = 8;

/// A driver that writes whatever a test wants.
struct Driver {
    memory: GuestMemory,
    queue: Queue,
    chain: Chain,
    avail: u16,
}

fn driver(event_idx: bool) -> Driver {
    let memory = GuestMemory::anonymous(1 << 20).unwrap();
    let layout = Layout {
        size: SIZE,
        desc: DESC,
        avail: AVAIL,
        used: USED,
    };
    let queue = Queue::new(&memory, layout, event_idx, true).unwrap();
    Driver {
        memory,
        queue,
        chain: Chain::default(),
        avail: 0,
    }
}

impl Driver {
    fn desc_at(&self, table: u64, i: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        let at = table + 16 * u64::from(i);
        self.memory.write(at, &[addr, rest]).unwrap();
    }
    fn desc(&self, i: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.desc_at(DESC, i, addr, len, flags, next);
    }
    fn offer(&mut self, head: u16) {
        let at = AVAIL + 4 + 2 * u64::from(self.avail % SIZE);
        self.memory.write(at, &head).unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.memory.write(AVAIL + 2, &self.avail).unwrap();
    }
    fn pop(&mut self) -> Result<bool, Malformed> {
        self.queue.pop(&self.memory, &mut self.chain)
    }
    fn give_back(&mut self, written: u32) {
        self.queue.push(&self.memory, &self.chain, written).unwrap();
    }
    fn refuses(&mut self, head: u16) -> Malformed {
        self.offer(head);
        self.pop().unwrap_err()
    }
}

#[test]
fn chains_come_in_order_and_go_back_with_their_length() {
    let mut d = driver(false);
    assert_eq!(d.pop(), Ok(false));
    d.desc(3, 0x8000, 16, NEXT, 5);
    d.desc(5, 0x9000, 512, NEXT | WRITE, 1);
    d.desc(1, 0xa000, 1, WRITE, 0);
    d.offer(3);
    assert_eq!(d.pop(), Ok(true));
    let buffer = |addr, len| Buffer { addr, len };
    assert_eq!(d.chain.readable, [buffer(0x8000, 16)]);
    assert_eq!(d.chain.writable, [buffer(0x9000, 512), buffer(0xa000, 1)]);
    d.give_back(513);
    assert_eq!(d.memory.read::<u16>(USED + 2).unwrap(), 1);
    assert_eq!(d.memory.read::<[u32; 2]>(USED + 4).unwrap(), [3, 513]);
    assert_eq!(d.pop(), Ok(false));
}

/// CVE-2024-51563: a ring that says something else the second time.
#[test]
fn what_a_ring_says_is_read_once() {
    let mut d = driver(false);
    d.desc(0, 0x8000, 16, NEXT, 1);
    d.desc(1, 0x9000, 512, WRITE, 0);
    d.offer(0);
    assert_eq!(d.pop(), Ok(true));
    // The driver changes its mind while the device works.
    d.desc(0, u64::MAX - 8, u32::MAX, NEXT, 0);
    d.desc(1, u64::MAX - 8, u32::MAX, WRITE | NEXT, 1);
    d.memory.write(AVAIL + 4, &7_u16).unwrap();
    let buffer = |addr, len| Buffer { addr, len };
    assert_eq!(d.chain.readable, [buffer(0x8000, 16)]);
    assert_eq!(d.chain.writable, [buffer(0x9000, 512)]);
    d.give_back(512);
    assert_eq!(d.memory.read::<[u32; 2]>(USED + 4).unwrap(), [0, 512]);
    assert_eq!(d.pop(), Ok(false));
}

#[test]
fn rings_wrap_at_their_size_and_indices_at_65536() {
    let mut d = driver(false);
    d.desc(0, 0x8000, 4, 0, 0);
    for round in 0..70_000_u32 {
        d.offer(0);
        assert_eq!(d.pop(), Ok(true), "{round}");
        d.give_back(round);
        let slot = USED + 4 + 8 * u64::from(round % u32::from(SIZE));
        assert_eq!(d.memory.read::<[u32; 2]>(slot).unwrap(), [0, round]);
    }
    assert_eq!(d.memory.read::<u16>(USED + 2).unwrap(), 70_000_u32 as u16);
}

#[test]
fn indirect_tables_and_neighbours() {
    let mut d = driver(false);
    d.desc_at(0x4000, 0, 0x8000, 16, NEXT, 2);
    d.desc_at(0x4000, 2, 0x9000, 4096, NEXT | WRITE, 1);
    d.desc_at(0x4000, 1, 0xa000, 4096, WRITE, 0);
    d.desc(7, 0x4000, 48, INDIRECT, 0);
    d.offer(7);
    assert_eq!(d.pop(), Ok(true));
    let one = Buffer {
        addr: 0x9000,
        len: 8192,
    };
    assert_eq!(d.chain.writable, [one], "neighbours are one buffer");
    assert_eq!(total(&d.chain.readable), 16);
}

#[test]
fn malformed_chains_are_told_apart() {
    let end = 1 << 20;
    assert_eq!(driver(false).refuses(SIZE), Malformed::Index);
    let d = &mut driver(false);
    d.desc(0, 0x8000, 4, NEXT, SIZE);
    assert_eq!(d.refuses(0), Malformed::Index);
    let d = &mut driver(false);
    d.desc(0, 0x8000, 4, NEXT, 1);
    d.desc(1, 0x8000, 4, NEXT, 0);
    assert_eq!(d.refuses(0), Malformed::Length, "a loop");
    for (addr, len) in [(end, 1), (end - 3, 4), (u64::MAX, 1), (0, u32::MAX)] {
        let d = &mut driver(false);
        d.desc(0, addr, len, WRITE, 0);
        assert_eq!(d.refuses(0), Malformed::Buffer, "{addr:#x}");
    }
    let d = &mut driver(false);
    d.desc(0, 0x8000, 4, NEXT | WRITE, 1);
    d.desc(1, 0x8000, 4, 0, 0);
    assert_eq!(d.refuses(0), Malformed::Order);
    for (addr, len, flags) in [
        (0x4000, 0, INDIRECT),
        (0x4000, 15, INDIRECT),
        (0x4000, 16, INDIRECT | NEXT),
        (end - 16, 32, INDIRECT),
        (u64::MAX - 15, 16, INDIRECT),
    ] {
        let d = &mut driver(false);
        d.desc(0, addr, len, flags, 0);
        assert_eq!(d.refuses(0), Malformed::Indirect, "{addr:#x} {len}");
    }
    let d = &mut driver(false);
    d.desc_at(0x4000, 0, 0x5000, 16, INDIRECT, 0);
    d.desc(0, 0x4000, 16, INDIRECT, 0);
    assert_eq!(d.refuses(0), Malformed::Indirect, "nested");
}

#[test]
fn an_available_index_that_runs_ahead_is_malformed() {
    let mut d = driver(false);
    d.memory.write(AVAIL + 2, &(SIZE + 1)).unwrap();
    assert_eq!(d.pop(), Err(Malformed::AvailIndex));
}

#[test]
fn rings_must_be_memory_and_aligned() {
    let memory = GuestMemory::anonymous(1 << 20).unwrap();
    let good = Layout {
        size: SIZE,
        desc: DESC,
        avail: AVAIL,
        used: USED,
    };
    let new = |layout| Queue::new(&memory, layout, true, true).map(drop);
    assert_eq!(new(good), Ok(()));
    for bad in [
        Layout { size: 0, ..good },
        Layout { size: 6, ..good },
        Layout {
            desc: DESC + 8,
            ..good
        },
        Layout {
            avail: AVAIL + 1,
            ..good
        },
        Layout {
            used: USED + 2,
            ..good
        },
        Layout {
            desc: (1 << 20) - 64,
            ..good
        },
        Layout {
            avail: u64::MAX - 1,
            ..good
        },
        Layout {
            used: (1 << 20) - 8,
            ..good
        },
    ] {
        assert_eq!(new(bad), Err(Malformed::Ring), "{bad:?}");
    }
}

#[test]
fn interrupts_come_when_they_are_wanted() {
    let mut d = driver(false);
    d.desc(0, 0x8000, 4, 0, 0);
    let serve = |d: &mut Driver| {
        d.offer(0);
        assert_eq!(d.pop(), Ok(true));
        d.give_back(0);
        d.queue.wants_interrupt(&d.memory).unwrap()
    };
    assert!(serve(&mut d));
    assert!(!d.queue.wants_interrupt(&d.memory).unwrap(), "once");
    d.memory.write(AVAIL, &NO_INTERRUPT).unwrap();
    assert!(!serve(&mut d));

    let mut d = driver(true);
    d.desc(0, 0x8000, 4, 0, 0);
    let used_event = AVAIL + 4 + 2 * u64::from(SIZE);
    assert!(serve(&mut d), "used_event 0: at the first");
    assert!(!serve(&mut d));
    d.memory.write(used_event, &3_u16).unwrap();
    assert!(!serve(&mut d));
    assert!(serve(&mut d), "at the fourth");
    d.memory.write(AVAIL, &NO_INTERRUPT).unwrap();
    d.memory.write(used_event, &4_u16).unwrap();
    assert!(serve(&mut d), "the flag means nothing with event index");
}

#[test]
fn the_device_says_when_it_wants_to_be_notified() {
    let mut d = driver(true);
    d.desc(0, 0x8000, 4, 0, 0);
    let avail_event = USED + 4 + 8 * u64::from(SIZE);
    for _ in 0..3 {
        d.offer(0);
    }
    for _ in 0..3 {
        assert_eq!(d.pop(), Ok(true));
        assert_eq!(d.memory.read::<u16>(avail_event).unwrap(), 0, "busy");
        d.give_back(0);
    }
    assert_eq!(d.pop(), Ok(false));
    assert_eq!(d.memory.read::<u16>(avail_event).unwrap(), 3);
}

#[test]
fn bytes_come_off_both_ends_across_buffers() {
    let memory = GuestMemory::anonymous(1 << 20).unwrap();
    memory.write_bytes(0x1000, b"abcdef").unwrap();
    let buffer = |addr, len| Buffer { addr, len };
    let mut list = vec![buffer(0x1000, 2), buffer(0x1002, 1), buffer(0x1003, 3)];
    let mut out = [0; 4];
    assert!(take_front(&mut list, &memory, &mut out));
    assert_eq!((&out, list.as_slice()), (b"abcd", &[buffer(0x1004, 2)][..]));
    assert_eq!(take_last(&mut list), Some(0x1005));
    assert_eq!(take_last(&mut list), Some(0x1004));
    assert_eq!(take_last(&mut list), None);
    assert!(!take_front(&mut list, &memory, &mut out));
}

#[test]
fn the_front_is_written_skipped_and_kept_across_buffers() {
    let memory = GuestMemory::anonymous(1 << 20).unwrap();
    let buffer = |addr, len| Buffer { addr, len };
    let all = vec![buffer(0x1000, 2), buffer(0x2000, 1), buffer(0x3000, 3)];
    let mut list = all.clone();
    assert!(put_front(&mut list, &memory, b"abcd"));
    assert_eq!(list, [buffer(0x3001, 2)]);
    assert_eq!(memory.read::<[u8; 2]>(0x1000).unwrap(), *b"ab");
    assert_eq!(memory.read::<u8>(0x2000).unwrap(), b'c');
    assert_eq!(memory.read::<[u8; 2]>(0x3000).unwrap(), *b"d\0");
    assert!(!put_front(&mut list, &memory, b"efg"));
    let mut list = all.clone();
    skip_front(&mut list, 2);
    assert_eq!(list, all[1..]);
    skip_front(&mut list, 2);
    assert_eq!(list, [buffer(0x3001, 2)]);
    skip_front(&mut list, 100);
    assert_eq!(list, []);
    let mut list = all.clone();
    keep_front(&mut list, 4);
    assert_eq!(list, [all[0], all[1], buffer(0x3000, 1)]);
    keep_front(&mut list, 2);
    assert_eq!(list, all[..1]);
}
