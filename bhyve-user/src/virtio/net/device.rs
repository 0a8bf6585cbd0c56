//! The card: its configuration space, and packets both ways. Each pair of
//! queues is a [`Part`] with a thread and a port of its own; they share the
//! `Card`.

use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use vmmapi::GuestMemory;

use super::filter::Filter;
use super::request::{self, Command};
use crate::lock;
use crate::net::mac::Mac;
use crate::net::{ETHERNET, HEADER, LARGEST, Offloads, Port};
use crate::virtio::queue::{Chain, Malformed, take_front, take_last, total};
use crate::virtio::wait::{Ready, Sources};
use crate::virtio::{Cx, Device, Identity, Turn, Waker, feature};

/// Feature bits (virtio 1.2 §5.1.3).
const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_GUEST_ECN: u64 = 1 << 9;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_HOST_ECN: u64 = 1 << 13;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
const F_CTRL_VQ: u64 = 1 << 17;
const F_CTRL_RX: u64 = 1 << 18;
const F_CTRL_RX_EXTRA: u64 = 1 << 20;
const F_MQ: u64 = 1 << 22;
const F_CTRL_MAC_ADDR: u64 = 1 << 23;

/// Entries of the queues, as in bhyve, and of the control queue.
const QUEUE: u16 = 1024;
const CONTROL: u16 = 64;
/// Offsets in the configuration space (§5.1.4), and the link's bit.
const CONFIG_MAC: std::ops::Range<usize> = 0..6;
const CONFIG_STATUS: usize = 6;
const LINK_UP: u16 = 1;
/// Packets of one turn.
const BATCH: usize = 64;
/// The header without `num_buffers`, as old drivers have it (§5.1.6.1).
const OLD_HEADER: usize = 10;
/// Where `num_buffers` is.
const NUM_BUFFERS: std::ops::Range<usize> = 10..12;
/// Answers to control commands.
const OK: u8 = 0;
const ERR: u8 = 1;

/// What all parts of a card share.
struct Card {
    mac: Mac,
    filter: Mutex<Filter>,
    /// Pairs of queues that are there, and in use.
    pairs: u16,
    used: AtomicU16,
    wakers: Mutex<Vec<Waker>>,
}

/// A pair of queues, and with the first the control queue.
pub struct Part {
    card: Arc<Card>,
    pair: u16,
    port: Option<Box<dyn Port>>,
    /// A packet that waits for buffers of the driver's: its bytes in `packet`.
    held: Option<usize>,
    packet: Vec<u8>,
    /// Buffers that the driver gave, and that are too few so far.
    chains: Vec<Chain>,
    spare: Vec<Chain>,
    outgoing: Vec<u8>,
    chain: Chain,
    /// The driver has set DRIVER_OK.
    up: bool,
    /// There is no point in receiving before the driver gives more buffers.
    hungry: bool,
    /// The last look at the port ended before the port did.
    more: bool,
    /// The port gets packets: the driver uses so many pairs.
    on: bool,
    /// The network has gone.
    gone: AtomicBool,
}

