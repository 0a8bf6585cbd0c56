//! The device: its queues, its size, and who asks about it.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Options;
use super::backend::{Client, Input, Release};
use super::ledger::Ledger;
use super::request::{Command, NAMES, PAGE, Statistics, command, pages, statistics};
use crate::machine::Machine;
use crate::virtio::listener::Listener;
use crate::virtio::queue::{Chain, Malformed, take_front, total};
use crate::virtio::wait::{Ready, Sources};
use crate::virtio::{Cx, Device, Identity, Turn};

/// Feature bits (virtio 1.2 §5.5.3).
const F_MUST_TELL_HOST: u64 = 1;
const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;

/// Entries of a queue.
const QUEUE: u16 = 128;
/// Page numbers that are looked at in one request: Linux sends 256, FreeBSD
/// 256.
const MOST_PAGES: u64 = 65536;
/// Bytes of statistics that are looked at.
const MOST_STATISTICS: u64 = 4096;
/// How long the guest may take to tell statistics.
const PATIENCE: Duration = Duration::from_secs(2);
/// Most programs at the control socket.
const MOST_CLIENTS: usize = 8;
/// Most lines that one of them sends at once.
const MOST_LINES: usize = 64;
/// Offsets in the configuration space.
const NUM_PAGES: usize = 0;
const ACTUAL: usize = 4;

/// What a queue is for. The ones behind the first two are there if their
/// features were accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

fn role(queue: usize, features: u64) -> Option<Role> {
    let optional = [
        (F_STATS_VQ, Role::Statistics),
        (F_REPORTING, Role::Reporting),
    ];
    let there = optional.into_iter().filter(|(f, _)| features & f != 0);
    [Role::Inflate, Role::Deflate]
        .into_iter()
        .chain(there.map(|(_, r)| r))
        .nth(queue)
}

/// A balloon.
pub struct Balloon {
    ledger: Ledger,
    release: Release,
    listener: Option<Listener>,
    clients: Vec<Client>,
    /// Until when the guest's statistics are waited for.
    asked: Option<Instant>,
    /// The buffer that the guest fills with statistics when it gets it back,
    /// and its queue.
    kept: Option<(usize, Chain)>,
    statistics: Statistics,
    /// Bytes of free pages that the guest has reported.
    reported: u64,
    bytes: Vec<u8>,
}

impl Balloon {
    /// A balloon of the size that the options ask for.
    ///
    /// # Errors
    /// The control socket cannot be.
    pub fn open(
        options: &Options,
        machine: Arc<dyn Machine>,
    ) -> Result<(Identity, Balloon), String> {
        let listener = options
            .control
            .as_deref()
            .map(|p| Listener::bind(p).map_err(|e| format!("{}: {e}", p.display())))
            .transpose()?;
        let release = Release::new(machine);
        let mut features = F_MUST_TELL_HOST | F_STATS_VQ | F_DEFLATE_ON_OOM;
        let mut queues = vec![QUEUE; 3];
        if !release.possible() {
            eprintln!(
                "virtio-balloon: this vmm.ko cannot take guest memory back; what the guest gives \
                 stays with the VM\r"
            );
        } else if !options.no_report {
            features |= F_REPORTING;
            queues.push(QUEUE);
        }
        let wanted = u32::try_from(options.size / PAGE).unwrap_or(u32::MAX);
        let mut config = wanted.to_le_bytes().to_vec();
        config.extend([0; 4]);
        let identity = Identity {
            kind: 5,
            // Memory controller, other.
            class: (5, 0x80),
            features,
            queues,
            config,
            writable: ACTUAL..ACTUAL + 4,
        };
        let balloon = Balloon {
            ledger: Ledger::default(),
            release,
            listener,
            clients: Vec::new(),
            asked: None,
            kept: None,
            statistics: Statistics::default(),
            reported: 0,
            bytes: Vec::new(),
        };
        Ok((identity, balloon))
    }

    /// Reads the readable part of a chain, up to `most` bytes.
    fn bytes(&mut self, chain: &mut Chain, cx: &Cx<'_>, most: u64) -> Result<(), Malformed> {
        let len = total(&chain.readable);
        if len > most {
            return Err(Malformed::Request);
        }
        self.bytes.resize(len as usize, 0);
        if !take_front(&mut chain.readable, cx.memory, &mut self.bytes) {
            return Err(Malformed::Buffer);
        }
        Ok(())
    }

    fn pages(&mut self, inflate: bool, chain: &mut Chain, cx: &Cx<'_>) -> Result<(), Malformed> {
        self.bytes(chain, cx, MOST_PAGES * 4)?;
        for page in pages(&self.bytes) {
            let gpa = page * PAGE;
            if !cx.memory.contains(gpa, PAGE) {
                continue;
            }
            if !inflate {
                self.ledger.take(gpa);
            } else if let Some(piece) = self.ledger.put(gpa) {
                self.release.range(piece, super::ledger::PIECE);
            }
        }
        Ok(())
    }

