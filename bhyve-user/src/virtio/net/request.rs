//! What a driver writes: the header before a packet, and control commands;
//! parsed and checked, without touching anything (virtio 1.2 §5.1.6).

use crate::net::{ETHERNET, GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, Header, NEEDS_CSUM, Offloads};

/// Checks the header of a packet to send, whose frame has `frame` bytes;
/// `accepted` is what the driver may leave to the device. Returns the header
/// as the network is to see it; `None` for a packet that makes no sense.
pub fn header(bytes: [u8; 10], frame: usize, accepted: Offloads) -> Option<Header> {
    let h = Header::parse(bytes);
    if !(ETHERNET..=ETHERNET + 65536).contains(&frame) {
        return None;
    }
    let mut out = Header::default();
    if h.flags & NEEDS_CSUM != 0 {
        // Ranges are inside of the frame, behind its Ethernet header.
        let start = usize::from(h.csum_start);
        let end = start + usize::from(h.csum_offset) + 2;
        if !accepted.csum || start < ETHERNET || end > frame {
            return None;
        }
        out.flags = NEEDS_CSUM;
        out.csum_start = h.csum_start;
        out.csum_offset = h.csum_offset;
    }
    let ecn = h.gso_type & GSO_ECN != 0;
    let allowed = match h.gso_type & !GSO_ECN {
        GSO_NONE => return (!ecn).then_some(out),
        GSO_TCPV4 => accepted.tso4,
        GSO_TCPV6 => accepted.tso6,
        _ => false,
    };
    // To cut TCP, its checksum has to be made anew (§5.1.6.2.1).
    let sense = allowed && (!ecn || accepted.ecn) && h.gso_size > 0 && out.flags != 0;
    if !sense {
        return None;
    }
    out.gso_type = h.gso_type;
    out.gso_size = h.gso_size;
    // A hint, and never more than there is.
    out.hdr_len = h.hdr_len.min(u16::try_from(frame).unwrap_or(u16::MAX));
    Some(out)
}

/// Receive modes (§5.1.6.5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Everything.
    Promiscuous,
    /// Every multicast.
    AllMulticast,
    /// Every unicast.
    AllUnicast,
    /// No multicast.
    NoMulticast,
    /// No unicast.
    NoUnicast,
    /// No broadcast.
    NoBroadcast,
}

/// A control command (§5.1.6.5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// A receive mode, on or off.
    Rx(Mode, bool),
    /// The addresses to listen to besides the card's own.
    MacTable {
        /// Single cards'.
        unicast: Vec<[u8; 6]>,
        /// Groups'.
        multicast: Vec<[u8; 6]>,
    },
    /// The card's address.
    MacAddress([u8; 6]),
    /// How many pairs of queues are in use.
    Pairs(u16),
}

/// Most bytes of a command that are looked at.
pub const LONGEST: usize = 8192;

const CLASS_RX: u8 = 0;
const CLASS_MAC: u8 = 1;
const CLASS_MQ: u8 = 4;

/// A list of addresses: their number, and six bytes each. Returns what is
/// behind it as well.
fn table(data: &[u8]) -> Option<(Vec<[u8; 6]>, &[u8])> {
    let (count, rest) = data.split_first_chunk::<4>()?;
    let count = usize::try_from(u32::from_le_bytes(*count)).ok()?;
    let bytes = count.checked_mul(6)?;
    let (list, rest) = rest.split_at_checked(bytes)?;
    let (list, _) = list.as_chunks::<6>();
    Some((list.to_vec(), rest))
}

