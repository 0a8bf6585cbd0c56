//! Ethernet addresses of a guest's cards.

use std::fmt;
use std::str::FromStr;

use md5::{Digest, Md5};

use crate::pci::Bdf;

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The address that bhyve gives a card of its own: always the same for
    /// the same VM and slot, so that a guest moved from the C bhyve keeps it.
    pub fn derived(vm: &str, at: Bdf) -> Mac {
        let name = format!("{}-{}-{vm}", at.slot, at.func);
        // bhyve's buffer for this string has 80 bytes, its end included.
        let name = name.as_bytes();
        let digest = Md5::digest(name.get(..79).unwrap_or(name));
        let mut mac = [0, 0xa0, 0x98, 0, 0, 0];
        for (to, from) in mac.iter_mut().skip(3).zip(digest) {
            *to = from;
        }
        Mac(mac)
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Mac, String> {
        let bad = |why: &str| Err(format!("mac={text}: {why}"));
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let part = parts.next().unwrap_or_default();
            let digits =
                (1..=2).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_hexdigit());
            match u8::from_str_radix(part, 16) {
                Ok(v) if digits => *byte = v,
                _ => return bad("six hexadecimal bytes, as in 00:a0:98:01:02:03"),
            }
        }
        if parts.next().is_some() {
            return bad("six hexadecimal bytes, as in 00:a0:98:01:02:03");
        }
        let [first, ..] = mac;
        if first & 1 != 0 {
            return bad("a group address (odd first byte) is no card's");
        }
        if mac == [0; 6] {
            return bad("all zeroes is no card's");
        }
        Ok(Mac(mac))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_of_a_slot_is_bhyves() {
        let at = Bdf {
            bus: 0,
            slot: 2,
            func: 0,
        };
        // printf %s 2-0-vm0 | md5sum
        assert_eq!(Mac::derived("vm0", at).to_string(), "00:a0:98:f0:55:05");
        let long = "x".repeat(200);
        // printf '%s' "2-0-$(printf 'x%.0s' $(seq 75))" | md5sum
        assert_eq!(Mac::derived(&long, at).to_string(), "00:a0:98:06:9f:32");
    }

    #[test]
    fn an_address_is_six_bytes_and_not_a_groups() {
        let mac: Mac = "58:9c:fc:0:a:FF".parse().unwrap();
        assert_eq!(mac.to_string(), "58:9c:fc:00:0a:ff");
        for bad in [
            "",
            "58:9c:fc:00:0a",
            "58:9c:fc:00:0a:ff:01",
            "58:9c:fc:00:0a:1ff",
            "58:9c:fc:00:0a:+f",
            "01:00:5e:00:00:01",
            "00:00:00:00:00:00",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }
}
