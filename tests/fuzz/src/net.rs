//! What a guest sends over its network card.

use bhyve::net::mac::Mac;
use bhyve::net::user::UserNet;
use bhyve::net::user::options::Options;
use bhyve::net::{ETHERNET, HEADER, LARGEST, Offloads, Port};
use bhyve::virtio::net::filter::Filter;
use bhyve::virtio::net::request;

/// Packets of one input.
const PACKETS: usize = 64;

/// Pieces of an input, each behind its length.
fn pieces(mut data: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (len, rest) = data.split_first_chunk::<2>()?;
        let len = usize::from(u16::from_le_bytes(*len)).min(rest.len());
        let (piece, rest) = rest.split_at(len);
        data = rest;
        Some(piece)
    })
    .take(PACKETS)
}

/// Headers of packets and control commands. The first byte is what the driver
/// has accepted.
pub fn virtio_net(data: &[u8]) {
    let Some((&bits, data)) = data.split_first() else {
        return;
    };
    let accepted = Offloads {
        csum: bits & 1 != 0,
        tso4: bits & 2 != 0,
        tso6: bits & 4 != 0,
        ecn: bits & 8 != 0,
    };
    let pairs = (bits & 16 != 0).then_some(4);
    let mut filter = Filter::new([0, 0xa0, 0x98, 1, 2, 3]);
    for piece in pieces(data) {
        if let Some(head) = piece.first_chunk::<10>()
            && let Some(h) = request::header(*head, piece.len(), accepted)
        {
            let end = usize::from(h.csum_start) + usize::from(h.csum_offset);
            assert!(h.flags == 0 || end + 2 <= piece.len());
            assert!(h.gso_type == 0 || (accepted.csum && h.gso_size > 0));
        }
        if let Some(command) = request::command(piece, pairs) {
            filter.set(&command);
        }
        if let Some(to) = piece.first_chunk() {
            let _ = filter.passes(*to);
        }
    }
}

/// Packets for a user-mode network that has no way out. The first byte is what
/// the guest takes.
pub fn user_net(data: &[u8]) {
    let Some((&bits, data)) = data.split_first() else {
        return;
    };
    let mut net = UserNet::new(&Options::default(), Mac([0, 0xa0, 0x98, 1, 2, 3]), 1500)
        .unwrap_or_else(|e| panic!("{e}"));
    let csum = bits & 1 != 0;
    let takes = Offloads {
        csum,
        tso4: bits & 2 != 0,
        ..Offloads::default()
    };
    net.guest_takes(takes).unwrap_or_else(|e| panic!("{e}"));
    let mut into = vec![0; LARGEST];
    for piece in pieces(data) {
        net.send(piece).unwrap_or_else(|e| panic!("{e}"));
        let mut answers = 0;
        while let Ok(Some(len)) = net.receive(&mut into) {
            assert!(len <= HEADER + ETHERNET + 1500);
            assert!(csum || into.first() == Some(&0));
            answers += 1;
            assert!(answers <= 64, "one packet has {answers} answers");
        }
    }
}
