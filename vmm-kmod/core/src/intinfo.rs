//! Events whose delivery was interrupted: what a second exception makes of
//! them, and FreeBSD's 64-bit form of them (`VM_INTINFO_*`), which is that of
//! EXITINTINFO (APM Vol. 2 §15.7.2) and of the low bits of VMX's IDT-vectoring
//! information (SDM Vol. 3C §24.9.3).

use crate::cpu::{Event, EventKind};

/// An error code is to be pushed.
pub const DEL_ERRCODE: u64 = 1 << 11;
/// Bits that must be clear.
pub const RESERVED: u64 = 0x7fff_f000;
/// There is an event.
pub const VALID: u64 = 1 << 31;

const NMI: u8 = 2;
const DOUBLE_FAULT: u8 = 8;
const PAGE_FAULT: u8 = 14;

/// An information word that describes no event that can exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidIntinfo;

/// What is to be delivered after two events met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combined {
    /// This event: the second one, or a double fault.
    Deliver(Event),
    /// Shutdown.
    TripleFault,
}

/// Classes of exceptions (SDM Vol. 3A table 6-4).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn class(e: &Event) -> Class {
    // INT n and its like are benign whatever vector they name.
    if e.kind != EventKind::Exception {
        return Class::Benign;
    }
    match e.vector {
        // #DE, #TS, #NP, #SS, #GP, #CP.
        0 | 10..=13 | 21 => Class::Contributory,
        // #PF, #VE.
        PAGE_FAULT | 20 => Class::PageFault,
        DOUBLE_FAULT => Class::DoubleFault,
        _ => Class::Benign,
    }
}

/// What follows when `second`, an exception, arises while `first` was being
/// delivered (SDM Vol. 3A table 6-5).
pub fn combine(first: Option<Event>, second: Event) -> Combined {
    let Some(first) = first else {
        return Combined::Deliver(second);
    };
    match (class(&first), class(&second)) {
        (Class::DoubleFault, Class::Contributory | Class::PageFault | Class::DoubleFault) => {
            Combined::TripleFault
        }
        (Class::Contributory, Class::Contributory)
        | (Class::PageFault, Class::Contributory | Class::PageFault) => {
            Combined::Deliver(Event::exception_with(DOUBLE_FAULT, 0))
        }
        _ => Combined::Deliver(second),
    }
}

/// FreeBSD's form of an event.
pub fn to_raw(e: &Event) -> u64 {
    let mut v = u64::from(e.vector) | (e.kind as u64) << 8 | VALID;
    if let Some(code) = e.error_code {
        v |= DEL_ERRCODE | u64::from(code) << 32;
    }
    v
}

/// The event in FreeBSD's form, `None` if the word is not marked valid. The
/// instruction length of a software event, which the word lacks, is 0.
pub fn from_raw(info: u64) -> Result<Option<Event>, InvalidIntinfo> {
    if info & VALID == 0 {
        return Ok(None);
    }
    let vector = info as u8;
    let kind = match info >> 8 & 7 {
        0 => EventKind::External,
        2 if vector == NMI => EventKind::Nmi,
        3 if vector < 32 => EventKind::Exception,
        4 => EventKind::SoftwareInterrupt,
        5 => EventKind::PrivilegedSoftwareException,
        6 => EventKind::SoftwareException,
        _ => return Err(InvalidIntinfo),
    };
    if info & RESERVED != 0 {
        return Err(InvalidIntinfo);
    }
    let error_code = (info & DEL_ERRCODE != 0).then_some((info >> 32) as u32);
    Ok(Some(Event {
        kind,
        vector,
        error_code,
        inst_len: 0,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn e(vector: u8) -> Event {
        Event::exception(vector)
    }

    #[test]
    fn double_and_triple_faults() {
        let df = Combined::Deliver(Event::exception_with(8, 0));
        for (first, second, want) in [
            (13, 13, df),
            (0, 11, df),
            (14, 14, df),
            (14, 12, df),
            (13, 14, Combined::Deliver(e(14))),
            (1, 13, Combined::Deliver(e(13))),
            (17, 14, Combined::Deliver(e(14))),
            (13, 1, Combined::Deliver(e(1))),
            (8, 14, Combined::TripleFault),
            (8, 10, Combined::TripleFault),
            (8, 1, Combined::Deliver(e(1))),
        ] {
            assert_eq!(combine(Some(e(first)), e(second)), want, "{first} {second}");
        }
        assert_eq!(combine(None, e(13)), Combined::Deliver(e(13)));
    }

    #[test]
    fn interrupts_are_benign_whatever_their_vector() {
        for kind in [
            EventKind::External,
            EventKind::Nmi,
            EventKind::SoftwareInterrupt,
        ] {
            let first = Event {
                kind,
                vector: 13,
                error_code: None,
                inst_len: 2,
            };
            assert_eq!(combine(Some(first), e(14)), Combined::Deliver(e(14)));
        }
    }

    #[test]
    fn freebsd_form_and_back() {
        let gp = Event::exception_with(13, 0x18);
        assert_eq!(to_raw(&gp), 0x18_8000_0b0d);
        assert_eq!(from_raw(0x18_8000_0b0d), Ok(Some(gp)));
        let irq = Event {
            kind: EventKind::External,
            vector: 0x30,
            error_code: None,
            inst_len: 0,
        };
        assert_eq!(to_raw(&irq), 0x8000_0030);
        assert_eq!(from_raw(0x8000_0030), Ok(Some(irq)));
        assert_eq!(from_raw(0x7fff_ffff), Ok(None));
    }

    #[test]
    fn impossible_events_are_refused() {
        for info in [
            0x8000_0203u64, // NMI with another vector
            0x8000_0320,    // exception 32
            0x8000_0130,    // type 1
            0x8000_0730,    // type 7
            0x8000_1030,    // reserved bit
        ] {
            assert_eq!(from_raw(info), Err(InvalidIntinfo), "{info:#x}");
        }
    }
}
