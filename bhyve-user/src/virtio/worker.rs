//! The thread that serves a device's queues, so that no vCPU waits for the
//! host's disk.
//!
//! The queues and the device are under one lock that is held for one request
//! at a time: who holds it knows that nothing of the guest's memory is in use,
//! which is what a reset has to wait for.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::thread::{self, Thread};

use vmmapi::GuestMemory;

use super::queue::{Chain, Malformed, Queue};
use super::{Device, status};
use crate::lock;
use crate::pci::function::PciFunction;

/// No MSI-X vector (§4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;
/// ISR status: a queue has used buffers, or the configuration changed
/// (§4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;
/// Most queues of a device, a bit each.
pub const MAX_QUEUES: usize = 32;

struct Work {
    device: Box<dyn Device>,
    queues: Vec<Option<Queue>>,
    features: u64,
    chain: Chain,
}

/// What transport and worker share.
pub struct Shared {
    /// Device status (§2.1).
    pub status: Mutex<u8>,
    /// MSI-X vectors: of each queue, and of configuration changes at the end.
    pub vectors: Vec<AtomicU32>,
    memory: GuestMemory,
    work: Mutex<Work>,
    /// Queues with something to look at.
    notified: AtomicU32,
    /// Grows with every reset.
    epoch: AtomicU32,
    isr: Mutex<u8>,
    thread: OnceLock<Thread>,
    function: OnceLock<Weak<PciFunction>>,
    name: String,
    complained: AtomicBool,
}

impl Shared {
    /// A device and its thread, called `name`; `queues` is at most
    /// [`MAX_QUEUES`].
    ///
    /// # Errors
    /// The host has no more threads.
    pub fn start(
        name: String,
        device: Box<dyn Device>,
        memory: GuestMemory,
        queues: usize,
    ) -> std::io::Result<Arc<Shared>> {
        let queues = queues.min(MAX_QUEUES);
        let shared = Arc::new(Shared {
            status: Mutex::new(0),
            vectors: (0..=queues)
                .map(|_| AtomicU32::new(NO_VECTOR.into()))
                .collect(),
            memory,
            work: Mutex::new(Work {
                device,
                queues: (0..queues).map(|_| None).collect(),
                features: 0,
                chain: Chain::default(),
            }),
            notified: AtomicU32::new(0),
            epoch: AtomicU32::new(0),
            isr: Mutex::new(0),
            thread: OnceLock::new(),
            function: OnceLock::new(),
            name: name.clone(),
            complained: AtomicBool::new(false),
        });
        let weak = Arc::downgrade(&shared);
        let spawned = thread::Builder::new().name(name).spawn(move || {
            while let Some(shared) = weak.upgrade() {
                let notified = shared.notified.swap(0, Ordering::Acquire);
                if notified != 0 {
                    shared.serve(notified);
                    continue;
                }
                drop(shared);
                thread::park();
            }
        })?;
        let _ = shared.thread.set(spawned.thread().clone());
        Ok(shared)
    }

