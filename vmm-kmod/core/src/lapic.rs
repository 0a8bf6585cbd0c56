//! The local APIC of one vCPU, xAPIC and x2APIC (SDM Vol. 3A ch. 10).
//!
//! [`Lapic`] belongs to the vCPU's thread and needs no lock. Everyone else
//! posts to its [`Mailbox`]; the thread takes that over in [`Lapic::sync`]
//! before it enters the guest. Times are host TSC ticks.
//!
//! Two ways to deliver: by software ([`Lapic::pending`], [`Lapic::accept`]),
//! or by the CPU's virtual-interrupt delivery, which needs RVI, SVI and the
//! EOI-exit bitmap ([`Lapic::rvi`], [`Lapic::svi`], [`Lapic::eoi_exit_bitmap`]).

/// Does something for the eight words of a 256-bit register, the highest first. It is written
/// out: the module's compiler is told to unroll no loop.
macro_rules! each_word {
    ($word:ident, $do:block) => {
        each_word!(@ $word, $do, 7 6 5 4 3 2 1 0)
    };
    (@ $word:ident, $do:block, $($n:literal)*) => {
        $({
            let $word: u16 = $n;
            $do
        })*
    };
}

mod mailbox;
mod msr;
mod page;
mod registers;
mod timer;

#[cfg(test)]
mod tests;

use alloc::boxed::Box;
use core::ops::Deref;

pub use mailbox::{Mailbox, Mode};
pub use msr::{
    APIC_BASE_BSP, APIC_BASE_ENABLE, APIC_BASE_X2APIC, Gp0, MSR_X2APIC_FIRST, MSR_X2APIC_LAST,
};
pub use page::{LapicPage, reg};

use crate::apicbus::ApicMessage;
use crate::time::Ratio;
use mailbox::Signals;
use timer::Timer;

/// The default base of the register page.
pub const DEFAULT_BASE: u64 = 0xfee0_0000;
/// Integrated APIC, seven LVT entries, no EOI-broadcast suppression.
const VERSION: u32 = 0x0006_0015;

const LVT_MASKED: u32 = 1 << 16;
const SVR_ENABLE: u32 = 1 << 8;

/// LVT entries, numbered as `VM_LAPIC_LOCAL_IRQ` numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Lvt {
    Timer = 0,
    Thermal = 1,
    Perf = 2,
    Lint0 = 3,
    Lint1 = 4,
    Error = 5,
    Cmci = 6,
}

impl Lvt {
    const ALL: [Lvt; 7] = [
        Lvt::Timer,
        Lvt::Thermal,
        Lvt::Perf,
        Lvt::Lint0,
        Lvt::Lint1,
        Lvt::Error,
        Lvt::Cmci,
    ];

    /// The entry of an ioctl's number.
    pub fn from_index(n: u32) -> Option<Self> {
        Lvt::ALL.get(usize::try_from(n).ok()?).copied()
    }

    fn offset(self) -> u16 {
        match self {
            Lvt::Cmci => reg::LVT_CMCI,
            other => reg::LVT_TIMER + (other as u16) * 16,
        }
    }
}

/// What a register write asks the rest of the VM to do.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// Route this message (`apicbus`), to this vCPU too if it is addressed.
    Ipi(ApicMessage),
    /// A level-triggered interrupt has ended: tell the IOAPIC.
    Eoi(u8),
    /// `timer_deadline` has changed.
    TimerChanged,
    /// LINT0 now lets the 8259's INTR through: if it is up, post it again.
    ExtintUnmasked,
    /// The base, or whether and in which mode the APIC exists, has changed.
    ModeChanged,
}

/// What is fixed when a vCPU is made.
#[derive(Clone, Copy, Debug)]
pub struct LapicConfig {
    /// Host TSC ticks to ticks of the undivided APIC timer clock.
    pub to_apic: Ratio,
    /// And back.
    pub from_apic: Ratio,
    /// Shortest interval that a periodic timer is given, TSC ticks.
    pub min_interval: u64,
    /// MAXPHYADDR, bits: what IA32_APIC_BASE may hold.
    pub phys_bits: u8,
    /// Whether CPUID offers x2APIC mode.
    pub x2apic: bool,
    /// Bootstrap processor.
    pub bsp: bool,
}

bitflags::bitflags! {
    /// What `sync` and register writes have changed that a CPU with
    /// virtual-interrupt delivery must be told.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Changes: u8 {
        /// IRR: write RVI.
        const IRR = 1;
        /// TMR: write the EOI-exit bitmap.
        const TMR = 2;
        /// ISR was changed by software: write SVI.
        const ISR = 4;
    }
}

