//! MSR numbers (SDM Vol. 4 §2.1, APM Vol. 2 appendix A).
#![allow(missing_docs)] // each is named as the manual names it

pub const P5_MC_ADDR: u32 = 0x0;
pub const P5_MC_TYPE: u32 = 0x1;
pub const TSC: u32 = 0x10;
pub const PLATFORM_ID: u32 = 0x17;
pub const APIC_BASE: u32 = 0x1b;
pub const SMI_COUNT: u32 = 0x34;
pub const FEATURE_CONTROL: u32 = 0x3a;
pub const TSC_ADJUST: u32 = 0x3b;
pub const SPEC_CTRL: u32 = 0x48;
pub const PRED_CMD: u32 = 0x49;
pub const BIOS_UPDT_TRIG: u32 = 0x79;
/// AMD's PATCH_LEVEL has the same number.
pub const BIOS_SIGN_ID: u32 = 0x8b;
pub const PLATFORM_INFO: u32 = 0xce;
pub const MTRR_CAP: u32 = 0xfe;
pub const ARCH_CAPABILITIES: u32 = 0x10a;
pub const FLUSH_CMD: u32 = 0x10b;
pub const MISC_FEATURES_ENABLES: u32 = 0x140;
pub const SYSENTER_CS: u32 = 0x174;
pub const SYSENTER_ESP: u32 = 0x175;
pub const SYSENTER_EIP: u32 = 0x176;
pub const MCG_CAP: u32 = 0x179;
pub const MCG_STATUS: u32 = 0x17a;
pub const MCG_CTL: u32 = 0x17b;
pub const PERF_STATUS: u32 = 0x198;
pub const PERF_CTL: u32 = 0x199;
/// IA32_CLOCK_MODULATION, then THERM_INTERRUPT, THERM_STATUS.
pub const THERM_FIRST: u32 = 0x19a;
pub const THERM_STATUS: u32 = 0x19c;
pub const MISC_ENABLE: u32 = 0x1a0;
pub const TURBO_RATIO_LIMIT: u32 = 0x1ad;
pub const TURBO_RATIO_LIMIT1: u32 = 0x1ae;
pub const PACKAGE_THERM_STATUS: u32 = 0x1b1;
pub const PACKAGE_THERM_INTERRUPT: u32 = 0x1b2;
pub const LBR_SELECT: u32 = 0x1c8;
pub const LASTBRANCH_TOS: u32 = 0x1c9;
pub const DEBUGCTL: u32 = 0x1d9;
/// LASTBRANCHFROMIP, -TOIP, LASTINTFROMIP, -TOIP.
pub const LAST_FROM: u32 = 0x1db;
pub const LAST_INT_TO: u32 = 0x1de;
/// PHYSBASE0, PHYSMASK0, PHYSBASE1, …
pub const MTRR_VAR_FIRST: u32 = 0x200;
pub const MTRR_VAR_LAST: u32 = 0x213;
pub const MTRR_FIX64K: u32 = 0x250;
pub const MTRR_FIX16K_FIRST: u32 = 0x258;
pub const MTRR_FIX16K_LAST: u32 = 0x259;
pub const MTRR_FIX4K_FIRST: u32 = 0x268;
pub const MTRR_FIX4K_LAST: u32 = 0x26f;
pub const PAT: u32 = 0x277;
pub const MC_CTL2_FIRST: u32 = 0x280;
pub const MC_CTL2_LAST: u32 = 0x29f;
pub const MTRR_DEF_TYPE: u32 = 0x2ff;
pub const PERF_CAPABILITIES: u32 = 0x345;
/// IA32_MC0_CTL to the last one before the VMX capability MSRs.
pub const MC_FIRST: u32 = 0x400;
pub const MC_LAST: u32 = 0x47f;
pub const TSC_DEADLINE: u32 = 0x6e0;
pub const X2APIC_FIRST: u32 = 0x800;
pub const X2APIC_LAST: u32 = 0x8ff;
pub const XSS: u32 = 0xda0;
pub const EFER: u32 = 0xc000_0080;
pub const STAR: u32 = 0xc000_0081;
pub const LSTAR: u32 = 0xc000_0082;
pub const CSTAR: u32 = 0xc000_0083;
pub const SFMASK: u32 = 0xc000_0084;
pub const FS_BASE: u32 = 0xc000_0100;
pub const GS_BASE: u32 = 0xc000_0101;
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
pub const TSC_AUX: u32 = 0xc000_0103;
pub const K8_HWCR: u32 = 0xc001_0015;
pub const K8_VM_CR: u32 = 0xc001_0114;
pub const K8_DE_CFG: u32 = 0xc001_1029;
