//! bhyve's first console: one I/O port that takes and gives a character in 32
//! bits. Kernels of 2011 to 2013 that were made for it (`device bvmconsole`, and
//! FreeBSD's sources have it to this day) look for its signature; everything
//! since has a 16550 (sys/dev/bvm/bvm_console.c is the guest's side).

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::backend::Backend;
use crate::bus::PortDevice;
use crate::lock;
use crate::sandbox;

/// Where it is.
pub const PORT: u16 = 0x220;
/// What a 16-bit IN gives: "bv".
const SIGNATURE: u32 = (b'b' as u32) << 8 | b'v' as u32;
/// What a 32-bit IN gives when no key was pressed.
const NOTHING: u32 = u32::MAX;
/// Input that waits for the guest, bytes.
const INPUT: usize = 256;
/// Output that waits for the end of its line, bytes.
const LINE: usize = 128;

struct State {
    input: VecDeque<u8>,
    line: Vec<u8>,
    output: Option<Box<dyn Write + Send>>,
}

impl State {
    fn flush(&mut self) {
        if let Some(output) = &mut self.output
            && !self.line.is_empty()
            && output
                .write_all(&self.line)
                .and_then(|()| output.flush())
                .is_err()
        {
            // Nobody reads any more.
            self.output = None;
        }
        self.line.clear();
    }
}

struct Shared {
    state: Mutex<State>,
    room: Condvar,
}

/// The console at port 0x220.
#[derive(Clone)]
pub struct BvmConsole(Arc<Shared>);

impl BvmConsole {
    /// Connects it to a backend.
    pub fn new(backend: Backend) -> BvmConsole {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                input: VecDeque::with_capacity(INPUT),
                line: Vec::with_capacity(LINE),
                output: backend.output,
            }),
            room: Condvar::new(),
        });
        if let Some(input) = backend.input {
            let s = Arc::clone(&shared);
            std::thread::spawn(move || {
                sandbox::join();
                s.read_loop(input);
            });
        }
        BvmConsole(shared)
    }

    /// Writes out what waits for the end of its line.
    pub fn drain(&self) {
        lock(&self.0.state).flush();
    }
}

impl Shared {
    fn read_loop(&self, mut input: Box<dyn Read + Send>) {
        let mut buf = [0; 16];
        loop {
            let n = match input.read(&mut buf) {
                Ok(0) => return,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            let mut state = lock(&self.state);
            for &byte in buf.iter().take(n) {
                while state.input.len() >= INPUT {
                    state = self
                        .room
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                state.input.push_back(byte);
            }
        }
    }
}

impl PortDevice for BvmConsole {
    fn port_read(&self, _port: u16, size: u8) -> Option<u32> {
        match size {
            2 => Some(SIGNATURE),
            4 => {
                let mut state = lock(&self.0.state);
                // A guest that looks for a key shows its prompt first.
                state.flush();
                let byte = state.input.pop_front();
                self.0.room.notify_one();
                Some(byte.map_or(NOTHING, u32::from))
            }
            _ => None,
        }
    }

    fn port_write(&self, _port: u16, size: u8, value: u32) -> bool {
        if size != 4 {
            return false;
        }
        let mut state = lock(&self.0.state);
        let byte = value as u8;
        state.line.push(byte);
        if byte == b'\n' || state.line.len() >= LINE {
            state.flush();
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    #[derive(Clone, Default)]
    struct Screen(Arc<Mutex<Vec<u8>>>);

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            lock(&self.0).extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn console(keys: &'static [u8]) -> (BvmConsole, Screen) {
        let screen = Screen::default();
        let backend = Backend {
            input: Some(Box::new(Cursor::new(keys))),
            output: Some(Box::new(screen.clone())),
        };
        (BvmConsole::new(backend), screen)
    }

    #[test]
    fn a_kernel_finds_it_by_its_signature() {
        let (c, _) = console(b"");
        assert_eq!(c.port_read(PORT, 2), Some(0x6276));
        assert_eq!(c.port_read(PORT, 1), None);
        assert!(!c.port_write(PORT, 1, 0x41));
    }

    #[test]
    fn lines_go_out_and_a_prompt_when_the_guest_waits_for_a_key() {
        let (c, screen) = console(b"");
        for b in b"mountroot\n> " {
            assert!(c.port_write(PORT, 4, u32::from(*b)));
        }
        assert_eq!(*lock(&screen.0), b"mountroot\n");
        assert_eq!(c.port_read(PORT, 4), Some(NOTHING));
        assert_eq!(*lock(&screen.0), b"mountroot\n> ");
    }

    #[test]
    fn keys_come_in_order_and_none_is_lost_when_there_are_many() {
        const KEYS: &[u8] = &[b'x'; INPUT + 40];
        let (c, _) = console(KEYS);
        let mut got = 0;
        while got < KEYS.len() {
            match c.port_read(PORT, 4) {
                Some(NOTHING) => std::thread::yield_now(),
                key => {
                    assert_eq!(key, Some(u32::from(b'x')));
                    got += 1;
                }
            }
        }
    }
}
