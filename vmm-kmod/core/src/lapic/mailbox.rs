//! How everyone but its own thread reaches a local APIC.

use core::sync::atomic::{AtomicU32, Ordering};

use super::Lvt;

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
        const LVT_MASK = 0x7f << Signals::LVT_SHIFT;
    }
}

impl Signals {
    pub(super) const LVT_SHIFT: u32 = 8;
}

const ON: u32 = 1;

/// The part of a vCPU's local APIC that others may touch, all of it atomic.
///
/// The first 64 bytes have the layout of a posted-interrupt descriptor (SDM
/// Vol. 3C §29.6): pending vectors, then the outstanding-notification bit;
/// bytes 40 and up of it are free for software. Every `post_*` returns whether
/// the vCPU has to be kicked, which is so if nothing was outstanding.
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
        if let (Some(pir), Some(trigger)) = (self.pir.get(word), self.level.get(word)) {
            if level {
                trigger.fetch_or(bit, Ordering::Relaxed);
            } else if trigger.load(Ordering::Relaxed) & bit != 0 {
                trigger.fetch_and(!bit, Ordering::Relaxed);
            }
            pir.fetch_or(bit, Ordering::Release);
        }
        self.notify()
    }

    /// An NMI. Two are remembered, as by a CPU that takes one and latches
    /// the other.
    pub fn post_nmi(&self) -> bool {
        if self
            .signals
            .fetch_or(Signals::NMI.bits(), Ordering::Release)
            & Signals::NMI.bits()
            != 0
        {
            return self.signal(Signals::NMI_AGAIN);
        }
        self.notify()
    }

    /// INIT; forgets a SIPI that nobody waited for.
    pub fn post_init(&self) -> bool {
        self.signals
            .fetch_and(!Signals::SIPI.bits(), Ordering::AcqRel);
        self.signal(Signals::INIT)
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
        self.signals
            .fetch_or(1 << (Signals::LVT_SHIFT + lvt as u32), Ordering::Release);
        self.notify()
    }

    /// Makes the vCPU's thread look, without telling it anything.
    pub fn poke(&self) -> bool {
        self.notify()
    }

    fn signal(&self, signals: Signals) -> bool {
        self.signals.fetch_or(signals.bits(), Ordering::Release);
        self.notify()
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

    /// Starts taking over: from here on posters kick again.
    pub(super) fn open(&self) -> Signals {
        self.notification.fetch_and(!ON, Ordering::SeqCst);
        if self.signals.load(Ordering::Relaxed) == 0 {
            return Signals::empty();
        }
        Signals::from_bits_truncate(self.signals.swap(0, Ordering::AcqRel))
    }

    pub(super) fn sipi_vector(&self) -> u8 {
        self.sipi_vector.load(Ordering::Relaxed) as u8
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

    /// Drops everything that is on its way (reset).
    pub(super) fn discard(&self) {
        self.notification.fetch_and(!ON, Ordering::SeqCst);
        self.signals.store(0, Ordering::Relaxed);
        for word in &self.pir {
            word.store(0, Ordering::Relaxed);
        }
    }
}

impl AsRef<Mailbox> for Mailbox {
    fn as_ref(&self) -> &Mailbox {
        self
    }
}
