//! The user's terminal, wired to a guest's console.

use anyhow::{Context, Result};
use lab::console::Console;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use std::io::{IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::time::Duration;

/// Ctrl-], as in telnet: leaves the conversation.
const ESCAPE: u8 = 0x1d;

/// The terminal in raw mode until dropped.
pub struct Raw {
    saved: Termios,
}

impl Raw {
    /// Raw mode, where standard input and output are a terminal.
    pub fn new() -> Result<Option<Self>> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() || !std::io::stdout().is_terminal() {
            return Ok(None);
        }
        let saved = tcgetattr(stdin.as_fd()).context("the terminal has no settings")?;
        let mut raw = saved.clone();
        cfmakeraw(&mut raw);
        eprintln!("==> console of the guest; Ctrl-] leaves");
        tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw)?;
        Ok(Some(Self { saved }))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if tcsetattr(std::io::stdin().as_fd(), SetArg::TCSANOW, &self.saved).is_err() {
            eprintln!("the terminal's settings are lost; type `reset`");
        }
        println!();
    }
}

/// Passes bytes both ways until the console closes, the user leaves, or `ended`
/// says so.
pub fn converse(console: &mut Console, mut ended: impl FnMut() -> Result<bool>) -> Result<()> {
    let mut stdin = std::io::stdin();
    let mut stdout = std::io::stdout();
    loop {
        let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
        let typed = poll(&mut fds, PollTimeout::from(10_u8))? > 0;
        if typed {
            let mut buffer = [0_u8; 256];
            let n = stdin.read(&mut buffer)?;
            let keys = &buffer[..n];
            if n == 0 || keys.contains(&ESCAPE) {
                return Ok(());
            }
            console.send(keys)?;
        }
        let Some(text) = console.take(Duration::from_millis(10)) else {
            return Ok(());
        };
        stdout.write_all(&text)?;
        stdout.flush()?;
        if text.is_empty() && ended()? {
            return Ok(());
        }
    }
}
