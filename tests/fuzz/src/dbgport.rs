//! The debug port: what the guest's kernel does at its registers, and debuggers who
//! come, talk, listen or not, and go.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arbitrary::Arbitrary;
use bhyve::bus::PortDevice;
use bhyve::dbgport::DebugPort;
use bhyve::dbgport::backend::{Calls, Line};
use bhyve::dbgport::device::PORT;

use crate::devices::steps;

/// The guest's bytes are counted by this, so that one that is lost is seen. A prime.
const ROUND: u32 = 251;
/// Most bytes that the guest sends: more than are kept for a debugger that does not
/// come or listen.
const MOST: u16 = 6000;
/// No byte.
const NOTHING: u32 = u32::MAX;

#[derive(Arbitrary, Debug)]
enum Step {
    /// A debugger calls.
    Call,
    /// A debugger says something.
    Say(u8, Vec<u8>),
    /// A debugger reads so many bytes.
    Listen(u8, u16),
    /// A debugger goes.
    Leave(u8),
    /// The guest reads so many times, by so many bytes.
    In(u8, u8),
    /// The guest writes so many times, by so many bytes; the upper 24 bits.
    Out(u16, u8, u32),
}

/// Those that have called, and how many of them were taken.
#[derive(Default)]
struct Callers {
    waiting: VecDeque<UnixStream>,
    taken: usize,
}

/// The port's end: calls without a network.
struct Exchange {
    callers: Arc<Mutex<Callers>>,
    /// To poll.
    bell: UnixStream,
}

impl AsFd for Exchange {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

impl Calls for Exchange {
    type Debugger = UnixStream;

    fn take(&self) -> io::Result<UnixStream> {
        let mut callers = self.callers.lock().unwrap_or_else(PoisonError::into_inner);
        let next = callers.waiting.pop_front();
        callers.taken += usize::from(next.is_some());
        next.ok_or_else(|| io::ErrorKind::WouldBlock.into())
    }

    fn missed(&self) {}
}

/// A debugger.
struct Debugger {
    stream: Option<UnixStream>,
    said: Vec<u8>,
    /// How many bytes of it the guest has had.
    had: usize,
    /// The byte of the guest's that it had last.
    last: Option<u32>,
}

fn one(debuggers: &mut [Debugger], n: u8) -> Option<&mut Debugger> {
    let count = debuggers.len().max(1);
    debuggers.get_mut(usize::from(n) % count)
}

/// The size of an access: mostly one that does something.
fn bytes(n: u8) -> u8 {
    match n % 8 {
        6 => 2,
        7 => n,
        _ => 4,
    }
}

/// The guest gets what its debugger says, every byte of it and nobody else's, up to
/// where one of them hangs up; a debugger what the guest says, without a gap.
pub fn debug_port(data: &[u8]) {
    let Ok((bell, _other)) = UnixStream::pair() else {
        return;
    };
    let callers = Arc::new(Mutex::new(Callers::default()));
    let exchange = Exchange {
        callers: Arc::clone(&callers),
        bell,
    };
    let port = DebugPort::patient(Line::new(exchange), Duration::ZERO);
    let mut debuggers: Vec<Debugger> = Vec::new();
    let (mut sent, mut left) = (0, MOST);
    steps(data, |step| {
        match step {
            Step::Call => {
                let Ok((stream, end)) = UnixStream::pair() else {
                    return;
                };
                if stream.set_nonblocking(true).is_err() {
                    return;
                }
                let mut callers = callers.lock().unwrap_or_else(PoisonError::into_inner);
                callers.waiting.push_back(end);
                debuggers.push(Debugger {
                    stream: Some(stream),
                    said: Vec::new(),
                    had: 0,
                    last: None,
                });
            }
            Step::Say(n, bytes) => {
                if let Some(d) = one(&mut debuggers, n)
                    && let Some(mut stream) = d.stream.as_ref()
                    && let Ok(taken) = stream.write(&bytes)
                {
                    d.said.extend(bytes.iter().take(taken));
                }
            }
            Step::Listen(n, bytes) => {
                if let Some(d) = one(&mut debuggers, n)
                    && let Some(mut stream) = d.stream.as_ref()
                {
                    let mut buffer = vec![0; usize::from(bytes)];
                    let got = stream.read(&mut buffer).unwrap_or(0);
                    for byte in buffer.iter().take(got).map(|b| u32::from(*b)) {
                        if let Some(last) = d.last {
                            assert_eq!(byte, (last + 1) % ROUND, "a byte of the guest's is lost");
                        }
                        d.last = Some(byte);
                    }
                }
            }
            Step::Leave(n) => {
                if let Some(d) = one(&mut debuggers, n) {
                    d.stream = None;
                }
            }
            Step::In(times, size) => {
                let size = bytes(size);
                for _ in 0..times {
                    let got = port.port_read(PORT, size);
                    match size {
                        2 => assert_eq!(got, Some(0x4256)),
                        4 => {}
                        _ => assert_eq!(got, None),
                    }
                    let Some(byte) = got.filter(|b| size == 4 && *b != NOTHING) else {
                        break;
                    };
                    let taken = callers.lock().unwrap_or_else(PoisonError::into_inner).taken;
                    // The last that was taken is the one that is there.
                    let d = taken.checked_sub(1).and_then(|n| debuggers.get_mut(n));
                    let d = d.unwrap_or_else(|| panic!("nobody said {byte:#x}"));
                    let said = d.said.get(d.had).map(|b| u32::from(*b));
                    assert_eq!(Some(byte), said, "not what the debugger said");
                    d.had += 1;
                }
            }
            Step::Out(times, size, upper) => {
                let size = bytes(size);
                for _ in 0..times.min(left) {
                    left -= 1;
                    let done = port.port_write(PORT, size, upper << 8 | sent);
                    assert_eq!(done, size == 4);
                    if !done {
                        break;
                    }
                    sent = (sent + 1) % ROUND;
                }
            }
        }
    });
}
