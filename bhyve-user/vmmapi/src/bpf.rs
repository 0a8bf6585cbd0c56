//! An Ethernet interface of the host's through bpf(4), FreeBSD's packet filter:
//! what comes in there is read, what is written goes out there. For interfaces
//! that have no file of their own, as an end of an epair(4).
//!
//! A packet is 12 bytes of virtio header and an Ethernet frame, as a
//! [tap](crate::tap)'s.

#[cfg(target_os = "freebsd")]
#[path = "bpf/freebsd.rs"]
mod host;

#[cfg(target_os = "freebsd")]
pub use host::Bpf;

use std::ops::Range;

/// Where the fields of a `struct bpf_hdr` are (bpf(4), net/bpf.h, amd64): behind
/// a `struct timeval` the bytes captured, the bytes on the wire, and the bytes of
/// the header with what follows it up to the frame.
const CAPTURED: usize = 16;
const ON_WIRE: usize = 20;
const HEADER_LENGTH: usize = 24;
/// `BPF_ALIGNMENT`: the records' starts.
const ALIGNMENT: usize = 8;

/// The records that a read has put into a buffer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Records {
    next: usize,
    end: usize,
}

impl Records {
    /// Those in the first `bytes` bytes.
    pub fn new(bytes: usize) -> Records {
        Records {
            next: 0,
            end: bytes,
        }
    }

    /// Whether there are none left.
    pub fn is_empty(&self) -> bool {
        self.next >= self.end
    }

    /// Where the next whole frame is in `buffer`; frames that were cut are left
    /// out.
    pub fn next(&mut self, buffer: &[u8]) -> Option<Range<usize>> {
        loop {
            let record = buffer.get(self.next..self.end)?;
            let Some((header, captured, on_wire)) = header(record) else {
                // Nothing of the kernel's; so is the rest.
                self.next = self.end;
                return None;
            };
            let start = self.next + header;
            let frame = start..start + captured;
            self.next += (header + captured).next_multiple_of(ALIGNMENT);
            if captured == on_wire {
                return Some(frame);
            }
        }
    }
}

/// Bytes in front of a record's frame, bytes of the frame that are there, and
/// those it had on the wire.
fn header(record: &[u8]) -> Option<(usize, usize, usize)> {
    let word = |at: usize| {
        let bytes = record.get(at..)?.first_chunk::<4>()?;
        usize::try_from(u32::from_ne_bytes(*bytes)).ok()
    };
    let length = record.get(HEADER_LENGTH..)?.first_chunk::<2>()?;
    let length = usize::from(u16::from_ne_bytes(*length));
    let captured = word(CAPTURED)?;
    let whole = length >= HEADER_LENGTH + 2 && length + captured <= record.len();
    whole.then_some((length, captured, word(ON_WIRE)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A record as bpf(4) of FreeBSD/amd64 writes it for an Ethernet: the frame's
    /// payload, not its header, is aligned.
    fn record(frame: &[u8], on_wire: u32) -> Vec<u8> {
        let mut r = vec![0xee; 16];
        r.extend((frame.len() as u32).to_ne_bytes());
        r.extend(on_wire.to_ne_bytes());
        r.extend(26_u16.to_ne_bytes());
        r.extend(frame);
        r.resize(r.len().next_multiple_of(8), 0xee);
        r
    }

    fn frames(buffer: &[u8]) -> Vec<Vec<u8>> {
        let mut records = Records::new(buffer.len());
        let frames = std::iter::from_fn(|| records.next(buffer));
        let frames: Vec<Vec<u8>> = frames.map(|f| buffer[f].to_vec()).collect();
        assert!(records.is_empty());
        frames
    }

    #[test]
    fn each_record_of_a_read_is_a_frame() {
        let mut buffer = record(&[1; 60], 60);
        assert_eq!(buffer.len(), 88);
        buffer.extend(record(&[2; 1514], 1514));
        // One that did not fit the buffer is no frame.
        buffer.extend(record(&[3; 100], 9014));
        buffer.extend(record(&[4; 61], 61));
        // The kernel does not pad the last.
        buffer.truncate(buffer.len() - 1);
        assert_eq!(frames(&buffer), [vec![1; 60], vec![2; 1514], vec![4; 61]]);
        assert_eq!(frames(&[]), Vec::<Vec<u8>>::new());
    }

    #[test]
    fn what_is_no_record_ends_the_read() {
        let good = record(&[1; 60], 60);
        let mut zero = good.clone();
        zero.extend([0; 64]);
        assert_eq!(frames(&zero), [vec![1; 60]]);
        let mut short = good.clone();
        short.extend(&good[..20]);
        assert_eq!(frames(&short), [vec![1; 60]]);
        let mut long = good.clone();
        long[CAPTURED..CAPTURED + 4].fill(0xff);
        assert!(frames(&long).is_empty());
    }
}
