//! An end of an epair(4) as a network: FreeBSD's pair of Ethernet interfaces, of
//! which each receives what the other sends. The card is one end's wire; the other
//! end is the host's, or a jail's.

use vmmapi::tap::TapError;

use super::Port;

/// Opens the end called `name`.
///
/// # Errors
/// [`TapError`].
#[cfg(target_os = "freebsd")]
pub fn open(name: &str) -> Result<Box<dyn Port>, TapError> {
    let bpf = vmmapi::bpf::Bpf::open(name)?;
    crate::sandbox::limit(&bpf, crate::sandbox::Purpose::Packets)
        .map_err(|e| TapError::Host(name.into(), e))?;
    Ok(Box::new(host::Epair(bpf)))
}

/// Only FreeBSD has them.
///
/// # Errors
/// Always.
#[cfg(not(target_os = "freebsd"))]
pub fn open(name: &str) -> Result<Box<dyn Port>, TapError> {
    Err(TapError::Name(
        name.into(),
        "an epair is FreeBSD's; on this host there are taps, and slirp",
    ))
}

#[cfg(target_os = "freebsd")]
mod host {
    use super::Port;
    use crate::net::Offloads;
    use std::io;
    use std::os::fd::RawFd;
    use vmmapi::bpf::Bpf;

    /// Frames as they are: bpf(4) has no header that would leave work undone.
    pub struct Epair(pub Bpf);

    impl Port for Epair {
        fn takes(&self) -> Offloads {
            Offloads::default()
        }

        fn gives(&self) -> Offloads {
            Offloads::default()
        }

        fn guest_takes(&mut self, _: Offloads) -> io::Result<()> {
            Ok(())
        }

        fn send(&mut self, packet: &[u8]) -> io::Result<()> {
            self.0.send(packet).map(drop)
        }

        fn receive(&mut self, into: &mut [u8]) -> io::Result<Option<usize>> {
            self.0.receive(into)
        }

        fn pending(&self) -> bool {
            self.0.pending()
        }

        fn fd(&self) -> RawFd {
            self.0.fd()
        }
    }
}
