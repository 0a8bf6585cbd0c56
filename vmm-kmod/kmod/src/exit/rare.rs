//! Exits that come seldom: control and debug registers, exceptions, string
//! I/O, and all that ends in userland.

use vmm_abi::exit::{self as user, Exit as UserExit, Inout};
use vmm_core::cpu::{CrAccess, DrAccess, Event, Exit, Gpr, IoExit, Reg, Seg};
use vmm_core::stats::Stat;
use vmm_hw::backend::VirtualCpu;
use vmm_hw::cr::{self, Controls};

use super::CR4_OSXSAVE;
use crate::klog;
use crate::regs;
use crate::run::{Later, Runner, Todo};

impl Runner<'_, dyn VirtualCpu> {
    #[cold]
    pub(super) fn handle_rare(&mut self, exit: Exit) -> Option<Todo> {
        match exit {
            Exit::TprBelowThreshold => {
                self.vcpu.stats.inc(Stat::TprThreshold);
                self.inner.lapic.set_cr8(self.inner.lapic.cr8());
                self.inner.attention = true;
                None
            }
            Exit::IpiToWaiting => {
                self.wake_targets();
                None
            }
            Exit::Cr(access) => self.cr(access),
            Exit::Dr(access) => self.dr(access),
            Exit::Pause => {
                self.vcpu.stats.inc(Stat::Pause);
                self.finish();
                if self.inner.pause_exit {
                    return Some(self.user(0, UserExit::Pause));
                }
                // Another vCPU, which wants this CPU, may hold what the guest spins for.
                let active = self.vm.active_count();
                self.inner.spun(active);
                Some(if active > 1 {
                    Todo::GiveWay
                } else {
                    Todo::Yield
                })
            }
            Exit::Hypercall => self.hypercall(),
            Exit::Monitor | Exit::Mwait | Exit::VirtualizationInstruction => {
                self.vcpu.stats.inc(Stat::Exceptions);
                self.fault_with(Event::UD)
            }
            Exit::Rdpmc => self.fault_with(Event::GP0),
            Exit::Xsetbv => self.xsetbv(),
            Exit::CacheControl => {
                // Guest memory is coherent: nothing to flush.
                self.finish();
                None
            }
            Exit::HostNmi => {
                self.vcpu.stats.inc(Stat::HostNmi);
                None
            }
            Exit::Exception {
                event,
                qualification,
            } => self.exception(event, qualification),
            Exit::Mtf => {
                self.vcpu.stats.inc(Stat::Mtf);
                Some(self.user(0, UserExit::Mtrap))
            }
            Exit::TripleFault => {
                klog!(
                    Info,
                    "vCPU {}: triple fault at rip {:#x}",
                    self.vcpu.id,
                    self.inner.hw.reg(Reg::Rip)
                );
                let _ = self.vm.suspend(vmm_abi::SuspendHow::TripleFault.raw());
                Some(Todo::Yield)
            }
            Exit::TaskSwitch { selector, reason } => Some(self.task_switch(selector, reason)),
            Exit::InitSignal | Exit::PmlFull => None,
            Exit::InvalidGuestState { .. } | Exit::EntryFailed { .. } => {
                self.log_entry_failure();
                Some(self.vmx_exit(exit))
            }
            other => Some(self.vmx_exit(other)),
        }
    }

    #[inline(never)]
    pub(super) fn io_string(&mut self, io: IoExit, len: u8) -> Todo {
        let hw = &self.inner.hw;
        let Some(info) = io.string_info else {
            return self.vmx_exit(Exit::Io(io));
        };
        let seg = if io.input() { Seg::Es } else { info.seg };
        let mask = match info.addr_size {
            2 => 0xffff,
            4 => 0xffff_ffff,
            _ => u64::MAX,
        };
        let index = hw.gpr(if io.input() { Gpr::Rdi } else { Gpr::Rsi }) & mask;
        let count = if io.rep() { hw.gpr(Gpr::Rcx) & mask } else { 1 };
        let exit = UserExit::InoutStr(user::InoutStr {
            inout: Inout {
                port: io.port(),
                bytes: io.size(),
                input: io.input(),
                string: true,
                rep: io.rep(),
                eax: hw.gpr(Gpr::Rax) as u32,
            },
            paging: regs::paging(hw),
            rflags: hw.reg(Reg::Rflags),
            cr0: hw.reg(Reg::Cr0),
            index,
            count,
            addrsize: info.addr_size,
            seg_name: regs::seg_name(seg),
            seg_desc: regs::abi_desc(hw.seg(seg)),
        });
        self.user(len, exit)
    }

    pub(super) fn cr(&mut self, access: CrAccess) -> Option<Todo> {
        self.vcpu.stats.inc(Stat::CrAccess);
        let ok = match access {
            CrAccess::Write { cr: 8, src } => {
                let value = self.inner.hw.gpr(src);
                if value > 15 {
                    return self.fault_with(Event::GP0);
                }
                self.inner.lapic.set_cr8(value);
                self.inner.attention = true;
                true
            }
            CrAccess::Read { cr: 8, dst } => {
                let value = self.inner.lapic.cr8();
                self.inner.hw.set_gpr(dst, value);
                true
            }
            CrAccess::Write { cr, src } => {
                let value = self.inner.hw.gpr(src);
                // Outside 64-bit mode operands have 32 bits.
                let value = if self.inner.hw.long_mode_code() {
                    value
                } else {
                    value & 0xffff_ffff
                };
                return self.write_cr(cr, value);
            }
            CrAccess::Read { cr, dst } => {
                let reg = match cr {
                    0 => Reg::Cr0,
                    3 => Reg::Cr3,
                    _ => Reg::Cr4,
                };
                let value = self.inner.hw.reg(reg);
                self.inner.hw.set_gpr(dst, value);
                true
            }
            CrAccess::Clts => {
                let cr0 = self.inner.hw.reg(Reg::Cr0) & !cr::CR0_TS;
                self.inner.hw.set_reg(Reg::Cr0, cr0);
                true
            }
            CrAccess::Lmsw(operand) => {
                // PE can be set, not cleared (SDM Vol. 2A "LMSW").
                let old = self.inner.hw.reg(Reg::Cr0);
                let new = old & !0xe | u64::from(operand) & 0xf | old & 1;
                return self.write_cr(0, new);
            }
        };
        if ok {
            self.finish();
        }
        None
    }

    pub(super) fn write_cr(&mut self, which: u8, value: u64) -> Option<Todo> {
        let now = self.inner.hw.controls();
        let mut new = now;
        match which {
            0 => {
                new.cr0 = value & cr::CR0_DEFINED | cr::CR0_ET;
                if !cr::check_cr0(value, &now) {
                    return self.fault_with(Event::GP0);
                }
                new.efer = cr::efer_lma(now.efer, new.cr0);
            }
            4 => {
                new.cr4 = value;
                if !self
                    .inner
                    .hw
                    .check_cr4(value, regs::cr4_allowed(&self.inner.cpuid))
                {
                    return self.fault_with(Event::GP0);
                }
            }
            3 => {
                self.inner.hw.set_reg(Reg::Cr3, value);
                self.finish();
                return None;
            }
            _ => return self.fault_with(Event::UD),
        }
        if cr::reloads_pdptes(&now, &new) {
            // Needs guest memory, which cannot be had with interrupts off.
            return Some(self.later(Later::LoadPdptes(new)));
        }
        self.commit_cr(&now, &new);
        self.finish();
        None
    }

    /// The second half of a MOV to CR0 or CR4 that loaded the PDPTEs.
    #[inline(never)]
    pub fn complete_cr(&mut self, ptes: [u64; 4], new: &Controls) {
        let now = self.inner.hw.controls();
        self.commit_cr(&now, new);
        let [a, b, c, d] = ptes;
        for (reg, pte) in [
            (Reg::Pdpte0, a),
            (Reg::Pdpte1, b),
            (Reg::Pdpte2, c),
            (Reg::Pdpte3, d),
        ] {
            self.inner.hw.set_reg(reg, pte);
        }
        self.finish();
    }

    /// Makes new control registers effective.
    pub fn commit_cr(&mut self, now: &Controls, new: &Controls) {
        let hw = &mut self.inner.hw;
        if new.cr4 != now.cr4 {
            hw.set_reg(Reg::Cr4, new.cr4);
        }
        if new.cr0 != now.cr0 {
            hw.set_reg(Reg::Cr0, new.cr0);
        }
        if new.efer != now.efer {
            hw.set_reg(Reg::Efer, new.efer);
        }
    }

    fn dr(&mut self, access: DrAccess) -> Option<Todo> {
        self.vcpu.stats.inc(Stat::DrAccess);
        let inner = &mut *self.inner;
        // DR4 and DR5 are DR6 and DR7, or nothing with CR4.DE
        // (SDM Vol. 3B §17.2.2).
        let dr = match access.dr {
            4 | 5 if inner.hw.reg(Reg::Cr4) & 8 != 0 => return self.fault_with(Event::UD),
            4 => 6,
            5 => 7,
            n => n,
        };
        if inner.hw.cpl() != 0 {
            return self.fault_with(Event::GP0);
        }
        if inner.hw.reg(Reg::Dr7) & (1 << 13) != 0 {
            // General detect: #DB before any access, with DR6.BD.
            let dr6 = inner.hw.reg(Reg::Dr6) & !0xf | 1 << 13;
            inner.hw.set_reg(Reg::Dr6, dr6);
            let dr7 = inner.hw.reg(Reg::Dr7) & !(1 << 13);
            inner.hw.set_reg(Reg::Dr7, dr7);
            return self.fault_with(Event::exception(1));
        }
        let reg = match dr {
            0 => Reg::Dr0,
            1 => Reg::Dr1,
            2 => Reg::Dr2,
            3 => Reg::Dr3,
            6 => Reg::Dr6,
            _ => Reg::Dr7,
        };
        if access.read {
            let value = inner.hw.reg(reg);
            inner.hw.set_gpr(access.gpr, value);
        } else {
            let long = inner.hw.long_mode_code();
            let value = inner.hw.gpr(access.gpr);
            let value = if long { value } else { value & 0xffff_ffff };
            match dr {
                6 | 7 if value >> 32 != 0 => return self.fault_with(Event::GP0),
                6 => inner.hw.set_reg(reg, value & 0xe00f | 0xffff_0ff0),
                7 => inner.hw.set_reg(reg, value & 0xffff_2fff | 0x400),
                _ => inner.hw.set_reg(reg, value),
            }
        }
        self.finish();
        None
    }

    fn xsetbv(&mut self) -> Option<Todo> {
        self.vcpu.stats.inc(Stat::Xsetbv);
        let inner = &mut *self.inner;
        if inner.hw.reg(Reg::Cr4) & CR4_OSXSAVE == 0 {
            return self.fault_with(Event::UD);
        }
        let index = inner.hw.gpr(Gpr::Rcx) as u32;
        let value = inner.hw.gpr(Gpr::Rax) & 0xffff_ffff | inner.hw.gpr(Gpr::Rdx) << 32;
        let allowed = inner.cpuid.xcr0_allowed();
        let ok = index == 0 && inner.hw.cpl() == 0 && value & !allowed == 0;
        if !ok || !inner.hw.set_xcr0(value) {
            return self.fault_with(Event::GP0);
        }
        self.finish();
        None
    }

    fn exception(&mut self, event: Event, qualification: u64) -> Option<Todo> {
        self.vcpu.stats.inc(Stat::Exceptions);
        if event.vector == 18 {
            // The host has handled its machine check.
            return None;
        }
        if event.vector == 1 {
            // A #DB exit leaves DR6 alone (SDM Vol. 3C §27.1).
            let dr6 = self.inner.hw.reg(Reg::Dr6) & !0xf;
            self.inner
                .hw
                .set_reg(Reg::Dr6, dr6 | qualification & 0xe00f);
        }
        // An exception during the delivery of another event may make a
        // double fault (SDM Vol. 3A §6.15).
        match vmm_core::intinfo::combine(self.inner.vectoring.take(), event) {
            vmm_core::intinfo::Combined::Deliver(event) => self.fault_with(event),
            vmm_core::intinfo::Combined::TripleFault => self.handle_rare(Exit::TripleFault),
        }
    }

    fn task_switch(&mut self, selector: u16, reason: u8) -> Todo {
        self.vcpu.stats.inc(Stat::TaskSwitch);
        let paging = regs::paging(&self.inner.hw);
        let event = self.inner.vectoring.take();
        let exit = UserExit::TaskSwitch(user::TaskSwitch {
            selector,
            external: event.is_some(),
            error_code: event.and_then(|e| e.error_code),
            reason: regs::task_switch_reason(reason),
            paging,
        });
        let len = self.inner.hw.inst_len();
        self.user(len, exit)
    }

    /// What the VMCS held when it was refused, for the log.
    fn log_entry_failure(&self) {
        // The log cuts lines that are too long; failure to print is none.
        let mut dump = crate::os::LogLines::new();
        let _ = self.inner.hw.dump(&mut dump);
        dump.flush();
    }

    /// An exit that only userland can explain.
    pub(super) fn vmx_exit(&mut self, exit: Exit) -> Todo {
        let (status, exit_reason, qualification, inst_error) = match exit {
            Exit::InvalidGuestState {
                reason,
                qualification,
            }
            | Exit::Unhandled {
                reason,
                qualification,
            } => (0, reason, qualification, 0),
            Exit::EntryFailed { error } => (1, 0, 0, error as i32),
            _ => (0, self.inner.hw.exit_reason(), 0, 0),
        };
        let vmx = user::Vmx {
            status,
            exit_reason,
            qualification,
            inst_type: 0,
            inst_error,
        };
        self.user(0, UserExit::Vmx(vmx))
    }
}
