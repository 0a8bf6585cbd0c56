//! Devices with several groups, host sources and a configuration that changes.

use super::*;
use crate::virtio::wait::{Ready, Sources};
use crate::virtio::{Cx, Device, Group, Turn, Waker};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};

/// Queue 0 receives from a socket, queue 1 sends to it.
struct Pipe {
    socket: UnixStream,
    hungry: bool,
    events: Sender<&'static str>,
    waker: Arc<Mutex<Option<Waker>>>,
}

impl Device for Pipe {
    fn serve(
        &mut self,
        queue: usize,
        chain: &mut Chain,
        memory: &GuestMemory,
        _: u64,
    ) -> Result<u32, Malformed> {
        assert_eq!(queue, 1);
        let mut byte = [0];
        if !take_front(&mut chain.readable, memory, &mut byte) {
            return Err(Malformed::Request);
        }
        self.socket.write_all(&byte).unwrap();
        Ok(0)
    }
    fn turn(&mut self, queue: usize, cx: &mut Cx<'_>) -> Result<Turn, Malformed> {
        if queue == 0 {
            self.hungry = false;
            return Ok(Turn::Idle);
        }
        cx.serve_one(queue, |c, m, f| self.serve(queue, c, m, f))
    }
    fn activate(&mut self, _: &mut Cx<'_>) -> Result<(), Malformed> {
        self.events.send("activate").unwrap();
        Ok(())
    }
    fn reset(&mut self) {
        self.events.send("reset").unwrap();
    }
    fn config_written(&mut self, cx: &mut Cx<'_>) -> Result<(), Malformed> {
        let first = cx.config(|c| c[4]);
        cx.set_config(0, &[first; 2]);
        Ok(())
    }
    fn polls(&self) -> bool {
        true
    }
    fn sources(&mut self, sources: &mut Sources) {
        if !self.hungry {
            sources.add(7, &self.socket, true, false);
        }
    }
    fn woken(&mut self, ready: &[Ready], cx: &mut Cx<'_>) -> Result<(), Malformed> {
        if ready.is_empty() {
            let _ = self.events.send("woken");
            return Ok(());
        }
        assert_eq!((ready.len(), ready[0].token, ready[0].read), (1, 7, true));
        let mut chain = Chain::default();
        if !cx.pop(0, &mut chain)? {
            self.hungry = true;
            return Ok(());
        }
        let mut byte = [0];
        self.socket.read_exact(&mut byte).unwrap();
        for b in &chain.writable {
            cx.memory.fill(b.addr, b.len.into(), byte[0]).unwrap();
        }
        cx.push(0, &chain, 4)
    }
    fn attached(&mut self, waker: Waker) {
        *self.waker.lock().unwrap() = Some(waker);
    }
}

struct Ends {
    r: Rig,
    far: UnixStream,
    events: Receiver<&'static str>,
    waker: Arc<Mutex<Option<Waker>>>,
}

impl Ends {
    fn event(&self, wanted: &str) {
        loop {
            let e = self.events.recv_timeout(Duration::from_secs(20));
            if e.expect(wanted) == wanted {
                return;
            }
        }
    }
}

fn pipe() -> Ends {
    let (near, far) = UnixStream::pair().unwrap();
    let (sender, events) = channel();
    let waker = Arc::default();
    let device = Pipe {
        socket: near,
        hungry: false,
        events: sender,
        waker: Arc::clone(&waker),
    };
    let r = rig_of(|identity| Built::single(identity, device));
    Ends {
        r,
        far,
        events,
        waker,
    }
}

/// Queue `q` of a legacy driver, at page `pfn`.
fn legacy_queue(r: &Rig, q: u32, pfn: u32) -> Layout {
    r.outp(0xe, 2, q);
    r.outp(8, 4, pfn);
    Layout::legacy(pfn, 8)
}

#[test]
fn data_waits_in_the_host_until_the_guest_has_a_buffer() {
    let mut e = pipe();
    let r = &e.r;
    r.outp(0x12, 1, 3);
    let rx = legacy_queue(r, 0, 4);
    r.outp(0x12, 1, 7);
    e.event("activate");
    e.far.write_all(b"a").unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(r.memory.read::<u16>(rx.used + 2).unwrap(), 0);
    for (n, byte) in [(1, b'a'), (2, b'b')] {
        r.request(rx, n, 0);
        r.outp(0x10, 2, 0);
        if n == 2 {
            e.far.write_all(b"b").unwrap();
        }
        r.served(rx, n, byte);
        r.event(Event::IsaAssert(3, Some(16)));
        assert_eq!(r.inp(0x13, 1), 1);
    }
    // The other direction, and both stop with the device.
    let tx = legacy_queue(r, 1, 16);
    r.request(tx, 1, b'z');
    r.outp(0x10, 2, 1);
    let mut byte = [0];
    e.far.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"z");
    r.outp(0x12, 1, 0);
    e.event("reset");
    e.far.write_all(b"c").unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(r.memory.read::<u16>(rx.used + 2).unwrap(), 2);
}

