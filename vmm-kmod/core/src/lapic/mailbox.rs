//! How everyone but its own thread reaches a local APIC.

use core::sync::atomic::{AtomicU32, Ordering};

use super::{LapicPage, Lvt, reg};

bitflags::bitflags! {
    /// What is published of a local APIC's state for those who route to it.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Mode: u32 {
        /// IA32_APIC_BASE.EN: the APIC exists.
        const PRESENT = 1;
        /// SVR bit 8: it accepts fixed interrupts.
        const ENABLED = 2;
        /// x2APIC mode.
        const X2APIC = 4;
        /// DFR says flat model.
        const FLAT = 8;
        /// DFR says cluster model.
        const CLUSTER = 16;
    }
}

bitflags::bitflags! {
    /// Deliveries other than fixed interrupts.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Signals: u32 {
        const NMI = 1;
        /// A second NMI before the first was seen: the CPU would have taken
        /// one and latched the other.
        const NMI_AGAIN = 2;
        const INIT = 4;
        const SIPI = 8;
        const EXTINT = 16;
        /// A message with a vector below 16 arrived.
        const ILLEGAL_VECTOR = 32;
        /// Vectors beside the posted ones, see [`Mailbox`].
        const VECTORS = 64;
        /// Nothing of the APIC's: the thread is to look.
        const POKE = 128;
        const LVT_MASK = 0x7f << Signals::LVT_SHIFT;
    }
}

impl Signals {
    pub(super) const LVT_SHIFT: u32 = 8;
}

const ON: u32 = 1;

/// The part of a vCPU's local APIC that others may touch, all of it atomic.
///
/// The first 64 bytes are a posted-interrupt descriptor (SDM Vol. 3C §29.6):
/// pending vectors, then the outstanding-notification bit; bytes 40 and up of
/// it are free for software. Where the CPU processes it, it takes the vectors
/// and clears that bit while the guest runs, and tells nobody. So what it knows
/// nothing of stays out of the vectors and comes with a signal: level-triggered
/// interrupts, and whatever is none. Every `post_*` returns whether the vCPU has
/// to be kicked, which is so if nothing was outstanding.
#[repr(C, align(64))]
pub struct Mailbox {
    pir: [AtomicU32; 8],
    notification: AtomicU32,
    destination: AtomicU32,
    signals: AtomicU32,
    sipi_vector: AtomicU32,
    // What the router reads: its writers are rare.
    mode: AtomicU32,
    ldr: AtomicU32,
    priority: AtomicU32,
    id: u32,
    level: [AtomicU32; 8],
    /// Pending as well; with `Signals::VECTORS`.
    beside: [AtomicU32; 8],
}

impl Mailbox {
    /// A mailbox of the vCPU with this (x2)APIC id.
    pub const fn new(id: u32) -> Self {
        Mailbox {
            pir: [const { AtomicU32::new(0) }; 8],
            notification: AtomicU32::new(0),
            destination: AtomicU32::new(0),
            signals: AtomicU32::new(0),
            sipi_vector: AtomicU32::new(0),
            mode: AtomicU32::new(0),
            ldr: AtomicU32::new(0),
            priority: AtomicU32::new(0),
            id,
            level: [const { AtomicU32::new(0) }; 8],
            beside: [const { AtomicU32::new(0) }; 8],
        }
    }

    /// The APIC id, 32 bits as in x2APIC mode.
    #[inline]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Whether anything waits to be taken over by the vCPU's thread. A thread
    /// about to sleep asks this after it has made known that it sleeps.
    #[inline]
    pub fn pending(&self) -> bool {
        self.notification.load(Ordering::Acquire) & ON != 0
            || self.signals.load(Ordering::Relaxed) != 0
    }

    #[inline]
    fn notify(&self) -> bool {
        self.notification.fetch_or(ON, Ordering::SeqCst) & ON == 0
    }

