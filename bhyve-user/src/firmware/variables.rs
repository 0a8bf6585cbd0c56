//! The flash below the ROM in which UEFI keeps its variables: a file, behind the
//! commands of Intel's flash chips (CFI, JEP137: command set 1) that EDK II
//! gives to find out whether it is flash and to write it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::bus::MmioDevice;
use crate::lock;

/// An erase block.
const BLOCK: u64 = 4096;

const PROGRAM: u8 = 0x10;
const PROGRAM_TOO: u8 = 0x40;
const ERASE: u8 = 0x20;
const CLEAR_STATUS: u8 = 0x50;
const READ_STATUS: u8 = 0x70;
const ERASE_CONFIRM: u8 = 0xd0;

/// What the next access means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Reads give what is stored; a write is a command.
    Array,
    /// Reads give the status, which is 0: EDK II takes that for flash.
    Status,
    /// A write is stored.
    Program,
    /// A write of the confirmation erases the block.
    Erase,
}

struct State {
    mode: Mode,
    bytes: Vec<u8>,
}

/// The flash.
pub struct Variables {
    state: Mutex<State>,
    file: File,
    name: String,
    gpa: u64,
    complained: AtomicBool,
}

impl Variables {
    /// Takes what the file holds; `top` is where the flash ends.
    ///
    /// # Errors
    /// The file cannot be read and written.
    pub fn open(path: &Path, top: u64, largest: u64) -> io::Result<Variables> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let mut bytes = Vec::new();
        (&file).take(largest + 1).read_to_end(&mut bytes)?;
        let len = bytes.len() as u64;
        if len == 0 || len > largest || !len.is_multiple_of(BLOCK) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "{len} bytes; variables have whole pages of 4096 bytes, and 16 MiB at most \
                     together with the firmware"
                ),
            ));
        }
        Ok(Variables {
            state: Mutex::new(State {
                mode: Mode::Array,
                bytes,
            }),
            file,
            name: path.display().to_string(),
            gpa: top - len,
            complained: AtomicBool::new(false),
        })
    }

    /// Guest-physical address and size, bytes.
    pub fn place(&self) -> (u64, u64) {
        (self.gpa, lock(&self.state).bytes.len() as u64)
    }

    /// Puts bytes where they belong, here and in the file.
    fn store(&self, bytes: &mut [u8], at: u64, new: &[u8]) {
        let start = at as usize;
        if let Some(old) = bytes.get_mut(start..start.saturating_add(new.len())) {
            old.copy_from_slice(new);
            if let Err(e) = self.file.write_all_at(new, at)
                && !self.complained.swap(true, Ordering::Relaxed)
            {
                eprintln!("{}: the firmware's variables are lost: {e}\r", self.name);
            }
        }
    }
}

impl MmioDevice for Variables {
    fn mmio_read(&self, gpa: u64, size: u8) -> u64 {
        let state = lock(&self.state);
        if state.mode == Mode::Status {
            return 0;
        }
        let start = gpa.wrapping_sub(self.gpa) as usize;
        let mut word = [0; 8];
        if let (Some(to), Some(from)) = (
            word.get_mut(..usize::from(size)),
            state
                .bytes
                .get(start..start.saturating_add(usize::from(size))),
        ) {
            to.copy_from_slice(from);
        }
        u64::from_le_bytes(word)
    }

    fn mmio_write(&self, gpa: u64, size: u8, value: u64) {
        let mut state = lock(&self.state);
        let at = gpa.wrapping_sub(self.gpa);
        let command = value as u8;
        let State { mode, bytes } = &mut *state;
        *mode = match *mode {
            Mode::Program => {
                if let Some(new) = value.to_le_bytes().get(..usize::from(size)) {
                    self.store(bytes, at, new);
                }
                Mode::Array
            }
            Mode::Erase => {
                if command == ERASE_CONFIRM {
                    self.store(bytes, at & !(BLOCK - 1), &[0xff; BLOCK as usize]);
                }
                Mode::Array
            }
            Mode::Array | Mode::Status => match command {
                PROGRAM | PROGRAM_TOO => Mode::Program,
                ERASE => Mode::Erase,
                CLEAR_STATUS | READ_STATUS => Mode::Status,
                _ => Mode::Array,
            },
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOP: u64 = 0xffe0_0000;

    fn flash(len: usize) -> (tempfile::NamedTempFile, Variables) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![0x5a; len]).unwrap();
        let flash = Variables::open(file.path(), TOP, 16 << 20).unwrap();
        assert_eq!(flash.place(), (TOP - len as u64, len as u64));
        (file, flash)
    }

    #[test]
    fn edk_ii_takes_it_for_flash() {
        let (_file, flash) = flash(8192);
        let at = TOP - 8192;
        assert_eq!(flash.mmio_read(at, 1), 0x5a);
        flash.mmio_write(at, 1, CLEAR_STATUS.into());
        // Neither the command (RAM) nor what was there (ROM).
        assert_eq!(flash.mmio_read(at, 1), 0);
        flash.mmio_write(at, 1, 0xff);
        assert_eq!(flash.mmio_read(at, 4), 0x5a5a_5a5a);
    }

    #[test]
    fn what_is_written_is_in_the_file() {
        let (file, flash) = flash(8192);
        let at = TOP - 4096 + 16;
        for (i, byte) in b"boot".iter().enumerate() {
            flash.mmio_write(at + i as u64, 1, PROGRAM.into());
            flash.mmio_write(at + i as u64, 1, (*byte).into());
        }
        assert_eq!(
            flash.mmio_read(at, 4),
            u64::from(u32::from_le_bytes(*b"boot"))
        );
        assert_eq!(&std::fs::read(file.path()).unwrap()[4112..4116], b"boot");
        flash.mmio_write(at, 1, ERASE.into());
        flash.mmio_write(at, 1, ERASE_CONFIRM.into());
        let now = std::fs::read(file.path()).unwrap();
        assert!(now[..4096].iter().all(|b| *b == 0x5a));
        assert!(now[4096..].iter().all(|b| *b == 0xff));
        // The next open finds it.
        let again = Variables::open(file.path(), TOP, 16 << 20).unwrap();
        assert_eq!(again.mmio_read(at, 1), 0xff);
    }

    #[test]
    fn accesses_across_the_end_touch_nothing() {
        let (file, flash) = flash(4096);
        flash.mmio_write(TOP - 2, 8, PROGRAM.into());
        flash.mmio_write(TOP - 2, 8, u64::MAX);
        assert_eq!(flash.mmio_read(TOP - 2, 8), 0);
        let bytes = std::fs::read(file.path()).unwrap();
        assert!(bytes.len() == 4096 && bytes.iter().all(|b| *b == 0x5a));
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for len in [0, 100, 8192 + 1, 3 * 4096] {
            std::fs::write(file.path(), vec![0; len]).unwrap();
            assert!(Variables::open(file.path(), TOP, 8192).is_err(), "{len}");
        }
    }
}