/// The local APIC. `M` points to the mailbox that others hold as well.
pub struct Lapic<M: Deref<Target = Mailbox>> {
    page: Box<LapicPage>,
    mailbox: M,
    config: LapicConfig,
    base: u64,
    timer: Timer,
    /// Errors since the last write of ESR.
    errors: u32,
    /// Mirror of SVR bit 8, as the page may already hold the new value.
    enabled: bool,
    /// Mirror of LINT0's "ExtINT goes through".
    lint0_extint: bool,
    /// May be stale-true, never stale-false: some IRR bit is set.
    irr_hint: bool,
    /// The CPU sets IRR bits by itself (virtualized self-IPIs).
    virtual_delivery: bool,
    changes: Changes,
    routes_changed: bool,
    nmis: u8,
    init: bool,
    sipi: Option<u8>,
    extint: bool,
}

impl<M: Deref<Target = Mailbox>> Lapic<M> {
    /// A local APIC in its power-up state: enabled in xAPIC mode, as firmware
    /// finds it. The APIC id is the mailbox's.
    pub fn new(page: Box<LapicPage>, mailbox: M, config: LapicConfig) -> Self {
        let timer = Timer::new(config.to_apic, config.from_apic, config.min_interval);
        let mut lapic = Lapic {
            page,
            mailbox,
            config,
            base: 0,
            timer,
            errors: 0,
            enabled: false,
            lint0_extint: false,
            irr_hint: false,
            virtual_delivery: false,
            changes: Changes::all(),
            routes_changed: true,
            nmis: 0,
            init: false,
            sipi: None,
            extint: false,
        };
        lapic.reset();
        lapic
    }

    /// Power-up or RESET (SDM Vol. 3A §10.4.7.1); drops what is on its way.
    pub fn reset(&mut self) {
        self.base = DEFAULT_BASE | APIC_BASE_ENABLE;
        if self.config.bsp {
            self.base |= APIC_BASE_BSP;
        }
        self.mailbox.discard();
        self.nmis = 0;
        self.init = false;
        self.sipi = None;
        self.extint = false;
        self.init_registers();
    }

    /// INIT (SDM Vol. 3A §10.4.7.3): as a reset, but the base, the mode and
    /// the id stay.
    pub fn init(&mut self) {
        self.nmis = 0;
        self.extint = false;
        self.init_registers();
    }

    fn init_registers(&mut self) {
        self.page.clear();
        self.page.set(reg::VERSION, VERSION);
        self.page.set(reg::SVR, 0xff);
        for lvt in Lvt::ALL {
            self.page.set(lvt.offset(), LVT_MASKED);
        }
        self.timer.reset();
        self.errors = 0;
        self.enabled = false;
        self.lint0_extint = false;
        self.irr_hint = self.virtual_delivery;
        self.changes = Changes::all();
        self.enter_mode();
    }

    /// Sets the registers that depend on the mode (SDM Vol. 3A §10.12.5).
    fn enter_mode(&mut self) {
        let id = self.mailbox.id();
        if self.x2apic() {
            self.page.set(reg::ID, id);
            self.page
                .set(reg::LDR, ((id >> 4) << 16) | (1 << (id & 15)));
            self.page.set(reg::DFR, 0);
        } else {
            self.page.set(reg::ID, id << 24);
            self.page.set(reg::LDR, 0);
            self.page.set(reg::DFR, u32::MAX);
        }
        self.publish();
    }

    fn publish(&mut self) {
        let mut mode = Mode::empty();
        mode.set(Mode::PRESENT, self.present());
        mode.set(Mode::ENABLED, self.present() && self.enabled);
        mode.set(Mode::X2APIC, self.x2apic());
        self.routes_changed = true;
        let model = self.page.get(reg::DFR) >> 28;
        mode.set(Mode::FLAT, model == 0xf);
        mode.set(Mode::CLUSTER, model == 0);
        self.mailbox.publish(mode, self.page.get(reg::LDR));
        self.mailbox.publish_priority(self.page.get(reg::TPR));
    }

    /// The APIC id.
    pub fn id(&self) -> u32 {
        self.mailbox.id()
    }

    /// The mailbox.
    pub fn mailbox(&self) -> &M {
        &self.mailbox
    }

