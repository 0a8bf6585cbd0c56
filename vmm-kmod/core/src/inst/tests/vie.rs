//! The fields by which stock bhyve executes an instruction.

use super::super::*;
use vmm_abi::RegName;
use vmm_abi::limits::vie_op_type;
use vmm_abi::names::VM_REG_LAST_12;

fn of(bytes: &[u8], mode: CodeMode) -> vmm_abi::raw_exit::Vie {
    let i = decode(bytes, mode).unwrap();
    let mut fetched = [0x90; 15];
    fetched[..bytes.len()].copy_from_slice(bytes);
    let (v, len) = vie(&fetched, Some(&i));
    assert_eq!(
        (usize::from(len), v.num_processed, v.num_valid),
        (bytes.len(), len, 15)
    );
    assert_eq!(v.inst, fetched);
    v
}

#[test]
fn store_with_sib_and_rex() {
    // mov [r12+r9*4-8], r10
    let v = of(&[0x4f, 0x89, 0x54, 0x8c, 0xf8], CodeMode::Bits64);
    assert_eq!(
        (v.op.op_byte, v.op.op_type, v.op.op_flags),
        (0x89, vie_op_type::MOV, 0)
    );
    assert_eq!((v.addrsize(), v.opsize(), v.decoded), (8, 8, 1));
    assert_eq!(
        (v.rex_present(), v.rex_w(), v.rex_r(), v.rex_x(), v.rex_b()),
        (1, 1, 1, 1, 1)
    );
    assert_eq!((v.modrm_mod(), v.modrm_reg(), v.modrm_rm()), (1, 10, 4));
    assert_eq!((v.sib_ss(), v.sib_index(), v.sib_base()), (2, 9, 12));
    assert_eq!((v.scale, v.disp_bytes, v.displacement), (4, 1, -8));
    assert_eq!(v.base_register, RegName::R12 as i32);
    assert_eq!(v.index_register, RegName::R9 as i32);
    assert_eq!(v.segment_register, VM_REG_LAST_12 as i32);
}

#[test]
fn rip_relative_and_byte_operands() {
    let v = of(&[0x80, 0x0d, 0x10, 0, 0, 0, 0x80], CodeMode::Bits64);
    assert_eq!(v.base_register, RegName::Rip as i32);
    assert_eq!((v.op.op_type, v.op.op_flags), (vie_op_type::GROUP1, 2));
    assert_eq!((v.imm_bytes, v.immediate, v.displacement), (1, -128, 16));
    assert_eq!((v.opsize(), v.modrm_rm()), (4, 5));
    let v = of(&[0x66, 0x65, 0x8a, 0x07], CodeMode::Bits32);
    assert_eq!(
        (v.opsize(), v.opsize_override(), v.segment_override()),
        (2, 1, 1)
    );
    assert_eq!(v.segment_register, RegName::Gs as i32);
    let v = of(&[0x67, 0x88, 0x07], CodeMode::Bits16);
    assert_eq!((v.opsize(), v.addrsize(), v.addrsize_override()), (2, 4, 1));
}

#[test]
fn strings_and_offsets() {
    let v = of(&[0xf3, 0x48, 0xa5], CodeMode::Bits64);
    assert_eq!((v.op.op_type, v.op.op_flags), (vie_op_type::MOVS, 24));
    assert_eq!((v.repz_present(), v.opsize()), (1, 8));
    let v = of(&[0xa1, 0, 0, 0xe0, 0xfe, 0, 0, 0, 0], CodeMode::Bits64);
    assert_eq!((v.op.op_flags, v.displacement), (12, 0xfee0_0000));
}

#[test]
fn what_stock_bhyve_would_execute_wrongly_is_not_shown_to_it() {
    // BTS m, imm; NOT m; INC m; ADD m, r.
    for bytes in [
        &[0x0f, 0xba, 0x2f, 3][..],
        &[0xf7, 0x17],
        &[0xff, 0x07],
        &[0x01, 0x07],
    ] {
        let v = of(bytes, CodeMode::Bits64);
        assert_eq!((v.op.op_type, v.decoded), (0, 0));
    }
    let (v, len) = vie(&[0xd9, 0x07], None);
    assert_eq!((len, v.num_valid, v.decoded), (0, 2, 0));
}
