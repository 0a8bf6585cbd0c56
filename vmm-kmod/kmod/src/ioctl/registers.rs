//! Requests about a vCPU's registers and what it is about to do.

use vmm_abi::Capability;
use vmm_abi::layout::*;
use vmm_abi::names::VM_REG_LAST_12;
use vmm_abi::request as req;
use zerocopy::IntoBytes;

use super::{NOT_MINE, arg, stopped};
use crate::errno;
use crate::os;
use crate::regs;
use crate::vcpu::Inner;
use crate::vm::Vm;

#[inline(never)]
pub(super) fn registers(vm: &Vm, cmd: u32, data: &mut [u8]) -> Result<(), i32> {
    match cmd {
        req::VM_GET_REGISTER
        | req::VM_SET_REGISTER
        | req::VM_GET_SEGMENT_DESCRIPTOR
        | req::VM_SET_SEGMENT_DESCRIPTOR
        | req::VM_INJECT_EXCEPTION
        | req::VM_RESTART_INSTRUCTION
        | req::VM_SET_INTINFO
        | req::VM_GET_INTINFO
        | req::VM_SET_CAPABILITY => {
            // Each begins with the vCPU's number.
            let id: &mut i32 = arg(data.get_mut(..4).ok_or(errno::EINVAL)?)?;
            stopped(vm, *id, |inner| of_stopped(inner, cmd, data))
        }
        req::VM_GET_REGISTER_SET | req::VM_SET_REGISTER_SET => {
            let a: &mut VmRegisterSet = arg(data)?;
            register_set(vm, *a, cmd == req::VM_SET_REGISTER_SET)
        }
        req::VM_GET_CAPABILITY => {
            let a: &mut VmCapability = arg(data)?;
            let cap = Capability::from_raw(a.captype).ok_or(errno::EINVAL)?;
            let vcpu = vm.ensure_vcpu(a.cpuid)?;
            a.capval = vcpu.freeze().capability(cap)?;
            Ok(())
        }
        req::VM_GLA2GPA | req::VM_GLA2GPA_NOFAULT => {
            let a: &mut VmGla2gpa = arg(data)?;
            let vcpu = vm.ensure_vcpu(a.vcpuid)?;
            crate::emulate::gla2gpa(vm, vcpu, a, cmd == req::VM_GLA2GPA)
        }
        _ => Err(NOT_MINE),
    }
}

/// One of the requests of a vCPU that is out of the guest, with its VMCS current.
fn of_stopped(i: &mut Inner, cmd: u32, data: &mut [u8]) -> Result<(), i32> {
    match cmd {
        req::VM_GET_REGISTER => {
            let a: &mut VmRegister = arg(data)?;
            a.regval = regs::get(i, a.regnum)?;
        }
        req::VM_SET_REGISTER => {
            let a: &mut VmRegister = arg(data)?;
            regs::set(i, a.regnum, a.regval)?;
        }
        req::VM_GET_SEGMENT_DESCRIPTOR => {
            let a: &mut VmSegDesc = arg(data)?;
            a.desc = regs::get_desc(i, a.regnum)?;
        }
        req::VM_SET_SEGMENT_DESCRIPTOR => {
            let a: &mut VmSegDesc = arg(data)?;
            regs::set_desc(i, a.regnum, a.desc)?;
        }
        req::VM_INJECT_EXCEPTION => i.inject_exception(arg(data)?)?,
        req::VM_RESTART_INSTRUCTION => i.restart_instruction(),
        req::VM_SET_INTINFO => {
            let a: &mut VmIntinfo = arg(data)?;
            i.vectoring = vmm_core::intinfo::from_raw(a.info1).map_err(|_| errno::EINVAL)?;
            i.attention = true;
        }
        req::VM_GET_INTINFO => {
            let a: &mut VmIntinfo = arg(data)?;
            a.info1 = i.vectoring.map_or(0, |e| vmm_core::intinfo::to_raw(&e));
            a.info2 = i.exception.map_or(0, |e| vmm_core::intinfo::to_raw(&e));
        }
        _ => {
            let a: &mut VmCapability = arg(data)?;
            let cap = Capability::from_raw(a.captype).ok_or(errno::EINVAL)?;
            i.set_capability(cap, a.capval != 0)?;
        }
    }
    Ok(())
}

fn register_set(vm: &Vm, a: VmRegisterSet, write: bool) -> Result<(), i32> {
    const MAX: usize = VM_REG_LAST_12 as usize;
    let count = a.count as usize;
    if count > MAX {
        return Err(errno::EINVAL);
    }
    let mut names = [0i32; MAX];
    let mut values = [0u64; MAX];
    let names = names.get_mut(..count).ok_or(errno::EINVAL)?;
    let values = values.get_mut(..count).ok_or(errno::EINVAL)?;
    os::copyin(a.regnums, names.as_mut_bytes())?;
    if write {
        os::copyin(a.regvals, values.as_mut_bytes())?;
    }
    stopped(vm, a.cpuid, |i| {
        for (name, value) in names.iter().zip(values.iter_mut()) {
            if write {
                regs::set(i, *name, *value)?;
            } else {
                *value = regs::get(i, *name)?;
            }
        }
        Ok(())
    })?;
    if write {
        Ok(())
    } else {
        os::copyout(values.as_bytes(), a.regvals)
    }
}
