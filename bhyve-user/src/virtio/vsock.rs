//! virtio-vsock: streams between programs of the guest and of the host
//! (virtio 1.2 §5.10), which in the host are Unix sockets, in the manner of
//! Firecracker and Cloud Hypervisor:
//!
//! - a program of the host connects to `PATH`, says `CONNECT PORT` and a
//!   newline, and hears `OK PORT` when the guest has accepted;
//! - a program of the guest connects to port P of the host (CID 2), and the
//!   device to `PATH_P`, where a program of the host listens.
//!
//! [`request`] is a packet's header, [`backend`] one stream, [`device`] the
//! rest.

pub mod backend;
pub mod device;
pub mod request;

use std::path::PathBuf;

use super::Built;

/// The host's own CID; those below 3 are nobody's.
pub const HOST: u64 = 2;

/// A socket device, as `-s N,virtio-vsock,cid=N,path=SOCK` asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The guest's CID.
    pub cid: u64,
    /// The socket that programs of the host connect to.
    pub path: PathBuf,
}

impl std::str::FromStr for Options {
    type Err = String;

    fn from_str(text: &str) -> Result<Options, String> {
        let (mut cid, mut path) = (3, None);
        for part in text.split(',').filter(|p| !p.is_empty()) {
            match part.split_once('=') {
                Some(("cid", n)) => {
                    // The upper half is reserved (§5.10.4), and so is all ones.
                    let n = n.parse::<u32>().ok().map(u64::from);
                    cid = n
                        .filter(|n| *n > HOST && *n < u64::from(u32::MAX))
                        .ok_or_else(|| format!("{part}: a CID is a number from 3 on"))?;
                }
                Some(("path", p)) if !p.is_empty() => path = Some(p.into()),
                _ => return Err(format!("no option \"{part}\"; there is cid=, path=")),
            }
        }
        Ok(Options {
            cid,
            path: path.ok_or("which socket? path=PATH")?,
        })
    }
}

/// A socket device, as the options ask for it.
///
/// # Errors
/// What is wrong with the options or the socket.
pub fn build(conf: &str) -> Result<Built, String> {
    let options: Options = conf.parse()?;
    let (identity, device) =
        device::Vsock::open(&options).map_err(|e| format!("{}: {e}", options.path.display()))?;
    Ok(Built::single(identity, device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_a_socket_device() {
        let o: Options = "cid=7,path=/run/v".parse().unwrap();
        assert_eq!((o.cid, o.path), (7, "/run/v".into()));
        for bad in [
            "",
            "cid=3",
            "cid=2,path=/a",
            "cid=4294967295,path=/a",
            "path=",
            "x=1",
        ] {
            assert!(bad.parse::<Options>().is_err(), "{bad}");
        }
    }
}
