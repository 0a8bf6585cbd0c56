//! One file a VM, for bhyve and bhyveload alike.
//!
//! [`keys`] is the schema, as data. A file ([`mod@file`], TOML) or a bhyve_config(5)
//! variable ([`variables`]) becomes [`settings::Settings`]; these become words of a
//! command line ([`settings::Settings::arguments`]), so that a value from a file
//! and one from the command line are checked by the same code, and [`mod@print`]
//! writes them as a file again.
#![forbid(unsafe_code)]

pub mod device;
pub mod file;
pub mod keys;
pub mod print;
pub mod settings;
pub mod variables;

pub use settings::{Argument, Device, Origin, Program, Settings, Value};

/// A configuration that cannot be followed: where, what, and what would do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{at}: {what}")]
pub struct ConfigError {
    /// Where it is written.
    pub at: Origin,
    /// What is wrong with it.
    pub what: String,
}
