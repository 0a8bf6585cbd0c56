//! AVIC: interrupts, their ends and IPIs without exits (APM Vol. 2 §15.29).
//!
//! The backing page is the local APIC's register page. While AVIC is on, the
//! CPU delivers what it finds in IRR there, and other vCPUs' CPUs set bits in
//! it by themselves.

use super::caps::Features;
use super::vcpu::Vcpu;
use super::vmcb::{clean, msr, virq};
use crate::backend::{ApicMode, ApicVirt};
use crate::error::Error;
use crate::instr;
use crate::page::Pages;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use vmm_core::cpu::{Access, Exit};
use vmm_core::host::{Host, Hpa};
use vmm_core::lapic::{DEFAULT_BASE, LapicPage, reg};

/// The highest APIC id that the physical table can have: 255 is everybody.
pub const MAX_ID: u8 = 254;

// Entry of the physical APIC ID table.
const VALID: u64 = 1 << 63;
const RUNNING: u64 = 1 << 62;
const HOST_ID: u64 = 0xfff;
const PAGE: u64 = 0x000f_ffff_ffff_f000;
/// Entry of the logical APIC ID table: valid; bits 7:0 are a guest's APIC id.
const LOGICAL_VALID: u32 = 1 << 31;

/// CR8 both ways, as `intercept_cr` has it.
const CR8: u32 = 1 << 8 | 1 << (16 + 8);

/// What a vCPU is to know of its VM's tables.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// [`Tables::pa`]; they outlive the vCPU.
    pub tables: Hpa,
    /// The vCPU's APIC id, at most [`MAX_ID`].
    pub id: u8,
}

/// A VM's physical APIC ID table, and behind it the logical one.
pub struct Tables<H: Host>(Pages<H>);

fn entry<H: Host>(tables: Hpa, id: u8) -> *const AtomicU64 {
    (H::phys_to_virt(tables) as *const AtomicU64).wrapping_add(usize::from(id))
}

impl<H: Host> Tables<H> {
    /// Tables of which no entry is valid.
    #[cold]
    pub fn new() -> Result<Self, Error> {
        Pages::new(1).map(Tables)
    }

    /// Physical address of the physical table.
    pub fn pa(&self) -> Hpa {
        self.0.pa()
    }

    /// Whether the CPU may hand interrupts to the APIC with this id. It has
    /// had a vCPU of its own since [`Vcpu::new`].
    #[cold]
    pub fn set_valid(&self, id: u8, on: bool) {
        // SAFETY: within our page, for as long as self is borrowed; it is
        // touched by atomic operations alone.
        let entry = unsafe { &*entry::<H>(self.pa(), id) };
        if on {
            entry.fetch_or(VALID, Ordering::SeqCst);
        } else {
            entry.fetch_and(!VALID, Ordering::SeqCst);
        }
    }

    /// The register page of a vCPU that runs with AVIC and takes interrupts.
    #[cold]
    pub fn running_page(&self, id: u8) -> Option<&LapicPage> {
        // SAFETY: as above.
        let entry = unsafe { &*entry::<H>(self.pa(), id) }.load(Ordering::SeqCst);
        if entry & (VALID | RUNNING) != VALID | RUNNING {
            return None;
        }
        let page = H::phys_to_virt(entry & PAGE) as *const LapicPage;
        // SAFETY: a page of atomics alone, of a vCPU that exists, as others never become
        // VALID; it keeps the page as long as its VM, and so these tables, live.
        Some(unsafe { &*page })
    }

    /// After something was put into a vCPU's IRR: rings the doorbell of the
    /// CPU that it runs on. False: it does not run, and is to be woken.
    #[cold]
    pub fn ring(&self, id: u8) -> bool {
        // SAFETY: as above.
        let entry = unsafe { &*entry::<H>(self.pa(), id) }.load(Ordering::SeqCst);
        if entry & RUNNING != 0 {
            // SAFETY: CPL 0; the MSR is there with AVIC. A CPU that has left
            // the guest ignores it.
            unsafe { instr::wrmsr(msr::AVIC_DOORBELL, entry & HOST_ID) };
        }
        entry & RUNNING != 0
    }

    /// Whether the vCPU runs with AVIC: it finds by itself what is put into
    /// its IRR.
    #[cold]
    pub fn is_running(&self, id: u8) -> bool {
        // SAFETY: as above.
        let entry = unsafe { &*entry::<H>(self.pa(), id) };
        entry.load(Ordering::SeqCst) & RUNNING != 0
    }

