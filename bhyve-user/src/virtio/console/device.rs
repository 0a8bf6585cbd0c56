//! The device: ports, their queues, and the control queues.
//!
//! Data goes one way at a time as far as the other side takes it: a program
//! that does not read stops the guest's writes to that port, and a guest that
//! has no buffers stops the program's. Without a program what the guest writes
//! is lost, as on a serial line without a cable.

use std::collections::VecDeque;
use std::time::Duration;

use vmmapi::GuestMemory;

use super::backend::{Socket, Transfer};
use super::request::{Event, MESSAGE, Message};
use super::{MAX_PORTS, PortOptions};
use crate::virtio::queue::{Chain, Malformed, put_front, skip_front, take_front, total};
use crate::virtio::wait::{Ready, Sources};
use crate::virtio::{Cx, Device, Identity, Turn};

/// Several ports, and control queues (virtio 1.2 §5.3.3).
const F_MULTIPORT: u64 = 1 << 1;
/// Entries of a queue.
const QUEUE: u16 = 64;
/// Queues: receive and send of port 0, the two of control, then the other
/// ports' (§5.3.2).
const CONTROL_IN: usize = 2;
const CONTROL_OUT: usize = 3;
/// Bytes that are carried at once.
const PART: usize = 16 << 10;
/// Messages that may wait for the driver; it is told of all ports at once, and
/// each has three.
const MOST_MESSAGES: usize = MAX_PORTS * 8;

fn queues_of(port: usize) -> (usize, usize) {
    let first = if port == 0 { 0 } else { 2 + 2 * port };
    (first, first + 1)
}

/// The port of a queue, and whether it is the one that receives.
fn port_of(queue: usize) -> (usize, bool) {
    let port = if queue < 2 { 0 } else { queue / 2 - 1 };
    (port, queue.is_multiple_of(2))
}

struct Port {
    name: String,
    socket: Socket,
    /// The driver has made it.
    ready: bool,
    /// Somebody in the guest has it open.
    open: bool,
    /// No buffer to receive into: the driver will notify of one.
    hungry: bool,
    /// A buffer for what the program says next.
    receiving: Option<Chain>,
    /// What the guest sends and the program does not take yet.
    sending: Option<Chain>,
    /// The guest has sent more.
    more: bool,
}

/// A console.
pub struct Console {
    ports: Vec<Port>,
    messages: VecDeque<(Message, Option<String>)>,
    part: Vec<u8>,
}

impl Console {
    /// Opens the sockets.
    ///
    /// # Errors
    /// Which one cannot be, and why.
    pub fn open(options: &[PortOptions]) -> Result<(Identity, Console), String> {
        let open = |o: &PortOptions| {
            let socket = Socket::bind(&o.path).map_err(|e| format!("{}: {e}", o.path.display()))?;
            Ok(Port {
                name: o.name.clone(),
                socket,
                ready: false,
                open: false,
                hungry: true,
                receiving: None,
                sending: None,
                more: false,
            })
        };
        let ports: Vec<Port> = options.iter().map(open).collect::<Result<_, String>>()?;
        // No size in characters; the number of ports.
        let mut config = vec![0; 4];
        config.extend((ports.len() as u32).to_le_bytes());
        // Early output goes nowhere.
        config.extend([0; 4]);
        let identity = Identity {
            kind: 3,
            // Simple communication controller, other.
            class: (7, 0x80),
            features: F_MULTIPORT,
            queues: vec![QUEUE; queues_of(ports.len()).0.max(4)],
            config,
            writable: 8..12,
        };
        let console = Console {
            ports,
            messages: VecDeque::new(),
            part: vec![0; PART],
        };
        Ok((identity, console))
    }

    fn tell(&mut self, port: usize, event: Event, value: u16) {
        let name = (event == Event::PortName)
            .then(|| self.ports.get(port).map(|p| p.name.clone()))
            .flatten();
        let message = Message {
            port: port as u32,
            event,
            value,
        };
        // A driver that asks and does not listen has its own reasons.
        if self.messages.len() < MOST_MESSAGES {
            self.messages.push_back((message, name));
        }
    }

