//! A vCPU that does nothing: in HLT, or before its start-up IPI.

use core::sync::atomic::Ordering::SeqCst;

use vmm_abi::{Exit as UserExit, SuspendHow};
use vmm_core::cpu::Reg;
use vmm_core::stats::Stat;
use vmm_hw::backend::VirtualCpu;

use super::Runner;
use crate::os;
use crate::vcpu::{Vcpu, Wait};
use crate::vm::Vm;

impl Runner<'_, dyn VirtualCpu> {
    /// Asleep in HLT. True: an exit for userland is in place.
    #[inline(never)]
    pub(super) fn halt(&mut self) -> Result<bool, i32> {
        let enabled = crate::regs::with_current(self.inner, |inner| {
            inner.hw.reg(Reg::Rflags) & vmm_core::cpu::RFLAGS_IF != 0
        });
        let id = self.vcpu.id as usize;
        self.settle_eoi();
        // Before the first look at what may wake it: who finds all halted
        // (below) then also finds what it was woken by.
        self.vm.not_halted(id);
        let inner = &mut *self.inner;
        inner.lapic.sync();
        let now = os::rdtsc();
        if inner.lapic.timer_deadline().is_some_and(|d| d <= now) {
            inner.lapic.timer_tick(now);
        }
        let wakes = inner.lapic.nmi_pending()
            || inner.vectoring.is_some()
            || inner.exception.is_some()
            || enabled && (inner.lapic.pending().is_some() || inner.lapic.extint_pending())
            || inner.lapic.init_pending()
            || self.vcpu.take_unhalt();
        if wakes {
            inner.wait = Wait::No;
            inner.attention = true;
            return Ok(false);
        }
        if !enabled && self.vm.halt(id) && crate::global::get().halt_detection {
            // As FreeBSD's vmm has it, the machine has halted.
            let _ = self.vm.suspend(SuspendHow::Halt.raw());
            return Ok(false);
        }
        let deadline = inner.lapic.timer_deadline();
        let began = now;
        let now = if enabled {
            match self.awake(now, deadline) {
                None => return Ok(false),
                Some(now) => now,
            }
        } else {
            now
        };
        let ns = deadline.map_or(u64::MAX, |d| {
            self.vm.clock.to_ns.apply_up(d.saturating_sub(now))
        });
        let (vm, vcpu) = (self.vm, self.vcpu);
        let signal = self.vcpu.sleep(ns, || leave_sleep(vm, vcpu));
        self.inner
            .halt_poll
            .slept(os::rdtsc().saturating_sub(began));
        if signal && os::yield_now() {
            self.leave_with(UserExit::Bogus);
            return Ok(true);
        }
        Ok(false)
    }

    /// Waits awake for the end of HLT as long as that pays (`HaltPoll`) and the host
    /// has nothing else for this CPU. None: there may be something to wake for; else
    /// what time it is.
    fn awake(&mut self, mut now: u64, deadline: Option<u64>) -> Option<u64> {
        let until = self.inner.halt_poll.until(now, deadline);
        while now < until && !self.flags.work() && os::alone() {
            // What is put into the mailbox needs no kick now.
            if self.vcpu.mailbox.pending() || leave_sleep(self.vm, self.vcpu) {
                self.vcpu.stats.inc(Stat::HaltPolled);
                return None;
            }
            core::hint::spin_loop();
            now = os::rdtsc();
        }
        if deadline.is_some_and(|d| d <= now) {
            self.vcpu.stats.inc(Stat::HaltPolled);
            return None;
        }
        Some(now)
    }

    /// Waits for a start-up IPI.
    #[inline(never)]
    pub(super) fn wait_for_sipi(&mut self) {
        // It is no HLT that a kick could end, and as long as there is one there is no
        // sleep.
        let _ = self.vcpu.take_unhalt();
        let inner = &mut *self.inner;
        inner.lapic.sync();
        let _ = inner.lapic.take_init();
        if let Some(vector) = inner.lapic.take_sipi() {
            crate::regs::with_current(inner, |inner| inner.hw.sipi(vector));
            inner.wait = Wait::No;
            inner.next_rip = None;
            inner.attention = true;
            return;
        }
        // Awake again for other reasons is possible, so ask each time.
        let (vm, vcpu) = (self.vm, self.vcpu);
        let _ = self.vcpu.sleep(u64::MAX, || leave_sleep(vm, vcpu));
    }
}

/// Whether something other than the mailbox wants a sleeping vCPU.
fn leave_sleep(vm: &Vm, vcpu: &Vcpu) -> bool {
    vm.dying()
        || vm.suspend.load(SeqCst) != 0
        || vcpu.unhalted()
        || vcpu.reqidle.load(SeqCst) != 0
        || vm.debug.contains(vcpu.id as usize)
}
