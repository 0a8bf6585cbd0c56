//! A port: its registers, its command slots, the FISes that answer them, and
//! the thread that does the commands.
//!
//! The thread holds the drive's lock while it does a command and tells of its
//! end; who wants the port to stand still takes that lock after raising the
//! epoch, and what was being done then ends unheard.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::Thread;

use vmmapi::GuestMemory;

use super::atapi::CDB;
use super::media::{ERR, Ending, Media, READY};
use super::options::Kind;
use super::request::{ACMD, CFIS, Fis, HEADER, Header, MOST_BUFFERS, PRDT, Way, buffer};
use crate::lock;
use crate::status::RingCounter;
use crate::virtio::queue::Buffer;

/// Register offsets within a port (AHCI 1.3.1 §3.3).
mod register {
    pub const CLB: u64 = 0x00;
    pub const CLBU: u64 = 0x04;
    pub const FB: u64 = 0x08;
    pub const FBU: u64 = 0x0c;
    pub const IS: u64 = 0x10;
    pub const IE: u64 = 0x14;
    pub const CMD: u64 = 0x18;
    pub const TFD: u64 = 0x20;
    pub const SIG: u64 = 0x24;
    pub const SSTS: u64 = 0x28;
    pub const SCTL: u64 = 0x2c;
    pub const SERR: u64 = 0x30;
    pub const SACT: u64 = 0x34;
    pub const CI: u64 = 0x38;
}

/// Interrupt status: a register FIS, a PIO set-up, a set-device-bits FIS came;
/// the connection changed; a host bus error; a task file error.
const IS_DHR: u32 = 1 << 0;
const IS_PS: u32 = 1 << 1;
const IS_SDB: u32 = 1 << 3;
const IS_PC: u32 = 1 << 6;
const IS_HBF: u32 = 1 << 29;
const IS_TFE: u32 = 1 << 30;

/// Command and status.
const CMD_ST: u32 = 1;
const CMD_CLO: u32 = 1 << 3;
const CMD_FRE: u32 = 1 << 4;
const CMD_CCS: u32 = 0x1f << 8;
const CMD_FR: u32 = 1 << 14;
const CMD_CR: u32 = 1 << 15;
const CMD_ATAPI: u32 = 1 << 24;
const CMD_ICC: u32 = 0xf << 28;
/// ST, spin-up, power, FRE, and the like that are kept as written.
const CMD_KEPT: u32 = 0x0e00_0017;

/// A device is there and talks at 6 Gbit/s.
const PRESENT: u32 = 0x133;
/// Signatures (§5.2.1).
const SIG_ATA: u32 = 0x0000_0101;
const SIG_ATAPI: u32 = 0xeb14_0101;
/// SERR.DIAG.X: the presence changed.
const SERR_X: u32 = 1 << 26;
/// Where FISes are received.
const RFIS_PIO: u64 = 0x20;
const RFIS_D2H: u64 = 0x40;
const RFIS_SDB: u64 = 0x58;

#[derive(Default)]
struct Registers {
    clb: u64,
    fb: u64,
    is: u32,
    ie: u32,
    cmd: u32,
    tfd: u32,
    sctl: u32,
    serr: u32,
    sact: u32,
    ci: u32,
    /// An error stopped it until ST is cleared.
    halted: bool,
    /// Device control's SRST was set.
    srst: bool,
}

struct Drive {
    media: Media,
    buffers: Vec<Buffer>,
}

/// A port.
pub struct Port {
    registers: Mutex<Registers>,
    drive: Mutex<Drive>,
    kind: Kind,
    memory: GuestMemory,
    /// Grows with everything that stops the port.
    epoch: AtomicU32,
    counter: Arc<RingCounter>,
    thread: OnceLock<Thread>,
}

