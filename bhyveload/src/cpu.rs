//! The state in which the boot vCPU enters each kind of kernel.

use crate::target::{Descriptor, LoadTarget, Register, TargetResult};

const CR0_PE: u64 = 1;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS with only its reserved bit, so interrupts are off.
const RFLAGS_RESERVED: u64 = 1 << 1;

const PTE_PRESENT: u64 = 1;
const PTE_WRITE: u64 = 1 << 1;
const PTE_USER: u64 = 1 << 2;
const PTE_LARGE: u64 = 1 << 7;
const LARGE_PAGE: u64 = 2 << 20;

/// Access word of an unusable segment (SDM Vol. 3C §25.4.1).
const UNUSABLE: u32 = 1 << 16;
/// A busy TSS: VM entry wants one in TR (SDM Vol. 3C §27.3.1.2).
const BUSY_TSS: u32 = 0x8b;

const SEGMENTS: [Register; 5] = [
    Register::Ds,
    Register::Es,
    Register::Fs,
    Register::Gs,
    Register::Ss,
];

/// Where the stack words, page tables and GDT of a FreeBSD kernel's entry lie.
pub mod freebsd_layout {
    /// RSP at entry.
    pub const STACK: u64 = 0x1000;
    /// PML4, whose 512 entries all name [`PDPT`].
    pub const PML4: u64 = 0x2000;
    /// PDPT, whose 512 entries all name [`PD`].
    pub const PDPT: u64 = 0x3000;
    /// PD of 2 MiB pages over the first GiB.
    pub const PD: u64 = 0x4000;
    /// Null, 64-bit code and data descriptors.
    pub const GDT: u64 = 0x5000;
    /// First byte past all of these.
    pub const END: u64 = 0x6000;
}

fn entries(table: impl Iterator<Item = u64>) -> Vec<u8> {
    table.flat_map(u64::to_le_bytes).collect()
}

fn set_segments(
    target: &mut dyn LoadTarget,
    (code_selector, code): (u64, Descriptor),
    (data_selector, data): (u64, Descriptor),
    (gdt, gdt_limit): (u64, u32),
) -> TargetResult<()> {
    target.set_descriptor(Register::Cs, code)?;
    target.set_register(Register::Cs, code_selector)?;
    for segment in SEGMENTS {
        target.set_descriptor(segment, data)?;
        target.set_register(segment, data_selector)?;
    }
    let tss = Descriptor {
        base: 0,
        limit: 0x67,
        access: BUSY_TSS,
    };
    target.set_descriptor(Register::Tr, tss)?;
    target.set_register(Register::Tr, 0)?;
    let none = Descriptor {
        base: 0,
        limit: 0,
        access: UNUSABLE,
    };
    target.set_descriptor(Register::Ldtr, none)?;
    target.set_register(Register::Ldtr, 0)?;
    let gdtr = Descriptor {
        base: gdt,
        limit: gdt_limit,
        access: 0,
    };
    target.set_descriptor(Register::Gdtr, gdtr)
}

fn set_long_mode(target: &mut dyn LoadTarget, cr3: u64, rip: u64, rsp: u64) -> TargetResult<()> {
    for (register, value) in [
        (Register::Cr0, CR0_PE | CR0_PG | CR0_NE),
        (Register::Cr4, CR4_PAE),
        (Register::Efer, EFER_LME | EFER_LMA),
        (Register::Cr3, cr3),
        (Register::Rflags, RFLAGS_RESERVED),
        (Register::Rip, rip),
        (Register::Rsp, rsp),
    ] {
        target.set_register(register, value)?;
    }
    Ok(())
}

/// Enters a FreeBSD amd64 kernel: long mode, every GiB of the address space an
/// alias of the first, and `{0, modulep, kernend}` as 32-bit words at RSP
/// (sys/amd64/amd64/locore.S).
///
/// # Errors
/// The VM refuses memory or a register.
pub fn enter_freebsd(
    target: &mut dyn LoadTarget,
    entry: u64,
    modulep: u32,
    kernend: u32,
) -> TargetResult<()> {
    use freebsd_layout::{GDT, PD, PDPT, PML4, STACK};
    const RIGHTS: u64 = PTE_PRESENT | PTE_WRITE | PTE_USER;
    let words: Vec<u8> = [0, modulep, kernend]
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .collect();
    target.write(STACK, &words)?;
    target.write(PML4, &entries((0..512).map(|_| PDPT | RIGHTS)))?;
    target.write(PDPT, &entries((0..512).map(|_| PD | RIGHTS)))?;
    target.write(
        PD,
        &entries((0..512).map(|i| (i * LARGE_PAGE) | RIGHTS | PTE_LARGE)),
    )?;
    let gdt = [0, 0x0020_9800_0000_0000, 0x0000_9000_0000_0000];
    target.write(GDT, &entries(gdt.into_iter()))?;
    set_long_mode(target, PML4, entry, STACK)?;
    // TR has limit 0 in stock's loader; VM entry takes 0x67 as well, and a guest
    // that looks finds the TSS as long as the architecture says.
    set_segments(
        target,
        (
            8,
            Descriptor {
                base: 0,
                limit: 0,
                access: 0x209b,
            },
        ),
        (
            16,
            Descriptor {
                base: 0,
                limit: 0,
                access: 0x93,
            },
        ),
        (GDT, 3 * 8 - 1),
    )
}

