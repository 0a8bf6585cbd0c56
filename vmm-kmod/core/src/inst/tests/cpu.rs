//! A vCPU that is a plain structure.

use crate::cpu::*;

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TestCpu {
    pub gprs: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub cr0: u64,
    pub cr2: u64,
    pub cr4: u64,
    pub efer: u64,
    pub segs: [SegDesc; 8],
}

impl TestCpu {
    /// Flat, at CPL 0.
    pub fn new(mode: super::super::CodeMode) -> Self {
        use super::super::CodeMode::*;
        let data = SegDesc {
            base: 0,
            limit: !0,
            access: 0xc093,
        };
        let mut c = TestCpu {
            gprs: [0; 16],
            rip: 0x1000,
            rflags: 2,
            cr0: 0x11,
            cr2: 0,
            cr4: 0,
            efer: 0,
            segs: [data; 8],
        };
        let access = match mode {
            Bits16 => {
                for s in &mut c.segs {
                    s.access = 0x93;
                    s.limit = 0xffff;
                }
                0x9b
            }
            Bits32 => 0xc09b,
            Bits64 => {
                c.efer = EFER_LMA | EFER_LME;
                0xa09b
            }
        };
        c.segs[Seg::Cs as usize].access = access;
        c
    }
}

impl CpuState for TestCpu {
    fn gpr(&self, r: Gpr) -> u64 {
        self.gprs[r as usize]
    }
    fn set_gpr(&mut self, r: Gpr, v: u64) {
        self.gprs[r as usize] = v;
    }
    fn reg(&self, r: Reg) -> u64 {
        match r {
            Reg::Rip => self.rip,
            Reg::Rflags => self.rflags,
            Reg::Cr0 => self.cr0,
            Reg::Cr2 => self.cr2,
            Reg::Cr4 => self.cr4,
            Reg::Efer => self.efer,
            _ => 0,
        }
    }
    fn set_reg(&mut self, r: Reg, v: u64) {
        match r {
            Reg::Rip => self.rip = v,
            Reg::Rflags => self.rflags = v,
            Reg::Cr2 => self.cr2 = v,
            _ => panic!("{r:?}"),
        }
    }
    fn seg(&self, s: Seg) -> SegDesc {
        self.segs[s as usize]
    }
    fn set_seg(&mut self, s: Seg, d: SegDesc) {
        self.segs[s as usize] = d;
    }
    fn selector(&self, _: Seg) -> u16 {
        0
    }
    fn set_selector(&mut self, _: Seg, _: u16) {}
    fn inst_len(&self) -> u8 {
        0
    }
    fn interrupt_shadow(&self) -> bool {
        false
    }
    fn set_interrupt_shadow(&mut self, _: bool) {}
    fn nmi_blocked(&self) -> bool {
        false
    }
}
