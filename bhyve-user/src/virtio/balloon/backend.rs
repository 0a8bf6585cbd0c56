//! The host's side: memory that goes back, and the control socket.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::ledger::PIECE;
use crate::machine::Machine;

/// Longest line from a client.
const LINE: usize = 256;

/// Gives memory back to the host.
pub struct Release {
    machine: Arc<dyn Machine>,
    can: bool,
    /// Bytes that went so far.
    pub bytes: u64,
}

impl Release {
    /// For a machine, which may be unable to.
    pub fn new(machine: Arc<dyn Machine>) -> Release {
        let can = machine.can_release_memory();
        Release {
            machine,
            can,
            bytes: 0,
        }
    }

    /// Whether memory goes anywhere.
    pub fn possible(&self) -> bool {
        self.can
    }

    /// Gives the whole pieces in a range back.
    pub fn range(&mut self, gpa: u64, len: u64) {
        let start = gpa.checked_next_multiple_of(PIECE);
        let end = gpa.saturating_add(len) / PIECE * PIECE;
        if let Some(start) = start
            && start < end
            && self.can
        {
            // Wired memory, for one, stays; the guest need not know.
            self.bytes += self.machine.release_memory(start, end - start).unwrap_or(0);
        }
    }
}

/// Somebody at the control socket.
pub struct Client {
    /// Its end.
    pub stream: UnixStream,
    line: Vec<u8>,
    /// It waits for statistics.
    pub waits: bool,
}

/// What was read.
#[derive(Debug, PartialEq, Eq)]
pub enum Input {
    /// No line yet.
    Nothing,
    /// A line.
    Line(String),
    /// It has gone, or has said nothing sensible.
    End,
}

impl Client {
    /// A new one.
    pub fn new(stream: UnixStream) -> Client {
        Client {
            stream,
            line: Vec::new(),
            waits: false,
        }
    }

    /// Reads on.
    pub fn read(&mut self) -> Input {
        let mut byte = [0; LINE];
        loop {
            if let Some(end) = self.line.iter().position(|&b| b == b'\n') {
                let rest = self.line.split_off(end + 1);
                let line = std::mem::replace(&mut self.line, rest);
                return Input::Line(String::from_utf8_lossy(&line).trim().to_owned());
            }
            if self.line.len() > LINE {
                return Input::End;
            }
            match self.stream.read(&mut byte) {
                Ok(0) => return Input::End,
                Ok(n) => self.line.extend(byte.iter().take(n)),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Input::Nothing,
                Err(_) => return Input::End,
            }
        }
    }

    /// Answers with a line; false if it does not listen.
    pub fn answer(&mut self, text: &str) -> bool {
        // A line fits a socket's buffer, or the client reads none of them.
        let line = format!("{text}\n");
        self.stream
            .write(line.as_bytes())
            .is_ok_and(|n| n == line.len())
    }
}
