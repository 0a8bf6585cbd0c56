//! The guest's x87, SSE and extended state: switched once per `load` and
//! `unload`, in the standard (non-compacted) XSAVE format
//! (SDM Vol. 1 chapter 13).

use crate::error::Error;
use crate::instr;
use crate::page::Pages;
use core::arch::asm;
use vmm_core::host::Host;

/// The save areas and XCR0.
pub struct Fpu<H: Host> {
    area: Pages<H>,
    /// For the thread that runs the vCPU, where the host leaves that to us.
    thread: Pages<H>,
    /// `thread` is to be loaded by `save`.
    thread_live: bool,
    /// The guest's XCR0.
    xcr0: u64,
    /// The host's, which is the same at all times and read on each new CPU.
    host_xcr0: u64,
    /// Components that are switched, of which there is none above 31; 0 without
    /// XSAVE. The guest cannot reach others: they stay the thread's.
    mask: u32,
}

/// # Safety
/// CPL 0, CR0.TS clear; the area is 64-byte aligned and large enough for the
/// components in `mask`.
#[inline(always)]
unsafe fn store(area: *mut u8, mask: u32) {
    // SAFETY: by the caller's promise.
    unsafe {
        if mask == 0 {
            asm!("fxsave64 [{}]", in(reg) area, options(nostack));
        } else {
            asm!("xsave64 [{}]", in(reg) area, in("eax") mask, in("edx") 0, options(nostack));
        }
    }
}

/// # Safety
/// As [`store`], and the area holds what that or `power_on` wrote.
#[inline(always)]
unsafe fn restore(area: *const u8, mask: u32) {
    // SAFETY: by the caller's promise.
    unsafe {
        if mask == 0 {
            asm!("fxrstor64 [{}]", in(reg) area, options(nostack));
        } else {
            asm!("xrstor64 [{}]", in(reg) area, in("eax") mask, in("edx") 0, options(nostack));
        }
    }
}

/// Whether `new` is a value that XSETBV takes for XCR0, given the components
/// that the guest may use; #GP(0) otherwise (SDM Vol. 2D "XSETBV").
pub const fn check_xcr0(new: u64, supported: u64) -> bool {
    const SSE: u64 = 1 << 1;
    const AVX: u64 = 1 << 2;
    const AVX512: u64 = 7 << 5;
    new & 1 != 0
        && new & !supported == 0
        && (new & AVX == 0 || new & SSE != 0)
        && (new & AVX512 == 0 || (new & AVX512 == AVX512 && new & AVX != 0))
}

/// Bytes of a standard-format area for the given components.
fn area_size(mask: u64, cpuid: impl Fn(u32, u32) -> [u32; 4]) -> usize {
    let mut size = 512 + 64;
    for component in 2..63 {
        if mask & (1 << component) != 0 {
            let [len, offset, ..] = cpuid(0xd, component);
            size = size.max(offset as usize + len as usize);
        }
    }
    size
}

impl<H: Host> Fpu<H> {
    /// State as after power-on (SDM Vol. 3A table 9-1), with the components
    /// in `mask`; 0 for a CPU or host without XSAVE.
    pub fn new(mask: u64) -> Result<Self, Error> {
        let size = area_size(mask, instr::cpuid);
        let mut fpu = Fpu {
            area: Pages::for_bytes(size)?,
            thread: Pages::for_bytes(size)?,
            thread_live: false,
            xcr0: 1,
            host_xcr0: 0,
            mask: mask as u32,
        };
        fpu.power_on();
        Ok(fpu)
    }

    /// Back to the power-on state.
    pub fn power_on(&mut self) {
        self.xcr0 = 1;
        let bytes = self.area.bytes_mut();
        bytes.fill(0);
        // FCW, the abridged tag word, MXCSR, XSTATE_BV (x87 and SSE present).
        for (offset, value) in [(0, 0x40), (4, 0xff), (24, 0x80), (25, 0x1f), (512, 3)] {
            if let Some(b) = bytes.get_mut(offset) {
                *b = value;
            }
        }
    }

    /// The guest's XCR0.
    pub fn xcr0(&self) -> u64 {
        self.xcr0
    }

    /// XCR0 as the CPU has it, while the guest's is loaded.
    pub(crate) fn loaded_xcr0(&self) -> u64 {
        if self.mask == 0 {
            return self.xcr0;
        }
        // SAFETY: the host has XSAVE on, or `mask` would be 0.
        unsafe { instr::xgetbv0() }
    }

    /// Takes over what the guest has made of XCR0 without an exit. The CPU has
    /// checked it; what the host does not switch stays off.
    pub(crate) fn take_xcr0(&mut self) {
        self.xcr0 = self.loaded_xcr0() & (u64::from(self.mask) | 1);
    }

    pub(crate) fn set_xcr0(&mut self, value: u64, loaded: bool) {
        self.xcr0 = value;
        if loaded && self.mask != 0 {
            // SAFETY: the caller checked the value against what the host has
            // on; the vCPU is loaded, so this is CPL 0 and XCR0 is ours.
            unsafe { instr::xsetbv0(value) };
        }
    }

    /// Loads the guest's state; with `thread_live` the registers hold the calling
    /// thread's, which is put by.
    ///
    /// # Safety
    /// CPL 0, no preemption and nobody else who uses the FPU until [`Fpu::save`];
    /// CR0.TS clear. Without `thread_live` nobody misses what the registers hold.
    #[inline(always)]
    pub(crate) unsafe fn load(&mut self, new_cpu: bool, thread_live: bool) {
        self.thread_live = thread_live;
        // SAFETY: the areas are 64-byte aligned (pages), large enough for the
        // components in `mask`, and hold what `power_on` or XSAVE wrote.
        unsafe {
            if thread_live {
                store(self.thread.as_ptr(), self.mask);
            }
            restore(self.area.as_ptr(), self.mask);
            if self.mask == 0 {
                return;
            }
            if new_cpu {
                self.host_xcr0 = instr::xgetbv0();
            }
            if self.xcr0 != self.host_xcr0 {
                instr::xsetbv0(self.xcr0);
            }
        }
    }

    /// Saves the guest's state and puts the host's XCR0 back, and what `load` put
    /// by.
    ///
    /// # Safety
    /// As [`Fpu::load`], after it.
    #[inline(always)]
    pub(crate) unsafe fn save(&mut self) {
        // SAFETY: as in `load`.
        unsafe {
            if self.mask != 0 && self.xcr0 != self.host_xcr0 {
                instr::xsetbv0(self.host_xcr0);
            }
            store(self.area.as_ptr(), self.mask);
            if self.thread_live {
                restore(self.thread.as_ptr(), self.mask);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xcr0_rules() {
        let all = 0xe7;
        for good in [1, 3, 7, 0xe7] {
            assert!(check_xcr0(good, all), "{good:#x}");
        }
        for bad in [0, 2, 5, 0x27, 0xe3, 0x107, 1 << 63] {
            assert!(!check_xcr0(bad, all), "{bad:#x}");
        }
        assert!(!check_xcr0(0xe7, 7));
    }

    #[test]
    fn the_area_covers_the_last_component() {
        let cpuid = |_: u32, c: u32| match c {
            2 => [256, 576, 0, 0],
            5 => [64, 1088, 0, 0],
            6 => [512, 1152, 0, 0],
            7 => [1024, 1664, 0, 0],
            _ => [0; 4],
        };
        assert_eq!(area_size(3, cpuid), 576);
        assert_eq!(area_size(7, cpuid), 832);
        assert_eq!(area_size(0xe7, cpuid), 2688);
    }
}