    /// Sends the driver the messages that it has room for.
    fn flush(&mut self, cx: &mut Cx<'_>) -> Result<(), Malformed> {
        let mut chain = Chain::default();
        while !self.messages.is_empty() && cx.pop(CONTROL_IN, &mut chain)? {
            let Some((message, name)) = self.messages.pop_front() else {
                break;
            };
            let mut bytes = message.bytes().to_vec();
            if let Some(name) = name {
                bytes.extend(name.bytes());
            }
            // What does not fit is cut: a name.
            bytes.truncate(usize::try_from(total(&chain.writable)).unwrap_or(usize::MAX));
            if !put_front(&mut chain.writable, cx.memory, &bytes) {
                return Err(Malformed::Buffer);
            }
            cx.push(CONTROL_IN, &chain, bytes.len() as u32)?;
        }
        Ok(())
    }

    /// What the driver says.
    fn hear(&mut self, message: Message) {
        let number = message.port as usize;
        match (message.event, message.value) {
            (Event::DeviceReady, 1) => {
                for port in 0..self.ports.len() {
                    self.tell(port, Event::DeviceAdd, 1);
                }
            }
            (Event::PortReady, value) => {
                let Some(port) = self.ports.get_mut(number) else {
                    return;
                };
                port.ready = value == 1;
                let connected = port.socket.peer.is_some();
                if port.ready {
                    self.tell(number, Event::PortName, 1);
                    if connected {
                        self.tell(number, Event::PortOpen, 1);
                    }
                }
            }
            (Event::PortOpen, value) => {
                if let Some(port) = self.ports.get_mut(number) {
                    port.open = value == 1;
                }
            }
            _ => {}
        }
    }

    /// Tells the driver whether a program has the other end.
    fn connected(&mut self, number: usize, yes: bool) {
        if self.ports.get(number).is_some_and(|p| p.ready) {
            self.tell(number, Event::PortOpen, yes.into());
        }
    }

    /// Carries a part of what the program says into the guest.
    fn receive(&mut self, number: usize, cx: &mut Cx<'_>) -> Result<(), Malformed> {
        let (queue, _) = queues_of(number);
        let Some(port) = self.ports.get_mut(number) else {
            return Ok(());
        };
        let mut chain = port.receiving.take().unwrap_or_default();
        if chain.writable.is_empty() && !cx.pop(queue, &mut chain)? {
            port.hungry = true;
            return Ok(());
        }
        let room = total(&chain.writable).min(PART as u64) as usize;
        let Some(part) = self.part.get_mut(..room).filter(|p| !p.is_empty()) else {
            // A buffer that nothing fits into.
            return cx.push(queue, &chain, 0);
        };
        match port.socket.read(part) {
            Transfer::Some(n) => {
                let bytes = part.get(..n).unwrap_or_default();
                if !put_front(&mut chain.writable, cx.memory, bytes) {
                    return Err(Malformed::Buffer);
                }
                cx.push(queue, &chain, n as u32)
            }
            nothing => {
                port.receiving = Some(chain);
                if nothing == Transfer::Gone {
                    self.connected(number, false);
                }
                Ok(())
            }
        }
    }

    /// Carries a part of what the guest sends. True if there may be more.
    fn send(&mut self, number: usize, cx: &mut Cx<'_>) -> Result<bool, Malformed> {
        let (_, queue) = queues_of(number);
        let Some(port) = self.ports.get_mut(number) else {
            return Ok(false);
        };
        let mut chain = port.sending.take().unwrap_or_default();
        if chain.readable.is_empty() && !cx.pop(queue, &mut chain)? {
            return Ok(false);
        }
        let n = total(&chain.readable).min(PART as u64) as usize;
        let Some(part) = self.part.get_mut(..n).filter(|p| !p.is_empty()) else {
            cx.push(queue, &chain, 0)?;
            return Ok(true);
        };
        let mut ahead = chain.readable.clone();
        if !take_front(&mut ahead, cx.memory, part) {
            return Err(Malformed::Buffer);
        }
        let there = port.socket.peer.is_some();
        match port.socket.write(part) {
            Transfer::Some(n) => skip_front(&mut chain.readable, n as u64),
            Transfer::Wait => {
                port.sending = Some(chain);
                return Ok(false);
            }
            Transfer::Gone => {
                // Nobody hears it.
                chain.readable.clear();
                if there {
                    self.connected(number, false);
                }
            }
        }
        if chain.readable.is_empty() {
            cx.push(queue, &chain, 0)?;
        } else if let Some(port) = self.ports.get_mut(number) {
            port.sending = Some(chain);
        }
        Ok(true)
    }

