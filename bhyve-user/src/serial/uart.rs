//! The registers of a 16550A (National PC16550D data sheet), without I/O: the
//! caller moves bytes in and out and copies the interrupt line.

/// Depth of the receive FIFO, bytes.
const FIFO: usize = 16;

/// Interrupt enable: received data, transmitter empty, line and modem status.
const IER_RX: u8 = 0x01;
const IER_TX: u8 = 0x02;
const IER_LINE: u8 = 0x04;
const IER_MODEM: u8 = 0x08;

const IIR_NONE: u8 = 0x01;
const IIR_MODEM: u8 = 0x00;
const IIR_TX: u8 = 0x02;
const IIR_RX: u8 = 0x04;
const IIR_LINE: u8 = 0x06;
const IIR_RX_TIMEOUT: u8 = 0x0c;
const IIR_FIFO: u8 = 0xc0;

const FCR_ENABLE: u8 = 0x01;
const FCR_CLEAR_RX: u8 = 0x02;
const FCR_KEPT: u8 = 0xc9;

const LCR_DLAB: u8 = 0x80;

const MCR_DTR: u8 = 0x01;
const MCR_RTS: u8 = 0x02;
const MCR_OUT1: u8 = 0x04;
const MCR_OUT2: u8 = 0x08;
const MCR_LOOPBACK: u8 = 0x10;

const LSR_DATA: u8 = 0x01;
const LSR_OVERRUN: u8 = 0x02;
const LSR_THR_EMPTY: u8 = 0x20;
const LSR_IDLE: u8 = 0x40;

const MSR_DELTA: u8 = 0x0f;
const MSR_DELTA_RI: u8 = 0x04;
const MSR_CTS: u8 = 0x10;
const MSR_DSR: u8 = 0x20;
const MSR_RI: u8 = 0x40;
const MSR_DCD: u8 = 0x80;

/// One UART's registers.
#[derive(Debug)]
pub struct Uart {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    msr: u8,
    scr: u8,
    divisor: [u8; 2],
    overrun: bool,
    tx_interrupt: bool,
    rx: [u8; FIFO],
    rx_head: usize,
    rx_len: usize,
}

impl Default for Uart {
    fn default() -> Self {
        Uart {
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            msr: modem_status(0),
            scr: 0,
            // 9600 baud, as a PC's firmware leaves it.
            divisor: [12, 0],
            overrun: false,
            tx_interrupt: false,
            rx: [0; FIFO],
            rx_head: 0,
            rx_len: 0,
        }
    }
}

/// Modem status that follows from modem control: outside of loopback the line
/// is always connected, so that opening the tty does not block.
fn modem_status(mcr: u8) -> u8 {
    if mcr & MCR_LOOPBACK == 0 {
        return MSR_DCD | MSR_DSR | MSR_CTS;
    }
    [
        (MCR_RTS, MSR_CTS),
        (MCR_DTR, MSR_DSR),
        (MCR_OUT1, MSR_RI),
        (MCR_OUT2, MSR_DCD),
    ]
    .into_iter()
    .filter(|(control, _)| mcr & control != 0)
    .fold(0, |msr, (_, status)| msr | status)
}

impl Uart {
    /// What the line status register reads as, while reading it changes
    /// nothing.
    pub fn constant_lsr(&self, tx_room: bool) -> Option<u8> {
        (!self.overrun).then_some(self.lsr(tx_room))
    }

    /// Whether a byte for the transmitter changes nothing that the guest can
    /// see: it goes out, the interrupt that it would cause is off, and stays
    /// due for when it is turned on.
    pub fn transmits_silently(&self) -> bool {
        !self.dlab() && !self.loopback() && self.ier & IER_TX == 0 && self.tx_interrupt
    }

    fn lsr(&self, tx_room: bool) -> u8 {
        let mut lsr = if tx_room { LSR_THR_EMPTY | LSR_IDLE } else { 0 };
        lsr |= if self.rx_len > 0 { LSR_DATA } else { 0 };
        lsr |= if self.overrun { LSR_OVERRUN } else { 0 };
        lsr
    }

