//! A packet's header (virtio 1.2 §5.10.6).

/// Bytes of a header.
pub const HEADER: usize = 44;
/// A stream.
pub const STREAM: u16 = 1;

/// What a packet is for (§5.10.6): its operation.
pub mod op {
    #![allow(missing_docs)]
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of [`op::SHUTDOWN`]: the sender will receive, or send, no more.
pub const NO_RECEIVE: u32 = 1;
/// See [`NO_RECEIVE`].
pub const NO_SEND: u32 = 2;

/// A header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Sender's CID.
    pub src_cid: u64,
    /// Receiver's CID.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Bytes behind the header.
    pub len: u32,
    /// [`STREAM`].
    pub kind: u16,
    /// One of [`op`].
    pub op: u16,
    /// Of [`op::SHUTDOWN`].
    pub flags: u32,
    /// Bytes that the sender's buffer has.
    pub buf_alloc: u32,
    /// Bytes that the sender's program has taken so far.
    pub fwd_cnt: u32,
}

impl Header {
    /// Parses one.
    pub fn parse(b: &[u8; HEADER]) -> Header {
        // The offsets are inside of the array's length.
        let word = |at: usize| {
            let four = b.get(at..at + 4).and_then(|b| b.first_chunk());
            four.map_or(0, |f| u32::from_le_bytes(*f))
        };
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Header {
            src_cid: long(0),
            dst_cid: long(8),
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            kind: word(28) as u16,
            op: (word(28) >> 16) as u16,
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
        }
    }

    /// As bytes.
    pub fn bytes(&self) -> [u8; HEADER] {
        let mut out = [0; HEADER];
        let parts: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        for (to, from) in out.iter_mut().zip(parts.concat()) {
            *to = from;
        }
        out
    }
}

/// The port of `CONNECT PORT`, which a program of the host says first.
pub fn connect(line: &str) -> Option<u32> {
    line.strip_prefix("CONNECT ")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_come_back_as_they_were() {
        let mut bytes = [0; HEADER];
        for (i, b) in bytes.iter_mut().enumerate() {
            *b = i as u8 + 1;
        }
        let h = Header::parse(&bytes);
        assert_eq!(h.bytes(), bytes);
        assert_eq!((h.kind, h.op), (0x1e1d, 0x201f));
        assert_eq!(connect("CONNECT 52"), Some(52));
        for bad in [
            "CONNECT",
            "CONNECT x",
            "connect 1",
            "CONNECT 4294967296",
            "",
        ] {
            assert_eq!(connect(bad), None, "{bad}");
        }
    }
}