/// Where the page tables and GDT of a Linux kernel's entry lie.
pub mod linux_layout {
    /// GDT with `__BOOT_CS` 0x10 and `__BOOT_DS` 0x18.
    pub const GDT: u64 = 0x6000;
    /// The zero page (`struct boot_params`).
    pub const ZERO_PAGE: u64 = 0x7000;
    /// First byte of a page of stack that ends at [`PML4`].
    pub const STACK: u64 = 0x8000;
    /// PML4; the PDPT and four PDs follow it.
    pub const PML4: u64 = 0x9000;
    /// The command line.
    pub const COMMAND_LINE: u64 = 0x2_0000;
}

/// Enters a Linux kernel at its 64-bit entry: long mode with the first 4 GiB
/// mapped to themselves, flat segments with the selectors 0x10 and 0x18, RSI =
/// the zero page, interrupts off (Documentation/arch/x86/boot.rst, "64-bit boot
/// protocol").
///
/// # Errors
/// The VM refuses memory or a register.
pub fn enter_linux(target: &mut dyn LoadTarget, entry: u64) -> TargetResult<()> {
    use linux_layout::{GDT, PML4, ZERO_PAGE};
    const RIGHTS: u64 = PTE_PRESENT | PTE_WRITE;
    let pdpt = PML4 + 0x1000;
    let pd = PML4 + 0x2000;
    let one = |i: u64| if i == 0 { pdpt | RIGHTS } else { 0 };
    let four = |i: u64| if i < 4 { (pd + i * 0x1000) | RIGHTS } else { 0 };
    target.write(PML4, &entries((0..512).map(one)))?;
    target.write(pdpt, &entries((0..512).map(four)))?;
    target.write(
        pd,
        &entries((0..4 * 512).map(|i| (i * LARGE_PAGE) | RIGHTS | PTE_LARGE)),
    )?;
    let gdt = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    target.write(GDT, &entries(gdt.into_iter()))?;
    set_long_mode(target, PML4, entry, PML4)?;
    target.set_register(Register::Rsi, ZERO_PAGE)?;
    for register in [Register::Rbx, Register::Rbp, Register::Rdi] {
        target.set_register(register, 0)?;
    }
    set_segments(
        target,
        (0x10, flat(0xa09b)),
        (0x18, flat(0xc093)),
        (GDT, 4 * 8 - 1),
    )
}

fn flat(access: u32) -> Descriptor {
    Descriptor {
        base: 0,
        limit: u32::MAX,
        access,
    }
}

/// What tells a kernel that a multiboot loader started it.
pub const MULTIBOOT_EAX: u32 = 0x2bad_b002;
/// Bytes of the GDT that [`enter_multiboot`] writes.
pub const MULTIBOOT_GDT_SIZE: u64 = 24;

/// Enters a multiboot 1 kernel: 32-bit protected mode without paging, flat
/// segments, EAX = 0x2BADB002, EBX = the boot information (Multiboot
/// Specification 0.6.96 §3.2). `gdt` is a place for the GDT.
///
/// # Errors
/// The VM refuses memory or a register, or cannot run without paging.
pub fn enter_multiboot(
    target: &mut dyn LoadTarget,
    entry: u32,
    information: u32,
    gdt: u64,
) -> TargetResult<()> {
    target.enable_unrestricted_guest()?;
    let table = [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    target.write(gdt, &entries(table.into_iter()))?;
    for (register, value) in [
        (Register::Cr0, CR0_PE | CR0_NE),
        (Register::Cr3, 0),
        (Register::Cr4, 0),
        (Register::Efer, 0),
        (Register::Rflags, RFLAGS_RESERVED),
        (Register::Rip, u64::from(entry)),
        (Register::Rsp, 0),
        (Register::Rax, u64::from(MULTIBOOT_EAX)),
        (Register::Rbx, u64::from(information)),
    ] {
        target.set_register(register, value)?;
    }
    set_segments(
        target,
        (8, flat(0xc09b)),
        (16, flat(0xc093)),
        (gdt, MULTIBOOT_GDT_SIZE as u32 - 1),
    )
}
