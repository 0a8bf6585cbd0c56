//! Unix sockets that programs of the host connect to.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// A socket that exists as long as this does. Nothing about it ever waits.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Listens at `path`, for this user only. What a killed process has left
    /// there is replaced.
    ///
    /// # Errors
    /// What the host says; [`ErrorKind::AddrInUse`] where somebody listens, or
    /// something else is.
    pub fn bind(path: &Path) -> io::Result<Listener> {
        let left_over = fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket())
            && UnixStream::connect(path).is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused);
        if left_over {
            fs::remove_file(path)?;
        }
        let socket = UnixListener::bind(path)?;
        let listener = Listener {
            socket,
            path: path.to_owned(),
        };
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        listener.socket.set_nonblocking(true)?;
        crate::sandbox::limit(&listener.socket, crate::sandbox::Purpose::Listener)?;
        Ok(listener)
    }

    /// Who has connected, if somebody has.
    pub fn accept(&self) -> Option<UnixStream> {
        let (stream, _) = self.socket.accept().ok()?;
        stream.set_nonblocking(true).ok()?;
        Some(stream)
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // It may be out of reach by now, or gone.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_private_and_leftovers_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = Listener::bind(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(first.accept().is_none());
        let _client = UnixStream::connect(&path).unwrap();
        assert!(first.accept().is_some());
        let taken = Listener::bind(&path).unwrap_err();
        assert_eq!(taken.kind(), ErrorKind::AddrInUse);
        // As if killed.
        drop(UnixListener::bind(dir.path().join("t")).unwrap());
        let second = Listener::bind(&dir.path().join("t")).unwrap();
        drop(second);
        assert!(!dir.path().join("t").exists());
        fs::write(dir.path().join("f"), b"a file").unwrap();
        assert!(Listener::bind(&dir.path().join("f")).is_err());
        assert!(dir.path().join("f").exists());
    }
}
