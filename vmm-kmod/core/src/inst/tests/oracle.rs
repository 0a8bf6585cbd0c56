//! Every encoding that we decode must mean to iced-x86 what it means to us.

use super::super::*;
use super::cpu::TestCpu;
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use std::format;
use std::string::String;
use std::vec::Vec;

const SEG_BASE: [u64; 6] = [
    0x100_0000,
    0x200_0000,
    0x300_0000,
    0x400_0000,
    0x7000_0000_0000,
    0x6000_0000_0000,
];

fn bits(mode: CodeMode) -> u32 {
    match mode {
        CodeMode::Bits16 => 16,
        CodeMode::Bits32 => 32,
        CodeMode::Bits64 => 64,
    }
}

fn iced(bytes: &[u8], mode: CodeMode) -> Instruction {
    Decoder::with_ip(bits(mode), bytes, 0x1000, DecoderOptions::NONE).decode()
}

const CMOV: [&str; 16] = [
    "Cmovo", "Cmovno", "Cmovb", "Cmovae", "Cmove", "Cmovne", "Cmovbe", "Cmova", "Cmovs", "Cmovns",
    "Cmovp", "Cmovnp", "Cmovl", "Cmovge", "Cmovle", "Cmovg",
];
const SET: [&str; 16] = [
    "Seto", "Setno", "Setb", "Setae", "Sete", "Setne", "Setbe", "Seta", "Sets", "Setns", "Setp",
    "Setnp", "Setl", "Setge", "Setle", "Setg",
];

/// Names that iced gives to our operation.
fn names(i: &Inst) -> Vec<String> {
    let suffix = match i.size {
        1 => "b",
        2 => "w",
        4 => "d",
        _ => "q",
    };
    let list: &[&str] = match i.op {
        Op::Movsx => &["Movsx", "Movsxd"],
        Op::Cmpxchg8b if i.size == 16 => &["Cmpxchg16b"],
        Op::VecMov => &[
            "Movups", "Movupd", "Movdqu", "Lddqu", "Vmovups", "Vmovupd", "Vmovdqu",
        ],
        Op::VecMovAligned => &[
            "Movaps", "Movapd", "Movdqa", "Movntps", "Movntpd", "Movntdq", "Movntdqa", "Vmovaps",
            "Vmovapd", "Vmovdqa", "Vmovntps", "Vmovntpd", "Vmovntdq",
        ],
        Op::VecMovLow => &["Movss", "Movsd", "Movd", "Movq"],
        Op::ImulWide => &["Imul"],
        Op::Cmov => &CMOV[usize::from(i.raw.opcode & 15)..][..1],
        Op::Set => &SET[usize::from(i.raw.opcode & 15)..][..1],
        Op::Clflush => &["Clflush", "Clflushopt"],
        Op::MovCr | Op::MovDr => &["Mov"],
        Op::Virtualization => &[
            "Vmlaunch", "Vmresume", "Vmxoff", "Vmrun", "Vmload", "Vmsave", "Stgi", "Clgi",
            "Skinit", "Invlpga",
        ],
        Op::Movs | Op::Cmps | Op::Stos | Op::Lods | Op::Scas | Op::Ins | Op::Outs => {
            return std::vec![format!("{:?}{suffix}", i.op)];
        }
        op => return std::vec![format!("{op:?}")],
    };
    list.iter().map(|s| String::from(*s)).collect()
}

fn number(r: Register) -> u8 {
    // iced numbers AH, CH, DH, BH between BL and SPL.
    match (r.number() as u8, r.size()) {
        (n, 1) if n >= 4 => n - 4,
        (n, _) => n,
    }
}