    /// The register page, for its address (the virtual-APIC page).
    pub fn page(&self) -> &LapicPage {
        &self.page
    }

    // ---- taking over what others posted ----

    /// Takes over what was posted. Returns true if there was anything; only
    /// then can `pending`, `take_nmi`, `take_init`, `take_sipi`,
    /// `extint_pending` or `take_changes` have become different.
    #[inline]
    pub fn sync(&mut self) -> bool {
        if !self.mailbox.pending() {
            return false;
        }
        self.sync_slow();
        true
    }

    #[cold]
    #[cfg_attr(target_os = "none", optimize(speed))]
    fn sync_slow(&mut self) {
        let signals = self.mailbox.open();
        each_word!(word, {
            let (pending, level) = self.mailbox.take(usize::from(word));
            if pending != 0 {
                let offset = word * 16;
                let tmr = self.page.get(reg::TMR + offset);
                let new_tmr = (tmr & !pending) | level;
                if tmr != new_tmr {
                    self.page.set(reg::TMR + offset, new_tmr);
                    self.changes |= Changes::TMR;
                }
                self.page.or(reg::IRR + offset, pending);
                self.irr_hint = true;
                self.changes |= Changes::IRR;
            }
        });
        self.mailbox.publish_priority(self.page.get(reg::TPR));
        if !signals.is_empty() {
            self.take_signals(signals);
        }
    }

    #[inline(never)]
    fn take_signals(&mut self, signals: Signals) {
        if signals.contains(Signals::INIT) {
            self.init = true;
            self.sipi = None;
        }
        if signals.contains(Signals::SIPI) && self.sipi.is_none() {
            self.sipi = Some(self.mailbox.sipi_vector());
        }
        if signals.contains(Signals::NMI) {
            self.queue_nmi();
        }
        if signals.contains(Signals::NMI_AGAIN) {
            self.queue_nmi();
        }
        if signals.contains(Signals::EXTINT) {
            self.raise_extint();
        }
        if signals.contains(Signals::ILLEGAL_VECTOR) {
            self.error(ESR_RECEIVE_ILLEGAL_VECTOR);
        }
        for lvt in Lvt::ALL {
            if signals.bits() & (1 << (Signals::LVT_SHIFT + lvt as u32)) != 0 {
                self.local(lvt);
            }
        }
    }

    fn queue_nmi(&mut self) {
        self.nmis = (self.nmis + 1).min(2);
    }

    /// A local interrupt. With the APIC off, LINT0 and LINT1 are the CPU's
    /// INTR and NMI pins (SDM Vol. 3A §10.4.3).
    fn local(&mut self, lvt: Lvt) {
        if self.present() && self.enabled {
            self.fire(lvt);
            return;
        }
        match lvt {
            Lvt::Lint0 => self.raise_extint(),
            Lvt::Lint1 => self.queue_nmi(),
            _ => {}
        }
    }

    fn fire(&mut self, lvt: Lvt) {
        let entry = self.page.get(lvt.offset());
        if entry & LVT_MASKED != 0 {
            return;
        }
        let mode = match lvt {
            Lvt::Timer | Lvt::Error => 0,
            _ => (entry >> 8) & 7,
        };
        match mode {
            0 => {
                let vector = entry as u8;
                if vector >= 16 {
                    self.raise(vector);
                } else if lvt == Lvt::Error {
                    self.errors |= ESR_RECEIVE_ILLEGAL_VECTOR;
                } else {
                    self.error(ESR_RECEIVE_ILLEGAL_VECTOR);
                }
            }
            4 => self.queue_nmi(),
            7 => self.raise_extint(),
            _ => {}
        }
    }

    fn raise_extint(&mut self) {
        self.extint = true;
        self.routes_changed = true;
    }

    /// An edge-triggered interrupt from inside.
    fn raise(&mut self, vector: u8) {
        if self.page.bit(reg::TMR, vector) {
            self.page.set_bit(reg::TMR, vector, false);
            self.changes |= Changes::TMR;
        }
        self.page
            .or(reg::IRR + u16::from(vector >> 5) * 16, 1 << (vector & 31));
        self.irr_hint = true;
        self.changes |= Changes::IRR;
    }

    fn error(&mut self, bits: u32) {
        self.errors |= bits;
        self.fire(Lvt::Error);
    }

