//! virtio-rnd: the host's entropy (virtio 1.2 §5.4).

use std::fs::File;
use std::io;

use vmmapi::GuestMemory;

use super::queue::{Chain, Malformed};
use super::{Built, Device, Identity};

/// Most bytes for one request, so that none keeps the worker for long.
const MOST: u64 = 64 << 10;
/// Entries of its queue, as in bhyve.
const QUEUE: u16 = 64;

/// A source of entropy; it has no options.
///
/// # Errors
/// There are some, or the host has no entropy.
pub fn build(conf: &str) -> Result<Built, String> {
    if !conf.is_empty() {
        return Err(format!("no option \"{conf}\"; there is none"));
    }
    let (identity, rnd) = Rnd::open().map_err(|e| format!("/dev/urandom: {e}"))?;
    Ok(Built::single(identity, rnd))
}

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
            queues: vec![QUEUE],
            ..Identity::default()
        };
        let source = File::open("/dev/urandom")?;
        crate::sandbox::limit(&source, crate::sandbox::Purpose::Image)?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::queue::{Buffer, total};

    #[test]
    fn every_byte_of_a_request_is_filled_up_to_the_bound() {
        let memory = GuestMemory::anonymous(1 << 20).unwrap();
        let (identity, mut rnd) = Rnd::open().unwrap();
        assert_eq!(identity.kind, 4);
        let mut chain = Chain::default();
        let lens = [3, 64, 4096];
        let at = |i: usize| 0x1000 * (i as u64 + 1) + 1;
        let buffers = lens.iter().enumerate();
        chain
            .writable
            .extend(buffers.map(|(i, &len)| Buffer { addr: at(i), len }));
        let used = rnd.serve(0, &mut chain, &memory, 0).unwrap();
        assert_eq!(u64::from(used), total(&chain.writable));
        for (i, &len) in lens.iter().enumerate().skip(1) {
            let mut bytes = vec![0; len as usize + 1];
            memory.read_bytes(at(i), &mut bytes).unwrap();
            assert_eq!(bytes.pop(), Some(0), "nothing behind the buffer");
            assert!(bytes[len as usize / 2..].iter().any(|&b| b != 0));
        }
        chain.writable = vec![Buffer {
            addr: 0,
            len: 1 << 20,
        }];
        assert_eq!(
            u64::from(rnd.serve(0, &mut chain, &memory, 0).unwrap()),
            MOST
        );
    }
}
