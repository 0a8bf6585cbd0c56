//! Intel VT-x.

pub mod apicv;
pub mod caps;
pub mod cr;
pub mod dump;
pub mod enable;
pub mod entry;
pub mod exit;
pub mod fields;
pub mod fpu;
pub mod host_state;
pub mod inject;
pub mod instr;
pub mod msrbitmap;
pub mod setup;
pub mod state;
pub mod vcpu;
pub mod vpid;

pub use apicv::{ApicMode, ApicVirt};
pub use caps::{Capabilities, Features, Missing};
pub use enable::{Backend, EnableError};
pub use inject::PauseExiting;
pub use setup::Reset;
pub use vcpu::{Config, Vcpu};
