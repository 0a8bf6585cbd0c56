//! Flags against an adder of single bits.

use super::super::Op;
use super::super::alu::*;
use super::super::shift::*;

/// Sum, carry out of the top bit, into it, and out of bit 3.
fn ripple(a: u64, b: u64, mut carry: bool, bits: u32) -> (u64, bool, bool, bool) {
    let (mut sum, mut into_top, mut half) = (0, false, false);
    for i in 0..bits {
        let (x, y) = (a >> i & 1 == 1, b >> i & 1 == 1);
        if i + 1 == bits {
            into_top = carry;
        }
        if x ^ y ^ carry {
            sum |= 1 << i;
        }
        carry = (x && y) || (carry && (x || y));
        if i == 3 {
            half = carry;
        }
    }
    (sum, carry, into_top, half)
}

fn flags(sum: u64, cf: bool, of: bool, af: bool, bits: u32) -> u64 {
    let parity = (0..8).filter(|i| sum >> i & 1 == 1).count() % 2 == 0;
    [
        (cf, CF),
        (parity, PF),
        (af, AF),
        (sum == 0, ZF),
        (sum >> (bits - 1) & 1 == 1, SF),
        (of, OF),
    ]
    .iter()
    .filter(|f| f.0)
    .map(|f| f.1)
    .sum()
}

fn check(a: u64, b: u64, size: u8) {
    let bits = u32::from(size) * 8;
    let mask = if bits == 64 { !0 } else { (1 << bits) - 1 };
    for carry in [0, CF] {
        // Flags that are not the operation's stay.
        let old = carry | 0x602;
        let c = carry != 0;
        let (s, out, into, half) = ripple(a, b, false, bits);
        let want = Res {
            value: s,
            flags: flags(s, out, out != into, half, bits) | 0x602,
        };
        assert_eq!(
            binary(Op::Add, a, b, size, old),
            Some(want),
            "{a:#x} + {b:#x}"
        );
        let (s, out, into, half) = ripple(a, b, c, bits);
        let want = Res {
            value: s,
            flags: flags(s, out, out != into, half, bits) | 0x602,
        };
        assert_eq!(
            binary(Op::Adc, a, b, size, old),
            Some(want),
            "{a:#x} + {b:#x} + {c}"
        );
        // a - b = a + !b + 1, with borrows the complements of carries.
        let (s, out, into, half) = ripple(a, !b & mask, true, bits);
        let want = Res {
            value: s,
            flags: flags(s, !out, out != into, !half, bits) | 0x602,
        };
        for op in [Op::Sub, Op::Cmp] {
            assert_eq!(binary(op, a, b, size, old), Some(want), "{a:#x} - {b:#x}");
        }
        let (s, out, into, half) = ripple(a, !b & mask, !c, bits);
        let want = Res {
            value: s,
            flags: flags(s, !out, out != into, !half, bits) | 0x602,
        };
        assert_eq!(
            binary(Op::Sbb, a, b, size, old),
            Some(want),
            "{a:#x} - {b:#x} - {c}"
        );
    }
}

#[test]
fn every_pair_of_bytes() {
    for a in 0..=255 {
        for b in 0..=255 {
            check(a, b, 1);
        }
    }
}

#[test]
fn edges_of_the_wider_sizes() {
    for size in [2, 4, 8] {
        let top = 1u64 << (u32::from(size) * 8 - 1);
        let max = top | (top - 1);
        let edges = [
            0,
            1,
            2,
            0xf,
            0x10,
            0x7f,
            0x80,
            0xff,
            top - 1,
            top,
            top + 1,
            max - 1,
            max,
        ];
        for a in edges {
            for b in edges {
                check(a, b, size);
            }
        }
    }
}

#[test]
fn inc_dec_neg_not() {
    for old in [2, 2 | CF] {
        let r = unary(Op::Inc, 0xff, 1, old).unwrap();
        assert_eq!((r.value, r.flags), (0, old & CF | 2 | ZF | PF | AF));
        let r = unary(Op::Inc, 0x7fff, 2, old).unwrap();
        assert_eq!(
            (r.value, r.flags & (OF | SF | ZF | CF)),
            (0x8000, OF | SF | old & CF)
        );
        let r = unary(Op::Dec, 0, 4, old).unwrap();
        assert_eq!(
            (r.value, r.flags & (OF | SF | AF | CF)),
            (0xffff_ffff, SF | AF | old & CF)
        );
        assert_eq!(
            unary(Op::Not, 0x55, 1, old),
            Some(Res {
                value: 0xaa,
                flags: old
            })
        );
    }
    assert_eq!(unary(Op::Neg, 0, 8, 2).unwrap().flags & (CF | ZF), ZF);
    assert_eq!(unary(Op::Neg, 1, 8, 2).unwrap().flags & (CF | ZF), CF);
    assert_eq!(
        unary(Op::Neg, 0x80, 1, 2).unwrap().flags & (CF | OF),
        CF | OF
    );
}

