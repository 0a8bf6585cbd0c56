//! poll(2) for descriptors that their owner keeps open.

use std::io;
use std::time::Duration;

pub use libc::pollfd;

/// Waits until a descriptor of `fds` is ready, or for `timeout` (rounded up to
/// milliseconds; `None` is for ever). Returns how many are ready; their
/// `revents` say for what. A descriptor that is not open is POLLNVAL, which
/// counts as ready.
///
/// # Errors
/// What the host says; a signal is no error, and then nothing is ready.
pub fn poll(fds: &mut [pollfd], timeout: Option<Duration>) -> io::Result<usize> {
    let ms = timeout.map_or(-1, |t| {
        i32::try_from(t.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
    });
    let n = libc::nfds_t::try_from(fds.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: `fds` is `n` entries, borrowed mutably for the call; the
    // descriptors in them are only looked at, and may be any number.
    let r = unsafe { libc::poll(fds.as_mut_ptr(), n, ms) };
    if r >= 0 {
        return Ok(r as usize);
    }
    let e = io::Error::last_os_error();
    if e.kind() == io::ErrorKind::Interrupted {
        for f in fds {
            f.revents = 0;
        }
        return Ok(0);
    }
    Err(e)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn what_is_ready_is_told_and_what_is_not_times_out() {
        let (a, mut b) = UnixStream::pair().unwrap();
        let entry = |fd, events| pollfd {
            fd,
            events,
            revents: 0,
        };
        let mut fds = [entry(a.as_raw_fd(), libc::POLLIN)];
        let brief = Some(Duration::from_micros(1));
        assert_eq!(poll(&mut fds, brief).unwrap(), 0);
        b.write_all(b"x").unwrap();
        assert_eq!(poll(&mut fds, None).unwrap(), 1);
        assert_eq!(fds[0].revents, libc::POLLIN);
        let mut none = [entry(i32::MAX, libc::POLLIN)];
        assert_eq!(poll(&mut none, None).unwrap(), 1);
        assert_eq!(none[0].revents, libc::POLLNVAL);
    }
}
