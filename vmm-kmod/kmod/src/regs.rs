//! Registers by FreeBSD's names, and access to them while the vCPU does not
//! run.

use vmm_abi::layout::{GuestPaging, SegDesc as AbiDesc};
use vmm_abi::limits::REG_HARDWARE;
use vmm_abi::{CpuMode, PagingMode, RegName, TaskSwitchReason};
use vmm_core::cpu::{CR0_PE, CR0_PG, CR4_PAE, CpuState, EFER_LMA, Gpr, Reg, Seg, SegDesc};
use vmm_core::cpuid::CpuidTable;

use crate::errno;
use crate::ffi;
use crate::vcpu::Inner;

/// Does `f` with the vCPU's VMCS current and interrupts off. `f` must be
/// short and must not sleep.
pub fn with_current<R>(inner: &mut Inner, f: impl FnOnce(&mut Inner) -> R) -> R {
    let (mut f, mut done) = (Some(f), None);
    loop {
        made_current(inner, &mut |inner| done = f.take().map(|f| f(inner)));
        if let Some(done) = done.take() {
            return done;
        }
    }
}

// Not generic: there are two dozen uses.
#[inline(never)]
fn made_current(inner: &mut Inner, f: &mut dyn FnMut(&mut Inner)) {
    loop {
        // Where VMX is off (a CPU that is going offline) the thread moves on.
        inner.hw.prepare_migration();
        // SAFETY: restored below.
        let flags = unsafe { ffi::vmm_host_irq_save() };
        // SAFETY: interrupts are off, and the vCPU's lock is held. Making it
        // current is all that is wanted; `f` then works on `inner`.
        let current = unsafe { inner.hw.make_current() }.is_ok();
        if current {
            f(inner);
        }
        // SAFETY: `flags` came from the save above.
        unsafe { ffi::vmm_host_irq_restore(flags) };
        if current {
            return;
        }
        // The thread that takes the CPU down must get it first; a signal is
        // no reason to leave registers half set.
        let _ = crate::os::yield_now();
    }
}

enum Where {
    Gpr(Gpr),
    Reg(Reg),
    Selector(Seg),
    Shadow,
}

fn place(name: RegName) -> Option<Where> {
    use RegName as N;
    Some(match name {
        N::Rax => Where::Gpr(Gpr::Rax),
        N::Rbx => Where::Gpr(Gpr::Rbx),
        N::Rcx => Where::Gpr(Gpr::Rcx),
        N::Rdx => Where::Gpr(Gpr::Rdx),
        N::Rsi => Where::Gpr(Gpr::Rsi),
        N::Rdi => Where::Gpr(Gpr::Rdi),
        N::Rbp => Where::Gpr(Gpr::Rbp),
        N::Rsp => Where::Gpr(Gpr::Rsp),
        N::R8 => Where::Gpr(Gpr::R8),
        N::R9 => Where::Gpr(Gpr::R9),
        N::R10 => Where::Gpr(Gpr::R10),
        N::R11 => Where::Gpr(Gpr::R11),
        N::R12 => Where::Gpr(Gpr::R12),
        N::R13 => Where::Gpr(Gpr::R13),
        N::R14 => Where::Gpr(Gpr::R14),
        N::R15 => Where::Gpr(Gpr::R15),
        N::Cr0 => Where::Reg(Reg::Cr0),
        N::Cr2 => Where::Reg(Reg::Cr2),
        N::Cr3 => Where::Reg(Reg::Cr3),
        N::Cr4 => Where::Reg(Reg::Cr4),
        N::Efer => Where::Reg(Reg::Efer),
        N::Rip => Where::Reg(Reg::Rip),
        N::Rflags => Where::Reg(Reg::Rflags),
        N::Dr0 => Where::Reg(Reg::Dr0),
        N::Dr1 => Where::Reg(Reg::Dr1),
        N::Dr2 => Where::Reg(Reg::Dr2),
        N::Dr3 => Where::Reg(Reg::Dr3),
        N::Dr6 => Where::Reg(Reg::Dr6),
        N::Dr7 => Where::Reg(Reg::Dr7),
        N::Pdpte0 => Where::Reg(Reg::Pdpte0),
        N::Pdpte1 => Where::Reg(Reg::Pdpte1),
        N::Pdpte2 => Where::Reg(Reg::Pdpte2),
        N::Pdpte3 => Where::Reg(Reg::Pdpte3),
        N::Es => Where::Selector(Seg::Es),
        N::Cs => Where::Selector(Seg::Cs),
        N::Ss => Where::Selector(Seg::Ss),
        N::Ds => Where::Selector(Seg::Ds),
        N::Fs => Where::Selector(Seg::Fs),
        N::Gs => Where::Selector(Seg::Gs),
        N::Ldtr => Where::Selector(Seg::Ldtr),
        N::Tr => Where::Selector(Seg::Tr),
        N::IntrShadow => Where::Shadow,
        _ => return None,
    })
}

