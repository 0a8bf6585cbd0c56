//! Running a vCPU with as little as possible between two exits.

use crate::error::{Error, Result};
use crate::sys::{self, Page};
use crate::vcpu::Vcpu;
use crate::vm::Vm;
use std::cell::Cell;
use std::io;
use std::mem::{self, offset_of};
use std::sync::atomic::Ordering;
use vmm_abi::exit::Inout;
use vmm_abi::layout::{
    EXT_F_RUN_GPRS, EXT_F_RUN_PAGE, EXT_F_RUN_SEEK, EXT_RUN_CHANGED_RFLAGS, EXT_RUN_GPR_COUNT,
    EXT_RUN_GPRS, EXT_RUN_MSI, EXT_RUN_MSIS, EXT_RUN_PAGES, EXT_RUN_RAX, EXT_RUN_SHIFT,
    VmExtRunPage,
};
use vmm_abi::raw_exit::{InoutRaw, VmExitRaw};
use vmm_abi::request::VM_EXT_RUN_PAGE;
use vmm_abi::{Exit, ExitCode, VmExit};
use zerocopy::{FromZeros, IntoBytes};

/// A vCPU's run page, mapped. The kernel writes to it only while this thread
/// is in VM_EXT_RUN_PAGE; if another thread runs the vCPU too, either of them
/// reads nonsense, and no more than that.
#[derive(Debug)]
struct RunPage(Page);

impl RunPage {
    #[inline]
    fn word(&self, offset: usize) -> u64 {
        self.0.word64(offset).load(Ordering::Relaxed)
    }

    #[inline]
    fn set(&self, offset: usize, value: u64) {
        self.0.word64(offset).store(value, Ordering::Relaxed);
    }

    #[inline]
    fn set_rax(&self, rax: u64) {
        self.set(offset_of!(VmExtRunPage, rax), rax);
    }

    /// Hands the waiting messages over; what the request has to be told.
    fn put_msis(&self) -> u32 {
        WAITING.with(|w| {
            let n = w.count.replace(0);
            let put = |offset, value| self.0.word64(offset).store(value, Ordering::Relaxed);
            put(offset_of!(VmExtRunPage, msis), n as u64);
            for (i, msi) in w.msi.iter().enumerate().take(n) {
                let at = offset_of!(VmExtRunPage, msi) + 16 * i;
                let (address, data) = msi.get();
                put(at, address);
                put(at + 8, data);
            }
        });
        EXT_RUN_MSI
    }

    fn exit(&self) -> VmExitRaw {
        let mut exit = VmExitRaw::new_zeroed();
        let words = exit.as_mut_bytes().chunks_exact_mut(8).enumerate();
        for (n, to) in words {
            to.copy_from_slice(&self.word(8 * n).to_ne_bytes());
        }
        exit
    }
}

/// Messages that wait for this thread's next run.
struct Waiting {
    /// Of which VM, as [`Vm::identity`] tells; 0: the thread runs none.
    vm: Cell<usize>,
    count: Cell<usize>,
    msi: [Cell<(u64, u64)>; EXT_RUN_MSIS],
}

thread_local! {
    static WAITING: Waiting = const {
        Waiting {
            vm: Cell::new(0),
            count: Cell::new(0),
            msi: [const { Cell::new((0, 0)) }; EXT_RUN_MSIS],
        }
    };
}

/// Leaves a message for the next run, if this is the thread of one of the VM's
/// vCPUs: false if it is not, or has no room.
pub(crate) fn defer_msi(vm: &Vm, address: u64, data: u64) -> bool {
    WAITING.with(|w| {
        if w.vm.get() != vm.identity() {
            return false;
        }
        let n = w.count.get();
        let Some(slot) = w.msi.get(n) else {
            return false;
        };
        slot.set((address, data));
        w.count.set(n + 1);
        true
    })
}

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// For an IN or OUT.
    Inout(Inout),
    /// For what [`Runner::exit`] tells.
    Other,
}

#[derive(Debug)]
enum Last {
    /// In the run page.
    InPage,
    /// Here.
    Exit(Box<VmExit>),
}

/// Runs a vCPU, for its thread: as [`Vcpu::run`], but the kernel and we share
/// a page where the kernel piece is ours, and an IN or OUT costs a few words.
#[derive(Debug)]
pub struct Runner<'a> {
    vcpu: &'a Vcpu,
    page: Option<RunPage>,
    /// Where the run page is in the VM's device, if a seek there runs the vCPU.
    seek: Option<u64>,
    /// The kernel leaves registers in the run page.
    gprs: bool,
    /// Flags for the next run.
    flags: u32,
    last: Last,
}

/// The registers of an [`Exit::InstEmul`].
#[derive(Clone, Copy, Debug)]
pub struct ExitRegisters {
    /// The general ones, by their numbers in instructions.
    pub gprs: [u64; EXT_RUN_GPR_COUNT],
    /// RFLAGS.
    pub rflags: u64,
    /// IA32_EFER.
    pub efer: u64,
}

