//! A vCPU's registers as the instruction emulator of `vmm-core` wants them:
//! read from the kernel when first asked for, written back when all is done.

use std::cell::RefCell;

use vmm_core::cpu::{CpuState, Gpr, Reg, Seg, SegDesc};
use vmmapi::{CpuMode, GuestPaging, RegName, Result, Vcpu};

/// Registers that one request fetches in advance: nearly every emulated
/// instruction needs some of them, and a request costs more than a register.
const AHEAD: [RegName; 18] = {
    use RegName::*;
    [
        Rax, Rcx, Rdx, Rbx, Rsp, Rbp, Rsi, Rdi, R8, R9, R10, R11, R12, R13, R14, R15, Rflags, Efer,
    ]
};
const COUNT: usize = 64;

#[derive(Clone, Copy, Default)]
struct Slot {
    value: Option<u64>,
    dirty: bool,
}

struct Cache {
    regs: [Slot; COUNT],
    error: Option<vmmapi::Error>,
}

/// The registers of a stopped vCPU.
pub struct RegFile<'a> {
    vcpu: &'a Vcpu,
    paging: GuestPaging,
    cache: RefCell<Cache>,
}

fn gpr(r: Gpr) -> RegName {
    match r {
        Gpr::Rax => RegName::Rax,
        Gpr::Rcx => RegName::Rcx,
        Gpr::Rdx => RegName::Rdx,
        Gpr::Rbx => RegName::Rbx,
        Gpr::Rsp => RegName::Rsp,
        Gpr::Rbp => RegName::Rbp,
        Gpr::Rsi => RegName::Rsi,
        Gpr::Rdi => RegName::Rdi,
        Gpr::R8 => RegName::R8,
        Gpr::R9 => RegName::R9,
        Gpr::R10 => RegName::R10,
        Gpr::R11 => RegName::R11,
        Gpr::R12 => RegName::R12,
        Gpr::R13 => RegName::R13,
        Gpr::R14 => RegName::R14,
        Gpr::R15 => RegName::R15,
    }
}

/// The kernel's name; `None` for what it keeps as a descriptor.
fn name(r: Reg) -> Option<RegName> {
    Some(match r {
        Reg::Rip => RegName::Rip,
        Reg::Rflags => RegName::Rflags,
        Reg::Cr0 => RegName::Cr0,
        Reg::Cr2 => RegName::Cr2,
        Reg::Cr3 => RegName::Cr3,
        Reg::Cr4 => RegName::Cr4,
        Reg::Efer => RegName::Efer,
        Reg::Dr0 => RegName::Dr0,
        Reg::Dr1 => RegName::Dr1,
        Reg::Dr2 => RegName::Dr2,
        Reg::Dr3 => RegName::Dr3,
        Reg::Dr6 => RegName::Dr6,
        Reg::Dr7 => RegName::Dr7,
        Reg::Pdpte0 => RegName::Pdpte0,
        Reg::Pdpte1 => RegName::Pdpte1,
        Reg::Pdpte2 => RegName::Pdpte2,
        Reg::Pdpte3 => RegName::Pdpte3,
        Reg::GdtrBase | Reg::GdtrLimit | Reg::IdtrBase | Reg::IdtrLimit => return None,
    })
}

fn segment(s: Seg) -> RegName {
    match s {
        Seg::Es => RegName::Es,
        Seg::Cs => RegName::Cs,
        Seg::Ss => RegName::Ss,
        Seg::Ds => RegName::Ds,
        Seg::Fs => RegName::Fs,
        Seg::Gs => RegName::Gs,
        Seg::Ldtr => RegName::Ldtr,
        Seg::Tr => RegName::Tr,
    }
}

