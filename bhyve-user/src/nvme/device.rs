//! The registers (NVMe 1.4 §3.1), the doorbells, and the thread that does the
//! commands, so that no vCPU waits for the host's disk.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::thread::{self, Thread};

use super::controller::{Controller, Doorbells, Turn};
use super::identify;
use crate::lock;
use crate::pci::PciDevice;
use crate::pci::bar::BarKind;
use crate::pci::catalog::Plan;
use crate::pci::config::{PROG_IF, SUBSYSTEM, SUBSYSTEM_VENDOR};
use crate::pci::function::{Blueprint, PciFunction};
use crate::status::show_rings;

const BAR: usize = 0;
const BAR_MSIX: usize = 4;
const BAR_SIZE: u64 = 0x4000;
/// Doorbells: four bytes each, a submission queue's and a completion queue's
/// in turn.
const DOORBELLS: u64 = 0x1000;

/// Register offsets.
const CAP: u64 = 0x00;
const CAP_HIGH: u64 = 0x04;
const VS: u64 = 0x08;
const INTMS: u64 = 0x0c;
const INTMC: u64 = 0x10;
const CC: u64 = 0x14;
const CSTS: u64 = 0x1c;
const AQA: u64 = 0x24;
const ASQ: u64 = 0x28;
const ACQ: u64 = 0x30;

const CC_EN: u32 = 1;
/// Command set, page size, arbitration: all must be 0.
const CC_CHOICES: u32 = 0x3ff0;
const CC_SHN: u32 = 3 << 14;
const CC_KEPT: u32 = 0x00ff_fff1;
const CSTS_RDY: u32 = 1;
const CSTS_CFS: u32 = 2;
const CSTS_SHST: u32 = 3 << 2;
const CSTS_SHUT_DOWN: u32 = 2 << 2;

#[derive(Default)]
struct Registers {
    cc: u32,
    csts: u32,
    aqa: u32,
    asq: u64,
    acq: u64,
    /// Interrupt mask of the line and of MSI.
    mask: u32,
}

/// The last values of the doorbells.
struct Bells {
    sq: Vec<AtomicU32>,
    cq: Vec<AtomicU32>,
}

impl Bells {
    fn read(list: &[AtomicU32], queue: u16) -> u32 {
        list.get(usize::from(queue))
            .map_or(0, |v| v.load(Ordering::Acquire))
    }
    fn write(list: &[AtomicU32], queue: u16, value: u32) {
        if let Some(v) = list.get(usize::from(queue)) {
            v.store(value, Ordering::Release);
        }
    }
}

impl Doorbells for Bells {
    fn sq_tail(&self, queue: u16) -> u32 {
        Bells::read(&self.sq, queue)
    }
    fn cq_head(&self, queue: u16) -> u32 {
        Bells::read(&self.cq, queue)
    }
    fn fresh_sq(&self, queue: u16) {
        Bells::write(&self.sq, queue, 0);
    }
    fn fresh_cq(&self, queue: u16) {
        Bells::write(&self.cq, queue, 0);
    }
}

struct Shared {
    controller: Mutex<Controller>,
    registers: Mutex<Registers>,
    bells: Bells,
    queues: u16,
    entries: u16,
    /// The guest wants it flushed and stopped.
    shutdown: AtomicBool,
    thread: OnceLock<Thread>,
    function: OnceLock<Weak<PciFunction>>,
}

