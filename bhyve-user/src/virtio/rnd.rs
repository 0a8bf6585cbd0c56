//! virtio-rnd: the host's entropy (virtio 1.2 §5.4).

use std::fs::File;
use std::io;

use vmmapi::GuestMemory;

use super::queue::{Chain, Malformed};
use super::{Device, Identity};

/// Most bytes for one request, so that none keeps the worker for long.
const MOST: u64 = 64 << 10;
/// Entries of its queue, as in bhyve.
const QUEUE: u16 = 64;

/// The device.
pub struct Rnd {
    source: File,
}

impl Rnd {
    /// Entropy from the host's `/dev/urandom`.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open() -> io::Result<(Identity, Rnd)> {
        let identity = Identity {
            kind: 4,
            // Encryption controller, as in bhyve.
            class: (0x10, 0),
            features: 0,
            queues: vec![QUEUE],
            config: Vec::new(),
        };
        let source = File::open("/dev/urandom")?;
        Ok((identity, Rnd { source }))
    }
}

impl Device for Rnd {
    fn serve(
        &mut self,
        _: usize,
        chain: &mut Chain,
        memory: &GuestMemory,
        _: u64,
    ) -> Result<u32, Malformed> {
        let mut done = 0;
        for b in &chain.writable {
            let len = u64::from(b.len).min(MOST - done);
            // Short of entropy the driver gets less, and asks again.
            let n = memory
                .read_from_file(&self.source, 0, b.addr, len)
                .unwrap_or(0);
            done += n;
            if n < u64::from(b.len) {
                break;
            }
        }
        Ok(done as u32)
    }
}