    /// Which APIC a bit (0 to 7) of a logical destination means in the flat
    /// model, if it is exactly one.
    #[cold]
    pub fn set_logical(&self, bit: u8, id: Option<u8>) {
        let table = self.0.as_ptr().wrapping_add(4096).cast::<AtomicU32>();
        let value = id.map_or(0, |id| LOGICAL_VALID | u32::from(id));
        // SAFETY: as above, in the second page.
        let entry = unsafe { &*table.wrapping_add(usize::from(bit & 7)) };
        entry.store(value, Ordering::SeqCst);
    }
}

/// Whether a write of the register at `offset` exits when it is done
/// (table 15-22); accesses that exit otherwise do so before.
fn traps(offset: u16) -> bool {
    matches!(
        offset,
        reg::ID
            | reg::EOI
            | reg::RRD
            | reg::LDR
            | reg::DFR
            | reg::SVR
            | reg::ESR
            | reg::ICR_LOW
            | reg::LVT_TIMER..=reg::LVT_ERROR | reg::TIMER_ICR | reg::TIMER_DCR
    )
}

/// Exit AVIC_NOACCEL by its EXITINFO1 (§15.29.9.2).
#[cold]
pub(super) fn not_accelerated(info1: u64) -> Exit {
    let offset = info1 as u16 & 0xff0;
    let write = info1 & (1 << 32) != 0;
    if write && traps(offset) {
        return Exit::ApicWrite { offset };
    }
    let access = if write { Access::WRITE } else { Access::READ };
    Exit::ApicAccess { offset, access }
}

/// Exit AVIC_INCOMPLETE_IPI by its EXITINFO2 (§15.29.9.1). ICR is written; if
/// it was only that a target does not run, IRR is set in all of them.
pub(super) fn incomplete_ipi(info2: u64) -> Exit {
    const NOT_RUNNING: u64 = 1;
    if info2 >> 32 == NOT_RUNNING {
        Exit::IpiToWaiting
    } else {
        let offset = reg::ICR_LOW;
        Exit::ApicWrite { offset }
    }
}

/// The host's APIC id of the CPU that this runs on.
#[cold]
fn host_id() -> u64 {
    let [max, ..] = instr::cpuid(0, 0);
    if max >= 0xb {
        let [_, levels, _, id] = instr::cpuid(0xb, 0);
        if levels != 0 {
            return u64::from(id);
        }
    }
    u64::from(instr::cpuid(1, 0)[1] >> 24)
}

impl<H: Host> Vcpu<H> {
    /// Fills in what AVIC needs of a new VMCB; it is still off.
    #[cold]
    pub(super) fn init_avic(&mut self) {
        let (Some(place), Some(page)) = (self.avic, self.backing_page) else {
            self.avic = None;
            return;
        };
        // SAFETY: the tables outlive the vCPU.
        unsafe { &*entry::<H>(place.tables, place.id) }.store(page, Ordering::SeqCst);
        let control = &mut self.vmcb_mut().control;
        control.avic_apic_bar = DEFAULT_BASE;
        control.avic_backing_page = page;
        control.avic_logical_table = place.tables + 4096;
        control.avic_physical_table = place.tables | u64::from(MAX_ID);
    }

    /// Turns AVIC on where the guest's APIC is reached at its page, off
    /// elsewhere.
    #[cold]
    pub(super) fn avic_mode(&mut self, mode: ApicMode) {
        let on = mode == ApicMode::XApic;
        if self.avic.is_none() || on != self.apic_virt.is_empty() {
            return;
        }
        // A virtual interrupt for a window means nothing to AVIC.
        self.set_interrupt_window(false);
        self.apic_virt = if on {
            super::caps::AVIC
        } else {
            ApicVirt::empty()
        };
        let control = &mut self
            .touch(clean::TPR | clean::INTERCEPTS | clean::AVIC)
            .control;
        control.virtual_interrupt ^= virq::AVIC;
        control.intercept_cr ^= CR8;
        self.avic_tpr();
        if self.loaded {
            self.avic_running(on);
        }
    }

    /// After what may have been a change of TPR by others than the guest: the
    /// CPU goes by its copy.
    #[inline]
    pub(super) fn avic_tpr(&mut self) {
        if !self.apic_virt.is_empty() {
            self.copy_tpr();
        }
    }