impl Port {
    /// A port with that drive.
    pub fn new(media: Media, memory: GuestMemory) -> Arc<Port> {
        let kind = media.kind();
        let port = Port {
            registers: Mutex::default(),
            drive: Mutex::new(Drive {
                media,
                buffers: Vec::new(),
            }),
            kind,
            memory,
            epoch: AtomicU32::new(0),
            counter: Arc::default(),
            thread: OnceLock::new(),
        };
        port.reset();
        Arc::new(port)
    }

    /// Commands done and bytes moved by them.
    pub fn counter(&self) -> Arc<RingCounter> {
        Arc::clone(&self.counter)
    }

    /// Makes its thread known.
    pub fn set_thread(&self, thread: Thread) {
        let _ = self.thread.set(thread);
    }

    /// Has the thread look.
    pub fn wake(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// Waits until no command is being done; none that was will be told of.
    fn still(&self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
        drop(lock(&self.drive));
    }

    /// As the adapter's reset leaves it.
    pub fn reset(&self) {
        self.still();
        lock(&self.drive).media.reset();
        let mut r = lock(&self.registers);
        *r = Registers {
            clb: r.clb,
            fb: r.fb,
            ..Registers::default()
        };
        self.connect(&mut r);
    }

    /// The device says that it is there (§10.1).
    fn connect(&self, r: &mut Registers) {
        r.tfd = 0x0100 | u32::from(READY);
        if self.kind == Kind::Cd {
            r.tfd = 0x0100;
            r.cmd |= CMD_ATAPI;
        }
        r.serr |= SERR_X;
        r.is |= IS_PC;
    }

    fn signature(&self) -> u32 {
        match self.kind {
            Kind::Hd => SIG_ATA,
            Kind::Cd => SIG_ATAPI,
        }
    }

    /// Interrupts that are due and wanted.
    pub fn interrupts(&self) -> bool {
        let r = lock(&self.registers);
        r.is & r.ie != 0
    }

    /// Reads a register.
    pub fn read(&self, offset: u64) -> u32 {
        let r = lock(&self.registers);
        match offset {
            register::CLB => r.clb as u32,
            register::CLBU => (r.clb >> 32) as u32,
            register::FB => r.fb as u32,
            register::FBU => (r.fb >> 32) as u32,
            register::IS => r.is,
            register::IE => r.ie,
            register::CMD => r.cmd,
            register::TFD => r.tfd,
            register::SIG => self.signature(),
            register::SSTS if r.sctl & 0xf == 0 => PRESENT,
            register::SCTL => r.sctl,
            register::SERR => r.serr,
            register::SACT => r.sact,
            register::CI => r.ci,
            _ => 0,
        }
    }

    /// Writes a register.
    pub fn write(&self, offset: u64, value: u32) {
        let low = |old: u64, mask: u64| old & !0xffff_ffff | u64::from(value) & mask;
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        let mut r = lock(&self.registers);
        match offset {
            register::CLB => r.clb = low(r.clb, !0x3ff),
            register::CLBU => r.clb = high(r.clb),
            register::FB => r.fb = low(r.fb, !0xff),
            register::FBU => r.fb = high(r.fb),
            register::IS => r.is &= !value,
            register::IE => r.ie = value,
            register::CMD => {
                drop(r);
                self.write_cmd(value);
            }
            register::SCTL => {
                let (was, now) = (r.sctl & 0xf, value & 0xf);
                r.sctl = value & 0xfff;
                drop(r);
                self.write_sctl(was, now);
            }
            register::SERR => r.serr &= !value,
            // Only a port that runs takes commands (§3.3.14).
            register::SACT if r.cmd & CMD_ST != 0 => r.sact |= value,
            register::CI if r.cmd & CMD_ST != 0 => {
                r.ci |= value;
                drop(r);
                self.wake();
            }
            _ => {}
        }
    }

    fn write_cmd(&self, value: u32) {
        let mut r = lock(&self.registers);
        let was = r.cmd;
        r.cmd = was & (CMD_CCS | CMD_CR | CMD_FR | CMD_ATAPI) | value & CMD_KEPT;
        if value & CMD_CLO != 0 {
            // The device's BSY and DRQ are overridden.
            r.tfd &= !0x88;
        }
        if value & CMD_FRE != 0 {
            r.cmd |= CMD_FR;
            if was & CMD_FRE == 0 {
                self.post_signature(&r);
            }
        } else {
            r.cmd &= !CMD_FR;
        }
        // Interface changes take effect at once.
        r.cmd &= !CMD_ICC;
        if value & CMD_ST != 0 {
            r.cmd |= CMD_CR;
            drop(r);
            self.wake();
            return;
        }
        if was & CMD_ST != 0 {
            drop(r);
            self.still();
            r = lock(&self.registers);
            (r.ci, r.sact, r.halted) = (0, 0, false);
        }
        r.cmd &= !(CMD_CR | CMD_CCS);
    }

    /// COMRESET is DET 1, then 0 (§10.4.2).
    fn write_sctl(&self, was: u32, now: u32) {
        if was == now {
            return;
        }
        self.still();
        if now == 1 {
            lock(&self.drive).media.reset();
            let mut r = lock(&self.registers);
            (r.ci, r.sact, r.tfd, r.halted) = (0, 0, 0x7f, false);
        } else if now == 0 {
            let mut r = lock(&self.registers);
            self.connect(&mut r);
            self.post_signature(&r);
        }
    }

    /// The FIS that a device sends after a reset.
    fn post_signature(&self, r: &Registers) {
        let lba = match self.kind {
            Kind::Hd => 1,
            Kind::Cd => 0xeb_1401,
        };
        let ending = Ending {
            status: r.tfd as u8,
            error: 1,
            lba: Some(lba),
            count: 1,
            moved: 0,
            way: Way::Dma,
        };
        self.post_d2h(r, &ending, 0);
    }

    fn post(&self, r: &Registers, at: u64, fis: &[u8]) {
        // Where the guest has no memory for it, it has no FIS.
        if r.cmd & CMD_FRE != 0 {
            let _ = self.memory.write_bytes(r.fb + at, fis);
        }
    }

    fn post_d2h(&self, r: &Registers, e: &Ending, device: u8) {
        let [l0, l1, l2, l3, l4, l5, ..] = e.lba.unwrap_or(0).to_le_bytes();
        let [c0, c1] = e.count.to_le_bytes();
        let mut fis = [0; 20];
        let head = [
            0x34,
            1 << 6,
            e.status,
            e.error,
            l0,
            l1,
            l2,
            device,
            l3,
            l4,
            l5,
            0,
            c0,
            c1,
        ];
        for (to, from) in fis.iter_mut().zip(head) {
            *to = from;
        }
        self.post(r, RFIS_D2H, &fis);
    }

    /// Does a command, if there is one; says whether it did, so that somebody
    /// tells the guest.
    pub fn turn(&self) -> bool {
        let mut guard = lock(&self.drive);
        let epoch = self.epoch.load(Ordering::Acquire);
        let (slot, clb) = {
            let mut r = lock(&self.registers);
            if r.cmd & CMD_ST == 0 || r.halted || r.ci == 0 {
                return false;
            }
            // After the last one, in turn (§5.3.12).
            let last = r.cmd >> 8 & 0x1f;
            let after = r.ci & !(u32::MAX >> (31 - last));
            let slot = if after != 0 {
                after.trailing_zeros()
            } else {
                r.ci.trailing_zeros()
            };
            r.cmd = r.cmd & !CMD_CCS | slot << 8;
            (slot, r.clb)
        };
        let done = self.slot(&mut guard, clb + u64::from(slot) * HEADER as u64);
        let mut r = lock(&self.registers);
        if self.epoch.load(Ordering::Acquire) != epoch {
            return false;
        }
        match done {
            Some((fis, ending)) => {
                self.counter.count(ending.moved.into());
                self.end(&mut r, slot, clb, &fis, &ending);
            }
            None => {
                // Memory that is not there, or no command.
                r.is |= IS_HBF;
                r.halted = true;
            }
        }
        true
    }

    /// Reads a slot and does what is in it.
    fn slot(&self, drive: &mut Drive, at: u64) -> Option<(Fis, Ending)> {
        let mut bytes = [0; HEADER];
        self.memory.read_bytes(at, &mut bytes).ok()?;
        let header = Header::parse(&bytes);
        let mut cfis = [0; CFIS];
        self.memory.read_bytes(header.table, &mut cfis).ok()?;
        let fis = Fis::parse(&cfis)?;
        if !fis.is_command {
            return Some((fis, self.control(&fis)));
        }
        let mut cdb = [0; CDB];
        if header.atapi {
            let at = header.table.checked_add(ACMD)?;
            self.memory.read_bytes(at, &mut cdb).ok()?;
        }
        drive.buffers.clear();
        for i in 0..u64::from(header.buffers.min(MOST_BUFFERS)) {
            let mut entry = [0; 16];
            let at = header.table.checked_add(PRDT + 16 * i)?;
            self.memory.read_bytes(at, &mut entry).ok()?;
            let b = buffer(entry);
            // What is not memory is the bus's error, not the disk's.
            if !self.memory.contains(b.addr, b.len.into()) {
                return None;
            }
            drive.buffers.push(b);
        }
        let cdb = header.atapi.then_some(&cdb);
        let ending = drive
            .media
            .command(&fis, cdb, &mut drive.buffers, &self.memory);
        Some((fis, ending))
    }

    /// Device control: SRST set, then cleared, is a soft reset (§10.4.1).
    fn control(&self, fis: &Fis) -> Ending {
        let mut r = lock(&self.registers);
        let (was, now) = (r.srst, fis.control & 4 != 0);
        r.srst = now;
        let reset = was && !now;
        let (status, lba) = match self.kind {
            Kind::Hd => (READY, 1),
            Kind::Cd => (0, 0xeb_1401),
        };
        Ending {
            status,
            error: u8::from(reset),
            lba: reset.then_some(lba),
            count: u16::from(reset),
            moved: 0,
            way: Way::Dma,
        }
    }

    fn end(&self, r: &mut Registers, slot: u32, clb: u64, fis: &Fis, e: &Ending) {
        let failed = e.status & ERR != 0;
        r.tfd = u32::from(e.status) | u32::from(e.error) << 8;
        // Bytes moved, for all but queued commands (§4.2.2).
        let count = clb + u64::from(slot) * HEADER as u64 + 4;
        let _ = self.memory.write(count, &e.moved);
        if let Way::Queued(tag) = e.way {
            // Set Device Bits: which commands are done (SATA 3.0 §10.3.6).
            let bits = if failed { 0 } else { 1_u32 << tag };
            let mut sdb = [0xa1, 1 << 6, e.status & 0x77, e.error, 0, 0, 0, 0];
            for (to, from) in sdb.iter_mut().skip(4).zip(bits.to_le_bytes()) {
                *to = from;
            }
            r.is |= IS_SDB;
            self.post(r, RFIS_SDB, &sdb);
            r.sact &= !bits;
            // The device has taken it, whatever became of it.
            r.ci &= !(1 << slot);
        } else {
            if e.way == Way::Pio && !failed {
                let mut pio = [0; 20];
                [pio[0], pio[1], pio[2], pio[15]] = [0x5f, 1 << 6 | 1 << 5, e.status | 8, e.status];
                [pio[16], pio[17]] = (e.moved as u16).to_le_bytes();
                self.post(r, RFIS_PIO, &pio);
                r.is |= IS_PS;
            }
            r.is |= IS_DHR;
            self.post_d2h(r, e, fis.device);
            if !failed {
                r.ci &= !(1 << slot);
            }
        }
        if failed {
            r.is |= IS_TFE;
            r.halted = true;
        }
    }
}