    /// A fixed interrupt. Below vector 16 it becomes a "receive illegal
    /// vector" error (SDM Vol. 3A §10.5.3).
    #[inline]
    pub fn post(&self, vector: u8, level: bool) -> bool {
        if vector < 16 {
            return self.signal(Signals::ILLEGAL_VECTOR);
        }
        let word = usize::from(vector >> 5);
        let bit = 1 << (vector & 31);
        let (Some(pir), Some(trigger)) = (self.pir.get(word), self.level.get(word)) else {
            return false;
        };
        if level || trigger.load(Ordering::Relaxed) & bit != 0 {
            return self.post_beside(word, bit, level);
        }
        pir.fetch_or(bit, Ordering::Release);
        self.notify()
    }

    /// A level-triggered interrupt, or the first one of its vector that is not: TMR has to
    /// follow.
    #[cold]
    #[inline(never)]
    fn post_beside(&self, word: usize, bit: u32, level: bool) -> bool {
        let (Some(beside), Some(trigger)) = (self.beside.get(word), self.level.get(word)) else {
            return false;
        };
        if level {
            trigger.fetch_or(bit, Ordering::Relaxed);
        } else {
            trigger.fetch_and(!bit, Ordering::Relaxed);
        }
        beside.fetch_or(bit, Ordering::Release);
        self.signal(Signals::VECTORS)
    }

    /// An NMI. Two are remembered, as by a CPU that takes one and latches
    /// the other.
    #[inline(never)]
    pub fn post_nmi(&self) -> bool {
        if self
            .signals
            .fetch_or(Signals::NMI.bits(), Ordering::Release)
            & Signals::NMI.bits()
            != 0
        {
            return self.signal(Signals::NMI_AGAIN);
        }
        self.notify();
        true
    }

    /// INIT; forgets a SIPI that nobody waited for.
    #[inline(never)]
    pub fn post_init(&self) -> bool {
        let mut old = self.signals.load(Ordering::Relaxed);
        // At once, so that whoever finds something has been kicked for it.
        while let Err(now) = self.signals.compare_exchange_weak(
            old,
            old & !Signals::SIPI.bits() | Signals::INIT.bits(),
            Ordering::AcqRel,
            Ordering::Relaxed,
        ) {
            old = now;
        }
        self.notify() || old == 0
    }

    /// Start-up IPI; the first after an INIT counts.
    pub fn post_sipi(&self, vector: u8) -> bool {
        if self.signals.load(Ordering::Acquire) & Signals::SIPI.bits() != 0 {
            return false;
        }
        self.sipi_vector.store(u32::from(vector), Ordering::Relaxed);
        self.signal(Signals::SIPI)
    }

    /// An interrupt whose vector the 8259 will tell.
    pub fn post_extint(&self) -> bool {
        self.signal(Signals::EXTINT)
    }

    /// The local interrupt of an LVT entry (`VM_LAPIC_LOCAL_IRQ`): LINT0 is
    /// the 8259's INTR, LINT1 is NMI.
    pub fn post_local(&self, lvt: Lvt) -> bool {
        self.signal(Signals::from_bits_retain(
            1 << (Signals::LVT_SHIFT + lvt as u32),
        ))
    }

    /// Makes the vCPU's thread look, without telling it anything.
    pub fn poke(&self) -> bool {
        self.signal(Signals::POKE)
    }

    /// Whether something waits that a CPU does not process by itself.
    #[inline]
    pub fn signalled(&self) -> bool {
        self.signals.load(Ordering::Relaxed) != 0
    }

    #[inline(never)]
    fn signal(&self, signals: Signals) -> bool {
        // A notification that is outstanding may be one that ends no stay.
        let first = self.signals.fetch_or(signals.bits(), Ordering::AcqRel) == 0;
        self.notify() || first
    }

    /// What the router needs to know of this APIC.
    #[inline]
    pub fn mode(&self) -> Mode {
        Mode::from_bits_truncate(self.mode.load(Ordering::Acquire))
    }

