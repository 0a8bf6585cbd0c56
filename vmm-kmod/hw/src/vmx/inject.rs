//! What goes into the guest with the next VM entry, and what makes it exit.

use super::caps::Features;
use super::fields::{interruptibility, intr_info, proc1, proc2, vmcs};
use super::instr::vmwrite;
use super::vcpu::Vcpu;
pub use crate::backend::PauseExiting;
use vmm_core::cpu::{CR0_PE, CpuState, Event, EventKind, RFLAGS_IF, pushes_error_code};
use vmm_core::host::Host;

/// Interruption information and error code of an event. Whether there is an
/// error code follows from the event, or the entry would fail (SDM Vol. 3C
/// §26.2.1.3): it is left out, or 0, where the event has it otherwise.
pub(super) fn encode(e: Event, protected: bool) -> (u32, u32) {
    let info = intr_info::VALID | (e.kind as u32) << 8 | u32::from(e.vector);
    if e.kind == EventKind::Exception && pushes_error_code(e.vector) && protected {
        // The upper 16 bits must be 0.
        (
            info | intr_info::ERROR_CODE,
            e.error_code.unwrap_or(0) & 0xffff,
        )
    } else {
        (info, 0)
    }
}

/// The event that interruption information describes.
pub(super) fn decode(
    info: u32,
    error_code: impl Fn() -> u32,
    inst_len: impl Fn() -> u8,
) -> Option<Event> {
    if info & intr_info::VALID == 0 {
        return None;
    }
    let kind = match (info & intr_info::TYPE) >> 8 {
        0 => EventKind::External,
        2 => EventKind::Nmi,
        3 => EventKind::Exception,
        4 => EventKind::SoftwareInterrupt,
        5 => EventKind::PrivilegedSoftwareException,
        6 => EventKind::SoftwareException,
        _ => return None,
    };
    let software = matches!(
        kind,
        EventKind::SoftwareInterrupt
            | EventKind::PrivilegedSoftwareException
            | EventKind::SoftwareException
    );
    Some(Event {
        kind,
        vector: (info & intr_info::VECTOR) as u8,
        error_code: (info & intr_info::ERROR_CODE != 0).then(error_code),
        inst_len: if software { inst_len() } else { 0 },
    })
}

/// TSC ticks until a deadline as a preemption-timer value: rounded up, at
/// most what the field holds (the timer then ends early, and is set again).
#[inline(always)]
pub(super) fn preemption_ticks(tsc: u64, rate: u8) -> u32 {
    let unit = 1u64 << (rate & 31);
    let ticks = tsc.div_ceil(unit);
    u32::try_from(ticks).unwrap_or(u32::MAX)
}

/// All of these need the VMCS to be current.
impl<H: Host> Vcpu<H> {
    /// Delivers `event` with the next entry, in place of any other.
    #[cfg_attr(target_os = "none", optimize(speed))]
    pub fn inject(&mut self, event: Event) {
        let exception = event.kind == EventKind::Exception;
        let protected = exception && self.vmread(vmcs::GUEST_CR0) & CR0_PE != 0;
        let (info, code) = encode(event, protected);
        if info & intr_info::ERROR_CODE != 0 {
            // SAFETY: the VMCS is current; the upper 16 bits are 0.
            unsafe { vmwrite(vmcs::ENTRY_ERROR_CODE, u64::from(code)) };
        }
        match event.kind {
            EventKind::Nmi => self.set_nmi_blocked(false),
            EventKind::SoftwareInterrupt
            | EventKind::PrivilegedSoftwareException
            | EventKind::SoftwareException => {
                let len = u64::from(event.inst_len.clamp(1, 15));
                // SAFETY: the VMCS is current; 1 to 15 is valid.
                unsafe { vmwrite(vmcs::ENTRY_INST_LEN, len) };
            }
            // An exception ends the blocking by STI or MOV SS. Left on, it
            // fails the entry when the guest is single-stepping (SDM Vol. 3C
            // §26.3.1.5), which its user code can arrange.
            EventKind::Exception => self.set_interrupt_shadow(false),
            EventKind::External => {}
        }
        self.set_entry_info(info);
    }

    fn set_entry_info(&mut self, info: u32) {
        self.entry_info = info;
        // SAFETY: the VMCS is current; the value was put together above.
        unsafe { vmwrite(vmcs::ENTRY_INTERRUPTION_INFO, u64::from(info)) };
    }

    /// The event that the next entry delivers.
    pub fn entry_event(&self) -> Option<Event> {
        decode(
            self.entry_info,
            || self.vmread(vmcs::ENTRY_ERROR_CODE) as u32,
            || self.vmread(vmcs::ENTRY_INST_LEN) as u8,
        )
    }

    /// Takes back what [`Vcpu::inject`] planned.
    pub fn cancel_event(&mut self) {
        if self.entry_info != 0 {
            self.set_entry_info(0);
        }
    }