    /// Reads register 0 to 7; `tx_room` says whether the transmitter can take
    /// a byte.
    pub fn read(&mut self, register: u8, tx_room: bool) -> u8 {
        match register {
            0 if self.dlab() => self.divisor[0],
            1 if self.dlab() => self.divisor[1],
            0 => self.pop(),
            1 => self.ier,
            2 => {
                let reason = self.reason();
                if reason == IIR_TX {
                    self.tx_interrupt = false;
                }
                reason
                    | if self.fcr & FCR_ENABLE != 0 {
                        IIR_FIFO
                    } else {
                        0
                    }
            }
            3 => self.lcr,
            4 => self.mcr,
            5 => {
                let lsr = self.lsr(tx_room);
                self.overrun = false;
                lsr
            }
            6 => {
                let msr = self.msr;
                self.msr &= !MSR_DELTA;
                msr
            }
            7 => self.scr,
            _ => 0xff,
        }
    }

    /// Writes register 0 to 7; returns a byte that goes out on the line.
    pub fn write(&mut self, register: u8, value: u8, tx_room: bool) -> Option<u8> {
        match register {
            0 if self.dlab() => self.divisor[0] = value,
            1 if self.dlab() => self.divisor[1] = value,
            0 => {
                let looped = self.loopback();
                if looped {
                    self.push(value);
                }
                // Without room, the interrupt waits for `tx_drained`.
                self.tx_interrupt = looped || tx_room;
                return (!looped).then_some(value);
            }
            1 => {
                // Enabling the interrupt with an empty transmitter raises it
                // at once (data sheet, §8.6.1 table 5).
                if value & IER_TX != 0 && self.ier & IER_TX == 0 && tx_room {
                    self.tx_interrupt = true;
                }
                self.ier = value & 0x0f;
            }
            2 => {
                if (self.fcr ^ value) & FCR_ENABLE != 0 || value & FCR_CLEAR_RX != 0 {
                    self.rx_len = 0;
                }
                self.fcr = if value & FCR_ENABLE != 0 {
                    value & FCR_KEPT
                } else {
                    0
                };
            }
            3 => self.lcr = value,
            4 => self.set_mcr(value & 0x1f),
            7 => self.scr = value,
            // LSR and MSR are for factory tests only.
            _ => {}
        }
        None
    }

    /// The interrupt line (gated by OUT2 on a PC's card; guests of a VM find
    /// it connected).
    pub fn interrupt(&self) -> bool {
        self.reason() != IIR_NONE
    }

    /// How many received bytes fit now; none while in loopback, so that input
    /// waits instead of getting lost.
    pub fn rx_room(&self) -> usize {
        if self.loopback() {
            0
        } else {
            self.rx_size().saturating_sub(self.rx_len)
        }
    }

