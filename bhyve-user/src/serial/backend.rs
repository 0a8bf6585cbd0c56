//! What a serial port is connected to.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::terminal;
use crate::lock;
use crate::sandbox::{Purpose, limit};

/// The host's side of a serial port, as `-l com1,…` names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Spec {
    /// Nothing: output is dropped.
    None,
    /// Standard input and output of this process.
    Stdio,
    /// A terminal device, `/dev/…`.
    Tty(PathBuf),
    /// A new pseudo-terminal, whose path is printed.
    Pty,
    /// Output appended to a file; no input.
    File(PathBuf),
    /// A Unix-domain socket to listen on; one client at a time.
    Unix(PathBuf),
    /// A TCP address to listen on; one client at a time.
    Tcp(String),
}

impl FromStr for Spec {
    type Err = String;

    fn from_str(s: &str) -> Result<Spec, String> {
        let rest = |prefix: &str| s.strip_prefix(prefix).filter(|r| !r.is_empty());
        match s {
            "" => Ok(Spec::None),
            "stdio" => Ok(Spec::Stdio),
            "pty" => Ok(Spec::Pty),
            _ if s.starts_with('/') => Ok(Spec::Tty(s.into())),
            _ => rest("file:")
                .map(|p| Spec::File(p.into()))
                .or_else(|| rest("unix:").map(|p| Spec::Unix(p.into())))
                .or_else(|| rest("tcp=").or_else(|| rest("tcp:")).map(|a| Spec::Tcp(a.into())))
                .ok_or_else(|| {
                    format!("\"{s}\" is no serial backend: stdio, pty, /dev/TTY, file:PATH, unix:PATH, tcp=ADDRESS:PORT")
                }),
        }
    }
}

impl std::fmt::Display for Spec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Spec::None => Ok(()),
            Spec::Stdio => write!(f, "stdio"),
            Spec::Pty => write!(f, "pty"),
            Spec::Tty(path) => write!(f, "{}", path.display()),
            Spec::File(path) => write!(f, "file:{}", path.display()),
            Spec::Unix(path) => write!(f, "unix:{}", path.display()),
            Spec::Tcp(address) => write!(f, "tcp={address}"),
        }
    }
}

/// An open backend: something to read from and something to write to.
#[derive(Default)]
pub struct Backend {
    /// Input, `None` if there will never be any.
    pub input: Option<Box<dyn Read + Send>>,
    /// Output, `None` to drop it.
    pub output: Option<Box<dyn Write + Send>>,
}

impl Spec {
    /// Opens the backend; `name` is the port's, for messages.
    pub fn open(&self, name: &str) -> io::Result<Backend> {
        match self {
            Spec::None => Ok(Backend::default()),
            Spec::Stdio => {
                let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
                let output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
                terminal::make_raw(&input, true)?;
                limit(&input, Purpose::Terminal)?;
                limit(&output, Purpose::Output)?;
                Ok(Backend {
                    input: Some(Box::new(input)),
                    output: Some(Box::new(output)),
                })
            }
            Spec::Tty(path) => {
                // A line without carrier, such as an nmdm(4) whose other end
                // nobody has opened yet, would keep a plain open() waiting.
                let tty = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .custom_flags(nix::libc::O_NOCTTY | nix::libc::O_NONBLOCK)
                    .open(path)?;
                if !nix::unistd::isatty(&tty).unwrap_or(false) {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidInput,
                        "not a terminal; for a plain file say file:PATH",
                    ));
                }
                terminal::make_raw(&tty, true)?;
                // Raw mode has CLOCAL, so carrier matters no more.
                let flags = OFlag::from_bits_retain(fcntl(&tty, FcntlArg::F_GETFL)?);
                fcntl(&tty, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
                let input = tty.try_clone()?;
                limit(&input, Purpose::Terminal)?;
                limit(&tty, Purpose::Terminal)?;
                Ok(Backend {
                    input: Some(Box::new(input)),
                    output: Some(Box::new(tty)),
                })
            }
            Spec::Pty => {
                let pty = nix::pty::openpty(None, None)?;
                let path = nix::unistd::ttyname(&pty.slave)?;
                terminal::make_raw(&pty.slave, false)?;
                // With the slave closed, the master hangs up until somebody
                // opens it: that tells whether output has a reader.
                drop(pty.slave);
                eprintln!("{name} is on {}", path.display());
                let output = pty.master.try_clone()?;
                limit(&output, Purpose::Terminal)?;
                limit(&pty.master, Purpose::Terminal)?;
                Ok(Backend {
                    input: Some(Box::new(Pty(File::from(pty.master)))),
                    output: Some(Box::new(Pty(File::from(output)))),
                })
            }
            Spec::File(path) => {
                let file = OpenOptions::new().append(true).create(true).open(path)?;
                limit(&file, Purpose::Output)?;
                Ok(Backend {
                    input: None,
                    output: Some(Box::new(file)),
                })
            }
            Spec::Unix(path) => {
                // A socket that a killed process left behind refuses nobody.
                if std::os::unix::net::UnixStream::connect(path).is_err()
                    && std::fs::symlink_metadata(path)
                        .is_ok_and(|m| std::os::unix::fs::FileTypeExt::is_socket(&m.file_type()))
                {
                    std::fs::remove_file(path)?;
                }
                let listener = UnixListener::bind(path)?;
                limit(&listener, Purpose::Listener)?;
                Ok(listening(move || Ok(listener.accept()?.0.into())))
            }
            Spec::Tcp(address) => {
                let listener = TcpListener::bind(address)?;
                limit(&listener, Purpose::Listener)?;
                Ok(listening(move || Ok(listener.accept()?.0.into())))
            }
        }
    }
}

