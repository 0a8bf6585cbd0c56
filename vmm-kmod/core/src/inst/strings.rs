//! MOVS, CMPS, STOS, LODS, SCAS and REP (SDM Vol. 1 §7.3.9).

use super::alu::{self, ZF};
use super::emulate::{Bus, Machine, REP_LIMIT, Result};
use super::{Op, Operand, Rep, size_mask};
use crate::cpu::{Access, CpuState, Gpr, Reg, Seg};

const RFLAGS_DF: u64 = 1 << 10;

/// True if the instruction is over, false if iterations are left.
pub(super) fn run<C: CpuState + ?Sized, B: Bus>(m: &mut Machine<'_, C, B>) -> Result<bool> {
    let rep = m.inst.rep;
    if rep == Rep::None {
        one(m)?;
        return Ok(true);
    }
    let mask = size_mask(m.inst.addr_size);
    let compares = matches!(m.inst.op, Op::Cmps | Op::Scas);
    for _ in 0..REP_LIMIT {
        let left = m.cpu.gpr(Gpr::Rcx) & mask;
        if left == 0 {
            return Ok(true);
        }
        one(m)?;
        m.set_reg(
            Operand::Reg(Gpr::Rcx),
            m.inst.addr_size,
            left.wrapping_sub(1),
        );
        if compares {
            let equal = m.cpu.reg(Reg::Rflags) & ZF != 0;
            if equal != (rep == Rep::Repe) {
                return Ok(true);
            }
        }
    }
    Ok(m.cpu.gpr(Gpr::Rcx) & mask == 0)
}

/// One iteration: memory first, then registers.
fn one<C: CpuState + ?Sized, B: Bus>(m: &mut Machine<'_, C, B>) -> Result<()> {
    let (op, size, seg) = (m.inst.op, m.inst.size, m.inst.seg);
    let mask = size_mask(m.inst.addr_size);
    let si = m.cpu.gpr(Gpr::Rsi) & mask;
    let di = m.cpu.gpr(Gpr::Rdi) & mask;
    let acc = m.cpu.gpr(Gpr::Rax) & size_mask(size);
    match op {
        Op::Movs => {
            let from = m.at(seg, si, size, Access::READ)?;
            // The destination's faults come before a device is read.
            let to = m.at(Seg::Es, di, size, Access::WRITE)?;
            let v = m.load(from, size)?;
            m.store(to, size, v)?;
        }
        Op::Stos => {
            let to = m.at(Seg::Es, di, size, Access::WRITE)?;
            m.store(to, size, acc)?;
        }
        Op::Lods => {
            let from = m.at(seg, si, size, Access::READ)?;
            let v = m.load(from, size)?;
            m.set_reg(Operand::Reg(Gpr::Rax), size, v);
        }
        Op::Cmps | Op::Scas => {
            let a = if op == Op::Cmps {
                let from = m.at(seg, si, size, Access::READ)?;
                let to = m.at(Seg::Es, di, size, Access::READ)?;
                let a = m.load(from, size)?;
                (a, m.load(to, size)?)
            } else {
                let to = m.at(Seg::Es, di, size, Access::READ)?;
                (acc, m.load(to, size)?)
            };
            let r = alu::sub(a.0, a.1, 0, size, m.cpu.reg(Reg::Rflags));
            m.set_flags(r.flags);
        }
        _ => {}
    }
    let step = u64::from(size);
    let step = if m.cpu.reg(Reg::Rflags) & RFLAGS_DF != 0 {
        step.wrapping_neg()
    } else {
        step
    };
    if matches!(op, Op::Movs | Op::Cmps | Op::Lods) {
        advance(m, Gpr::Rsi, si.wrapping_add(step));
    }
    if op != Op::Lods {
        advance(m, Gpr::Rdi, di.wrapping_add(step));
    }
    Ok(())
}

/// An index register changes within the address size.
fn advance<C: CpuState + ?Sized, B: Bus>(m: &mut Machine<'_, C, B>, r: Gpr, v: u64) {
    m.set_reg(Operand::Reg(r), m.inst.addr_size, v);
}