#[test]
fn bits_and_fields() {
    assert_eq!(
        bit(Op::Btc, 0b1010, 1, 2),
        Some(Res {
            value: 0b1000,
            flags: 2 | CF
        })
    );
    assert_eq!(
        bit(Op::Bts, 0, 63, 2 | CF),
        Some(Res {
            value: 1 << 63,
            flags: 2
        })
    );
    assert_eq!(bextr(0x1234_5678, 0x0804, 4, 2).value, 0x67);
    assert_eq!(bextr(0x1234_5678, 0xff00, 4, 2).value, 0x1234_5678);
    assert_eq!(
        bextr(!0, 0x1040, 8, 2),
        Res {
            value: 0,
            flags: 2 | ZF
        }
    );
}

/// One bit at a time, as the manual's pseudo-code does it.
fn slow_shift(op: Op, mut v: u64, count: u32, bits: u32, mut cf: bool) -> (u64, bool) {
    let top = 1u64 << (bits - 1);
    let mask = top | (top - 1);
    for _ in 0..count {
        let (out, low) = (v & top != 0, v & 1 != 0);
        (v, cf) = match op {
            Op::Shl => (v << 1, out),
            Op::Shr => (v >> 1, low),
            Op::Sar => (v >> 1 | v & top, low),
            Op::Rol => (v << 1 | u64::from(out), out),
            Op::Ror => (v >> 1 | if low { top } else { 0 }, low),
            Op::Rcl => (v << 1 | u64::from(cf), out),
            _ => (v >> 1 | if cf { top } else { 0 }, low),
        };
        v &= mask;
    }
    (v, cf)
}

#[test]
fn shifts_and_rotations() {
    for op in [
        Op::Shl,
        Op::Shr,
        Op::Sar,
        Op::Rol,
        Op::Ror,
        Op::Rcl,
        Op::Rcr,
    ] {
        for size in [1u8, 2, 4, 8] {
            let bits = u32::from(size) * 8;
            for v in [
                0,
                1,
                0x81,
                0x7f,
                0xff,
                0x8001,
                0xdead_beef,
                1 << 63,
                0x8123_4567_89ab_cdef,
            ] {
                let v = v & super::super::size_mask(size);
                for count in 0..=255u32 {
                    for old in [2, 2 | CF] {
                        let n = count & if size == 8 { 63 } else { 31 };
                        let (want, cf) = slow_shift(op, v, n, bits, old & CF != 0);
                        let r = shift(op, v, u64::from(count), size, old).unwrap();
                        assert_eq!(
                            (r.value, r.flags & CF != 0),
                            (want, cf),
                            "{op:?} {v:#x} {count} {size}"
                        );
                        if n == 0 {
                            assert_eq!(r.flags, old);
                        }
                        if n == 1 {
                            let top = |x: u64| x >> (bits - 1) & 1 != 0;
                            assert_eq!(
                                r.flags & OF != 0,
                                top(v) != top(want),
                                "{op:?} {v:#x} {size}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn double_shifts() {
    assert_eq!(
        double(Op::Shld, 0x1234_5678, 0xaaaa_aaaa, 3, 4, 2)
            .unwrap()
            .value,
        0x91a2_b3c5
    );
    assert_eq!(
        double(Op::Shrd, 0x1234_5678, 0x5555_5555, 3, 4, 2)
            .unwrap()
            .value,
        0xa246_8acf
    );
    let r = double(Op::Shld, 1 << 63, !0, 1, 8, 2).unwrap();
    assert_eq!((r.value, r.flags & (CF | OF)), (1, CF | OF));
}

#[test]
fn products_and_quotients() {
    // As kvm-unit-tests has them.
    let m = 0x3333_3333_3333_3333;
    assert_eq!(multiply(0x11, m, 1, false), (0x63, 0x03, true));
    assert_eq!(
        multiply(0x1111_1111_1111_1111, m, 8, false),
        (0x2fc9_62fc_962f_c963, 0x0369_d036_9d03_69d0, true)
    );
    assert_eq!(
        divide(
            123_456_789_012_345,
            123_456_789_012_345,
            987_654_321_098_765,
            8,
            false
        ),
        Some((0x1fff_fffb_1b96_3b33, 0x2_73ba_4384_ede2))
    );
    assert_eq!(divide(1, 2, 0, 8, false), None);
    assert_eq!(divide(0, 1, 1, 4, false), None);
    assert_eq!(multiply(0xff, 0xff, 1, true), (1, 0, false));
    assert_eq!(multiply(0x80, 0xff, 1, true), (0x80, 0, true));
    assert_eq!(divide(0xf9, 0xff, 2, 1, true), Some((0xfd, 0xff)));
    assert_eq!(divide(0x80, 0xff, 0xff, 1, true), None);
}

#[test]
fn conditions() {
    for (flags, met) in [
        (0, [1, 3, 5, 7, 9, 11, 13, 15].as_slice()),
        (CF, &[1, 2, 5, 6, 9, 11, 13, 15]),
        (ZF, &[1, 3, 4, 6, 9, 11, 13, 14]),
        (SF, &[1, 3, 5, 7, 8, 11, 12, 14]),
        (SF | OF, &[0, 3, 5, 7, 8, 11, 13, 15]),
        (PF, &[1, 3, 5, 7, 9, 10, 13, 15]),
    ] {
        for code in 0..16 {
            assert_eq!(
                condition(code, flags),
                met.contains(&code),
                "{code} {flags:#x}"
            );
        }
    }
}
