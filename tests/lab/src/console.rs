//! A serial port of an emulator: what it said so far, and waiting for more.

use anyhow::{Context, Result, bail};
use regex::bytes::Regex;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

/// Characters of the console that an expectation's failure shows.
const TAIL: usize = 1500;

#[derive(Debug, Default)]
struct Said {
    bytes: Vec<u8>,
    closed: bool,
}

#[derive(Debug, Default)]
struct Shared {
    said: Mutex<Said>,
    more: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Said> {
        // A panicking reader leaves bytes that are as good as ever.
        self.said.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// A port that an emulator will connect to.
#[derive(Debug)]
pub struct Listening {
    listener: TcpListener,
    port: u16,
}

impl Listening {
    /// Opens a port of the loopback interface.
    ///
    /// # Errors
    /// There is no free port.
    pub fn new() -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).context("no loopback port")?;
        let port = listener.local_addr()?.port();
        Ok(Self { listener, port })
    }

    /// The TCP port number to tell the emulator.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Waits for the emulator; `alive` says whether it still runs.
    ///
    /// # Errors
    /// It ended, or did not connect within `timeout`.
    pub fn accept(
        self,
        transcript: &Path,
        timeout: Duration,
        mut alive: impl FnMut() -> Result<()>,
    ) -> Result<Console> {
        self.listener.set_nonblocking(true)?;
        let deadline = Instant::now() + timeout;
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => return Console::new(stream, transcript),
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e.into()),
            }
            alive()?;
            if Instant::now() > deadline {
                bail!("the emulator did not connect its serial port");
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// One connected serial port.
#[derive(Debug)]
pub struct Console {
    stream: TcpStream,
    shared: Arc<Shared>,
    /// Everything before this offset has been consumed by an expectation.
    seen: usize,
    transcript: PathBuf,
}

impl Console {
    fn new(stream: TcpStream, transcript: &Path) -> Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        let shared = Arc::new(Shared::default());
        let mut file = File::create(transcript)
            .with_context(|| format!("cannot make {}", transcript.display()))?;
        let mut reader = stream.try_clone()?;
        let theirs = Arc::clone(&shared);
        thread::spawn(move || {
            let mut buffer = [0_u8; 4096];
            loop {
                let n = reader.read(&mut buffer).unwrap_or(0);
                let mut said = theirs.lock();
                if n == 0 {
                    said.closed = true;
                } else {
                    said.bytes.extend_from_slice(&buffer[..n]);
                }
                drop(said);
                theirs.more.notify_all();
                // A full disk must not stop the machine; the console goes on in memory.
                if n == 0 || file.write_all(&buffer[..n]).is_err() && file.flush().is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            stream,
            shared,
            seen: 0,
            transcript: transcript.to_owned(),
        })
    }

    /// The file that everything the port says goes to.
    pub fn transcript(&self) -> &Path {
        &self.transcript
    }

    /// Everything the port has said so far, as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.shared.lock().bytes).into_owned()
    }

    /// Types `bytes`.
    ///
    /// # Errors
    /// The emulator has gone.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream
            .write_all(bytes)
            .context("the emulator has closed the serial port")
    }

    /// What was said since the last expectation was met, at most `wait` from now.
    pub fn take(&mut self, wait: Duration) -> Option<Vec<u8>> {
        let mut said = self.shared.lock();
        if said.bytes.len() == self.seen && !said.closed {
            said = self
                .shared
                .more
                .wait_timeout(said, wait)
                .unwrap_or_else(|e| e.into_inner())
                .0;
        }
        if said.bytes.len() == self.seen {
            return if said.closed { None } else { Some(Vec::new()) };
        }
        let new = said.bytes[self.seen..].to_vec();
        self.seen = said.bytes.len();
        Some(new)
    }

    /// Waits until `pattern` matches what was said since the last expectation,
    /// and returns the text up to the end of the match and the groups.
    ///
    /// # Errors
    /// It does not within `timeout`, or the port closes; with the end of what
    /// was said.
    pub fn expect(&mut self, pattern: &str, timeout: Duration) -> Result<Found> {
        self.try_expect(pattern, timeout)?
            .with_context(|| format!("no /{pattern}/ within {} s", timeout.as_secs()))
            .map_err(|e| e.context(format!("console so far:\n{}", self.tail())))
    }

    /// As [`Self::expect`], with `None` for a timeout.
    ///
    /// # Errors
    /// The port closes before a match, or the pattern is not a regex.
    pub fn try_expect(&mut self, pattern: &str, timeout: Duration) -> Result<Option<Found>> {
        let regex = Regex::new(pattern).with_context(|| format!("bad pattern {pattern:?}"))?;
        let deadline = Instant::now() + timeout;
        let shared = Arc::clone(&self.shared);
        let mut said = shared.lock();
        loop {
            let new = &said.bytes[self.seen..];
            if let Some(found) = regex.captures(new) {
                let end = found.get(0).map_or(0, |m| m.end());
                let group = |i: usize| {
                    found
                        .get(i)
                        .map(|m| String::from_utf8_lossy(m.as_bytes()).into_owned())
                };
                let result = Found {
                    before: String::from_utf8_lossy(&new[..end]).into_owned(),
                    groups: (0..found.len()).map(group).collect(),
                };
                self.seen += end;
                return Ok(Some(result));
            }
            if said.closed {
                drop(said);
                bail!(
                    "the emulator ended before /{pattern}/; console so far:\n{}",
                    self.tail()
                );
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            said = shared
                .more
                .wait_timeout(said, left)
                .unwrap_or_else(|e| e.into_inner())
                .0;
        }
    }

    /// The end of what was said.
    pub fn tail(&self) -> String {
        let text = self.text();
        let mut start = text.len().saturating_sub(TAIL);
        while !text.is_char_boundary(start) {
            start += 1;
        }
        text[start..].to_owned()
    }
}

/// A met expectation.
#[derive(Debug, Clone)]
pub struct Found {
    /// What was said up to the end of the match.
    pub before: String,
    /// The match and its groups.
    pub groups: Vec<Option<String>>,
}

impl Found {
    /// Group `i` of the pattern, or the empty string.
    pub fn group(&self, i: usize) -> &str {
        self.groups
            .get(i)
            .and_then(Option::as_deref)
            .unwrap_or_default()
    }
}