    /// The event whose delivery the last exit interrupted; it must be
    /// injected again, or merged with the fault that interrupted it
    /// (SDM Vol. 3C §27.2.4). Valid until the next entry.
    #[inline(always)]
    pub fn pending_vectoring(&self) -> Option<Event> {
        if self.idt_vectoring & intr_info::VALID == 0 {
            return None;
        }
        decode(
            self.idt_vectoring,
            || self.vmread(vmcs::IDT_VECTORING_ERROR) as u32,
            || self.vmread(vmcs::EXIT_INST_LEN) as u8,
        )
    }

    /// Whether the guest takes an external interrupt at the next instruction:
    /// RFLAGS.IF, no STI or MOV SS shadow, no event planned.
    pub fn interruptible(&self) -> bool {
        self.entry_info == 0
            && self.vmread(vmcs::GUEST_RFLAGS) & RFLAGS_IF != 0
            && self.vmread(vmcs::GUEST_INTERRUPTIBILITY)
                & (interruptibility::STI | interruptibility::MOV_SS)
                == 0
    }

    /// Whether the guest takes an NMI at the next instruction. STI counts as
    /// blocking too: some CPUs refuse the entry otherwise
    /// (SDM Vol. 3C §26.3.1.5).
    pub fn nmi_interruptible(&self) -> bool {
        const BLOCK: u64 = interruptibility::STI | interruptibility::MOV_SS | interruptibility::NMI;
        self.entry_info == 0 && self.vmread(vmcs::GUEST_INTERRUPTIBILITY) & BLOCK == 0
    }

    /// Sets or ends the blocking of NMIs.
    pub fn set_nmi_blocked(&mut self, on: bool) {
        let old = self.vmread(vmcs::GUEST_INTERRUPTIBILITY);
        let new = if on {
            old | interruptibility::NMI
        } else {
            old & !interruptibility::NMI
        };
        if new != old {
            // SAFETY: the VMCS is current; the bit is defined.
            unsafe { vmwrite(vmcs::GUEST_INTERRUPTIBILITY, new) };
        }
    }

    pub(super) fn set_proc1(&mut self, value: u32) {
        if value != self.proc1 {
            self.proc1 = value;
            // SAFETY: the VMCS is current; callers change only bits that the
            // capabilities allow. The same holds for the other controls.
            unsafe { vmwrite(vmcs::PROC_CONTROLS, u64::from(value)) };
        }
    }

    pub(super) fn set_pin(&mut self, value: u32) {
        if value != self.pin {
            self.pin = value;
            // SAFETY: as in `set_proc1`.
            unsafe { vmwrite(vmcs::PIN_CONTROLS, u64::from(value)) };
        }
    }

    pub(super) fn set_proc2(&mut self, value: u32) {
        if value != self.proc2 {
            self.proc2 = value;
            // SAFETY: as in `set_proc1`.
            unsafe { vmwrite(vmcs::PROC2_CONTROLS, u64::from(value)) };
        }
    }

    fn proc1_bit(&mut self, bit: u32, on: bool) {
        let value = if on {
            self.proc1 | bit
        } else {
            self.proc1 & !bit
        };
        self.set_proc1(value);
    }

    fn proc2_bit(&mut self, bit: u32, on: bool) {
        let value = if on {
            self.proc2 | bit
        } else {
            self.proc2 & !bit
        };
        self.set_proc2(value);
    }

    /// Exit (`InterruptWindow`) as soon as the guest can take an interrupt.
    pub fn set_interrupt_window(&mut self, on: bool) {
        self.proc1_bit(proc1::INTERRUPT_WINDOW, on);
    }

    /// Exit (`NmiWindow`) as soon as the guest can take an NMI.
    pub fn set_nmi_window(&mut self, on: bool) {
        self.proc1_bit(proc1::NMI_WINDOW, on);
    }

    /// Whether HLT exits.
    pub fn set_hlt_exiting(&mut self, on: bool) {
        self.proc1_bit(proc1::HLT, on);
    }

    /// Exit after one instruction. False if the CPU cannot.
    pub fn set_mtf(&mut self, on: bool) -> bool {
        let can = self.backend.caps.features.contains(Features::MTF);
        if can {
            self.proc1_bit(proc1::MTF, on);
        }
        can
    }

    /// Whether INVPCID works in the guest (otherwise #UD). False if the CPU
    /// cannot.
    pub fn set_invpcid(&mut self, on: bool) -> bool {
        let can = self.backend.caps.features.contains(Features::INVPCID);
        if can {
            self.proc2_bit(proc2::INVPCID, on);
        }
        can
    }

