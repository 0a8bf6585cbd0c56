//! What a loader needs of a VM: its memory, and the registers of vCPU 0.

use crate::error::LoadError;
use std::collections::BTreeMap;
use std::fmt;

/// A register of the boot vCPU.
#[allow(missing_docs)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Register {
    Rax,
    Rbx,
    Rcx,
    Rdx,
    Rsi,
    Rdi,
    Rbp,
    Rsp,
    Rip,
    Rflags,
    Cr0,
    Cr3,
    Cr4,
    Efer,
    Cs,
    Ds,
    Es,
    Fs,
    Gs,
    Ss,
    Tr,
    Ldtr,
    Gdtr,
    Idtr,
}

/// A segment as a VMCS describes it (SDM Vol. 3C §25.4.1): the access word is
/// bits 55:40 of the descriptor, and bit 16 says "unusable".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes (expanded, not in pages).
    pub limit: u32,
    /// Access rights.
    pub access: u32,
}

/// A VM refused memory or a register.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetError {
    /// What was asked for, and the answer.
    pub what: String,
}

impl fmt::Display for TargetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for TargetError {}

impl From<TargetError> for LoadError {
    fn from(error: TargetError) -> Self {
        LoadError::new("VM", "guest", error.what)
    }
}

/// The result of a request to a VM.
pub type TargetResult<T> = Result<T, TargetError>;

/// A VM, or what stands for one in a test.
pub trait LoadTarget {
    /// Bytes of guest memory from address 0 up, all below 4 GiB.
    fn low_memory(&self) -> u64;

    /// Bytes of guest memory from 4 GiB up.
    fn high_memory(&self) -> u64;

    /// Copies `data` to guest physical address `gpa`.
    ///
    /// # Errors
    /// The range is not all guest memory.
    fn write(&mut self, gpa: u64, data: &[u8]) -> TargetResult<()>;

    /// Copies from guest physical address `gpa`.
    ///
    /// # Errors
    /// The range is not all guest memory.
    fn read(&self, gpa: u64, data: &mut [u8]) -> TargetResult<()>;

    /// Makes `[gpa, gpa + len)` read as zero. A target whose memory is fresh can
    /// leave it untouched, so that a large bss costs no host pages.
    ///
    /// # Errors
    /// The range is not all guest memory.
    fn zero(&mut self, gpa: u64, len: u64) -> TargetResult<()> {
        const ZEROES: [u8; 4096] = [0; 4096];
        let mut at = gpa;
        let mut left = len;
        while left > 0 {
            let step = left.min(ZEROES.len() as u64);
            self.write(at, &ZEROES[..step as usize])?;
            at += step;
            left -= step;
        }
        Ok(())
    }

    /// Sets a register (for a segment: its selector) of the boot vCPU.
    ///
    /// # Errors
    /// The VM refuses.
    fn set_register(&mut self, register: Register, value: u64) -> TargetResult<()>;

    /// Sets the hidden part of a segment register, GDTR or IDTR.
    ///
    /// # Errors
    /// The VM refuses.
    fn set_descriptor(&mut self, register: Register, descriptor: Descriptor) -> TargetResult<()>;

    /// Lets the boot vCPU run without paging, which a 32-bit entry needs.
    ///
    /// # Errors
    /// The CPU has no unrestricted guest mode.
    fn enable_unrestricted_guest(&mut self) -> TargetResult<()>;

    /// Whether the guest's CPUID leaf 0x15 states the TSC frequency exactly.
    fn has_tsc_leaf(&self) -> bool;
}

/// Plain memory with a register file: what the tests load into.
#[derive(Debug, Clone, Default)]
pub struct MemoryTarget {
    /// Guest memory from address 0.
    pub memory: Vec<u8>,
    /// What [`LoadTarget::high_memory`] answers; it has no backing.
    pub high: u64,
    /// What [`LoadTarget::has_tsc_leaf`] answers.
    pub tsc_leaf: bool,
    /// The registers that were set.
    pub registers: BTreeMap<Register, u64>,
    /// The descriptors that were set.
    pub descriptors: BTreeMap<Register, Descriptor>,
    /// Whether unrestricted guest mode was asked for.
    pub unrestricted: bool,
}

impl MemoryTarget {
    /// `size` bytes filled with 0xa5, so that a byte somebody forgot to clear shows.
    #[must_use]
    pub fn new(size: usize) -> Self {
        Self {
            memory: vec![0xa5; size],
            tsc_leaf: true,
            ..Self::default()
        }
    }

    fn range(&self, gpa: u64, len: usize) -> TargetResult<std::ops::Range<usize>> {
        usize::try_from(gpa)
            .ok()
            .and_then(|start| Some(start..start.checked_add(len)?))
            .filter(|range| range.end <= self.memory.len())
            .ok_or_else(|| TargetError {
                what: format!("no memory at {gpa:#x}, {len:#x} bytes"),
            })
    }
}

impl LoadTarget for MemoryTarget {
    fn low_memory(&self) -> u64 {
        self.memory.len() as u64
    }

    fn high_memory(&self) -> u64 {
        self.high
    }

    fn write(&mut self, gpa: u64, data: &[u8]) -> TargetResult<()> {
        let range = self.range(gpa, data.len())?;
        self.memory[range].copy_from_slice(data);
        Ok(())
    }

    fn read(&self, gpa: u64, data: &mut [u8]) -> TargetResult<()> {
        let range = self.range(gpa, data.len())?;
        data.copy_from_slice(&self.memory[range]);
        Ok(())
    }

    fn set_register(&mut self, register: Register, value: u64) -> TargetResult<()> {
        self.registers.insert(register, value);
        Ok(())
    }

    fn set_descriptor(&mut self, register: Register, descriptor: Descriptor) -> TargetResult<()> {
        self.descriptors.insert(register, descriptor);
        Ok(())
    }

    fn enable_unrestricted_guest(&mut self) -> TargetResult<()> {
        self.unrestricted = true;
        Ok(())
    }

    fn has_tsc_leaf(&self) -> bool {
        self.tsc_leaf
    }
}
