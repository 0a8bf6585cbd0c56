//! Arithmetic with its flags (SDM Vol. 1 §3.4.3.1, Vol. 2 per instruction).

use super::{Op, size_mask};

pub(super) const CF: u64 = 1;
pub(super) const PF: u64 = 1 << 2;
pub(super) const AF: u64 = 1 << 4;
pub(super) const ZF: u64 = 1 << 6;
pub(super) const SF: u64 = 1 << 7;
pub(super) const OF: u64 = 1 << 11;
/// The six status flags.
pub(super) const STATUS: u64 = CF | PF | AF | ZF | SF | OF;

/// A result and RFLAGS after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Res {
    pub(super) value: u64,
    pub(super) flags: u64,
}

fn sign(size: u8) -> u64 {
    1 << (u32::from(size.min(8)) * 8 - 1)
}

/// ZF, SF and PF of a result that is cut to size.
pub(super) fn zsp(v: u64, size: u8) -> u64 {
    let mut f = 0;
    if v == 0 {
        f |= ZF;
    }
    if v & sign(size) != 0 {
        f |= SF;
    }
    if (v as u8).count_ones().is_multiple_of(2) {
        f |= PF;
    }
    f
}

/// `a + b + carry`.
pub(super) fn add(a: u64, b: u64, carry: u64, size: u8, flags: u64) -> Res {
    let m = size_mask(size);
    let (a, b) = (a & m, b & m);
    let wide = u128::from(a) + u128::from(b) + u128::from(carry);
    let r = wide as u64 & m;
    let mut f = flags & !STATUS | zsp(r, size) | (a ^ b ^ r) & AF;
    if wide > u128::from(m) {
        f |= CF;
    }
    if (a ^ r) & (b ^ r) & sign(size) != 0 {
        f |= OF;
    }
    Res { value: r, flags: f }
}

/// `a - b - borrow`.
pub(super) fn sub(a: u64, b: u64, borrow: u64, size: u8, flags: u64) -> Res {
    let m = size_mask(size);
    let (a, b) = (a & m, b & m);
    let r = a.wrapping_sub(b).wrapping_sub(borrow) & m;
    let mut f = flags & !STATUS | zsp(r, size) | (a ^ b ^ r) & AF;
    if u128::from(a) < u128::from(b) + u128::from(borrow) {
        f |= CF;
    }
    if (a ^ b) & (a ^ r) & sign(size) != 0 {
        f |= OF;
    }
    Res { value: r, flags: f }
}

/// A logical result: CF and OF cleared; AF, undefined, as well.
pub(super) fn logic(v: u64, size: u8, flags: u64) -> Res {
    let v = v & size_mask(size);
    Res {
        value: v,
        flags: flags & !STATUS | zsp(v, size),
    }
}

/// Two-operand arithmetic: `dst op src`. CMP and TEST give a result that is
/// not to be stored.
pub(super) fn binary(op: Op, a: u64, b: u64, size: u8, flags: u64) -> Option<Res> {
    Some(match op {
        Op::Add | Op::Xadd => add(a, b, 0, size, flags),
        Op::Adc => add(a, b, flags & CF, size, flags),
        Op::Sub | Op::Cmp => sub(a, b, 0, size, flags),
        Op::Sbb => sub(a, b, flags & CF, size, flags),
        Op::And | Op::Test => logic(a & b, size, flags),
        Op::Or => logic(a | b, size, flags),
        Op::Xor => logic(a ^ b, size, flags),
        _ => return None,
    })
}

/// NOT, NEG, INC, DEC.
pub(super) fn unary(op: Op, a: u64, size: u8, flags: u64) -> Option<Res> {
    Some(match op {
        Op::Not => Res {
            value: !a & size_mask(size),
            flags,
        },
        Op::Neg => sub(0, a, 0, size, flags),
        // INC and DEC leave CF alone.
        Op::Inc => keep_cf(add(a, 1, 0, size, flags), flags),
        Op::Dec => keep_cf(sub(a, 1, 0, size, flags), flags),
        _ => return None,
    })
}

fn keep_cf(r: Res, flags: u64) -> Res {
    Res {
        value: r.value,
        flags: r.flags & !CF | flags & CF,
    }
}

/// BT, BTS, BTR, BTC of bit `n`: CF is the old bit, the other flags stay.
pub(super) fn bit(op: Op, v: u64, n: u32, flags: u64) -> Option<Res> {
    let mask = 1u64.checked_shl(n)?;
    let flags = if v & mask != 0 {
        flags | CF
    } else {
        flags & !CF
    };
    let value = match op {
        Op::Bt => v,
        Op::Bts => v | mask,
        Op::Btr => v & !mask,
        Op::Btc => v ^ mask,
        _ => return None,
    };
    Some(Res { value, flags })
}

/// BEXTR: ZF by the result, CF and OF cleared; the others, undefined, too.
pub(super) fn bextr(src: u64, control: u64, size: u8, flags: u64) -> Res {
    let (start, len) = (control as u32 & 0xff, control as u32 >> 8 & 0xff);
    let v = (src & size_mask(size)).checked_shr(start).unwrap_or(0);
    let v = match 1u64.checked_shl(len) {
        Some(bit) => v & (bit - 1),
        None => v,
    };
    let zf = if v == 0 { ZF } else { 0 };
    Res {
        value: v,
        flags: flags & !STATUS | zf,
    }
}

/// Sign-extends the low `size` bytes.
pub(super) fn sign_extend(v: u64, size: u8) -> u64 {
    match size {
        1 => v as i8 as u64,
        2 => v as i16 as u64,
        4 => v as i32 as u64,
        _ => v,
    }
}
