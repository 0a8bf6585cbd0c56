//! One virtual CPU: its VMCB, what the VMCB does not hold, and its life.

use super::asid::Asid;
use super::avic;
use super::caps::Features;
use super::enable::Backend;
use super::entry::Regs;
use super::permission::MsrPermissions;
use super::vmcb::{Vmcb, clean, misc1};
use crate::backend::{ApicVirt, Config, PauseExiting};
use crate::ept::Generation;
use crate::error::Error;
use crate::fpu::Fpu;
use crate::page::Pages;
use alloc::sync::Arc;
use vmm_core::host::{Host, Hpa};

/// What is due before the next entry.
pub(super) mod work {
    /// Translations of this guest are to be dropped.
    pub const FLUSH: u32 = 1 << 0;
    /// The guest uses SPEC_CTRL.
    pub const SPEC_CTRL: u32 = 1 << 1;
    /// TLB_CONTROL is set for one entry.
    pub const TLB_CONTROL: u32 = 1 << 2;
}

/// What of the last exit only the instruction itself tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    Nothing,
    /// Its length.
    Length,
    /// Length and operands.
    Operands,
}

/// Where an NMI handler stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NmiState {
    /// NMIs come through.
    Open,
    /// One was delivered; IRET exits.
    Blocked,
    /// At the IRET with this RIP, which ends the blocking once it is done.
    AtIret(u64),
    /// The same, but an NMI waits: RFLAGS.TF makes an exit behind the IRET.
    Stepping,
}

/// A virtual CPU. See [`crate::backend::VirtualCpu`] for when its methods may
/// be used.
pub struct Vcpu<H: Host> {
    // What every exit touches comes first.
    pub(super) regs: Regs,
    pub(super) vmcb: Pages<H>,
    pub(super) npt_seen: u64,
    pub(super) work: u32,
    pub(super) clean: u32,
    /// Clean bits that the CPU has.
    pub(super) clean_mask: u32,
    pub(super) inst_len: u8,
    pub(super) wanted: Wanted,
    pub(super) nmi: NmiState,
    /// The guest has SPEC_CTRL for itself.
    pub(super) spec_ctrl_used: bool,
    /// See [`Vcpu::take_immediate_exit`].
    pub(super) leave_at_once: bool,
    pub(super) loaded: bool,
    pub(super) drs_loaded: bool,
    /// What is in use of AVIC now.
    pub(super) apic_virt: ApicVirt,
    /// CPU of the last `load`.
    pub(super) cpu: u32,
    pub(super) asid: Asid,
    /// What was injected with the last entry.
    pub(super) injected: u64,
    pub(super) generation: Arc<Generation>,
    pub(super) backend: Arc<Backend<H>>,
    pub(super) spec_ctrl: u64,
    pub(super) host_spec_ctrl: u64,
    pub(super) tsc_aux: u64,
    pub(super) host_tsc_aux: u64,
    pub(super) tsc_ratio: u64,
    /// CR4 as the guest wrote it.
    pub(super) cr4: u64,
    /// DR0 to DR3 of the guest.
    pub(super) dr: [u64; 4],
    pub(super) host_dr7: u64,
    pub(super) host_dr: [u64; 4],
    pub(super) tsc_offset: i64,
    pub(super) n_cr3: Hpa,
    pub(super) vm: u64,
    /// None: AVIC is not to be used.
    pub(super) avic: Option<avic::Place>,
    pub(super) backing_page: Option<Hpa>,
    /// The CPU whose APIC id `host_id` is.
    pub(super) avic_cpu: u32,
    pub(super) host_id: u64,
    pub(super) msr_permissions: MsrPermissions<H>,
    pub(super) fpu: Fpu<H>,
}

