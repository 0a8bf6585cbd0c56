//! Virtio devices (virtio 1.2). [`pci`] is the transport, [`queue`] the rings,
//! [`worker`] the thread that serves a device's requests; a device is what
//! implements [`Device`].

pub mod blk;
pub mod pci;
pub mod queue;
pub mod rnd;
pub mod worker;

use vmmapi::GuestMemory;

use queue::{Chain, Malformed};

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
#[derive(Clone, Debug)]
pub struct Identity {
    /// Virtio device type (§5): 2 block, 4 entropy.
    pub kind: u16,
    /// PCI class and subclass.
    pub class: (u8, u8),
    /// Feature bits of the device's own.
    pub features: u64,
    /// Sizes of its queues.
    pub queues: Vec<u16>,
    /// Its configuration space, which never changes.
    pub config: Vec<u8>,
}

/// A device that serves requests, on its worker's thread.
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
        queue: usize,
        chain: &mut Chain,
        memory: &GuestMemory,
        features: u64,
    ) -> Result<u32, Malformed>;
}
