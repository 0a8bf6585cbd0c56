//! One stream: a Unix socket, what waits to go into it, and who owes what.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::request::connect;

/// Bytes from the guest that wait for the host's program at most: what the
/// guest is told of our buffer.
pub const BUFFER: u32 = 64 << 10;
/// Longest first line of a program.
const LINE: usize = 32;

/// Where a stream stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The program has not said which port it wants.
    Asking,
    /// The guest has not answered yet.
    Requested,
    /// Both talk.
    Open,
}

/// A stream.
pub struct Stream {
    /// The host's end.
    pub socket: UnixStream,
    /// How far it is.
    pub state: State,
    line: Vec<u8>,
    out: VecDeque<u8>,
    /// The guest's buffer, what its program has taken, and what we have sent.
    pub peer_alloc: u32,
    /// See `peer_alloc`.
    pub peer_fwd: u32,
    /// See `peer_alloc`.
    pub sent: u32,
    /// What our program has taken, and what of it the guest knows.
    pub taken: u32,
    /// See `taken`.
    pub told: u32,
    /// Read from the program, and not yet delivered: the guest had too few
    /// buffers. Nothing more is read before it is.
    pub kept: Vec<u8>,
    /// The guest sends no more; the program does not.
    pub guest_done: bool,
    /// See `guest_done`.
    pub host_done: bool,
}

/// The first line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Not all of it is there.
    Wait,
    /// It wants this port.
    Port(u32),
    /// It makes no sense, or has gone.
    Nonsense,
}

impl Stream {
    /// A new one.
    pub fn new(socket: UnixStream, state: State) -> Stream {
        Stream {
            socket,
            state,
            line: Vec::new(),
            out: VecDeque::new(),
            peer_alloc: 0,
            peer_fwd: 0,
            sent: 0,
            taken: 0,
            told: 0,
            kept: Vec::new(),
            guest_done: false,
            host_done: false,
        }
    }

    /// Reads the first line, byte by byte: what follows is data.
    pub fn ask(&mut self) -> Asked {
        while self.line.len() < LINE {
            let mut byte = [0];
            match self.socket.read(&mut byte) {
                Ok(1) if byte == *b"\n" => {
                    let line = String::from_utf8_lossy(&self.line);
                    return connect(&line).map_or(Asked::Nonsense, Asked::Port);
                }
                Ok(1) => self.line.extend(byte),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Asked::Wait,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                _ => return Asked::Nonsense,
            }
        }
        Asked::Nonsense
    }

    /// Bytes that the guest has room for (§5.10.6.3).
    pub fn credit(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.peer_fwd);
        self.peer_alloc.saturating_sub(under_way)
    }

    /// Room for what the guest sends.
    pub fn room(&self) -> usize {
        (BUFFER as usize).saturating_sub(self.out.len())
    }

    /// Bytes that wait for the program.
    pub fn waiting(&self) -> usize {
        self.out.len()
    }

    /// Takes what the guest sent; the caller has looked at [`Stream::room`].
    pub fn put(&mut self, bytes: &[u8]) {
        self.out.extend(bytes);
    }

    /// Writes as much to the program as it takes.
    ///
    /// # Errors
    /// It has gone.
    pub fn flush(&mut self) -> io::Result<()> {
        while !self.out.is_empty() {
            let (first, _) = self.out.as_slices();
            match self.socket.write(first) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => {
                    self.out.drain(..n);
                    self.taken = self.taken.wrapping_add(n as u32);
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if self.guest_done {
            // The program sees the end; it may be gone already.
            let _ = self.socket.shutdown(Shutdown::Write);
        }
        Ok(())
    }

    /// Whether the guest should hear how much was taken: it believes that less
    /// than half of the buffer is free.
    pub fn should_tell(&self) -> bool {
        self.taken.wrapping_sub(self.told) >= BUFFER / 2
    }
}
