//! Routing of interrupt messages - IPIs, MSIs, IOAPIC messages - to the local
//! APICs of a VM (SDM Vol. 3A §10.6.2, §10.11, §10.12.9).

use core::sync::atomic::{AtomicU32, Ordering};

use crate::lapic::{Mailbox, Mode};

/// What a message does where it arrives (SDM Vol. 3A §10.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum DeliveryMode {
    Fixed = 0,
    LowestPriority = 1,
    Smi = 2,
    Nmi = 4,
    Init = 5,
    StartUp = 6,
    ExtInt = 7,
}

impl DeliveryMode {
    /// The mode of a 3-bit field; 3 is reserved.
    pub const fn from_field(bits: u32) -> Option<Self> {
        match bits & 7 {
            0 => Some(DeliveryMode::Fixed),
            1 => Some(DeliveryMode::LowestPriority),
            2 => Some(DeliveryMode::Smi),
            4 => Some(DeliveryMode::Nmi),
            5 => Some(DeliveryMode::Init),
            6 => Some(DeliveryMode::StartUp),
            7 => Some(DeliveryMode::ExtInt),
            _ => None,
        }
    }
}

/// Whom a message is for. Broadcast destinations have become `All`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// An APIC id.
    Physical(u32),
    /// A logical destination: flat mask, cluster and mask, or x2APIC cluster
    /// and mask, as each receiver's mode says.
    Logical(u32),
    /// Everyone.
    All,
    /// Everyone but the sender, whose APIC id this is.
    AllButMyself(u32),
    /// The sender alone.
    Myself(u32),
}

impl Destination {
    /// From a destination field: 8 bits (broadcast is 0xff), or `wide` as
    /// x2APIC mode has it (broadcast is 0xffff_ffff).
    pub const fn from_field(dest: u32, logical: bool, wide: bool) -> Self {
        let broadcast = if wide { u32::MAX } else { 0xff };
        let dest = dest & broadcast;
        if dest == broadcast {
            Destination::All
        } else if logical {
            Destination::Logical(dest)
        } else {
            Destination::Physical(dest)
        }
    }
}

/// One interrupt message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApicMessage {
    /// Whom it is for.
    pub dest: Destination,
    /// What it does there.
    pub mode: DeliveryMode,
    /// The vector; for `StartUp` the page to start at.
    pub vector: u8,
    /// Level-triggered: its end is to be told to the IOAPIC.
    pub level: bool,
}

/// Where devices send their interrupts: `vmm-kmod` routes with [`deliver`],
/// tests record.
pub trait IrqSink {
    /// A message to the local APICs. Returns whether any took it.
    fn message(&mut self, message: &ApicMessage) -> bool;
    /// The 8259's INTR line went up: LINT0 of the bootstrap processor.
    fn lint0(&mut self);
}

/// Why an MSI address and data pair is no interrupt message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsiError {
    /// The address is not in 0xfee0_0000 to 0xfeef_ffff.
    Address,
    /// A reserved delivery mode, or one that MSI cannot carry.
    DeliveryMode,
}

impl ApicMessage {
    /// Decodes an MSI (SDM Vol. 3A §10.11). The redirection hint makes a
    /// logical destination go to one receiver, as lowest priority does.
    pub const fn from_msi(addr: u64, data: u64) -> Result<Self, MsiError> {
        if addr >> 20 != 0xfee {
            return Err(MsiError::Address);
        }
        let logical = addr & 4 != 0;
        let hint = addr & 8 != 0;
        let Some(mode) = DeliveryMode::from_field((data >> 8) as u32) else {
            return Err(MsiError::DeliveryMode);
        };
        let mode = match mode {
            DeliveryMode::Init | DeliveryMode::StartUp => return Err(MsiError::DeliveryMode),
            DeliveryMode::Fixed if hint && logical => DeliveryMode::LowestPriority,
            mode => mode,
        };
        Ok(ApicMessage {
            dest: Destination::from_field((addr >> 12) as u32, logical, false),
            mode,
            vector: data as u8,
            level: data & (1 << 15) != 0,
        })
    }

    /// From the low half of an interrupt command register. `None` for what
    /// has no effect: a reserved mode, or the INIT level de-assert.
    pub(crate) const fn from_icr(low: u32, dest: Destination) -> Option<Self> {
        let Some(mode) = DeliveryMode::from_field(low >> 8) else {
            return None;
        };
        let deassert = low & (1 << 14) == 0 && low & (1 << 15) != 0;
        if matches!(mode, DeliveryMode::Init) && deassert {
            return None;
        }
        // The trigger mode of an IPI counts for INIT only.
        Some(ApicMessage {
            dest,
            mode,
            vector: low as u8,
            level: false,
        })
    }

    /// Whether the sender has to report "send illegal vector".
    pub(crate) const fn illegal_vector(&self) -> bool {
        matches!(
            self.mode,
            DeliveryMode::Fixed | DeliveryMode::LowestPriority
        ) && self.vector < 16
    }
}

