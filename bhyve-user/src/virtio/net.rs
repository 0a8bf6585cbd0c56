//! virtio-net: a network card (virtio 1.2 §5.1). [`device`] is the card,
//! [`request`] what drivers write (headers and control commands), [`filter`]
//! the addresses that it listens to; where it is plugged in is [`crate::net`].

pub mod device;
pub mod filter;
pub mod request;

use super::{Built, Group, Identity};
use crate::config::PciSlot;
use crate::net::mac::Mac;
use crate::net::options::{Network, Options};
use crate::net::{Port, epair, tap, user};
use crate::pci::catalog::Means;

/// IP packets on the wire, where nothing else is asked for.
const MTU: u16 = 1500;

/// A card as `conf`, the rest of `-s`, asks for it.
///
/// # Errors
/// What is wrong with the options, or with the host's network.
pub fn build(slot: &PciSlot, means: &Means<'_>) -> Result<Built, String> {
    let options: Options = slot.conf.parse()?;
    let mac = options
        .mac
        .unwrap_or_else(|| Mac::derived(means.vm, slot.at));
    let ports: Vec<Box<dyn Port>> = match &options.network {
        Network::None => Vec::new(),
        Network::Tap(name) => {
            let ports = tap::open(name, options.queues.into()).map_err(|e| e.to_string())?;
            ports.into_iter().map(|p| Box::new(p) as _).collect()
        }
        Network::Epair(name) => vec![epair::open(name).map_err(|e| e.to_string())?],
        Network::User(o) => {
            let mtu = options.mtu.unwrap_or(MTU);
            let net = user::UserNet::new(o, mac, mtu).map_err(|e| e.to_string())?;
            vec![Box::new(net)]
        }
    };
    Ok(card(mac, options.mtu, ports))
}

/// A card with a pair of queues for each port; without one, its link is down.
pub fn card(mac: Mac, mtu: Option<u16>, ports: Vec<Box<dyn Port>>) -> Built {
    let (identity, parts): (Identity, Vec<device::Part>) = device::new(mac, mtu, ports);
    let control = identity.queues.len().saturating_sub(1);
    let groups = parts.into_iter().enumerate().map(|(pair, part)| {
        let mut queues = vec![2 * pair, 2 * pair + 1];
        if pair == 0 {
            queues.push(control);
        }
        Group {
            queues,
            device: Box::new(part),
        }
    });
    Built {
        identity,
        groups: groups.collect(),
    }
}
