//! The threads that serve a device's queues, one a group, so that no vCPU
//! waits for the host's disk.
//!
//! A group's queues and device are under one lock that is held for one turn
//! at a time: who holds all of a device's locks knows that nothing of the
//! guest's memory is in use, which is what a reset has to wait for.

mod cx;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::thread;

use vmmapi::GuestMemory;

pub use self::cx::Cx;
use super::queue::{Chain, Malformed, Queue};
use super::wait::{Ready, Sleeper, Sources};
use super::{Attempt, Built, Device, Group, Identity, Turn, status};
use crate::lock;
use crate::machine::Machine;
use crate::pci::function::PciFunction;
use crate::status::{RingCounter, show_rings};

/// No MSI-X vector (§4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;
/// ISR status: a queue has used buffers, or the configuration changed
/// (§4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;
/// Most queues of a device, a bit each in what a group is notified of.
pub const MAX_QUEUES: usize = 62;
/// Most requests that a vCPU does itself for one notification.
const AT_ONCE: usize = 4;
/// The other two bits: the configuration was written, a [`Waker`] was used.
const CONFIG_WRITTEN: u64 = 1 << 62;
const WOKEN: u64 = 1 << 63;

/// A group's state, under its lock.
struct Work {
    device: Box<dyn Device>,
    /// By number; those of other groups are `None` for ever.
    queues: Vec<Option<Queue>>,
    features: u64,
    chain: Chain,
}

/// What a group's thread is told, and where it sleeps.
struct Inbox {
    /// Queues with something to look at, a bit each.
    notified: AtomicU64,
    sleeper: Sleeper,
}

impl Inbox {
    /// Leaves word for the thread.
    fn notify(&self, bits: u64) {
        if self.notified.fetch_or(bits, Ordering::SeqCst) & bits != bits {
            self.sleeper.wake();
        }
    }
}

/// A group as others see it.
struct Crew {
    queues: Vec<usize>,
    /// [`Device::at_once`].
    at_once: bool,
    work: Mutex<Work>,
    inbox: Arc<Inbox>,
}

/// What transport and threads share.
pub struct Shared {
    /// Device status (§2.1).
    pub status: Mutex<u8>,
    /// MSI-X vectors: of each queue, and of configuration changes at the end.
    pub vectors: Vec<AtomicU32>,
    memory: GuestMemory,
    crews: Vec<Crew>,
    /// One a queue.
    counters: Vec<Arc<RingCounter>>,
    /// Which crew has a queue.
    crew_of: Vec<Option<usize>>,
    config: Mutex<Vec<u8>>,
    generation: AtomicU8,
    /// Grows with every reset.
    epoch: AtomicU32,
    /// Nothing is served until the next reset.
    broken: AtomicBool,
    isr: Mutex<u8>,
    /// The kernel rings for these: port and value.
    bells: Mutex<Vec<(u16, Option<u16>)>>,
    function: OnceLock<Weak<PciFunction>>,
    name: String,
    complained: AtomicBool,
}

/// Gets [`Device::woken`] called for a group, from any thread; does nothing
/// when the device is gone.
#[derive(Clone)]
pub struct Waker(Weak<Inbox>);

impl Waker {
    /// Has the group's thread look.
    pub fn wake(&self) {
        if let Some(inbox) = self.0.upgrade() {
            inbox.notify(WOKEN);
        }
    }
}

impl Shared {
    /// A device and its threads, called `name`; returns what it is as well.
    ///
    /// # Errors
    /// The host has no more threads or descriptors.
    pub fn start(
        name: String,
        built: Built,
        memory: GuestMemory,
    ) -> io::Result<(Identity, Arc<Shared>)> {
        let (identity, shared) = Shared::assemble(name, built, memory)?;
        show_rings(&shared.name, shared.counters.clone());
        for (index, crew) in shared.crews.iter().enumerate() {
            let (weak, inbox) = (Arc::downgrade(&shared), Arc::clone(&crew.inbox));
            let name = match index {
                0 => shared.name.clone(),
                n => format!("{}/{n}", shared.name),
            };
            let thread = thread::Builder::new().name(name);
            let spawned = thread.spawn(move || {
                crate::sandbox::join();
                run(&weak, index, &inbox);
            })?;
            crew.inbox.sleeper.set_thread(spawned.thread());
        }
        Ok((identity, shared))
    }