/// Parses a command: class, command, and its data. `pairs` is how many pairs
/// of queues there are, if the driver knows of several.
pub fn command(bytes: &[u8], pairs: Option<u16>) -> Option<Command> {
    let ([class, kind], data) = bytes.split_first_chunk::<2>()?;
    match (*class, *kind, data) {
        (CLASS_RX, kind, [on, ..]) => {
            let mode = match kind {
                0 => Mode::Promiscuous,
                1 => Mode::AllMulticast,
                2 => Mode::AllUnicast,
                3 => Mode::NoMulticast,
                4 => Mode::NoUnicast,
                5 => Mode::NoBroadcast,
                _ => return None,
            };
            Some(Command::Rx(mode, *on != 0))
        }
        (CLASS_MAC, 0, data) => {
            let (unicast, rest) = table(data)?;
            let (multicast, _) = table(rest)?;
            Some(Command::MacTable { unicast, multicast })
        }
        (CLASS_MAC, 1, data) => data.first_chunk().map(|mac| Command::MacAddress(*mac)),
        (CLASS_MQ, 0, [a, b, ..]) => {
            let wanted = u16::from_le_bytes([*a, *b]);
            let there = pairs.is_some_and(|n| (1..=n).contains(&wanted));
            there.then_some(Command::Pairs(wanted))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(flags: u8, gso: u8, size: u16, start: u16, offset: u16) -> [u8; 10] {
        let h = Header {
            flags,
            gso_type: gso,
            hdr_len: 0xffff,
            gso_size: size,
            csum_start: start,
            csum_offset: offset,
        };
        *h.bytes().first_chunk().unwrap()
    }

    #[test]
    fn a_plain_packet_has_a_plain_header() {
        let none = Offloads::default();
        assert_eq!(
            header(bytes(0, 0, 9, 9, 9), 60, none),
            Some(Header::default())
        );
        assert_eq!(header(bytes(0, 0, 0, 0, 0), 13, none), None, "no frame");
        assert_eq!(header(bytes(0, 0, 0, 0, 0), 14 + 65537, none), None);
        // What the host must not see is gone.
        assert_eq!(
            header(bytes(0xfe, 0, 0, 0, 0), 60, none),
            Some(Header::default())
        );
    }

    #[test]
    fn a_checksums_place_is_inside_of_the_frame() {
        let all = Offloads::ALL;
        assert!(header(bytes(1, 0, 0, 34, 16), 54, all).is_some());
        for (start, offset) in [(34, 19), (13, 16), (0xffff, 0xffff), (52, 1), (54, 0)] {
            assert_eq!(
                header(bytes(1, 0, 0, start, offset), 54, all),
                None,
                "{start} {offset}"
            );
        }
        assert_eq!(
            header(bytes(1, 0, 0, 34, 16), 54, Offloads::default()),
            None
        );
    }

    #[test]
    fn pieces_to_cut_need_all_that_was_accepted() {
        let cut =
            |flags, gso, size, accepted| header(bytes(flags, gso, size, 34, 16), 3000, accepted);
        let h = cut(1, GSO_TCPV4, 1460, Offloads::ALL).unwrap();
        assert_eq!((h.gso_size, h.hdr_len), (1460, 3000));
        assert!(cut(1, GSO_TCPV6 | GSO_ECN, 1440, Offloads::ALL).is_some());
        assert_eq!(cut(0, GSO_TCPV4, 1460, Offloads::ALL), None, "no checksum");
        assert_eq!(cut(1, GSO_TCPV4, 0, Offloads::ALL), None, "no size");
        assert_eq!(cut(1, 3, 1460, Offloads::ALL), None, "UDP was not offered");
        assert_eq!(cut(1, 0x7f, 1460, Offloads::ALL), None);
        let csum = Offloads {
            csum: true,
            ..Offloads::default()
        };
        assert_eq!(cut(1, GSO_TCPV4, 1460, csum), None, "not accepted");
        let no_ecn = Offloads {
            ecn: false,
            ..Offloads::ALL
        };
        assert_eq!(cut(1, GSO_TCPV4 | GSO_ECN, 1460, no_ecn), None);
    }

    #[test]
    fn commands_of_the_standard() {
        assert_eq!(
            command(&[0, 0, 1], None),
            Some(Command::Rx(Mode::Promiscuous, true))
        );
        assert_eq!(
            command(&[0, 5, 0], None),
            Some(Command::Rx(Mode::NoBroadcast, false))
        );
        assert_eq!(
            command(&[1, 1, 2, 0, 0, 0, 0, 1], None),
            Some(Command::MacAddress([2, 0, 0, 0, 0, 1]))
        );
        let mut table = vec![1, 0, 1, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0];
        table.extend([3; 12]);
        assert_eq!(
            command(&table, None),
            Some(Command::MacTable {
                unicast: vec![[2; 6]],
                multicast: vec![[3; 6]; 2],
            })
        );
        assert_eq!(command(&[4, 0, 4, 0], Some(4)), Some(Command::Pairs(4)));
    }

    #[test]
    fn commands_without_sense_are_refused() {
        let huge = [1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0];
        let short = [1, 0, 2, 0, 0, 0, 1, 2, 3, 4, 5, 6];
        let half = [1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1];
        for bad in [
            &[][..],
            &[0],
            &[0, 0],
            &[0, 6, 1],
            &[1, 1, 1, 2, 3, 4, 5],
            &[1, 2, 0],
            &[2, 0, 1, 0],
            &[4, 0, 0, 0],
            &[4, 0, 5, 0],
            &[4, 0, 1],
            &huge,
            &short,
            &half,
        ] {
            assert_eq!(command(bad, Some(4)), None, "{bad:?}");
        }
        assert_eq!(command(&[4, 0, 1, 0], None), None, "no MQ, no pairs");
    }
}
