//! The opcode maps, as far as a hypervisor meets them (SDM Vol. 2D appendix
//! A).

use super::operand::ModRm;
use super::prefix::{Cursor, Prefixes};
use super::{CodeMode, DecodeError, Inst, Mem, Op, Operand, Raw, Rep, vex};
use crate::cpu::{Gpr, Seg};
use DecodeError::Unsupported;

pub(super) type Result<T> = core::result::Result<T, DecodeError>;

const ALU: [Op; 8] = [
    Op::Add,
    Op::Or,
    Op::Adc,
    Op::Sbb,
    Op::And,
    Op::Sub,
    Op::Xor,
    Op::Cmp,
];
/// Group 2; /6 is an alias that nothing uses.
const SHIFT: [Op; 6] = [Op::Rol, Op::Ror, Op::Rcl, Op::Rcr, Op::Shl, Op::Shr];
const BIT: [Op; 4] = [Op::Bt, Op::Bts, Op::Btr, Op::Btc];

/// Operations that take a LOCK prefix with a memory destination (SDM Vol. 2A
/// "LOCK").
fn lockable(op: Op) -> bool {
    matches!(
        op,
        Op::Add
            | Op::Adc
            | Op::And
            | Op::Btc
            | Op::Btr
            | Op::Bts
            | Op::Cmpxchg
            | Op::Cmpxchg8b
            | Op::Dec
            | Op::Inc
            | Op::Neg
            | Op::Not
            | Op::Or
            | Op::Sbb
            | Op::Sub
            | Op::Xor
            | Op::Xadd
            | Op::Xchg
    )
}

/// Decodes the instruction that `bytes` start with.
pub fn decode(bytes: &[u8], mode: CodeMode) -> Result<Inst> {
    let mut c = Cursor::new(bytes);
    let p = Prefixes::read(&mut c, mode)?;
    let mut d = Decoder {
        c,
        inst: blank(&p),
        p,
    };
    let b = d.c.u8()?;
    d.inst.raw.opcode = b;
    match b {
        0x0f => d.two_byte()?,
        0xc4 | 0xc5 => vex::decode(&mut d, b)?,
        _ => d.one_byte(b)?,
    }
    let mut i = d.inst;
    i.len = d.c.len();
    if i.lock && !(lockable(i.op) && i.dst == Operand::Mem) {
        return Err(Unsupported);
    }
    Ok(i)
}

fn blank(p: &Prefixes) -> Inst {
    Inst {
        len: 0,
        op: Op::Mov,
        dst: Operand::None,
        src: Operand::None,
        size: p.operand_size(),
        src_size: p.operand_size(),
        addr_size: p.address_size(),
        seg: p.seg.unwrap_or(Seg::Ds),
        seg_override: p.seg.is_some(),
        rep: p.rep,
        lock: p.lock,
        imm: 0,
        mem: Mem::default(),
        vex: false,
        extra: Operand::None,
        raw: Raw {
            rex: p.rex,
            operand_size: p.operand_size(),
            opsize_override: p.opsize,
            addrsize_override: p.addrsize,
            ..Raw::default()
        },
    }
}

pub(super) struct Decoder<'a> {
    pub(super) c: Cursor<'a>,
    pub(super) p: Prefixes,
    pub(super) inst: Inst,
}

