//! bhyve's debug port: one I/O port behind which the gdb stub of the guest's own
//! kernel talks to a debugger over TCP. For FreeBSD kernels with `device bvmdebug`,
//! from 2011 on (sys/dev/bvm/bvm_dbg.c is the guest's side).

pub mod backend;
pub mod device;

pub use device::DebugPort;
