//! Which frames a card lets through (virtio 1.2 §5.1.6.5.1 and §5.1.6.5.2).

use super::request::{Command, Mode};

/// Addresses that are kept of each kind; with more, all of the kind pass.
pub const MOST: usize = 64;

/// A card's ears.
#[derive(Clone, Debug)]
pub struct Filter {
    mac: [u8; 6],
    promiscuous: bool,
    all_multicast: bool,
    all_unicast: bool,
    no_multicast: bool,
    no_unicast: bool,
    no_broadcast: bool,
    /// `None` where there were too many.
    unicast: Option<Vec<[u8; 6]>>,
    multicast: Option<Vec<[u8; 6]>>,
}

impl Filter {
    /// A card that has just been reset hears everything: a driver that wants
    /// less says so.
    pub fn new(mac: [u8; 6]) -> Filter {
        Filter {
            mac,
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Some(Vec::new()),
            multicast: Some(Vec::new()),
        }
    }

    /// The card's own address.
    pub fn set_mac(&mut self, mac: [u8; 6]) {
        self.mac = mac;
    }

    /// Does what a command says about the filter.
    pub fn set(&mut self, command: &Command) {
        match command {
            Command::Rx(mode, on) => match mode {
                Mode::Promiscuous => self.promiscuous = *on,
                Mode::AllMulticast => self.all_multicast = *on,
                Mode::AllUnicast => self.all_unicast = *on,
                Mode::NoMulticast => self.no_multicast = *on,
                Mode::NoUnicast => self.no_unicast = *on,
                Mode::NoBroadcast => self.no_broadcast = *on,
            },
            Command::MacTable { unicast, multicast } => {
                let few = |list: &Vec<[u8; 6]>| (list.len() <= MOST).then(|| list.clone());
                self.unicast = few(unicast);
                self.multicast = few(multicast);
            }
            Command::MacAddress(mac) => self.mac = *mac,
            Command::Pairs(_) => {}
        }
    }

    /// Whether a frame to `to` passes.
    pub fn passes(&self, to: [u8; 6]) -> bool {
        if self.promiscuous {
            return true;
        }
        let listed = |list: &Option<Vec<[u8; 6]>>| list.as_ref().is_none_or(|l| l.contains(&to));
        let [first, ..] = to;
        if to == [0xff; 6] {
            !self.no_broadcast
        } else if first & 1 != 0 {
            !self.no_multicast && (self.all_multicast || listed(&self.multicast))
        } else {
            !self.no_unicast && (self.all_unicast || to == self.mac || listed(&self.unicast))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [0, 0xa0, 0x98, 1, 2, 3];
    const OTHER: [u8; 6] = [0, 0xa0, 0x98, 1, 2, 4];
    const GROUP: [u8; 6] = [1, 0, 0x5e, 0, 0, 1];
    const ALL: [u8; 6] = [0xff; 6];

    fn passing(f: &Filter) -> Vec<&'static str> {
        let kinds = [
            ("own", MAC),
            ("other", OTHER),
            ("group", GROUP),
            ("all", ALL),
        ];
        let passing = kinds.into_iter().filter(|(_, to)| f.passes(*to));
        passing.map(|(name, _)| name).collect()
    }

    #[test]
    fn modes_and_lists_let_through_what_they_say() {
        let mut f = Filter::new(MAC);
        assert_eq!(passing(&f), ["own", "other", "group", "all"]);
        let mut set = |command: Command, want: &[&str]| {
            f.set(&command);
            assert_eq!(passing(&f), want, "{command:?}");
        };
        set(Command::Rx(Mode::Promiscuous, false), &["own", "all"]);
        set(
            Command::Rx(Mode::AllMulticast, true),
            &["own", "group", "all"],
        );
        set(Command::Rx(Mode::NoMulticast, true), &["own", "all"]);
        set(Command::Rx(Mode::NoBroadcast, true), &["own"]);
        set(Command::Rx(Mode::AllUnicast, true), &["own", "other"]);
        set(Command::Rx(Mode::NoUnicast, true), &[]);
        for mode in [
            Mode::NoUnicast,
            Mode::NoMulticast,
            Mode::NoBroadcast,
            Mode::AllUnicast,
            Mode::AllMulticast,
        ] {
            f.set(&Command::Rx(mode, false));
        }
        let table = |unicast: Vec<[u8; 6]>, multicast: Vec<[u8; 6]>| Command::MacTable {
            unicast,
            multicast,
        };
        let mut set = |command: Command, want: &[&str]| {
            f.set(&command);
            assert_eq!(passing(&f), want, "{command:?}");
        };
        set(table(vec![OTHER], vec![]), &["own", "other", "all"]);
        set(table(vec![], vec![GROUP]), &["own", "group", "all"]);
        set(table(vec![[2; 6]; 65], vec![]), &["own", "other", "all"]);
        set(table(vec![], vec![[3; 6]; 65]), &["own", "group", "all"]);
        set(table(vec![], vec![]), &["own", "all"]);
        set(Command::MacAddress(OTHER), &["other", "all"]);
    }
}