fn name(regnum: i32) -> Result<RegName, i32> {
    u32::try_from(regnum)
        .ok()
        .and_then(RegName::from_raw)
        .ok_or(errno::EINVAL)
}

/// A register by its number; the VMCS is current. EINVAL: no such register.
pub fn get(inner: &Inner, regnum: i32) -> Result<u64, i32> {
    let hw = &inner.hw;
    // bhyvectl looks at the VMCS itself. Fields can be read, never written.
    if regnum as u32 & REG_HARDWARE != 0 {
        let encoding = u16::try_from(regnum as u32 & !REG_HARDWARE).map_err(|_| errno::EINVAL)?;
        return hw.field(encoding).ok_or(errno::EINVAL);
    }
    match name(regnum)? {
        RegName::FsBase => return Ok(hw.seg(Seg::Fs).base),
        RegName::GsBase => return Ok(hw.seg(Seg::Gs).base),
        RegName::KgsBase => {
            return hw
                .msr(vmm_core::msr::number::KERNEL_GS_BASE)
                .ok_or(errno::EINVAL);
        }
        RegName::Tpr => return Ok(inner.lapic.cr8()),
        RegName::Rip => {
            if let Some(rip) = inner.next_rip {
                return Ok(rip);
            }
        }
        _ => {}
    }
    Ok(match place(name(regnum)?).ok_or(errno::EINVAL)? {
        Where::Gpr(r) => hw.gpr(r),
        Where::Reg(r) => hw.reg(r),
        Where::Selector(s) => u64::from(hw.selector(s)),
        Where::Shadow => u64::from(hw.interrupt_shadow()),
    })
}

/// Sets a register by its number; the VMCS is current.
pub fn set(inner: &mut Inner, regnum: i32, value: u64) -> Result<(), i32> {
    match name(regnum)? {
        RegName::Tpr => {
            inner.lapic.set_cr8(value & 15);
            inner.attention = true;
            return Ok(());
        }
        RegName::Rip => inner.next_rip = None,
        // As a MOV by the guest, but that the rest is dropped (bhyveload's
        // i386 set-up asks for VMXE): the CPU may have features whose state
        // is not switched, such as protection keys.
        RegName::Cr4 => {
            let value = value & cr4_allowed(&inner.cpuid);
            inner.hw.set_reg(Reg::Cr4, value);
            return Ok(());
        }
        _ => {}
    }
    match place(name(regnum)?).ok_or(errno::EINVAL)? {
        Where::Gpr(r) => inner.hw.set_gpr(r, value),
        Where::Reg(r) => inner.hw.set_reg(r, value),
        Where::Selector(s) => inner.hw.set_selector(s, value as u16),
        // As FreeBSD's vmm: blocking can be ended, not begun.
        Where::Shadow if value != 0 => return Err(errno::EINVAL),
        Where::Shadow => inner.hw.set_interrupt_shadow(false),
    }
    Ok(())
}

enum Table {
    Seg(Seg),
    Gdtr,
    Idtr,
}

fn table(regnum: i32) -> Result<Table, i32> {
    Ok(match name(regnum)? {
        RegName::Es => Table::Seg(Seg::Es),
        RegName::Cs => Table::Seg(Seg::Cs),
        RegName::Ss => Table::Seg(Seg::Ss),
        RegName::Ds => Table::Seg(Seg::Ds),
        RegName::Fs => Table::Seg(Seg::Fs),
        RegName::Gs => Table::Seg(Seg::Gs),
        RegName::Ldtr => Table::Seg(Seg::Ldtr),
        RegName::Tr => Table::Seg(Seg::Tr),
        RegName::Gdtr => Table::Gdtr,
        RegName::Idtr => Table::Idtr,
        _ => return Err(errno::EINVAL),
    })
}

/// A descriptor by its register's number; the VMCS is current.
pub fn get_desc(inner: &Inner, regnum: i32) -> Result<AbiDesc, i32> {
    let hw = &inner.hw;
    Ok(match table(regnum)? {
        Table::Seg(s) => abi_desc(hw.seg(s)),
        Table::Gdtr => AbiDesc {
            base: hw.reg(Reg::GdtrBase),
            limit: hw.reg(Reg::GdtrLimit) as u32,
            access: 0,
        },
        Table::Idtr => AbiDesc {
            base: hw.reg(Reg::IdtrBase),
            limit: hw.reg(Reg::IdtrLimit) as u32,
            access: 0,
        },
    })
}

