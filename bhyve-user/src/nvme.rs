//! An NVMe controller with one namespace (NVM Express 1.4).
//!
//! [`options`] is the command line, [`request`] what the guest writes into its
//! queues, [`identify`] what the controller says of itself, [`queue`] the rings,
//! [`controller`] the commands, [`device`] the registers. The host's side is
//! [`crate::disk`].

pub mod controller;
pub mod device;
pub mod identify;
pub mod options;
pub mod queue;
pub mod request;

use vmmapi::GuestMemory;

use crate::pci::catalog::Plan;

/// A controller, as the options ask for it.
///
/// # Errors
/// What is wrong with the options or the disk.
pub fn build(conf: &str, name: String, memory: GuestMemory) -> Result<Plan, String> {
    let options: options::Options = conf.parse()?;
    let path = options.disk.path.display().to_string();
    let controller =
        controller::Controller::open(&options, memory).map_err(|e| format!("{path}: {e}"))?;
    device::Nvme::plan(name, controller).map_err(|e| e.to_string())
}
