use super::*;
use crate::disk::backend::Backend;
use crate::disk::rig::{self, DISK, wait};
use crate::machine::fake::Event;

const LIST: u64 = 0x1000;
const FIS: u64 = 0x2000;
const TABLE: u64 = 0x3000;
const DATA: u64 = 0x1_0000;
/// Port registers.
const P_CLB: u64 = 0x100;
const P_FB: u64 = 0x108;
const P_IS: u64 = 0x110;
const P_IE: u64 = 0x114;
const P_CMD: u64 = 0x118;
const P_TFD: u64 = 0x120;
const P_SIG: u64 = 0x124;
const P_SSTS: u64 = 0x128;
const P_SCTL: u64 = 0x12c;
const P_SACT: u64 = 0x134;
const P_CI: u64 = 0x138;

struct Rig(rig::Rig);

impl std::ops::Deref for Rig {
    type Target = rig::Rig;
    fn deref(&self) -> &rig::Rig {
        &self.0
    }
}

fn rig(prefix: &str, options: &str) -> Rig {
    rig_with(prefix, options, |_| ())
}

/// With its disk changed before it runs.
fn rig_with(prefix: &str, options: &str, change: impl FnOnce(&mut Backend)) -> Rig {
    let r = rig::Rig::new(0x24, |path, memory| {
        let conf = format!("{prefix}{}{options}", path.display());
        let drives = crate::ahci::options::parse(&conf, None).unwrap();
        let mut media = Media::open(&drives[0], 0).unwrap();
        change(media.backend());
        Ahci::plan("ahci", vec![media], memory).unwrap()
    });
    assert_eq!(r.f.config_read(8, 4) >> 8, 0x01_0601);
    r.write(P_CLB, LIST as u32);
    r.write(P_FB, FIS as u32);
    r.write(P_CMD, 1 << 4 | 1 << 1);
    r.write(P_CMD, 1 << 4 | 1 << 1 | 1);
    r.write(P_IS, u32::MAX);
    r.write(P_IE, u32::MAX);
    r.write(IS, u32::MAX);
    r.write(GHC, GHC_IE);
    Rig(r)
}

impl Rig {
    /// Fills slot 2: command, LBA, count, features, ATAPI command, buffers.
    fn slot(&self, c: [u8; 2], lba: u64, n: [u16; 2], cdb: &[u8], list: &[(u64, u32)]) {
        let flags = 5 | u32::from(!cdb.is_empty()) << 5 | (list.len() as u32) << 16;
        let header = [flags, 0, TABLE as u32, 0];
        self.memory.write(LIST + 64, &header).unwrap();
        let l = lba.to_le_bytes();
        let (count, features) = (n[0].to_le_bytes(), n[1].to_le_bytes());
        let fis = [
            0x27,
            0x80,
            c[0],
            features[0],
            l[0],
            l[1],
            l[2],
            c[1],
            l[3],
            l[4],
            l[5],
            features[1],
            count[0],
            count[1],
            0,
            0,
        ];
        self.memory.write(TABLE, &fis).unwrap();
        self.memory.write_bytes(TABLE + 0x40, cdb).unwrap();
        for (i, (addr, len)) in list.iter().enumerate() {
            let entry = u128::from(*addr) | u128::from(len - 1) << 96;
            let at = TABLE + 0x80 + 16 * i as u64;
            self.memory.write(at, &entry.to_le_bytes()).unwrap();
        }
    }
    /// Issues slot 2 and waits for an interrupt; the task file.
    fn go(&self) -> u32 {
        self.write(P_IS, u32::MAX);
        self.write(P_CI, 4);
        wait("the command's end", || self.read(P_IS) != 0);
        self.read(P_TFD)
    }
    fn dma(&self, command: u8, lba: u64, count: u16, list: &[(u64, u32)]) -> u32 {
        self.slot([command, 0x40], lba, [count, 0], &[], list);
        self.go()
    }
    /// As a driver after an error.
    fn restart(&self) {
        self.write(P_CMD, 1 << 4 | 1 << 1);
        self.write(P_CMD, 1 << 4 | 1 << 1 | 1);
    }
}

#[test]
fn a_disk_says_what_it_is() {
    let r = rig("hd:", ",ser=LAB-2");
    assert_eq!(r.read(PI), 1);
    assert_eq!(r.read(CAP) & 0x1f, 0);
    assert_eq!((r.read(P_SIG), r.read(P_SSTS)), (0x101, 0x133));
    // The FIS of its signature came when reception was turned on.
    assert_eq!(r.bytes(FIS + 0x40, 1), [0x34]);
    assert_eq!(r.dma(0xec, 0, 0, &[(DATA, 512)]), 0x50);
    let page = r.bytes(DATA, 512);
    assert_eq!(&page[20..26], b"AL-B 2");
    assert_eq!(page[200..208], (DISK as u64 / 512).to_le_bytes());
    // A PIO set-up came before the registers.
    assert_eq!(r.bytes(FIS + 0x20, 1), [0x5f]);
    assert_eq!(r.memory.read::<u32>(LIST + 68).unwrap(), 512);
}

