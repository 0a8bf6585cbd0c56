//! VT-x.
#![no_std]
