//! The host's name server, that the guest's queries go to.

use std::net::IpAddr;
use std::time::{Duration, Instant};

pub const FILE: &str = "/etc/resolv.conf";
/// The file is read again after so long.
const FRESH: Duration = Duration::from_secs(10);

/// The name server of the host as it was last known.
pub struct Resolver {
    server: Option<IpAddr>,
    read: Instant,
}

/// The first name server of a resolv.conf(5).
fn first(text: &str) -> Option<IpAddr> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            (Some("nameserver"), Some(address)) => address.parse().ok(),
            _ => None,
        }
    })
}

impl Resolver {
    /// Reads the host's configuration.
    pub fn new() -> Resolver {
        let text = std::fs::read_to_string(FILE).unwrap_or_default();
        Resolver {
            server: first(&text),
            read: Instant::now(),
        }
    }

    /// The server. Where the file can be read no more (a sandbox), the one
    /// that was known.
    pub fn server(&mut self) -> Option<IpAddr> {
        if self.read.elapsed() >= FRESH {
            self.read = Instant::now();
            if let Ok(text) = std::fs::read_to_string(FILE) {
                self.server = first(&text);
            }
        }
        self.server
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_server_counts() {
        let text = "# nameserver 9.9.9.9\nsearch example\nnameserver\nnameserver fe80::1%em0\n\
                    nameserver 192.0.2.1 # home\nnameserver 192.0.2.2\n";
        assert_eq!(first(text), Some("192.0.2.1".parse().unwrap()));
        assert_eq!(first("options edns0\n"), None);
    }
}