/// Makes a card: what it is, and its parts.
pub fn new(mac: Mac, mtu: Option<u16>, ports: Vec<Box<dyn Port>>) -> (Identity, Vec<Part>) {
    let takes = ports.first().map_or_else(Offloads::default, |p| p.takes());
    let gives = ports.first().map_or_else(Offloads::default, |p| p.gives());
    let up = !ports.is_empty();
    let mut ports: Vec<Option<Box<dyn Port>>> = ports.into_iter().map(Some).collect();
    if !up {
        ports.push(None);
    }
    let pairs = ports.len() as u16;
    let mut features =
        F_MAC | F_MRG_RXBUF | F_STATUS | F_CTRL_VQ | F_CTRL_RX | F_CTRL_RX_EXTRA | F_CTRL_MAC_ADDR;
    for (bit, on) in [
        (F_CSUM, takes.csum),
        (F_HOST_TSO4, takes.csum && takes.tso4),
        (F_HOST_TSO6, takes.csum && takes.tso6),
        (F_HOST_ECN, takes.csum && takes.ecn),
        (F_GUEST_CSUM, gives.csum),
        (F_GUEST_TSO4, gives.csum && gives.tso4),
        (F_GUEST_TSO6, gives.csum && gives.tso6),
        (F_GUEST_ECN, gives.csum && gives.ecn),
        (F_MTU, mtu.is_some()),
        (F_MQ, pairs > 1),
    ] {
        if on {
            features |= bit;
        }
    }
    let mut config = mac.0.to_vec();
    config.extend(if up { LINK_UP } else { 0 }.to_le_bytes());
    config.extend(pairs.to_le_bytes());
    config.extend(mtu.unwrap_or(0).to_le_bytes());
    let mut queues = vec![QUEUE; 2 * usize::from(pairs)];
    queues.push(CONTROL);
    let identity = Identity {
        kind: 1,
        // Network controller, Ethernet.
        class: (2, 0),
        features,
        queues,
        config,
        // Old drivers set the address here.
        writable: CONFIG_MAC,
    };
    let card = Arc::new(Card {
        mac,
        filter: Mutex::new(Filter::new(mac.0)),
        pairs,
        used: AtomicU16::new(1),
        wakers: Mutex::default(),
    });
    let part = |(pair, port)| Part {
        card: Arc::clone(&card),
        pair: pair as u16,
        port,
        held: None,
        packet: vec![0; LARGEST],
        chains: Vec::new(),
        spare: Vec::new(),
        outgoing: vec![0; LARGEST],
        chain: Chain::default(),
        up: false,
        hungry: true,
        more: false,
        on: pair == 0,
        gone: AtomicBool::new(false),
    };
    let parts = ports.into_iter().enumerate().map(part).collect();
    (identity, parts)
}

/// Bytes of the header that this driver uses.
fn header_len(features: u64) -> usize {
    if features & (F_MRG_RXBUF | feature::VERSION_1) != 0 {
        HEADER
    } else {
        OLD_HEADER
    }
}

/// What the driver may leave to the device.
fn host_offloads(features: u64) -> Offloads {
    Offloads {
        csum: features & F_CSUM != 0,
        tso4: features & F_HOST_TSO4 != 0,
        tso6: features & F_HOST_TSO6 != 0,
        ecn: features & F_HOST_ECN != 0,
    }
}

/// What may be left to the driver. What the other bits need and lack, they go
/// without (§5.1.3.1).
fn guest_offloads(features: u64) -> Offloads {
    let csum = features & F_GUEST_CSUM != 0;
    Offloads {
        csum,
        tso4: csum && features & F_GUEST_TSO4 != 0,
        tso6: csum && features & F_GUEST_TSO6 != 0,
        ecn: csum && features & F_GUEST_ECN != 0,
    }
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Receive,
    Transmit,
    Control,
}

impl Part {
    fn rx(&self) -> usize {
        2 * usize::from(self.pair)
    }

    /// The control queue is behind the pairs that the driver knows of (§5.1.2).
    fn role(&self, queue: usize, features: u64) -> Option<Role> {
        let known = if features & F_MQ != 0 {
            self.card.pairs
        } else {
            1
        };
        if queue == 2 * usize::from(known) {
            return Some(Role::Control);
        }
        if queue > 2 * usize::from(known) {
            return None;
        }
        Some(if queue.is_multiple_of(2) {
            Role::Receive
        } else {
            Role::Transmit
        })
    }

    /// The network has gone: the cable is out.
    fn lost(&self, cx: &Cx<'_>, why: &std::io::Error) {
        if !self.gone.swap(true, Ordering::Relaxed) {
            eprintln!(
                "virtio-net {}: the network has gone: {why}\r",
                self.card.mac
            );
            cx.set_config(CONFIG_STATUS, &0_u16.to_le_bytes());
        }
    }

    /// Sends what the driver has put into the transmit queue, some packets at
    /// a time.
    fn transmit(&mut self, queue: usize, cx: &mut Cx<'_>) -> Result<Turn, Malformed> {
        let mut turn = Turn::More;
        let mut chain = std::mem::take(&mut self.chain);
        let mut sent = 0;
        let result = loop {
            if sent == BATCH {
                break Ok(());
            }
            match cx.pop(queue, &mut chain) {
                Ok(true) => {}
                Ok(false) => {
                    turn = Turn::Idle;
                    break Ok(());
                }
                Err(e) => break Err(e),
            }
            if let Err(e) = self.send(&mut chain, cx) {
                break Err(e);
            }
            let memory = cx.memory;
            let Some(q) = cx.queue(queue) else {
                break Ok(());
            };
            if let Err(e) = q.put(memory, &chain, 0) {
                break Err(e);
            }
            sent += 1;
        };
        self.chain = chain;
        result?;
        let memory = cx.memory;
        if sent > 0
            && let Some(q) = cx.queue(queue)
        {
            q.publish(memory)?;
        }
        // Answers that are there already need no wake-up.
        if self.port.as_ref().is_some_and(|p| p.pending()) {
            self.receive(cx)?;
        }
        Ok(turn)
    }

