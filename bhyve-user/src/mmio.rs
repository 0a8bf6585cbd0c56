//! Instructions that touch memory-mapped devices.

use std::sync::Arc;

use vmmapi::{InstEmul, Vcpu, VmExit};

use crate::vcpu::Next;
use crate::vm::Vm;

/// Emulates such instructions.
pub struct Mmio;

impl Mmio {
    /// Emulates the instruction of an exit.
    pub fn emulate(
        &self,
        _vm: &Arc<Vm>,
        _vcpu: &Vcpu,
        _exit: &VmExit,
        e: &InstEmul,
    ) -> vmmapi::Result<Next> {
        Ok(Next::Fail(format!(
            "no instruction at guest-physical {:#x} can be emulated",
            e.gpa
        )))
    }
}