    /// A device without threads, for [`Shared::serve_here`].
    ///
    /// # Errors
    /// The host has no more descriptors.
    pub fn assemble(
        name: String,
        built: Built,
        memory: GuestMemory,
    ) -> io::Result<(Identity, Arc<Shared>)> {
        let Built {
            mut identity,
            groups,
        } = built;
        identity.queues.truncate(MAX_QUEUES);
        let count = identity.queues.len();
        let mut crew_of = vec![None; count];
        let mut crews = Vec::with_capacity(groups.len());
        for (number, Group { queues, device }) in groups.into_iter().enumerate() {
            for &q in &queues {
                if let Some(slot) = crew_of.get_mut(q) {
                    *slot = Some(number);
                }
            }
            crews.push(Crew {
                queues,
                at_once: device.at_once(),
                inbox: Arc::new(Inbox {
                    notified: AtomicU64::new(0),
                    // The kernel can ring what threads poll; what vCPUs do
                    // themselves needs no ringing.
                    sleeper: Sleeper::new(
                        device.polls() || cfg!(target_os = "linux") && !device.at_once(),
                    )?,
                }),
                work: Mutex::new(Work {
                    device,
                    queues: (0..count).map(|_| None).collect(),
                    features: 0,
                    chain: Chain::default(),
                }),
            });
        }
        let shared = Arc::new(Shared {
            status: Mutex::new(0),
            vectors: (0..=count)
                .map(|_| AtomicU32::new(NO_VECTOR.into()))
                .collect(),
            memory,
            crews,
            counters: (0..count).map(|_| Arc::default()).collect(),
            crew_of,
            config: Mutex::new(identity.config.clone()),
            generation: AtomicU8::new(0),
            epoch: AtomicU32::new(0),
            broken: AtomicBool::new(false),
            isr: Mutex::new(0),
            bells: Mutex::default(),
            function: OnceLock::new(),
            name,
            complained: AtomicBool::new(false),
        });
        for crew in &shared.crews {
            let waker = Waker(Arc::downgrade(&crew.inbox));
            lock(&crew.work).device.attached(waker);
        }
        Ok((identity, shared))
    }

    /// Does on the caller's thread what the groups' threads would do once, had
    /// they been started: so that a fuzzer's runs repeat.
    pub fn serve_here(&self) {
        for crew in &self.crews {
            self.pass(crew, &crew.inbox, &[], false);
        }
    }

    /// One pass of a group's thread; returns what it was notified of.
    fn pass(&self, crew: &Crew, inbox: &Inbox, ready: &[Ready], late: bool) -> u64 {
        let notified = inbox.notified.swap(0, Ordering::AcqRel);
        if notified & !WOKEN != 0 {
            self.serve(crew, notified);
        }
        if notified & WOKEN != 0 || late || !ready.is_empty() {
            let mut work = lock(&crew.work);
            if !self.broken.load(Ordering::Acquire) {
                self.with(crew, &mut work, |device, cx| device.woken(ready, cx));
            }
        }
        notified
    }