#[test]
fn a_device_is_woken_from_elsewhere() {
    let e = pipe();
    let waker = e.waker.lock().unwrap().clone().unwrap();
    while e.events.recv_timeout(Duration::from_millis(50)).is_ok() {}
    for _ in 0..3 {
        waker.wake();
        e.event("woken");
    }
    drop(e);
    waker.wake();
}

#[test]
fn configuration_is_written_where_it_may_be_and_its_changes_are_told() {
    let e = pipe();
    let r = &e.r;
    modern_start(r, MODERN);
    r.mwrite(0x14, 1, 0xf);
    e.event("activate");
    let before = r.mread(0x15, 1);
    r.mwrite(CONFIG + 3, 2, 0xffff);
    r.mwrite(CONFIG + 7, 2, 0xffff);
    r.mwrite(CONFIG + 4, 4, 0x2a);
    r.event(Event::IsaAssert(3, Some(16)));
    assert_eq!(r.mread(ISR, 1), 2, "a configuration change");
    assert_eq!(r.mread(CONFIG, 8), 0x2a_0403_2a2a);
    assert_eq!(r.mread(0x15, 1), before + 1, "the generation");
    // The same again is no change.
    r.mwrite(CONFIG + 4, 4, 0x2a);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(r.mread(0x15, 1), before + 1);
    assert_eq!(r.mread(ISR, 1), 0);
}

/// Holds its group's lock until it is told to go on.
struct Stuck(Receiver<()>);
impl Device for Stuck {
    fn serve(
        &mut self,
        _: usize,
        _: &mut Chain,
        _: &GuestMemory,
        _: u64,
    ) -> Result<u32, Malformed> {
        self.0.recv_timeout(Duration::from_secs(20)).unwrap();
        Ok(0)
    }
}

#[test]
fn groups_do_not_wait_for_each_other() {
    let (go_on, told) = channel();
    let r = rig_of(|identity| Built {
        identity,
        groups: vec![
            Group {
                queues: vec![0],
                device: Box::new(Stuck(told)),
            },
            Group {
                queues: vec![1],
                device: Box::new(Echo),
            },
        ],
    });
    r.outp(0x12, 1, 3);
    let stuck = legacy_queue(&r, 0, 4);
    let echo = legacy_queue(&r, 1, 16);
    r.request(stuck, 1, 0);
    r.outp(0x10, 2, 0);
    for n in 1..=3 {
        r.request(echo, n, n as u8);
        r.outp(0x10, 2, 1);
        r.served(echo, n, n as u8);
    }
    assert_eq!(r.memory.read::<u16>(stuck.used + 2).unwrap(), 0);
    go_on.send(()).unwrap();
    r.wait("the slow one", |r| {
        r.memory.read::<u16>(stuck.used + 2).unwrap() == 1
    });
    // What one of them makes of its queue stops all of them.
    r.memory.write(stuck.avail + 2, &100_u16).unwrap();
    r.outp(0x10, 2, 0);
    r.wait("NEEDS_RESET", |r| r.inp(0x12, 1) & 0x40 != 0);
    r.request(echo, 4, 9);
    r.outp(0x10, 2, 1);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(r.memory.read::<u16>(echo.used + 2).unwrap(), 3);
}

#[test]
fn what_came_after_virtio_1_has_no_legacy_registers() {
    let r = rig_of(|identity| {
        let identity = Identity {
            kind: 19,
            ..identity
        };
        Built::single(identity, Echo)
    });
    assert_eq!(r.f.config_read(0, 4), 0x1053_1af4);
    assert_eq!(r.f.config_read(8, 1), 1, "revision");
    assert_eq!(r.inp(0, 4), 0);
    modern_start(&r, MODERN);
    r.mwrite(0x14, 1, 0xf);
    r.request(MODERN, 1, 0x55);
    r.outp(0x10, 2, 1);
    r.served(MODERN, 1, 0x55);
}
