//! A UART on the port bus, and the two threads that carry its bytes.
//!
//! Output goes into a ring that a thread empties some milliseconds later: a
//! burst costs the vCPU no system call a byte, and a line that blocks fills
//! the ring, which the guest sees as a transmitter that is not empty. Input
//! is read only as far as the FIFO has room, so the host's end blocks in turn.
//!
//! While output flows and the guest polls (its transmitter's interrupt is
//! off), the kernel takes the bytes, where it can: no exit to us is needed then.
//! The first byte of a burst opens that window; the writer's thread, which
//! empties it, closes it when nothing comes any more.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::backend::Backend;
use super::uart::Uart;
use crate::bus::PortDevice;
use crate::lock;
use crate::machine::{Machine, OUT_RING_LEN, OutRing};
use crate::sandbox;

/// Bytes of output that may wait before the transmitter reports itself full.
const TX_RING: usize = 8192;
/// Output that is written without waiting for more.
const TX_BATCH: usize = 2048;
/// Line status register, offset from the UART's first port. Guests poll it
/// before every byte.
const LSR: u16 = 5;
/// How long output waits for more to come with it.
const TX_DELAY: Duration = Duration::from_millis(8);
/// The same while output flows: nobody waits for an echo then, and each batch
/// costs the host a wake-up and a write.
const TX_DELAY_FLOWING: Duration = Duration::from_millis(50);

struct State {
    uart: Uart,
    /// Level of the interrupt line as the machine knows it.
    line: bool,
    /// Line status register as the machine answers it.
    lsr: Option<u8>,
    tx: VecDeque<u8>,
    /// The writer has taken bytes that are not yet out.
    writing: bool,
    /// Nobody takes output any more.
    dead: bool,
    /// Do not wait for more output.
    hurry: bool,
    /// Where the kernel puts output, if it does, and whether it may.
    ring: Option<Box<dyn OutRing>>,
    window: bool,
}

impl State {
    /// Takes over what the kernel took, which comes before all that follows.
    fn collect(&mut self) {
        let Some(ring) = &self.ring else {
            return;
        };
        if self.dead {
            ring.take(&mut VecDeque::new());
        } else {
            ring.take(&mut self.tx);
        }
    }

    /// Whether the kernel may take output: nothing follows from a byte but the
    /// byte, and there is room for all that it takes.
    fn window_allowed(&self) -> bool {
        self.uart.transmits_silently() && self.tx.len() + OUT_RING_LEN < TX_RING
    }

    fn set_window(&mut self, open: bool) {
        if let Some(ring) = &self.ring
            && open != self.window
        {
            self.window = open;
            ring.set_open(open);
        }
    }
}

struct Shared {
    state: Mutex<State>,
    rx_room: Condvar,
    tx_some: Condvar,
    tx_done: Condvar,
    machine: Arc<dyn Machine>,
    irq: u8,
    /// Port of the line status register.
    lsr_port: u16,
}

/// A serial port at eight I/O ports from `base` on.
#[derive(Clone)]
pub struct SerialPort {
    shared: Arc<Shared>,
    base: u16,
}

impl SerialPort {
    /// Connects a UART at `base` to a backend and starts its threads.
    pub fn new(machine: Arc<dyn Machine>, base: u16, irq: u8, backend: Backend) -> SerialPort {
        let ring = backend.output.as_ref().and_then(|_| machine.out_ring(base));
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                uart: Uart::default(),
                line: false,
                lsr: None,
                tx: VecDeque::with_capacity(TX_RING),
                writing: false,
                dead: backend.output.is_none(),
                hurry: false,
                ring,
                window: false,
            }),
            rx_room: Condvar::new(),
            tx_some: Condvar::new(),
            tx_done: Condvar::new(),
            machine,
            irq,
            lsr_port: base.wrapping_add(LSR),
        });
        if let Some(output) = backend.output {
            let s = Arc::clone(&shared);
            std::thread::spawn(move || {
                sandbox::join();
                s.write_loop(output);
            });
        }
        if let Some(input) = backend.input {
            let s = Arc::clone(&shared);
            std::thread::spawn(move || {
                sandbox::join();
                s.read_loop(input);
            });
        }
        SerialPort { shared, base }
    }

    /// Waits until everything written so far is out, at most `limit`; says
    /// whether it is.
    pub fn drain(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let mut state = lock(&self.shared.state);
        state.hurry = true;
        state.collect();
        self.shared.tx_some.notify_all();
        while !state.dead && (state.writing || !state.tx.is_empty()) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self
                .shared
                .tx_done
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }

    fn register(&self, port: u16) -> u8 {
        (port.wrapping_sub(self.base) & 7) as u8
    }

    fn read(&self, register: u8) -> u8 {
        let s = &*self.shared;
        let mut state = lock(&s.state);
        state.collect();
        let room = state.tx.len() < TX_RING;
        let full = state.uart.rx_room() == 0;
        let value = state.uart.read(register, room);
        s.after_access(&mut state, full);
        value
    }

    fn write(&self, register: u8, value: u8) {
        let s = &*self.shared;
        let mut state = lock(&s.state);
        let before = state.tx.len();
        state.collect();
        let full = state.uart.rx_room() == 0;
        let room = state.tx.len() + 1 < TX_RING;
        if let Some(byte) = state.uart.write(register, value, room)
            && !state.dead
            && state.tx.len() < TX_RING
        {
            state.tx.push_back(byte);
            if before == 0 || before < TX_BATCH && state.tx.len() >= TX_BATCH {
                s.tx_some.notify_one();
            }
            if state.window_allowed() {
                state.set_window(true);
            }
        }
        s.after_access(&mut state, full);
    }
}

