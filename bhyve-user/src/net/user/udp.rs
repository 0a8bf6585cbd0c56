//! UDP: each pair of the guest's port and a peer has a connected socket of the
//! host's, so that answers come from that peer only, and refusals are seen.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use mio::net::UdpSocket;
use mio::{Interest, Registry, Token};

use super::link::Link;
use super::tcp::Key;
use super::{Kind, seen, token};

/// Pairs at a time; the one that was idle the longest makes room.
pub const MOST: usize = 256;
/// A pair that is idle for so long is forgotten.
const IDLE: Duration = Duration::from_secs(60);
/// Datagrams of one socket for one look at it.
const BATCH: usize = 64;

struct Flow {
    key: Key,
    socket: UdpSocket,
    readable: bool,
    used: Instant,
}

/// All pairs.
#[derive(Default)]
pub struct Flows {
    slots: Vec<Option<Flow>>,
    free: Vec<usize>,
    index: HashMap<Key, usize>,
}

/// What became of a datagram.
pub enum Fate {
    /// On its way, or lost as datagrams are.
    Gone,
    /// Nobody is there.
    Refused,
}

fn fate(r: io::Result<usize>) -> Fate {
    match r {
        Err(e)
            if matches!(
                e.kind(),
                ErrorKind::ConnectionRefused
                    | ErrorKind::HostUnreachable
                    | ErrorKind::NetworkUnreachable
            ) =>
        {
            Fate::Refused
        }
        _ => Fate::Gone,
    }
}

impl Flows {
    /// Sends the guest's datagram on to `to`.
    pub fn send(
        &mut self,
        key: Key,
        to: SocketAddr,
        data: &[u8],
        registry: &Registry,
        now: Instant,
    ) -> Fate {
        let slot = match self.index.get(&key) {
            Some(&slot) => slot,
            None => match self.open(key, to, registry, now) {
                Ok(slot) => slot,
                Err(e) => return fate(Err(e)),
            },
        };
        let Some(Some(flow)) = self.slots.get_mut(slot) else {
            return Fate::Gone;
        };
        flow.used = now;
        fate(flow.socket.send(data))
    }

    fn open(
        &mut self,
        key: Key,
        to: SocketAddr,
        registry: &Registry,
        now: Instant,
    ) -> io::Result<usize> {
        let any: IpAddr = match to {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let mut socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
        socket.connect(to)?;
        if self.index.len() >= MOST {
            let flows = self.slots.iter().enumerate();
            let flows = flows.filter_map(|(i, f)| Some((f.as_ref()?.used, i)));
            if let Some((_, slot)) = flows.min() {
                self.remove(slot);
            }
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        if let Err(e) = registry.register(&mut socket, token(Kind::Udp, slot), Interest::READABLE) {
            self.free.push(slot);
            return Err(e);
        }
        if let Some(place) = self.slots.get_mut(slot) {
            *place = Some(Flow {
                key,
                socket,
                readable: false,
                used: now,
            });
        }
        self.index.insert(key, slot);
        Ok(slot)
    }

    fn remove(&mut self, slot: usize) {
        if let Some(flow) = self.slots.get_mut(slot).and_then(Option::take) {
            self.index.remove(&flow.key);
            self.free.push(slot);
        }
    }

    /// The host has something for a pair; returns the pair where its peer has
    /// refused a datagram.
    pub fn ready(
        &mut self,
        slot: usize,
        link: &mut Link,
        buffer: &mut [u8],
        now: Instant,
    ) -> Option<Key> {
        let flow = self.slots.get_mut(slot)?.as_mut()?;
        flow.readable = true;
        for _ in 0..BATCH {
            if !link.room() {
                link.starved = true;
                return None;
            }
            match flow.socket.recv(buffer) {
                Ok(n) => {
                    flow.used = now;
                    let data = buffer.get(..n).unwrap_or_default();
                    link.udp(link.guest, flow.key.peer, flow.key.guest, data);
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    flow.readable = false;
                    return None;
                }
                Err(e) if e.kind() == ErrorKind::ConnectionRefused => return Some(flow.key),
                Err(_) => {}
            }
        }
        // More to come, after others had their turn.
        link.starved = true;
        None
    }

    /// Those that were left with something to read.
    pub fn left(&self) -> Vec<usize> {
        let flows = self.slots.iter().enumerate();
        let left = flows.filter(|(_, f)| f.as_ref().is_some_and(|f| f.readable));
        left.map(|(i, _)| i).collect()
    }

    /// Forgets the idle ones.
    pub fn timers(&mut self, now: Instant) {
        for slot in 0..self.slots.len() {
            let idle = |f: &Flow| now.saturating_duration_since(f.used) >= IDLE;
            if matches!(self.slots.get(slot), Some(Some(f)) if idle(f)) {
                self.remove(slot);
            }
        }
    }

    /// When [`Flows::timers`] has something to do.
    pub fn due(&self) -> Option<Instant> {
        let used = self.slots.iter().flatten().map(|f| f.used).min();
        used.map(|u| u + IDLE)
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        *self = Flows::default();
    }

    /// How many there are.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.index.len()
    }
}

/// A forwarded port of the host's.
pub struct Forward {
    socket: UdpSocket,
    guest: SocketAddr,
    /// Who has sent something, under the address that the guest knows it by.
    peers: HashMap<SocketAddr, (SocketAddr, Instant)>,
    readable: bool,
}

impl Forward {
    /// Binds the port.
    ///
    /// # Errors
    /// The host's: the port is taken, or not for us.
    pub fn bind(at: SocketAddr, guest: SocketAddr) -> io::Result<Forward> {
        Ok(Forward {
            socket: UdpSocket::bind(at)?,
            guest,
            peers: HashMap::new(),
            readable: false,
        })
    }

    /// Its place in the poll.
    ///
    /// # Errors
    /// The host's.
    pub fn register(&mut self, registry: &Registry, at: Token) -> io::Result<()> {
        registry.register(&mut self.socket, at, Interest::READABLE)
    }

    /// Datagrams from outside.
    pub fn ready(&mut self, link: &mut Link, buffer: &mut [u8], now: Instant) {
        self.readable = true;
        for _ in 0..BATCH {
            if !link.room() {
                break;
            }
            match self.socket.recv_from(buffer) {
                Ok((n, from)) => {
                    let seen = seen(from, self.guest);
                    if self.peers.len() >= MOST && !self.peers.contains_key(&seen) {
                        let oldest = self.peers.iter().min_by_key(|(_, (_, used))| *used);
                        let oldest = oldest.map(|(k, _)| *k);
                        oldest.map(|k| self.peers.remove(&k));
                    }
                    self.peers.insert(seen, (from, now));
                    let data = buffer.get(..n).unwrap_or_default();
                    link.udp(link.guest, seen, self.guest, data);
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    self.readable = false;
                    return;
                }
                Err(_) => {}
            }
        }
        link.starved = true;
    }

    /// Whether something was left to read.
    pub fn left(&self) -> bool {
        self.readable
    }

    /// The guest's answer to somebody who came through this port; false if it
    /// is for somebody else.
    pub fn answer(&mut self, key: &Key, data: &[u8], now: Instant) -> bool {
        if key.guest != self.guest {
            return false;
        }
        let Some((to, used)) = self.peers.get_mut(&key.peer) else {
            return false;
        };
        *used = now;
        let _ = self.socket.send_to(data, *to);
        true
    }
}