/// A pty's master: without a reader, output is dropped and input waits.
struct Pty(File);

impl Pty {
    fn hung_up(&self) -> bool {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLOUT)];
        poll(&mut fds, PollTimeout::ZERO).is_ok()
            && fds
                .iter()
                .any(|f| f.revents().is_some_and(|r| r.contains(PollFlags::POLLHUP)))
    }
}

impl Write for Pty {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if self.hung_up() {
            Ok(buf.len())
        } else {
            self.0.write(buf)
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Pty {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(buf) {
                // Hung up: a client may come (again).
                Ok(0) => {}
                Err(e) if e.raw_os_error() == Some(nix::libc::EIO) => {}
                r => return r,
            }
            crate::pause::sleep(Duration::from_millis(200));
        }
    }
}

/// The client of a listening backend.
#[derive(Default)]
struct Client {
    stream: Mutex<Option<Arc<File>>>,
    arrived: Condvar,
}

impl Client {
    fn current(&self) -> Option<Arc<File>> {
        lock(&self.stream).clone()
    }
    fn gone(&self, stream: &Arc<File>) {
        let mut s = lock(&self.stream);
        if s.as_ref().is_some_and(|c| Arc::ptr_eq(c, stream)) {
            *s = None;
        }
    }
}

fn listening(accept: impl Fn() -> io::Result<OwnedFd> + Send + 'static) -> Backend {
    let client = Arc::new(Client::default());
    let accepted = Arc::clone(&client);
    std::thread::spawn(move || {
        crate::sandbox::join();
        loop {
            match accept() {
                Ok(stream) => {
                    let mut current = lock(&accepted.stream);
                    // A second client is hung up on: the first is using it.
                    if current.is_none() {
                        *current = Some(Arc::new(File::from(stream)));
                        accepted.arrived.notify_all();
                    }
                }
                Err(_) => crate::pause::sleep(Duration::from_millis(200)),
            }
        }
    });
    Backend {
        input: Some(Box::new(Socket(Arc::clone(&client)))),
        output: Some(Box::new(Socket(client))),
    }
}

struct Socket(Arc<Client>);

impl Read for Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let stream = {
                let mut current = lock(&self.0.stream);
                loop {
                    if let Some(s) = &*current {
                        break Arc::clone(s);
                    }
                    current = self
                        .0
                        .arrived
                        .wait(current)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            };
            match (&*stream).read(buf) {
                Ok(n) if n > 0 => return Ok(n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                _ => self.0.gone(&stream),
            }
        }
    }
}

impl Write for Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        // Without a client, output is dropped as on an unplugged line.
        let Some(stream) = self.0.current() else {
            return Ok(buf.len());
        };
        match (&*stream).write(buf) {
            Err(e) if e.kind() != io::ErrorKind::Interrupted => {
                self.0.gone(&stream);
                Ok(buf.len())
            }
            r => r,
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backends_are_named_as_in_bhyve_8() {
        assert_eq!("stdio".parse(), Ok(Spec::Stdio));
        assert_eq!("/dev/nmdm0A".parse(), Ok(Spec::Tty("/dev/nmdm0A".into())));
        assert_eq!("file:a,b".parse(), Ok(Spec::File("a,b".into())));
        assert_eq!(
            "tcp=127.0.0.1:4555".parse(),
            Ok(Spec::Tcp("127.0.0.1:4555".into()))
        );
        let error = Spec::from_str("unix:").unwrap_err();
        assert!(error.contains("unix:PATH"), "{error}");
    }

    #[test]
    fn a_plain_file_is_not_taken_for_a_terminal() {
        let path = std::env::temp_dir().join(format!("bhyve-tty-{}", std::process::id()));
        std::fs::write(&path, b"").unwrap();
        let error = Spec::Tty(path.clone()).open("com1").err().unwrap();
        std::fs::remove_file(path).unwrap();
        assert!(error.to_string().contains("file:PATH"), "{error}");
    }

    #[test]
    fn a_terminal_waits_for_input_once_it_is_open() {
        let pty = nix::pty::openpty(None, None).unwrap();
        let path = nix::unistd::ttyname(&pty.slave).unwrap();
        let mut input = Spec::Tty(path).open("com1").unwrap().input.unwrap();
        let reader = std::thread::spawn(move || {
            let mut byte = [0];
            input.read_exact(&mut byte).map(|()| byte[0])
        });
        // A reader that did not wait would have failed by the time it is written.
        std::thread::sleep(Duration::from_millis(50));
        let mut master = File::from(pty.master);
        // With its newline: another test may give all terminals their modes back.
        master.write_all(b"k\n").unwrap();
        assert_eq!(reader.join().unwrap().unwrap(), b'k');
    }

    #[test]
    fn a_socket_drops_output_without_a_client_and_carries_both_ways_with_one() {
        let path = std::env::temp_dir().join(format!("bhyve-sock-{}", std::process::id()));
        let mut backend = Spec::Unix(path.clone()).open("com1").unwrap();
        let mut output = backend.output.take().unwrap();
        output.write_all(b"lost").unwrap();
        let mut client = std::os::unix::net::UnixStream::connect(&path).unwrap();
        client.write_all(b"hi").unwrap();
        let mut buf = [0; 2];
        backend.input.take().unwrap().read_exact(&mut buf).unwrap();
        assert_eq!(&buf, b"hi");
        output.write_all(b"kept").unwrap();
        let mut got = [0; 4];
        client.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"kept");
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_pty_nobody_reads_does_not_block() {
        let mut backend = Spec::Pty.open("com2").unwrap();
        let mut output = backend.output.take().unwrap();
        output.write_all(&[b'x'; 100_000]).unwrap();
    }
}