    /// Logical destination register, as a guest reads it in the present mode.
    #[inline]
    pub fn ldr(&self) -> u32 {
        self.ldr.load(Ordering::Relaxed)
    }

    /// The task priority last seen, for lowest-priority arbitration.
    #[inline]
    pub fn priority(&self) -> u32 {
        self.priority.load(Ordering::Relaxed)
    }

    pub(super) fn publish(&self, mode: Mode, ldr: u32) {
        self.ldr.store(ldr, Ordering::Relaxed);
        self.mode.store(mode.bits(), Ordering::Release);
    }

    #[inline]
    pub(super) fn publish_priority(&self, priority: u32) {
        self.priority.store(priority, Ordering::Relaxed);
    }

    /// Moves what was posted into IRR of the APIC's page, for a CPU that finds
    /// it there by itself (AVIC): edge-triggered interrupts where the page knows
    /// of no level-triggered one. False: something is left, and the vCPU's
    /// thread has to look after the next `poke`.
    pub fn hand_over(&self, page: &LapicPage) -> bool {
        // Whoever posts after this kicks again; what came before is seen.
        self.notification.fetch_and(!ON, Ordering::SeqCst);
        let mut all = true;
        for word in 0..8u16 {
            let (pending, level) = self.take(usize::from(word));
            if pending == 0 {
                continue;
            }
            let offset = word * 16;
            let left = level | pending & page.get(reg::TMR + offset);
            page.or(reg::IRR + offset, pending & !left);
            if left != 0
                && let Some(pir) = self.pir.get(usize::from(word))
            {
                pir.fetch_or(left, Ordering::Release);
                all = false;
            }
        }
        all && self.signals.load(Ordering::SeqCst) == 0
    }

    /// Starts taking over: from here on posters kick again.
    pub(super) fn open(&self) -> Signals {
        self.notification.fetch_and(!ON, Ordering::SeqCst);
        if self.signals.load(Ordering::Relaxed) == 0 {
            return Signals::empty();
        }
        let signals = Signals::from_bits_truncate(self.signals.swap(0, Ordering::AcqRel));
        if signals.contains(Signals::VECTORS) {
            self.unite();
        }
        signals
    }

    pub(super) fn sipi_vector(&self) -> u8 {
        self.sipi_vector.load(Ordering::Relaxed) as u8
    }

    /// Puts those beside to the posted vectors, which no CPU takes now.
    #[cold]
    #[inline(never)]
    fn unite(&self) {
        for (beside, pir) in self.beside.iter().zip(&self.pir) {
            pir.fetch_or(beside.swap(0, Ordering::Acquire), Ordering::Relaxed);
        }
    }

    /// Takes 32 pending vectors: (which, of these the level-triggered).
    #[inline]
    pub(super) fn take(&self, word: usize) -> (u32, u32) {
        let (Some(pir), Some(level)) = (self.pir.get(word), self.level.get(word)) else {
            return (0, 0);
        };
        if pir.load(Ordering::Relaxed) == 0 {
            return (0, 0);
        }
        let pending = pir.swap(0, Ordering::Acquire);
        (pending, level.load(Ordering::Relaxed) & pending)
    }

    /// What a CPU does at a notification (SDM Vol. 3C §29.6): these vectors are
    /// requested now.
    #[cfg(test)]
    pub(super) fn process_posted(&self) -> [u32; 8] {
        self.notification.fetch_and(!ON, Ordering::SeqCst);
        self.pir
            .each_ref()
            .map(|word| word.swap(0, Ordering::SeqCst))
    }

    /// Drops everything that is on its way (reset).
    pub(super) fn discard(&self) {
        self.notification.fetch_and(!ON, Ordering::SeqCst);
        self.signals.store(0, Ordering::Relaxed);
        for word in self.pir.iter().chain(&self.beside) {
            word.store(0, Ordering::Relaxed);
        }
    }
}

impl AsRef<Mailbox> for Mailbox {
    fn as_ref(&self) -> &Mailbox {
        self
    }
}
