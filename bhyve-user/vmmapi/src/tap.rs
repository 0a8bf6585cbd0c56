//! Tap devices: Ethernet interfaces of the host whose other end is a file.
//!
//! A packet is 12 bytes of virtio header and an Ethernet frame; where the
//! host's tap knows no such header it is left out and put in here.

#[cfg(target_os = "freebsd")]
#[path = "tap/freebsd.rs"]
mod host;
#[cfg(target_os = "linux")]
#[path = "tap/linux.rs"]
mod host;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

/// Bytes of the header in front of each frame.
pub const HEADER: usize = 12;

/// Why a tap device cannot be had, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The host has no taps at all.
    #[error("{0} is not there: {1}")]
    NoDriver(&'static str, &'static str),
    /// The name is none that the host could know.
    #[error("\"{0}\" cannot be the name of a tap: {1}")]
    Name(String, &'static str),
    /// No interface of that name.
    #[error("there is no interface {0}; make it with: {1}")]
    NoSuchTap(String, String),
    /// An interface, but no tap.
    #[error("{0} is no tap device; make one with: {1}")]
    NotATap(String, String),
    /// An interface, but its packets are no Ethernet frames.
    #[error("{0} is no Ethernet interface")]
    NotEthernet(String),
    /// Not ours.
    #[error("no permission to use {0}: {1}")]
    Permission(String, String),
    /// Somebody has it.
    #[error("{0} is in use by another process (another VM?)")]
    Busy(String),
    /// It was made for one queue, or for several.
    #[error("{0}: {1}")]
    Queues(String, String),
    /// What the host says otherwise.
    #[error("{0}: {1}")]
    Host(String, io::Error),
}

/// What a guest takes of work that is left to it, and the other way round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TapOffloads {
    /// Checksums of TCP and UDP.
    pub csum: bool,
    /// Segmentation of TCP over IPv4.
    pub tso4: bool,
    /// Segmentation of TCP over IPv6.
    pub tso6: bool,
    /// The same with ECN.
    pub ecn: bool,
}

/// An open tap device.
#[derive(Debug)]
pub struct Tap {
    name: String,
    queues: Vec<File>,
    /// The host's packets have headers.
    header: bool,
}

impl Tap {
    /// Opens tap `name` with `queues` queues.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn open(name: &str, queues: usize) -> Result<Tap, TapError> {
        let (queues, header) = host::open(name, queues.max(1))?;
        Ok(Tap {
            name: name.to_owned(),
            queues,
            header,
        })
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Queues opened.
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// Whether the host completes checksums and cuts segments.
    pub fn has_offloads(&self) -> bool {
        self.header
    }

    /// Says what the host may leave undone in packets that it gives.
    ///
    /// # Errors
    /// The host refuses.
    pub fn set_offloads(&self, offloads: TapOffloads) -> io::Result<()> {
        if !self.header {
            return Ok(());
        }
        match self.queues.first() {
            Some(first) => host::set_offloads(first, offloads),
            None => Ok(()),
        }
    }

    /// Has the host give packets to a queue, or not. At the start all get some.
    ///
    /// # Errors
    /// The host refuses.
    pub fn enable(&self, queue: usize, on: bool) -> io::Result<()> {
        match self.queues.get(queue) {
            Some(file) => host::attach_queue(file, on),
            None => Ok(()),
        }
    }

    /// Those of its queues.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.queues.iter().map(AsFd::as_fd)
    }

    /// The descriptor of a queue, readable when a packet waits.
    pub fn fd(&self, queue: usize) -> RawFd {
        self.queues.get(queue).map_or(-1, AsRawFd::as_raw_fd)
    }

    /// Sends a packet, header first; false where the host had no room for it or
    /// the interface is down.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn send(&self, queue: usize, packet: &[u8]) -> io::Result<bool> {
        let Some(mut file) = self.queues.get(queue) else {
            return Ok(false);
        };
        let skip = if self.header { 0 } else { HEADER };
        match file.write(packet.get(skip..).unwrap_or_default()) {
            Ok(_) => Ok(true),
            Err(e) if host::gone(&e) => Err(e),
            // Full, down, or a header that makes no sense to the host: the
            // packet is lost, as on a wire.
            Err(_) => Ok(false),
        }
    }

    /// Receives a packet into `into`, header first; its length.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn receive(&self, queue: usize, into: &mut [u8]) -> io::Result<Option<usize>> {
        let Some(mut file) = self.queues.get(queue) else {
            return Ok(None);
        };
        let skip = if self.header { 0 } else { HEADER };
        let Some((head, rest)) = into.split_at_mut_checked(skip) else {
            return Ok(None);
        };
        match file.read(rest) {
            Ok(0) => Ok(None),
            Ok(n) => {
                head.fill(0);
                if let Some(count) = head.get_mut(10) {
                    *count = 1;
                }
                Ok(Some(skip + n))
            }
            Err(e) if host::gone(&e) => Err(e),
            Err(_) => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tap_that_is_not_there_is_named_with_the_way_to_make_it() {
        // /dev/net/tun may be missing here, which has a message of its own.
        let e = Tap::open("lab-no-such-if", 1).unwrap_err();
        let text = e.to_string();
        match e {
            TapError::NoSuchTap(..) => assert!(text.contains("lab-no-such-if"), "{text}"),
            TapError::NoDriver(..) => assert!(text.contains("tun"), "{text}"),
            e => panic!("{e}"),
        }
    }

    #[test]
    fn names_that_no_interface_can_have_are_refused() {
        for bad in ["", "a/b", "sixteen-letters-", "tap 0", "..", "tap%d"] {
            let e = Tap::open(bad, 1).unwrap_err();
            assert!(matches!(e, TapError::Name(..)), "{bad}: {e}");
        }
    }
}
