//! Disk images as the tools of this machine make them, and what becomes of them
//! when they are damaged.
#![forbid(unsafe_code)]

mod hostile;
mod iso;
mod partitions;
mod tools;
mod ufs;
