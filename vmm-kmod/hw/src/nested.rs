//! Nested page tables of either kind.

use crate::ept::{Ept, EptFormat, Generation, Invalidation, MemType, NptFormat, Options, Prot};
use crate::error::Error;
use crate::page::Pages;
use alloc::sync::Arc;
use vmm_core::host::{Gpa, Host, Hpa};

/// A guest-physical address space. The owner keeps it behind a lock.
pub enum NestedTables<H: Host> {
    /// VT-x's.
    Ept(Ept<H, EptFormat>),
    /// AMD-V's. Their depth is that of the host's own tables (APM Vol. 2
    /// §15.25.3): a host with five levels gets one table more on top, of which
    /// the first entry alone is used.
    Npt {
        /// Four levels.
        tables: Ept<H, NptFormat>,
        /// The fifth.
        top: Option<Pages<H>>,
    },
}

macro_rules! each {
    ($self:expr, $t:ident => $e:expr) => {
        match $self {
            NestedTables::Ept($t) => $e,
            NestedTables::Npt { tables: $t, .. } => $e,
        }
    };
}

impl<H: Host> NestedTables<H> {
    /// Empty extended page tables.
    pub fn ept(options: Options) -> Result<Self, Error> {
        Ok(NestedTables::Ept(Ept::new(options)?))
    }

    /// Empty tables for AMD-V; `five` where the host has five levels.
    pub fn npt(options: Options, five: bool) -> Result<Self, Error> {
        let tables = Ept::<H, NptFormat>::new(options)?;
        let top = if five {
            let mut top = Pages::new(0)?;
            let entry = tables.link();
            for (to, from) in top.bytes_mut().iter_mut().zip(entry.to_le_bytes()) {
                *to = from;
            }
            Some(top)
        } else {
            None
        };
        Ok(NestedTables::Npt { tables, top })
    }

    /// What the CPU is told: EPTP, or nCR3.
    pub fn root(&self) -> u64 {
        match self {
            NestedTables::Ept(t) => t.eptp(),
            NestedTables::Npt { tables, top } => {
                top.as_ref().map_or_else(|| tables.root_pa(), Pages::pa)
            }
        }
    }

    /// The generation counters, for vCPUs.
    pub fn generation(&self) -> Arc<Generation> {
        each!(self, t => t.generation())
    }

    /// See [`Ept::map`].
    pub fn map(
        &mut self,
        gpa: Gpa,
        hpa: Hpa,
        size: u64,
        prot: Prot,
        memory: MemType,
    ) -> Result<Invalidation, Error> {
        each!(self, t => t.map(gpa, hpa, size, prot, memory))
    }

    /// See [`Ept::unmap`].
    pub fn unmap(&mut self, gpa: Gpa, size: u64) -> Result<Invalidation, Error> {
        each!(self, t => t.unmap(gpa, size))
    }

    /// See [`Ept::walk`].
    pub fn walk(&self, gpa: Gpa) -> ([u64; 4], usize) {
        each!(self, t => t.walk(gpa))
    }

    /// See [`Ept::reclaim`].
    pub fn reclaim(&mut self) {
        each!(self, t => t.reclaim());
    }
}
