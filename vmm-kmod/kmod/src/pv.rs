//! The paravirtual interface of a vCPU ([`vmm_core::pv`]): a clock in the
//! guest's memory, interrupts that end without an exit, IPIs and wake-ups by
//! hypercall.
//!
//! All that is in guest memory is reached through the usual functions, with
//! the memory's lock, outside the run loop; but for the word in which the guest
//! notes an end of interrupt. Its host address is kept, and good as long as the
//! nested page tables are of the generation in which it was found: what goes
//! away raises that, and waits until every vCPU has left the loop.

use core::sync::atomic::{AtomicU32, Ordering, fence};

use vmm_core::apicbus::ApicMessage;
use vmm_core::cpu::{Event, Gpr};
use vmm_core::pv::{self, Features, Hypercall, Scale};
use vmm_core::stats::Stat;
use vmm_hw::backend::{ApicVirt, VirtualCpu};

use crate::emulate::apply;
use crate::global;
use crate::memory::{GuestMemory, PROT_READ, PROT_WRITE};
use crate::os;
use crate::run::{Later, Runner, Todo};
use crate::vm::Vm;

/// Bit 0 of the guest's word: the end of this interrupt needs no exit.
const NO_EOI: u32 = 1;

/// What the guest has set up.
#[derive(Debug, Default)]
pub struct Pv {
    wall: u64,
    time: u64,
    eoi: u64,
    word: Option<Word>,
    /// The guest may end the interrupt in service by its word.
    armed: bool,
}

#[derive(Clone, Copy, Debug)]
struct Word {
    va: usize,
    generation: u64,
}

impl Pv {
    /// INIT: interrupts end as they did.
    pub fn init(&mut self) {
        self.eoi = 0;
        self.word = None;
        self.armed = false;
    }
}

/// What this machine can offer.
fn supported() -> Features {
    let g = global::get();
    let mut f = Features::NOP_IO_DELAY | Features::UNHALT | Features::SEND_IPI;
    f.set(
        Features::CLOCK | Features::CLOCK_STABLE,
        g.cpuid_caps.invariant_tsc,
    );
    // Where the CPU ends interrupts by itself the word would only be in the way.
    f.set(Features::EOI, !g.apic_virt.contains(ApicVirt::INTERRUPTS));
    f
}

impl Vm {
    /// What the VM's guest is offered.
    pub fn pv_features(&self) -> Features {
        supported() & Features::from_bits_retain(self.pv_wanted.load(Ordering::Relaxed))
    }

    /// VM_EXT_PV: what of it the guest may see from its next CPUID on.
    pub fn set_pv(&self, wanted: u32) {
        self.pv_wanted.store(wanted, Ordering::Relaxed);
        self.config_gen.fetch_add(1, Ordering::AcqRel);
    }
}

impl<C: VirtualCpu + ?Sized> Runner<'_, C> {
    /// Whether the guest's clock must be told that its TSC was set.
    pub fn pv_clock_used(&self) -> bool {
        self.inner.pv.time & pv::ENABLED != 0
    }

    /// The interrupt that was just accepted may end without an exit, if the
    /// IOAPIC does not wait for its end and nothing waits behind it.
    #[inline]
    pub fn offer_eoi(&mut self, vector: u8) {
        if self.inner.pv.word.is_some() {
            self.arm_eoi(vector);
        }
    }

    #[inline(never)]
    fn arm_eoi(&mut self, vector: u8) {
        if !self.inner.lapic.ends_quietly(vector) {
            return;
        }
        if let Some(va) = self.reach_eoi() {
            word_at(va).store(NO_EOI, Ordering::Relaxed);
            self.inner.pv.armed = true;
        }
    }

    /// Takes over an end of interrupt that the guest may have noted: before
    /// anything asks the local APIC what is in service. False: that cannot be
    /// told in here; `settle_eoi` can.
    #[inline]
    pub fn take_eoi(&mut self) -> bool {
        !self.inner.pv.armed || self.take_armed()
    }

    #[inline(never)]
    fn take_armed(&mut self) -> bool {
        let Some(va) = self.reach_eoi() else {
            return false;
        };
        self.disarm(noted(va));
        true
    }

    /// The word says, or cannot say any more, whether the guest has ended the
    /// interrupt.
    #[inline(never)]
    fn disarm(&mut self, ended: bool) {
        if ended {
            let effect = self.inner.lapic.end_of_interrupt();
            let _ = apply(self.vm, effect);
        }
        self.inner.pv.armed = false;
        self.inner.attention = true;
    }

    /// Host address of the word. None: there is none, or only the memory's
    /// lock, or sleep, can tell where. What is known of it stays then, for
    /// `settle_eoi` to look again.
    fn reach_eoi(&mut self) -> Option<usize> {
        let word = self.inner.pv.word?;
        if word.generation == self.vm.generation.current() {
            return Some(word.va);
        }
        let vm = self.vm;
        let mem = vm.mem.try_lock()?;
        let word = self.find_eoi(&mem.map.guest_known())?;
        self.inner.pv.word = Some(word);
        Some(word.va)
    }

    /// Looks for the word again, with the memory's lock held.
    #[cold]
    fn find_eoi(&self, guest: &GuestMemory<'_>) -> Option<Word> {
        let generation = self.vm.generation.current();
        pv::address(self.inner.pv.eoi)
            .flatten()
            .and_then(|gpa| eoi_word(guest, gpa))
            .map(|va| Word { va, generation })
    }
}

