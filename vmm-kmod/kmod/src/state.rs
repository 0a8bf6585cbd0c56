//! What ioctls may do to a vCPU that is out of the guest.

use vmm_abi::Capability;
use vmm_abi::layout::VmException;
use vmm_core::cpu::{Event, Reg};
use vmm_hw::backend::{PauseExiting, VirtualCpu};

use crate::errno;
use crate::vcpu::Inner;

/// PAUSEs no further apart than this, TSC ticks, are one loop.
const PAUSE_GAP: u32 = 128;
/// A guest that spins this long at first, TSC ticks, waits for another vCPU;
/// the CPU it burns may be the one that the other needs.
const PAUSE_WINDOW: u32 = 4096;
/// Where giving way does not end the loop, the patience doubles up to this.
const PAUSE_WINDOW_MAX: u32 = 1 << 22;

impl<C: VirtualCpu + ?Sized> Inner<C> {
    /// Exits from PAUSE loops, where the CPU tells them from single PAUSEs.
    pub fn watch_pause_loops(&mut self) {
        self.pause_window = PAUSE_WINDOW;
        let when = PauseExiting::Loop {
            gap: PAUSE_GAP,
            window: PAUSE_WINDOW,
        };
        if !self.hw.set_pause_exiting(when) {
            self.hw.set_pause_exiting(PauseExiting::Off);
        }
    }

    /// A PAUSE loop has exited: it exits less often from now on, and not at
    /// all where there is no other vCPU that it could wait for.
    pub fn spun(&mut self, active: u32) {
        if self.pause_exit {
            return;
        }
        if active <= 1 {
            self.pause_window = 0;
            self.hw.set_pause_exiting(PauseExiting::Off);
            return;
        }
        self.pause_window = self.pause_window.saturating_mul(2).min(PAUSE_WINDOW_MAX);
        self.hw.set_pause_exiting(PauseExiting::Loop {
            gap: PAUSE_GAP,
            window: self.pause_window,
        });
    }

    /// The number of vCPUs has changed: loops may wait for somebody again.
    pub fn forget_spinning(&mut self) {
        if !self.pause_exit && self.pause_window != PAUSE_WINDOW {
            self.watch_pause_loops();
        }
    }

    /// VM_INJECT_EXCEPTION. EINVAL: no such exception. EBUSY: another is
    /// pending.
    pub fn inject_exception(&mut self, a: &VmException) -> Result<(), i32> {
        let vector = u8::try_from(a.vector).map_err(|_| errno::EINVAL)?;
        // As FreeBSD: a double fault only follows from other faults. NMI has a
        // request of its own.
        if vector >= 32 || matches!(vector, 2 | 8) {
            return Err(errno::EINVAL);
        }
        let pushes = vmm_core::cpu::pushes_error_code(vector);
        let protected = self.hw.reg(Reg::Cr0) & vmm_core::cpu::CR0_PE != 0;
        if self.exception.is_some() {
            return Err(errno::EBUSY);
        }
        // Real mode pushes no error codes.
        let error_code = (a.error_code_valid != 0 && pushes && protected).then_some(a.error_code);
        self.exception = Some(Event {
            error_code,
            ..Event::exception(vector)
        });
        self.attention = true;
        if a.restart_instruction != 0 {
            self.restart_instruction();
        }
        // Blocking by STI or MOV SS ends with the instruction that faulted.
        self.hw.set_interrupt_shadow(false);
        Ok(())
    }

    /// VM_RESTART_INSTRUCTION: the instruction that caused the last exit is
    /// executed again.
    pub fn restart_instruction(&mut self) {
        self.next_rip = None;
        self.exit.inst_length = 0;
    }

    /// VM_GET_CAPABILITY. ENOENT: the CPU has it not.
    pub fn capability(&self, cap: Capability) -> Result<i32, i32> {
        let on = match cap {
            Capability::HaltExit => self.halt_exit,
            Capability::MtrapExit => self.mtrap_exit,
            Capability::PauseExit => self.pause_exit,
            Capability::UnrestrictedGuest => true,
            Capability::EnableInvpcid => self.invpcid,
            Capability::Rdtscp | Capability::Rdpid => self.hw.has_rdtscp(),
            _ => return Err(errno::ENOENT),
        };
        Ok(i32::from(on))
    }

    /// VM_SET_CAPABILITY; the VMCS is current. ENOENT: the CPU has it not.
    pub fn set_capability(&mut self, cap: Capability, on: bool) -> Result<(), i32> {
        let ok = match cap {
            // HLT always exits, so that an idle guest sleeps; what the
            // request says is only remembered.
            Capability::HaltExit => {
                self.halt_exit = on;
                true
            }
            Capability::PauseExit => {
                self.pause_exit = on;
                if on {
                    self.hw.set_pause_exiting(PauseExiting::Every)
                } else {
                    self.watch_pause_loops();
                    true
                }
            }
            Capability::MtrapExit => {
                self.mtrap_exit = on;
                self.hw.set_mtf(on)
            }
            Capability::EnableInvpcid => {
                self.invpcid = on;
                self.hw.set_invpcid(on)
            }
            // Required of the CPU, so it is on.
            Capability::UnrestrictedGuest => on,
            _ => false,
        };
        if ok { Ok(()) } else { Err(errno::ENOENT) }
    }
}