impl<'a> Runner<'a> {
    /// For a vCPU that is active.
    ///
    /// # Errors
    /// The run page cannot be mapped.
    pub fn new(vcpu: &'a Vcpu) -> Result<Runner<'a>> {
        let vm = vcpu.vm();
        let small = vcpu.id() >> EXT_RUN_SHIFT == 0;
        let offset = EXT_RUN_PAGES + u64::from(vcpu.id()) * Page::SIZE as u64;
        let page = if small && vcpu.vm().has(EXT_F_RUN_PAGE) {
            let page = Page::map(vcpu.vm().fd(), offset).map_err(|e| Error::Map {
                vm: vcpu.vm().name().into(),
                gpa: offset,
                len: Page::SIZE as u64,
                source: e,
            })?;
            Some(RunPage(page))
        } else {
            None
        };
        if page.is_some() {
            WAITING.with(|w| w.vm.set(vm.identity()));
        }
        Ok(Runner {
            vcpu,
            seek: (page.is_some() && vm.has(EXT_F_RUN_SEEK)).then_some(offset),
            gprs: page.is_some() && vm.has(EXT_F_RUN_GPRS),
            flags: 0,
            page,
            last: Last::Exit(Box::new(bogus())),
        })
    }

    /// Runs on; with `rax`, the last exit was an IN and this is RAX after it.
    ///
    /// # Errors
    /// As [`Vcpu::run`].
    #[inline]
    pub fn run(&mut self, rax: Option<u64>) -> Result<Left> {
        let Some(page) = &self.page else {
            return self.run_copied(rax);
        };
        let mut flags = mem::take(&mut self.flags);
        if let Some(rax) = rax {
            page.set_rax(rax);
            flags |= EXT_RUN_RAX;
        }
        if WAITING.with(|w| w.count.get() != 0) {
            flags |= page.put_msis();
        }
        let fd = self.vcpu.vm().fd();
        let done = match self.seek {
            Some(at) => sys::seek_data(fd, at | u64::from(flags)),
            None => {
                let arg = self.vcpu.id() | flags << EXT_RUN_SHIFT;
                sys::ioctl_int(fd, VM_EXT_RUN_PAGE, arg as i32)
            }
        };
        if let Err(e) = done {
            return self.stopped(e);
        }
        let code = page.word(offset_of!(VmExitRaw, exitcode)) as u32;
        if code == ExitCode::Inout.raw() {
            let raw = page.word(offset_of!(VmExitRaw, u));
            return Ok(Left::Inout(Inout::from_raw(&InoutRaw {
                flags: raw as u16,
                port: (raw >> 16) as u16,
                eax: (raw >> 32) as u32,
            })));
        }
        self.last = Last::InPage;
        Ok(Left::Other)
    }

    #[cold]
    fn stopped(&mut self, e: io::Error) -> Result<Left> {
        if e.kind() != io::ErrorKind::Interrupted {
            let id = Some(self.vcpu.id() as i32);
            return Err(self.vcpu.vm().error(VM_EXT_RUN_PAGE, id, e));
        }
        self.last = Last::Exit(Box::new(bogus()));
        Ok(Left::Other)
    }

    #[cold]
    fn run_copied(&mut self, rax: Option<u64>) -> Result<Left> {
        let exit = match rax {
            None => self.vcpu.run()?,
            Some(rax) => self.vcpu.run_with_rax(rax)?,
        };
        if let Exit::Inout(io) = exit.exit {
            return Ok(Left::Inout(io));
        }
        self.last = Last::Exit(Box::new(exit));
        Ok(Left::Other)
    }

    /// The registers after an [`Exit::InstEmul`], where the kernel piece has left them
    /// to us.
    pub fn registers(&self) -> Option<ExitRegisters> {
        let (true, Last::InPage, Some(page)) = (self.gprs, &self.last, &self.page) else {
            return None;
        };
        let first = offset_of!(VmExtRunPage, gprs);
        let mut n = 0;
        let gprs = [(); EXT_RUN_GPR_COUNT].map(|()| {
            n += 1;
            page.word(first + 8 * (n - 1))
        });
        Some(ExitRegisters {
            gprs,
            rflags: page.word(offset_of!(VmExtRunPage, rflags)),
            efer: page.word(offset_of!(VmExtRunPage, efer)),
        })
    }

    /// The next run begins with these registers, after an exit of which
    /// [`Runner::registers`] gave them: general ones by number, RFLAGS if it is there.
    pub fn set_registers(
        &mut self,
        gprs: impl IntoIterator<Item = (usize, u64)>,
        rflags: Option<u64>,
    ) {
        let Some(page) = &self.page else {
            return;
        };
        let mut changed = 0;
        for (n, value) in gprs {
            if n < EXT_RUN_GPR_COUNT {
                page.set(offset_of!(VmExtRunPage, gprs) + 8 * n, value);
                changed |= 1 << n;
            }
        }
        if let Some(rflags) = rflags {
            page.set(offset_of!(VmExtRunPage, rflags), rflags);
            changed |= EXT_RUN_CHANGED_RFLAGS;
        }
        if changed != 0 {
            page.set(offset_of!(VmExtRunPage, changed), changed);
            self.flags |= EXT_RUN_GPRS;
        }
    }

    /// The exit after [`Left::Other`].
    pub fn exit(&self) -> VmExit {
        match (&self.last, &self.page) {
            (Last::InPage, Some(page)) => VmExit::from_raw(&page.exit()),
            (Last::Exit(exit), _) => **exit,
            (Last::InPage, None) => bogus(),
        }
    }
}

impl Drop for Runner<'_> {
    fn drop(&mut self) {
        if self.page.is_none() {
            return;
        }
        WAITING.with(|w| {
            w.vm.set(0);
            for msi in w.msi.iter().take(w.count.replace(0)) {
                let (address, data) = msi.get();
                // As for those of a run: wrong ones go nowhere.
                let _ = self.vcpu.vm().lapic_msi(address, data);
            }
        });
    }
}

/// Nothing happened: a signal came.
fn bogus() -> VmExit {
    VmExit {
        rip: 0,
        inst_length: 0,
        exit: Exit::Bogus,
    }
}
