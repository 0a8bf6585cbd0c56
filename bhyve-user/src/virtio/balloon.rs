//! virtio-balloon: memory that the guest gives back to the host (virtio 1.2
//! §5.5), with statistics and the reporting of free pages.
//!
//! [`request`] is what the guest and the control socket say, [`ledger`] which
//! pages are in the balloon, [`backend`] the host's side, [`device`] the rest.

pub mod backend;
pub mod device;
pub mod ledger;
pub mod request;

use std::path::PathBuf;
use std::sync::Arc;

use vmmapi::{GuestMemory, parse_memsize};

use super::Built;
use crate::machine::Machine;

/// A balloon, as `-s N,virtio-balloon[,size=SIZE][,control=PATH][,noreport]`
/// asks for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// What it takes from the guest at the start, bytes.
    pub size: u64,
    /// A socket to ask and change it by.
    pub control: Option<PathBuf>,
    /// Free pages are not asked for.
    pub no_report: bool,
}

impl std::str::FromStr for Options {
    type Err = String;

    fn from_str(text: &str) -> Result<Options, String> {
        let mut o = Options::default();
        for part in text.split(',').filter(|p| !p.is_empty()) {
            match part.split_once('=').unwrap_or((part, "")) {
                ("size", size) => {
                    o.size = parse_memsize(size)
                        .ok_or_else(|| format!("{part}: a size is a number with K, M or G"))?;
                }
                ("control", path) if !path.is_empty() => o.control = Some(path.into()),
                ("noreport", "") => o.no_report = true,
                _ => {
                    return Err(format!(
                        "no option \"{part}\"; there is size=, control=, noreport"
                    ));
                }
            }
        }
        Ok(o)
    }
}

/// A balloon, as the options ask for it.
///
/// # Errors
/// What is wrong with the options or the socket.
pub fn build(
    conf: &str,
    machine: &Arc<dyn Machine>,
    memory: &GuestMemory,
) -> Result<Built, String> {
    let options: Options = conf.parse()?;
    if options.size >= memory.size() {
        return Err(format!(
            "size={}M: the guest has {}M",
            options.size >> 20,
            memory.size() >> 20
        ));
    }
    let (identity, device) = device::Balloon::open(&options, Arc::clone(machine))?;
    Ok(Built::single(identity, device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_a_balloon() {
        let o: Options = "size=64M,control=/run/b,noreport".parse().unwrap();
        assert_eq!((o.size, o.no_report), (64 << 20, true));
        assert_eq!(o.control, Some("/run/b".into()));
        assert_eq!("".parse(), Ok(Options::default()));
        for bad in ["size=x", "size", "control=", "report", "noreport=1"] {
            assert!(bad.parse::<Options>().is_err(), "{bad}");
        }
    }
}