/// Sets a descriptor; the VMCS is current.
pub fn set_desc(inner: &mut Inner, regnum: i32, desc: AbiDesc) -> Result<(), i32> {
    let hw = &mut inner.hw;
    match table(regnum)? {
        Table::Seg(s) => {
            hw.set_seg(
                s,
                SegDesc {
                    base: desc.base,
                    limit: desc.limit,
                    access: desc.access,
                },
            );
        }
        Table::Gdtr => {
            hw.set_reg(Reg::GdtrBase, desc.base);
            hw.set_reg(Reg::GdtrLimit, u64::from(desc.limit));
        }
        Table::Idtr => {
            hw.set_reg(Reg::IdtrBase, desc.base);
            hw.set_reg(Reg::IdtrLimit, u64::from(desc.limit));
        }
    }
    Ok(())
}

/// A descriptor in FreeBSD's layout.
pub fn abi_desc(d: SegDesc) -> AbiDesc {
    AbiDesc {
        base: d.base,
        limit: d.limit,
        access: d.access,
    }
}

/// FreeBSD's name of a segment register.
pub fn seg_name(s: Seg) -> RegName {
    match s {
        Seg::Es => RegName::Es,
        Seg::Cs => RegName::Cs,
        Seg::Ss => RegName::Ss,
        Seg::Ds => RegName::Ds,
        Seg::Fs => RegName::Fs,
        Seg::Gs => RegName::Gs,
        Seg::Ldtr => RegName::Ldtr,
        Seg::Tr => RegName::Tr,
    }
}

/// The paging state that exits carry.
pub fn paging(cpu: &(impl CpuState + ?Sized)) -> GuestPaging {
    let cr0 = cpu.reg(Reg::Cr0);
    let cr4 = cpu.reg(Reg::Cr4);
    let long = cpu.reg(Reg::Efer) & EFER_LMA != 0;
    let cpu_mode = if cr0 & CR0_PE == 0 {
        CpuMode::Real
    } else if !long {
        CpuMode::Protected
    } else if cpu.seg(Seg::Cs).long() {
        CpuMode::Bits64
    } else {
        CpuMode::Compatibility
    };
    let paging_mode = if cr0 & CR0_PG == 0 {
        PagingMode::Flat
    } else if cr4 & CR4_PAE == 0 {
        PagingMode::Bits32
    } else if long {
        PagingMode::Bits64
    } else {
        PagingMode::Pae
    };
    GuestPaging {
        cr3: cpu.reg(Reg::Cr3),
        cpl: i32::from(cpu.cpl()),
        cpu_mode: cpu_mode.raw(),
        paging_mode: paging_mode.raw(),
        ..GuestPaging::default()
    }
}

/// Why a task switch happened, from the exit qualification's two bits.
pub fn task_switch_reason(reason: u8) -> TaskSwitchReason {
    match reason & 3 {
        0 => TaskSwitchReason::Call,
        1 => TaskSwitchReason::Iret,
        2 => TaskSwitchReason::Jmp,
        _ => TaskSwitchReason::IdtGate,
    }
}

/// The address behind an instruction of `len` bytes at `rip`.
#[inline]
pub fn behind(cpu: &(impl CpuState + ?Sized), rip: u64, len: u8) -> u64 {
    let next = rip.wrapping_add(u64::from(len));
    if (rip ^ next) >> 32 != 0 && !cpu.long_mode_code() {
        next & 0xffff_ffff
    } else {
        next
    }
}

/// CR4 bits whose features the guest's CPUID shows (SDM Vol. 3A §2.5).
pub fn cr4_allowed(cpuid: &CpuidTable) -> u64 {
    let [_, _, c1, d1] = cpuid.leaf1();
    let [_, b7, c7, _] = cpuid.leaf7();
    let bit = |word: u32, n: u32, cr4: u64| if word & (1 << n) != 0 { cr4 } else { 0 };
    // VME, PVI; TSD; DE; PSE; PAE; MCE; PGE; PCE; OSFXSR, OSXMMEXCPT.
    let mut allowed = bit(d1, 1, 3)
        | bit(d1, 4, 1 << 2)
        | bit(d1, 2, 1 << 3)
        | bit(d1, 3, 1 << 4)
        | bit(d1, 6, 1 << 5)
        | bit(d1, 13, 1 << 7)
        | bit(d1, 24, 1 << 9)
        | bit(d1, 25, 1 << 10)
        | 1 << 6
        | 1 << 8;
    // UMIP, FSGSBASE, PCIDE, OSXSAVE, SMEP, SMAP.
    allowed |= bit(c7, 2, 1 << 11)
        | bit(b7, 0, 1 << 16)
        | bit(c1, 17, 1 << 17)
        | bit(c1, 26, 1 << 18)
        | bit(b7, 7, 1 << 20)
        | bit(b7, 20, 1 << 21);
    allowed
}
