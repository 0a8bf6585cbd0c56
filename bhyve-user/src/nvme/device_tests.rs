use super::*;
use crate::disk::backend::Backend;
use crate::disk::rig::{self, DISK, wait};
use crate::machine::fake::Event;
use crate::nvme::request::Status;

/// Where things are in the guest.
const ADMIN_SQ: u64 = 0x1_0000;
const ADMIN_CQ: u64 = 0x1_1000;
const IO_SQ: u64 = 0x1_2000;
const IO_CQ: u64 = 0x1_3000;
const DATA: u64 = 0x2_0000;
const LIST: u64 = 0x1_4000;

struct Rig {
    at: rig::Rig,
    tails: [u32; 2],
    heads: [u32; 2],
    phases: [bool; 2],
}

impl std::ops::Deref for Rig {
    type Target = rig::Rig;
    fn deref(&self) -> &rig::Rig {
        &self.at
    }
}

fn rig(options: &str) -> Rig {
    rig_with(options, |_| ())
}

/// With its disk changed before it runs.
fn rig_with(options: &str, change: impl FnOnce(&mut Backend)) -> Rig {
    let at = rig::Rig::new(0x10, |path, memory| {
        let options = format!("{}{options}", path.display()).parse().unwrap();
        let mut controller = Controller::open(&options, memory.clone()).unwrap();
        change(&mut controller.backend);
        Nvme::plan("nvme".into(), controller).unwrap()
    });
    Rig {
        at,
        tails: [0; 2],
        heads: [0; 2],
        phases: [true; 2],
    }
}

/// A command's words 0, 1, PRPs, 10 to 12.
fn entry(opcode: u8, id: u16, nsid: u32, prp: [u64; 2], dw: [u32; 3]) -> [u32; 16] {
    let mut e = [0; 16];
    e[0] = u32::from(opcode) | u32::from(id) << 16;
    e[1] = nsid;
    for (i, p) in prp.iter().enumerate() {
        e[6 + 2 * i] = *p as u32;
        e[7 + 2 * i] = (*p >> 32) as u32;
    }
    e[10..13].copy_from_slice(&dw);
    e
}

impl Rig {
    fn enable(&mut self) {
        self.write(AQA, 7 | 7 << 16);
        self.write(ASQ, ADMIN_SQ as u32);
        self.write(ACQ, ADMIN_CQ as u32);
        self.write(ASQ + 4, 0);
        self.write(ACQ + 4, 0);
        self.write(CC, CC_EN | 6 << 16 | 4 << 20);
        assert_eq!(self.read(CSTS), CSTS_RDY);
    }
    fn io_queues(&mut self) {
        let cq = entry(5, 1, 0, [IO_CQ, 0], [1 | 7 << 16, 1 | 2 | 1 << 16, 0]);
        assert_eq!(self.command(0, cq), (Status::OK.field(), 0));
        let sq = entry(1, 2, 0, [IO_SQ, 0], [1 | 7 << 16, 1 | 1 << 16, 0]);
        assert_eq!(self.command(0, sq), (Status::OK.field(), 0));
    }
    /// Puts a command on queue 0 or 1.
    fn submit(&mut self, queue: usize, e: [u32; 16]) {
        let base = [ADMIN_SQ, IO_SQ][queue];
        let at = base + u64::from(self.tails[queue]) * 64;
        for (i, word) in e.iter().enumerate() {
            self.memory.write(at + 4 * i as u64, word).unwrap();
        }
        self.tails[queue] = (self.tails[queue] + 1) % 8;
        self.write(DOORBELLS + 8 * queue as u64, self.tails[queue]);
    }
    /// Waits for its completion: status without phase, dword 0.
    fn complete(&mut self, queue: usize) -> (u16, u32) {
        let base = [ADMIN_CQ, IO_CQ][queue];
        let at = base + u64::from(self.heads[queue]) * 16;
        wait("a completion", || {
            let last: u64 = self.memory.read(at + 8).unwrap();
            ((last >> 48) & 1 != 0) == self.phases[queue]
        });
        let [first, last]: [u64; 2] = self.memory.read(at).unwrap();
        self.heads[queue] += 1;
        if self.heads[queue] == 8 {
            self.heads[queue] = 0;
            self.phases[queue] = !self.phases[queue];
        }
        self.write(DOORBELLS + 8 * queue as u64 + 4, self.heads[queue]);
        ((last >> 48) as u16 & !1, first as u32)
    }
    fn command(&mut self, queue: usize, e: [u32; 16]) -> (u16, u32) {
        self.submit(queue, e);
        self.complete(queue)
    }
}