impl<'a> RegFile<'a> {
    /// Registers at an exit: RIP and the paging mode came with it.
    pub fn new(vcpu: &'a Vcpu, rip: u64, paging: GuestPaging) -> Result<RegFile<'a>> {
        let mut cache = Cache {
            regs: [Slot::default(); COUNT],
            error: None,
        };
        let ahead = vcpu.registers(&AHEAD)?;
        for (reg, value) in AHEAD.into_iter().zip(ahead).chain([(RegName::Rip, rip)]) {
            if let Some(slot) = cache.regs.get_mut(reg.raw() as usize) {
                slot.value = Some(value);
            }
        }
        Ok(RegFile {
            vcpu,
            paging,
            cache: RefCell::new(cache),
        })
    }

    fn get(&self, reg: RegName) -> u64 {
        let mut cache = self.cache.borrow_mut();
        let cache = &mut *cache;
        let Some(slot) = cache.regs.get_mut(reg.raw() as usize) else {
            return 0;
        };
        *slot.value.get_or_insert_with(|| {
            self.vcpu.register(reg).unwrap_or_else(|e| {
                cache.error = Some(e);
                0
            })
        })
    }

    fn set(&mut self, reg: RegName, value: u64) {
        if let Some(slot) = self.cache.get_mut().regs.get_mut(reg.raw() as usize)
            && slot.value != Some(value)
        {
            *slot = Slot {
                value: Some(value),
                dirty: true,
            };
        }
    }

    /// Writes back what changed, RIP excepted: the kernel moves it.
    pub fn write_back(self) -> Result<()> {
        let cache = self.cache.into_inner();
        if let Some(e) = cache.error {
            return Err(e);
        }
        let changed = RegName::ALL
            .iter()
            .filter(|r| **r != RegName::Rip)
            .filter_map(|r| {
                let slot = cache.regs.get(r.raw() as usize)?;
                slot.dirty.then_some((*r, slot.value?))
            });
        let changed: Vec<(RegName, u64)> = changed.collect();
        match changed.as_slice() {
            [] => Ok(()),
            [(reg, value)] => self.vcpu.set_register(*reg, *value),
            several => self.vcpu.set_registers(several),
        }
    }

    /// Segments of 64-bit code need not be asked for: base and limit of all
    /// but FS and GS have no effect (SDM Vol. 3A §3.4.4), and the privilege
    /// level came with the exit.
    fn flat(&self, s: Seg) -> Option<SegDesc> {
        let long = self.paging.cpu_mode == CpuMode::Bits64.raw();
        let dpl = (self.paging.cpl as u32 & 3) << 5;
        let access = match s {
            Seg::Cs => 0xa09b,
            Seg::Es | Seg::Ss | Seg::Ds => 0xc093,
            _ => return None,
        };
        long.then_some(SegDesc {
            base: 0,
            limit: u32::MAX,
            access: access | dpl,
        })
    }
}

impl CpuState for RegFile<'_> {
    fn gpr(&self, r: Gpr) -> u64 {
        self.get(gpr(r))
    }
    fn set_gpr(&mut self, r: Gpr, v: u64) {
        self.set(gpr(r), v);
    }
    fn reg(&self, r: Reg) -> u64 {
        if let Some(reg) = name(r) {
            return self.get(reg);
        }
        let table = if matches!(r, Reg::GdtrBase | Reg::GdtrLimit) {
            RegName::Gdtr
        } else {
            RegName::Idtr
        };
        match self.vcpu.desc(table) {
            Ok(d) if matches!(r, Reg::GdtrBase | Reg::IdtrBase) => d.base,
            Ok(d) => d.limit.into(),
            Err(e) => {
                self.cache.borrow_mut().error = Some(e);
                0
            }
        }
    }
    fn set_reg(&mut self, r: Reg, v: u64) {
        // No instruction with a memory operand in device memory loads GDTR or
        // IDTR here.
        if let Some(reg) = name(r) {
            self.set(reg, v);
        }
    }
    fn seg(&self, s: Seg) -> SegDesc {
        if let Some(flat) = self.flat(s) {
            return flat;
        }
        match self.vcpu.desc(segment(s)) {
            Ok(d) => SegDesc {
                base: d.base,
                limit: d.limit,
                access: d.access,
            },
            Err(e) => {
                self.cache.borrow_mut().error = Some(e);
                SegDesc::default()
            }
        }
    }
    // The emulator loads no segment registers.
    fn set_seg(&mut self, _: Seg, _: SegDesc) {}
    fn selector(&self, s: Seg) -> u16 {
        self.get(segment(s)) as u16
    }
    fn set_selector(&mut self, _: Seg, _: u16) {}
    fn inst_len(&self) -> u8 {
        0
    }
    // The kernel ends the shadow when it moves RIP.
    fn interrupt_shadow(&self) -> bool {
        false
    }
    fn set_interrupt_shadow(&mut self, _: bool) {}
    fn nmi_blocked(&self) -> bool {
        false
    }
}