impl Shared {
    fn wake(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// A command of each queue in turn, until there are none.
    fn work(&self) {
        if self.shutdown.swap(false, Ordering::AcqRel) {
            // What cannot be made durable has failed its own command, or
            // will fail the host.
            if let Err(e) = lock(&self.controller).flush() {
                eprintln!("nvme: flushing at shutdown: {e}\r");
            }
            let mut r = lock(&self.registers);
            r.csts = r.csts & !CSTS_SHST | CSTS_SHUT_DOWN;
        }
        loop {
            let mut idle = true;
            for queue in 0..=self.queues {
                // The lock is held for one command: a reset waits that long.
                let turn = lock(&self.controller).turn(queue, &self.bells);
                match turn {
                    Turn::Idle => continue,
                    Turn::Taken | Turn::Done(None) => {}
                    Turn::Done(Some(vector)) => self.interrupt(vector),
                    Turn::Fatal => {
                        lock(&self.controller).reset();
                        lock(&self.registers).csts |= CSTS_CFS;
                    }
                }
                idle = false;
            }
            if idle {
                return;
            }
        }
    }

    fn interrupt(&self, vector: u16) {
        if let Some(f) = self.function.get().and_then(Weak::upgrade)
            && !f.message(vector)
        {
            self.update_line(&f);
        }
    }

    /// The INTx line is up while a completion queue has something unread.
    fn update_line(&self, f: &PciFunction) {
        let controller = lock(&self.controller);
        let masked = lock(&self.registers).mask & 1 != 0;
        let unread = (0..=self.queues).any(|q| {
            controller
                .cq_tail(q)
                .is_some_and(|tail| tail != self.bells.cq_head(q))
        });
        f.set_intx(unread && !masked);
    }

    fn doorbell(&self, function: &PciFunction, index: u64, value: u32) {
        let Ok(queue) = u16::try_from(index / 2) else {
            return;
        };
        // A value beyond every queue cannot be right.
        if queue > self.queues || value > 0xffff {
            return;
        }
        if index.is_multiple_of(2) {
            Bells::write(&self.bells.sq, queue, value);
            self.wake();
            return;
        }
        Bells::write(&self.bells.cq, queue, value);
        // A queue that was full has room again.
        self.wake();
        if !function.msix_enabled() {
            self.update_line(function);
        }
    }

    fn write_cc(&self, value: u32) {
        let mut r = lock(&self.registers);
        let (was, now) = (r.cc & CC_EN != 0, value & CC_EN != 0);
        r.cc = value & CC_KEPT;
        if !was && now {
            let (aqa, asq, acq) = (r.aqa, r.asq, r.acq);
            let good = value & CC_CHOICES & !CC_SHN == 0;
            drop(r);
            for list in [&self.bells.sq, &self.bells.cq] {
                for v in list {
                    v.store(0, Ordering::Release);
                }
            }
            let sizes = ((aqa & 0xfff) + 1, (aqa >> 16 & 0xfff) + 1);
            let mut controller = lock(&self.controller);
            controller.reset();
            let good = good && controller.enable((asq, sizes.0), (acq, sizes.1));
            drop(controller);
            r = lock(&self.registers);
            r.csts = if good { CSTS_RDY } else { CSTS_CFS };
        } else if was && !now {
            drop(r);
            // Waits for a command that is being done.
            lock(&self.controller).reset();
            r = lock(&self.registers);
            r.csts = 0;
            r.mask = 0;
            if let Some(f) = self.function.get().and_then(Weak::upgrade) {
                f.set_intx(false);
            }
        }
        if value & CC_SHN != 0 && r.csts & CSTS_SHST == 0 {
            r.csts |= 1 << 2;
            drop(r);
            self.shutdown.store(true, Ordering::Release);
            self.wake();
        } else if value & CC_SHN == 0 {
            r.csts &= !CSTS_SHST;
        }
    }
}

/// The controller in its slot.
pub struct Nvme {
    shared: Arc<Shared>,
}

impl Nvme {
    /// The controller's function, and its thread called `name`.
    ///
    /// # Errors
    /// The host has no more threads.
    pub fn plan(name: String, controller: Controller) -> io::Result<Plan> {
        let (queues, entries) = (controller.queues, controller.entries);
        show_rings(&name, controller.counters.clone());
        let bells = || (0..=queues).map(|_| AtomicU32::new(0)).collect();
        let shared = Arc::new(Shared {
            controller: Mutex::new(controller),
            registers: Mutex::default(),
            bells: Bells {
                sq: bells(),
                cq: bells(),
            },
            queues,
            entries,
            shutdown: AtomicBool::new(false),
            thread: OnceLock::new(),
            function: OnceLock::new(),
        });
        let weak = Arc::downgrade(&shared);
        let spawned = thread::Builder::new().name(name).spawn(move || {
            crate::sandbox::join();
            loop {
                thread::park();
                let Some(shared) = weak.upgrade() else {
                    return;
                };
                shared.work();
            }
        })?;
        let _ = shared.thread.set(spawned.thread().clone());
        let mut plan = Blueprint::default();
        let c = &mut plan.config;
        // Mass storage, non-volatile memory, NVMe.
        c.identify(identify::VENDOR, identify::DEVICE, 1, 8);
        c.set8(PROG_IF, 2);
        c.set16(SUBSYSTEM_VENDOR, identify::VENDOR);
        c.set16(SUBSYSTEM, 0);
        plan.intx = true;
        plan.bar(BAR, BarKind::Mem64, BAR_SIZE);
        plan.msix(queues + 1, BAR_MSIX);
        Ok((plan, Box::new(Nvme { shared })))
    }

