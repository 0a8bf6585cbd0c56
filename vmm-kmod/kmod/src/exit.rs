//! Exits that are handled with interrupts off, without leaving the inner loop:
//! the frequent ones here, the others in [`rare`].

mod rare;

use core::ffi::c_uint;

use vmm_abi::exit::{Exit as UserExit, VmExit};
use vmm_abi::raw_exit::VmExitRaw;
use vmm_core::chipset::Chipset;
use vmm_core::cpu::{Event, Exit, Gpr, IoExit, RFLAGS_IF, Reg};
use vmm_core::cpuid::DynState;
use vmm_core::lapic::Effect;
use vmm_core::msr::{MsrRead, MsrWrite, efer_change_allowed};
use vmm_core::pmtmr;
use vmm_core::stats::Stat;
use vmm_hw::backend::{ApicMode, RunCpu, VirtualCpu};
use vmm_hw::msr;

use crate::doorbells::Rung;
use crate::emulate::{Fault, apply};
use crate::os;
use crate::regs;
use crate::run::{Later, Runner, Todo};
use crate::vm::Sink;

const CR4_OSXSAVE: u64 = 1 << 18;

impl<C: RunCpu + 'static> Runner<'_, C> {
    /// None: enter the guest again.
    #[inline]
    #[optimize(speed)]
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
                self.host_interrupts(self.inner.hw.acknowledged());
                None
            }
            Exit::PreemptionTimer => {
                self.vcpu.stats.inc(Stat::PreemptionTimer);
                // See `Config::longest_stay`.
                self.host_interrupts(None);
                None
            }
            Exit::NestedFault {
                gpa,
                gla,
                access,
                during_walk,
            } => {
                if !during_walk {
                    if let Some(done) = self.cold().device_at_once(gpa, gla) {
                        return done;
                    }
                    if let Some(todo) = self.cold().user_at_once(gpa, gla) {
                        return Some(todo);
                    }
                }
                Some(self.later(Later::Fault(Fault {
                    gpa,
                    gla,
                    access,
                    during_walk,
                })))
            }
            Exit::ApicWrite { offset } => self.apic_write(offset),
            Exit::ApicAccess { offset, .. } => {
                self.vcpu.stats.inc(Stat::ApicAccess);
                let gpa = self.inner.lapic.base_gpa() | u64::from(offset);
                if let Some(done) = self.cold().device_at_once(gpa, None) {
                    return done;
                }
                Some(self.later(Later::ApicAccess { gpa }))
            }
            Exit::VirtualEoi { vector } => {
                self.vcpu.stats.inc(Stat::VirtualEoi);
                let effect = self.inner.lapic.eoi_virtualized(vector);
                self.effect(effect)
            }
            other => self.cold().handle_rare(other),
        }
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
            MsrRead::Unknown => match self.cold().pv_rdmsr(msr) {
                Some(v) => Some(v),
                None => {
                    let len = self.inner.hw.inst_len();
                    return Some(self.user(len, UserExit::Rdmsr { msr }));
                }
            },
            MsrRead::Backend => inner.hw.msr(msr),
            MsrRead::ApicBase => Some(inner.lapic.apic_base()),
            MsrRead::X2Apic(_) => {
                let _ = self.take_eoi();
                self.inner.lapic.rdmsr(msr, os::rdtsc()).ok()
            }
            MsrRead::TscDeadline => Some(inner.lapic.tsc_deadline(os::rdtsc())),
            MsrRead::Tsc => Some(inner.guest_tsc(self.vm, os::rdtsc())),
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
                if let Some(todo) = self.cold().pv_wrmsr(msr, value) {
                    return Some(todo);
                }
                let len = self.inner.hw.inst_len();
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
                let _ = self.take_eoi();
                let inner = &mut *self.inner;
                let Ok(effect) = inner.lapic.wrmsr(msr, value, os::rdtsc()) else {
                    return self.fault_with(Event::GP0);
                };
                inner.attention = true;
                self.finish();
                return self.effect(effect);
            }
            MsrWrite::TscDeadline => {
                let now = os::rdtsc();
                let host = inner.host_tsc(self.vm, value, now);
                let effect = inner.lapic.set_tsc_deadline(value, host, now);
                // One that has passed has fired.
                inner.attention |= host <= now;
                self.finish();
                return self.effect(effect);
            }
            MsrWrite::Tsc => {
                let now = inner.guest_tsc(self.vm, os::rdtsc());
                let delta = value.wrapping_sub(now);
                inner.msr.tsc_moved(delta);
                return self.move_tsc(delta);
            }
            MsrWrite::TscAdjust(delta) => return self.move_tsc(delta),
        }
        self.finish();
        None
    }

    #[cold]
    fn move_tsc(&mut self, delta: u64) -> Option<Todo> {
        self.inner.tsc_adjust = self.inner.tsc_adjust.wrapping_add(delta);
        self.inner.apply_tsc(self.vm);
        self.finish();
        if self.pv_clock_used() {
            return Some(self.later(Later::PvClock));
        }
        None
    }

    fn apic_write(&mut self, offset: u16) -> Option<Todo> {
        self.vcpu.stats.inc(Stat::ApicWrite);
        let _ = self.take_eoi();
        let effect = self.inner.lapic.apic_write_done(offset, os::rdtsc());
        self.inner.attention = true;
        self.effect(effect)
    }

    fn io(&mut self, io: IoExit) -> Option<Todo> {
        self.vcpu.stats.inc(Stat::Inout);
        let len = self.inner.hw.inst_len();
        if io.string() {
            return Some(self.cold().io_string(io, len));
        }
        let rax = self.inner.hw.gpr(Gpr::Rax);
        // A guest's clock, perhaps: before anything else, and without a lock.
        if io.word() == const { IoExit::new(pmtmr::PORT, 4, true).word() } {
            let value = self.vm.pm_timer.read(os::rdtsc());
            self.inner.hw.set_gpr(Gpr::Rax, u64::from(value));
            self.finish();
            return None;
        }
        if Chipset::claims_port(io.port()) {
            let mask = if io.size() >= 4 {
                u32::MAX
            } else {
                (1 << (8 * io.size())) - 1
            };
            if io.input() {
                let value = if Chipset::is_counter_port(io.port(), io.size()) {
                    self.vm
                        .look_at_chipset(|c, now, sink| c.io_read(io.port(), io.size(), now, sink))
                } else {
                    self.vm
                        .with_chipset(|c, now, sink| c.io_read(io.port(), io.size(), now, sink))
                } & mask;
                let rax = match io.size() {
                    4 => u64::from(value),
                    _ => rax & !u64::from(mask) | u64::from(value),
                };
                self.inner.hw.set_gpr(Gpr::Rax, rax);
            } else {
                let value = rax as u32 & mask;
                let write = |c: &mut Chipset, now, sink: &mut Sink<'_>| {
                    c.io_write(io.port(), io.size(), value, now, sink);
                };
                if Chipset::is_latch(io.port(), io.size(), value) {
                    self.vm.look_at_chipset(write);
                } else {
                    self.vm.with_chipset(write);
                }
            }
            self.finish();
            return None;
        }
        if io.size() == 1 {
            if !io.input() {
                if self.vm.out_rings.push(io.port(), rax as u8) {
                    self.finish();
                    return None;
                }
            } else if let Some(value) = self.vm.constant_ports.get(io.port()) {
                let rax = rax & !0xff | u64::from(value);
                self.inner.hw.set_gpr(Gpr::Rax, rax);
                self.finish();
                return None;
            }
        }
        if !io.input()
            && let Some(rung) = self.vm.doorbells.ring(io.port(), io.size(), rax as u32)
        {
            return self.rung(rung, &io, len, rax as u32);
        }
        Some(self.inout_exit(&io, len, rax as u32))
    }

    /// An OUT has rung a doorbell.
    #[cfg(not(feature = "freebsd"))]
    fn rung(&mut self, (): Rung, _: &IoExit, _: u8, _: u32) -> Option<Todo> {
        self.finish();
        None
    }

    /// An OUT that is to ring a doorbell; should that be gone, it is userland's.
    #[cfg(feature = "freebsd")]
    fn rung(&mut self, rung: Rung, io: &IoExit, len: u8, eax: u32) -> Option<Todo> {
        let _ = self.inout_exit(io, len, eax);
        Some(self.later(Later::Ring(rung)))
    }

    /// Leaves for userland with an IN or OUT: what `user` does, but as this is
    /// by far the most frequent exit, without the enum on the way.
    fn inout_exit(&mut self, io: &IoExit, len: u8, eax: u32) -> Todo {
        let rip = self.inner.hw.reg(Reg::Rip);
        let code = vmm_abi::ExitCode::Inout.raw();
        let exit = &mut self.inner.exit;
        if exit.exitcode != code {
            // The union's other bytes stay zero from one IN or OUT to the next.
            *exit = VmExitRaw::default();
            exit.exitcode = code;
        }
        exit.inst_length = i32::from(len);
        exit.rip = rip;
        // `InoutRaw` is the same word, but for the size, which is itself there.
        let raw = u64::from(io.word() + 1) | u64::from(eax) << 32;
        if let Some(payload) = exit.u.first_chunk_mut::<8>() {
            *payload = raw.to_le_bytes();
        }
        self.inner.next_rip = Some(regs::behind(&self.inner.hw, rip, len));
        Todo::User
    }

    fn hlt(&mut self) -> Option<Todo> {
        self.vcpu.stats.inc(Stat::Hlt);
        self.finish();
        // An interrupt that is already there ends the halt at once.
        let _ = self.take_eoi();
        let inner = &mut *self.inner;
        inner.lapic.sync();
        if inner.hw.reg(Reg::Rflags) & RFLAGS_IF != 0 && inner.lapic.pending().is_some() {
            inner.attention = true;
            return None;
        }
        Some(Todo::Halt)
    }
}

impl<C: VirtualCpu + ?Sized> Runner<'_, C> {
    /// Lets the host's interrupts in; first the one that the CPU has acknowledged.
    #[inline]
    pub fn host_interrupts(&mut self, acknowledged: Option<u8>) {
        let vector = acknowledged.map_or(0, c_uint::from);
        // SAFETY: the guest is not running; its state is in the VMCS, in the
        // FPU, which nobody uses meanwhile, and in our save area.
        let more = unsafe { crate::ffi::vmm_host_irq_window(vector) };
        if more != 0 {
            self.inner.unfinished.host_work = true;
            self.inner.attention = true;
        }
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
    #[optimize(speed)]
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

    /// Does what a register write of the local APIC asks for.
    #[inline]
    pub fn effect(&mut self, effect: Effect) -> Option<Todo> {
        match effect {
            Effect::None | Effect::TimerChanged => None,
            Effect::ModeChanged => {
                let mode = self.inner.lapic_mode();
                self.inner.hw.set_apic_mode(mode);
                self.inner.attention = true;
                Some(self.later(Later::ApicMode {
                    virtualized: mode == ApicMode::XApic,
                }))
            }
            other => apply(self.vm, other).then_some(Todo::Spinup),
        }
    }
}
