//! Terminals in raw mode, and back: whatever ends the process, the user's
//! terminal must be as it was.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;

use nix::sys::termios::{ControlFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::lock;
use crate::sandbox::{Purpose, limit};

static SAVED: Mutex<Vec<(OwnedFd, Termios)>> = Mutex::new(Vec::new());

/// Puts a terminal into raw mode. With `restore`, [`restore_all`] undoes it.
/// Files that are no terminals stay as they are.
pub fn make_raw(fd: &impl AsFd, restore: bool) -> nix::Result<()> {
    let Ok(saved) = tcgetattr(fd) else {
        return Ok(());
    };
    let mut raw = saved.clone();
    cfmakeraw(&mut raw);
    raw.control_flags |= ControlFlags::CLOCAL;
    tcsetattr(fd, SetArg::TCSANOW, &raw)?;
    if restore {
        let fd = fd
            .as_fd()
            .try_clone_to_owned()
            .map_err(|_| nix::errno::Errno::EMFILE)?;
        limit(&fd, Purpose::Terminal)
            .map_err(|e| nix::errno::Errno::from_raw(e.raw_os_error().unwrap_or_default()))?;
        lock(&SAVED).push((fd, saved));
    }
    Ok(())
}

/// Gives every terminal that [`make_raw`] changed its old settings back.
pub fn restore_all() {
    for (fd, saved) in lock(&SAVED).drain(..) {
        // The terminal may be gone; there is nobody left to tell.
        let _ = tcsetattr(&fd, SetArg::TCSANOW, &saved);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::termios::LocalFlags;

    #[test]
    fn a_terminal_is_raw_and_then_as_it_was() {
        let pty = nix::pty::openpty(None, None).unwrap();
        let before = tcgetattr(&pty.slave).unwrap();
        assert!(before.local_flags.contains(LocalFlags::ICANON));
        make_raw(&pty.slave, true).unwrap();
        assert!(
            !tcgetattr(&pty.slave)
                .unwrap()
                .local_flags
                .intersects(LocalFlags::ICANON | LocalFlags::ISIG)
        );
        restore_all();
        assert_eq!(
            tcgetattr(&pty.slave).unwrap().local_flags,
            before.local_flags
        );
    }

    #[test]
    fn a_pipe_is_left_alone() {
        let (r, _w) = nix::unistd::pipe().unwrap();
        assert_eq!(make_raw(&r, true), Ok(()));
    }
}
