//! A copy of a vCPU's registers, for emulation that reads guest memory and
//! so cannot keep the VMCS current.

use vmm_core::cpu::{CpuState, Gpr, Reg, Seg, SegDesc};

const SEGS: [Seg; 6] = [Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs];

/// Registers as they were when the guest stopped.
pub struct Snapshot {
    gprs: [u64; 16],
    rip: u64,
    rflags: u64,
    cr0: u64,
    cr2: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
    segs: [SegDesc; 6],
    selectors: [u16; 6],
    shadow: bool,
    inst_len: u8,
    gprs_changed: u16,
    changed: bool,
    cr2_changed: bool,
}

fn gpr(n: usize) -> Gpr {
    Gpr::from_encoding(n as u8)
}

impl Snapshot {
    /// Nothing yet.
    pub fn new() -> Self {
        Snapshot {
            gprs: [0; 16],
            rip: 0,
            rflags: 0,
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            segs: [SegDesc::default(); 6],
            selectors: [0; 6],
            shadow: false,
            inst_len: 0,
            gprs_changed: 0,
            changed: false,
            cr2_changed: false,
        }
    }

    /// Copies what emulation can need; the VMCS is current. In place, for a copy of
    /// all of it costs more than taking it.
    pub fn take(&mut self, cpu: &(impl CpuState + ?Sized), next_rip: Option<u64>) {
        self.rip = next_rip.unwrap_or_else(|| cpu.reg(Reg::Rip));
        self.rflags = cpu.reg(Reg::Rflags);
        self.cr0 = cpu.reg(Reg::Cr0);
        self.cr3 = cpu.reg(Reg::Cr3);
        self.cr4 = cpu.reg(Reg::Cr4);
        self.efer = cpu.reg(Reg::Efer);
        self.shadow = cpu.interrupt_shadow();
        self.inst_len = cpu.inst_len();
        for (n, v) in self.gprs.iter_mut().enumerate() {
            *v = cpu.gpr(gpr(n));
        }
        for ((seg, desc), sel) in SEGS
            .into_iter()
            .zip(&mut self.segs)
            .zip(&mut self.selectors)
        {
            *desc = cpu.seg(seg);
            *sel = cpu.selector(seg);
        }
    }

    /// Whether there is anything to put back.
    pub fn is_changed(&self) -> bool {
        self.gprs_changed != 0 || self.changed || self.cr2_changed
    }

    /// Puts back what has changed; the VMCS is current.
    pub fn put(&self, cpu: &mut (impl CpuState + ?Sized)) {
        for (n, v) in self.gprs.iter().enumerate() {
            if self.gprs_changed & (1 << n) != 0 {
                cpu.set_gpr(gpr(n), *v);
            }
        }
        if self.changed {
            cpu.set_reg(Reg::Rip, self.rip);
            cpu.set_reg(Reg::Rflags, self.rflags);
            cpu.set_interrupt_shadow(self.shadow);
        }
        if self.cr2_changed {
            cpu.set_reg(Reg::Cr2, self.cr2);
        }
    }
}

impl CpuState for Snapshot {
    fn gpr(&self, r: Gpr) -> u64 {
        self.gprs.get(r as usize).copied().unwrap_or(0)
    }

    fn set_gpr(&mut self, r: Gpr, v: u64) {
        if let Some(slot) = self.gprs.get_mut(r as usize) {
            *slot = v;
            self.gprs_changed |= 1 << (r as u16);
        }
    }

    fn reg(&self, r: Reg) -> u64 {
        match r {
            Reg::Rip => self.rip,
            Reg::Rflags => self.rflags,
            Reg::Cr0 => self.cr0,
            Reg::Cr2 => self.cr2,
            Reg::Cr3 => self.cr3,
            Reg::Cr4 => self.cr4,
            Reg::Efer => self.efer,
            // Emulated instructions use no others.
            _ => 0,
        }
    }

    fn set_reg(&mut self, r: Reg, v: u64) {
        match r {
            Reg::Rip => self.rip = v,
            Reg::Rflags => self.rflags = v,
            Reg::Cr2 => {
                self.cr2 = v;
                self.cr2_changed = true;
            }
            _ => {}
        }
        self.changed = true;
    }

    fn seg(&self, s: Seg) -> SegDesc {
        self.segs.get(s as usize).copied().unwrap_or_default()
    }

    /// Emulated instructions load no segments.
    fn set_seg(&mut self, _: Seg, _: SegDesc) {}

    fn selector(&self, s: Seg) -> u16 {
        self.selectors.get(s as usize).copied().unwrap_or(0)
    }

    /// Emulated instructions load no segments.
    fn set_selector(&mut self, _: Seg, _: u16) {}

    fn inst_len(&self) -> u8 {
        self.inst_len
    }

    fn interrupt_shadow(&self) -> bool {
        self.shadow
    }

    fn set_interrupt_shadow(&mut self, on: bool) {
        self.shadow = on;
        self.changed = true;
    }

    fn nmi_blocked(&self) -> bool {
        false
    }
}
