//! Shifts, rotations, multiplication, division, bit scans and conditions
//! (SDM Vol. 2 per instruction). Where the manual leaves a flag undefined it
//! is left alone.

use super::alu::{CF, OF, PF, Res, SF, STATUS, ZF, sign_extend, zsp};
use super::{Op, size_mask};

fn bits(size: u8) -> u32 {
    u32::from(size.clamp(1, 8)) * 8
}

/// Bit `n` of `v`.
fn at(v: u128, n: u32) -> bool {
    v.checked_shr(n).unwrap_or(0) & 1 != 0
}

fn put(flags: u64, bit: u64, on: bool) -> u64 {
    if on { flags | bit } else { flags & !bit }
}

/// Count of a shift as the CPU masks it.
fn masked(count: u64, size: u8) -> u32 {
    (count & if size == 8 { 0x3f } else { 0x1f }) as u32
}

/// SHL, SHR, SAR, ROL, ROR, RCL, RCR.
pub(super) fn shift(op: Op, v: u64, count: u64, size: u8, flags: u64) -> Option<Res> {
    let n = bits(size);
    let m = size_mask(size);
    let v = v & m;
    let count = masked(count, size);
    if count == 0 {
        return Some(Res { value: v, flags });
    }
    let top = |r: u64| at(u128::from(r), n - 1);
    let wide = u128::from(v);
    Some(match op {
        Op::Shl => {
            // Up to 63 bits to the left of up to 64.
            let r = wide.checked_shl(count)?;
            let value = r as u64 & m;
            let cf = at(r, n);
            let f = put(flags & !STATUS | zsp(value, size), CF, cf);
            Res {
                value,
                flags: put(f, OF, top(value) != cf),
            }
        }
        Op::Shr => {
            let value = v.checked_shr(count).unwrap_or(0);
            let f = put(flags & !STATUS | zsp(value, size), CF, at(wide, count - 1));
            Res {
                value,
                flags: put(f, OF, top(v)),
            }
        }
        Op::Sar => {
            let s = sign_extend(v, size) as i64;
            let value = (s >> count.min(63)) as u64 & m;
            let cf = s >> (count - 1).min(63) & 1 != 0;
            Res {
                value,
                flags: put(flags & !STATUS | zsp(value, size), CF, cf),
            }
        }
        Op::Rol | Op::Ror => {
            let left = if op == Op::Rol {
                count % n
            } else {
                (n - count % n) % n
            };
            let value = (wide << left | wide >> (n - left)) as u64 & m;
            let (cf, of) = if op == Op::Rol {
                (value & 1 != 0, top(value) != (value & 1 != 0))
            } else {
                (top(value), top(value) != at(u128::from(value), n - 2))
            };
            Res {
                value,
                flags: put(put(flags, CF, cf), OF, of),
            }
        }
        Op::Rcl | Op::Rcr => {
            // CF is the bit above the operand.
            let ring = n + 1;
            let all = wide | u128::from(flags & CF) << n;
            let left = if op == Op::Rcl {
                count % ring
            } else {
                (ring - count % ring) % ring
            };
            let r = all << left | all >> (ring - left);
            let value = r as u64 & m;
            let cf = at(r, n);
            let of = if op == Op::Rcl {
                top(value) != cf
            } else {
                top(value) != at(u128::from(value), n - 2)
            };
            Res {
                value,
                flags: put(put(flags, CF, cf), OF, of),
            }
        }
        _ => return None,
    })
}

/// SHLD, SHRD: bits of `fill` move into `v`.
pub(super) fn double(op: Op, v: u64, fill: u64, count: u64, size: u8, flags: u64) -> Option<Res> {
    let n = bits(size);
    let m = size_mask(size);
    let (v, fill) = (v & m, fill & m);
    let count = masked(count, size);
    if count == 0 {
        return Some(Res { value: v, flags });
    }
    // More than the operand's 16 bits: undefined, nothing is as good as any.
    if count > n {
        return Some(Res { value: v, flags });
    }
    let (value, cf) = if op == Op::Shld {
        let pair = u128::from(v) << n | u128::from(fill);
        (
            (pair >> (n - count)) as u64 & m,
            at(u128::from(v), n - count),
        )
    } else {
        let pair = u128::from(fill) << n | u128::from(v);
        ((pair >> count) as u64 & m, at(u128::from(v), count - 1))
    };
    let of = (value ^ v) >> (n - 1) & 1 != 0;
    let f = put(flags & !STATUS | zsp(value, size), CF, cf);
    Some(Res {
        value,
        flags: put(f, OF, of),
    })
}

/// The double-width product: low and high half, and CF = OF: the high half
/// says something.
pub(super) fn multiply(a: u64, b: u64, size: u8, signed: bool) -> (u64, u64, bool) {
    let n = bits(size);
    let m = size_mask(size);
    if signed {
        let p = i128::from(sign_extend(a, size) as i64) * i128::from(sign_extend(b, size) as i64);
        let lo = p as u64 & m;
        (
            lo,
            (p >> n) as u64 & m,
            i128::from(sign_extend(lo, size) as i64) != p,
        )
    } else {
        let p = u128::from(a & m) * u128::from(b & m);
        let hi = (p >> n) as u64 & m;
        (p as u64 & m, hi, hi != 0)
    }
}

/// Quotient and remainder of `hi:lo / d`; `None` is #DE.
pub(super) fn divide(lo: u64, hi: u64, d: u64, size: u8, signed: bool) -> Option<(u64, u64)> {
    let n = bits(size);
    let m = size_mask(size);
    let wide = u128::from(hi & m) << n | u128::from(lo & m);
    if signed {
        let unused = 128 - 2 * n;
        let wide = ((wide << unused) as i128) >> unused;
        let d = i128::from(sign_extend(d, size) as i64);
        let (q, r) = (wide.checked_div(d)?, wide.checked_rem(d)?);
        if i128::from(sign_extend(q as u64 & m, size) as i64) != q {
            return None;
        }
        Some((q as u64 & m, r as u64 & m))
    } else {
        let d = u128::from(d & m);
        let (q, r) = (wide.checked_div(d)?, wide.checked_rem(d)?);
        if q > u128::from(m) {
            return None;
        }
        Some((q as u64, r as u64))
    }
}

/// Flags of a multiplication.
pub(super) fn overflow(flags: u64, on: bool) -> u64 {
    put(put(flags, CF, on), OF, on)
}

/// The condition of Jcc, SETcc and CMOVcc (SDM Vol. 1 appendix B); the low
/// four bits of `code`.
pub(super) fn condition(code: u8, flags: u64) -> bool {
    let set = |b: u64| flags & b != 0;
    let c = match code >> 1 & 7 {
        0 => set(OF),
        1 => set(CF),
        2 => set(ZF),
        3 => set(CF) || set(ZF),
        4 => set(SF),
        5 => set(PF),
        6 => set(SF) != set(OF),
        _ => set(ZF) || set(SF) != set(OF),
    };
    c != (code & 1 != 0)
}
