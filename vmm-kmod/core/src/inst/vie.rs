//! An [`Inst`] as FreeBSD's `struct vie`, which VM_EXITCODE_INST_EMUL carries
//! to userland and which stock `bhyve` executes by.

use super::{Inst, Operand};
use crate::cpu::{Gpr, Seg};
use vmm_abi::RegName;
use vmm_abi::limits::{
    VIE_OP_F_IMM, VIE_OP_F_IMM8, VIE_OP_F_MOFFSET, VIE_OP_F_NO_GLA_VERIFICATION, VIE_OP_F_NO_MODRM,
    vie_op_type as op_type,
};
use vmm_abi::names::VM_REG_LAST_12;
use vmm_abi::raw_exit::{Vie, VieOp};

const NONE: i32 = VM_REG_LAST_12 as i32;

fn gpr(r: Option<Gpr>) -> i32 {
    let Some(r) = r else { return NONE };
    let name = match r {
        Gpr::Rax => RegName::Rax,
        Gpr::Rcx => RegName::Rcx,
        Gpr::Rdx => RegName::Rdx,
        Gpr::Rbx => RegName::Rbx,
        Gpr::Rsp => RegName::Rsp,
        Gpr::Rbp => RegName::Rbp,
        Gpr::Rsi => RegName::Rsi,
        Gpr::Rdi => RegName::Rdi,
        Gpr::R8 => RegName::R8,
        Gpr::R9 => RegName::R9,
        Gpr::R10 => RegName::R10,
        Gpr::R11 => RegName::R11,
        Gpr::R12 => RegName::R12,
        Gpr::R13 => RegName::R13,
        Gpr::R14 => RegName::R14,
        Gpr::R15 => RegName::R15,
    };
    name as i32
}

fn seg(s: Seg) -> i32 {
    let name = match s {
        Seg::Es => RegName::Es,
        Seg::Cs => RegName::Cs,
        Seg::Ss => RegName::Ss,
        Seg::Ds => RegName::Ds,
        Seg::Fs => RegName::Fs,
        Seg::Gs => RegName::Gs,
        Seg::Ldtr => RegName::Ldtr,
        Seg::Tr => RegName::Tr,
    };
    name as i32
}

/// Type and flags of the opcodes that stock bhyve 12.1 executes; of others
/// it gets to see "not decoded".
fn operation(i: &Inst) -> Option<(u8, u16)> {
    use op_type::*;
    let no_modrm = VIE_OP_F_NO_MODRM | VIE_OP_F_NO_GLA_VERIFICATION;
    let ext = i.raw.modrm.map_or(0, |m| m >> 3 & 7);
    if i.vex {
        return None;
    }
    Some(match (i.raw.escaped, i.raw.opcode) {
        (true, 0xae) => (TWOB_GRP15, 0),
        (true, 0xb6 | 0xb7) => (MOVZX, 0),
        // It knows BT alone.
        (true, 0xba) if ext == 4 => (BITTEST, VIE_OP_F_IMM8),
        (true, 0xbe) => (MOVSX, 0),
        (false, 0x03) => (ADD, 0),
        (false, 0x0b) => (OR, 0),
        (false, 0x23) => (AND, 0),
        (false, 0x2b) => (SUB, 0),
        (false, 0x39 | 0x3b) => (CMP, 0),
        (false, 0x80 | 0x83) => (GROUP1, VIE_OP_F_IMM8),
        (false, 0x81) => (GROUP1, VIE_OP_F_IMM),
        (false, 0x88..=0x8b) => (MOV, 0),
        (false, 0x8f) => (POP, 0),
        (false, 0xa1 | 0xa3) => (MOV, VIE_OP_F_MOFFSET | VIE_OP_F_NO_MODRM),
        (false, 0xa4 | 0xa5) => (MOVS, no_modrm),
        (false, 0xaa | 0xab) => (STOS, no_modrm),
        (false, 0xc6) => (MOV, VIE_OP_F_IMM8),
        (false, 0xc7) => (MOV, VIE_OP_F_IMM),
        (false, 0xf7) if ext == 0 => (TEST, VIE_OP_F_IMM),
        (false, 0xff) if ext == 6 => (PUSH, 0),
        _ => return None,
    })
}

/// `struct vie` of an instruction whose bytes were fetched, and its length, 0
/// if it could not be decoded. `bytes` may go on behind the instruction.
#[cfg_attr(target_os = "none", optimize(speed))]
pub fn vie(bytes: &[u8], inst: Option<&Inst>) -> (Vie, u8) {
    let mut v = Vie {
        base_register: NONE,
        index_register: NONE,
        segment_register: NONE,
        ..Vie::default()
    };
    for (to, from) in v.inst.iter_mut().zip(bytes) {
        *to = *from;
    }
    v.num_valid = bytes.len().min(v.inst.len()) as u8;
    let Some(i) = inst else { return (v, 0) };
    v.num_processed = i.len;
    let r = &i.raw;
    v.set_addrsize(i.addr_size);
    // That of "v" operands, for opcodes with byte operands too: stock bhyve
    // corrects it itself.
    v.set_opsize(r.operand_size);
    v.set_rex_present(u8::from(r.rex != 0));
    v.set_rex_w(r.rex >> 3 & 1);
    v.set_rex_r(r.rex >> 2 & 1);
    v.set_rex_x(r.rex >> 1 & 1);
    v.set_rex_b(r.rex & 1);
    v.set_repz_present(u8::from(i.rep == super::Rep::Repe));
    v.set_repnz_present(u8::from(i.rep == super::Rep::Repne));
    v.set_opsize_override(u8::from(r.opsize_override));
    v.set_addrsize_override(u8::from(r.addrsize_override));
    if i.seg_override {
        v.set_segment_override(1);
        v.segment_register = seg(i.seg);
    }
    if let Some(m) = r.modrm {
        v.set_modrm_mod(m >> 6);
        v.set_modrm_reg(m >> 3 & 7 | (r.rex & 4) << 1);
        // With a SIB byte, or a displacement alone, REX.B is not rm's.
        let plain = r.sib.is_none() && !(i.mem.base.is_none() && i.has_mem());
        v.set_modrm_rm(m & 7 | if plain { (r.rex & 1) << 3 } else { 0 });
    }
    if let Some(s) = r.sib {
        v.set_sib_ss(s >> 6);
        v.set_sib_index(s >> 3 & 7 | (r.rex & 2) << 2);
        v.set_sib_base(s & 7 | (r.rex & 1) << 3);
    }
    if i.has_mem() {
        v.base_register = if i.mem.rip_relative {
            RegName::Rip as i32
        } else {
            gpr(i.mem.base)
        };
        v.index_register = gpr(i.mem.index);
        if i.mem.index.is_some() {
            v.scale = i.mem.scale;
        }
        v.displacement = i.mem.disp;
        v.disp_bytes = r.disp_bytes;
    }
    if r.imm_bytes != 0 {
        v.imm_bytes = r.imm_bytes;
        v.immediate = i.imm;
    }
    if i.dst == Operand::None && i.src == Operand::None && r.modrm.is_some() {
        return (v, i.len);
    }
    if let Some((op_type, op_flags)) = operation(i) {
        v.op = VieOp {
            op_byte: r.opcode,
            op_type,
            op_flags,
        };
        v.decoded = 1;
    }
    (v, i.len)
}
