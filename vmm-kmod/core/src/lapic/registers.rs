//! Register reads and writes, from MMIO, MSRs and APIC-write exits alike.

use core::ops::Deref;

use super::timer::TimerMode;
use super::{
    Changes, ESR_ILLEGAL_REGISTER, ESR_RECEIVE_ILLEGAL_VECTOR, ESR_SEND_ILLEGAL_VECTOR, Effect,
    LVT_MASKED, Lapic, Lvt, Mailbox, SVR_ENABLE, reg,
};
use crate::apicbus::{ApicMessage, Destination};

/// Bits of an LVT entry that can be written (SDM Vol. 3A fig. 10-8); the
/// delivery status is always idle.
pub(super) fn lvt_writable(lvt: Lvt) -> u32 {
    match lvt {
        Lvt::Timer => 0x7_00ff,
        Lvt::Error => 0x1_00ff,
        Lvt::Thermal | Lvt::Perf | Lvt::Cmci => 0x1_07ff,
        Lvt::Lint0 | Lvt::Lint1 => 0x1_a7ff,
    }
}

impl<M: Deref<Target = Mailbox>> Lapic<M> {
    /// A 32-bit MMIO read. Outside xAPIC mode nothing answers there.
    pub fn read(&mut self, offset: u16, now: u64) -> u32 {
        if !self.present() || self.x2apic() {
            return u32::MAX;
        }
        self.read_register(offset & 0xff0, now)
    }

    /// A 32-bit MMIO write. Outside xAPIC mode nobody sees it.
    pub fn write(&mut self, offset: u16, value: u32, now: u64) -> Effect {
        if !self.present() || self.x2apic() {
            return Effect::None;
        }
        match offset & 0xff0 {
            reg::SELF_IPI => {
                self.error(ESR_ILLEGAL_REGISTER);
                Effect::None
            }
            offset => self.write_register(offset, value, now),
        }
    }

    /// An APIC-write exit (SDM Vol. 3C §29.4.3.3): the CPU has put the value
    /// into the page, what it means is still to be done.
    pub fn apic_write_done(&mut self, offset: u16, now: u64) -> Effect {
        let offset = offset & 0xff0;
        let value = self.page.get(offset);
        self.write_register(offset, value, now)
    }

    pub(super) fn read_register(&mut self, offset: u16, now: u64) -> u32 {
        match offset {
            reg::PPR => self.ppr(),
            reg::TIMER_CCR => {
                self.timer_tick(now);
                self.timer.count(now)
            }
            reg::ID
            | reg::VERSION
            | reg::TPR
            | reg::APR
            | reg::LDR
            | reg::DFR
            | reg::SVR
            | 0x100..=0x270
            | reg::ESR
            | reg::LVT_CMCI
            | reg::ICR_LOW
            | reg::ICR_HIGH
            | reg::LVT_TIMER..=reg::LVT_ERROR
            | reg::TIMER_ICR
            | reg::TIMER_DCR => self.page.get(offset),
            // Write-only, or gone since the P6.
            reg::EOI | reg::RRD => 0,
            _ => {
                self.error(ESR_ILLEGAL_REGISTER);
                0
            }
        }
    }

    #[cfg_attr(target_os = "none", optimize(speed))]
    pub(super) fn write_register(&mut self, offset: u16, value: u32, now: u64) -> Effect {
        match offset {
            // Ids do not change: what routes to them need not follow.
            reg::ID => {
                let id = self.mailbox.id();
                self.page
                    .set(reg::ID, if self.x2apic() { id } else { id << 24 });
            }
            reg::TPR => self.set_tpr(value),
            reg::EOI => return self.eoi(),
            reg::LDR => {
                self.page.set(reg::LDR, value & 0xff00_0000);
                self.publish();
            }
            reg::DFR => {
                self.page.set(reg::DFR, value | 0x0fff_ffff);
                self.publish();
            }
            reg::SVR => return self.write_svr(value, now),
            reg::ESR => {
                self.page.set(reg::ESR, self.errors);
                self.errors = 0;
            }
            reg::ICR_LOW => return self.write_icr(value),
            reg::ICR_HIGH => self.page.set(reg::ICR_HIGH, value & 0xff00_0000),
            reg::LVT_CMCI => return self.write_lvt(Lvt::Cmci, value, now),
            reg::LVT_TIMER..=reg::LVT_ERROR => {
                if let Some(lvt) = Lvt::from_index(u32::from(offset - reg::LVT_TIMER) >> 4) {
                    return self.write_lvt(lvt, value, now);
                }
            }
            reg::TIMER_ICR => {
                self.timer_tick(now);
                let shown = self.timer.set_initial(value, now);
                self.page.set(reg::TIMER_ICR, shown);
                return Effect::TimerChanged;
            }
            reg::TIMER_DCR => {
                self.timer_tick(now);
                self.page.set(reg::TIMER_DCR, value & 0xb);
                self.timer.set_divide(value, now);
                return Effect::TimerChanged;
            }
            reg::SELF_IPI => return self.self_ipi(value as u8),
            // Read-only.
            reg::VERSION | reg::APR | reg::PPR | reg::RRD | 0x100..=0x270 | reg::TIMER_CCR => {}
            _ => self.error(ESR_ILLEGAL_REGISTER),
        }
        Effect::None
    }

