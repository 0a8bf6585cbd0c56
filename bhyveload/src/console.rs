//! The terminal that the loader talks to.

use crate::error::LoadError;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{self, LocalFlags, OutputFlags, SetArg, Termios};
use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::time::Duration;

/// What came of waiting for a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    /// A byte.
    Byte(u8),
    /// Nothing in time.
    Timeout,
    /// There will be no more input.
    End,
}

/// Where the loader's messages go and its keys come from.
pub trait Console {
    /// Prints text. Names and messages come from images: control characters
    /// other than line feed and tab are replaced.
    ///
    /// # Errors
    /// The terminal is gone.
    fn print(&mut self, text: &str) -> Result<(), LoadError>;

    /// Moves the cursor one to the left over a blank.
    ///
    /// # Errors
    /// The terminal is gone.
    fn erase(&mut self) -> Result<(), LoadError>;

    /// Waits for a key, `None`: for ever.
    ///
    /// # Errors
    /// The terminal is gone.
    fn key(&mut self, wait: Option<Duration>) -> Result<Key, LoadError>;

    /// Whether somebody sits at it.
    fn is_terminal(&self) -> bool;
}

/// `text` without what a terminal might obey.
#[must_use]
pub fn harmless(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\n' | '\t' => c,
            c if c.is_control() => '?',
            c => c,
        })
        .collect()
}

/// stdio or a terminal device.
#[derive(Debug)]
pub struct Terminal {
    name: String,
    input: File,
    output: File,
    /// What to set the terminal back to.
    before: Option<Termios>,
}

impl Terminal {
    /// Opens `stdio` or a terminal device.
    ///
    /// # Errors
    /// It is not there or no terminal.
    pub fn open(name: &str) -> Result<Self, LoadError> {
        let bad = |problem: String| LoadError::new("-c", name, problem);
        let gone = |e: std::io::Error| bad(e.to_string());
        if name == "stdio" {
            let copy = |fd: std::io::Result<OwnedFd>| fd.map(File::from).map_err(gone);
            return Ok(Self {
                name: name.to_owned(),
                input: copy(std::io::stdin().as_fd().try_clone_to_owned())?,
                output: copy(std::io::stdout().as_fd().try_clone_to_owned())?,
                before: None,
            });
        }
        let flags = nix::fcntl::OFlag::O_NOCTTY | nix::fcntl::OFlag::O_NONBLOCK;
        let input = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags.bits())
            .open(name)
            .map_err(gone)?;
        let kind = input.metadata().map_err(gone)?;
        if !kind.file_type().is_char_device() {
            return Err(
                bad("is no terminal device".to_owned()).hint("give stdio or a /dev/... name")
            );
        }
        Ok(Self {
            name: name.to_owned(),
            output: input.try_clone().map_err(gone)?,
            input,
            before: None,
        })
    }

    /// Takes keys one by one and unechoed from here on, until dropped.
    ///
    /// # Errors
    /// The terminal refuses.
    pub fn raw(&mut self) -> Result<(), LoadError> {
        if !self.input.is_terminal() {
            return Ok(());
        }
        let before = termios::tcgetattr(&self.input).map_err(|e| self.gone(e))?;
        let mut now = before.clone();
        termios::cfmakeraw(&mut now);
        // A line feed still goes to the start of the line.
        now.output_flags |= OutputFlags::OPOST | OutputFlags::ONLCR;
        now.local_flags &= !LocalFlags::ISIG;
        termios::tcsetattr(&self.input, SetArg::TCSANOW, &now).map_err(|e| self.gone(e))?;
        self.before = Some(before);
        Ok(())
    }

    fn gone(&self, error: impl std::fmt::Display) -> LoadError {
        LoadError::new("-c", self.name.as_str(), error.to_string())
    }

    fn write(&mut self, mut bytes: &[u8]) -> Result<(), LoadError> {
        while !bytes.is_empty() {
            match self.output.write(bytes) {
                Ok(0) => return Err(self.gone("takes no more output")),
                Ok(n) => bytes = &bytes[n..],
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                // Nobody at the other end of a nmdm(4) reads: wait a while, then let it go.
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    let mut fds = [PollFd::new(self.output.as_fd(), PollFlags::POLLOUT)];
                    if poll(&mut fds, PollTimeout::from(1000u16)) == Ok(0) {
                        return Ok(());
                    }
                }
                Err(e) => return Err(self.gone(e)),
            }
        }
        Ok(())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // There is nobody left to tell.
            let _ = termios::tcsetattr(&self.input, SetArg::TCSADRAIN, before);
        }
    }
}

impl Console for Terminal {
    fn print(&mut self, text: &str) -> Result<(), LoadError> {
        self.write(harmless(text).as_bytes())
    }

    fn erase(&mut self) -> Result<(), LoadError> {
        self.write(b"\x08 \x08")
    }

    fn key(&mut self, wait: Option<Duration>) -> Result<Key, LoadError> {
        let timeout = match wait {
            None => PollTimeout::NONE,
            Some(wait) => PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX),
        };
        loop {
            let mut fds = [PollFd::new(self.input.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, timeout) {
                Ok(0) => return Ok(Key::Timeout),
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(e) => return Err(self.gone(e)),
            }
            let mut byte = [0];
            match self.input.read(&mut byte) {
                Ok(0) => return Ok(Key::End),
                Ok(_) => return Ok(Key::Byte(byte[0])),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Ok(Key::Timeout),
                // The last one at the other end of a pseudo-terminal has left.
                Err(e) if e.raw_os_error() == Some(Errno::EIO as i32) => return Ok(Key::End),
                Err(e) => return Err(self.gone(e)),
            }
        }
    }

    fn is_terminal(&self) -> bool {
        self.input.is_terminal()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_image_says_does_not_steer_the_terminal() {
        assert_eq!(harmless("a\x1b[2J\u{9b}b\r\n\tc"), "a?[2J?b?\n\tc");
    }
}
