//! A safe interface to `/dev/vmm/NAME` on FreeBSD and Linux: VMs, vCPUs, exits
//! as an enum, guest memory.
//!
//! ```no_run
//! # fn main() -> Result<(), vmmapi::Error> {
//! use vmmapi::{Exit, Flat32, MemFlags, Vm};
//!
//! let vm = Vm::create("demo")?;
//! let memory = vm.setup_memory(256 << 20, MemFlags::default())?;
//! memory.write_bytes(0x1000, &[0xf4])?; // HLT
//! let bsp = vm.vcpu(0);
//! bsp.reset()?;
//! bsp.setup_flat32(&Flat32 { eip: 0x1000, ..Flat32::default() })?;
//! bsp.activate()?;
//! loop {
//!     match bsp.run()?.exit {
//!         Exit::Bogus => {}
//!         other => break println!("{other:?}"),
//!     }
//! }
//! # Ok(()) }
//! ```
//!
//! Only the modules `affinity`, [`confine`], `disk`, [`host_pci`], `kvm`, `sys`, `title`, [`poll`], [`tap`] and [`memory`]
//! contain `unsafe`: the system calls, and the mapping of pages shared with the kernel, of devices' registers and of guest
//! memory. No reference into guest memory is ever handed out, because the guest changes it at will.

mod affinity;
pub mod bpf;
pub mod confine;
#[cfg(target_os = "freebsd")]
pub mod disk;
mod error;
pub mod host_pci;
#[cfg(all(feature = "kvm", target_os = "linux"))]
pub mod kvm;
pub mod memory;
mod out_ring;
pub mod poll;
mod runner;
mod state;
mod sys;
pub mod tap;
mod title;
mod vcpu;
mod vm;

pub use affinity::pin_thread;
pub use error::{Error, Result};
pub use memory::{GuestMemory, MemFlags, Segment, parse_memsize};
pub use out_ring::OutRing;
pub use runner::{ExitRegisters, Left, Runner};
pub use state::Flat32;
pub use title::set_process_title;
pub use vcpu::{RegisterSet, Vcpu};
pub use vm::{CpuSet, Mapping, MemSegment, Stat, Vm};
pub use vmm_abi as abi;
pub use vmm_abi::exit::{Inout, InoutStr, InstEmul, TaskSwitch, Vmx};
pub use vmm_abi::layout::{
    GuestPaging, SegDesc, VmCpuTopology as Topology, VmExtVersion as ExtVersion,
};
pub use vmm_abi::names::{
    Capability, CpuMode, CpusetWhich, IntrTrigger, PagingMode, RegName, SuspendHow, X2apicState,
};
pub use vmm_abi::{Exit, VmExit};