    /// Makes the function known that interrupts go out by.
    pub fn attach(&self, function: &Arc<PciFunction>) {
        let _ = self.function.set(Arc::downgrade(function));
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    fn crew(&self, queue: usize) -> Option<&Crew> {
        self.crews.get((*self.crew_of.get(queue)?)?)
    }

    /// Has the group's thread look at a queue, unless all of it can be done at
    /// once. Called by vCPUs, for a notification of the driver's.
    pub fn notify(&self, queue: usize) {
        // A device that needs a reset does nothing until then, and a queue
        // that does not run is skipped.
        if let Some(crew) = self.crew(queue)
            && !(crew.at_once && self.done_at_once(crew, queue))
        {
            crew.inbox.notify(1 << queue);
        }
    }

    /// The port at which the driver notifies of queues, if there is one now:
    /// where the machine can, notifications reach the threads without us.
    pub fn notified_at(&self, port: Option<u16>, machine: &dyn Machine) {
        let mut bells = lock(&self.bells);
        for (port, value) in bells.drain(..) {
            machine.doorbell(port, value, None);
        }
        let Some(port) = port else {
            return;
        };
        for crew in self.crews.iter().filter(|c| !c.at_once) {
            let Some(fd) = crew.inbox.sleeper.doorbell() else {
                continue;
            };
            // The value is the queue's number, which need not be looked at if
            // there is one thread only.
            let all = self.crews.len() == 1;
            for &q in crew.queues.iter().take(if all { 1 } else { MAX_QUEUES }) {
                let value = (!all).then_some(q as u16);
                if machine.doorbell(port, value, Some(fd)) {
                    bells.push((port, value));
                }
            }
        }
    }

    /// Does what waits in a queue as far as that needs no waiting and is not
    /// much; true if nothing is left.
    fn done_at_once(&self, crew: &Crew, queue: usize) -> bool {
        // The thread is at work: it sees what is new, or is told.
        let Ok(mut work) = crew.work.try_lock() else {
            return false;
        };
        if self.broken.load(Ordering::Acquire) {
            return false;
        }
        let done = self.with(crew, &mut work, |device, cx| {
            for _ in 0..AT_ONCE {
                match device.try_turn(queue, cx)? {
                    Attempt::Done => {}
                    Attempt::Idle => return Ok(true),
                    Attempt::Later => return Ok(false),
                }
            }
            Ok(false)
        });
        done == Some(true)
    }

    /// Starts or stops a queue. Waits for a turn that is under way.
    pub fn set_queue(&self, index: usize, queue: Option<Queue>, features: u64) {
        let Some(crew) = self.crew(index) else {
            return;
        };
        let mut work = lock(&crew.work);
        work.features = features;
        if let Some(slot) = work.queues.get_mut(index) {
            *slot = queue;
            if let (Some(queue), Some(counter)) = (slot, self.counters.get(index)) {
                queue.count_by(Arc::clone(counter));
            }
        }
    }

    /// Tells the device that its driver is up.
    pub fn activate(&self, features: u64) {
        for crew in &self.crews {
            let mut guard = lock(&crew.work);
            guard.features = features;
            self.with(crew, &mut guard, |device, cx| device.activate(cx));
            drop(guard);
            // It may wait for something else now.
            crew.inbox.notify(WOKEN);
        }
    }

    /// Stops every queue and forgets all interrupts; when this returns the
    /// device uses no guest memory any more.
    pub fn reset(&self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
        for crew in &self.crews {
            let mut work = lock(&crew.work);
            work.queues.fill_with(|| None);
            work.features = 0;
            work.device.reset();
            crew.inbox.notified.store(0, Ordering::SeqCst);
            drop(work);
            crew.inbox.notify(WOKEN);
        }
        self.broken.store(false, Ordering::Release);
        for v in &self.vectors {
            v.store(NO_VECTOR.into(), Ordering::Relaxed);
        }
        *lock(&self.status) = 0;
        self.take_isr();
    }

    /// Bytes of the configuration space from `offset` on, at most eight;
    /// zeroes behind its end.
    pub fn config_read(&self, offset: u64, size: u8) -> u64 {
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let config = lock(&self.config);
        let bytes = config.get(at..).unwrap_or_default();
        let bytes = bytes.iter().take(usize::from(size)).rev();
        bytes.fold(0, |v, &b| v << 8 | u64::from(b))
    }

    /// The driver writes to the configuration space, inside of `writable`.
    pub fn config_write(
        &self,
        offset: u64,
        size: u8,
        value: u64,
        writable: &std::ops::Range<usize>,
    ) {
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = at.saturating_add(size.into());
        if at < writable.start || end > writable.end {
            return;
        }
        if let Some(to) = lock(&self.config).get_mut(at..end) {
            for (to, from) in to.iter_mut().zip(value.to_le_bytes()) {
                *to = from;
            }
        }
        if let Some(crew) = self.crews.first() {
            crew.inbox.notify(CONFIG_WRITTEN);
        }
    }

    /// Changes with the configuration space (§2.5.1).
    pub fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    fn set_config(&self, offset: usize, bytes: &[u8]) {
        {
            let mut config = lock(&self.config);
            let end = offset.saturating_add(bytes.len());
            match config.get_mut(offset..end) {
                Some(to) if to != bytes => to.copy_from_slice(bytes),
                _ => return,
            }
            self.generation.fetch_add(1, Ordering::AcqRel);
        }
        // A driver that is not up yet reads it when it is.
        if *lock(&self.status) & status::DRIVER_OK != 0 {
            self.interrupt(self.vectors.len().saturating_sub(1), ISR_CONFIG);
        }
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
        self.broken.store(true, Ordering::Release);
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

    /// Has a group's device do something, and sends the interrupts that are
    /// due. `None` if the device cannot go on.
    fn with<T>(
        &self,
        crew: &Crew,
        work: &mut Work,
        call: impl FnOnce(&mut dyn Device, &mut Cx<'_>) -> Result<T, Malformed>,
    ) -> Option<T> {
        let mut cx = Cx {
            memory: &self.memory,
            features: work.features,
            queues: &mut work.queues,
            chain: &mut work.chain,
            shared: self,
        };
        let result = call(&mut *work.device, &mut cx).and_then(|value| {
            for &index in &crew.queues {
                // The lock is held, so that a reset comes before or after.
                if let Some(Some(q)) = work.queues.get_mut(index)
                    && q.wants_interrupt(&self.memory)?
                {
                    self.interrupt(index, ISR_QUEUE);
                }
            }
            Ok(value)
        });
        match result {
            Ok(value) => Some(value),
            Err(why) => {
                work.queues.fill_with(|| None);
                self.needs_reset(why);
                None
            }
        }
    }

    fn stopped(&self, epoch: u32) -> bool {
        self.epoch.load(Ordering::Acquire) != epoch || self.broken.load(Ordering::Acquire)
    }

    fn serve(&self, crew: &Crew, notified: u64) {
        let epoch = self.epoch.load(Ordering::Acquire);
        if notified & CONFIG_WRITTEN != 0 {
            let mut work = lock(&crew.work);
            if !self.stopped(epoch) {
                self.with(crew, &mut work, |device, cx| device.config_written(cx));
            }
        }
        let mut again = 0;
        for &index in crew.queues.iter().filter(|&&i| notified & 1 << i != 0) {
            if self.serve_queue(crew, index, epoch) {
                again |= 1 << index;
            }
        }
        if again != 0 {
            crew.inbox.notified.fetch_or(again, Ordering::AcqRel);
        }
    }

    /// At most a queue's worth of turns; true if there may be more.
    fn serve_queue(&self, crew: &Crew, index: usize, epoch: u32) -> bool {
        let mut left = u16::MAX;
        loop {
            let mut work = lock(&crew.work);
            if self.stopped(epoch) {
                return false;
            }
            let Some(Some(queue)) = work.queues.get(index) else {
                return false;
            };
            left = left.min(queue.size());
            if left == 0 {
                return true;
            }
            left -= 1;
            match self.with(crew, &mut work, |device, cx| device.turn(index, cx)) {
                Some(Turn::More) => {}
                Some(Turn::Idle) | None => return false,
            }
        }
    }
}

/// A group's thread.
fn run(weak: &Weak<Shared>, index: usize, inbox: &Inbox) {
    let (mut sources, mut ready, mut late) = (Sources::default(), Vec::new(), false);
    while let Some(shared) = weak.upgrade() {
        let Some(crew) = shared.crews.get(index) else {
            return;
        };
        let queues = crew.queues.iter().fold(0, |bits, q| bits | 1 << q);
        let notified = shared.pass(crew, inbox, &ready, late);
        match &inbox.sleeper {
            Sleeper::Park(_) if notified != 0 => {}
            Sleeper::Park(_) => {
                // Asleep, a thread keeps no device.
                drop(shared);
                Sleeper::park();
            }
            Sleeper::Poll(bell) => {
                sources.clear();
                lock(&crew.work).device.sources(&mut sources);
                drop(shared);
                let rung;
                (late, rung) = bell.sleep(&mut sources, &mut ready, || {
                    inbox.notified.load(Ordering::SeqCst) != 0
                });
                if rung {
                    // By the kernel perhaps, which does not say for which queue.
                    inbox.notified.fetch_or(queues, Ordering::AcqRel);
                }
            }
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The threads find nobody left, and end.
        for crew in &self.crews {
            crew.inbox.notify(WOKEN);
        }
    }
}
