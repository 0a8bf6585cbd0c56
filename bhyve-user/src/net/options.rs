//! The part of `-s N,virtio-net,` behind the comma, as bhyve(8) has it.

use std::str::FromStr;

use super::mac::Mac;
use super::user;

/// Where a card is plugged in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// Nowhere: a card without a link.
    None,
    /// A tap device by its name.
    Tap(String),
    /// An end of an epair(4) by its name.
    Epair(String),
    /// `slirp`.
    User(user::options::Options),
}

/// A network card, as asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Where it is plugged in.
    pub network: Network,
    /// `mac=`; else it comes from the VM's name and the slot.
    pub mac: Option<Mac>,
    /// `mtu=`: what the guest is told, bytes.
    pub mtu: Option<u16>,
    /// `queues=`: pairs of queues.
    pub queues: u16,
}

/// Smallest and largest MTU (virtio 1.2 §5.1.4.1; IPv4's least, RFC 791).
const MTU: std::ops::RangeInclusive<u16> = 68..=65521;
/// Most pairs of queues.
pub const MOST_QUEUES: u16 = 16;

impl FromStr for Options {
    type Err = String;

    fn from_str(text: &str) -> Result<Options, String> {
        let mut parts = text.split(',').peekable();
        let first = parts.peek().copied().unwrap_or_default();
        let named = !first.contains('=') && !first.is_empty();
        let network = match first {
            _ if !named => Network::None,
            "slirp" => Network::User(user::options::Options::default()),
            other => {
                let foreign = ["vale", "netmap", "netgraph", "ngd"];
                if let Some(kind) = foreign.iter().find(|k| other.starts_with(**k)) {
                    return Err(format!(
                        "{kind}: no such network here; there is a tap by its name, epairNa and epairNb, and slirp"
                    ));
                }
                if is_epair(other) {
                    Network::Epair(other.into())
                } else {
                    Network::Tap(other.into())
                }
            }
        };
        if named {
            parts.next();
        }
        let mut o = Options {
            network,
            mac: None,
            mtu: None,
            queues: 1,
        };
        for part in parts.filter(|p| !p.is_empty()) {
            o.word(part)?;
        }
        if o.queues > 1 && !matches!(o.network, Network::Tap(_)) {
            return Err("queues=: only a tap has more than one".into());
        }
        Ok(o)
    }
}

/// Whether a name is that of an epair(4)'s end: `epair`, a number, `a` or `b`.
fn is_epair(name: &str) -> bool {
    let number = name
        .strip_prefix("epair")
        .and_then(|n| n.strip_suffix(['a', 'b']));
    number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

impl Options {
    fn word(&mut self, part: &str) -> Result<(), String> {
        match part.split_once('=').unwrap_or((part, "")) {
            ("mac", mac) => self.mac = Some(mac.parse()?),
            ("mtu", mtu) => {
                let mtu = mtu.parse().ok().filter(|m| MTU.contains(m));
                let range = format!("{part}: {} to {}", MTU.start(), MTU.end());
                self.mtu = Some(mtu.ok_or(range)?);
            }
            ("queues", n) => {
                let n = n.parse().ok().filter(|n| (1..=MOST_QUEUES).contains(n));
                self.queues = n.ok_or(format!("{part}: 1 to {MOST_QUEUES}"))?;
            }
            _ => {
                let known = match &mut self.network {
                    Network::User(user) => user.word(part)?,
                    _ => false,
                };
                if !known {
                    let more = match self.network {
                        Network::User(_) => ", open, hostfwd=",
                        _ => "",
                    };
                    return Err(format!(
                        "no option \"{part}\"; there is mac=, mtu=, queues={more}"
                    ));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_options_of_bhyve() {
        let o: Options = "tap0,mac=00:a0:98:1:2:3,mtu=9000,queues=4".parse().unwrap();
        assert_eq!(o.network, Network::Tap("tap0".into()));
        assert_eq!(o.mac.unwrap().to_string(), "00:a0:98:01:02:03");
        assert_eq!((o.mtu, o.queues), (Some(9000), 4));
        let o: Options = "slirp,open,hostfwd=tcp::2222-22,mac=00:a0:98:1:2:3"
            .parse()
            .unwrap();
        let Network::User(user) = o.network else {
            panic!("{:?}", o.network)
        };
        assert!(user.open);
        assert_eq!(user.forwards.len(), 1);
        let o: Options = "epair10b,mtu=9000".parse().unwrap();
        assert_eq!(o.network, Network::Epair("epair10b".into()));
        for tap in ["epair0", "epairb", "epair0c", "epair0xa", "vmnet0"] {
            let o: Options = tap.parse().unwrap();
            assert_eq!(o.network, Network::Tap(tap.into()));
        }
        // As stock has it, a card may be plugged in nowhere.
        let o: Options = "".parse().unwrap();
        assert_eq!(o.network, Network::None);
        let o: Options = "mac=00:a0:98:1:2:3".parse().unwrap();
        assert_eq!(o.network, Network::None);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for bad in [
            "tap0,open",
            "tap0,mac=1",
            "tap0,mtu=67",
            "tap0,mtu=65522",
            "tap0,queues=0",
            "tap0,queues=17",
            "slirp,queues=2",
            "epair0b,queues=2",
            "epair0b,open",
            "slirp,hostfwd=tcp",
            "slirp,closed",
            "vale0:1",
            "netgraph,path=x",
        ] {
            assert!(bad.parse::<Options>().is_err(), "{bad}");
        }
    }
}
