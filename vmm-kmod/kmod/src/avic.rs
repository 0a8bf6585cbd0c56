//! AVIC: which vCPUs use it, and by what they find each other.
//!
//! The local APIC's page is mapped only while AVIC is on for every vCPU that
//! enters the guest: one without it would reach plain memory there. AVIC on
//! without the page is no harm; accesses are nested faults and emulated.

use core::sync::atomic::Ordering;

use vmm_core::apicbus::{self, Destination};
use vmm_core::lapic::Mode;
use vmm_core::stats::Stat;
use vmm_hw::backend::{ApicMode, VirtualCpu};
use vmm_hw::ept::Prot;
use vmm_hw::svm::avic::{MAX_ID, Place, Tables};

use crate::global;
use crate::os::Os;
use crate::run::{Later, Runner, Todo};
use crate::vcpu::Vcpu;
use crate::vm::Vm;

/// The APIC id as AVIC's tables have it.
fn table_id(id: usize) -> Option<u8> {
    u8::try_from(id).ok().filter(|&id| id <= MAX_ID)
}

impl Vm {
    /// Where a vCPU's entry is; None without AVIC.
    pub fn avic_place(&self, id: u32) -> Option<Place> {
        let (tables, id) = (self.avic.as_ref()?.pa(), table_id(id as usize)?);
        Some(Place { tables, id })
    }

    /// After a change of what `Lapic::take_routes_changed` looks for, or of
    /// `no_apic_page`: tables and mapping follow.
    pub(crate) fn update_avic(&self, tables: &Tables<Os>) -> Result<(), i32> {
        let mut mem = self.mem.lock();
        for v in self.vcpus() {
            if let Some(id) = table_id(v.id as usize) {
                let mode = v.mailbox.mode() & (Mode::ENABLED | Mode::X2APIC);
                tables.set_valid(id, mode == Mode::ENABLED);
            }
        }
        for bit in 0..8 {
            let (mut found, mut others) = (None, false);
            apicbus::addressed(self.slots(), Destination::Logical(1 << bit), &mut |id| {
                others |= found.replace(id).is_some();
            });
            let only = found.filter(|_| !others);
            tables.set_logical(bit, only.and_then(table_id));
        }
        let all = self.no_apic_page.is_empty();
        if self.avic_mapped.swap(all, Ordering::Relaxed) == all {
            return Ok(());
        }
        let prot = if all {
            Prot::READ | Prot::WRITE
        } else {
            Prot::empty()
        };
        self.map_apic_page(&mut mem.nested, prot)
    }
}

/// Hands what is in a running vCPU's mailbox to the CPU that it runs on. False:
/// it is to be kicked.
#[cold]
#[inline(never)]
pub fn ring(tables: &Tables<Os>, vcpu: &Vcpu) -> bool {
    let Some((id, page)) =
        table_id(vcpu.id as usize).and_then(|id| Some((id, tables.running_page(id)?)))
    else {
        return false;
    };
    if !(vcpu.mailbox.hand_over(page) && tables.ring(id)) {
        // Of what is in the page it is to know, too; and since the caller looked where it
        // is, it may have gone to sleep, with nothing in its mailbox, or to another CPU.
        vcpu.poke();
    }
    true
}

impl Runner<'_, dyn VirtualCpu> {
    /// Turns AVIC on or off as the local APIC now is. Some: the rest of the VM
    /// is to follow before the guest is entered.
    #[cold]
    #[inline(never)]
    pub fn routes_changed(&mut self) -> Option<Todo> {
        if !global::get().avic {
            return None;
        }
        let mode = self.inner.lapic_mode();
        self.inner.hw.set_apic_mode(mode);
        self.inner.attention = true;
        Some(self.later(Later::ApicMode {
            virtualized: mode == ApicMode::XApic,
        }))
    }

    /// The CPU has put an IPI into its targets' register pages; those that do
    /// not run with AVIC have to look.
    pub fn wake_targets(&mut self) {
        self.vcpu.stats.inc(Stat::ApicWrite);
        let (Some(ipi), Some(tables)) = (self.inner.lapic.ipi_sent(), &self.vm.avic) else {
            return;
        };
        let vm = self.vm;
        apicbus::addressed(vm.slots(), ipi.dest, &mut |id| {
            // What has begun to run since then has looked.
            if !table_id(id).is_some_and(|id| tables.is_running(id))
                && let Some(v) = vm.vcpu(id)
            {
                v.poke();
            }
        });
    }
}
