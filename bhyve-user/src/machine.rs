//! What a device may ask of the VM: interrupt lines, MSIs and the end of it.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

/// How a VM is asked to stop (`enum vm_suspend_how` of FreeBSD's vmm.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suspend {
    /// Reset; the process exits 0.
    Reset,
    /// Power-off; the process exits 1.
    PowerOff,
    /// Every vCPU halted with interrupts off; the process exits 2.
    Halt,
    /// Triple fault; the process exits 3.
    TripleFault,
}

/// Takes the bytes of one-byte OUTs to a port in the kernel, while it is open
/// and has room; else they come to the device.
pub trait OutRing: Send + Sync {
    /// Opens or closes it. A byte that is on its way when it closes may still
    /// arrive some microseconds later.
    fn set_open(&self, open: bool);
    /// Moves what is in it to `to`, in order.
    fn take(&self, to: &mut VecDeque<u8>);
}

/// Most bytes that [`OutRing::take`] gives.
pub const OUT_RING_LEN: usize = vmmapi::abi::layout::OUT_RING_LEN;

/// The VM as its devices see it. Failures are the implementation's to report:
/// a device that cannot raise its line has nothing better to do.
pub trait Machine: Send + Sync {
    /// Raises ISA interrupt `irq` at the 8259s and, where given, the I/O APIC
    /// pin (VM_ISA_ASSERT_IRQ).
    fn isa_assert(&self, irq: u8, ioapic: Option<u8>);
    /// Lowers what [`Machine::isa_assert`] raised.
    fn isa_deassert(&self, irq: u8, ioapic: Option<u8>);
    /// Makes ISA interrupt `irq` level triggered at the 8259s.
    fn isa_level_triggered(&self, irq: u8);
    /// Raises an I/O APIC pin.
    fn ioapic_assert(&self, pin: u8);
    /// Lowers an I/O APIC pin.
    fn ioapic_deassert(&self, pin: u8);
    /// What one-byte INs from a port answer until the next call, so that the
    /// kernel need not ask; `None` makes it ask. A machine may ask anyway.
    fn constant_port(&self, _port: u16, _value: Option<u8>) {}
    /// A ring, closed, for the bytes of OUTs to a port, if the machine has one.
    fn out_ring(&self, _port: u16) -> Option<Box<dyn OutRing>> {
        None
    }
    /// Makes two-byte OUTs (of `value`, or of any) to a port signal `fd` (see
    /// `vmmapi::Vm::set_doorbell`) instead of coming to the device, or ends that
    /// (`None`). False: the machine cannot.
    fn doorbell(&self, _port: u16, _value: Option<u16>, _fd: Option<BorrowedFd<'_>>) -> bool {
        false
    }
    /// Sends a message-signalled interrupt.
    fn msi(&self, address: u64, data: u64);
    /// Stops the VM; a VM that is stopping already stays on its way.
    fn suspend(&self, how: Suspend);
    /// The kernel's VM, which is given host devices; `None` where there is none.
    fn kernel(&self) -> Option<vmmapi::Vm> {
        None
    }
    /// Whether [`Machine::release_memory`] does anything.
    fn can_release_memory(&self) -> bool {
        false
    }
    /// Gives guest memory back to the host: what is touched later is zero.
    /// Address and length are multiples of 2 MiB. Returns the bytes.
    ///
    /// # Errors
    /// The kernel cannot, or the memory is wired.
    fn release_memory(&self, _gpa: u64, _len: u64) -> std::io::Result<u64> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
}

#[cfg(test)]
pub(crate) mod fake {
    //! A machine that writes down what it was asked.
    use super::*;
    use std::fs::File;
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Debug, PartialEq, Eq)]
    pub enum Event {
        IsaAssert(u8, Option<u8>),
        IsaDeassert(u8, Option<u8>),
        Level(u8),
        Assert(u8),
        Deassert(u8),
        Msi(u64, u64),
        Suspend(Suspend),
        Released(u64, u64),
    }

    #[derive(Default)]
    pub struct Fake {
        events: Mutex<Vec<Event>>,
        bells: Mutex<Vec<(u16, Option<u16>, File)>>,
    }

    impl Fake {
        pub fn new() -> Arc<Fake> {
            Arc::default()
        }
        /// Everything since the last call.
        pub fn take(&self) -> Vec<Event> {
            std::mem::take(&mut *crate::lock(&self.events))
        }
        /// The doorbells that there are: port and value.
        pub fn bells(&self) -> Vec<(u16, Option<u16>)> {
            let bells = crate::lock(&self.bells);
            bells
                .iter()
                .map(|(port, value, _)| (*port, *value))
                .collect()
        }
        /// Signals the eventfds of a port.
        pub fn ring(&self, port: u16) {
            for (_, _, fd) in crate::lock(&self.bells).iter().filter(|b| b.0 == port) {
                (&*fd).write_all(&1_u64.to_ne_bytes()).unwrap();
            }
        }
        fn push(&self, e: Event) {
            crate::lock(&self.events).push(e);
        }
    }

    impl Machine for Fake {
        fn isa_assert(&self, irq: u8, ioapic: Option<u8>) {
            self.push(Event::IsaAssert(irq, ioapic));
        }
        fn isa_deassert(&self, irq: u8, ioapic: Option<u8>) {
            self.push(Event::IsaDeassert(irq, ioapic));
        }
        fn isa_level_triggered(&self, irq: u8) {
            self.push(Event::Level(irq));
        }
        fn ioapic_assert(&self, pin: u8) {
            self.push(Event::Assert(pin));
        }
        fn ioapic_deassert(&self, pin: u8) {
            self.push(Event::Deassert(pin));
        }
        fn doorbell(&self, port: u16, value: Option<u16>, fd: Option<BorrowedFd<'_>>) -> bool {
            let mut bells = crate::lock(&self.bells);
            bells.retain(|(p, v, _)| (*p, *v) != (port, value));
            let file = fd.map(|fd| File::from(fd.try_clone_to_owned().unwrap()));
            bells.extend(file.map(|file| (port, value, file)));
            true
        }
        fn msi(&self, address: u64, data: u64) {
            self.push(Event::Msi(address, data));
        }
        fn suspend(&self, how: Suspend) {
            self.push(Event::Suspend(how));
        }
        fn can_release_memory(&self) -> bool {
            true
        }
        fn release_memory(&self, gpa: u64, len: u64) -> std::io::Result<u64> {
            self.push(Event::Released(gpa, len));
            Ok(len)
        }
    }
}