fn check_operand(
    i: &Inst,
    ii: &Instruction,
    n: u32,
    ours: Operand,
    size: u8,
    cpu: &TestCpu,
    mode: CodeMode,
) {
    let kind = ii.op_kind(n);
    match ours {
        Operand::Mem => {
            let Some(theirs) = ii.virtual_address(n, 0, |r, _, _| {
                Some(match r {
                    Register::ES => SEG_BASE[0],
                    Register::CS => SEG_BASE[1],
                    Register::SS => SEG_BASE[2],
                    Register::DS => SEG_BASE[3],
                    Register::FS => SEG_BASE[4],
                    Register::GS => SEG_BASE[5],
                    r => {
                        let v = cpu.gprs[r.number()];
                        match r.size() {
                            2 => v & 0xffff,
                            4 => v & 0xffff_ffff,
                            _ => v,
                        }
                    }
                })
            }) else {
                panic!("{kind:?} is no memory operand")
            };
            let mut base = SEG_BASE[i.seg as usize];
            if mode == CodeMode::Bits64 && !matches!(i.seg, Seg::Fs | Seg::Gs) {
                base = 0;
            }
            // iced leaves the base of flat segments to the caller.
            let theirs = if mode == CodeMode::Bits64 && base == 0 {
                let s = ii.memory_segment();
                theirs.wrapping_sub(SEG_BASE[s.number()])
            } else {
                theirs
            };
            assert_eq!(base.wrapping_add(i.offset(cpu, 0x1000)), theirs);
            if !matches!(i.op, Op::Clflush | Op::Invlpg) {
                assert_eq!(usize::from(size), ii.memory_size().size(), "memory size");
            }
            if mode != CodeMode::Bits64 {
                assert_eq!(i.seg as usize, ii.memory_segment().number(), "segment");
            }
        }
        Operand::Reg(r) => {
            assert_eq!(kind, OpKind::Register);
            let t = ii.op_register(n);
            assert!(!matches!(
                t,
                Register::AH | Register::CH | Register::DH | Register::BH
            ));
            assert_eq!(r as u8, number(t));
            let fixed = matches!(i.op, Op::Lmsw)
                || (i.op == Op::In && n == 1)
                || (i.op == Op::Out && n == 0);
            if !fixed {
                assert_eq!(usize::from(size), t.size(), "register size");
            }
        }
        Operand::HighByte(r) => {
            let t = ii.op_register(n);
            assert!(matches!(
                t,
                Register::AH | Register::CH | Register::DH | Register::BH
            ));
            assert_eq!(r as u8, number(t));
        }
        Operand::Vec(v) => {
            assert!(ii.op_register(n).is_vector_register());
            assert_eq!(v, number(ii.op_register(n)));
        }
        Operand::Cr(v) => {
            assert!(ii.op_register(n).is_cr());
            assert_eq!(v, number(ii.op_register(n)));
        }
        Operand::Dr(v) => {
            assert!(ii.op_register(n).is_dr());
            assert_eq!(v, number(ii.op_register(n)));
        }
        Operand::Imm => {
            let mask = size_mask(size);
            assert_eq!(i.imm as u64 & mask, ii.immediate(n) & mask, "immediate");
        }
        Operand::None => {}
    }
}

fn check(bytes: &[u8], mode: CodeMode, cpu: &TestCpu) -> bool {
    let i = match decode(bytes, mode) {
        Ok(i) => i,
        Err(DecodeError::Unsupported) => return false,
        Err(e) => {
            assert!(bytes.len() < 15, "{e:?} for {bytes:02x?}");
            return false;
        }
    };
    let ii = iced(bytes, mode);
    let run = || {
        assert!(!ii.is_invalid(), "invalid");
        assert_eq!(usize::from(i.len), ii.len(), "length");
        let name = format!("{:?}", ii.mnemonic());
        assert!(names(&i).contains(&name), "{name}");
        assert_eq!(i.lock, ii.has_lock_prefix());
        let string = matches!(
            i.op,
            Op::Movs | Op::Cmps | Op::Stos | Op::Lods | Op::Scas | Op::Ins | Op::Outs
        );
        if string {
            assert_eq!(i.rep == Rep::Repe, ii.has_rep_prefix());
            assert_eq!(i.rep == Rep::Repne, ii.has_repne_prefix());
            if matches!(i.op, Op::Movs | Op::Cmps | Op::Lods | Op::Outs) && mode != CodeMode::Bits64
            {
                assert_eq!(i.seg as usize, ii.memory_segment().number());
            }
            let rsi_or_rdi = (0..ii.op_count()).find_map(|n| match ii.op_kind(n) {
                OpKind::MemorySegSI | OpKind::MemoryESDI => Some(2),
                OpKind::MemorySegESI | OpKind::MemoryESEDI => Some(4),
                OpKind::MemorySegRSI | OpKind::MemoryESRDI => Some(8),
                _ => None,
            });
            assert_eq!(Some(i.addr_size), rsi_or_rdi);
            return;
        }
        if i.op == Op::Lmsw {
            check_operand(&i, &ii, 0, i.src, 2, cpu, mode);
        } else if i.op == Op::Int {
            check_operand(&i, &ii, 0, i.src, 1, cpu, mode);
        } else if i.dst != Operand::None {
            let (d, s) = if i.op == Op::Out {
                (1, i.size)
            } else {
                (i.size, i.src_size)
            };
            let s = if i.op == Op::In { 1 } else { s };
            let s = if matches!(i.op, Op::Bt | Op::Bts | Op::Btr | Op::Btc) && i.src == Operand::Imm
            {
                1
            } else {
                s
            };
            check_operand(&i, &ii, 0, i.dst, d, cpu, mode);
            if i.src != Operand::None {
                check_operand(&i, &ii, 1, i.src, s, cpu, mode);
            }
            if i.extra != Operand::None {
                let size = if matches!(i.op, Op::Shld | Op::Shrd) {
                    1
                } else {
                    i.size
                };
                check_operand(&i, &ii, 2, i.extra, size, cpu, mode);
            }
        }
    };
    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err() {
        panic!(
            "{mode:?} {bytes:02x?}\nours {i:?}\niced {ii:?} {:?}",
            ii.code()
        );
    }
    true
}

