//! A vCPU's registers as the instruction emulator of `vmm-core` wants them: those that
//! the exit brought along, others read from the kernel when first asked for; written
//! back when all is done.

use std::cell::RefCell;

use vmm_core::cpu::{CpuState, Gpr, Reg, Seg, SegDesc};
use vmmapi::{CpuMode, ExitRegisters, GuestPaging, RegName, Result, Runner, Vcpu};

/// Registers that one request fetches in advance, where the exit has brought none:
/// nearly every emulated instruction needs some of them, and a request costs more than
/// a register. The general ones by their numbers in instructions.
const AHEAD: [RegName; 18] = {
    use RegName::*;
    [
        Rax, Rcx, Rdx, Rbx, Rsp, Rbp, Rsi, Rdi, R8, R9, R10, R11, R12, R13, R14, R15, Rflags, Efer,
    ]
};
/// Numbers of registers, the kernel's, are below; a bit each in a word.
const COUNT: usize = 64;
const _: () = assert!(match RegName::ALL.last() {
    Some(last) => last.raw() < COUNT as u32,
    None => false,
});

/// Registers by the kernel's numbers.
struct Cache {
    values: [u64; COUNT],
    known: u64,
    changed: u64,
    /// The general ones of them, by their numbers in instructions.
    changed_gprs: u16,
    error: Option<vmmapi::Error>,
}

impl Cache {
    fn learn(&mut self, reg: RegName, value: u64) {
        if let Some(slot) = self.values.get_mut(reg.raw() as usize) {
            *slot = value;
            self.known |= 1 << reg.raw();
        }
    }
}

/// The registers of a stopped vCPU.
pub struct RegFile<'a> {
    vcpu: &'a Vcpu,
    paging: GuestPaging,
    /// The general registers came with the exit, and go with the next run.
    brought: bool,
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
    /// Registers at an exit: RIP and the paging mode came with it, and perhaps
    /// more.
    pub fn new(
        vcpu: &'a Vcpu,
        rip: u64,
        paging: GuestPaging,
        brought: Option<ExitRegisters>,
    ) -> Result<RegFile<'a>> {
        let mut cache = Cache {
            values: [0; COUNT],
            known: 0,
            changed: 0,
            changed_gprs: 0,
            error: None,
        };
        cache.learn(RegName::Rip, rip);
        if let Some(b) = brought {
            let values = b.gprs.into_iter().chain([b.rflags, b.efer]);
            for (reg, value) in AHEAD.into_iter().zip(values) {
                cache.learn(reg, value);
            }
        } else {
            for (reg, value) in AHEAD.into_iter().zip(vcpu.registers(&AHEAD)?) {
                cache.learn(reg, value);
            }
        }
        Ok(RegFile {
            vcpu,
            paging,
            brought: brought.is_some(),
            cache: RefCell::new(cache),
        })
    }

    fn get(&self, reg: RegName) -> u64 {
        let mut cache = self.cache.borrow_mut();
        if cache.known & 1 << reg.raw() == 0 {
            match self.vcpu.register(reg) {
                Ok(value) => cache.learn(reg, value),
                Err(e) => cache.error = Some(e),
            }
        }
        cache.values.get(reg.raw() as usize).copied().unwrap_or(0)
    }

    /// True: it had another value, or none that is known.
    fn set(&mut self, reg: RegName, value: u64) -> bool {
        let cache = self.cache.get_mut();
        let bit = 1 << reg.raw();
        let new = cache.known & bit == 0 || cache.values.get(reg.raw() as usize) != Some(&value);
        if new {
            cache.learn(reg, value);
            cache.changed |= bit;
        }
        new
    }

    /// Writes back what changed, RIP excepted: the kernel moves it. With the next run,
    /// where that can be.
    pub fn write_back(&mut self, runner: &mut Runner) -> Result<()> {
        let cache = self.cache.get_mut();
        if let Some(e) = cache.error.take() {
            return Err(e);
        }
        let mut left = cache.changed & !(1 << RegName::Rip.raw());
        let value = |reg: RegName| cache.values.get(reg.raw() as usize).copied();
        if self.brought {
            let mut rflags = None;
            if left & 1 << RegName::Rflags.raw() != 0 {
                left &= !(1 << RegName::Rflags.raw());
                rflags = value(RegName::Rflags);
            }
            let mut gprs = cache.changed_gprs;
            let each = std::iter::from_fn(|| {
                let n = (gprs != 0).then(|| gprs.trailing_zeros() as u8)?;
                gprs &= gprs - 1;
                let reg = gpr(Gpr::from_encoding(n));
                left &= !(1 << reg.raw());
                Some((n.into(), value(reg)?))
            });
            runner.set_registers(each, rflags);
        }
        if left == 0 {
            return Ok(());
        }
        let changed = RegName::ALL
            .iter()
            .filter(|r| left & 1 << r.raw() != 0)
            .filter_map(|r| Some((*r, value(*r)?)));
        let changed: Vec<(RegName, u64)> = changed.collect();
        match changed.as_slice() {
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
        if self.set(gpr(r), v) {
            self.cache.get_mut().changed_gprs |= 1 << (r as u8);
        }
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