impl Decoder<'_> {
    #[cfg_attr(target_os = "none", optimize(speed))]
    pub(super) fn modrm(&mut self) -> Result<ModRm> {
        let m = ModRm::read(&mut self.c, &self.p)?;
        let i = &mut self.inst;
        i.raw.modrm = Some(m.byte);
        i.raw.sib = m.sib;
        i.raw.disp_bytes = m.disp_bytes;
        if m.is_mem() {
            i.mem = m.mem;
            i.seg = self.p.seg.unwrap_or(m.seg);
        }
        Ok(m)
    }

    pub(super) fn set(&mut self, op: Op, dst: Operand, src: Operand, size: u8) {
        let i = &mut self.inst;
        i.op = op;
        i.dst = dst;
        i.src = src;
        i.size = size;
        i.src_size = size;
    }

    /// An operation without operands.
    pub(super) fn bare(&mut self, op: Op) -> Result<()> {
        self.set(op, Operand::None, Operand::None, 0);
        Ok(())
    }

    pub(super) fn imm(&mut self, bytes: u8) -> Result<()> {
        self.inst.raw.imm_bytes = bytes;
        self.inst.imm = self.c.signed(bytes)?;
        Ok(())
    }

    /// Size by the opcode's lowest bit: byte or "v".
    fn size(&self, b: u8) -> u8 {
        if b & 1 == 0 { 1 } else { self.p.operand_size() }
    }

    /// "E, G" forms: destination in rm.
    fn eg(&mut self, op: Op, size: u8) -> Result<()> {
        let m = self.modrm()?;
        self.set(op, m.rm(size), m.reg(size), size);
        Ok(())
    }

    /// "G, E" forms.
    fn ge(&mut self, op: Op, size: u8) -> Result<()> {
        let m = self.modrm()?;
        self.set(op, m.reg(size), m.rm(size), size);
        Ok(())
    }

    /// "E, imm" forms after ModRM has been read.
    fn ei(&mut self, op: Op, m: &ModRm, size: u8, imm: u8) -> Result<()> {
        self.set(op, m.rm(size), Operand::Imm, size);
        self.imm(imm)
    }

    fn extend(&mut self, op: Op, src_size: u8) -> Result<()> {
        let m = self.modrm()?;
        let size = self.p.operand_size();
        self.set(op, m.reg(size), m.rm(src_size), size);
        self.inst.src_size = src_size;
        Ok(())
    }

    fn one_byte(&mut self, b: u8) -> Result<()> {
        let size = self.size(b);
        match b {
            0x00..=0x3f if b & 7 < 4 => {
                let op = *ALU.get(usize::from(b >> 3)).ok_or(Unsupported)?;
                if b & 2 == 0 {
                    self.eg(op, size)
                } else {
                    self.ge(op, size)
                }
            }
            0x63 if self.p.long() => {
                let src = if self.p.operand_size() == 2 { 2 } else { 4 };
                self.extend(Op::Movsx, src)
            }
            0x69 | 0x6b => {
                let size = self.p.operand_size();
                self.ge(Op::Imul, size)?;
                self.inst.extra = Operand::Imm;
                self.imm(if b == 0x69 { size.min(4) } else { 1 })
            }
            0x6c..=0x6f => {
                // There are no 64-bit ports: REX.W is ignored.
                let op = if b < 0x6e { Op::Ins } else { Op::Outs };
                self.set(op, Operand::None, Operand::None, size.min(4));
                Ok(())
            }
            0x80 | 0x81 | 0x83 => {
                let m = self.modrm()?;
                let op = *ALU.get(usize::from(m.ext())).ok_or(Unsupported)?;
                self.ei(op, &m, size, if b == 0x81 { size.min(4) } else { 1 })
            }
            0x84 | 0x85 => self.eg(Op::Test, size),
            0x86 | 0x87 => self.eg(Op::Xchg, size),
            0x88 | 0x89 => self.eg(Op::Mov, size),
            0x8a | 0x8b => self.ge(Op::Mov, size),
            0x8f => {
                let m = self.modrm()?;
                let size = self.p.stack_size();
                self.set(Op::Pop, m.rm(size), Operand::None, size);
                if m.ext() == 0 {
                    Ok(())
                } else {
                    Err(Unsupported)
                }
            }
            0x90 if self.p.rep == Rep::Repe && self.p.rex & 1 == 0 => self.bare(Op::Pause),
            0xa0..=0xa3 => self.absolute(b, size),
            0xa4 | 0xa5 => self.string(Op::Movs, size),
            0xa6 | 0xa7 => self.string(Op::Cmps, size),
            0xaa | 0xab => self.string(Op::Stos, size),
            0xac | 0xad => self.string(Op::Lods, size),
            0xae | 0xaf => self.string(Op::Scas, size),
            0xc6 | 0xc7 => {
                let m = self.modrm()?;
                if m.ext() != 0 {
                    return Err(Unsupported);
                }
                self.ei(Op::Mov, &m, size, size.min(4))
            }
            0xc0 | 0xc1 | 0xd0..=0xd3 => self.group2(b, size),
            0xcc => self.bare(Op::Int3),
            0xcd => {
                self.bare(Op::Int)?;
                self.inst.src = Operand::Imm;
                self.imm(1)
            }
            0xce if !self.p.long() => self.bare(Op::Into),
            0xe4..=0xe7 | 0xec..=0xef => self.port(b, size.min(4)),
            0xf1 => self.bare(Op::Int1),
            0xf4 => self.bare(Op::Hlt),
            0xf6 | 0xf7 => {
                let m = self.modrm()?;
                match m.ext() {
                    0 => self.ei(Op::Test, &m, size, size.min(4)),
                    1 => Err(Unsupported),
                    n => {
                        let op = match n {
                            2 => Op::Not,
                            3 => Op::Neg,
                            4 => Op::Mul,
                            5 => Op::ImulWide,
                            6 => Op::Div,
                            _ => Op::Idiv,
                        };
                        self.set(op, m.rm(size), Operand::None, size);
                        Ok(())
                    }
                }
            }
            0xfe | 0xff => {
                let m = self.modrm()?;
                let (op, size) = match (m.ext(), b) {
                    (0, _) => (Op::Inc, size),
                    (1, _) => (Op::Dec, size),
                    (6, 0xff) => (Op::Push, self.p.stack_size()),
                    _ => return Err(Unsupported),
                };
                self.set(op, m.rm(size), Operand::None, size);
                Ok(())
            }
            _ => Err(Unsupported),
        }
    }

    /// Shifts and rotations by an immediate operand, by 1, by CL.
    fn group2(&mut self, b: u8, size: u8) -> Result<()> {
        let m = self.modrm()?;
        let op = match m.ext() {
            7 => Op::Sar,
            n => *SHIFT.get(usize::from(n)).ok_or(Unsupported)?,
        };
        let by_cl = b & 0xfe == 0xd2;
        let src = if by_cl {
            Operand::Reg(Gpr::Rcx)
        } else {
            Operand::Imm
        };
        self.set(op, m.rm(size), src, size);
        self.inst.src_size = 1;
        if b < 0xd0 {
            self.imm(1)
        } else {
            self.inst.imm = i64::from(!by_cl);
            Ok(())
        }
    }

    /// SHLD and SHRD.
    fn double_shift(&mut self, b: u8) -> Result<()> {
        let size = self.p.operand_size();
        self.eg(if b < 0xa8 { Op::Shld } else { Op::Shrd }, size)?;
        if b & 1 == 0 {
            self.inst.extra = Operand::Imm;
            self.imm(1)
        } else {
            self.inst.extra = Operand::Reg(Gpr::Rcx);
            Ok(())
        }
    }

    /// MOV between the accumulator and an absolute offset.
    fn absolute(&mut self, b: u8, size: u8) -> Result<()> {
        let bytes = self.inst.addr_size;
        self.inst.raw.disp_bytes = bytes;
        // Of an offset shorter than 64 bits the upper ones are cut off again.
        self.inst.mem = Mem {
            disp: self.c.signed(bytes)?,
            scale: 1,
            ..Mem::default()
        };
        let acc = Operand::Reg(Gpr::Rax);
        let (dst, src) = if b < 0xa2 {
            (acc, Operand::Mem)
        } else {
            (Operand::Mem, acc)
        };
        self.set(Op::Mov, dst, src, size);
        Ok(())
    }

    fn string(&mut self, op: Op, size: u8) -> Result<()> {
        self.set(op, Operand::None, Operand::None, size);
        Ok(())
    }

    fn port(&mut self, b: u8, size: u8) -> Result<()> {
        let acc = Operand::Reg(Gpr::Rax);
        let port = if b < 0xe8 {
            Operand::Imm
        } else {
            Operand::Reg(Gpr::Rdx)
        };
        if b & 2 == 0 {
            self.set(Op::In, acc, port, size);
        } else {
            self.set(Op::Out, port, acc, size);
        }
        if b < 0xe8 {
            self.imm(1)?;
            self.inst.imm &= 0xff;
        }
        Ok(())
    }

    fn two_byte(&mut self) -> Result<()> {
        let b = self.c.u8()?;
        self.inst.raw.opcode = b;
        self.inst.raw.escaped = true;
        let size = self.size(b);
        match b {
            0x01 => self.group7(),
            0x06 => self.bare(Op::Clts),
            0x08 => self.bare(Op::Invd),
            0x09 if self.p.rep != Rep::Repe => self.bare(Op::Wbinvd),
            0x10 | 0x11 | 0x28 | 0x29 | 0x2b | 0x6e | 0x6f | 0x7e | 0x7f | 0xd6 | 0xe7 | 0xf0 => {
                self.vector(b)
            }
            0x20..=0x23 => self.control(b),
            0x30 => self.bare(Op::Wrmsr),
            0x31 => self.bare(Op::Rdtsc),
            0x32 => self.bare(Op::Rdmsr),
            0x33 => self.bare(Op::Rdpmc),
            0x38 => self.three_byte(),
            0x40..=0x4f => {
                let size = self.p.operand_size();
                self.ge(Op::Cmov, size)
            }
            0x90..=0x9f => {
                let m = self.modrm()?;
                self.set(Op::Set, m.rm(1), Operand::None, 1);
                Ok(())
            }
            0xa2 => self.bare(Op::Cpuid),
            0xa4 | 0xa5 | 0xac | 0xad => self.double_shift(b),
            0xaf => {
                let size = self.p.operand_size();
                self.ge(Op::Imul, size)
            }
            // With F3 they are TZCNT and LZCNT.
            0xbc | 0xbd if self.p.rep == Rep::None => {
                let size = self.p.operand_size();
                self.ge(if b == 0xbc { Op::Bsf } else { Op::Bsr }, size)
            }
            0xa3 | 0xab | 0xb3 | 0xbb => {
                let op = *BIT.get(usize::from(b >> 3 & 3)).ok_or(Unsupported)?;
                self.eg(op, size)
            }
            0xae => {
                let m = self.modrm()?;
                if m.ext() != 7 || !m.is_mem() || self.p.rep != Rep::None {
                    return Err(Unsupported);
                }
                self.set(Op::Clflush, Operand::Mem, Operand::None, 1);
                Ok(())
            }
            0xb0 | 0xb1 => self.eg(Op::Cmpxchg, size),
            0xb6 | 0xbe => self.extend(if b == 0xb6 { Op::Movzx } else { Op::Movsx }, 1),
            0xb7 | 0xbf => self.extend(if b == 0xb7 { Op::Movzx } else { Op::Movsx }, 2),
            0xba => {
                let m = self.modrm()?;
                let op = m.ext().checked_sub(4).and_then(|n| BIT.get(usize::from(n)));
                let op = *op.ok_or(Unsupported)?;
                let size = self.p.operand_size();
                self.ei(op, &m, size, 1)
            }
            0xc0 | 0xc1 => self.eg(Op::Xadd, size),
            0xc3 if self.p.plain() => {
                let m = self.modrm()?;
                let size = if self.p.rex_w() { 8 } else { 4 };
                self.set(Op::Movnti, m.rm(size), m.reg(size), size);
                if m.is_mem() { Ok(()) } else { Err(Unsupported) }
            }
            0xc7 => {
                let m = self.modrm()?;
                if m.ext() != 1 || !m.is_mem() {
                    return Err(Unsupported);
                }
                let size = if self.p.rex_w() { 16 } else { 8 };
                self.set(Op::Cmpxchg8b, Operand::Mem, Operand::None, size);
                Ok(())
            }
            _ => Err(Unsupported),
        }
    }

    /// 0F 01.
    fn group7(&mut self) -> Result<()> {
        let m = self.modrm()?;
        let plain = self.p.plain();
        match (m.ext(), m.is_mem()) {
            (4, mem) => {
                let size = if mem { 2 } else { self.p.operand_size() };
                self.set(Op::Smsw, m.rm(size), Operand::None, size);
                Ok(())
            }
            (6, _) => {
                self.set(Op::Lmsw, Operand::None, m.rm(2), 2);
                Ok(())
            }
            (7, true) => {
                self.set(Op::Invlpg, Operand::Mem, Operand::None, 1);
                Ok(())
            }
            (_, true) => Err(Unsupported),
            _ if !plain => Err(Unsupported),
            _ => self.bare(match m.byte {
                0xc1 => Op::Vmcall,
                0xc2..=0xc4 => Op::Virtualization,
                0xc8 => Op::Monitor,
                0xc9 => Op::Mwait,
                0xd0 => Op::Xgetbv,
                0xd1 => Op::Xsetbv,
                0xd9 => Op::Vmmcall,
                0xd8 | 0xda..=0xdf => Op::Virtualization,
                0xf8 if self.p.long() => Op::Swapgs,
                0xf9 => Op::Rdtscp,
                _ => return Err(Unsupported),
            }),
        }
    }

    /// MOV to and from control and debug registers: the mode field is
    /// ignored, both are registers.
    fn control(&mut self, b: u8) -> Result<()> {
        let byte = self.c.u8()?;
        self.inst.raw.modrm = Some(byte);
        let n = byte >> 3 & 7 | self.p.rex_r();
        let gpr = Operand::Reg(Gpr::from_encoding(byte & 7 | self.p.rex_b()));
        let debug = b & 1 != 0;
        let special = if debug {
            Operand::Dr(n)
        } else {
            Operand::Cr(n)
        };
        let exists = if debug {
            n < 8
        } else {
            matches!(n, 0 | 2 | 3 | 4 | 8)
        };
        if !exists {
            return Err(Unsupported);
        }
        let op = if debug { Op::MovDr } else { Op::MovCr };
        let (dst, src) = if b & 2 == 0 {
            (gpr, special)
        } else {
            (special, gpr)
        };
        self.set(op, dst, src, if self.p.long() { 8 } else { 4 });
        Ok(())
    }

    /// Vector moves of the legacy encoding.
    fn vector(&mut self, b: u8) -> Result<()> {
        let p66 = self.p.opsize;
        let (op, size, store) = match (b, p66, self.p.rep) {
            (0x10 | 0x11, _, Rep::None) => (Op::VecMov, 16, b == 0x11),
            (0x10 | 0x11, _, Rep::Repe) => (Op::VecMovLow, 4, b == 0x11),
            (0x10 | 0x11, _, Rep::Repne) => (Op::VecMovLow, 8, b == 0x11),
            (0x28 | 0x29, _, Rep::None) => (Op::VecMovAligned, 16, b == 0x29),
            (0x2b, _, Rep::None) => (Op::VecMovAligned, 16, true),
            (0x6f | 0x7f, true, Rep::None) => (Op::VecMovAligned, 16, b == 0x7f),
            (0x6f | 0x7f, _, Rep::Repe) => (Op::VecMov, 16, b == 0x7f),
            (0x6e | 0x7e, true, Rep::None) => {
                (Op::VecMovLow, if self.p.rex_w() { 8 } else { 4 }, b == 0x7e)
            }
            (0x7e, _, Rep::Repe) => (Op::VecMovLow, 8, false),
            (0xd6, true, Rep::None) => (Op::VecMovLow, 8, true),
            (0xe7, true, Rep::None) => (Op::VecMovAligned, 16, true),
            (0xf0, _, Rep::Repne) => (Op::VecMov, 16, false),
            _ => return Err(Unsupported),
        };
        self.vector_operands(op, size, store)
    }

    /// Memory forms only: between registers nothing leaves the guest.
    pub(super) fn vector_operands(&mut self, op: Op, size: u8, store: bool) -> Result<()> {
        let m = self.modrm()?;
        if !m.is_mem() {
            return Err(Unsupported);
        }
        let v = Operand::Vec(m.reg_number());
        if store {
            self.set(op, Operand::Mem, v, size);
        } else {
            self.set(op, v, Operand::Mem, size);
        }
        Ok(())
    }

    /// 0F 38.
    fn three_byte(&mut self) -> Result<()> {
        let b = self.c.u8()?;
        self.inst.raw.opcode = b;
        match b {
            0x2a if self.p.opsize && self.p.rep == Rep::None => {
                self.vector_operands(Op::VecMovAligned, 16, false)
            }
            0xf0 | 0xf1 if self.p.rep == Rep::None => {
                let m = self.modrm()?;
                let size = self.p.operand_size();
                if !m.is_mem() {
                    return Err(Unsupported);
                }
                if b == 0xf0 {
                    self.set(Op::Movbe, m.reg(size), Operand::Mem, size);
                } else {
                    self.set(Op::Movbe, Operand::Mem, m.reg(size), size);
                }
                Ok(())
            }
            _ => Err(Unsupported),
        }
    }
}
