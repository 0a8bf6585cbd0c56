//! From an offset in a segment to a linear address, with the checks of
//! segmentation (SDM Vol. 3A §5.3, §5.5; 64-bit mode: §5.3.1, §3.3.7.1).

use super::{CodeMode, Inst, Op, Operand};
use crate::cpu::{Access, CR0_PE, CpuState, Event, Reg, Seg};

const RFLAGS_VM: u64 = 1 << 17;
const RFLAGS_AC: u64 = 1 << 18;
const CR0_AM: u64 = 1 << 18;
const CR4_LA57: u64 = 1 << 12;

/// An operand's place in linear memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearAddress {
    /// First byte.
    pub gla: u64,
    /// What addresses are cut to: 32 bits outside of 64-bit mode.
    pub mask: u64,
}

impl LinearAddress {
    /// Address of byte `n` of the operand.
    pub fn byte(&self, n: u64) -> u64 {
        self.gla.wrapping_add(n) & self.mask
    }
}

/// An exception with error code 0, or without one in real mode (SDM Vol. 3A
/// §20.1.4 and Vol. 3C §26.2.1.3).
pub(super) fn exception(cpu: &(impl CpuState + ?Sized), vector: u8) -> Event {
    if cpu.reg(Reg::Cr0) & CR0_PE == 0 {
        Event::exception(vector)
    } else {
        Event::exception_with(vector, 0)
    }
}

/// Linear address of `size` bytes at `offset` of segment `seg`. Errors are the
/// exceptions that the CPU would raise: #SS or #GP for the segment, #AC for
/// the alignment.
pub fn linear_address(
    cpu: &(impl CpuState + ?Sized),
    mode: CodeMode,
    seg: Seg,
    offset: u64,
    size: u8,
    access: Access,
) -> Result<LinearAddress, Event> {
    let vector = if seg == Seg::Ss { 12 } else { 13 };
    let d = cpu.seg(seg);
    let last = u64::from(size.max(1)) - 1;
    let a = if mode == CodeMode::Bits64 {
        let base = if matches!(seg, Seg::Fs | Seg::Gs) {
            d.base
        } else {
            0
        };
        let gla = base.wrapping_add(offset);
        let fits = |bits| canonical(gla, bits) && canonical(gla.wrapping_add(last), bits);
        // What 48 bits hold 57 do: CR4 is asked for the others only, for in userland
        // that takes a system call.
        if !(fits(48) || cpu.reg(Reg::Cr4) & CR4_LA57 != 0 && fits(57)) {
            return Err(exception(cpu, vector));
        }
        LinearAddress {
            gla,
            mask: u64::MAX,
        }
    } else {
        let real = cpu.reg(Reg::Cr0) & CR0_PE == 0 || cpu.reg(Reg::Rflags) & RFLAGS_VM != 0;
        if d.unusable() || !real && !type_allows(d.access, access) || !in_limit(d, offset, last) {
            return Err(exception(cpu, vector));
        }
        LinearAddress {
            gla: d.base.wrapping_add(offset) & 0xffff_ffff,
            mask: 0xffff_ffff,
        }
    };
    let misaligned = size > 1 && a.gla & (u64::from(size.min(8)) - 1) != 0;
    if misaligned
        && cpu.cpl() == 3
        && cpu.reg(Reg::Rflags) & RFLAGS_AC != 0
        && cpu.reg(Reg::Cr0) & CR0_AM != 0
    {
        return Err(Event::exception_with(17, 0));
    }
    Ok(a)
}

/// Linear address of the memory operand of an instruction that has no other, unchecked,
/// and what [`emulate`](super::emulate) does there; `None` for others, which are rare on
/// device memory.
pub fn operand(inst: &Inst, cpu: &(impl CpuState + ?Sized)) -> Option<(u64, Access)> {
    let written = inst.dst == Operand::Mem;
    let access = match inst.op {
        Op::Mov | Op::Movzx | Op::Movsx | Op::Movnti if written => Access::WRITE,
        Op::Mov | Op::Movzx | Op::Movsx | Op::Cmp | Op::Test => Access::READ,
        Op::Add | Op::Or | Op::And | Op::Sub | Op::Xor | Op::Xchg if written => {
            Access::READ | Access::WRITE
        }
        Op::Add | Op::Or | Op::And | Op::Sub | Op::Xor => Access::READ,
        _ => return None,
    };
    if !inst.has_mem() {
        return None;
    }
    let offset = inst.offset(cpu, cpu.reg(Reg::Rip));
    let long = CodeMode::of(cpu) == CodeMode::Bits64;
    Some(match (long, inst.seg) {
        (true, Seg::Fs | Seg::Gs) => (cpu.seg(inst.seg).base.wrapping_add(offset), access),
        (true, _) => (offset, access),
        (false, seg) => (cpu.seg(seg).base.wrapping_add(offset) & 0xffff_ffff, access),
    })
}

fn canonical(a: u64, bits: u32) -> bool {
    let shift = 64 - bits;
    (((a << shift) as i64) >> shift) as u64 == a
}

/// Type field of a code or data segment (SDM Vol. 3A table 3-1).
fn type_allows(access_rights: u32, access: Access) -> bool {
    let code = access_rights & 8 != 0;
    let rw = access_rights & 2 != 0;
    if access.contains(Access::WRITE) {
        !code && rw
    } else {
        !code || rw
    }
}

/// Whether the bytes `offset` to `offset + last` lie within the limit.
fn in_limit(d: crate::cpu::SegDesc, offset: u64, last: u64) -> bool {
    let limit = u64::from(d.limit);
    let Some(end) = offset.checked_add(last) else {
        return false;
    };
    let expand_down = d.access & 0xc == 4;
    if expand_down {
        let top = if d.default32() { 0xffff_ffff } else { 0xffff };
        offset > limit && end <= top
    } else {
        end <= limit
    }
}