fn accepts(mailbox: &Mailbox, mode: Mode, dest: Destination) -> bool {
    match dest {
        Destination::All => true,
        Destination::AllButMyself(id) => mailbox.id() != id,
        Destination::Physical(id) | Destination::Myself(id) => mailbox.id() == id,
        Destination::Logical(mda) => {
            let ldr = mailbox.ldr();
            if mode.contains(Mode::X2APIC) {
                ldr >> 16 == mda >> 16 && ldr & mda & 0xffff != 0
            } else if mda > 0xff {
                false
            } else if mode.contains(Mode::FLAT) {
                (ldr >> 24) & mda != 0
            } else if mode.contains(Mode::CLUSTER) {
                ldr >> 28 == mda >> 4 && (ldr >> 24) & mda & 0xf != 0
            } else {
                false
            }
        }
    }
}

/// Hands the message to one local APIC; returns whether to kick its vCPU.
fn post(mailbox: &Mailbox, message: &ApicMessage) -> bool {
    match message.mode {
        DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
            mailbox.post(message.vector, message.level)
        }
        DeliveryMode::Nmi => mailbox.post_nmi(),
        DeliveryMode::Init => mailbox.post_init(),
        DeliveryMode::StartUp => mailbox.post_sipi(message.vector),
        DeliveryMode::ExtInt => mailbox.post_extint(),
        // There is no system-management mode.
        DeliveryMode::Smi => false,
    }
}

/// Delivers a message to whom it may concern among `boxes`, one for each vCPU
/// in order. Calls `kick` with the index of every vCPU that has to look.
/// Returns the number of receivers. One pass over the vCPUs at most, two for
/// lowest priority; a physical destination whose id is the vCPU's index is
/// found at once.
///
/// `turn` makes equals take turns in lowest-priority arbitration.
#[cfg_attr(target_os = "none", optimize(speed))]
pub fn deliver<M, K>(boxes: &[M], message: &ApicMessage, turn: &AtomicU32, mut kick: K) -> usize
where
    M: AsRef<Mailbox>,
    K: FnMut(usize),
{
    if let Destination::Physical(id) | Destination::Myself(id) = message.dest {
        let guess = usize::try_from(id).unwrap_or(usize::MAX);
        let index = match boxes.get(guess) {
            Some(mailbox) if mailbox.as_ref().id() == id => Some(guess),
            _ => boxes.iter().position(|mailbox| mailbox.as_ref().id() == id),
        };
        let Some((index, mailbox)) = index.and_then(|i| boxes.get(i).map(|m| (i, m.as_ref())))
        else {
            return 0;
        };
        return usize::from(deliver_one(index, mailbox, message, &mut kick));
    }

    if message.mode == DeliveryMode::LowestPriority {
        return match arbitrate(boxes, message.dest, turn) {
            Some((index, mailbox)) => usize::from(deliver_one(index, mailbox, message, &mut kick)),
            None => 0,
        };
    }

    let mut receivers = 0;
    for (index, mailbox) in boxes.iter().enumerate() {
        let mailbox = mailbox.as_ref();
        if accepts(mailbox, mailbox.mode(), message.dest) {
            receivers += usize::from(deliver_one(index, mailbox, message, &mut kick));
        }
    }
    receivers
}

/// Calls `each` with the index of every vCPU that a destination addresses and
/// that accepts fixed interrupts.
#[inline(never)]
pub fn addressed<M: AsRef<Mailbox>>(boxes: &[M], dest: Destination, each: &mut dyn FnMut(usize)) {
    for (index, mailbox) in boxes.iter().enumerate() {
        let mailbox = mailbox.as_ref();
        let mode = mailbox.mode();
        if mode.contains(Mode::ENABLED) && accepts(mailbox, mode, dest) {
            each(index);
        }
    }
}

#[cfg_attr(target_os = "none", optimize(speed))]
fn deliver_one<K: FnMut(usize)>(
    index: usize,
    mailbox: &Mailbox,
    message: &ApicMessage,
    kick: &mut K,
) -> bool {
    let mode = mailbox.mode();
    let needs = match message.mode {
        DeliveryMode::Fixed | DeliveryMode::LowestPriority => Mode::ENABLED,
        _ => Mode::PRESENT,
    };
    if !mode.contains(needs) {
        return false;
    }
    if post(mailbox, message) {
        kick(index);
    }
    true
}

/// The receiver with the lowest task-priority class; of equals, the first
/// after the one that had the last turn.
fn arbitrate<'a, M: AsRef<Mailbox>>(
    boxes: &'a [M],
    dest: Destination,
    turn: &AtomicU32,
) -> Option<(usize, &'a Mailbox)> {
    let last = turn.load(Ordering::Relaxed) as usize;
    let mut best: Option<(u32, bool, usize, &Mailbox)> = None;
    for (index, mailbox) in boxes.iter().enumerate() {
        let mailbox = mailbox.as_ref();
        let mode = mailbox.mode();
        if !mode.contains(Mode::ENABLED) || !accepts(mailbox, mode, dest) {
            continue;
        }
        // Ordered by class, then those behind the last turn, then by index.
        let key = (mailbox.priority() >> 4, index <= last);
        if best.is_none_or(|(class, wrapped, _, _)| key < (class, wrapped)) {
            best = Some((key.0, key.1, index, mailbox));
        }
    }
    let (_, _, index, mailbox) = best?;
    turn.store(u32::try_from(index).unwrap_or(0), Ordering::Relaxed);
    Some((index, mailbox))
}
