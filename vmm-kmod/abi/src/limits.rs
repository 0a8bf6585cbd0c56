//! Limits and small constants of the interface.

/// Longest name of a VM in bytes, without the terminating NUL, as FreeBSD 12.1
/// has it (`VM_MAX_NAMELEN` is 32 there and counts the NUL).
pub const VM_MAX_NAMELEN_12: usize = 31;
/// Longest name of a VM in bytes, without the NUL, from FreeBSD 13 on:
/// `SPECNAMELEN` 255 minus 10 for a prefix, 15 for a suffix and a separator.
pub const VM_MAX_NAMELEN: usize = 229;
/// Longest suffix (name of a device memory segment) from FreeBSD 13 on.
pub const VM_MAX_SUFFIXLEN: usize = 15;
/// Length of the name field of 12.1's memory segment: `SPECNAMELEN + 1`.
pub const MEMSEG_NAME_12: usize = 64;
/// `VM_MAXCPU` of 12.1. Ours is bounded by memory, not by this.
pub const VM_MAXCPU_12: u16 = 16;
/// Entries in one `VM_STATS` answer (`MAX_VM_STATS`).
pub const MAX_VM_STATS: usize = 64;
/// Bytes of a statistic's description, NUL included.
pub const STAT_DESC_LEN: usize = 128;
/// Bytes of an instruction that is being emulated.
pub const VIE_INST_SIZE: usize = 15;
/// Most memory segments a VM can have (`VM_MAX_MEMSEGS`).
pub const VM_MAX_MEMSEGS: usize = 4;
/// Most mappings of memory segments a VM can have (`VM_MAX_MEMMAPS`).
pub const VM_MAX_MEMMAPS: usize = 8;

/// Guest memory that is mapped is wired (`vm_memmap.flags`).
pub const VM_MEMMAP_F_WIRED: i32 = 0x01;
/// Set by the kernel on mappings that the IOMMU knows.
pub const VM_MEMMAP_F_IOMMU: i32 = 0x02;

/// Read access in a `prot` field (as `PROT_READ` on both hosts).
pub const PROT_READ: i32 = 1;
/// Write access.
pub const PROT_WRITE: i32 = 2;
/// Execute access.
pub const PROT_EXEC: i32 = 4;
/// All three.
pub const PROT_ALL: i32 = 7;

/// System memory (`lib/libvmmapi/vmmapi.h`).
pub const VM_SYSMEM: i32 = 0;
/// Boot ROM.
pub const VM_BOOTROM: i32 = 1;
/// Frame buffer.
pub const VM_FRAMEBUFFER: i32 = 2;

/// Guest memory below 4 GiB ends here at the latest; the rest starts at
/// [`HIGHMEM_BASE`] (`vm_open` in libvmmapi).
pub const LOWMEM_LIMIT: u64 = 3 << 30;
/// Guest-physical address of memory above the hole for PCI, bytes.
pub const HIGHMEM_BASE: u64 = 4 << 30;

/// `intinfo`: vector (APM Vol. 2 §15.20, EVENTINJ format).
pub const VM_INTINFO_VECTOR: u64 = 0xff;
/// `intinfo`: the error code in bits 63..32 is delivered.
pub const VM_INTINFO_DEL_ERRCODE: u64 = 0x800;
/// `intinfo`: bits that must be zero.
pub const VM_INTINFO_RSVD: u64 = 0x7fff_f000;
/// `intinfo`: an event is there.
pub const VM_INTINFO_VALID: u64 = 0x8000_0000;
/// `intinfo`: mask of the type.
pub const VM_INTINFO_TYPE: u64 = 0x700;
/// `intinfo`: external interrupt.
pub const VM_INTINFO_HWINTR: u64 = 0;
/// `intinfo`: NMI.
pub const VM_INTINFO_NMI: u64 = 2 << 8;
/// `intinfo`: exception.
pub const VM_INTINFO_HWEXCEPTION: u64 = 3 << 8;
/// `intinfo`: `INT n`.
pub const VM_INTINFO_SWINTR: u64 = 4 << 8;

/// Set in a register number that is a VMCS field's encoding (SDM Vol. 3D
/// appendix B) or a place in the VMCB; see [`vmcs_field`] and [`vmcb_field`].
/// The kernel lets some of them be read, by an allow-list.
pub const REG_HARDWARE: u32 = 0x8000_0000;

/// Register number of a VMCS field (`VMCS_IDENT`).
pub const fn vmcs_field(encoding: u16) -> u32 {
    REG_HARDWARE | encoding as u32
}

/// Register number of `bytes` bytes at `offset` in the VMCB (`VMCB_ACCESS`).
pub const fn vmcb_field(offset: u16, bytes: u8) -> u32 {
    REG_HARDWARE | ((bytes & 0xf) as u32) << 16 | (offset & 0xfff) as u32
}

/// What an opcode does, to the emulator of stock bhyve 12.1
/// (`vie_op.op_type`, `sys/amd64/vmm/vmm_instruction_emul.c`).
pub mod vie_op_type {
    /// Not decoded.
    pub const NONE: u8 = 0;
    /// MOV.
    pub const MOV: u8 = 1;
    /// MOVSX.
    pub const MOVSX: u8 = 2;
    /// MOVZX.
    pub const MOVZX: u8 = 3;
    /// AND.
    pub const AND: u8 = 4;
    /// OR.
    pub const OR: u8 = 5;
    /// SUB.
    pub const SUB: u8 = 6;
    /// 0F: the second byte decides.
    pub const TWO_BYTE: u8 = 7;
    /// PUSH.
    pub const PUSH: u8 = 8;
    /// CMP.
    pub const CMP: u8 = 9;
    /// POP.
    pub const POP: u8 = 10;
    /// MOVS.
    pub const MOVS: u8 = 11;
    /// Group 1: ModRM.reg decides.
    pub const GROUP1: u8 = 12;
    /// STOS.
    pub const STOS: u8 = 13;
    /// BT with an immediate operand.
    pub const BITTEST: u8 = 14;
    /// 0F AE.
    pub const TWOB_GRP15: u8 = 15;
    /// ADD.
    pub const ADD: u8 = 16;
    /// TEST.
    pub const TEST: u8 = 17;
}

/// `vie_op.op_flags`: immediate operand of 16 or 32 bits.
pub const VIE_OP_F_IMM: u16 = 1;
/// `vie_op.op_flags`: immediate operand of 8 bits.
pub const VIE_OP_F_IMM8: u16 = 2;
/// `vie_op.op_flags`: the address is in the instruction (MOV moffs).
pub const VIE_OP_F_MOFFSET: u16 = 4;
/// `vie_op.op_flags`: no ModRM byte.
pub const VIE_OP_F_NO_MODRM: u16 = 8;
/// `vie_op.op_flags`: the operand's linear address need not be the fault's.
pub const VIE_OP_F_NO_GLA_VERIFICATION: u16 = 16;
