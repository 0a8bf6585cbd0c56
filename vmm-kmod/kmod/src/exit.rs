//! Exits that are handled with interrupts off, without leaving the inner loop.

use vmm_abi::exit::{self as user, Exit as UserExit, Inout, VmExit};
use vmm_abi::raw_exit::VmExitRaw;
use vmm_core::chipset::Chipset;
use vmm_core::cpu::{CrAccess, DrAccess, Event, Exit, Gpr, IoExit, RFLAGS_IF, Reg, Seg};
use vmm_core::cpuid::DynState;
use vmm_core::lapic::Effect;
use vmm_core::msr::{MsrRead, MsrWrite, efer_change_allowed};
use vmm_core::pmtmr;
use vmm_core::stats::Stat;
use vmm_hw::backend::{ApicMode, RunCpu};
use vmm_hw::cr::{self, Controls};
use vmm_hw::msr;

use crate::emulate::{Fault, apply};
use crate::klog;
use crate::os;
use crate::regs;
use crate::run::{Runner, Todo};

const CR4_OSXSAVE: u64 = 1 << 18;

impl<C: RunCpu> Runner<'_, C> {
    /// None: enter the guest again.
    #[inline]
    pub fn handle(&mut self, exit: Exit) -> Option<Todo> {
        match exit {
            Exit::Cpuid => self.cpuid(),
            Exit::Rdmsr => self.rdmsr(),
            Exit::Wrmsr => self.wrmsr(),
            Exit::Io(io) => self.io(io),
            Exit::Hlt => self.hlt(),
            Exit::InterruptWindow | Exit::NmiWindow => {
                self.vcpu.stats.inc(Stat::IntrWindow);
                self.inner.attention = true;
                None
            }
            Exit::HostInterrupt => {
                self.vcpu.stats.inc(Stat::ExtIntr);
                self.host_interrupts();
                None
            }
            Exit::PreemptionTimer => {
                self.vcpu.stats.inc(Stat::PreemptionTimer);
                // See `Config::longest_stay`.
                self.host_interrupts();
                None
            }
            Exit::NestedFault {
                gpa,
                gla,
                access,
                during_walk,
            } => {
                if !during_walk && let Some(done) = self.device_at_once(gpa, gla) {
                    return done;
                }
                Some(Todo::Fault(Fault {
                    gpa,
                    gla,
                    access,
                    during_walk,
                }))
            }
            Exit::ApicWrite { offset } => self.apic_write(offset),
            Exit::ApicAccess { offset, .. } => {
                self.vcpu.stats.inc(Stat::ApicAccess);
                let gpa = self.inner.lapic.base_gpa() | u64::from(offset);
                if let Some(done) = self.device_at_once(gpa, None) {
                    return done;
                }
                Some(Todo::ApicAccess { gpa })
            }
            Exit::VirtualEoi { vector } => {
                self.vcpu.stats.inc(Stat::VirtualEoi);
                let effect = self.inner.lapic.eoi_virtualized(vector);
                self.effect(effect)
            }
            other => self.handle_rare(other),
        }
    }

    #[cold]
    fn handle_rare(&mut self, exit: Exit) -> Option<Todo> {
        match exit {
            Exit::TprBelowThreshold => {
                self.vcpu.stats.inc(Stat::TprThreshold);
                self.inner.lapic.set_cr8(self.inner.lapic.cr8());
                self.inner.attention = true;
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
                // Somebody else may hold what the guest spins for.
                self.inner.spun(self.vm.active_count());
                Some(Todo::Yield)
            }
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

    /// Lets the host's interrupts in.
    #[inline]
    fn host_interrupts(&mut self) {
        // SAFETY: the guest is not running; its state is in the VMCS and in
        // our save area.
        unsafe { crate::ffi::vmm_host_irq_window() };
    }

    /// Moves behind the instruction that was done.
    #[inline]
    pub fn finish(&mut self) {
        let len = self.inner.hw.inst_len();
        self.inner.hw.advance(len);
    }

    /// The instruction faults instead.
    pub fn fault_with(&mut self, event: Event) -> Option<Todo> {
        self.inner.exception = Some(event);
        self.inner.attention = true;
        None
    }

    /// Leaves for userland; `len` is the length of the instruction that
    /// userland is to do or skip.
    pub fn user(&mut self, len: u8, exit: UserExit) -> Todo {
        let rip = self.inner.hw.reg(Reg::Rip);
        self.inner.exit = VmExit {
            rip,
            inst_length: len,
            exit,
        }
        .to_raw();
        self.inner.next_rip = Some(regs::behind(&self.inner.hw, rip, len));
        Todo::User
    }

    #[inline]
    fn cpuid(&mut self) -> Option<Todo> {
        self.vcpu.stats.inc(Stat::Cpuid);
        let inner = &mut *self.inner;
        let eax = inner.hw.gpr(Gpr::Rax) as u32;
        let ecx = inner.hw.gpr(Gpr::Rcx) as u32;
        let now = if eax == 1 || eax == 0xd {
            DynState {
                osxsave: inner.hw.reg(Reg::Cr4) & CR4_OSXSAVE != 0,
                xcr0: inner.hw.xcr0(),
                xss: 0,
                apic_enabled: inner.lapic.present(),
            }
        } else {
            DynState::default()
        };
        let [a, b, c, d] = inner.cpuid.get(eax, ecx, &now);
        inner.hw.set_gpr(Gpr::Rax, u64::from(a));
        inner.hw.set_gpr(Gpr::Rbx, u64::from(b));
        inner.hw.set_gpr(Gpr::Rcx, u64::from(c));
        inner.hw.set_gpr(Gpr::Rdx, u64::from(d));
        self.finish();
        None
    }

    fn rdmsr(&mut self) -> Option<Todo> {
        self.vcpu.stats.inc(Stat::Rdmsr);
        let inner = &mut *self.inner;
        let msr = inner.hw.gpr(Gpr::Rcx) as u32;
        let value = match inner.msr.rdmsr(msr) {
            MsrRead::Value(v) => Some(v),
            MsrRead::Gp => None,
            MsrRead::Unknown => {
                let len = inner.hw.inst_len();
                return Some(self.user(len, UserExit::Rdmsr { msr }));
            }
            MsrRead::Backend => inner.hw.msr(msr),
            MsrRead::ApicBase => Some(inner.lapic.apic_base()),
            MsrRead::X2Apic(_) => inner.lapic.rdmsr(msr, os::rdtsc()).ok(),
            MsrRead::TscDeadline => Some(inner.lapic.tsc_deadline(os::rdtsc())),
            MsrRead::Tsc => Some(
                self.vm
                    .guest_tsc(os::rdtsc())
                    .wrapping_add(inner.tsc_adjust),
            ),
        };
        let Some(value) = value else {
            return self.fault_with(Event::GP0);
        };
        self.inner.hw.set_gpr(Gpr::Rax, value & 0xffff_ffff);
        self.inner.hw.set_gpr(Gpr::Rdx, value >> 32);
        self.finish();
        None
    }

    fn wrmsr(&mut self) -> Option<Todo> {
        self.vcpu.stats.inc(Stat::Wrmsr);
        let inner = &mut *self.inner;
        let msr = inner.hw.gpr(Gpr::Rcx) as u32;
        let value = inner.hw.gpr(Gpr::Rax) & 0xffff_ffff | inner.hw.gpr(Gpr::Rdx) << 32;
        match inner.msr.wrmsr(msr, value) {
            MsrWrite::Done => {}
            MsrWrite::Gp => return self.fault_with(Event::GP0),
            MsrWrite::Unknown => {
                let len = inner.hw.inst_len();
                return Some(self.user(len, UserExit::Wrmsr { msr, value }));
            }
            MsrWrite::Backend => {
                if inner.hw.set_msr(msr, value) != msr::MsrWrite::Done {
                    return self.fault_with(Event::GP0);
                }
            }
            MsrWrite::Efer => {
                let cr0 = inner.hw.reg(Reg::Cr0);
                let old = inner.hw.reg(Reg::Efer);
                if !efer_change_allowed(old, value, cr0) {
                    return self.fault_with(Event::GP0);
                }
                let lma = old & vmm_core::cpu::EFER_LMA;
                inner
                    .hw
                    .set_reg(Reg::Efer, value & !vmm_core::cpu::EFER_LMA | lma);
            }
            MsrWrite::ApicBase => {
                let Ok(effect) = inner.lapic.set_apic_base(value) else {
                    return self.fault_with(Event::GP0);
                };
                self.finish();
                return self.effect(effect);
            }
            MsrWrite::X2Apic(_) => {
                let Ok(effect) = inner.lapic.wrmsr(msr, value, os::rdtsc()) else {
                    return self.fault_with(Event::GP0);
                };
                inner.attention = true;
                self.finish();
                return self.effect(effect);
            }
            MsrWrite::TscDeadline => {
                // Guest's TSC to the host's; the difference is constant.
                let host = value
                    .wrapping_sub(inner.tsc_adjust)
                    .wrapping_add(self.vm.tsc_base);
                let now = os::rdtsc();
                let effect = inner.lapic.set_tsc_deadline(value, host, now);
                // One that has passed has fired.
                inner.attention |= host <= now;
                self.finish();
                return self.effect(effect);
            }
            MsrWrite::Tsc => {
                let now = self
                    .vm
                    .guest_tsc(os::rdtsc())
                    .wrapping_add(inner.tsc_adjust);
                let delta = value.wrapping_sub(now);
                inner.msr.tsc_moved(delta);
                self.move_tsc(delta);
            }
            MsrWrite::TscAdjust(delta) => self.move_tsc(delta),
        }
        self.finish();
        None
    }

    fn move_tsc(&mut self, delta: u64) {
        self.inner.tsc_adjust = self.inner.tsc_adjust.wrapping_add(delta);
        self.inner.apply_tsc(self.vm);
    }

    /// Does what a register write of the local APIC asks for.
    pub fn effect(&mut self, effect: Effect) -> Option<Todo> {
        match effect {
            Effect::None | Effect::TimerChanged => None,
            Effect::ModeChanged => {
                let mode = self.inner.lapic_mode();
                self.inner.hw.set_apic_mode(mode);
                self.inner.attention = true;
                Some(Todo::ApicMode {
                    virtualized: mode == ApicMode::XApic,
                })
            }
            other => apply(self.vm, other).then_some(Todo::Spinup),
        }
    }

    fn apic_write(&mut self, offset: u16) -> Option<Todo> {
        self.vcpu.stats.inc(Stat::ApicWrite);
        let effect = self.inner.lapic.apic_write_done(offset, os::rdtsc());
        self.inner.attention = true;
        self.effect(effect)
    }

    fn io(&mut self, io: IoExit) -> Option<Todo> {
        self.vcpu.stats.inc(Stat::Inout);
        let len = self.inner.hw.inst_len();
        if io.string {
            return Some(self.io_string(io, len));
        }
        let rax = self.inner.hw.gpr(Gpr::Rax);
        // A guest's clock, perhaps: before anything else, and without a lock.
        if io.port == pmtmr::PORT && io.input && io.size == 4 {
            let value = self.vm.pm_timer.read(os::rdtsc());
            self.inner.hw.set_gpr(Gpr::Rax, u64::from(value));
            self.finish();
            return None;
        }
        if Chipset::claims_port(io.port) {
            let mask = if io.size >= 4 {
                u32::MAX
            } else {
                (1 << (8 * io.size)) - 1
            };
            if io.input {
                let value = if Chipset::is_counter_port(io.port, io.size) {
                    self.vm
                        .look_at_chipset(|c, now, sink| c.io_read(io.port, io.size, now, sink))
                } else {
                    self.vm
                        .with_chipset(|c, now, sink| c.io_read(io.port, io.size, now, sink))
                } & mask;
                let rax = match io.size {
                    4 => u64::from(value),
                    _ => rax & !u64::from(mask) | u64::from(value),
                };
                self.inner.hw.set_gpr(Gpr::Rax, rax);
            } else {
                let value = rax as u32 & mask;
                self.vm
                    .with_chipset(|c, now, sink| c.io_write(io.port, io.size, value, now, sink));
            }
            self.finish();
            return None;
        }
        if io.size == 1 {
            if !io.input {
                if self.vm.out_rings.push(io.port, rax as u8) {
                    self.finish();
                    return None;
                }
            } else if let Some(value) = self.vm.constant_ports.get(io.port) {
                let rax = rax & !0xff | u64::from(value);
                self.inner.hw.set_gpr(Gpr::Rax, rax);
                self.finish();
                return None;
            }
        }
        Some(self.inout_exit(&io, len, rax as u32))
    }

    /// Leaves for userland with an IN or OUT: what `user` does, but as this is
    /// by far the most frequent exit, without the enum on the way.
    fn inout_exit(&mut self, io: &IoExit, len: u8, eax: u32) -> Todo {
        let rip = self.inner.hw.reg(Reg::Rip);
        let inout = Inout {
            port: io.port,
            bytes: io.size,
            input: io.input,
            string: false,
            rep: false,
            eax,
        }
        .to_raw();
        let code = vmm_abi::ExitCode::Inout.raw();
        let exit = &mut self.inner.exit;
        if exit.exitcode != code {
            // The union's other bytes stay zero from one IN or OUT to the next.
            *exit = VmExitRaw::default();
            exit.exitcode = code;
        }
        exit.inst_length = i32::from(len);
        exit.rip = rip;
        let raw = u64::from(inout.flags) | u64::from(inout.port) << 16 | u64::from(inout.eax) << 32;
        if let Some(payload) = exit.u.first_chunk_mut::<8>() {
            *payload = raw.to_le_bytes();
        }
        self.inner.next_rip = Some(regs::behind(&self.inner.hw, rip, len));
        Todo::User
    }

    fn io_string(&mut self, io: IoExit, len: u8) -> Todo {
        let hw = &self.inner.hw;
        let Some(info) = io.string_info else {
            return self.vmx_exit(Exit::Io(io));
        };
        let seg = if io.input { Seg::Es } else { info.seg };
        let mask = match info.addr_size {
            2 => 0xffff,
            4 => 0xffff_ffff,
            _ => u64::MAX,
        };
        let index = hw.gpr(if io.input { Gpr::Rdi } else { Gpr::Rsi }) & mask;
        let count = if io.rep { hw.gpr(Gpr::Rcx) & mask } else { 1 };
        let exit = UserExit::InoutStr(user::InoutStr {
            inout: Inout {
                port: io.port,
                bytes: io.size,
                input: io.input,
                string: true,
                rep: io.rep,
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

    fn hlt(&mut self) -> Option<Todo> {
        self.vcpu.stats.inc(Stat::Hlt);
        self.finish();
        // An interrupt that is already there ends the halt at once.
        let inner = &mut *self.inner;
        inner.lapic.sync();
        if inner.hw.reg(Reg::Rflags) & RFLAGS_IF != 0 && inner.lapic.pending().is_some() {
            inner.attention = true;
            return None;
        }
        Some(Todo::Halt)
    }

    fn cr(&mut self, access: CrAccess) -> Option<Todo> {
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

    fn write_cr(&mut self, which: u8, value: u64) -> Option<Todo> {
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
            return Some(Todo::LoadPdptes(new));
        }
        self.commit_cr(&now, &new);
        self.finish();
        None
    }

    /// The second half of a MOV to CR0 or CR4 that loaded the PDPTEs.
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
    fn vmx_exit(&mut self, exit: Exit) -> Todo {
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
