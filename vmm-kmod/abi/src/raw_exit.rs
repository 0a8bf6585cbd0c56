//! A VM exit as C sees it: a code and a union. [`crate::exit`] is the view that
//! Rust code wants.

use crate::layout::{GuestPaging, SegDesc, abi_struct};
use crate::limits::VIE_INST_SIZE;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Bytes of the union in a VM exit.
pub const PAYLOAD_LEN: usize = 120;

abi_struct! {
    /// `struct vm_exit` of 12, 13 and 14, all of them 136 bytes.
    VmExitRaw, 136 {
        /// [`ExitCode`](crate::ExitCode).
        exitcode: u32 = 0,
        /// Length of the instruction in bytes; 0 = unknown.
        inst_length: i32 = 4,
        /// RIP of the instruction.
        rip: u64 = 8,
        /// The union.
        u: [u8; PAYLOAD_LEN] = 16,
    }
}

impl VmExitRaw {
    /// The union as the structure that the exit code says it is.
    pub fn payload<T: FromBytes + FromZeros>(&self) -> T {
        const { assert!(size_of::<T>() <= PAYLOAD_LEN) }
        match T::read_from_prefix(&self.u) {
            Ok((value, _)) => value,
            // The assertion above leaves this arm unreachable.
            Err(_) => T::new_zeroed(),
        }
    }

    /// Replaces the union; bytes behind `value` become zero.
    pub fn set_payload<T: IntoBytes + Immutable>(&mut self, value: &T) {
        const { assert!(size_of::<T>() <= PAYLOAD_LEN) }
        self.set_bytes(value.as_bytes());
    }

    // Once for all of them.
    #[inline(never)]
    fn set_bytes(&mut self, bytes: &[u8]) {
        self.u = [0; PAYLOAD_LEN];
        for (dst, src) in self.u.iter_mut().zip(bytes) {
            *dst = *src;
        }
    }
}

abi_struct! {
    /// `struct vm_inout`.
    InoutRaw, 8 {
        /// Bits 2..0 bytes, 3 in, 4 string, 5 rep.
        flags: u16 = 0,
        /// Port.
        port: u16 = 2,
        /// EAX, for OUT.
        eax: u32 = 4,
    }
}

abi_struct! {
    /// `struct vm_inout_str`.
    InoutStrRaw, 88 {
        /// As for IN and OUT.
        inout: InoutRaw = 0,
        /// Paging state.
        paging: GuestPaging = 8,
        /// RFLAGS.
        rflags: u64 = 32,
        /// CR0.
        cr0: u64 = 40,
        /// RSI or RDI.
        index: u64 = 48,
        /// RCX with a REP prefix, else 1.
        count: u64 = 56,
        /// Address size, bytes.
        addrsize: i32 = 64,
        /// [`RegName`](crate::RegName) of the segment.
        seg_name: u32 = 68,
        /// Its descriptor.
        seg_desc: SegDesc = 72,
    }
}

abi_struct! {
    /// Payload of `Paging`.
    PagingRaw, 16 {
        /// Guest-physical address.
        gpa: u64 = 0,
        /// `PROT_*` of what was tried.
        fault_type: i32 = 8,
        /// Zero.
        _pad0: u32 = 12,
    }
}

abi_struct! {
    /// Payload of `InstEmul`.
    InstEmulRaw, 120 {
        /// Guest-physical address.
        gpa: u64 = 0,
        /// Guest-linear address.
        gla: u64 = 8,
        /// Base of CS.
        cs_base: u64 = 16,
        /// CS.D.
        cs_d: i32 = 24,
        /// Zero.
        _pad0: u32 = 28,
        /// Paging state.
        paging: GuestPaging = 32,
        /// The instruction.
        vie: Vie = 56,
    }
}

abi_struct! {
    /// Payload of `Vmx`.
    VmxRaw, 24 {
        /// 0: an exit; else how VMLAUNCH or VMRESUME failed.
        status: i32 = 0,
        /// Basic exit reason (SDM Vol. 3C §24.9.1).
        exit_reason: u32 = 4,
        /// Exit qualification.
        exit_qualification: u64 = 8,
        /// Which instruction failed.
        inst_type: i32 = 16,
        /// VM-instruction error (SDM Vol. 3C §30.4).
        inst_error: i32 = 20,
    }
}

abi_struct! {
    /// Payload of `Svm` (APM Vol. 2 §15.6).
    SvmRaw, 24 {
        /// EXITCODE.
        exitcode: u64 = 0,
        /// EXITINFO1.
        exitinfo1: u64 = 8,
        /// EXITINFO2.
        exitinfo2: u64 = 16,
    }
}

abi_struct! {
    /// Payload of `Rdmsr` and `Wrmsr`.
    MsrRaw, 16 {
        /// Number of the MSR (ECX).
        code: u32 = 0,
        /// Zero.
        _pad0: u32 = 4,
        /// Value written.
        wval: u64 = 8,
    }
}

