//! Instructions that the hypervisor finishes for the guest: decoding
//! ([`decode`]) and emulation ([`emulate`]). Used by the kernel piece and by
//! `bhyve`.

mod address;
mod alu;
mod decode;
mod emulate;
mod operand;
mod prefix;
mod shift;
mod strings;
mod vex;
mod vie;

pub use address::{LinearAddress, linear_address, operand};
pub use decode::decode;
pub use emulate::{Bus, BusError, Hint, Outcome, REP_LIMIT, emulate};
pub use vie::vie;

use crate::cpu::{CpuState, Gpr, Seg};

/// Default operand and address size of the code that is executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodeMode {
    /// Real mode, virtual-8086 mode, 16-bit segments.
    Bits16,
    /// 32-bit segments, compatibility mode included.
    Bits32,
    /// 64-bit mode.
    Bits64,
}

impl CodeMode {
    /// The mode that a vCPU executes in.
    pub fn of(cpu: &(impl CpuState + ?Sized)) -> Self {
        if cpu.long_mode_code() {
            CodeMode::Bits64
        } else if cpu.seg(Seg::Cs).default32() {
            CodeMode::Bits32
        } else {
            CodeMode::Bits16
        }
    }
}

/// Why there is no [`Inst`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// The bytes end before the instruction does.
    Truncated,
    /// Longer than 15 bytes: #GP(0).
    TooLong,
    /// Not an encoding that this decoder knows; whether the CPU would have
    /// executed it is not said.
    Unsupported,
}

/// What the instruction does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // named after the mnemonics
pub enum Op {
    Mov,
    Movzx,
    /// MOVSX and MOVSXD.
    Movsx,
    Movnti,
    Movbe,
    Add,
    Or,
    Adc,
    Sbb,
    And,
    Sub,
    Xor,
    Cmp,
    Test,
    Not,
    Neg,
    Inc,
    Dec,
    Push,
    Pop,
    Xchg,
    Cmpxchg,
    Xadd,
    /// CMPXCHG8B and, with size 16, CMPXCHG16B.
    Cmpxchg8b,
    Bt,
    Bts,
    Btr,
    Btc,
    Bextr,
    Bsf,
    Bsr,
    Rol,
    Ror,
    Rcl,
    Rcr,
    Shl,
    Shr,
    Sar,
    Shld,
    Shrd,
    /// One operand, result in rDX:rAX (AX).
    Mul,
    /// IMUL with one operand.
    ImulWide,
    /// IMUL with two or three operands.
    Imul,
    Div,
    Idiv,
    /// CMOVcc; the condition is in [`Raw::opcode`].
    Cmov,
    /// SETcc likewise.
    Set,
    Movs,
    Cmps,
    Stos,
    Lods,
    Scas,
    /// A whole vector register from or to memory; alignment not required.
    VecMov,
    /// The same with the alignment required (MOVAPS, MOVDQA, MOVNTDQ, …).
    VecMovAligned,
    /// MOVSS, MOVSD, MOVQ and MOVD: the low element.
    VecMovLow,
    /// CLFLUSH, CLFLUSHOPT.
    Clflush,
    In,
    Out,
    Ins,
    Outs,
    MovCr,
    MovDr,
    Clts,
    Lmsw,
    Smsw,
    Invlpg,
    Hlt,
    Pause,
    Cpuid,
    Rdmsr,
    Wrmsr,
    Rdtsc,
    Rdtscp,
    Rdpmc,
    Invd,
    Wbinvd,
    Xgetbv,
    Xsetbv,
    Monitor,
    Mwait,
    Swapgs,
    Vmcall,
    Vmmcall,
    /// The other virtualization instructions without operands: VMLAUNCH,
    /// VMRESUME, VMXOFF, VMRUN, VMLOAD, VMSAVE, STGI, CLGI, SKINIT, INVLPGA.
    Virtualization,
    Int1,
    Int3,
    Int,
    Into,
}