    /// Makes the function known that interrupts go out by.
    pub fn attach(&self, function: &Arc<PciFunction>) {
        let _ = self.function.set(Arc::downgrade(function));
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Has the worker look at queues, a bit each.
    pub fn notify(&self, queues: u32) {
        // A device that needs a reset does nothing until then, and a queue
        // that does not run is skipped.
        if self.notified.fetch_or(queues, Ordering::Release) & queues != queues
            && let Some(thread) = self.thread.get()
        {
            thread.unpark();
        }
    }

    /// Starts or stops a queue. Waits for a request that is being served.
    pub fn set_queue(&self, index: usize, queue: Option<Queue>, features: u64) {
        let mut work = lock(&self.work);
        work.features = features;
        if let Some(slot) = work.queues.get_mut(index) {
            *slot = queue;
        }
    }

    /// Stops every queue and forgets all interrupts; when this returns the
    /// device uses no guest memory any more.
    pub fn reset(&self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
        let mut work = lock(&self.work);
        work.queues.fill_with(|| None);
        work.features = 0;
        self.notified.store(0, Ordering::Release);
        for v in &self.vectors {
            v.store(NO_VECTOR.into(), Ordering::Relaxed);
        }
        *lock(&self.status) = 0;
        drop(work);
        self.take_isr();
    }

    /// Reads the ISR status, which clears it and lowers the line.
    pub fn take_isr(&self) -> u8 {
        let mut isr = lock(&self.isr);
        if let Some(f) = self.function.get().and_then(Weak::upgrade) {
            f.set_intx(false);
        }
        std::mem::take(&mut *isr)
    }

    fn interrupt(&self, source: usize, bit: u8) {
        let Some(f) = self.function.get().and_then(Weak::upgrade) else {
            return;
        };
        let vector = self
            .vectors
            .get(source)
            .map_or(NO_VECTOR, |v| v.load(Ordering::Relaxed) as u16);
        // Under the lock, so that the line and the register agree.
        let mut isr = lock(&self.isr);
        *isr |= bit;
        if !f.message(vector) {
            f.set_intx(true);
        }
    }

    /// Stops the device until it is reset (§2.1.2).
    pub fn needs_reset(&self, why: Malformed) {
        {
            let mut status = lock(&self.status);
            if *status & status::NEEDS_RESET != 0 {
                return;
            }
            *status |= status::NEEDS_RESET;
        }
        // A guest can do this as often as it likes; one message is enough.
        if !self.complained.swap(true, Ordering::Relaxed) {
            eprintln!(
                "{}: {why}; the device waits for a reset by its driver\r",
                self.name
            );
        }
        self.interrupt(self.vectors.len().saturating_sub(1), ISR_CONFIG);
    }

    fn serve(&self, notified: u32) {
        let epoch = self.epoch.load(Ordering::Acquire);
        let mut again = 0;
        for index in (0..MAX_QUEUES).filter(|i| notified & 1 << i != 0) {
            if self.serve_queue(index, epoch) {
                again |= 1 << index;
            }
        }
        if again != 0 {
            self.notified.fetch_or(again, Ordering::AcqRel);
        }
    }

    /// At most a queue's worth of requests; true if there may be more.
    fn serve_queue(&self, index: usize, epoch: u32) -> bool {
        let mut left = u16::MAX;
        loop {
            let mut guard = lock(&self.work);
            let work = &mut *guard;
            if self.epoch.load(Ordering::Acquire) != epoch {
                return false;
            }
            let Some(Some(queue)) = work.queues.get_mut(index) else {
                return false;
            };
            left = left.min(queue.size());
            if left == 0 {
                return true;
            }
            left -= 1;
            let result = Self::serve_one(
                queue,
                index,
                &mut *work.device,
                &mut work.chain,
                &self.memory,
                work.features,
            );
            match result {
                // The lock is held, so that a reset comes before or after.
                Ok(None) => return false,
                Ok(Some(true)) => self.interrupt(index, ISR_QUEUE),
                Ok(Some(false)) => {}
                Err(why) => {
                    work.queues.fill_with(|| None);
                    self.needs_reset(why);
                    return false;
                }
            }
        }
    }

    /// Serves one request; says whether an interrupt is due, `None` if there
    /// was no request.
    fn serve_one(
        queue: &mut Queue,
        index: usize,
        device: &mut dyn Device,
        chain: &mut Chain,
        memory: &GuestMemory,
        features: u64,
    ) -> Result<Option<bool>, Malformed> {
        if !queue.pop(memory, chain)? {
            return Ok(None);
        }
        let written = device.serve(index, chain, memory, features)?;
        queue.push(memory, chain, written)?;
        queue.wants_interrupt(memory).map(Some)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The worker finds nobody left, and ends.
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }
}
