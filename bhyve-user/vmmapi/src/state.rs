//! Initial states of a vCPU.

use crate::error::Result;
use crate::vcpu::Vcpu;
use vmm_abi::layout::SegDesc;
use vmm_abi::names::RegName::{self, *};

const CR0_PE: u64 = 1;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;

/// Access rights of a descriptor that cannot be used (bit 16).
const UNUSABLE: u32 = 1 << 16;
/// Present, read/write, accessed.
const DATA16: u32 = 0x0093;
/// The same, 32-bit, limit in pages.
const DATA32: u32 = 0xc093;
/// Present, execute/read, accessed, 32-bit, limit in pages.
const CODE32: u32 = 0xc09b;
/// Present, execute/read, accessed, 64-bit.
const CODE64: u32 = 0x209b;
/// Present, busy 32/64-bit TSS.
const TSS_BUSY: u32 = 0x008b;
/// Present, LDT.
const LDT: u32 = 0x0082;

const DATA_SEGMENTS: [RegName; 5] = [Ss, Ds, Es, Fs, Gs];

const fn seg(base: u64, limit: u32, access: u32) -> SegDesc {
    SegDesc {
        base,
        limit,
        access,
    }
}

impl Vcpu {
    /// State after power-on, reset or INIT (SDM Vol. 3A §9.1.1, table 9-1).
    ///
    /// # Errors
    /// What the kernel says.
    pub fn reset(&self) -> Result<()> {
        self.set_registers(&[
            (Rflags, 2),
            (Cr0, CR0_NE),
            (Cr3, 0),
            (Cr4, 0),
            (Efer, 0),
            (Cr2, 0),
            (Dr6, 0xffff_0ff0),
            (Dr7, 0x400),
        ])?;
        self.set_desc(Cs, seg(0xffff_0000, 0xffff, DATA16))?;
        for reg in DATA_SEGMENTS {
            self.set_desc(reg, seg(0, 0xffff, DATA16))?;
        }
        self.set_desc(Gdtr, seg(0, 0xffff, 0))?;
        self.set_desc(Idtr, seg(0, 0xffff, 0))?;
        self.set_desc(Tr, seg(0, 0xffff, TSS_BUSY))?;
        self.set_desc(Ldtr, seg(0, 0xffff, LDT))?;
        self.set_registers(&[
            (Cs, 0xf000),
            (Ss, 0),
            (Ds, 0),
            (Es, 0),
            (Fs, 0),
            (Gs, 0),
            (Tr, 0),
            (Ldtr, 0),
            (Rip, 0xfff0),
            (Rax, 0),
            (Rbx, 0),
            (Rcx, 0),
            (Rdx, 0xf00),
            (Rsi, 0),
            (Rdi, 0),
            (Rbp, 0),
            (Rsp, 0),
            (R8, 0),
            (R9, 0),
            (R10, 0),
            (R11, 0),
            (R12, 0),
            (R13, 0),
            (R14, 0),
            (R15, 0),
        ])
    }

    /// 64-bit code at `rip` with page tables at `cr3` and a GDT of a null, a
    /// code and a data descriptor at `gdt_base`: how a loader starts a FreeBSD
    /// kernel. Interrupts are off.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn setup_long_mode(&self, rip: u64, cr3: u64, gdt_base: u64, rsp: u64) -> Result<()> {
        self.set_registers(&[
            (Cr0, CR0_PG | CR0_PE | CR0_NE),
            (Cr4, CR4_PAE),
            (Efer, EFER_LME_LMA),
            (Rflags, 2),
        ])?;
        self.set_desc(Cs, seg(0, 0, CODE64))?;
        for reg in DATA_SEGMENTS {
            self.set_desc(reg, seg(0, 0, DATA16))?;
        }
        self.set_desc(Tr, seg(0, 0, TSS_BUSY))?;
        self.set_desc(Ldtr, seg(0, 0, UNUSABLE))?;
        self.set_desc(Gdtr, seg(gdt_base, 3 * 8 - 1, 0))?;
        self.set_registers(&[
            (Cs, 1 << 3),
            (Ss, 2 << 3),
            (Ds, 2 << 3),
            (Es, 2 << 3),
            (Fs, 2 << 3),
            (Gs, 2 << 3),
            (Tr, 0),
            (Ldtr, 0),
            (Rip, rip),
            (Cr3, cr3),
            (Rsp, rsp),
        ])
    }

    /// Flat 32-bit code at `eip`, no paging, interrupts off, with a GDT of a
    /// null descriptor, then code and data at selectors `code` and `data`:
    /// multiboot and the Linux 32-bit boot protocol. `gdt_limit` in bytes, minus
    /// one.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn setup_flat32(&self, start: &Flat32) -> Result<()> {
        self.set_registers(&[(Cr0, CR0_PE | CR0_NE), (Cr4, 0), (Efer, 0), (Rflags, 2)])?;
        self.set_desc(Cs, seg(0, !0, CODE32))?;
        for reg in DATA_SEGMENTS {
            self.set_desc(reg, seg(0, !0, DATA32))?;
        }
        self.set_desc(Tr, seg(0, 0x67, TSS_BUSY))?;
        self.set_desc(Ldtr, seg(0, 0, UNUSABLE))?;
        self.set_desc(Gdtr, seg(start.gdt_base, start.gdt_limit, 0))?;
        let data = u64::from(start.data_selector);
        self.set_registers(&[
            (Cs, u64::from(start.code_selector)),
            (Ss, data),
            (Ds, data),
            (Es, data),
            (Fs, data),
            (Gs, data),
            (Tr, 0),
            (Ldtr, 0),
            (Rip, u64::from(start.eip)),
            (Rsp, u64::from(start.esp)),
        ])
    }
}

/// Where flat 32-bit code starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flat32 {
    /// Entry point.
    pub eip: u32,
    /// Stack pointer.
    pub esp: u32,
    /// Guest-physical address of the GDT.
    pub gdt_base: u64,
    /// Its limit: length in bytes minus one.
    pub gdt_limit: u32,
    /// Selector of the code descriptor.
    pub code_selector: u16,
    /// Selector of the data descriptor.
    pub data_selector: u16,
}
