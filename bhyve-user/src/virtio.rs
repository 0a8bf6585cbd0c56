//! Virtio devices (virtio 1.2). [`pci`] is the transport, [`queue`] the rings,
//! [`worker`] the threads that serve a device's queues, [`wait`] what they
//! sleep on; a device is what implements [`Device`].
//!
//! A device's queues are divided into groups. Each group has a `Device` of its
//! own, a thread and a lock, so that queues of different groups never wait for
//! each other; what the parts of one device share is theirs to arrange. Most
//! devices are one group and answer requests: they implement
//! [`Device::serve`] and nothing else. One that has something to say by itself
//! (a network, a console) takes chains with [`Cx::pop`] when the host has data
//! for the guest, and tells in [`Device::sources`] what it waits for.

pub mod balloon;
pub mod blk;
pub mod console;
pub mod listener;
#[cfg(test)]
mod malformed_tests;
pub mod net;
pub mod p9;
pub mod pci;
pub mod queue;
pub mod rnd;
#[cfg(test)]
pub(crate) mod testbed;
pub mod vsock;
pub mod wait;
pub mod worker;

use std::ops::Range;

use vmmapi::GuestMemory;

use queue::{Chain, Malformed};
use wait::{Ready, Sources};
pub use worker::{Cx, Waker};

/// Feature bits that are every device's (§6).
pub mod feature {
    /// The device makes no sense of how buffers are cut (legacy drivers).
    pub const ANY_LAYOUT: u64 = 1 << 27;
    /// Indirect descriptor tables.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Event index: both sides say when they want to hear of something.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Virtio 1.0 or later.
    pub const VERSION_1: u64 = 1 << 32;
}

/// Device status bits (§2.1).
pub mod status {
    /// The driver is set up.
    pub const DRIVER_OK: u8 = 4;
    /// The driver is content with the features.
    pub const FEATURES_OK: u8 = 8;
    /// The device cannot go on without a reset.
    pub const NEEDS_RESET: u8 = 64;
}

/// What a device is, before it runs.
#[derive(Clone, Debug, Default)]
pub struct Identity {
    /// Virtio device type (§5): 2 block, 4 entropy.
    pub kind: u16,
    /// PCI class and subclass.
    pub class: (u8, u8),
    /// Feature bits of the device's own.
    pub features: u64,
    /// Sizes of its queues, at most [`worker::MAX_QUEUES`] of them.
    pub queues: Vec<u16>,
    /// Its configuration space at the start; [`Cx::set_config`] changes it.
    pub config: Vec<u8>,
    /// What of it the driver may write, offsets; [`Device::config_written`]
    /// hears of it.
    pub writable: Range<usize>,
}

/// Queues that are served together.
pub struct Group {
    /// Their numbers.
    pub queues: Vec<usize>,
    /// Who serves them.
    pub device: Box<dyn Device>,
}

/// A device ready to be put into a slot.
pub struct Built {
    /// What it is.
    pub identity: Identity,
    /// Its parts. The first is the one that hears of writes to the
    /// configuration space; a queue of no group is never served.
    pub groups: Vec<Group>,
}

impl Built {
    /// A device whose queues are all one group.
    pub fn single(identity: Identity, device: impl Device + 'static) -> Built {
        let queues = (0..identity.queues.len()).collect();
        Built {
            identity,
            groups: vec![Group {
                queues,
                device: Box::new(device),
            }],
        }
    }
}

/// Whether a queue is done with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Nothing to do until the driver notifies again, or something else
    /// happens that the device knows of.
    Idle,
    /// There may be more.
    More,
}

/// What became of a turn that must not wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// There was nothing to do.
    Idle,
    /// A request is done.
    Done,
    /// A request is there that the group's thread has to do.
    Later,
}

/// A group's device. All calls come with the group's lock held: for
/// [`Device::activate`], [`Device::reset`] and [`Device::try_turn`] from a vCPU, which waits, else
/// from the group's own thread, where it may wait for the host. Each call does
/// a bounded piece of work: between two the lock is let go of.
pub trait Device: Send {
    /// Serves one request of queue `queue` to the end; returns the bytes
    /// written to the chain's writable part. `features` is what the driver
    /// accepted.
    ///
    /// # Errors
    /// [`Malformed`] where the chain is no request at all: the device then
    /// stops until it is reset. A request that cannot be followed is answered
    /// with an error of the device's own instead.
    fn serve(
        &mut self,
        _queue: usize,
        _chain: &mut Chain,
        _memory: &GuestMemory,
        _features: u64,
    ) -> Result<u32, Malformed> {
        Err(Malformed::Request)
    }

    /// The driver has notified of `queue`, or the last turn said that there
    /// may be more: takes a turn at it. Unless a device says otherwise, a turn
    /// is one request.
    ///
    /// # Errors
    /// As for [`Device::serve`].
    fn turn(&mut self, queue: usize, cx: &mut Cx<'_>) -> Result<Turn, Malformed> {
        cx.serve_one(queue, |chain, memory, features| {
            self.serve(queue, chain, memory, features)
        })
    }

    /// As [`Device::turn`], but on the vCPU's own thread, before it goes on: a
    /// request that needs no waiting is cheapest done there. Only called if
    /// [`Device::at_once`] says so, and never while the group's thread is at
    /// work.
    ///
    /// # Errors
    /// As for [`Device::serve`].
    fn try_turn(&mut self, _queue: usize, _cx: &mut Cx<'_>) -> Result<Attempt, Malformed> {
        Ok(Attempt::Later)
    }

    /// Asked once: whether [`Device::try_turn`] is worth trying.
    fn at_once(&self) -> bool {
        false
    }

    /// The driver is up (DRIVER_OK). Old drivers may have used queues before.
    ///
    /// # Errors
    /// As for [`Device::serve`].
    fn activate(&mut self, _cx: &mut Cx<'_>) -> Result<(), Malformed> {
        Ok(())
    }

    /// The device was reset: its queues are gone, and chains that it kept with
    /// them.
    fn reset(&mut self) {}

    /// The driver has written to the configuration space.
    ///
    /// # Errors
    /// As for [`Device::serve`].
    fn config_written(&mut self, _cx: &mut Cx<'_>) -> Result<(), Malformed> {
        Ok(())
    }

    /// Asked once: whether [`Device::sources`] is to be asked, which costs a
    /// system call more when the thread sleeps.
    fn polls(&self) -> bool {
        false
    }

    /// Adds what the thread is to wait for besides notifications. Asked before
    /// each sleep; what is not wanted now (no chain to receive into) is left
    /// out. Descriptors stay open until the next call.
    fn sources(&mut self, _sources: &mut Sources) {}

    /// Sources are ready, their time is up, or a [`Waker`] was used (then
    /// `ready` may be empty). May be called once too often.
    ///
    /// # Errors
    /// As for [`Device::serve`].
    fn woken(&mut self, _ready: &[Ready], _cx: &mut Cx<'_>) -> Result<(), Malformed> {
        Ok(())
    }

    /// Called once, before anything else: how to get [`Device::woken`] called
    /// from elsewhere.
    fn attached(&mut self, _waker: Waker) {}
}
