//! A port's socket: one program of the host at a time has the other end.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::socket::{MsgFlags, recv};

use crate::virtio::listener::Listener;

/// The host's end of a port.
pub struct Socket {
    /// Where programs connect.
    pub listener: Listener,
    /// Who has.
    pub peer: Option<UnixStream>,
}

/// How far a transfer got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// So many bytes, at least one.
    Some(usize),
    /// The other end has nothing, or no room.
    Wait,
    /// There is no other end (any more).
    Gone,
}

impl Socket {
    /// Listens at `path`.
    ///
    /// # Errors
    /// What the host says.
    pub fn bind(path: &Path) -> io::Result<Socket> {
        Ok(Socket {
            listener: Listener::bind(path)?,
            peer: None,
        })
    }

    /// Lets a program in. While one has the port others are sent away, unless
    /// it has gone and left nothing to read. True if there is a new one.
    pub fn accept(&mut self) -> bool {
        let Some(stream) = self.listener.accept() else {
            return false;
        };
        if let Some(peer) = &self.peer {
            let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
            if recv(peer.as_raw_fd(), &mut [0], flags) != Ok(0) {
                return false;
            }
        }
        self.peer = Some(stream);
        true
    }

    fn transfer(&mut self, f: impl FnOnce(&mut UnixStream) -> io::Result<usize>) -> Transfer {
        let Some(peer) = &mut self.peer else {
            return Transfer::Gone;
        };
        match f(peer) {
            Ok(n) if n > 0 => Transfer::Some(n),
            Err(e) if [ErrorKind::WouldBlock, ErrorKind::Interrupted].contains(&e.kind()) => {
                Transfer::Wait
            }
            _ => {
                self.peer = None;
                Transfer::Gone
            }
        }
    }

    /// Reads what there is.
    pub fn read(&mut self, to: &mut [u8]) -> Transfer {
        self.transfer(|peer| peer.read(to))
    }

    /// Writes what there is room for.
    pub fn write(&mut self, from: &[u8]) -> Transfer {
        self.transfer(|peer| peer.write(from))
    }
}
