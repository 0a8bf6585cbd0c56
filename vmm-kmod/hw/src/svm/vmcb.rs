//! The virtual machine control block (APM Vol. 2 appendix B), intercepts, exit
//! codes (appendix C) and MSR numbers.
#![allow(missing_docs)] // each is named as the manual names it

use core::mem::offset_of;

/// Segment register as the VMCB holds it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    pub selector: u16,
    /// Descriptor bits 55:52 and 47:40.
    pub attrib: u16,
    /// Bytes, granularity applied.
    pub limit: u32,
    pub base: u64,
}

/// Offset 000H, table B-1.
#[repr(C)]
pub struct Control {
    /// Reads in the lower half, writes in the upper.
    pub intercept_cr: u32,
    pub intercept_dr: u32,
    pub intercept_exceptions: u32,
    /// [`misc1`].
    pub intercept_misc1: u32,
    /// [`misc2`].
    pub intercept_misc2: u32,
    /// [`misc3`].
    pub intercept_misc3: u32,
    reserved_018: [u8; 0x24],
    pub pause_filter_threshold: u16,
    pub pause_filter_count: u16,
    pub iopm_base_pa: u64,
    pub msrpm_base_pa: u64,
    pub tsc_offset: u64,
    pub asid: u32,
    /// [`tlb`].
    pub tlb_control: u32,
    /// [`virq`].
    pub virtual_interrupt: u64,
    /// Bit 0: blocking by STI or MOV SS.
    pub interrupt_shadow: u64,
    pub exit_code: u64,
    pub exit_info1: u64,
    pub exit_info2: u64,
    pub exit_int_info: u64,
    /// Bit 0: nested paging.
    pub nested_control: u64,
    pub avic_apic_bar: u64,
    pub ghcb_pa: u64,
    pub event_inj: u64,
    pub n_cr3: u64,
    pub lbr_control: u64,
    /// [`clean`].
    pub clean: u32,
    reserved_0c4: u32,
    pub next_rip: u64,
    pub fetched_len: u8,
    pub fetched: [u8; 15],
    pub avic_backing_page: u64,
    reserved_0e8: u64,
    pub avic_logical_table: u64,
    /// Its highest index in bits 7:0.
    pub avic_physical_table: u64,
    reserved_100: [u8; 0x300],
}

/// Offset 400H, table B-2.
#[repr(C)]
pub struct State {
    pub es: Segment,
    pub cs: Segment,
    pub ss: Segment,
    pub ds: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub gdtr: Segment,
    pub ldtr: Segment,
    pub idtr: Segment,
    pub tr: Segment,
    reserved_0a0: [u8; 0x2b],
    pub cpl: u8,
    reserved_0cc: u32,
    pub efer: u64,
    reserved_0d8: [u8; 0x70],
    pub cr4: u64,
    pub cr3: u64,
    pub cr0: u64,
    pub dr7: u64,
    pub dr6: u64,
    pub rflags: u64,
    pub rip: u64,
    reserved_180: [u8; 0x58],
    pub rsp: u64,
    reserved_1e0: [u8; 0x18],
    pub rax: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub cr2: u64,
    reserved_248: [u8; 0x20],
    pub g_pat: u64,
    pub dbgctl: u64,
    pub br_from: u64,
    pub br_to: u64,
    pub last_excp_from: u64,
    pub last_excp_to: u64,
    reserved_298: [u8; 0x968],
}

/// A page.
#[repr(C)]
pub struct Vmcb {
    pub control: Control,
    pub state: State,
}