    /// An NMI to inject now, if there is one and it is not blocked. Call it
    /// whenever `nmi_pending`: while NMIs are blocked only one stays latched.
    pub fn take_nmi(&mut self, blocked: bool) -> bool {
        if blocked {
            self.nmis = self.nmis.min(1);
            return false;
        }
        let any = self.nmis != 0;
        self.nmis = self.nmis.saturating_sub(1);
        any
    }

    /// Whether an NMI waits.
    #[inline]
    pub fn nmi_pending(&self) -> bool {
        self.nmis != 0
    }

    /// INIT arrived: the caller resets the vCPU's registers and calls `init`.
    #[inline]
    pub fn take_init(&mut self) -> bool {
        core::mem::take(&mut self.init)
    }

    /// Whether INIT waits to be taken.
    #[inline]
    pub fn init_pending(&self) -> bool {
        self.init
    }

    /// The CPU itself may have requested vectors (self-IPI under
    /// virtual-interrupt delivery): look at the page again.
    pub fn distrust_hints(&mut self) {
        self.irr_hint = true;
    }

    /// A start-up IPI arrived: its vector (the page to start at). It means
    /// something only to a vCPU that waits for it; others drop it.
    #[inline]
    pub fn take_sipi(&mut self) -> Option<u8> {
        self.sipi.take()
    }

    /// Whether the 8259 wants to be acknowledged through this vCPU.
    #[inline]
    pub fn extint_pending(&self) -> bool {
        self.extint
    }

    /// The 8259 has been acknowledged, or had nothing; `again` if it has more.
    pub fn extint_done(&mut self, again: bool) {
        self.extint = again;
        // While there is one, the CPU does not deliver by itself.
        self.routes_changed = true;
    }

    // ---- delivery by software ----

    /// The vector to inject next: highest requested, if its priority class is
    /// above the processor's (SDM Vol. 3A §10.8.3).
    #[inline]
    pub fn pending(&mut self) -> Option<u8> {
        if !self.irr_hint {
            return None;
        }
        self.pending_slow()
    }

    #[inline(never)]
    #[cfg_attr(target_os = "none", optimize(speed))]
    fn pending_slow(&mut self) -> Option<u8> {
        if !self.present() {
            return None;
        }
        let Some(vector) = self.page.highest(reg::IRR) else {
            self.irr_hint = self.virtual_delivery;
            return None;
        };
        (u32::from(vector) >> 4 > self.ppr() >> 4).then_some(vector)
    }

    /// Whether something would be pending if TPR were lower or an interrupt
    /// ended: a halted vCPU must not wake for it, but a TPR write matters.
    pub fn requested(&self) -> Option<u8> {
        if self.irr_hint {
            self.page.highest(reg::IRR)
        } else {
            None
        }
    }

    /// The vector is being injected: IRR to ISR.
    pub fn accept(&mut self, vector: u8) {
        self.page
            .and_not(reg::IRR + u16::from(vector >> 5) * 16, 1 << (vector & 31));
        self.page.set_bit(reg::ISR, vector, true);
        self.changes |= Changes::IRR | Changes::ISR;
        self.update_ppr();
    }

    /// Whether the end of the interrupt that was just accepted changes nothing
    /// but what is in service: the IOAPIC does not wait for it, and no other
    /// interrupt does.
    pub fn ends_quietly(&self, vector: u8) -> bool {
        !self.page.bit(reg::TMR, vector) && self.requested().is_none()
    }

    /// The guest has ended the interrupt in service, by other means than a
    /// write of the EOI register.
    pub fn end_of_interrupt(&mut self) -> Effect {
        self.eoi()
    }

    /// The TPR threshold for a CPU with a TPR shadow but without
    /// virtual-interrupt delivery (SDM Vol. 3C §24.6.8): it exits when the
    /// guest lowers TPR so far that a waiting interrupt could be taken.
    pub fn tpr_threshold(&self) -> u32 {
        let Some(vector) = self.requested() else {
            return 0;
        };
        let class = u32::from(vector) >> 4;
        if class <= self.page.get(reg::TPR) >> 4 & 0xf {
            class
        } else {
            0
        }
    }

    /// Processor priority, computed afresh (the CPU may have changed TPR).
    #[cfg_attr(target_os = "none", optimize(speed))]
    pub fn ppr(&self) -> u32 {
        let tpr = self.page.get(reg::TPR) & 0xff;
        let isr = u32::from(self.page.highest(reg::ISR).unwrap_or(0));
        if tpr >> 4 >= isr >> 4 {
            tpr
        } else {
            isr & 0xf0
        }
    }

