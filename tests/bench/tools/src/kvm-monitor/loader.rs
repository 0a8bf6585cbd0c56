//! A KVM VM as bhyveload's loaders see it.

use std::cell::RefCell;

use anyhow::Result;
use bhyveload::target::{Descriptor, LoadTarget, Register, TargetError, TargetResult};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vmmapi::GuestMemory;

/// Guest memory and the boot vCPU, whose registers are written at each change.
pub struct KvmTarget<'a> {
    memory: &'a GuestMemory,
    vcpu: &'a VcpuFd,
    state: RefCell<(kvm_regs, kvm_sregs)>,
}

fn failed(e: impl std::fmt::Display) -> TargetError {
    TargetError {
        what: e.to_string(),
    }
}

impl<'a> KvmTarget<'a> {
    /// The VM as it is.
    ///
    /// # Errors
    /// KVM's.
    pub fn new(memory: &'a GuestMemory, vcpu: &'a VcpuFd) -> Result<Self> {
        let state = RefCell::new((vcpu.get_regs()?, vcpu.get_sregs()?));
        Ok(Self {
            memory,
            vcpu,
            state,
        })
    }

    fn change(
        &self,
        change: impl FnOnce(&mut kvm_regs, &mut kvm_sregs) -> TargetResult<()>,
    ) -> TargetResult<()> {
        let mut state = self.state.borrow_mut();
        let (regs, sregs) = &mut *state;
        change(regs, sregs)?;
        self.vcpu.set_regs(regs).map_err(failed)?;
        // Long mode is a state of several registers: KVM takes it whole, the
        // loaders set them one by one, RIP last of all.
        Ok(())
    }

    /// Everything that was set takes effect.
    fn commit(&self) -> TargetResult<()> {
        let state = self.state.borrow();
        self.vcpu.set_sregs(&state.1).map_err(failed)
    }
}

impl Drop for KvmTarget<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.commit() {
            eprintln!("kvm-monitor: KVM_SET_SREGS: {}", e.what);
        }
    }
}

/// The segment in KVM's form of a VMCS access word (SDM Vol. 3C §25.4.1).
fn segment(old: &kvm_segment, d: Descriptor) -> kvm_segment {
    let bit = |n: u32| (d.access >> n & 1) as u8;
    kvm_segment {
        base: d.base,
        limit: d.limit,
        selector: old.selector,
        type_: (d.access & 0xf) as u8,
        present: bit(7),
        dpl: (d.access >> 5 & 3) as u8,
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        unusable: bit(16),
        padding: 0,
    }
}

fn segment_of(sregs: &mut kvm_sregs, register: Register) -> Option<&mut kvm_segment> {
    Some(match register {
        Register::Cs => &mut sregs.cs,
        Register::Ds => &mut sregs.ds,
        Register::Es => &mut sregs.es,
        Register::Fs => &mut sregs.fs,
        Register::Gs => &mut sregs.gs,
        Register::Ss => &mut sregs.ss,
        Register::Tr => &mut sregs.tr,
        Register::Ldtr => &mut sregs.ldt,
        _ => return None,
    })
}

impl LoadTarget for KvmTarget<'_> {
    fn low_memory(&self) -> u64 {
        self.memory.low_size()
    }
    fn high_memory(&self) -> u64 {
        self.memory.high_size()
    }
    fn write(&mut self, gpa: u64, data: &[u8]) -> TargetResult<()> {
        self.memory.write_bytes(gpa, data).map_err(failed)
    }
    fn read(&self, gpa: u64, data: &mut [u8]) -> TargetResult<()> {
        self.memory.read_bytes(gpa, data).map_err(failed)
    }
    fn zero(&mut self, gpa: u64, len: u64) -> TargetResult<()> {
        if self.memory.contains(gpa, len) {
            return Ok(()); // Fresh memory is zero.
        }
        Err(failed(format!("no memory at {gpa:#x}, {len:#x} bytes")))
    }
    fn set_register(&mut self, register: Register, value: u64) -> TargetResult<()> {
        self.change(|regs, sregs| {
            if let Some(segment) = segment_of(sregs, register) {
                segment.selector = value as u16;
                return Ok(());
            }
            *match register {
                Register::Rax => &mut regs.rax,
                Register::Rbx => &mut regs.rbx,
                Register::Rcx => &mut regs.rcx,
                Register::Rdx => &mut regs.rdx,
                Register::Rsi => &mut regs.rsi,
                Register::Rdi => &mut regs.rdi,
                Register::Rbp => &mut regs.rbp,
                Register::Rsp => &mut regs.rsp,
                Register::Rip => &mut regs.rip,
                Register::Rflags => &mut regs.rflags,
                Register::Cr0 => &mut sregs.cr0,
                Register::Cr3 => &mut sregs.cr3,
                Register::Cr4 => &mut sregs.cr4,
                Register::Efer => &mut sregs.efer,
                other => return Err(failed(format!("register {other:?}"))),
            } = value;
            Ok(())
        })
    }
    fn set_descriptor(&mut self, register: Register, descriptor: Descriptor) -> TargetResult<()> {
        self.change(|_, sregs| {
            if let Some(old) = segment_of(sregs, register) {
                *old = segment(old, descriptor);
                return Ok(());
            }
            let table = match register {
                Register::Gdtr => &mut sregs.gdt,
                Register::Idtr => &mut sregs.idt,
                other => return Err(failed(format!("descriptor {other:?}"))),
            };
            table.base = descriptor.base;
            table.limit = descriptor.limit as u16;
            Ok(())
        })
    }
    fn enable_unrestricted_guest(&mut self) -> TargetResult<()> {
        Ok(())
    }
    fn has_tsc_leaf(&self) -> bool {
        false
    }
}
