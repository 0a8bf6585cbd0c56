//! Control messages: port, event, value (virtio 1.2 §5.3.6.2).

/// Bytes of a message; a name may follow.
pub const MESSAGE: usize = 8;

/// Events, by their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Driver: it has heard of the device (value 1), or cannot go on (0).
    DeviceReady,
    /// Device: there is a port.
    DeviceAdd,
    /// Driver: it has made the port (1), or cannot (0).
    PortReady,
    /// Both: the port's end is open (1) or closed (0).
    PortOpen,
    /// Device: the port's name, which follows.
    PortName,
    /// Anything else.
    Other(u16),
}

impl Event {
    fn number(self) -> u16 {
        match self {
            Event::DeviceReady => 0,
            Event::DeviceAdd => 1,
            Event::PortReady => 3,
            Event::PortOpen => 6,
            Event::PortName => 7,
            Event::Other(n) => n,
        }
    }
}

/// A message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// The port's number.
    pub port: u32,
    /// What about it.
    pub event: Event,
    /// How.
    pub value: u16,
}

impl Message {
    /// Parses what the driver sent.
    pub fn parse(bytes: [u8; MESSAGE]) -> Message {
        let v = u64::from_le_bytes(bytes);
        let event = match (v >> 32) as u16 {
            0 => Event::DeviceReady,
            3 => Event::PortReady,
            6 => Event::PortOpen,
            n => Event::Other(n),
        };
        Message {
            port: v as u32,
            event,
            value: (v >> 48) as u16,
        }
    }

    /// What the driver gets.
    pub fn bytes(self) -> [u8; MESSAGE] {
        let v = u64::from(self.port)
            | u64::from(self.event.number()) << 32
            | u64::from(self.value) << 48;
        v.to_le_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_port_event_value() {
        let m = Message {
            port: 3,
            event: Event::PortOpen,
            value: 1,
        };
        assert_eq!(m.bytes(), [3, 0, 0, 0, 6, 0, 1, 0]);
        assert_eq!(Message::parse(m.bytes()), m);
        let odd = Message::parse([0xff; 8]);
        assert_eq!((odd.port, odd.event), (u32::MAX, Event::Other(0xffff)));
    }
}