    /// Takes as many received bytes as fit; returns how many.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        let n = self.rx_room().min(bytes.len());
        for &b in bytes.iter().take(n) {
            self.push(b);
        }
        n
    }

    /// The transmitter became empty.
    pub fn tx_drained(&mut self) {
        self.tx_interrupt = true;
    }

    fn dlab(&self) -> bool {
        self.lcr & LCR_DLAB != 0
    }

    fn loopback(&self) -> bool {
        self.mcr & MCR_LOOPBACK != 0
    }

    fn rx_size(&self) -> usize {
        if self.fcr & FCR_ENABLE != 0 { FIFO } else { 1 }
    }

    fn rx_trigger(&self) -> usize {
        if self.fcr & FCR_ENABLE == 0 {
            return 1;
        }
        match self.fcr >> 6 {
            0 => 1,
            1 => 4,
            2 => 8,
            _ => 14,
        }
    }

    fn push(&mut self, byte: u8) {
        if self.rx_len >= self.rx_size() {
            self.overrun = true;
            return;
        }
        if let Some(slot) = self.rx.get_mut((self.rx_head + self.rx_len) % FIFO) {
            *slot = byte;
            self.rx_len += 1;
        }
    }

    fn pop(&mut self) -> u8 {
        if self.rx_len == 0 {
            return 0;
        }
        let byte = self.rx.get(self.rx_head).copied().unwrap_or(0);
        self.rx_head = (self.rx_head + 1) % FIFO;
        self.rx_len -= 1;
        byte
    }

    fn set_mcr(&mut self, mcr: u8) {
        let was = self.msr;
        let is = modem_status(mcr);
        let changed = was ^ is;
        let mut delta = (changed >> 4) & MSR_DELTA & !MSR_DELTA_RI;
        if was & MSR_RI != 0 && is & MSR_RI == 0 {
            delta |= MSR_DELTA_RI;
        }
        self.mcr = mcr;
        self.msr = is | (was & MSR_DELTA) | delta;
    }

    fn reason(&self) -> u8 {
        if self.overrun && self.ier & IER_LINE != 0 {
            IIR_LINE
        } else if self.rx_len > 0 && self.ier & IER_RX != 0 {
            if self.rx_len >= self.rx_trigger() {
                IIR_RX
            } else {
                IIR_RX_TIMEOUT
            }
        } else if self.tx_interrupt && self.ier & IER_TX != 0 {
            IIR_TX
        } else if self.msr & MSR_DELTA != 0 && self.ier & IER_MODEM != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lsr(u: &mut Uart) -> u8 {
        u.read(5, true)
    }

    #[test]
    fn a_driver_that_probes_for_a_16550_finds_one() {
        let mut u = Uart::default();
        u.write(7, 0x5a, true);
        assert_eq!(u.read(7, true), 0x5a);
        assert_eq!(u.read(2, true), 0x01);
        u.write(2, 0x01, true);
        assert_eq!(u.read(2, true), 0xc1, "FIFO bits tell a 16550A");
        u.write(3, 0x80, true);
        u.write(0, 1, true);
        assert_eq!(u.read(0, true), 1);
        assert_eq!(u.read(1, true), 0);
        u.write(3, 0x03, true);
        assert_eq!(lsr(&mut u), 0x60);
        assert_eq!(u.read(6, true) & 0xb0, 0xb0, "DCD, DSR, CTS: connected");
    }

    #[test]
    fn loopback_returns_bytes_and_modem_lines() {
        let mut u = Uart::default();
        u.write(2, 0x07, true);
        u.write(4, 0x1a, true);
        assert_eq!(
            u.read(6, true) & 0xf0,
            0x90,
            "Linux's autoconfig test: RTS and OUT2 come back"
        );
        assert_eq!(u.write(0, b'x', true), None, "nothing leaves the chip");
        assert_eq!(u.rx_room(), 0, "input from outside waits");
        assert_eq!(lsr(&mut u) & 1, 1);
        assert_eq!(u.read(0, true), b'x');
        assert_eq!(lsr(&mut u) & 1, 0);
    }

    #[test]
    fn loopback_overrun_is_reported_once() {
        let mut u = Uart::default();
        u.write(4, 0x10, true);
        u.write(1, 0x04, true);
        u.write(0, 1, true);
        assert!(!u.interrupt());
        u.write(0, 2, true);
        assert!(u.interrupt());
        assert_eq!(u.read(2, true), 0x06);
        assert_eq!(lsr(&mut u) & 2, 2);
        assert_eq!(lsr(&mut u) & 2, 0);
        assert!(!u.interrupt());
    }

    #[test]
    fn received_bytes_fill_the_fifo_and_no_more() {
        let mut u = Uart::default();
        assert_eq!(u.receive(b"ab"), 1, "16450 mode holds one byte");
        assert_eq!(u.read(0, true), b'a');
        u.write(2, 0x81, true);
        u.write(1, 0x01, true);
        let data: Vec<u8> = (0..20).collect();
        assert_eq!(u.receive(&data), 16);
        assert_eq!(u.read(2, true), 0xc4);
        for i in 0..9 {
            assert_eq!(u.read(0, true), i);
        }
        assert_eq!(u.read(2, true), 0xcc, "below the trigger of 8: time-out");
        for i in 9..16 {
            assert_eq!(u.read(0, true), i);
        }
        assert!(!u.interrupt());
        assert_eq!(u.read(0, true), 0);
    }

    #[test]
    fn transmitter_interrupt_follows_room() {
        let mut u = Uart::default();
        u.write(1, 0x02, true);
        assert!(
            u.interrupt(),
            "enabling it with an empty transmitter raises it"
        );
        assert_eq!(u.read(2, true), 0x02);
        assert!(!u.interrupt(), "reading IIR ends it");
        assert_eq!(u.write(0, b'a', false), Some(b'a'));
        assert!(!u.interrupt(), "the line is full");
        assert_eq!(u.read(5, false) & 0x60, 0);
        u.tx_drained();
        assert!(u.interrupt());
    }

    #[test]
    fn clearing_the_fifo_drops_what_it_held() {
        let mut u = Uart::default();
        u.write(2, 0x01, true);
        u.receive(b"abc");
        u.write(2, 0x03, true);
        assert_eq!(lsr(&mut u) & 1, 0);
        assert_eq!(u.receive(b"d"), 1);
        assert_eq!(u.read(0, true), b'd');
    }
}
