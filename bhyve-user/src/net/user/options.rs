//! The part of `slirp,` behind the comma, in the words of newer bhyves:
//! `open` and `hostfwd=tcp:[hostaddr]:hostport-[guestaddr]:guestport`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use super::GUEST;

/// What travels over a forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

/// A port of the host that leads to one of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// What travels.
    pub protocol: Protocol,
    /// Where the host listens.
    pub host: SocketAddr,
    /// Where it goes.
    pub guest: SocketAddr,
}

/// A user-mode network, as asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// `open`: the guest may open connections to the outside. Without it there
    /// are only DHCP, the gateway's echo, and the forwards.
    pub open: bool,
    /// `hostfwd=`.
    pub forwards: Vec<Forward>,
}

impl Options {
    /// Takes one word; false if it is none of this network's.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn word(&mut self, word: &str) -> Result<bool, String> {
        match word.split_once('=') {
            None if word == "open" => self.open = true,
            Some(("hostfwd", rules)) => {
                for rule in rules.split(';') {
                    self.forwards.push(rule.parse()?);
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

impl FromStr for Forward {
    type Err = String;

    fn from_str(text: &str) -> Result<Forward, String> {
        let bad = |why: &str| {
            format!(
                "hostfwd={text}: {why}; it is tcp|udp:[hostaddr]:hostport-[guestaddr:]guestport, \
                 as in tcp:127.0.0.1:2222-22"
            )
        };
        let (protocol, rest) = text.split_once(':').ok_or_else(|| bad("no protocol"))?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return Err(bad("the protocol is neither tcp nor udp")),
        };
        let (host, guest) = rest
            .rsplit_once('-')
            .ok_or_else(|| bad("no '-' between host and guest"))?;
        let port = |text: &str, whose: &str| -> Result<u16, String> {
            match text.parse() {
                Ok(port) if port > 0 => Ok(port),
                _ => Err(bad(&format!("the {whose}'s port is none of 1 to 65535"))),
            }
        };
        let (address, host_port) = host
            .rsplit_once(':')
            .ok_or_else(|| bad("no ':' between the host's address and port"))?;
        let address: IpAddr = match address.trim_start_matches('[').trim_end_matches(']') {
            "" => Ipv4Addr::UNSPECIFIED.into(),
            a => a
                .parse()
                .map_err(|_| bad("the host's address is no IP address"))?,
        };
        let (to, guest_port) = guest.rsplit_once(':').unwrap_or(("", guest));
        let to = match to {
            "" => GUEST.into(),
            a => a
                .trim_start_matches('[')
                .trim_end_matches(']')
                .parse()
                .map_err(|_| bad("the guest's address is no IP address"))?,
        };
        if !super::ours(to) {
            return Err(bad(
                "the guest's address is neither in 10.0.2.4 to 10.0.2.254 nor in fec0::/64",
            ));
        }
        Ok(Forward {
            protocol,
            host: SocketAddr::new(address, port(host_port, "host")?),
            guest: SocketAddr::new(to, port(guest_port, "guest")?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwards_in_bhyves_words() {
        let f: Forward = "tcp:127.0.0.1:2222-10.0.2.15:22".parse().unwrap();
        assert_eq!(f.protocol, Protocol::Tcp);
        assert_eq!(f.host.to_string(), "127.0.0.1:2222");
        assert_eq!(f.guest.to_string(), "10.0.2.15:22");
        let f: Forward = "udp::5353-53".parse().unwrap();
        assert_eq!(f.protocol, Protocol::Udp);
        assert_eq!(f.host.to_string(), "0.0.0.0:5353");
        assert_eq!(f.guest.to_string(), "10.0.2.15:53");
        let f: Forward = "tcp:[::1]:80-8080".parse().unwrap();
        assert_eq!(f.host.to_string(), "[::1]:80");
        let f: Forward = "tcp:[::]:2222-[fec0::15]:22".parse().unwrap();
        assert_eq!(f.host.to_string(), "[::]:2222");
        assert_eq!(f.guest.to_string(), "[fec0::15]:22");
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_the_rule() {
        for bad in [
            "",
            "tcp",
            "sctp::1-2",
            "tcp:1-2",
            "tcp::0-2",
            "tcp::1-0",
            "tcp::70000-22",
            "tcp::22",
            "tcp:::80-:8080",
            "tcp:host:22-22",
            "tcp::22-192.168.0.1:22",
            "tcp::22-10.0.2.2:22",
            "tcp::22-[fec0::2]:22",
            "tcp::22-[2001:db8::1]:22",
        ] {
            let e = bad.parse::<Forward>().unwrap_err();
            assert!(e.contains("2222-22"), "{bad}: {e}");
        }
    }

    #[test]
    fn words_add_up_and_foreign_ones_are_left() {
        let mut o = Options::default();
        assert_eq!(o.word("open"), Ok(true));
        assert_eq!(o.word("hostfwd=tcp::1-1;udp::2-2"), Ok(true));
        assert_eq!(o.word("hostfwd=tcp::3-3"), Ok(true));
        assert!(o.open);
        assert_eq!(o.forwards.len(), 3);
        assert_eq!(o.word("mac=1"), Ok(false));
        assert!(o.word("hostfwd=x").is_err());
    }
}