/// Where an operand is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    /// There is none.
    None,
    /// General-purpose register, the low `size` bytes.
    Reg(Gpr),
    /// AH, CH, DH or BH: bits 15:8 of the register.
    HighByte(Gpr),
    /// The memory operand, [`Inst::mem`].
    Mem,
    /// [`Inst::imm`].
    Imm,
    /// Control register.
    Cr(u8),
    /// Debug register.
    Dr(u8),
    /// XMM or YMM register.
    Vec(u8),
}

/// The memory operand of ModRM or of an absolute offset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mem {
    /// Base register.
    pub base: Option<Gpr>,
    /// Index register.
    pub index: Option<Gpr>,
    /// 1, 2, 4 or 8.
    pub scale: u8,
    /// Displacement, sign-extended.
    pub disp: i64,
    /// Relative to the next instruction.
    pub rip_relative: bool,
}

/// REP prefixes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rep {
    /// None.
    None,
    /// F3: REP, REPE.
    Repe,
    /// F2: REPNE.
    Repne,
}

/// The encoding's parts, for [`Inst`]'s other representations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Raw {
    /// Last byte of the opcode.
    pub opcode: u8,
    /// The opcode is of the 0F, 0F 38 or a VEX map.
    pub escaped: bool,
    /// ModRM byte, if there is one.
    pub modrm: Option<u8>,
    /// SIB byte, if there is one.
    pub sib: Option<u8>,
    /// REX byte; 0 if there is none.
    pub rex: u8,
    /// Size of "v" operands, bytes, whether there is one or not.
    pub operand_size: u8,
    /// Prefix 66 is there.
    pub opsize_override: bool,
    /// Prefix 67 is there.
    pub addrsize_override: bool,
    /// Bytes of displacement (of absolute offset).
    pub disp_bytes: u8,
    /// Bytes of immediate operand.
    pub imm_bytes: u8,
}

/// A decoded instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inst {
    /// Length, bytes.
    pub len: u8,
    /// Operation.
    pub op: Op,
    /// Destination, or the only operand.
    pub dst: Operand,
    /// Source.
    pub src: Operand,
    /// Operand size, bytes: 1 to 32. That of the destination.
    pub size: u8,
    /// Size of the source where it differs (MOVZX, MOVSX), else `size`.
    pub src_size: u8,
    /// Address size, bytes: 2, 4 or 8.
    pub addr_size: u8,
    /// Segment of the memory operand, overrides applied. For strings that of
    /// the operand at rSI.
    pub seg: Seg,
    /// A segment prefix that has an effect is there.
    pub seg_override: bool,
    /// REP prefix.
    pub rep: Rep,
    /// LOCK prefix.
    pub lock: bool,
    /// Immediate operand, sign-extended.
    pub imm: i64,
    /// Memory operand, if one of the operands is [`Operand::Mem`].
    pub mem: Mem,
    /// VEX-encoded.
    pub vex: bool,
    /// Second source of three-operand instructions (BEXTR, IMUL, SHLD, SHRD).
    pub extra: Operand,
    /// Parts of the encoding.
    pub raw: Raw,
}

impl Inst {
    /// Whether an operand is the memory operand.
    pub fn has_mem(&self) -> bool {
        self.dst == Operand::Mem || self.src == Operand::Mem
    }

    /// Offset of the memory operand within its segment, cut to the address
    /// size. `rip` is the instruction's own address.
    pub fn offset(&self, cpu: &(impl CpuState + ?Sized), rip: u64) -> u64 {
        let m = &self.mem;
        let mut a = m.disp as u64;
        if m.rip_relative {
            a = a.wrapping_add(rip).wrapping_add(u64::from(self.len));
        }
        if let Some(b) = m.base {
            a = a.wrapping_add(cpu.gpr(b));
        }
        if let Some(i) = m.index {
            a = a.wrapping_add(cpu.gpr(i).wrapping_mul(u64::from(m.scale)));
        }
        a & size_mask(self.addr_size)
    }
}

/// The low `size` bytes set (8 and more: all).
pub(crate) const fn size_mask(size: u8) -> u64 {
    match size {
        1 => 0xff,
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

#[cfg(test)]
mod tests;