impl Shared {
    /// Copies the interrupt line; lets the reader go on if there is room now.
    fn after_access(&self, state: &mut State, was_full: bool) {
        self.update_line(state);
        if was_full && state.uart.rx_room() > 0 {
            self.rx_room.notify_one();
        }
    }

    /// Tells the machine what follows from the UART's state: the line status
    /// first, which a handler of the interrupt may read.
    fn update_line(&self, state: &mut State) {
        if state.window && !state.window_allowed() {
            state.set_window(false);
        }
        let lsr = state.uart.constant_lsr(state.tx.len() < TX_RING);
        if lsr != state.lsr {
            state.lsr = lsr;
            self.machine.constant_port(self.lsr_port, lsr);
        }
        let level = state.uart.interrupt();
        if level != state.line {
            state.line = level;
            if level {
                self.machine.isa_assert(self.irq, Some(self.irq));
            } else {
                self.machine.isa_deassert(self.irq, Some(self.irq));
            }
        }
    }

    fn read_loop(&self, mut input: Box<dyn Read + Send>) {
        let mut buf = [0; 16];
        loop {
            let mut state = lock(&self.state);
            while state.uart.rx_room() == 0 {
                state = self
                    .rx_room
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            let room = state.uart.rx_room();
            drop(state);
            let Some(free) = buf.get_mut(..room.min(16)) else {
                return;
            };
            let n = match input.read(free) {
                Ok(0) => return,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    crate::pause::sleep(Duration::from_millis(20));
                    continue;
                }
                Err(_) => return,
            };
            let mut rest = free.get(..n).unwrap_or_default();
            let mut state = lock(&self.state);
            while !rest.is_empty() {
                let taken = state.uart.receive(rest);
                rest = rest.get(taken..).unwrap_or_default();
                self.update_line(&mut state);
                if taken == 0 {
                    // The guest changed mode meanwhile.
                    state = self
                        .rx_room
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    fn write_loop(&self, mut output: Box<dyn Write + Send>) {
        let mut batch = VecDeque::with_capacity(TX_RING);
        let mut written: Option<Instant> = None;
        loop {
            let mut state = lock(&self.state);
            let mut closed = true;
            loop {
                state.collect();
                if !state.tx.is_empty() {
                    break;
                }
                if closed && !state.window {
                    state = self
                        .tx_some
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
                // The kernel wakes nobody. If nothing comes for a while, it is
                // told to take no more, and what it took meanwhile is fetched
                // a while later.
                let waited;
                (state, waited) = self
                    .tx_some
                    .wait_timeout(state, TX_DELAY_FLOWING)
                    .unwrap_or_else(PoisonError::into_inner);
                if waited.timed_out() {
                    state.collect();
                    closed = !state.window;
                    if state.tx.is_empty() {
                        state.set_window(false);
                    }
                }
            }
            let now = Instant::now();
            let flowing = written.is_some_and(|w| now - w < TX_DELAY_FLOWING);
            let until = now + if flowing { TX_DELAY_FLOWING } else { TX_DELAY };
            while !state.hurry && state.tx.len() < TX_BATCH {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                state = self
                    .tx_some
                    .wait_timeout(state, left)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
            }
            state.collect();
            let was_full = state.tx.len() + 1 >= TX_RING;
            std::mem::swap(&mut state.tx, &mut batch);
            state.writing = true;
            if was_full {
                state.uart.tx_drained();
            }
            self.update_line(&mut state);
            drop(state);

            let (a, b) = batch.as_slices();
            let result = write_all(&mut output, a).and_then(|()| write_all(&mut output, b));
            batch.clear();
            written = Some(Instant::now());

            let mut state = lock(&self.state);
            state.writing = false;
            state.dead = result.is_err();
            if state.dead {
                state.tx.clear();
            }
            self.tx_done.notify_all();
            if state.dead {
                return;
            }
        }
    }
}

/// As `Write::write_all`, but waits where the descriptor does not block.
fn write_all(output: &mut dyn Write, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match output.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                crate::pause::sleep(Duration::from_millis(5))
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

impl PortDevice for SerialPort {
    fn port_read(&self, port: u16, size: u8) -> Option<u32> {
        let register = self.register(port);
        let low = self.read(register);
        match size {
            1 => Some(u32::from(low)),
            2 => Some(u32::from(low) | u32::from(self.read((register + 1) & 7)) << 8),
            _ => None,
        }
    }

    fn port_write(&self, port: u16, size: u8, value: u32) -> bool {
        let register = self.register(port);
        let [low, high, ..] = value.to_le_bytes();
        self.write(register, low);
        if size == 2 {
            self.write((register + 1) & 7, high);
        }
        size <= 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::fake::{Event, Fake};
    use std::sync::mpsc;

    const BASE: u16 = 0x3f8;

    struct Sink(mpsc::Sender<Vec<u8>>, Arc<Mutex<()>>);
    impl Write for Sink {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            let _gate = lock(&self.1);
            self.0
                .send(buf.to_vec())
                .map_err(|_| io::ErrorKind::BrokenPipe)?;
            Ok(buf.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn backend(
        input: Option<io::PipeReader>,
    ) -> (Backend, mpsc::Receiver<Vec<u8>>, Arc<Mutex<()>>) {
        let (tx, rx) = mpsc::channel();
        let gate = Arc::new(Mutex::new(()));
        let output = Box::new(Sink(tx, Arc::clone(&gate)));
        (
            Backend {
                input: input.map(|i| Box::new(i) as _),
                output: Some(output),
            },
            rx,
            gate,
        )
    }

    #[test]
    fn output_arrives_in_order_and_in_batches() {
        let (backend, rx, _) = backend(None);
        let port = SerialPort::new(Fake::new(), BASE, 4, backend);
        let text = b"FreeBSD/amd64 (guest) (ttyu0)\r\n\r\nlogin: ";
        for &b in text {
            assert!(port.port_write(BASE, 1, u32::from(b)));
        }
        assert!(port.drain(Duration::from_secs(5)));
        let got: Vec<Vec<u8>> = rx.try_iter().collect();
        assert!(got.len() < text.len() / 2, "{} writes", got.len());
        assert_eq!(got.concat(), text);
    }

    #[test]
    fn a_line_that_blocks_fills_the_transmitter_and_loses_nothing() {
        let (backend, rx, gate) = backend(None);
        let fake = Fake::new();
        let port = SerialPort::new(fake.clone(), BASE, 4, backend);
        let blocked = lock(&gate);
        let mut sent = 0_usize;
        while port.port_read(BASE + 5, 1).unwrap() & 0x20 != 0 {
            port.port_write(BASE, 1, 0x41);
            sent += 1;
            assert!(sent < 10 * TX_RING, "the transmitter never fills");
        }
        assert!(sent >= TX_RING);
        port.port_write(BASE + 1, 1, 2);
        assert_eq!(fake.take(), [], "no interrupt while it is full");
        assert!(!port.drain(Duration::from_millis(20)));
        drop(blocked);
        assert!(port.drain(Duration::from_secs(5)));
        assert_eq!(rx.try_iter().flatten().count(), sent);
        assert_eq!(fake.take(), [Event::IsaAssert(4, Some(4))], "room again");
    }

    #[test]
    fn input_waits_for_the_guest_and_raises_irq_4() {
        let (r, mut w) = io::pipe().unwrap();
        let (backend, _rx, _) = backend(Some(r));
        let fake = Fake::new();
        let port = SerialPort::new(fake.clone(), BASE, 4, backend);
        port.port_write(BASE + 2, 1, 1);
        port.port_write(BASE + 1, 1, 1);
        let text: Vec<u8> = (0..100).collect();
        w.write_all(&text).unwrap();
        let mut got = Vec::new();
        let until = Instant::now() + Duration::from_secs(5);
        while got.len() < text.len() && Instant::now() < until {
            if port.port_read(BASE + 5, 1).unwrap() & 1 != 0 {
                got.push(port.port_read(BASE, 1).unwrap() as u8);
            }
        }
        assert_eq!(got, text);
        let events = fake.take();
        assert_eq!(events.first(), Some(&Event::IsaAssert(4, Some(4))));
        assert_eq!(events.last(), Some(&Event::IsaDeassert(4, Some(4))));
    }

    #[test]
    fn a_16_bit_access_reaches_two_registers_and_a_32_bit_one_none() {
        let port = SerialPort::new(Fake::new(), BASE, 4, Backend::default());
        assert!(port.port_write(BASE + 3, 2, 0x0203));
        assert_eq!(port.port_read(BASE + 3, 2), Some(0x0203));
        assert_eq!(port.port_read(BASE, 4), None);
    }

    /// What the kernel would be: bytes that are written while it is open.
    #[derive(Default)]
    struct Ring(Arc<Mutex<(bool, VecDeque<u8>)>>);
    impl OutRing for Ring {
        fn set_open(&self, open: bool) {
            lock(&self.0).0 = open;
        }
        fn take(&self, to: &mut VecDeque<u8>) {
            to.append(&mut lock(&self.0).1);
        }
    }
    struct WithRing(Arc<Mutex<(bool, VecDeque<u8>)>>);
    impl Machine for WithRing {
        fn isa_assert(&self, _: u8, _: Option<u8>) {}
        fn isa_deassert(&self, _: u8, _: Option<u8>) {}
        fn isa_level_triggered(&self, _: u8) {}
        fn ioapic_assert(&self, _: u8) {}
        fn ioapic_deassert(&self, _: u8) {}
        fn out_ring(&self, port: u16) -> Option<Box<dyn OutRing>> {
            (port == BASE).then(|| Box::new(Ring(Arc::clone(&self.0))) as _)
        }
        fn msi(&self, _: u64, _: u64) {}
        fn suspend(&self, _: crate::machine::Suspend) {}
    }

    #[test]
    fn the_kernel_takes_output_while_the_guest_polls_and_order_is_kept() {
        let (backend, rx, _) = backend(None);
        let ring = Arc::default();
        let port = SerialPort::new(Arc::new(WithRing(Arc::clone(&ring))), BASE, 4, backend);
        let open = || lock(&ring).0;
        // As vmm.ko: into the ring while it is open, else to the device.
        let send = |byte: u8| {
            let mut r = lock(&ring);
            if r.0 && r.1.len() < OUT_RING_LEN {
                r.1.push_back(byte);
                return true;
            }
            drop(r);
            assert!(port.port_write(BASE, 1, byte.into()));
            false
        };
        assert!(!open(), "nothing was sent yet");
        let text: Vec<u8> = (0..=255).cycle().take(3 * OUT_RING_LEN).collect();
        let taken = text.iter().filter(|&&b| send(b)).count();
        assert!(taken > text.len() / 2, "{taken} bytes by the kernel");
        // The transmitter's interrupt: each byte is our business again.
        send(b'a');
        port.port_write(BASE + 1, 1, IER_TX_ON);
        assert!(!open());
        send(b'b');
        assert!(!open());
        port.port_write(BASE + 1, 1, 0);
        // The divisor is no output.
        send(b'c');
        port.port_write(BASE + 3, 1, 0x80);
        assert!(!open());
        port.port_write(BASE, 1, 1);
        port.port_write(BASE + 3, 1, 3);
        assert!(port.drain(Duration::from_secs(5)));
        let got: Vec<u8> = rx.try_iter().flatten().collect();
        assert_eq!(got, [&text[..], b"abc"].concat());
        // When output ends the ring closes, with nothing left in it.
        send(b'd');
        let until = Instant::now() + Duration::from_secs(5);
        while open() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(!open());
        assert!(port.drain(Duration::from_secs(5)));
        assert_eq!(rx.try_iter().flatten().collect::<Vec<u8>>(), b"d");
    }

    const IER_TX_ON: u32 = 2;
}
