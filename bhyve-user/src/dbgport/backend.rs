//! The debugger at the other end: one at a time, by TCP.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::str::FromStr;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};

use crate::sandbox::{Purpose, limit};

/// Output that waits for a debugger, or for one that is slow, bytes. A stub sends one
/// packet, of about 1 KiB, and waits for an answer.
const OUTPUT: usize = 4096;

/// Where debuggers connect to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address(pub SocketAddr);

impl FromStr for Address {
    type Err = String;

    fn from_str(s: &str) -> Result<Address, String> {
        let address = match s.parse() {
            // Who reaches it has all of the guest: not the whole network, unless asked.
            Ok(port) => SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            Err(_) => s.parse().map_err(|_| {
                format!("\"{s}\" is not [ADDRESS:]PORT, such as 1234 or 0.0.0.0:1234")
            })?,
        };
        if address.port() == 0 {
            return Err("ports begin at 1".into());
        }
        Ok(Address(address))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where debuggers come from; its descriptor is readable when one is there.
pub trait Calls: AsFd {
    /// A connection.
    type Debugger: AsFd;

    /// The next debugger, without waiting.
    ///
    /// # Errors
    /// Nobody is there, or the host says no.
    fn take(&self) -> io::Result<Self::Debugger>;

    /// The guest's kernel has something to say to a debugger, and there is none.
    fn missed(&self);
}

/// A TCP port.
pub struct Port {
    listener: TcpListener,
    /// Of the listener, which cannot be asked in capsicum(4)'s mode.
    address: Address,
}

impl AsFd for Port {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Calls for Port {
    type Debugger = TcpStream;

    fn take(&self) -> io::Result<TcpStream> {
        let (stream, _) = self.listener.accept()?;
        // Bytes come one by one; one that is late costs speed alone.
        let _ = stream.set_nodelay(true);
        Ok(stream)
    }

    fn missed(&self) {
        let at = self.address;
        eprintln!("bhyve: the guest's kernel waits for a debugger on {at}\r");
    }
}

/// A line to a debugger, who comes and goes. Nothing here waits for longer than it
/// is told to.
pub struct Line<C: Calls = Port> {
    calls: C,
    debugger: Option<C::Debugger>,
    input: VecDeque<u8>,
    output: VecDeque<u8>,
    /// It has been said that nobody is there.
    said: bool,
}

impl Line {
    /// Listens.
    ///
    /// # Errors
    /// The host says no.
    pub fn open(Address(address): Address) -> io::Result<Line> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = Address(listener.local_addr()?);
        limit(&listener, Purpose::Listener)?;
        Ok(Line::new(Port { listener, address }))
    }

    /// Who listens, for tests.
    #[cfg(test)]
    pub fn address(&self) -> SocketAddr {
        self.calls.address.0
    }
}

impl<C: Calls> Line<C> {
    /// A line that nobody has called yet.
    pub fn new(calls: C) -> Line<C> {
        Line {
            calls,
            debugger: None,
            input: VecDeque::new(),
            output: VecDeque::new(),
            said: false,
        }
    }

    /// Sends a byte, now or, up to 4 KiB of them, when there is somebody. A
    /// debugger that does not read so many is hung up on.
    pub fn send(&mut self, byte: u8) {
        if self.output.len() == OUTPUT {
            self.hang_up();
        }
        self.output.push_back(byte);
        self.flush();
    }

    /// The next byte, if one comes within `patience`.
    pub fn receive(&mut self, patience: Duration) -> Option<u8> {
        if self.input.is_empty() {
            self.flush();
            self.wait(patience);
            self.fill();
        }
        self.input.pop_front()
    }

    /// Takes a call, if there is one.
    fn answer(&mut self) {
        match self.calls.take() {
            Ok(debugger) => {
                self.debugger = Some(debugger);
                self.said = false;
            }
            Err(_) if !self.said => {
                self.calls.missed();
                self.said = true;
            }
            Err(_) => {}
        }
    }

    /// The debugger is gone; what was meant for it, too.
    fn hang_up(&mut self) {
        self.debugger = None;
        self.input.clear();
        self.output.clear();
    }

    /// Sends what waits, as far as it can be now.
    fn flush(&mut self) {
        if self.debugger.is_none() {
            self.answer();
        }
        while !self.output.is_empty() {
            let Some(debugger) = &self.debugger else {
                return;
            };
            let (bytes, _) = self.output.as_slices();
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(debugger.as_fd().as_raw_fd(), bytes, flags) {
                Ok(n) => drop(self.output.drain(..n)),
                Err(Errno::EAGAIN | Errno::EINTR) => return,
                Err(_) => self.hang_up(),
            }
        }
    }

    /// Waits for a byte, or for a debugger.
    fn wait(&self, patience: Duration) {
        let fd = match &self.debugger {
            Some(debugger) => debugger.as_fd(),
            None => self.calls.as_fd(),
        };
        let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
        let patience = PollTimeout::try_from(patience).unwrap_or(PollTimeout::ZERO);
        // However it ends, what is there is looked at.
        let _ = poll(&mut fds, patience);
    }

    /// Takes what has come.
    fn fill(&mut self) {
        if self.debugger.is_none() {
            self.flush();
        }
        let Some(debugger) = &self.debugger else {
            return;
        };
        let mut bytes = [0; 512];
        match recv(
            debugger.as_fd().as_raw_fd(),
            &mut bytes,
            MsgFlags::MSG_DONTWAIT,
        ) {
            Ok(n) if n > 0 => self.input.extend(bytes.iter().take(n)),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            _ => self.hang_up(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::setsockopt;
    use nix::sys::socket::sockopt::SndBuf;
    use std::io::{Read, Write};

    /// Longer than any machine is slow.
    const LONG: Duration = Duration::from_secs(60);

    fn line() -> (Line, SocketAddr) {
        let line = Line::open(Address(([127, 0, 0, 1], 0).into())).unwrap();
        let address = line.address();
        (line, address)
    }

    /// The next byte, however often it takes.
    fn next(line: &mut Line) -> u8 {
        loop {
            if let Some(byte) = line.receive(LONG) {
                return byte;
            }
        }
    }

    #[test]
    fn a_port_alone_is_this_machines() {
        let address = |s: &str| s.parse::<Address>().map(|a| a.to_string());
        assert_eq!(address("1234").unwrap(), "127.0.0.1:1234");
        assert_eq!(address("0.0.0.0:1234").unwrap(), "0.0.0.0:1234");
        assert_eq!(address("[::1]:1234").unwrap(), "[::1]:1234");
        for (wrong, words) in [
            ("w1234", "[ADDRESS:]PORT"),
            ("0", "begin at 1"),
            ("65536", "PORT"),
        ] {
            let e = address(wrong).unwrap_err();
            assert!(e.contains(words), "{wrong}: {e}");
        }
    }

    #[test]
    fn what_was_sent_before_anyone_came_is_there_for_the_first() {
        let (mut line, address) = line();
        for byte in *b"$T05#b9" {
            line.send(byte);
        }
        assert_eq!(line.receive(Duration::ZERO), None);
        let mut debugger = TcpStream::connect(address).unwrap();
        debugger.write_all(b"+").unwrap();
        assert_eq!(next(&mut line), b'+');
        let mut got = [0; 7];
        debugger.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"$T05#b9");
    }

    #[test]
    fn another_can_come_when_one_has_gone() {
        let (mut line, address) = line();
        let mut first = TcpStream::connect(address).unwrap();
        first.write_all(b"1").unwrap();
        assert_eq!(next(&mut line), b'1');
        let mut second = TcpStream::connect(address).unwrap();
        second.write_all(b"2").unwrap();
        drop(first);
        assert_eq!(next(&mut line), b'2');
        line.send(b'+');
        let mut got = [0];
        second.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"+");
    }

    #[test]
    fn one_that_does_not_read_is_hung_up_on() {
        let (mut line, address) = line();
        let mut debugger = TcpStream::connect(address).unwrap();
        debugger.write_all(b"?").unwrap();
        assert_eq!(next(&mut line), b'?');
        // The kernel's buffers of the connection have an end, too.
        setsockopt(line.debugger.as_ref().unwrap(), SndBuf, &4096).unwrap();
        let mut sent = 0;
        while line.debugger.is_some() {
            line.send(b'x');
            sent += 1;
            assert!(sent < 64 << 20, "it takes everything");
        }
        assert!(line.output.len() <= OUTPUT);
    }

    #[test]
    fn without_anyone_what_is_kept_has_an_end() {
        let (mut line, _) = line();
        for _ in 0..3 * OUTPUT {
            line.send(b'x');
        }
        assert!(line.output.len() <= OUTPUT);
    }
}