abi_struct! {
    /// Payload of `SpinupAp`.
    SpinupApRaw, 16 {
        /// The vCPU that is to start.
        vcpu: i32 = 0,
        /// Zero.
        _pad0: u32 = 4,
        /// Where it starts: the SIPI's page address.
        rip: u64 = 8,
    }
}

abi_struct! {
    /// Payload of `Hlt`.
    HltRaw, 16 {
        /// RFLAGS.
        rflags: u64 = 0,
        /// Interrupt status, of AVIC hardware.
        intr_status: u64 = 8,
    }
}

abi_struct! {
    /// Payload of `IoapicEoi`.
    IoapicEoiRaw, 4 {
        /// Vector.
        vector: i32 = 0,
    }
}

abi_struct! {
    /// Payload of `Suspended`.
    SuspendedRaw, 4 {
        /// [`SuspendHow`](crate::SuspendHow).
        how: u32 = 0,
    }
}

abi_struct! {
    /// `struct vm_task_switch`.
    TaskSwitchRaw, 48 {
        /// Selector of the new TSS.
        tsssel: u16 = 0,
        /// Zero.
        _pad0: u16 = 2,
        /// Whether an external event caused it.
        ext: i32 = 4,
        /// Error code.
        errcode: u32 = 8,
        /// Whether it is pushed on the new stack.
        errcode_valid: i32 = 12,
        /// [`TaskSwitchReason`](crate::TaskSwitchReason).
        reason: u32 = 16,
        /// Zero.
        _pad1: u32 = 20,
        /// Paging state.
        paging: GuestPaging = 24,
    }
}

abi_struct! {
    /// Payload of `Bpt` (13).
    BptRaw, 4 {
        /// Length of the instruction, bytes.
        inst_length: i32 = 0,
    }
}

abi_struct! {
    /// Payload of `Ipi` (14); `dmask` is filled in for 13's `VM_RUN` only.
    IpiRaw, 40 {
        /// Delivery mode.
        mode: u32 = 0,
        /// Vector.
        vector: u8 = 4,
        /// Zero.
        _pad0: [u8; 3] = 5,
        /// Destination vCPUs, 256 bits.
        dmask: [u64; 4] = 8,
    }
}

abi_struct! {
    /// Payload of `Db` (14).
    DbRaw, 40 {
        /// Single step.
        trace_trap: i32 = 0,
        /// A PUSHF was intercepted.
        pushf_intercept: i32 = 4,
        /// The guest's own TF.
        tf_shadow_val: i32 = 8,
        /// Zero.
        _pad0: u32 = 12,
        /// Paging state.
        paging: GuestPaging = 16,
    }
}

abi_struct! {
    /// `struct vie_op`: what the opcode means to stock bhyve's emulator.
    VieOp, 4 {
        /// Opcode byte.
        op_byte: u8 = 0,
        /// `VIE_OP_TYPE_*`.
        op_type: u8 = 1,
        /// `VIE_OP_F_*`.
        op_flags: u16 = 2,
    }
}

abi_struct! {
    /// `struct vie`: an instruction, decoded. C packs bit fields into the bytes
    /// that have accessors here. 13 added the VEX fields in bits that 12.1
    /// leaves zero.
    Vie, 64 {
        /// The bytes.
        inst: [u8; VIE_INST_SIZE] = 0,
        /// How many of them are valid.
        num_valid: u8 = 15,
        /// How many the decoder has used.
        num_processed: u8 = 16,
        /// See [`Vie::addrsize`], [`Vie::opsize`].
        b17: u8 = 17,
        /// See [`Vie::rex_w`] and following.
        b18: u8 = 18,
        /// See [`Vie::addrsize_override`], [`Vie::modrm_mod`].
        b19: u8 = 19,
        /// See [`Vie::modrm_rm`], [`Vie::sib_ss`].
        b20: u8 = 20,
        /// See [`Vie::sib_index`], [`Vie::sib_base`].
        b21: u8 = 21,
        /// Bytes of displacement.
        disp_bytes: u8 = 22,
        /// Bytes of the immediate operand.
        imm_bytes: u8 = 23,
        /// Scale: 1, 2, 4, 8.
        scale: u8 = 24,
        /// See [`Vie::vex_reg`], [`Vie::vex_pp`].
        b25: u8 = 25,
        /// Zero.
        _pad0: [u8; 2] = 26,
        /// [`RegName`](crate::RegName); `VM_REG_LAST` = none.
        base_register: i32 = 28,
        /// [`RegName`](crate::RegName); `VM_REG_LAST` = none.
        index_register: i32 = 32,
        /// [`RegName`](crate::RegName); `VM_REG_LAST` = none.
        segment_register: i32 = 36,
        /// Displacement.
        displacement: i64 = 40,
        /// Immediate operand.
        immediate: i64 = 48,
        /// 1 if the decoder succeeded.
        decoded: u8 = 56,
        /// Zero.
        _pad1: u8 = 57,
        /// The opcode.
        op: VieOp = 58,
        /// Zero.
        _pad2: [u8; 2] = 62,
    }
}