    /// Asks the guest for fresh statistics; false if it tells none.
    fn ask(&mut self, cx: &mut Cx<'_>) -> Result<bool, Malformed> {
        if let Some((queue, chain)) = self.kept.take() {
            cx.push(queue, &chain, 0)?;
            self.asked = Some(Instant::now() + PATIENCE);
        }
        Ok(self.asked.is_some())
    }

    /// What there is to know, as JSON.
    fn report(&self, cx: &Cx<'_>) -> String {
        let config = |at: usize| {
            cx.config(|c| {
                let bytes = c.get(at..at + 4).and_then(|b| b.first_chunk());
                bytes.map_or(0, |b| u64::from(u32::from_le_bytes(*b)))
            })
        };
        let mut text = format!(
            "{{\"size\":{},\"actual\":{},\"released\":{},\"reported\":{}",
            config(NUM_PAGES) * PAGE,
            config(ACTUAL) * PAGE,
            self.release.bytes,
            self.reported
        );
        for (name, value) in NAMES.iter().zip(self.statistics) {
            if let Some(v) = value {
                let _ = write!(text, ",\"{name}\":{v}");
            }
        }
        text.push('}');
        text
    }

    /// Answers everybody who waits for statistics.
    fn tell(&mut self, cx: &Cx<'_>) {
        self.asked = None;
        let report = self.report(cx);
        self.clients
            .retain_mut(|c| !std::mem::take(&mut c.waits) || c.answer(&report));
    }

    /// A client's line; false if the client is done with.
    fn follow(
        &mut self,
        client: &mut Client,
        line: &str,
        cx: &mut Cx<'_>,
    ) -> Result<bool, Malformed> {
        Ok(match command(line) {
            Ok(Command::Size(bytes)) if bytes < cx.memory.size() => {
                let pages = (bytes / PAGE) as u32;
                cx.set_config(NUM_PAGES, &pages.to_le_bytes());
                client.answer("ok")
            }
            Ok(Command::Size(_)) => {
                let most = cx.memory.size() >> 20;
                client.answer(&format!("error: the guest has {most}M"))
            }
            Ok(Command::Stats) => {
                if self.ask(cx)? {
                    client.waits = true;
                    true
                } else {
                    let report = self.report(cx);
                    client.answer(&report)
                }
            }
            Err(why) => client.answer(&format!("error: {why}")),
        })
    }
}

impl Device for Balloon {
    fn turn(&mut self, queue: usize, cx: &mut Cx<'_>) -> Result<Turn, Malformed> {
        let mut chain = Chain::default();
        if !cx.pop(queue, &mut chain)? {
            return Ok(Turn::Idle);
        }
        match role(queue, cx.features) {
            Some(Role::Inflate) => self.pages(true, &mut chain, cx)?,
            Some(Role::Deflate) => self.pages(false, &mut chain, cx)?,
            Some(Role::Statistics) => {
                self.bytes(&mut chain, cx, MOST_STATISTICS)?;
                self.statistics = statistics(&self.bytes);
                self.tell(cx);
                // It goes back when somebody wants to know. One is enough.
                if self.kept.is_none() {
                    self.kept = Some((queue, chain));
                    return Ok(Turn::More);
                }
            }
            Some(Role::Reporting) => {
                for b in &chain.writable {
                    self.reported += u64::from(b.len);
                    self.release.range(b.addr, b.len.into());
                }
            }
            None => return Err(Malformed::Request),
        }
        cx.push(queue, &chain, 0)?;
        Ok(Turn::More)
    }

    fn reset(&mut self) {
        // A new driver starts with nothing in the balloon.
        self.ledger.clear();
        self.kept = None;
        self.statistics = Statistics::default();
    }

    fn polls(&self) -> bool {
        self.listener.is_some()
    }

    fn sources(&mut self, sources: &mut Sources) {
        if let Some(l) = &self.listener
            && self.clients.len() < MOST_CLIENTS
        {
            sources.add(0, l, true, false);
        }
        for (i, c) in self.clients.iter().enumerate() {
            sources.add(i + 1, &c.stream, true, false);
        }
        if let Some(until) = self.asked {
            sources.timeout(until.saturating_duration_since(Instant::now()));
        }
    }

    fn woken(&mut self, _: &[Ready], cx: &mut Cx<'_>) -> Result<(), Malformed> {
        if let Some(stream) = self.listener.as_ref().and_then(Listener::accept)
            && self.clients.len() < MOST_CLIENTS
        {
            self.clients.push(Client::new(stream));
        }
        let mut clients = std::mem::take(&mut self.clients);
        let mut result = Ok(());
        clients.retain_mut(|client| {
            for _ in 0..MOST_LINES {
                let stays = match client.read() {
                    Input::Nothing => return true,
                    Input::End => false,
                    Input::Line(line) => self.follow(client, &line, cx).unwrap_or_else(|e| {
                        result = Err(e);
                        false
                    }),
                };
                if !stays {
                    return false;
                }
            }
            // Faster than answers are read.
            false
        });
        self.clients = clients;
        if self.asked.is_some_and(|until| Instant::now() >= until) {
            // What the guest told last.
            self.tell(cx);
        }
        result
    }
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