#[test]
fn blocks_are_read_and_written() {
    let r = rig("hd:", "");
    let before = r.image.content();
    let list = [(DATA, 1024), (DATA + 0x2000, 3072)];
    assert_eq!(r.dma(0x25, 16, 8, &list), 0x50);
    assert_eq!(r.bytes(DATA, 1024), before[8192..9216]);
    assert_eq!(r.bytes(DATA + 0x2000, 3072), before[9216..12288]);
    assert_eq!(r.read(P_CI), 0);
    // Queued, with tag 2.
    r.memory.fill(DATA, 512, 0x77).unwrap();
    r.slot([0x61, 0x40], 4, [2 << 3, 1], &[], &[(DATA, 512)]);
    r.write(P_SACT, 4);
    assert_eq!(r.go() & 1, 0);
    assert_eq!((r.read(P_CI), r.read(P_SACT)), (0, 0));
    assert_eq!(r.bytes(FIS + 0x58, 8), [0xa1, 0x40, 0x50, 0, 4, 0, 0, 0]);
    assert_eq!(r.dma(0xea, 0, 0, &[]), 0x50);
    let after = r.image.content();
    assert_eq!(after[2048..2560], [0x77; 512]);
    assert_eq!(after[..2048], before[..2048]);
    assert_eq!(after[2560..], before[2560..]);
}

#[test]
fn an_error_stops_the_port_until_it_is_started_again() {
    let r = rig("hd:", "");
    let end = DISK as u64 / 512;
    assert_eq!(r.dma(0x25, end, 1, &[(DATA, 512)]), 0x1051);
    assert_ne!(r.read(P_IS) & 1 << 30, 0);
    assert_eq!(r.read(P_CI), 4);
    assert_eq!(r.read(P_CMD) >> 8 & 0x1f, 2, "the slot that failed");
    r.restart();
    assert_eq!(r.read(P_CI), 0);
    // A queued command's error is in the log.
    r.slot([0x60, 0x40], end, [2 << 3, 1], &[], &[(DATA, 512)]);
    r.write(P_SACT, 4);
    assert_eq!(r.go() & 1, 1);
    assert_eq!(r.read(P_SACT), 4, "not done");
    r.restart();
    assert_eq!(r.dma(0x2f, 0x10, 1, &[(DATA, 512)]), 0x50);
    let log = r.bytes(DATA, 512);
    assert_eq!((log[0], log[3]), (2, 0x10));
    assert_eq!(log.iter().fold(0_u8, |a, b| a.wrapping_add(*b)), 0);
    // Unknown commands.
    assert_eq!(r.dma(0xfe, 0, 0, &[]) & 0xff01, 0x0401);
    r.restart();
    // A buffer that is no memory is the bus's fault.
    r.dma(0x25, 0, 1, &[(64 << 20, 512)]);
    assert_ne!(r.read(P_IS) & 1 << 29, 0);
    r.restart();
    assert_eq!(r.dma(0x25, 0, 1, &[(DATA, 512)]), 0x50);
}

#[test]
fn a_cd_is_read_by_packets() {
    let r = rig("cd:", "");
    assert_eq!(r.read(P_SIG), 0xeb14_0101);
    let packet = |cdb: &[u8], len: u32| {
        let mut c = [0; 16];
        c[..cdb.len()].copy_from_slice(cdb);
        r.slot([0xa0, 0], 0, [0, 1], &c, &[(DATA, len)]);
        r.go()
    };
    // It was reset, which it says once.
    assert_eq!(packet(&[0], 2) & 0xf001, 0x6001);
    r.restart();
    assert_eq!(packet(&[0], 2) & 1, 0);
    assert_eq!(packet(&[0x12, 0, 0, 0, 36], 36) & 1, 0);
    assert_eq!(&r.bytes(DATA + 8, 8), b"BHYVE   ");
    assert_eq!(packet(&[0x25], 8) & 1, 0);
    let last = (DISK as u32 / 2048 - 1).to_be_bytes();
    assert_eq!(r.bytes(DATA, 4), last);
    assert_eq!(packet(&[0x28, 0, 0, 0, 0, 3, 0, 0, 2], 4096) & 1, 0);
    let image = r.image.content();
    assert_eq!(r.bytes(DATA, 4096), image[3 * 2048..5 * 2048]);
    // Beyond its end: illegal request, and the sense says which.
    assert_eq!(
        packet(&[0x28, 0, 0, 1, 0, 0, 0, 0, 2], 4096) & 0xf001,
        0x5001
    );
    r.restart();
    assert_eq!(packet(&[3, 0, 0, 0, 18], 18) & 1, 0);
    let sense = r.bytes(DATA, 18);
    assert_eq!((sense[2], sense[12]), (5, 0x21));
    // Nothing writes to it.
    assert_eq!(r.dma(0x35, 0, 1, &[(DATA, 512)]) & 1, 1);
}

