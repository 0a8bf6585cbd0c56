//! The loader as its user meets it: a folder or an image, keys, and what is booted.
#![forbid(unsafe_code)]

mod boot;
mod image;
mod prompt;
mod script;