    /// Sends one packet. One that makes no sense is dropped.
    fn send(&mut self, chain: &mut Chain, cx: &Cx<'_>) -> Result<(), Malformed> {
        let len = header_len(cx.features);
        let mut bytes = [0; HEADER];
        let Some(head) = bytes.get_mut(..len) else {
            return Ok(());
        };
        // Old drivers keep the header in a buffer of its own, others do not
        // (VIRTIO_F_ANY_LAYOUT); it is all the same here.
        if !chain.writable.is_empty() || !take_front(&mut chain.readable, cx.memory, head) {
            return Err(Malformed::Request);
        }
        let frame = usize::try_from(total(&chain.readable)).unwrap_or(usize::MAX);
        let [h @ .., _, _] = bytes;
        let Some(header) = request::header(h, frame, host_offloads(cx.features)) else {
            return Ok(());
        };
        let Some((head, body)) = self.outgoing.split_first_chunk_mut::<HEADER>() else {
            return Ok(());
        };
        let Some(body) = body.get_mut(..frame) else {
            return Ok(());
        };
        if !take_front(&mut chain.readable, cx.memory, body) {
            return Err(Malformed::Buffer);
        }
        *head = header.bytes();
        let packet = self.outgoing.get(..HEADER + frame).unwrap_or_default();
        if self.on
            && let Some(port) = &mut self.port
            && let Err(e) = port.send(packet)
        {
            self.lost(cx, &e);
        }
        Ok(())
    }

    /// Receives what waits, some packets at a time; true if there may be more.
    fn receive(&mut self, cx: &mut Cx<'_>) -> Result<bool, Malformed> {
        let queue = self.rx();
        // A legacy driver's queues run before DRIVER_OK, but it expects no packet
        // until then: FreeBSD's asks for interrupts, by the index of the next used
        // buffer, after it gives the buffers. One that comes in between is never
        // told of, and none after it.
        if !self.up {
            self.hungry = true;
            return Ok(false);
        }
        if self.role(queue, cx.features) != Some(Role::Receive) || cx.queue(queue).is_none() {
            self.hungry = true;
            return Ok(false);
        }
        let mut delivered = false;
        let mut more = true;
        for _ in 0..BATCH {
            if self.held.is_none() {
                self.held = self.fetch(cx);
            }
            let Some(len) = self.held else {
                more = false;
                break;
            };
            if !self.gather(queue, len, cx)? {
                self.hungry = true;
                more = false;
                break;
            }
            self.hungry = false;
            delivered |= self.deliver(queue, len, cx)?;
            self.held = None;
        }
        let memory = cx.memory;
        if delivered && let Some(q) = cx.queue(queue) {
            q.publish(memory)?;
        }
        Ok(more)
    }

    /// The next packet of the network's that the driver wants to see.
    fn fetch(&mut self, cx: &Cx<'_>) -> Option<usize> {
        for _ in 0..BATCH {
            let port = self.port.as_mut().filter(|_| self.on)?;
            let len = match port.receive(&mut self.packet) {
                Ok(len) => len?,
                Err(e) => {
                    self.lost(cx, &e);
                    return None;
                }
            };
            let to = self.packet.get(HEADER..).and_then(|p| p.first_chunk());
            let wanted = to.is_some_and(|to| lock(&self.card.filter).passes(*to));
            if wanted && len >= HEADER + ETHERNET {
                return Some(len);
            }
        }
        None
    }