#[test]
fn an_interrupt_is_told_once_and_its_line_falls() {
    let r = rig("hd:", "");
    r.fake.take();
    r.dma(0x25, 0, 1, &[(DATA, 512)]);
    wait("an interrupt", || {
        let events = r.fake.take();
        events
            .iter()
            .any(|e| matches!(e, Event::Assert(_) | Event::IsaAssert(..)))
    });
    assert_eq!(r.read(IS), 1);
    r.write(P_IS, u32::MAX);
    r.write(IS, 1);
    assert_eq!(r.read(IS), 0);
    let events = r.fake.take();
    assert!(
        events
            .iter()
            .any(|e| matches!(e, Event::Deassert(_) | Event::IsaDeassert(..)))
    );
}

#[test]
fn hostile_registers_and_resets() {
    let r = rig("hd:", ",ro");
    for offset in (0..BAR_SIZE + 64).step_by(4) {
        for value in [u32::MAX, 0, 1] {
            let at = r.bar + offset;
            for size in [1, 2, 4, 8] {
                if let Some(d) = r.buses.mmio.get(at, size) {
                    d.mmio_write(at, size, value.into());
                    d.mmio_read(at, size);
                }
            }
        }
    }
    r.write(GHC, 1);
    assert_eq!(r.read(GHC), 1 << 31);
    r.write(P_CLB, LIST as u32);
    r.write(P_CLB + 4, 0);
    r.write(P_FB, FIS as u32);
    r.write(P_FB + 4, 0);
    r.restart();
    // COMRESET.
    r.write(P_SCTL, 0x301);
    assert_eq!((r.read(P_SSTS), r.read(P_TFD)), (0, 0x7f));
    r.write(P_SCTL, 0x300);
    assert_eq!((r.read(P_SSTS), r.read(P_TFD)), (0x133, 0x150));
    r.write(P_IE, u32::MAX);
    assert_eq!(r.dma(0xec, 0, 0, &[(DATA, 512)]), 0x50);
    assert_eq!(r.dma(0x35, 0, 1, &[(DATA, 512)]) & 1, 1, "read-only");
}

/// What the host cannot do, the task file says.
#[test]
fn the_hosts_errors_become_the_guests() {
    let one = [(DATA, 512)];
    let r = rig_with("hd:", "", |disk| disk.replace_file(rig::full()));
    assert_eq!(r.dma(0x25, 0, 1, &one), 0x50, "reads go on");
    for command in [0x35, 0x3d] {
        assert_eq!(r.dma(command, 0, 1, &one), 0x0451, "{command:#x}: aborted");
        r.restart();
    }
    let r = rig_with("hd:", "", |disk| disk.replace_file(rig::broken()));
    assert_eq!(r.dma(0x25, 0, 1, &one), 0x4051, "uncorrectable");
    r.restart();
    assert_eq!(r.dma(0x35, 0, 1, &one), 0x0451);
    r.restart();
    assert_eq!(r.dma(0xea, 0, 0, &[]), 0x0451, "the cache was not flushed");
    r.restart();
    // Queued.
    r.slot([0x61, 0x40], 0, [2 << 3, 1], &[], &one);
    r.write(P_SACT, 4);
    assert_eq!(r.go() & 1, 1);
    assert_eq!(r.read(P_SACT), 4, "not done");
    let r = rig_with("cd:", "", |disk| disk.replace_file(rig::broken()));
    let read = [0x28, 0, 0, 0, 0, 3, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0];
    r.slot([0xa0, 0], 0, [0, 1], &read, &[(DATA, 4096)]);
    // The first command hears of the reset.
    r.go();
    r.restart();
    r.slot([0xa0, 0], 0, [0, 1], &read, &[(DATA, 4096)]);
    assert_eq!(r.go() & 0xf001, 0x3001, "a medium error");
}

#[test]
fn a_port_is_counted_for_those_who_look() {
    let r = rig::Rig::new(0x24, |path, memory| {
        let conf = format!("cd:{0},hd:{0}", path.display());
        crate::ahci::build(&conf, None, "ahci counted", memory).unwrap()
    });
    let r = Rig(r);
    let second = PORT_SIZE;
    r.write(P_CLB + second, LIST as u32);
    r.write(P_FB + second, FIS as u32);
    r.write(P_CMD + second, 1 << 4 | 1 << 1 | 1);
    r.write(P_IS + second, u32::MAX);
    r.slot([0x25, 0x40], 0, [3, 0], &[], &[(DATA, 1536)]);
    r.write(P_CI + second, 4);
    wait("the command's end", || r.read(P_IS + second) != 0);
    let rings = crate::status::rings();
    let mine = rings.iter().filter(|r| r.device == "ahci counted");
    let mine: Vec<_> = mine.map(|r| (r.queue, r.requests, r.bytes)).collect();
    assert_eq!(mine, [(1, 1, 1536)]);
}