const _: () = {
    assert!(size_of::<Vmcb>() == 4096);
    assert!(offset_of!(Control, pause_filter_threshold) == 0x3c);
    assert!(offset_of!(Control, asid) == 0x58);
    assert!(offset_of!(Control, exit_code) == 0x70);
    assert!(offset_of!(Control, event_inj) == 0xa8);
    assert!(offset_of!(Control, avic_apic_bar) == 0x98);
    assert!(offset_of!(Control, clean) == 0xc0);
    assert!(offset_of!(Control, fetched) == 0xd1);
    assert!(offset_of!(Control, avic_backing_page) == 0xe0);
    assert!(offset_of!(Control, avic_logical_table) == 0xf0);
    assert!(offset_of!(Control, avic_physical_table) == 0xf8);
    assert!(offset_of!(Vmcb, state) == 0x400);
    assert!(offset_of!(State, cpl) == 0xcb);
    assert!(offset_of!(State, efer) == 0xd0);
    assert!(offset_of!(State, cr4) == 0x148);
    assert!(offset_of!(State, rip) == 0x178);
    assert!(offset_of!(State, rsp) == 0x1d8);
    assert!(offset_of!(State, rax) == 0x1f8);
    assert!(offset_of!(State, cr2) == 0x240);
    assert!(offset_of!(State, g_pat) == 0x268);
    assert!(offset_of!(State, last_excp_to) == 0x290);
};

/// Offset 00CH.
pub mod misc1 {
    pub const INTR: u32 = 1 << 0;
    pub const NMI: u32 = 1 << 1;
    pub const SMI: u32 = 1 << 2;
    pub const INIT: u32 = 1 << 3;
    pub const VINTR: u32 = 1 << 4;
    /// Writes of CR0 that change more than TS and MP.
    pub const CR0_SELECTIVE: u32 = 1 << 5;
    pub const RDPMC: u32 = 1 << 15;
    pub const CPUID: u32 = 1 << 18;
    pub const RSM: u32 = 1 << 19;
    pub const IRET: u32 = 1 << 20;
    pub const INVD: u32 = 1 << 22;
    pub const PAUSE: u32 = 1 << 23;
    pub const HLT: u32 = 1 << 24;
    pub const INVLPGA: u32 = 1 << 26;
    pub const IOIO: u32 = 1 << 27;
    pub const MSR: u32 = 1 << 28;
    pub const TASK_SWITCH: u32 = 1 << 29;
    pub const FERR_FREEZE: u32 = 1 << 30;
    pub const SHUTDOWN: u32 = 1 << 31;
}

/// Offset 010H.
pub mod misc2 {
    pub const VMRUN: u32 = 1 << 0;
    pub const VMMCALL: u32 = 1 << 1;
    pub const VMLOAD: u32 = 1 << 2;
    pub const VMSAVE: u32 = 1 << 3;
    pub const STGI: u32 = 1 << 4;
    pub const CLGI: u32 = 1 << 5;
    pub const SKINIT: u32 = 1 << 6;
    pub const RDTSCP: u32 = 1 << 7;
    pub const WBINVD: u32 = 1 << 9;
    pub const MONITOR: u32 = 1 << 10;
    pub const MWAIT: u32 = 1 << 11;
    pub const MWAIT_ARMED: u32 = 1 << 12;
    pub const XSETBV: u32 = 1 << 13;
    pub const RDPRU: u32 = 1 << 14;
}

/// Offset 014H.
pub mod misc3 {
    pub const INVPCID: u32 = 1 << 2;
}

/// Offset 05CH: what the next VMRUN flushes.
pub mod tlb {
    pub const NOTHING: u32 = 0;
    pub const EVERYTHING: u32 = 1;
    pub const THIS_ASID: u32 = 3;
}

/// Offset 060H.
pub mod virq {
    /// CR8.
    pub const TPR: u64 = 15;
    pub const PENDING: u64 = 1 << 8;
    pub const PRIORITY_HIGHEST: u64 = 15 << 16;
    pub const IGNORE_TPR: u64 = 1 << 20;
    pub const MASKING: u64 = 1 << 24;
    pub const AVIC: u64 = 1 << 31;
}

/// Offset 0C0H: what the CPU may keep from the last VMRUN of this VMCB
/// (APM Vol. 2 §15.15.3).
pub mod clean {
    /// Intercepts, TSC offset, PAUSE filter.
    pub const INTERCEPTS: u32 = 1 << 0;
    pub const ASID: u32 = 1 << 2;
    /// Offset 060H.
    pub const TPR: u32 = 1 << 3;
    /// Nested paging and G_PAT.
    pub const NESTED: u32 = 1 << 4;
    pub const CRX: u32 = 1 << 5;
    pub const DRX: u32 = 1 << 6;
    pub const DT: u32 = 1 << 7;
    /// ES, CS, SS, DS, CPL.
    pub const SEG: u32 = 1 << 8;
    pub const CR2: u32 = 1 << 9;
    /// APIC_BAR and the pages of AVIC.
    pub const AVIC: u32 = 1 << 11;
    /// All that are in use here.
    pub const ALL: u32 = 0x3ff | AVIC;
}