macro_rules! vie_bits {
    ($($(#[$m:meta])* $get:ident $set:ident $byte:ident $shift:literal $width:literal;)*) => {
        impl Vie {
            $(
                $(#[$m])*
                pub const fn $get(&self) -> u8 {
                    (self.$byte >> $shift) & ((1u16 << $width) - 1) as u8
                }
                /// Sets it; bits that do not fit are dropped.
                pub const fn $set(&mut self, value: u8) {
                    let mask = ((1u16 << $width) - 1) as u8;
                    self.$byte = self.$byte & !(mask << $shift) | (value & mask) << $shift;
                }
            )*
        }
    };
}

vie_bits! {
    /// Address size, bytes.
    addrsize set_addrsize b17 0 4;
    /// Operand size, bytes.
    opsize set_opsize b17 4 4;
    /// REX.W.
    rex_w set_rex_w b18 0 1;
    /// REX.R.
    rex_r set_rex_r b18 1 1;
    /// REX.X.
    rex_x set_rex_x b18 2 1;
    /// REX.B.
    rex_b set_rex_b b18 3 1;
    /// A REX prefix was there.
    rex_present set_rex_present b18 4 1;
    /// F3.
    repz_present set_repz_present b18 5 1;
    /// F2.
    repnz_present set_repnz_present b18 6 1;
    /// 66.
    opsize_override set_opsize_override b18 7 1;
    /// 67.
    addrsize_override set_addrsize_override b19 0 1;
    /// A segment prefix.
    segment_override set_segment_override b19 1 1;
    /// ModRM.mod.
    modrm_mod set_modrm_mod b19 2 2;
    /// ModRM.reg with REX.R.
    modrm_reg set_modrm_reg b19 4 4;
    /// ModRM.rm with REX.B.
    modrm_rm set_modrm_rm b20 0 4;
    /// SIB.ss.
    sib_ss set_sib_ss b20 4 2;
    /// A VEX prefix was there (13).
    vex_present set_vex_present b20 6 1;
    /// VEX.L (13).
    vex_l set_vex_l b20 7 1;
    /// SIB.index with REX.X.
    sib_index set_sib_index b21 0 4;
    /// SIB.base with REX.B.
    sib_base set_sib_base b21 4 4;
    /// VEX.vvvv (13).
    vex_reg set_vex_reg b25 0 4;
    /// VEX.pp (13).
    vex_pp set_vex_pp b25 4 2;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    /// Where clang puts each bit field of `struct vie` when it is all ones:
    /// (setter, byte, bits).
    #[test]
    fn bit_fields_are_where_the_c_compiler_puts_them() {
        type Set = fn(&mut Vie, u8);
        let expected: &[(Set, usize, u8)] = &[
            (Vie::set_rex_w, 18, 0x01),
            (Vie::set_rex_r, 18, 0x02),
            (Vie::set_rex_x, 18, 0x04),
            (Vie::set_rex_b, 18, 0x08),
            (Vie::set_rex_present, 18, 0x10),
            (Vie::set_repz_present, 18, 0x20),
            (Vie::set_repnz_present, 18, 0x40),
            (Vie::set_opsize_override, 18, 0x80),
            (Vie::set_addrsize_override, 19, 0x01),
            (Vie::set_segment_override, 19, 0x02),
            (Vie::set_modrm_mod, 19, 0x0c),
            (Vie::set_modrm_reg, 19, 0xf0),
            (Vie::set_modrm_rm, 20, 0x0f),
            (Vie::set_sib_ss, 20, 0x30),
            (Vie::set_sib_index, 21, 0x0f),
            (Vie::set_sib_base, 21, 0xf0),
        ];
        for &(set, byte, bits) in expected {
            let mut vie = Vie::default();
            set(&mut vie, 0xff);
            let ones: Vec<(usize, u8)> = vie
                .as_bytes()
                .iter()
                .copied()
                .enumerate()
                .filter(|b| b.1 != 0)
                .collect();
            assert_eq!(ones, [(byte, bits)]);
        }
    }

    #[test]
    fn setting_a_bit_field_leaves_its_neighbours() {
        let mut vie = Vie::default();
        vie.set_modrm_reg(9);
        vie.set_modrm_mod(2);
        vie.set_segment_override(1);
        vie.set_modrm_reg(6);
        assert_eq!(
            (vie.modrm_reg(), vie.modrm_mod(), vie.segment_override()),
            (6, 2, 1)
        );
        assert_eq!(vie.addrsize_override(), 0);
    }
}