    /// Takes buffers of the driver's until a packet of `len` bytes fits; false
    /// if there are too few.
    fn gather(&mut self, queue: usize, len: usize, cx: &mut Cx<'_>) -> Result<bool, Malformed> {
        let mergeable = cx.features & F_MRG_RXBUF != 0;
        let needed = (len - HEADER + header_len(cx.features)) as u64;
        let mut room: u64 = self.chains.iter().map(|c| total(&c.writable)).sum();
        let mut asked = false;
        loop {
            let count = self.chains.len();
            if room >= needed || (count > 0 && !mergeable) {
                return Ok(true);
            }
            let size = cx.queue(queue).map_or(0, |q| q.size());
            if count >= usize::from(size) {
                // All that the driver has is not enough for this one.
                return Ok(true);
            }
            let mut chain = self.spare.pop().unwrap_or_default();
            if !cx.pop(queue, &mut chain)? {
                self.spare.push(chain);
                if asked {
                    return Ok(false);
                }
                // Have the driver tell of more, and look once again.
                asked = true;
                let memory = cx.memory;
                if let Some(q) = cx.queue(queue) {
                    q.set_notify(memory, true)?;
                }
                continue;
            }
            let bytes = total(&chain.writable);
            if !chain.readable.is_empty() || bytes < header_len(cx.features) as u64 {
                return Err(Malformed::Request);
            }
            room += bytes;
            self.chains.push(chain);
            if asked {
                let memory = cx.memory;
                if let Some(q) = cx.queue(queue) {
                    q.set_notify(memory, false)?;
                }
                asked = false;
            }
        }
    }

    /// Writes the held packet into the gathered buffers and gives them back;
    /// false if it does not fit, and then they stay for the next.
    fn deliver(&mut self, queue: usize, len: usize, cx: &mut Cx<'_>) -> Result<bool, Malformed> {
        let header = header_len(cx.features);
        let needed = len - HEADER + header;
        // The fewest buffers that hold it.
        let (mut count, mut room) = (0, 0);
        for chain in &self.chains {
            if room >= needed as u64 {
                break;
            }
            room += total(&chain.writable);
            count += 1;
        }
        if room < needed as u64 {
            return Ok(false);
        }
        if cx.features & F_GUEST_CSUM == 0 {
            // Nothing was agreed on to be said here (§5.1.6.4.1).
            if let Some(h) = self.packet.get_mut(..OLD_HEADER) {
                h.fill(0);
            }
        }
        let buffers = (count as u16).to_le_bytes();
        if let Some(h) = self.packet.get_mut(NUM_BUFFERS) {
            h.copy_from_slice(&buffers);
        }
        // The short header is the first ten bytes: the frame moves up to it.
        if header < HEADER {
            self.packet.copy_within(HEADER..len, header);
        }
        let mut rest = self.packet.get(..needed).unwrap_or_default();
        for chain in self.chains.drain(..count) {
            let written = fill(&chain, cx.memory, &mut rest)?;
            let memory = cx.memory;
            if let Some(q) = cx.queue(queue) {
                q.put(memory, &chain, written)?;
            }
            self.spare.push(chain);
        }
        Ok(true)
    }

    /// Serves a control command.
    fn control(&mut self, queue: usize, cx: &mut Cx<'_>) -> Result<Turn, Malformed> {
        let card = Arc::clone(&self.card);
        let mut mac = None;
        let turn = cx.serve_one(queue, |chain, memory, features| {
            let ack = take_last(&mut chain.writable).ok_or(Malformed::Request)?;
            let len = total(&chain.readable).min(request::LONGEST as u64) as usize;
            let mut bytes = vec![0; len];
            if !take_front(&mut chain.readable, memory, &mut bytes) {
                return Err(Malformed::Request);
            }
            let pairs = (features & F_MQ != 0).then_some(card.pairs);
            let command = request::command(&bytes, pairs);
            let answer = match &command {
                Some(Command::Pairs(n)) => {
                    card.used.store(*n, Ordering::Release);
                    // Each part turns its port on or off by itself.
                    for waker in lock(&card.wakers).iter() {
                        waker.wake();
                    }
                    OK
                }
                Some(command) => {
                    lock(&card.filter).set(command);
                    if let Command::MacAddress(address) = command {
                        mac = Some(*address);
                    }
                    OK
                }
                None => ERR,
            };
            memory.write(ack, &answer).map_err(|_| Malformed::Buffer)?;
            Ok(1)
        })?;
        if let Some(mac) = mac {
            cx.set_config(CONFIG_MAC.start, &mac);
        }
        Ok(turn)
    }