fn registers() -> TestCpu {
    let mut cpu = TestCpu::new(CodeMode::Bits64);
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    for g in &mut cpu.gprs {
        x = x
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        *g = x;
    }
    cpu
}

const TAIL: [u8; 11] = [
    0xf1, 0x82, 0x43, 0xc4, 0xa5, 0x16, 0x77, 0xe8, 0x39, 0x5a, 0x9b,
];
const MODES: [CodeMode; 3] = [CodeMode::Bits16, CodeMode::Bits32, CodeMode::Bits64];
const PREFIXES: [&[u8]; 35] = [
    &[],
    &[0x66],
    &[0x67],
    &[0xf2],
    &[0xf3],
    &[0xf0],
    &[0x26],
    &[0x2e],
    &[0x36],
    &[0x3e],
    &[0x64],
    &[0x65],
    &[0x40],
    &[0x41],
    &[0x42],
    &[0x44],
    &[0x48],
    &[0x4f],
    &[0x66, 0x67],
    &[0x66, 0x48],
    &[0x66, 0x40],
    &[0x66, 0xf0],
    &[0x66, 0xf2],
    &[0x66, 0xf3],
    &[0x67, 0x48],
    &[0x67, 0x4f],
    &[0xf3, 0x48],
    &[0xf2, 0xf3],
    &[0xf3, 0xf2],
    &[0x48, 0x66],
    &[0x64, 0x3e],
    &[0x65, 0x64],
    &[0xf0, 0x48],
    &[0xf0, 0xf2],
    &[0x67, 0x65, 0x66, 0x4a],
];

fn sweep(escape: &[u8], prefixes: &[&[u8]]) -> usize {
    let cpu = registers();
    let mut n = 0;
    for mode in MODES {
        for prefix in prefixes {
            for opcode in 0..=255 {
                let mut try_modrm = |modrm: u8| {
                    let mut bytes = [0; 15];
                    let last = [opcode, modrm];
                    let all = prefix.iter().chain(escape).chain(&last).chain(&TAIL);
                    for (b, v) in bytes.iter_mut().zip(all) {
                        *b = *v;
                    }
                    let known = check(&bytes, mode, &cpu);
                    n += usize::from(known);
                    known
                };
                // Whether an opcode is known depends on reg, and on rm only
                // between registers.
                let regs = (0xc0..=0xff).filter(|&m| try_modrm(m)).count();
                let mems = (0..0x40).step_by(8).filter(|&m| try_modrm(m)).count();
                if regs + mems > 0 {
                    (0..0xc0).for_each(|m| {
                        try_modrm(m);
                    });
                }
            }
        }
    }
    n
}

#[test]
fn one_byte_opcodes() {
    assert!(sweep(&[], &PREFIXES) > 500_000);
}

#[test]
fn two_byte_opcodes() {
    assert!(sweep(&[0x0f], &PREFIXES) > 200_000);
}

#[test]
fn three_byte_opcodes() {
    assert!(sweep(&[0x0f, 0x38], &PREFIXES) > 10_000);
}