    fn read(&self, offset: u64) -> u32 {
        let r = lock(&self.shared.registers);
        match offset {
            // Entries less one; contiguous queues; ready within 10 s.
            CAP => u32::from(self.shared.entries - 1) | 1 << 16 | 20 << 24,
            // Stride 4, the NVM command set, 4 KiB pages.
            CAP_HIGH => 1 << 5,
            VS => identify::VERSION,
            INTMS | INTMC => r.mask,
            CC => r.cc,
            CSTS => r.csts,
            AQA => r.aqa,
            ASQ => r.asq as u32,
            o if o == ASQ + 4 => (r.asq >> 32) as u32,
            ACQ => r.acq as u32,
            o if o == ACQ + 4 => (r.acq >> 32) as u32,
            _ => 0,
        }
    }

    fn write(&self, function: &PciFunction, offset: u64, value: u32) {
        let low = |old: u64| old & !0xffff_ffff | u64::from(value);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        let mut r = lock(&self.shared.registers);
        match offset {
            INTMS | INTMC => {
                r.mask = if offset == INTMS {
                    r.mask | value
                } else {
                    r.mask & !value
                };
                drop(r);
                self.shared.update_line(function);
            }
            CC => {
                drop(r);
                self.shared.write_cc(value);
            }
            AQA => r.aqa = value & 0x0fff_0fff,
            ASQ => r.asq = low(r.asq) & !0xfff,
            o if o == ASQ + 4 => r.asq = high(r.asq),
            ACQ => r.acq = low(r.acq) & !0xfff,
            o if o == ACQ + 4 => r.acq = high(r.acq),
            _ => {}
        }
    }
}

impl PciDevice for Nvme {
    fn bar_read(&self, _: &PciFunction, bar: usize, offset: u64, size: u8) -> u64 {
        if bar != BAR || offset >= DOORBELLS {
            return 0;
        }
        let value = self.read(offset & !3) >> (8 * (offset & 3));
        u64::from(value) & crate::bus::ones(size)
    }

    fn bar_write(&self, function: &PciFunction, bar: usize, offset: u64, size: u8, value: u64) {
        // Registers are written whole (§3.1).
        if bar != BAR || size != 4 || !offset.is_multiple_of(4) {
            return;
        }
        match offset.checked_sub(DOORBELLS) {
            Some(bell) => self.shared.doorbell(function, bell / 4, value as u32),
            None => self.write(function, offset, value as u32),
        }
    }

    fn attached(&self, function: &Arc<PciFunction>) {
        let _ = self.shared.function.set(Arc::downgrade(function));
    }
}

impl Drop for Nvme {
    fn drop(&mut self) {
        // The thread finds nobody left, and ends.
        self.shared.wake();
    }
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
