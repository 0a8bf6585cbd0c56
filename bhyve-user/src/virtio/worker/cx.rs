//! What a group's thread hands to its device: queues, guest memory and the configuration.

use vmmapi::GuestMemory;

use super::Shared;
use crate::lock;
use crate::virtio::queue::{Chain, Malformed, Queue};
use crate::virtio::{Attempt, Turn};

/// What a device works with while it has its group's lock.
pub struct Cx<'a> {
    /// Guest memory.
    pub memory: &'a GuestMemory,
    /// What the driver accepted.
    pub features: u64,
    pub(super) queues: &'a mut [Option<Queue>],
    pub(super) chain: &'a mut Chain,
    pub(super) shared: &'a Shared,
}

impl Cx<'_> {
    /// A queue of the group, if it runs. Interrupts for what was given back
    /// are sent when the device returns.
    pub fn queue(&mut self, index: usize) -> Option<&mut Queue> {
        self.queues.get_mut(index)?.as_mut()
    }

    /// Takes the next chain of a queue; false if there is none or the queue
    /// does not run, and then the driver will notify of the next.
    ///
    /// # Errors
    /// [`Malformed`], to be returned.
    pub fn pop(&mut self, index: usize, chain: &mut Chain) -> Result<bool, Malformed> {
        let memory = self.memory;
        self.queue(index)
            .map_or(Ok(false), |q| q.pop(memory, chain))
    }

    /// Gives a chain back with `written` bytes in its writable part. One whose
    /// queue has stopped meanwhile is forgotten.
    ///
    /// # Errors
    /// [`Malformed`], to be returned.
    pub fn push(&mut self, index: usize, chain: &Chain, written: u32) -> Result<(), Malformed> {
        let memory = self.memory;
        self.queue(index)
            .map_or(Ok(()), |q| q.push(memory, chain, written))
    }

    /// Serves the next request of a queue with `serve`, which returns the
    /// bytes written.
    ///
    /// # Errors
    /// [`Malformed`], to be returned.
    pub fn serve_one(
        &mut self,
        index: usize,
        serve: impl FnOnce(&mut Chain, &GuestMemory, u64) -> Result<u32, Malformed>,
    ) -> Result<Turn, Malformed> {
        let Some(Some(queue)) = self.queues.get_mut(index) else {
            return Ok(Turn::Idle);
        };
        if !queue.pop(self.memory, self.chain)? {
            return Ok(Turn::Idle);
        }
        let written = serve(self.chain, self.memory, self.features)?;
        queue.push(self.memory, self.chain, written)?;
        Ok(Turn::More)
    }

    /// As [`Cx::serve_one`], but `serve` may say `None`: the request is then
    /// left for later.
    ///
    /// # Errors
    /// [`Malformed`], to be returned.
    pub fn try_serve_one(
        &mut self,
        index: usize,
        serve: impl FnOnce(&mut Chain, &GuestMemory, u64) -> Result<Option<u32>, Malformed>,
    ) -> Result<Attempt, Malformed> {
        let Some(Some(queue)) = self.queues.get_mut(index) else {
            return Ok(Attempt::Idle);
        };
        if !queue.pop(self.memory, self.chain)? {
            return Ok(Attempt::Idle);
        }
        let Some(written) = serve(self.chain, self.memory, self.features)? else {
            queue.unpop();
            return Ok(Attempt::Later);
        };
        queue.push(self.memory, self.chain, written)?;
        Ok(Attempt::Done)
    }

    /// The configuration space.
    pub fn config<T>(&self, look: impl FnOnce(&[u8]) -> T) -> T {
        look(&lock(&self.shared.config))
    }

    /// Changes the configuration space from `offset` on and tells the driver.
    pub fn set_config(&self, offset: usize, bytes: &[u8]) {
        self.shared.set_config(offset, bytes);
    }
}