#[test]
fn vex_opcodes() {
    let mut n = 0;
    for second in [0xf8, 0xf9, 0xfa, 0xfc, 0x78, 0x80, 0xc1, 0x00] {
        n += sweep(&[0xc5, second], &[&[], &[0x67], &[0x65], &[0x66], &[0x48]]);
    }
    for second in [0xe1, 0xe2, 0xc2, 0xe3, 0x41, 0x02, 0xa2] {
        for third in [0x78, 0xf8, 0x79, 0x7d, 0x70, 0x00, 0x80, 0x33] {
            n += sweep(&[0xc4, second, third], &[&[], &[0x67]]);
        }
    }
    assert!(n > 10_000);
}

#[test]
fn every_sib() {
    let cpu = registers();
    for mode in MODES {
        for prefix in PREFIXES {
            for modrm in [0x04, 0x4c, 0x94, 0x3c] {
                for sib in 0..=255 {
                    for opcode in [0x89, 0x8a] {
                        let mut bytes = prefix.to_vec();
                        bytes.extend_from_slice(&[opcode, modrm, sib]);
                        bytes.extend_from_slice(&TAIL);
                        bytes.truncate(15);
                        check(&bytes, mode, &cpu);
                    }
                }
            }
        }
    }
}

/// What a driver may do to a device register in one instruction must not be
/// foreign to us.
#[test]
fn no_memory_form_of_the_claimed_mnemonics_is_left_out() {
    use Mnemonic::*;
    let claimed = [
        Mov, Movzx, Movsx, Movsxd, Movnti, Movbe, Add, Or, Adc, Sbb, And, Sub, Xor, Cmp, Test, Not,
        Neg, Inc, Dec, Push, Pop, Xchg, Cmpxchg, Xadd, Cmpxchg8b, Cmpxchg16b, Bt, Bts, Btr, Btc,
        Bextr, Movsb, Movsw, Movsq, Stosb, Stosw, Stosd, Stosq, Lodsb, Lodsw, Lodsd, Lodsq, Scasb,
        Scasw, Scasd, Scasq, Cmpsb, Cmpsw, Cmpsq, Insb, Insw, Insd, Outsb, Outsw, Outsd, Movups,
        Movupd, Movaps, Movapd, Movdqu, Movdqa, Movntdq, Movntps, Lddqu, Clflush,
    ];
    for mode in MODES {
        for prefix in PREFIXES {
            for escape in [&[][..], &[0x0f], &[0x0f, 0x38]] {
                for opcode in 0..=255 {
                    for modrm in (0..0xc0).step_by(8) {
                        let mut bytes = prefix.to_vec();
                        bytes.extend_from_slice(escape);
                        bytes.extend_from_slice(&[opcode, modrm]);
                        bytes.extend_from_slice(&TAIL);
                        bytes.truncate(15);
                        let ii = iced(&bytes, mode);
                        let mem = (0..ii.op_count()).any(|n| {
                            !matches!(ii.op_kind(n), OpKind::Register)
                                && ii.memory_size().size() != 0
                        });
                        // Segment registers; aliases of 80 and F6 /0 that no
                        // compiler emits; FS and GS pushes.
                        let left_out = escape.is_empty()
                            && (matches!(opcode, 0x8c | 0x8e | 0x82)
                                || matches!(opcode, 0xf6 | 0xf7) && modrm >> 3 & 7 == 1);
                        if ii.is_invalid() || !mem || left_out || !claimed.contains(&ii.mnemonic())
                        {
                            continue;
                        }
                        let explicit = matches!(ii.mnemonic(), Push | Pop)
                            && (0..ii.op_count()).all(|n| ii.op_kind(n) != OpKind::Memory);
                        if explicit {
                            continue;
                        }
                        assert!(decode(&bytes, mode).is_ok(), "{mode:?} {bytes:02x?} {ii:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn too_short_and_too_long() {
    let full = [0x66, 0x67, 0x65, 0xc7, 0x84, 0x88, 1, 2, 3, 4, 5, 6];
    let i = decode(&full, CodeMode::Bits64).unwrap();
    assert_eq!(i.len, 12);
    for n in 0..full.len() {
        assert_eq!(
            decode(&full[..n], CodeMode::Bits64),
            Err(DecodeError::Truncated),
            "{n}"
        );
    }
    let mut long = [0x66; 32];
    long[14] = 0x89;
    assert_eq!(decode(&long, CodeMode::Bits64), Err(DecodeError::TooLong));
    long[13] = 0x89;
    long[14] = 0x07;
    assert_eq!(decode(&long, CodeMode::Bits64).unwrap().len, 15);
}
