//! Flags against an adder of single bits.

use super::super::Op;
use super::super::alu::*;

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
