//! The `bhyve` library.
#![forbid(unsafe_code)]
