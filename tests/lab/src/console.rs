//! A serial port of an emulator: what it said so far, and waiting for more.

use crate::nudge::{Nudge, QUIET};
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

/// How much longer than asked an emulator that gets little of the CPU may take.
const STRETCH: u32 = 4;

/// Timeouts below this are looks, not patience, and stay what they are.
const SHORT_LOOK: Duration = Duration::from_secs(10);

/// Waiting for an emulator on a machine that may have other things to do: the
/// time that counts is the emulator's own, within [`STRETCH`] times the real one.
struct Patience {
    emulator: Option<u32>,
    spent_before: Duration,
    started: Instant,
    timeout: Duration,
}

impl Patience {
    fn new(emulator: u32, timeout: Duration) -> Self {
        let emulator = (timeout >= SHORT_LOOK).then_some(emulator);
        Self {
            emulator,
            spent_before: emulator.and_then(cpu_time).unwrap_or_default(),
            started: Instant::now(),
            timeout,
        }
    }

    /// How long to wait before asking again; zero at the end.
    fn left(&self) -> Duration {
        let elapsed = self.started.elapsed();
        let left = self.timeout.saturating_sub(elapsed);
        if !left.is_zero() || elapsed >= self.timeout * STRETCH {
            return left;
        }
        match self.emulator.and_then(cpu_time) {
            // Nine tenths: an emulator has waits of its own.
            Some(now) if now.saturating_sub(self.spent_before) < self.timeout * 9 / 10 => {
                Duration::from_secs(1)
            }
            _ => Duration::ZERO,
        }
    }
}

/// User and system time of a process so far, proc(5).
fn cpu_time(pid: u32) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may contain anything; utime and stime are the
    // twelfth and thirteenth fields after it.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut ticks = fields.split_whitespace().skip(11);
    let mut next = || ticks.next()?.parse::<u64>().ok();
    // USER_HZ is 100 on amd64.
    Some(Duration::from_millis((next()? + next()?) * 10))
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

    /// Waits for the emulator, a process of that number; `alive` says whether it still runs.
    ///
    /// # Errors
    /// It ended, or did not connect within `timeout`.
    pub fn accept(
        self,
        transcript: &Path,
        timeout: Duration,
        emulator: u32,
        alive: impl FnMut() -> Result<()>,
    ) -> Result<Console> {
        let stream = self.stream("serial port", timeout, alive)?;
        Console::new(stream, transcript, emulator)
    }

    /// The same for what is no console: `what` it is, for the error.
    ///
    /// # Errors
    /// As for [`Self::accept`].
    pub fn stream(
        self,
        what: &str,
        timeout: Duration,
        mut alive: impl FnMut() -> Result<()>,
    ) -> Result<TcpStream> {
        self.listener.set_nonblocking(true)?;
        let deadline = Instant::now() + timeout;
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    return Ok(stream);
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e.into()),
            }
            alive()?;
            if Instant::now() > deadline {
                bail!("the emulator did not connect its {what}");
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
    /// The emulator's process.
    emulator: u32,
    /// For an emulator that may have lost an interrupt when it is silent.
    pub nudge: Option<Nudge>,
}

impl Console {
    fn new(stream: TcpStream, transcript: &Path, emulator: u32) -> Result<Self> {
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
            emulator,
            nudge: None,
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
            let closed = said.closed;
            drop(said);
            self.silent();
            return if closed { None } else { Some(Vec::new()) };
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
        let patience = Patience::new(self.emulator, timeout);
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
            let left = patience.left();
            if left.is_zero() {
                return Ok(None);
            }
            let waited;
            (said, waited) = shared
                .more
                .wait_timeout(said, left.min(QUIET))
                .unwrap_or_else(|e| e.into_inner());
            if waited.timed_out() {
                drop(said);
                self.silent();
                said = shared.lock();
            }
        }
    }

    /// Nothing happens: makes up for an interrupt that the emulator may have lost.
    pub fn silent(&self) {
        if let Some(nudge) = &self.nudge {
            nudge.silent();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_works_spends_time() {
        let us = std::process::id();
        let before = cpu_time(us).unwrap();
        let started = Instant::now();
        let mut sum = 0_u64;
        while cpu_time(us).unwrap() < before + Duration::from_millis(50) {
            sum = std::hint::black_box(sum.wrapping_add(1));
            assert!(started.elapsed() < Duration::from_secs(60), "{sum}");
        }
    }

    #[test]
    fn patience_ends_for_a_process_that_has_gone_and_for_short_looks() {
        let mut patience = Patience::new(std::process::id(), Duration::from_secs(20));
        patience.started -= Duration::from_secs(21);
        assert_eq!(patience.left(), Duration::from_secs(1));
        patience.started -= Duration::from_secs(60);
        assert_eq!(patience.left(), Duration::ZERO);
        // Above any pid_max.
        let mut gone = Patience::new(u32::MAX, Duration::from_secs(20));
        gone.started -= Duration::from_secs(21);
        assert_eq!(gone.left(), Duration::ZERO);
        let mut look = Patience::new(std::process::id(), Duration::from_secs(1));
        look.started -= Duration::from_secs(2);
        assert_eq!(look.left(), Duration::ZERO);
    }
}
