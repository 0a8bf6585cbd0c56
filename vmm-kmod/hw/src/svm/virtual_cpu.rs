//! AMD-V behind the interface that both backends have.

use super::caps::Features;
use super::vcpu::Vcpu;
use crate::backend::{ApicMode, ApicVirt, Completed, PauseExiting, Reset, RunCpu, VirtualCpu};
use crate::cr::Controls;
use crate::error::Error;
use crate::msr::MsrWrite;
use core::fmt;
use vmm_core::cpu::{Event, Exit};
use vmm_core::host::Host;

impl<H: Host> VirtualCpu for Vcpu<H> {
    // A VMCB is in memory, for everybody to read, whenever the guest does not
    // run.
    #[inline]
    fn prepare_migration(&mut self) {}
    unsafe fn make_current(&mut self) -> Result<(), Error> {
        Ok(())
    }
    fn inject(&mut self, event: Event) {
        Vcpu::inject(self, event);
    }
    fn entry_event(&self) -> Option<Event> {
        Vcpu::entry_event(self)
    }
    #[inline(always)]
    fn pending_vectoring(&self) -> Option<Event> {
        Vcpu::pending_vectoring(self)
    }
    fn interruptible(&self) -> bool {
        Vcpu::interruptible(self)
    }
    fn nmi_interruptible(&self) -> bool {
        Vcpu::nmi_interruptible(self)
    }
    fn set_interrupt_window(&mut self, on: bool) {
        // The one thing that AVIC does not take from the page.
        self.avic_tpr();
        Vcpu::set_interrupt_window(self, on);
    }
    fn set_nmi_window(&mut self, on: bool) {
        Vcpu::set_nmi_window(self, on);
    }
    fn set_mtf(&mut self, _: bool) -> bool {
        false
    }
    fn set_invpcid(&mut self, on: bool) -> bool {
        Vcpu::set_invpcid(self, on)
    }
    fn set_pause_exiting(&mut self, when: PauseExiting) -> bool {
        Vcpu::set_pause_exiting(self, when)
    }
    fn set_tsc_offset(&mut self, offset: i64) {
        Vcpu::set_tsc_offset(self, offset);
    }
    fn set_tsc_multiplier(&mut self, multiplier: u64) {
        Vcpu::set_tsc_multiplier(self, multiplier);
    }
    fn has_preemption_timer(&self) -> bool {
        false
    }
    fn has_rdtscp(&self) -> bool {
        self.backend().caps.features.contains(Features::RDTSCP)
    }
    fn apic_virt(&self) -> ApicVirt {
        self.apic_virt
    }
    fn set_apic_mode(&mut self, mode: ApicMode) {
        self.avic_mode(mode);
    }
    fn controls(&self) -> Controls {
        Vcpu::controls(self)
    }
    fn check_cr4(&self, new: u64, allowed: u64) -> bool {
        Vcpu::check_cr4(self, new, allowed)
    }
    fn msr(&self, n: u32) -> Option<u64> {
        Vcpu::msr(self, n)
    }
    fn set_msr(&mut self, n: u32, value: u64) -> MsrWrite {
        Vcpu::set_msr(self, n, value)
    }
    fn xcr0(&self) -> u64 {
        Vcpu::xcr0(self)
    }
    fn set_xcr0(&mut self, value: u64) -> bool {
        Vcpu::set_xcr0(self, value)
    }
    fn reset(&mut self, kind: Reset) {
        Vcpu::reset(self, kind);
    }
    fn sipi(&mut self, vector: u8) {
        Vcpu::sipi(self, vector);
    }
    fn exit_reason(&self) -> u32 {
        Vcpu::exit_reason(self)
    }
    fn field(&self, number: u16) -> Option<u64> {
        Vcpu::field(self, number)
    }
    fn dump(&self, f: &mut dyn fmt::Write) -> fmt::Result {
        Vcpu::dump(self, f)
    }
}

impl<H: Host> RunCpu for Vcpu<H> {
    /// Not even CPUs with NRIP save and decode assists tell everything.
    const DESCRIBES_EXITS: bool = false;
    const TAKES_APIC_STATE: bool = false;

    unsafe fn load(&mut self, fpu_live: bool) -> Result<u32, Error> {
        // SAFETY: by the caller's promise, here and below.
        unsafe { Vcpu::load(self, fpu_live) }
    }
    unsafe fn unload(&mut self) {
        // SAFETY: as above.
        unsafe { Vcpu::unload(self) }
    }
    #[inline(always)]
    unsafe fn enter(&mut self) -> Exit {
        // SAFETY: as above.
        unsafe { Vcpu::enter(self) }
    }
    #[inline(always)]
    fn wants_instruction(&self) -> bool {
        Vcpu::wants_instruction(self)
    }
    #[inline(always)]
    fn complete_plain(&mut self, exit: Exit, bytes: [u8; 3]) -> bool {
        Vcpu::complete_plain(self, exit, &bytes)
    }
    fn complete(&mut self, exit: Exit, bytes: &[u8]) -> Completed {
        Vcpu::complete(self, exit, bytes)
    }
    #[inline(always)]
    fn take_immediate_exit(&mut self) -> bool {
        Vcpu::take_immediate_exit(self)
    }

    // No AMD CPU has L1TF.
    fn request_l1d_flush(&mut self) {}
    // There is no preemption timer, and AVIC knows the APIC from its page.
    fn set_preemption_timer(&mut self, _: Option<u64>) {}
    fn set_rvi(&mut self, _: u8) {}
    fn set_svi(&mut self, _: u8) {}
    fn set_eoi_exit_bitmap(&mut self, _: [u64; 4]) {}
    fn set_tpr_threshold(&mut self, _: u8) {}
}