    #[inline(never)]
    #[cfg_attr(target_os = "none", optimize(speed))]
    pub(super) fn eoi(&mut self) -> Effect {
        let Some(vector) = self.page.highest(reg::ISR) else {
            return Effect::None;
        };
        self.page.set_bit(reg::ISR, vector, false);
        self.changes |= Changes::ISR | Changes::IRR;
        self.update_ppr();
        if self.page.bit(reg::TMR, vector) {
            Effect::Eoi(vector)
        } else {
            Effect::None
        }
    }

    fn write_svr(&mut self, value: u32, now: u64) -> Effect {
        self.page.set(reg::SVR, value & 0x3ff);
        let enabled = value & SVR_ENABLE != 0;
        if enabled == self.enabled {
            return Effect::None;
        }
        if !enabled {
            // All LVT entries are masked and stay so (SDM Vol. 3A §10.4.7.2).
            self.timer_tick(now);
            for lvt in Lvt::ALL {
                self.page
                    .set(lvt.offset(), self.page.get(lvt.offset()) | LVT_MASKED);
            }
            self.lint0_extint = false;
        }
        self.enabled = enabled;
        self.publish();
        Effect::TimerChanged
    }

    fn write_lvt(&mut self, lvt: Lvt, value: u32, now: u64) -> Effect {
        if lvt == Lvt::Timer {
            // What ran out before the write fires as the entry was.
            let old = self.timer.mode;
            let mode = TimerMode::of_lvt(value);
            if old == mode {
                self.timer_tick(now);
            } else {
                // The page may hold the new value already: its mask decides.
                let expired = self.timer.expire(now);
                if expired && old != TimerMode::TscDeadline {
                    self.fire(Lvt::Timer);
                }
                if self.timer.set_mode(mode) {
                    self.page.set(reg::TIMER_ICR, 0);
                }
            }
        }
        let mut entry = value & lvt_writable(lvt);
        if !self.enabled {
            entry |= LVT_MASKED;
        }
        self.page.set(lvt.offset(), entry);
        match lvt {
            Lvt::Timer => Effect::TimerChanged,
            Lvt::Lint0 => {
                let was = self.lint0_extint;
                self.lint0_extint = entry & (LVT_MASKED | 0x700) == 0x700;
                self.routes_changed |= self.lint0_extint != was;
                if self.lint0_extint && !was {
                    Effect::ExtintUnmasked
                } else {
                    Effect::None
                }
            }
            _ => Effect::None,
        }
    }

    #[cfg_attr(target_os = "none", optimize(speed))]
    pub(super) fn write_icr(&mut self, low: u32) -> Effect {
        // Delivery status: always idle.
        let low = low & 0x000c_cfff;
        self.page.set(reg::ICR_LOW, low);
        let high = self.page.get(reg::ICR_HIGH);
        let destination = match (low >> 18) & 3 {
            1 => Destination::Myself(self.mailbox.id()),
            2 => Destination::All,
            3 => Destination::AllButMyself(self.mailbox.id()),
            _ => Destination::from_field(
                if self.x2apic() { high } else { high >> 24 },
                low & (1 << 11) != 0,
                self.x2apic(),
            ),
        };
        let message = ApicMessage::from_icr(low, destination);
        match message {
            Some(message) if message.illegal_vector() => {
                self.error(ESR_SEND_ILLEGAL_VECTOR);
                Effect::None
            }
            Some(message) => Effect::Ipi(message),
            None => Effect::None,
        }
    }

    /// The IPI that the guest has written into ICR and the CPU has sent.
    pub fn ipi_sent(&mut self) -> Option<ApicMessage> {
        match self.apic_write_done(reg::ICR_LOW, 0) {
            Effect::Ipi(message) => Some(message),
            _ => None,
        }
    }

    /// SELF_IPI (SDM Vol. 3A §10.12.11): edge-triggered, to oneself.
    pub(super) fn self_ipi(&mut self, vector: u8) -> Effect {
        if vector < 16 {
            self.error(ESR_RECEIVE_ILLEGAL_VECTOR);
        } else if self.enabled {
            self.raise(vector);
        }
        Effect::None
    }
}
