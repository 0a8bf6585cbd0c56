//! Networks: what a network card is plugged into on the host.
//!
//! A packet on its way between a card and a [`Port`] is a [`Header`] of
//! [`HEADER`] bytes and an Ethernet frame without its FCS behind it, in one
//! buffer: the form that tap devices take and give.

pub mod epair;
pub mod mac;
pub mod options;
pub mod tap;
pub mod user;

use std::io;
use std::os::fd::RawFd;
use std::time::Instant;

/// Bytes of [`Header`] as packets have it (virtio 1.2 §5.1.6, `num_buffers`
/// included).
pub const HEADER: usize = 12;
/// The largest packet: header, Ethernet header, and 64 KiB.
pub const LARGEST: usize = HEADER + 14 + 65536;
/// Bytes of an Ethernet header.
pub const ETHERNET: usize = 14;

/// Header flag: the checksum is for the receiver to complete.
pub const NEEDS_CSUM: u8 = 1;
/// Header flag: the checksum was seen to be right.
pub const DATA_VALID: u8 = 2;
/// `gso_type`: one packet as it goes on the wire.
pub const GSO_NONE: u8 = 0;
/// `gso_type`: TCP over IPv4, to be cut into segments.
pub const GSO_TCPV4: u8 = 1;
/// `gso_type`: TCP over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// `gso_type`, beside the others: the TCP segment has ECN's CWR.
pub const GSO_ECN: u8 = 0x80;

/// What stands before a frame: work that one side leaves to the other
/// (virtio 1.2 §5.1.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// [`NEEDS_CSUM`], [`DATA_VALID`].
    pub flags: u8,
    /// One of the GSO kinds, perhaps with [`GSO_ECN`].
    pub gso_type: u8,
    /// Bytes of all headers, Ethernet to TCP; a hint.
    pub hdr_len: u16,
    /// Bytes of TCP payload of each segment to cut.
    pub gso_size: u16,
    /// Where the checksum's range starts, bytes into the frame.
    pub csum_start: u16,
    /// Where the checksum goes, bytes behind `csum_start`.
    pub csum_offset: u16,
}

impl Header {
    /// From the first ten bytes of a packet.
    pub fn parse(bytes: [u8; 10]) -> Header {
        let [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1] = bytes;
        Header {
            flags,
            gso_type,
            hdr_len: u16::from_le_bytes([h0, h1]),
            gso_size: u16::from_le_bytes([g0, g1]),
            csum_start: u16::from_le_bytes([s0, s1]),
            csum_offset: u16::from_le_bytes([o0, o1]),
        }
    }

    /// As it stands before a frame that fills one buffer.
    pub fn bytes(&self) -> [u8; HEADER] {
        let [h0, h1] = self.hdr_len.to_le_bytes();
        let [g0, g1] = self.gso_size.to_le_bytes();
        let [s0, s1] = self.csum_start.to_le_bytes();
        let [o0, o1] = self.csum_offset.to_le_bytes();
        let (flags, gso) = (self.flags, self.gso_type);
        [flags, gso, h0, h1, g0, g1, s0, s1, o0, o1, 1, 0]
    }
}

/// Work on packets that a side is ready to do for the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Completes checksums of TCP and UDP.
    pub csum: bool,
    /// Takes TCP over IPv4 in pieces of up to 64 KiB.
    pub tso4: bool,
    /// The same over IPv6.
    pub tso6: bool,
    /// Such pieces with ECN.
    pub ecn: bool,
}

impl Offloads {
    /// What both can.
    pub fn and(self, other: Offloads) -> Offloads {
        Offloads {
            csum: self.csum && other.csum,
            tso4: self.tso4 && other.tso4,
            tso6: self.tso6 && other.tso6,
            ecn: self.ecn && other.ecn,
        }
    }

    /// All of them.
    pub const ALL: Offloads = Offloads {
        csum: true,
        tso4: true,
        tso6: true,
        ecn: true,
    };
}

/// The host's side of a network card, or of one pair of its queues.
pub trait Port: Send {
    /// What it does for the guest with packets that the guest sends.
    fn takes(&self) -> Offloads;

    /// What it may leave to the guest in packets that the guest receives, once
    /// [`Port::guest_takes`] allows it.
    fn gives(&self) -> Offloads;

    /// The driver's choice; until then, and after a reset, nothing. Whatever
    /// the guest had going on is over.
    ///
    /// # Errors
    /// The host refuses.
    fn guest_takes(&mut self, offloads: Offloads) -> io::Result<()>;

    /// Has this port get its share of a card's packets, or none. The first is
    /// always on.
    ///
    /// # Errors
    /// The host refuses.
    fn enable(&mut self, _on: bool) -> io::Result<()> {
        Ok(())
    }

    /// Sends a packet. One that the network has no room for is dropped, as a
    /// wire would.
    ///
    /// # Errors
    /// The network is gone.
    fn send(&mut self, packet: &[u8]) -> io::Result<()>;

    /// Receives the next packet into `into` ([`LARGEST`] bytes); its length,
    /// `None` if there is none at the moment.
    ///
    /// # Errors
    /// The network is gone.
    fn receive(&mut self, into: &mut [u8]) -> io::Result<Option<usize>>;

    /// Whether a packet waits that [`Port::fd`] does not tell of.
    fn pending(&self) -> bool {
        false
    }

    /// Readable when [`Port::receive`] may find something.
    fn fd(&self) -> RawFd;

    /// When [`Port::receive`] is due even if the descriptor stays silent.
    fn deadline(&self) -> Option<Instant> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_the_standards() {
        // virtio 1.2 §5.1.6: u8 flags, u8 gso_type, le16 hdr_len, gso_size,
        // csum_start, csum_offset, num_buffers.
        let bytes = [1, 0x81, 0x36, 0, 0xb4, 5, 0x22, 0, 0x10, 0];
        let h = Header::parse(bytes);
        let want = Header {
            flags: NEEDS_CSUM,
            gso_type: GSO_TCPV4 | GSO_ECN,
            hdr_len: 54,
            gso_size: 1460,
            csum_start: 34,
            csum_offset: 16,
        };
        assert_eq!(h, want);
        let mut all = bytes.to_vec();
        all.extend([1, 0]);
        assert_eq!(h.bytes().to_vec(), all);
    }
}