    #[cold]
    fn copy_tpr(&mut self) {
        let Some(page) = self.backing_page else {
            return;
        };
        let page = H::phys_to_virt(page) as *const AtomicU32;
        // SAFETY: the vCPU's register page, which lives as long as it does.
        let tpr = unsafe { &*page.wrapping_add(usize::from(reg::TPR) / 4) };
        let tpr = u64::from(tpr.load(Ordering::Relaxed)) >> 4 & virq::TPR;
        let old = self.vmcb().control.virtual_interrupt;
        if old & virq::TPR != tpr {
            self.touch(clean::TPR).control.virtual_interrupt = old & !virq::TPR | tpr;
        }
    }

    /// Tells the other vCPUs' CPUs where this one runs, or that it does not
    /// and is to be woken. Then IRR is to be looked at.
    #[cold]
    pub(super) fn avic_running(&mut self, on: bool) {
        // Erratum 1235: a CPU may miss that a target has just stopped.
        let (Some(place), true) = (self.avic, self.has(Features::AVIC_IPI)) else {
            return;
        };
        // SAFETY: the tables outlive the vCPU.
        let entry = unsafe { &*entry::<H>(place.tables, place.id) };
        if !on {
            entry.fetch_and(!RUNNING, Ordering::SeqCst);
            return;
        }
        if self.avic_cpu != self.cpu {
            self.avic_cpu = self.cpu;
            self.host_id = host_id();
            entry.fetch_and(!HOST_ID, Ordering::SeqCst);
        }
        if self.host_id <= HOST_ID {
            entry.fetch_or(RUNNING | self.host_id, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testhost::TestHost;

    #[test]
    fn writes_trap_or_fault_by_register() {
        let write = |offset| not_accelerated(1 << 32 | offset);
        for offset in [
            0x20, 0xb0, 0xc0, 0xd0, 0xe0, 0xf0, 0x280, 0x320, 0x330, 0x340, 0x350, 0x360, 0x370,
            0x380, 0x3e0,
        ] {
            assert_eq!(
                write(u64::from(offset)),
                Exit::ApicWrite { offset },
                "{offset:#x}"
            );
        }
        // Version, arbitration and processor priority, current count, nothing,
        // and every read, are left to emulation.
        for offset in [0x30, 0x90, 0xa0, 0x390, 0x3f0, 0x100, 0x2f0] {
            let access = Access::WRITE;
            assert_eq!(
                write(u64::from(offset)),
                Exit::ApicAccess { offset, access },
                "{offset:#x}"
            );
        }
        let (offset, access) = (0x390, Access::READ);
        assert_eq!(not_accelerated(0x390), Exit::ApicAccess { offset, access });
        let offset = 0xb0;
        assert_eq!(not_accelerated(0xb0), Exit::ApicAccess { offset, access });
    }

    #[test]
    fn only_an_ipi_to_a_waiting_vcpu_is_half_done() {
        assert_eq!(incomplete_ipi(1 << 32 | 5), Exit::IpiToWaiting);
        for id in [0, 2, 3, 4] {
            let offset = 0x300;
            assert_eq!(incomplete_ipi(id << 32), Exit::ApicWrite { offset });
        }
    }

    #[test]
    fn tables_have_what_the_cpu_looks_for() {
        let tables: Tables<TestHost> = Tables::new().unwrap();
        let word = |at: usize| {
            let p = (tables.pa() as usize + at) as *const AtomicU64;
            // SAFETY: within the two pages.
            unsafe { &*p }.load(Ordering::Relaxed)
        };
        let page = 0x1234_5000;
        // SAFETY: in the table.
        unsafe { &*entry::<TestHost>(tables.pa(), 3) }.store(page, Ordering::Relaxed);
        tables.set_valid(3, true);
        assert_eq!(word(24), 1 << 63 | page);
        tables.set_valid(3, false);
        assert_eq!(word(24), page);
        tables.set_logical(3, Some(7));
        assert_eq!(word(4096 + 8), (1 << 31 | 7) << 32);
        tables.set_logical(2, Some(MAX_ID));
        assert_eq!(word(4096 + 8), (1 << 31 | 7) << 32 | 1 << 31 | 254);
        tables.set_logical(3, None);
        assert_eq!(word(4096 + 8), 1 << 31 | 254);
        assert_eq!((word(0), word(4096)), (0, 0));
    }
}