#[test]
fn it_says_what_it_is() {
    let mut r = rig(",ser=LAB-1");
    assert_eq!(r.f.config_read(8, 4) >> 8, 0x01_0802);
    assert_eq!(r.read(VS), 0x0001_0400);
    assert_eq!(r.read(CAP) & 0xffff, 2047);
    r.enable();
    let identify = |r: &mut Rig, cns, nsid| r.command(0, entry(6, 9, nsid, [DATA, 0], [cns, 0, 0]));
    assert_eq!(identify(&mut r, 1, 0), (0, 0));
    let page = r.bytes(DATA, 4096);
    assert_eq!(&page[4..24], b"LAB-1               ");
    assert_eq!(&page[24..34], b"bhyve-NVMe");
    assert_eq!(page[512..514], [0x66, 0x44]);
    assert_eq!(identify(&mut r, 0, 1), (0, 0));
    let page = r.bytes(DATA, 4096);
    assert_eq!(page[..8], (DISK as u64 / 512).to_le_bytes());
    assert_eq!(page[130], 9);
    assert_eq!(identify(&mut r, 2, 0), (0, 0));
    assert_eq!(r.bytes(DATA, 8), [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(identify(&mut r, 0, 2).0, Status::NAMESPACE.field());
    assert_eq!(identify(&mut r, 0x55, 0).0, Status::FIELD.field());
    // Eight pairs of queues, whatever was asked.
    let features = entry(9, 3, 0, [0; 2], [7, 0x00ff_00ff, 0]);
    assert_eq!(r.command(0, features), (0, 7 << 16 | 7));
    let log = entry(2, 3, 0, [DATA, 0], [2 | 127 << 16, 0, 0]);
    assert_eq!(r.command(0, log), (0, 0));
    assert_eq!(r.bytes(DATA + 1, 2), 308_u16.to_le_bytes());
}

#[test]
fn blocks_are_read_and_written() {
    let mut r = rig("");
    r.enable();
    r.io_queues();
    let before = r.image.content();
    // Three pages by a list, from block 8 on.
    r.memory.write(LIST, &(DATA + 0x4000)).unwrap();
    r.memory.write(LIST + 8, &(DATA + 0x2000)).unwrap();
    let read = entry(2, 5, 1, [DATA, LIST], [8, 0, 23]);
    assert_eq!(r.command(1, read).0, 0);
    assert_eq!(r.bytes(DATA, 4096), before[4096..8192]);
    assert_eq!(r.bytes(DATA + 0x4000, 4096), before[8192..12288]);
    assert_eq!(r.bytes(DATA + 0x2000, 4096), before[12288..16384]);
    // 1 KiB from the middle of a page, for good.
    r.memory.fill(DATA + 512, 1024, 0x5a).unwrap();
    let write = entry(1, 6, 1, [DATA + 512, 0], [2, 0, 1 | 1 << 30]);
    assert_eq!(r.command(1, write).0, 0);
    let after = r.image.content();
    assert_eq!(after[1024..2048], [0x5a; 1024]);
    assert_eq!(after[..1024], before[..1024]);
    assert_eq!(after[2048..], before[2048..]);
    let zeroes = entry(8, 7, 1, [0; 2], [2, 0, 0]);
    assert_eq!(r.command(1, zeroes).0, 0);
    assert_eq!(r.command(1, entry(0, 8, 1, [0; 2], [0; 3])).0, 0);
    let after = r.image.content();
    assert_eq!(after[1024..1536], [0; 512]);
    assert_eq!(after[1536..2048], [0x5a; 512]);
    // Around the ring's end several times over.
    for _ in 0..20 {
        assert_eq!(r.command(1, entry(2, 9, 1, [DATA, 0], [0, 0, 0])).0, 0);
    }
}

#[test]
fn what_cannot_be_done_completes_with_the_reason() {
    let mut r = rig("");
    r.enable();
    r.io_queues();
    let end = DISK as u32 / 512;
    for (e, want) in [
        (entry(2, 1, 1, [DATA, 0], [end, 0, 0]), Status::LBA),
        (
            entry(2, 1, 1, [DATA, 0], [u32::MAX, u32::MAX, 0]),
            Status::LBA,
        ),
        (entry(2, 1, 1, [8 << 20, 0], [0, 0, 0]), Status::TRANSFER),
        (entry(2, 1, 1, [DATA + 1, 0], [0, 0, 0]), Status::PRP_OFFSET),
        (entry(2, 1, 3, [DATA, 0], [0, 0, 0]), Status::NAMESPACE),
        (entry(0x77, 1, 1, [DATA, 0], [0, 0, 0]), Status::OPCODE),
    ] {
        assert_eq!(r.command(1, e).0, want.field());
    }
    for (e, want) in [
        (entry(0x55, 1, 0, [0; 2], [0; 3]), Status::OPCODE),
        (entry(0, 1, 0, [0; 2], [5, 0, 0]), Status::QUEUE_ID),
        (entry(0, 1, 0, [0; 2], [0, 0, 0]), Status::QUEUE_ID),
        (entry(4, 1, 0, [0; 2], [1, 0, 0]), Status::QUEUE_DELETION),
        (
            entry(5, 1, 0, [IO_CQ, 0], [99 | 7 << 16, 1, 0]),
            Status::QUEUE_ID,
        ),
        (entry(5, 1, 0, [IO_CQ, 0], [2, 1, 0]), Status::QUEUE_SIZE),
        (
            entry(5, 1, 0, [IO_CQ, 0], [2 | 7 << 16, 3 | 50 << 16, 0]),
            Status::VECTOR,
        ),
        (
            entry(5, 1, 0, [64 << 20, 0], [2 | 7 << 16, 1, 0]),
            Status::TRANSFER,
        ),
        (
            entry(1, 1, 0, [IO_SQ, 0], [2 | 7 << 16, 1 | 3 << 16, 0]),
            Status::CQ_INVALID,
        ),
        (entry(2, 1, 0, [DATA, 0], [0x70, 0, 0]), Status::LOG_PAGE),
    ] {
        assert_eq!(r.command(0, e).0, want.field(), "{e:x?}");
    }
    // Four event requests wait, the fifth is too many.
    for _ in 0..4 {
        r.submit(0, entry(12, 1, 0, [0; 2], [0; 3]));
    }
    assert_eq!(
        r.command(0, entry(12, 1, 0, [0; 2], [0; 3])).0,
        Status::EVENT_LIMIT.field()
    );
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let mut r = rig(",ro");
    r.enable();
    r.io_queues();
    let before = r.image.content();
    for opcode in [1, 8, 9] {
        let e = entry(opcode, 1, 1, [DATA, 0], [0, 4, 0]);
        assert_eq!(r.command(1, e).0, Status::READ_ONLY.field());
    }
    assert_eq!(r.image.content(), before);
}

#[test]
fn the_line_is_up_until_the_completion_was_read() {
    let mut r = rig("");
    r.enable();
    r.fake.take();
    r.submit(0, entry(6, 9, 0, [DATA, 0], [1, 0, 0]));
    let is = |e: &Event, up: bool| match e {
        Event::Assert(_) | Event::IsaAssert(..) => up,
        Event::Deassert(_) | Event::IsaDeassert(..) => !up,
        _ => false,
    };
    wait("an interrupt", || r.fake.take().iter().any(|e| is(e, true)));
    // The head's doorbell lowers it.
    r.complete(0);
    assert!(r.fake.take().iter().any(|e| is(e, false)));
}

#[test]
fn hostile_registers_end_in_a_fatal_status_that_a_reset_ends() {
    let mut r = rig("");
    r.write(AQA, 7 | 7 << 16);
    r.write(ASQ, 0xffff_f000);
    r.write(ACQ, ADMIN_CQ as u32);
    r.write(CC, CC_EN);
    assert_eq!(r.read(CSTS), CSTS_CFS);
    r.write(CC, 0);
    assert_eq!(r.read(CSTS), 0);
    // Pages of 8 KiB.
    r.write(ASQ, ADMIN_SQ as u32);
    r.write(CC, CC_EN | 1 << 7);
    assert_eq!(r.read(CSTS), CSTS_CFS);
    r.write(CC, 0);
    r.enable();
    for offset in (0..BAR_SIZE + 64).step_by(2) {
        let at = r.bar + offset;
        for size in [1, 2, 8] {
            if let Some(d) = r.buses.mmio.get(at, size) {
                d.mmio_write(at, size, u64::MAX);
                d.mmio_read(at, size);
            }
        }
    }
    // Doorbells of queues that do not exist, and beyond their queue.
    for bell in 0..64 {
        r.write(DOORBELLS + 4 * bell, 0xffff);
    }
    r.write(CC, 0);
    (r.tails, r.heads, r.phases) = ([0; 2], [0; 2], [true; 2]);
    r.memory.fill(ADMIN_CQ, 4096, 0).unwrap();
    r.enable();
    assert_eq!(r.command(0, entry(6, 9, 0, [DATA, 0], [1, 0, 0])).0, 0);
    // Shutdown is told.
    r.write(CC, CC_EN | 1 << 14);
    wait("the shutdown's end", || {
        r.read(CSTS) & CSTS_SHST == CSTS_SHUT_DOWN
    });
}

/// What the host cannot do, the command says; what a flush has lost stays lost.
#[test]
fn the_hosts_errors_become_the_guests() {
    let ok = Status::OK.field();
    let read = entry(2, 1, 1, [DATA, 0], [0, 0, 0]);
    let write = entry(1, 2, 1, [DATA, 0], [0, 0, 0]);
    let durable = entry(1, 3, 1, [DATA, 0], [0, 0, 1 << 30]);
    let flush = entry(0, 4, 1, [0; 2], [0; 3]);
    let mut r = rig_with("", |disk| disk.replace_file(rig::full()));
    r.enable();
    r.io_queues();
    assert_eq!(r.command(1, read).0, ok);
    assert_eq!(r.command(1, write).0, Status::CAPACITY.field());
    assert_eq!(r.command(1, durable).0, Status::CAPACITY.field());
    let mut r = rig_with("", |disk| disk.replace_file(rig::broken()));
    r.enable();
    r.io_queues();
    assert_eq!(r.command(1, read).0, Status::READ_ERROR.field());
    assert_eq!(r.command(1, write).0, Status::WRITE_FAULT.field());
    assert_eq!(r.command(1, flush).0, Status::WRITE_FAULT.field());
    assert_eq!(r.image.content(), rig::pattern(DISK));
}

#[test]
fn queues_are_counted_for_those_who_look() {
    let at = rig::Rig::new(0x10, |path, memory| {
        let conf = path.display().to_string();
        crate::nvme::build(&conf, "nvme counted".into(), memory.clone()).unwrap()
    });
    let mut r = Rig {
        at,
        tails: [0; 2],
        heads: [0; 2],
        phases: [true; 2],
    };
    r.enable();
    r.io_queues();
    // Seven blocks read, one written; queue 0 has had two commands.
    r.command(1, entry(2, 1, 1, [DATA, 0], [0, 0, 6]));
    r.command(1, entry(1, 2, 1, [DATA, 0], [9, 0, 0]));
    let rings = crate::status::rings();
    let mine = rings.iter().filter(|r| r.device == "nvme counted");
    let mine: Vec<_> = mine.map(|r| (r.queue, r.requests, r.bytes)).collect();
    assert_eq!(mine, [(0, 2, 0), (1, 2, 8 * 512)]);
}