    /// When PAUSE exits. False if the CPU cannot do that.
    pub fn set_pause_exiting(&mut self, when: PauseExiting) -> bool {
        let features = self.backend.caps.features;
        let (every, in_loop) = match when {
            PauseExiting::Off => (false, false),
            PauseExiting::Every => (true, false),
            PauseExiting::Loop { gap, window } => {
                if !features.contains(Features::PAUSE_LOOP) {
                    return false;
                }
                // SAFETY: the VMCS is current and has the fields; any value
                // is valid.
                unsafe {
                    vmwrite(vmcs::PLE_GAP, u64::from(gap));
                    vmwrite(vmcs::PLE_WINDOW, u64::from(window));
                }
                (false, true)
            }
        };
        if every && !features.contains(Features::PAUSE_EXITING) {
            return false;
        }
        self.proc1_bit(proc1::PAUSE, every);
        self.proc2_bit(proc2::PAUSE_LOOP, in_loop);
        true
    }

    /// Exit (`PreemptionTimer`) once `delta` more TSC ticks have passed in
    /// the guest, and after `Config::longest_stay` in any case. The timer
    /// starts anew with that value on every entry, so a deadline is set again
    /// before each. Only for CPUs that have the timer.
    #[inline]
    pub fn set_preemption_timer(&mut self, delta: Option<u64>) {
        let ticks = match delta {
            None => self.longest_stay,
            Some(tsc) => {
                preemption_ticks(tsc, self.backend.caps.preemption_rate).min(self.longest_stay)
            }
        };
        if ticks != self.preemption_ticks {
            self.preemption_ticks = ticks;
            // SAFETY: the VMCS is current; by the caller's word it has the
            // field, and any value is valid.
            unsafe { vmwrite(vmcs::PREEMPTION_TIMER, u64::from(ticks)) };
        }
    }

    /// What is added to the host's TSC (after scaling) to give the guest's.
    pub fn set_tsc_offset(&mut self, offset: i64) {
        self.tsc_offset = offset;
        // SAFETY: the VMCS is current; any value is valid.
        unsafe { vmwrite(vmcs::TSC_OFFSET, offset as u64) };
    }

    /// The TSC offset in force.
    pub fn tsc_offset(&self) -> i64 {
        self.tsc_offset
    }

    /// The guest's TSC runs at `multiplier / 2^48` of the host's
    /// (SDM Vol. 3C §25.3), which the CPU can do, or at its rate (0).
    pub fn set_tsc_multiplier(&mut self, multiplier: u64) {
        let on = multiplier != 0;
        if on {
            // SAFETY: the VMCS is current and has the field.
            unsafe { vmwrite(vmcs::TSC_MULTIPLIER, multiplier) };
        }
        self.proc2_bit(proc2::TSC_SCALING, on);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_encoding() {
        let soft = Event {
            kind: EventKind::SoftwareInterrupt,
            vector: 0x80,
            error_code: None,
            inst_len: 2,
        };
        let pf = Event::exception_with(14, 0x1f);
        let ext = Event {
            kind: EventKind::External,
            vector: 0xef,
            error_code: None,
            inst_len: 0,
        };
        for e in [soft, pf, ext, Event::UD, Event::GP0] {
            let (info, code) = encode(e, true);
            assert_eq!(decode(info, || code, || e.inst_len), Some(e));
        }
        assert_eq!(encode(pf, true).0, 0x8000_0b0e);
        assert_eq!(decode(0x7fff_ffff, || 0, || 0), None);
        assert_eq!(decode(0x8000_0700, || 0, || 0), None, "type 7 is no event");
    }

    #[test]
    fn error_codes_follow_from_the_event_whatever_was_asked_for() {
        const DELIVER: u32 = intr_info::ERROR_CODE;
        let gp = Event::exception(13);
        assert_eq!(encode(gp, true), (0x8000_030d | DELIVER, 0));
        assert_eq!(encode(gp, false), (0x8000_030d, 0), "real mode pushes none");
        let ud = Event::exception_with(6, 1);
        assert_eq!(encode(ud, true), (0x8000_0306, 0));
        let wide = Event::exception_with(13, 0x1_2345);
        assert_eq!(encode(wide, true).1, 0x2345);
        let int = Event {
            kind: EventKind::SoftwareInterrupt,
            ..Event::GP0
        };
        assert_eq!(encode(int, true).0 & DELIVER, 0, "INT 13 is no #GP");
    }

    #[test]
    fn the_preemption_timer_never_fires_early_by_rounding_nor_wraps() {
        assert_eq!(preemption_ticks(0, 5), 0);
        assert_eq!(preemption_ticks(1, 5), 1);
        assert_eq!(preemption_ticks(64, 5), 2);
        assert_eq!(preemption_ticks(65, 5), 3);
        assert_eq!(preemption_ticks(7, 0), 7);
        assert_eq!(preemption_ticks(u64::MAX, 5), u32::MAX);
    }
}