impl<H: Host> Vcpu<H> {
    /// A vCPU in power-on state (APM Vol. 2 §14.1.3).
    pub fn new(backend: Arc<Backend<H>>, config: Config) -> Result<Self, Error> {
        let vmcb: Pages<H> = Pages::new(0)?;
        let mut vcpu = Vcpu {
            regs: Regs {
                gpr: [0; 16],
                vmcb_pa: vmcb.pa(),
                host_vmcb_pa: 0,
                fill_rsb: u64::from(config.fill_rsb),
            },
            vmcb,
            npt_seen: 0,
            work: 0,
            clean: 0,
            clean_mask: if backend.caps.features.contains(Features::CLEAN_BITS) {
                clean::ALL
            } else {
                0
            },
            inst_len: 0,
            wanted: Wanted::Nothing,
            nmi: NmiState::Open,
            spec_ctrl_used: false,
            leave_at_once: false,
            loaded: false,
            drs_loaded: false,
            apic_virt: ApicVirt::empty(),
            cpu: u32::MAX,
            asid: Asid::default(),
            injected: 0,
            generation: config.generation,
            spec_ctrl: 0,
            host_spec_ctrl: 0,
            tsc_aux: 0,
            host_tsc_aux: 0,
            tsc_ratio: super::host_state::TSC_RATIO_ONE,
            cr4: 0,
            dr: [0; 4],
            host_dr7: 0,
            host_dr: [0; 4],
            tsc_offset: 0,
            n_cr3: config.nested_root,
            vm: config.vm,
            avic: config.avic,
            backing_page: config.virtual_apic,
            avic_cpu: u32::MAX,
            host_id: 0,
            msr_permissions: MsrPermissions::new()?,
            fpu: Fpu::new(backend.caps.xcr0)?,
            backend,
        };
        vcpu.init_vmcb();
        vcpu.init_avic();
        Ok(vcpu)
    }

    /// The VMCB.
    #[inline(always)]
    pub(super) fn vmcb(&self) -> &Vmcb {
        // SAFETY: a page of our own, aligned and as large as a VMCB, for which
        // every bit pattern is valid. The CPU writes to it only in VMRUN and
        // VMSAVE, whose assembly counts as a write to all memory.
        unsafe { &*self.vmcb.as_ptr().cast() }
    }

    /// The VMCB, to write to. What is covered by a clean bit comes with
    /// [`Vcpu::touch`].
    #[inline(always)]
    pub(super) fn vmcb_mut(&mut self) -> &mut Vmcb {
        // SAFETY: as above, and self is borrowed mutably.
        unsafe { &mut *self.vmcb.as_ptr().cast() }
    }

    /// The VMCB, whose fields under these clean bits are about to change.
    #[inline]
    pub(super) fn touch(&mut self, bits: u32) -> &mut Vmcb {
        self.clean &= !bits;
        self.vmcb_mut()
    }

    /// What the machine can do.
    pub fn backend(&self) -> &Arc<Backend<H>> {
        &self.backend
    }

    pub(super) fn has(&self, feature: Features) -> bool {
        self.backend.caps.features.contains(feature)
    }

    /// Sets or clears intercepts of the first word.
    pub(super) fn intercept1(&mut self, bits: u32, on: bool) {
        let old = self.vmcb().control.intercept_misc1;
        let new = if on { old | bits } else { old & !bits };
        if new != old {
            self.touch(clean::INTERCEPTS).control.intercept_misc1 = new;
        }
    }

    /// When PAUSE exits. False if the CPU cannot do that.
    pub fn set_pause_exiting(&mut self, when: PauseExiting) -> bool {
        let (count, threshold) = match when {
            PauseExiting::Off => {
                self.intercept1(misc1::PAUSE, false);
                return true;
            }
            PauseExiting::Every => (0, 0),
            PauseExiting::Loop { gap, window } => {
                if !self.has(Features::PAUSE_FILTER | Features::PAUSE_THRESHOLD) {
                    return false;
                }
                // The filter counts PAUSEs, of which each takes about half of
                // the gap that still makes a loop.
                let count = window / (gap / 2).max(1);
                let fit = |v: u32| u16::try_from(v).unwrap_or(u16::MAX);
                (fit(count.max(1)), fit(gap))
            }
        };
        let control = &mut self.touch(clean::INTERCEPTS).control;
        control.pause_filter_count = count;
        control.pause_filter_threshold = threshold;
        self.intercept1(misc1::PAUSE, true);
        true
    }

    /// A word of the VMCB at byte offset `number`, for those who look into a
    /// VM; `None` if it is not aligned to 8 bytes, or beyond the state.
    pub fn field(&self, number: u16) -> Option<u64> {
        if number & 7 != 0 || number >= 0x698 {
            return None;
        }
        let p = self.vmcb.as_ptr().wrapping_add(usize::from(number));
        // SAFETY: aligned and within our page.
        Some(unsafe { p.cast::<u64>().read() })
    }
}

// SAFETY: the pages are owned; everything else is plain data.
unsafe impl<H: Host> Send for Vcpu<H> {}
