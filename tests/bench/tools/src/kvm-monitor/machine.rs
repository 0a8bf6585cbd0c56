//! KVM as the machine that bhyve's devices are plugged into.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bhyve::machine::{Machine, Suspend};
use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;

/// bhyve(8)'s exit status for a power-off.
pub const POWERED_OFF: u8 = 1;
/// A signal arrived.
pub const EINTR: i32 = 4;

static ENDED: AtomicBool = AtomicBool::new(false);

/// The guest has powered off. It does so by an exit of its only vCPU, whose
/// thread looks here afterwards.
pub fn ended() -> bool {
    ENDED.load(Ordering::Relaxed)
}

/// The VM with KVM's interrupt controllers; their lines count as the I/O
/// APIC's pins do.
pub struct KvmMachine {
    vm: Arc<VmFd>,
}

impl KvmMachine {
    /// For `vm`.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm }
    }

    fn line(&self, line: u8, level: bool) {
        if let Err(e) = self.vm.set_irq_line(line.into(), level) {
            eprintln!("KVM_IRQ_LINE {line}: {e}\r");
        }
    }
}

impl Machine for KvmMachine {
    fn isa_assert(&self, irq: u8, ioapic: Option<u8>) {
        self.line(ioapic.unwrap_or(irq), true);
    }
    fn isa_deassert(&self, irq: u8, ioapic: Option<u8>) {
        self.line(ioapic.unwrap_or(irq), false);
    }
    // The guest programs the I/O APIC itself.
    fn isa_level_triggered(&self, _: u8) {}
    fn ioapic_assert(&self, pin: u8) {
        self.line(pin, true);
    }
    fn ioapic_deassert(&self, pin: u8) {
        self.line(pin, false);
    }
    fn msi(&self, address: u64, data: u64) {
        let msi = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data: data as u32,
            ..kvm_msi::default()
        };
        // The guest chose the address: a wrong one goes nowhere.
        let _ = self.vm.signal_msi(msi);
    }
    fn suspend(&self, _: Suspend) {
        ENDED.store(true, Ordering::Relaxed);
    }
}
