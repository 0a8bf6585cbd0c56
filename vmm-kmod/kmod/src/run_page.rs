//! The page of a vCPU that userland maps, so that a run needs no copies.

use core::mem::offset_of;

use vmm_abi::ExitCode;
use vmm_abi::layout::{EXT_RUN_GPR_COUNT, EXT_RUN_MSIS, VmExtRunPage};
use vmm_abi::raw_exit::VmExitRaw;
use vmm_core::cpu::{CpuState, Gpr, Reg};
use vmm_hw::page::Pages;

use crate::os::Os;
use crate::sync::NoMemory;

/// A vCPU's run page ([`VmExtRunPage`]). Userland writes to it at any time,
/// so each word is read once and nothing is read back.
pub struct RunPage(Pages<Os>);

// SAFETY: it is only reached by volatile accesses to memory that it owns.
unsafe impl Sync for RunPage {}
// SAFETY: as above.
unsafe impl Send for RunPage {}

impl RunPage {
    /// A zeroed page.
    pub fn new() -> Result<RunPage, NoMemory> {
        Pages::new(0).map(RunPage).map_err(|_| NoMemory)
    }

    /// Its physical address.
    pub fn pa(&self) -> u64 {
        self.0.pa()
    }

    /// The word at an offset that is one of `VmExtRunPage`'s.
    #[inline]
    fn word(&self, offset: usize) -> u64 {
        let at = self.0.as_ptr().wrapping_add(offset);
        // SAFETY: the offsets in this file are inside the page, and aligned.
        unsafe { at.cast::<u64>().read_volatile() }
    }

    /// RAX as userland wants it.
    #[inline]
    pub fn rax(&self) -> u64 {
        self.word(offset_of!(VmExtRunPage, rax))
    }

    /// Which registers userland wants to have set.
    pub fn changed(&self) -> u64 {
        self.word(offset_of!(VmExtRunPage, changed))
    }

    /// RFLAGS as userland wants it.
    pub fn rflags(&self) -> u64 {
        self.word(offset_of!(VmExtRunPage, rflags))
    }

    /// The general registers as userland wants them, those that `changed` names.
    pub fn gprs(&self, changed: u64) -> impl Iterator<Item = (Gpr, u64)> + '_ {
        let first = offset_of!(VmExtRunPage, gprs);
        (0..EXT_RUN_GPR_COUNT)
            .filter(move |n| changed & (1 << n) != 0)
            .map(move |n| (Gpr::from_encoding(n as u8), self.word(first + 8 * n)))
    }

    /// Shows userland the registers that the emulation of an instruction needs.
    pub fn put_registers(&self, cpu: &(impl CpuState + ?Sized)) {
        let put = |offset, value| {
            let at = self.0.as_ptr().wrapping_add(offset);
            // SAFETY: as in `word`.
            unsafe { at.cast::<u64>().write_volatile(value) }
        };
        let first = offset_of!(VmExtRunPage, gprs);
        for n in 0..EXT_RUN_GPR_COUNT {
            put(first + 8 * n, cpu.gpr(Gpr::from_encoding(n as u8)));
        }
        put(offset_of!(VmExtRunPage, rflags), cpu.reg(Reg::Rflags));
        put(offset_of!(VmExtRunPage, efer), cpu.reg(Reg::Efer));
    }

    /// The messages that userland wants to have sent, address and data. The
    /// addresses are any.
    pub fn msis(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let word = |offset| self.word(offset);
        let n = word(offset_of!(VmExtRunPage, msis)).min(EXT_RUN_MSIS as u64);
        let first = offset_of!(VmExtRunPage, msi);
        (0..n as usize).map(move |i| (word(first + 16 * i), word(first + 16 * i + 8)))
    }

    /// Shows userland an exit.
    #[inline]
    pub fn put(&self, exit: &VmExitRaw) {
        let at = self.0.as_ptr();
        // An IN or OUT, by far the most frequent: no more than it has.
        if exit.exitcode == ExitCode::Inout.raw() {
            let head = u64::from(exit.exitcode) | u64::from(exit.inst_length as u32) << 32;
            let inout = exit.u.first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
            let at = at.cast::<u64>();
            // SAFETY: the first 24 bytes of the page, aligned; the layout is
            // that of `VmExitRaw`.
            unsafe {
                at.write_volatile(head);
                at.wrapping_add(1).write_volatile(exit.rip);
                at.wrapping_add(2).write_volatile(inout);
            }
        } else {
            // SAFETY: the exit is at the page's start, aligned.
            unsafe { at.cast::<VmExitRaw>().write_volatile(*exit) }
        }
    }
}