    fn update_ppr(&self) {
        self.page.set(reg::PPR, self.ppr());
    }

    // ---- delivery by the CPU ----

    /// Says that the CPU delivers, and so may set IRR bits without an exit.
    pub fn use_virtual_delivery(&mut self, on: bool) {
        self.virtual_delivery = on;
        self.irr_hint = true;
        self.changes = Changes::all();
    }

    /// Requesting virtual interrupt: the highest bit of IRR, or 0.
    pub fn rvi(&self) -> u8 {
        if self.present() {
            self.page.highest(reg::IRR).unwrap_or(0)
        } else {
            0
        }
    }

    /// Servicing virtual interrupt: the highest bit of ISR, or 0.
    pub fn svi(&self) -> u8 {
        self.page.highest(reg::ISR).unwrap_or(0)
    }

    /// The EOI-exit bitmap: level-triggered vectors must exit.
    pub fn eoi_exit_bitmap(&self) -> [u64; 4] {
        let word = |n: u16| {
            u64::from(self.page.get(reg::TMR + n * 32))
                | u64::from(self.page.get(reg::TMR + n * 32 + 16)) << 32
        };
        [word(0), word(1), word(2), word(3)]
    }

    /// The CPU has virtualized the EOI of a vector in the bitmap.
    pub fn eoi_virtualized(&mut self, vector: u8) -> Effect {
        if self.page.bit(reg::TMR, vector) {
            Effect::Eoi(vector)
        } else {
            Effect::None
        }
    }

    /// Whether the 8259's interrupts may come to this APIC, which AVIC has no
    /// way to tell the guest: one is there, LINT0 passes them on, or it is the
    /// bootstrap processor's and off.
    pub fn virtual_wire(&self) -> bool {
        self.extint || self.lint0_extint || self.config.bsp && !(self.present() && self.enabled)
    }

    /// Whether since the last call something has changed that decides whether
    /// AVIC can be used, or by which other APICs' messages find this one.
    #[inline]
    pub fn take_routes_changed(&mut self) -> bool {
        core::mem::take(&mut self.routes_changed)
    }

    /// What has changed since the last call.
    #[inline]
    pub fn take_changes(&mut self) -> Changes {
        core::mem::replace(&mut self.changes, Changes::empty())
    }

    // ---- CR8 ----

    /// CR8: the task-priority class.
    pub fn cr8(&self) -> u64 {
        u64::from(self.page.get(reg::TPR) >> 4 & 0xf)
    }

    /// A write of CR8 (the caller has checked that bits 63:4 are 0).
    pub fn set_cr8(&mut self, value: u64) {
        self.set_tpr(((value & 0xf) << 4) as u32);
    }

    fn set_tpr(&mut self, value: u32) {
        self.page.set(reg::TPR, value & 0xff);
        self.mailbox.publish_priority(value & 0xff);
        self.changes |= Changes::IRR;
        self.update_ppr();
    }

    // ---- timer ----

    /// Host TSC at which `timer_tick` should be called, if it matters.
    #[inline]
    pub fn timer_deadline(&self) -> Option<u64> {
        let due = self.timer.due();
        if due == u64::MAX || self.page.get(reg::LVT_TIMER) & LVT_MASKED != 0 {
            return None;
        }
        Some(due)
    }

    /// Fires the timer if it is due; true if it was.
    #[inline]
    pub fn timer_tick(&mut self, now: u64) -> bool {
        now >= self.timer.due() && self.timer_due(now)
    }

    #[inline(never)]
    #[cfg_attr(target_os = "none", optimize(speed))]
    fn timer_due(&mut self, now: u64) -> bool {
        let expired = self.timer.expire(now);
        if expired {
            self.fire(Lvt::Timer);
        }
        expired
    }

    /// IA32_TSC_DEADLINE as the guest reads it: 0 once it has fired.
    pub fn tsc_deadline(&mut self, now: u64) -> u64 {
        self.timer_tick(now);
        self.timer.tsc_deadline()
    }

    /// A write of IA32_TSC_DEADLINE: the guest's value, and the same moment
    /// in host TSC ticks. A deadline that has passed fires at once.
    pub fn set_tsc_deadline(&mut self, guest: u64, host: u64, now: u64) -> Effect {
        self.timer.set_tsc_deadline(guest, host);
        self.timer_tick(now);
        Effect::TimerChanged
    }
}

const ESR_SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
const ESR_RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
const ESR_ILLEGAL_REGISTER: u32 = 1 << 7;