impl Runner<'_, dyn VirtualCpu> {
    /// RDMSR of an MSR of the interface's; `None` if there is none such.
    #[cold]
    pub fn pv_rdmsr(&self, msr: u32) -> Option<u64> {
        let offered = self.vm.pv_features();
        let pv = &self.inner.pv;
        match msr {
            pv::MSR_WALL_CLOCK if offered.contains(Features::CLOCK) => Some(pv.wall),
            pv::MSR_SYSTEM_TIME if offered.contains(Features::CLOCK) => Some(pv.time),
            pv::MSR_EOI if offered.contains(Features::EOI) => Some(pv.eoi),
            _ => None,
        }
    }

    /// WRMSR of one: to be done outside. `None`: there is none such.
    #[cold]
    pub fn pv_wrmsr(&mut self, msr: u32, value: u64) -> Option<Todo> {
        self.pv_rdmsr(msr)?;
        let rip = self.inner.hw.reg(vmm_core::cpu::Reg::Rip);
        let len = self.inner.hw.inst_len();
        self.inner.next_rip = Some(crate::regs::behind(&self.inner.hw, rip, len));
        Some(self.later(Later::PvMsr { msr, value }))
    }

    /// The same outside the run loop, where memory may be brought in.
    #[cold]
    pub fn pv_msr(&mut self, msr: u32, value: u64) {
        let ok = match msr {
            pv::MSR_WALL_CLOCK => self.set_wall_clock(value),
            pv::MSR_SYSTEM_TIME => self.set_system_time(value),
            _ => self.set_eoi(value),
        };
        if !ok {
            // At the instruction itself.
            self.inner.next_rip = None;
            self.inner.exception = Some(Event::GP0);
            self.inner.attention = true;
        }
    }

    fn set_wall_clock(&mut self, value: u64) -> bool {
        if value & 3 != 0 {
            return false;
        }
        self.inner.pv.wall = value;
        if value == 0 {
            return true;
        }
        // To the second, as the host tells it.
        let now = u64::try_from(os::wallclock()).unwrap_or(0);
        let up = os::rdtsc().wrapping_sub(self.vm.tsc_base);
        let up = self.vm.clock.to_ns.apply(up);
        let then = now.saturating_mul(1_000_000_000).saturating_sub(up);
        self.publish(value, |version| pv::wall_clock(version, then))
    }

    fn set_system_time(&mut self, value: u64) -> bool {
        match pv::address(value) {
            None => return false,
            Some(Some(gpa)) => {
                let scale = Scale::new(self.vm.tsc_hz.load(Ordering::Relaxed));
                let zero = self.inner.tsc_adjust;
                if !self.publish(gpa, |version| scale.clock(version, zero)) {
                    return false;
                }
            }
            Some(None) => {}
        }
        self.inner.pv.time = value;
        true
    }

    /// The vCPU's TSC was set: the clock goes on as it did.
    #[cold]
    pub fn pv_clock_moved(&mut self) {
        // A clock whose memory is gone has no reader either.
        let _ = self.set_system_time(self.inner.pv.time);
    }

    /// Writes a structure that begins with a version; false if there is no
    /// memory.
    fn publish<const N: usize>(&self, gpa: u64, make: impl Fn(u32) -> [u8; N]) -> bool {
        let mem = self.vm.mem.lock();
        let guest = mem.map.guest();
        let mut old = [0; 4];
        if !guest.read(gpa, &mut old) {
            return false;
        }
        let (writing, done) = pv::versions(u32::from_le_bytes(old));
        if !guest.write(gpa, &writing.to_le_bytes()) {
            return false;
        }
        fence(Ordering::Release);
        let written = guest.write(gpa, &make(writing));
        fence(Ordering::Release);
        guest.write(gpa, &done.to_le_bytes()) && written
    }

    fn set_eoi(&mut self, value: u64) -> bool {
        self.settle_eoi();
        let word = match pv::address(value) {
            None => return false,
            Some(None) => None,
            Some(Some(gpa)) => {
                let mem = self.vm.mem.lock();
                match eoi_word(&mem.map.guest(), gpa) {
                    None => return false,
                    Some(va) => Some(Word {
                        va,
                        generation: self.vm.generation.current(),
                    }),
                }
            }
        };
        let pv = &mut self.inner.pv;
        pv.armed = false;
        pv.word = word;
        pv.eoi = value;
        true
    }

    /// As `take_eoi`, outside the run loop: always told afterwards.
    #[inline(never)]
    pub fn settle_eoi(&mut self) {
        let pv = &self.inner.pv;
        let stale = |w: Word| w.generation != self.vm.generation.current();
        if !pv.armed && !pv.word.is_some_and(stale) || pv.armed && self.take_armed() {
            return;
        }
        let vm = self.vm;
        let mem = vm.mem.lock();
        self.inner.pv.word = self.find_eoi(&mem.map.guest());
        // Read while the lock keeps the memory where it is. Where there is none
        // no bit stands: whatever was in service has ended, as an end too many
        // does less harm than one that never comes.
        let ended = self.inner.pv.armed && self.inner.pv.word.is_none_or(|w| noted(w.va));
        drop(mem);
        if self.inner.pv.armed {
            self.disarm(ended);
        }
    }

    /// VMCALL or VMMCALL.
    #[cold]
    pub fn hypercall(&mut self) -> Option<Todo> {
        let offered = self.vm.pv_features();
        if offered.is_empty() {
            self.vcpu.stats.inc(Stat::Exceptions);
            return self.fault_with(Event::UD);
        }
        self.vcpu.stats.inc(Stat::Hypercall);
        let hw = &self.inner.hw;
        let long = hw.long_mode_code();
        let args = [Gpr::Rbx, Gpr::Rcx, Gpr::Rdx, Gpr::Rsi].map(|r| hw.gpr(r));
        let call = pv::hypercall(offered, long, hw.cpl(), hw.gpr(Gpr::Rax), args);
        let answer = match call {
            Hypercall::PollIrq => 0,
            Hypercall::Kick { apic_id } => {
                if let Some(v) = self.vm.vcpu(apic_id as usize) {
                    v.unhalt();
                }
                0
            }
            Hypercall::SendIpi {
                set,
                first,
                mode,
                vector,
            } => pv::destinations(set, first)
                .map(|id| {
                    let message = ApicMessage {
                        dest: vmm_core::apicbus::Destination::Physical(id),
                        mode,
                        vector,
                        level: false,
                    };
                    self.vm.deliver(&message) as i64
                })
                .sum(),
            Hypercall::Refused(why) => why,
        } as u64;
        let answer = if long { answer } else { answer & 0xffff_ffff };
        self.inner.hw.set_gpr(Gpr::Rax, answer);
        self.finish();
        None
    }
}

fn eoi_word(guest: &GuestMemory<'_>, gpa: u64) -> Option<usize> {
    guest.word(gpa, 4, PROT_READ | PROT_WRITE)
}

/// Whether the guest has noted an end of interrupt in the word at a host
/// address; takes the note.
fn noted(va: usize) -> bool {
    let word = word_at(va);
    let left = word.load(Ordering::Relaxed);
    word.store(left & !NO_EOI, Ordering::Relaxed);
    left & NO_EOI == 0
}

/// The word at a host address that `Runner::reach_eoi` gave, or `find_eoi`
/// under the memory's lock that is still held.
fn word_at(va: usize) -> &'static AtomicU32 {
    // SAFETY: an aligned word of guest memory in the direct map that stays
    // until this vCPU has left the run loop, or the memory's lock is given
    // back, and no user keeps it longer.
    unsafe { AtomicU32::from_ptr(va as *mut u32) }
}
