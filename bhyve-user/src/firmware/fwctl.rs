//! What bhyve's UEFI firmware asks its hypervisor: messages of 32-bit words
//! through port 0x510, an identification byte by byte through 0x511. Requests
//! are {size, operation, id, data}, answers {size, operation, id, error, data}.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use crate::bus::{BusError, Buses, PortDevice, ones};
use crate::lock;

const DATA: u16 = 0x510;
const IDENT: u16 = 0x511;
const SIGNATURE: [u8; 4] = *b"BHYV";

const OP_GET: u32 = 3;
const OP_GET_LEN: u32 = 4;

const ENOENT: u32 = 2;
const E2BIG: u32 = 7;

/// Words of a request before its data.
const HEADER: usize = 3;
/// The longest name, bytes.
const LONGEST: u32 = 80;

enum State {
    /// Nobody has asked who this is.
    Waiting,
    /// So many letters of the signature have been read.
    Identifying(usize),
    /// So much of a request is here; words that are too many are only counted.
    Request { words: Vec<u32>, left: u64 },
    /// What is left of the answer.
    Response(VecDeque<u32>),
}

fn request() -> State {
    State::Request {
        words: Vec::new(),
        left: HEADER as u64,
    }
}

/// The device.
pub struct Fwctl {
    state: Mutex<State>,
    cpus: u32,
}

impl Fwctl {
    /// Claims the ports; `cpus` is what the firmware can ask for.
    ///
    /// # Errors
    /// Somebody has them.
    pub fn attach(buses: &Buses, cpus: u32) -> Result<(), BusError> {
        let device = Arc::new(Fwctl {
            state: Mutex::new(State::Waiting),
            cpus,
        });
        buses.ports.claim(DATA, 2, device).map(drop)
    }

    /// The answer to a whole request.
    fn answer(&self, words: &[u32], size: u32) -> VecDeque<u32> {
        let (operation, id) = (
            words.get(1).copied().unwrap_or(0),
            words.get(2).copied().unwrap_or(0),
        );
        let name: Vec<u8> = words
            .iter()
            .skip(HEADER)
            .flat_map(|w| w.to_le_bytes())
            .take_while(|b| *b != 0)
            .collect();
        let (error, data) = match (operation, name.as_slice()) {
            (OP_GET | OP_GET_LEN, _) if size.saturating_sub(12) > LONGEST => (E2BIG, vec![]),
            // A length has 64 bits.
            (OP_GET_LEN, b"hw.ncpu") => (0, vec![4, 0]),
            (OP_GET, b"hw.ncpu") => (0, vec![4, 0, self.cpus]),
            _ => (ENOENT, vec![]),
        };
        let size = 16 + 4 * data.len() as u32;
        [size, operation, id, error]
            .into_iter()
            .chain(data)
            .collect()
    }
}

impl PortDevice for Fwctl {
    fn port_read(&self, port: u16, size: u8) -> Option<u32> {
        let mut state = lock(&self.state);
        let (value, next) = match (&mut *state, port, size) {
            (State::Identifying(at), IDENT, 1) => {
                let letter = SIGNATURE.get(*at).copied().unwrap_or(0xff);
                *at += 1;
                (letter.into(), (*at == SIGNATURE.len()).then(request))
            }
            (State::Response(words), DATA, 4) => {
                let word = words.pop_front().unwrap_or(u32::MAX);
                (word, words.is_empty().then(request))
            }
            _ => (ones(size) as u32, None),
        };
        if let Some(next) = next {
            *state = next;
        }
        Some(value)
    }

    fn port_write(&self, port: u16, size: u8, value: u32) -> bool {
        let mut state = lock(&self.state);
        let next = match (&mut *state, port, size) {
            (State::Waiting, DATA, 2) if value == 0 => Some(State::Identifying(0)),
            (State::Request { words, left }, DATA, 4) => {
                if words.is_empty() {
                    // Its size in bytes, the header included.
                    *left = u64::from(value).div_ceil(4).max(HEADER as u64);
                }
                // More than the longest request can have is dropped.
                if words.len() < HEADER + LONGEST as usize / 4 {
                    words.push(value);
                }
                *left -= 1;
                (*left == 0).then(|| {
                    let size = words.first().copied().unwrap_or(0);
                    State::Response(self.answer(words, size))
                })
            }
            _ => None,
        };
        if let Some(next) = next {
            *state = next;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn device(cpus: u32) -> Fwctl {
        Fwctl {
            state: Mutex::new(State::Waiting),
            cpus,
        }
    }

    fn identified(cpus: u32) -> Fwctl {
        let d = device(cpus);
        assert!(d.port_write(DATA, 2, 0));
        let letters: Vec<_> = (0..4).map(|_| d.port_read(IDENT, 1)).collect();
        assert_eq!(letters, SIGNATURE.map(|l| Some(l.into())));
        d
    }

    fn ask(d: &Fwctl, words: &[u32]) -> Vec<u32> {
        for w in words {
            d.port_write(DATA, 4, *w);
        }
        let size = d.port_read(DATA, 4).unwrap();
        std::iter::once(size)
            .chain((1..size / 4).map(|_| d.port_read(DATA, 4).unwrap()))
            .collect()
    }

    fn named(operation: u32, id: u32, name: &[u8; 8]) -> [u32; 5] {
        let word = |i: usize| u32::from_le_bytes(name[i..i + 4].try_into().unwrap());
        [20, operation, id, word(0), word(4)]
    }

    #[test]
    fn firmware_learns_how_many_cpus_there_are() {
        let d = identified(6);
        assert_eq!(
            ask(&d, &named(OP_GET_LEN, 7, b"hw.ncpu\0")),
            [24, 4, 7, 0, 4, 0]
        );
        assert_eq!(
            ask(&d, &named(OP_GET, 8, b"hw.ncpu\0")),
            [28, 3, 8, 0, 4, 0, 6]
        );
        assert_eq!(ask(&d, &named(OP_GET, 9, b"hw.nope\0")), [16, 3, 9, ENOENT]);
        assert_eq!(ask(&d, &[12, 99, 10]), [16, 99, 10, ENOENT]);
        // Longer than any name: taken whole, then refused.
        let mut long = vec![12 + 400, OP_GET, 11];
        long.resize(3 + 100, 0x6161_6161);
        assert_eq!(ask(&d, &long), [16, 3, 11, E2BIG]);
        assert_eq!(ask(&d, &named(OP_GET, 12, b"hw.ncpu\0"))[6], 6);
    }

    #[test]
    fn nothing_is_said_to_who_has_not_asked() {
        let d = device(1);
        assert_eq!(d.port_read(IDENT, 1), Some(0xff));
        assert_eq!(d.port_read(DATA, 4), Some(u32::MAX));
        d.port_write(DATA, 4, 12);
        assert_eq!(d.port_read(IDENT, 1), Some(0xff));
    }

    proptest! {
        #[test]
        fn no_words_take_memory_or_stop_it(words in proptest::collection::vec(any::<u32>(), 0..200)) {
            let d = identified(2);
            for w in words {
                d.port_write(DATA, 4, w);
                if let State::Request { words, .. } = &*lock(&d.state) {
                    prop_assert!(words.len() <= HEADER + LONGEST as usize / 4);
                }
            }
        }
    }
}