    /// Turns the port on or off, as the driver has chosen.
    fn steer(&mut self, cx: &Cx<'_>) {
        let on = self.pair < self.card.used.load(Ordering::Acquire);
        if on == self.on {
            return;
        }
        self.on = on;
        if let Some(port) = &mut self.port
            && let Err(e) = port.enable(on)
        {
            self.lost(cx, &e);
        }
    }

    fn forget(&mut self) {
        self.held = None;
        self.spare.append(&mut self.chains);
        self.up = false;
        self.hungry = true;
        self.more = false;
    }
}

/// Writes the front of `rest` into a chain, as much as fits; the bytes written.
fn fill(chain: &Chain, memory: &GuestMemory, rest: &mut &[u8]) -> Result<u32, Malformed> {
    let mut written = 0;
    for b in &chain.writable {
        let n = rest.len().min(b.len as usize);
        let (now, later) = rest.split_at(n);
        memory
            .write_bytes(b.addr, now)
            .map_err(|_| Malformed::Buffer)?;
        *rest = later;
        written += n as u32;
        if rest.is_empty() {
            break;
        }
    }
    Ok(written)
}

impl Device for Part {
    fn turn(&mut self, queue: usize, cx: &mut Cx<'_>) -> Result<Turn, Malformed> {
        match self.role(queue, cx.features) {
            // New buffers are news only where there were too few; the kernel's
            // doorbell does not say for which queue it rings.
            Some(Role::Receive) if self.hungry || self.more => {
                self.more = self.receive(cx)?;
                Ok(if self.more { Turn::More } else { Turn::Idle })
            }
            Some(Role::Receive) => Ok(Turn::Idle),
            Some(Role::Transmit) => self.transmit(queue, cx),
            Some(Role::Control) => self.control(queue, cx),
            None => Ok(Turn::Idle),
        }
    }

    fn activate(&mut self, cx: &mut Cx<'_>) -> Result<(), Malformed> {
        self.up = true;
        self.hungry = false;
        if self.pair == 0 {
            // The one that an earlier driver has set stays the card's.
            if let Some(mac) = cx.config(|c| c.first_chunk().copied()) {
                lock(&self.card.filter).set_mac(mac);
            }
            if let Some(port) = &mut self.port
                && let Err(e) = port.guest_takes(guest_offloads(cx.features))
            {
                self.lost(cx, &e);
            }
        }
        // From now on only when there are no buffers left.
        let (queue, memory) = (self.rx(), cx.memory);
        if self.role(queue, cx.features) == Some(Role::Receive)
            && let Some(q) = cx.queue(queue)
        {
            q.set_notify(memory, false)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.forget();
        if self.pair == 0 {
            self.card.used.store(1, Ordering::Release);
            *lock(&self.card.filter) = Filter::new(self.card.mac.0);
        }
        if let Some(port) = &mut self.port {
            // A network that fails here fails again when it is used.
            if self.pair == 0 {
                let _ = port.guest_takes(Offloads::default());
            } else {
                self.on = false;
                let _ = port.enable(false);
            }
        }
    }

    fn config_written(&mut self, cx: &mut Cx<'_>) -> Result<(), Malformed> {
        let mac = cx.config(|c| c.first_chunk().copied());
        if let Some(mac) = mac {
            lock(&self.card.filter).set_mac(mac);
        }
        Ok(())
    }

    fn polls(&self) -> bool {
        self.port.is_some()
    }

    fn sources(&mut self, sources: &mut Sources) {
        let Some(port) = &self.port else { return };
        if self.hungry || !self.on || self.gone.load(Ordering::Relaxed) {
            return;
        }
        sources.add(0, &port.fd(), true, false);
        if port.pending() {
            sources.timeout(std::time::Duration::ZERO);
        } else if let Some(at) = port.deadline() {
            sources.timeout(at.saturating_duration_since(Instant::now()));
        }
    }

    fn woken(&mut self, _: &[Ready], cx: &mut Cx<'_>) -> Result<(), Malformed> {
        self.steer(cx);
        self.receive(cx).map(drop)
    }

    fn attached(&mut self, waker: Waker) {
        lock(&self.card.wakers).push(waker);
    }
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
