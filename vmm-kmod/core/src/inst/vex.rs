//! VEX-encoded instructions (SDM Vol. 2A §2.3): whole-register moves and
//! BEXTR.

use super::decode::{Decoder, Result};
use super::{DecodeError::Unsupported, Op, Operand, Rep};
use crate::cpu::Gpr;

/// Decodes what follows C4 or C5.
pub(super) fn decode(d: &mut Decoder<'_>, b: u8) -> Result<()> {
    let second = d.c.peek()?;
    // Outside of 64-bit mode C4 and C5 with a memory operand are LES and LDS.
    if !d.p.long() && second < 0xc0 {
        return Err(Unsupported);
    }
    // LOCK, 66, F2, F3 and REX before VEX are #UD.
    if d.p.lock || d.p.opsize || d.p.rep != Rep::None || d.p.rex != 0 {
        return Err(Unsupported);
    }
    d.c.u8()?;
    // R, X, B are stored inverted.
    let mut rex = !(second >> 5) & 4;
    let (map, last) = if b == 0xc5 {
        (1, second)
    } else {
        rex |= !(second >> 5) & 3;
        let third = d.c.u8()?;
        (second & 0x1f, third)
    };
    let w = b == 0xc4 && last & 0x80 != 0;
    let vvvv = !(last >> 3) & 0xf;
    let long256 = last & 4 != 0;
    let pp = last & 3;
    d.p.rex = if d.p.long() { rex } else { 0 };
    d.inst.vex = true;
    d.inst.raw.escaped = true;
    let opcode = d.c.u8()?;
    d.inst.raw.opcode = opcode;
    let size = if long256 { 32 } else { 16 };
    if map == 2 && opcode == 0xf7 && pp == 0 && !long256 {
        return bextr(d, w, vvvv);
    }
    if map != 1 || vvvv != 0 {
        return Err(Unsupported);
    }
    let (op, store) = match (opcode, pp) {
        (0x10 | 0x11, 0 | 1) => (Op::VecMov, opcode == 0x11),
        (0x28 | 0x29, 0 | 1) => (Op::VecMovAligned, opcode == 0x29),
        (0x2b, 0 | 1) => (Op::VecMovAligned, true),
        (0x6f | 0x7f, 1) => (Op::VecMovAligned, opcode == 0x7f),
        (0x6f | 0x7f, 2) => (Op::VecMov, opcode == 0x7f),
        (0xe7, 1) => (Op::VecMovAligned, true),
        _ => return Err(Unsupported),
    };
    d.vector_operands(op, size, store)
}

/// BEXTR r, r/m, r: source in rm, control in vvvv.
fn bextr(d: &mut Decoder<'_>, w: bool, vvvv: u8) -> Result<()> {
    let size = if w && d.p.long() { 8 } else { 4 };
    // Outside of 64-bit mode there are eight registers.
    let control = if d.p.long() { vvvv } else { vvvv & 7 };
    let m = d.modrm()?;
    d.set(Op::Bextr, m.reg(size), m.rm(size), size);
    d.inst.extra = Operand::Reg(Gpr::from_encoding(control));
    Ok(())
}
