//! A tap device as a network.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use vmmapi::tap::{Tap, TapError, TapOffloads};

use super::{Offloads, Port};

/// One queue of a tap.
pub struct TapPort {
    tap: Arc<Tap>,
    queue: usize,
    on: bool,
}

/// Opens the tap called `name` with `queues` queues, each a port.
///
/// # Errors
/// [`TapError`].
pub fn open(name: &str, queues: usize) -> Result<Vec<TapPort>, TapError> {
    let tap = Arc::new(Tap::open(name, queues)?);
    for fd in tap.descriptors() {
        crate::sandbox::limit(fd, crate::sandbox::Purpose::Packets)
            .map_err(|e| TapError::Host(name.into(), e))?;
    }
    tap.set_offloads(TapOffloads::default())
        .map_err(|e| TapError::Host(name.into(), e))?;
    let ports = (0..tap.queues()).map(|queue| TapPort {
        tap: Arc::clone(&tap),
        queue,
        on: true,
    });
    let mut ports: Vec<TapPort> = ports.collect();
    // A driver that knows of one queue only gets all packets there.
    for port in ports.iter_mut().skip(1) {
        port.enable(false)
            .map_err(|e| TapError::Host(name.into(), e))?;
    }
    Ok(ports)
}

impl TapPort {
    fn can(&self) -> Offloads {
        if self.tap.has_offloads() {
            Offloads::ALL
        } else {
            Offloads::default()
        }
    }
}

impl Port for TapPort {
    fn takes(&self) -> Offloads {
        self.can()
    }

    fn gives(&self) -> Offloads {
        self.can()
    }

    fn guest_takes(&mut self, o: Offloads) -> io::Result<()> {
        self.tap.set_offloads(TapOffloads {
            csum: o.csum,
            tso4: o.tso4,
            tso6: o.tso6,
            ecn: o.ecn,
        })
    }

    fn enable(&mut self, on: bool) -> io::Result<()> {
        if self.on != on {
            self.tap.enable(self.queue, on)?;
            self.on = on;
        }
        Ok(())
    }

    fn send(&mut self, packet: &[u8]) -> io::Result<()> {
        self.tap.send(self.queue, packet).map(drop)
    }

    fn receive(&mut self, into: &mut [u8]) -> io::Result<Option<usize>> {
        self.tap.receive(self.queue, into)
    }

    fn fd(&self) -> RawFd {
        self.tap.fd(self.queue)
    }
}
