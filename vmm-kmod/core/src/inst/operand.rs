//! ModRM, SIB and displacement (SDM Vol. 2A §2.1.5, tables 2-1 to 2-3).

use super::prefix::{Cursor, Prefixes};
use super::{DecodeError, Mem, Operand};
use crate::cpu::{Gpr, Seg};

/// ModRM and what belongs to it.
#[derive(Clone, Copy)]
pub(super) struct ModRm {
    pub(super) byte: u8,
    pub(super) sib: Option<u8>,
    pub(super) mem: Mem,
    pub(super) disp_bytes: u8,
    /// Default segment of the memory operand.
    pub(super) seg: Seg,
    reg: u8,
    rm: u8,
    rex: bool,
}

impl ModRm {
    #[cfg_attr(target_os = "none", optimize(speed))]
    pub(super) fn read(c: &mut Cursor<'_>, p: &Prefixes) -> Result<Self, DecodeError> {
        let byte = c.u8()?;
        let mut m = ModRm {
            byte,
            sib: None,
            mem: Mem {
                scale: 1,
                ..Mem::default()
            },
            disp_bytes: 0,
            seg: Seg::Ds,
            reg: byte >> 3 & 7 | p.rex_r(),
            rm: byte & 7 | p.rex_b(),
            rex: p.rex != 0,
        };
        if m.is_mem() {
            if p.address_size() == 2 {
                m.address16(c)?;
            } else {
                m.address32(c, p)?;
            }
        }
        Ok(m)
    }

    pub(super) fn is_mem(&self) -> bool {
        self.byte < 0xc0
    }

    /// The reg field without REX, an opcode extension.
    pub(super) fn ext(&self) -> u8 {
        self.byte >> 3 & 7
    }

    /// The reg field's number, REX.R included.
    pub(super) fn reg_number(&self) -> u8 {
        self.reg
    }

    /// Register of the reg field with the given size.
    pub(super) fn reg(&self, size: u8) -> Operand {
        self.gpr(self.reg, size)
    }

    /// Register or memory of the rm field with the given size.
    pub(super) fn rm(&self, size: u8) -> Operand {
        if self.is_mem() {
            Operand::Mem
        } else {
            self.gpr(self.rm, size)
        }
    }

    fn gpr(&self, n: u8, size: u8) -> Operand {
        if size == 1 && !self.rex && (4..8).contains(&n) {
            Operand::HighByte(Gpr::from_encoding(n - 4))
        } else {
            Operand::Reg(Gpr::from_encoding(n))
        }
    }

    fn disp(&mut self, c: &mut Cursor<'_>, bytes: u8) -> Result<(), DecodeError> {
        self.disp_bytes = bytes;
        self.mem.disp = c.signed(bytes)?;
        Ok(())
    }

    fn address16(&mut self, c: &mut Cursor<'_>) -> Result<(), DecodeError> {
        let (base, index) = match self.byte & 7 {
            0 => (Some(Gpr::Rbx), Some(Gpr::Rsi)),
            1 => (Some(Gpr::Rbx), Some(Gpr::Rdi)),
            2 => (Some(Gpr::Rbp), Some(Gpr::Rsi)),
            3 => (Some(Gpr::Rbp), Some(Gpr::Rdi)),
            4 => (Some(Gpr::Rsi), None),
            5 => (Some(Gpr::Rdi), None),
            6 if self.byte < 0x40 => (None, None),
            6 => (Some(Gpr::Rbp), None),
            _ => (Some(Gpr::Rbx), None),
        };
        self.mem.base = base;
        self.mem.index = index;
        if base == Some(Gpr::Rbp) {
            self.seg = Seg::Ss;
        }
        match self.byte >> 6 {
            0 if base.is_none() => self.disp(c, 2),
            0 => Ok(()),
            1 => self.disp(c, 1),
            _ => self.disp(c, 2),
        }
    }

    fn address32(&mut self, c: &mut Cursor<'_>, p: &Prefixes) -> Result<(), DecodeError> {
        let mode = self.byte >> 6;
        let mut base = self.byte & 7;
        if base == 4 {
            let sib = c.u8()?;
            self.sib = Some(sib);
            let index = sib >> 3 & 7 | p.rex_x();
            if index != 4 {
                self.mem.index = Some(Gpr::from_encoding(index));
                self.mem.scale = 1 << (sib >> 6);
            }
            base = sib & 7;
            if base == 5 && mode == 0 {
                return self.disp(c, 4);
            }
        } else if base == 5 && mode == 0 {
            self.mem.rip_relative = p.long();
            return self.disp(c, 4);
        }
        let base = Gpr::from_encoding(base | p.rex_b());
        self.mem.base = Some(base);
        if matches!(base, Gpr::Rsp | Gpr::Rbp) {
            self.seg = Seg::Ss;
        }
        match mode {
            0 => Ok(()),
            1 => self.disp(c, 1),
            _ => self.disp(c, 4),
        }
    }
}