    /// A queue's worth of sending.
    fn send_on(&mut self, number: usize, cx: &mut Cx<'_>) -> Result<(), Malformed> {
        for _ in 0..QUEUE {
            if !self.send(number, cx)? {
                return Ok(());
            }
        }
        if let Some(port) = self.ports.get_mut(number) {
            port.more = true;
        }
        Ok(())
    }
}

fn turn(more: bool) -> Turn {
    if more { Turn::More } else { Turn::Idle }
}

impl Device for Console {
    fn turn(&mut self, queue: usize, cx: &mut Cx<'_>) -> Result<Turn, Malformed> {
        match queue {
            CONTROL_IN => {
                self.flush(cx)?;
                Ok(Turn::Idle)
            }
            CONTROL_OUT => {
                let mut heard = None;
                let turn = cx.serve_one(queue, |chain, memory: &GuestMemory, _| {
                    let mut bytes = [0; MESSAGE];
                    if !take_front(&mut chain.readable, memory, &mut bytes) {
                        return Err(Malformed::Request);
                    }
                    heard = Some(Message::parse(bytes));
                    Ok(0)
                })?;
                if let Some(message) = heard {
                    self.hear(message);
                    self.flush(cx)?;
                }
                Ok(turn)
            }
            _ => {
                let (number, receives) = port_of(queue);
                if receives {
                    if let Some(port) = self.ports.get_mut(number) {
                        port.hungry = false;
                    }
                    return Ok(Turn::Idle);
                }
                let waits = |p: &Port| p.sending.is_some() && p.socket.peer.is_some();
                if self.ports.get(number).is_some_and(waits) {
                    // The program's turn.
                    return Ok(Turn::Idle);
                }
                self.send(number, cx).map(turn)
            }
        }
    }

    fn activate(&mut self, cx: &mut Cx<'_>) -> Result<(), Malformed> {
        if cx.features & F_MULTIPORT == 0
            && let Some(first) = self.ports.first_mut()
        {
            // A driver that knows one port only has it from the start.
            first.ready = true;
            first.open = true;
        }
        for port in &mut self.ports {
            port.hungry = false;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.messages.clear();
        for port in &mut self.ports {
            port.ready = false;
            port.open = false;
            port.hungry = true;
            port.receiving = None;
            port.sending = None;
            port.more = false;
        }
    }

    fn polls(&self) -> bool {
        true
    }

    fn sources(&mut self, sources: &mut Sources) {
        for (i, port) in self.ports.iter().enumerate() {
            sources.add(2 * i, &port.socket.listener, true, false);
            let (read, write) = (port.reads(), port.sending.is_some());
            if let Some(peer) = &port.socket.peer
                && (read || write)
            {
                sources.add(2 * i + 1, peer, read, write);
            }
            if port.more {
                sources.timeout(Duration::ZERO);
            }
        }
    }

    fn woken(&mut self, ready: &[Ready], cx: &mut Cx<'_>) -> Result<(), Malformed> {
        for r in ready {
            let number = r.token / 2;
            let Some(port) = self.ports.get_mut(number) else {
                continue;
            };
            if r.token.is_multiple_of(2) {
                if port.socket.accept() {
                    self.connected(number, true);
                }
                continue;
            }
            let reads = port.reads();
            if r.write && port.sending.is_some() {
                self.send_on(number, cx)?;
            }
            if r.read && reads {
                self.receive(number, cx)?;
            }
        }
        for number in 0..self.ports.len() {
            let more = |p: &mut Port| std::mem::take(&mut p.more);
            if self.ports.get_mut(number).is_some_and(more) {
                self.send_on(number, cx)?;
            }
        }
        self.flush(cx)
    }
}

impl Port {
    /// Whether the program is listened to.
    fn reads(&self) -> bool {
        self.ready && self.open && !self.hungry
    }
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