/// EVENTINJ and EXITINTINFO (APM Vol. 2 §15.20, §15.7.2).
pub mod event {
    pub const VECTOR: u64 = 0xff;
    pub const TYPE: u64 = 7 << 8;
    pub const ERROR_CODE: u64 = 1 << 11;
    pub const VALID: u64 = 1 << 31;
}

/// Exit codes.
pub mod code {
    pub const CR_READ: u64 = 0x00;
    pub const CR_READ_LAST: u64 = 0x0f;
    pub const CR_WRITE: u64 = 0x10;
    pub const CR_WRITE_LAST: u64 = 0x1f;
    pub const DR_READ: u64 = 0x20;
    pub const DR_READ_LAST: u64 = 0x2f;
    pub const DR_WRITE: u64 = 0x30;
    pub const DR_WRITE_LAST: u64 = 0x3f;
    pub const EXCEPTION: u64 = 0x40;
    pub const EXCEPTION_LAST: u64 = 0x5f;
    pub const INTR: u64 = 0x60;
    pub const NMI: u64 = 0x61;
    pub const SMI: u64 = 0x62;
    pub const INIT: u64 = 0x63;
    pub const VINTR: u64 = 0x64;
    pub const CR0_SELECTIVE: u64 = 0x65;
    pub const RDPMC: u64 = 0x6f;
    pub const CPUID: u64 = 0x72;
    pub const RSM: u64 = 0x73;
    pub const IRET: u64 = 0x74;
    pub const INVD: u64 = 0x76;
    pub const PAUSE: u64 = 0x77;
    pub const HLT: u64 = 0x78;
    pub const INVLPGA: u64 = 0x7a;
    pub const IOIO: u64 = 0x7b;
    pub const MSR: u64 = 0x7c;
    pub const TASK_SWITCH: u64 = 0x7d;
    pub const FERR_FREEZE: u64 = 0x7e;
    pub const SHUTDOWN: u64 = 0x7f;
    pub const VMRUN: u64 = 0x80;
    pub const VMMCALL: u64 = 0x81;
    pub const RDTSCP: u64 = 0x87;
    pub const WBINVD: u64 = 0x89;
    pub const MONITOR: u64 = 0x8a;
    pub const MWAIT: u64 = 0x8b;
    pub const MWAIT_ARMED: u64 = 0x8c;
    pub const XSETBV: u64 = 0x8d;
    pub const RDPRU: u64 = 0x8e;
    pub const INVPCID: u64 = 0xa2;
    pub const NPF: u64 = 0x400;
    pub const AVIC_INCOMPLETE_IPI: u64 = 0x401;
    pub const AVIC_NOACCEL: u64 = 0x402;
    /// The state in the VMCB is not one that VMRUN takes.
    pub const INVALID: u64 = u64::MAX;
}

/// MSR numbers (APM Vol. 2 appendix A).
pub mod msr {
    pub use vmm_core::msr::number::{
        CSTAR, EFER, FS_BASE, GS_BASE, KERNEL_GS_BASE, LSTAR, PAT, PRED_CMD, SFMASK, SPEC_CTRL,
        STAR, SYSENTER_CS, SYSENTER_EIP, SYSENTER_ESP, TSC_AUX, XSS,
    };
    pub const TSC_RATIO: u32 = 0xc000_0104;
    pub const VM_CR: u32 = 0xc001_0114;
    pub const VM_HSAVE_PA: u32 = 0xc001_0117;
    pub const AVIC_DOORBELL: u32 = 0xc001_011b;
}

/// EFER.SVME.
pub const EFER_SVME: u64 = 1 << 12;
/// VM_CR.SVMDIS.
pub const VM_CR_SVMDIS: u64 = 1 << 4;
