//! What goes into the guest with the next entry (APM Vol. 2 §15.20, §15.7.2).

use super::caps::Features;
use super::vcpu::{NmiState, Vcpu};
use super::vmcb::{event, misc1};
use vmm_core::cpu::{CR0_PE, CpuState, Event, EventKind, RFLAGS_IF, Reg, pushes_error_code};
use vmm_core::host::Host;

/// EVENTINJ for an event. Whether there is an error code follows from the
/// event, or the entry would fail.
pub(super) fn encode(e: Event, protected: bool) -> u64 {
    let kind = match e.kind {
        EventKind::External => 0,
        EventKind::Nmi => 2,
        // INT1, INT3 and INTO differ from other exceptions in their RIP, which
        // the caller sees to.
        EventKind::Exception
        | EventKind::PrivilegedSoftwareException
        | EventKind::SoftwareException => 3,
        EventKind::SoftwareInterrupt => 4,
    };
    let info = event::VALID | kind << 8 | u64::from(e.vector);
    if e.kind == EventKind::Exception && pushes_error_code(e.vector) && protected {
        info | event::ERROR_CODE | u64::from(e.error_code.unwrap_or(0)) << 32
    } else {
        info
    }
}

/// The event that EVENTINJ or EXITINTINFO describes.
pub(super) fn decode(info: u64) -> Option<Event> {
    if info & event::VALID == 0 {
        return None;
    }
    let kind = match (info & event::TYPE) >> 8 {
        0 => EventKind::External,
        2 => EventKind::Nmi,
        3 => EventKind::Exception,
        4 => EventKind::SoftwareInterrupt,
        _ => return None,
    };
    Some(Event {
        kind,
        vector: (info & event::VECTOR) as u8,
        error_code: (info & event::ERROR_CODE != 0).then_some((info >> 32) as u32),
        inst_len: 0,
    })
}

/// The event that is to be delivered again after an exit with EXITINTINFO
/// `info`, when `injected` was EVENTINJ. None for what INT n, INT3 and INTO
/// of the guest's own began: RIP is at the instruction still, and executing it
/// again does all of it.
pub(super) fn interrupted(info: u64, injected: u64) -> Option<Event> {
    let e = decode(info)?;
    let same = |a: u64, b: u64| (a ^ b) & (event::VALID | event::TYPE | event::VECTOR) == 0;
    let software = e.kind == EventKind::SoftwareInterrupt
        || e.kind == EventKind::Exception && matches!(e.vector, 3 | 4);
    (!software || same(info, injected)).then_some(e)
}

impl<H: Host> Vcpu<H> {
    /// Delivers `event` with the next entry, in place of any other.
    pub fn inject(&mut self, event: Event) {
        let protected = self.vmcb().state.cr0 & CR0_PE != 0;
        self.vmcb_mut().control.event_inj = encode(event, protected);
        match event.kind {
            EventKind::Nmi => {
                self.nmi = NmiState::Blocked;
                self.intercept1(misc1::IRET, true);
            }
            EventKind::SoftwareInterrupt
            | EventKind::PrivilegedSoftwareException
            | EventKind::SoftwareException => {
                // What is pushed is RIP, or with NRIP save the next RIP.
                let rip = self.vmcb().state.rip;
                let next = rip.wrapping_add(u64::from(event.inst_len));
                self.set_reg(Reg::Rip, next);
                if self.has(Features::NRIP_SAVE) {
                    self.vmcb_mut().control.next_rip = next;
                }
            }
            EventKind::Exception => self.set_interrupt_shadow(false),
            EventKind::External => {}
        }
    }

    /// The event that the next entry delivers.
    pub fn entry_event(&self) -> Option<Event> {
        decode(self.vmcb().control.event_inj)
    }

    /// The event whose delivery the last exit interrupted.
    #[inline(always)]
    pub fn pending_vectoring(&self) -> Option<Event> {
        let info = self.vmcb().control.exit_int_info;
        if info & event::VALID == 0 {
            return None;
        }
        interrupted(info, self.injected)
    }

    fn no_event(&self) -> bool {
        self.vmcb().control.event_inj & event::VALID == 0
    }

    /// Whether the guest takes an external interrupt at the next instruction.
    pub fn interruptible(&self) -> bool {
        self.no_event()
            && self.vmcb().state.rflags & RFLAGS_IF != 0
            && !self.interrupt_shadow()
            && self.nmi != NmiState::Stepping
    }

    /// Whether the guest takes an NMI at the next instruction.
    pub fn nmi_interruptible(&self) -> bool {
        self.no_event() && !self.interrupt_shadow() && !self.in_nmi()
    }

    /// Whether an NMI handler runs.
    pub(super) fn in_nmi(&self) -> bool {
        match self.nmi {
            NmiState::Open => false,
            NmiState::Blocked | NmiState::Stepping => true,
            NmiState::AtIret(rip) => rip == self.rip(),
        }
    }

    /// Exit (`NmiWindow`) as soon as the guest can take an NMI: where a
    /// handler runs, behind its IRET.
    pub fn set_nmi_window(&mut self, on: bool) {
        match self.nmi {
            NmiState::AtIret(_) if !self.in_nmi() => self.nmi = NmiState::Open,
            NmiState::AtIret(_) if on => self.step_over_iret(),
            _ => {}
        }
        if on && !self.in_nmi() {
            if self.no_event() {
                // Blocked by STI or MOV SS for the length of an instruction.
                // With RFLAGS.IF clear the next exit has to do.
                self.set_interrupt_window(true);
            } else {
                // Another event goes first; then the guest is left at once.
                self.leave_at_once = true;
            }
        }
    }

    /// Whether an interrupt of the host's is to end the next stay before its
    /// first instruction (events are delivered before).
    #[inline]
    pub fn take_immediate_exit(&mut self) -> bool {
        core::mem::take(&mut self.leave_at_once)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_encoding() {
        let pf = Event::exception_with(14, 0x1f);
        let ext = Event {
            kind: EventKind::External,
            vector: 0xef,
            error_code: None,
            inst_len: 0,
        };
        let nmi = Event {
            kind: EventKind::Nmi,
            vector: 2,
            ..ext
        };
        for e in [pf, ext, nmi, Event::UD, Event::GP0] {
            assert_eq!(decode(encode(e, true)), Some(e));
        }
        assert_eq!(encode(pf, true), 0x1f_8000_0b0e);
        assert_eq!(encode(Event::GP0, false), 0x8000_030d, "real mode");
        assert_eq!(encode(Event::exception(13), true), 0x8000_0b0d);
        assert_eq!(decode(0x7fff_ffff), None);
        assert_eq!(decode(0x8000_0700), None, "type 7 is no event");
    }

    #[test]
    fn software_events_of_the_guests_own_are_not_delivered_twice() {
        let int80 = 0x8000_0480;
        assert_eq!(interrupted(int80, 0), None);
        assert!(interrupted(int80, int80).is_some(), "but ours are");
        let bp = 0x8000_0303;
        assert_eq!(interrupted(bp, 0), None);
        assert!(interrupted(bp, bp).is_some());
        assert!(interrupted(0x8000_00ef, 0).is_some());
        assert!(interrupted(0x1f_8000_0b0e, 0).is_some());
        assert_eq!(interrupted(0, int80), None);
    }
}
