//! The instruction's bytes and its prefixes (SDM Vol. 2A §2.1.1, §2.2.1).

use super::{CodeMode, DecodeError, Rep};
use crate::cpu::Seg;
use crate::paging::MAX_INST;

/// Reads the instruction byte by byte.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Cursor { bytes, at: 0 }
    }

    pub(super) fn len(&self) -> u8 {
        self.at as u8
    }

    #[inline]
    #[cfg_attr(target_os = "none", optimize(speed))]
    pub(super) fn peek(&self) -> Result<u8, DecodeError> {
        if self.at >= MAX_INST {
            return Err(DecodeError::TooLong);
        }
        self.bytes
            .get(self.at)
            .copied()
            .ok_or(DecodeError::Truncated)
    }

    #[inline]
    #[cfg_attr(target_os = "none", optimize(speed))]
    pub(super) fn u8(&mut self) -> Result<u8, DecodeError> {
        let b = self.peek()?;
        self.at += 1;
        Ok(b)
    }

    /// A little-endian number of 1, 2, 4 or 8 bytes, sign-extended.
    pub(super) fn signed(&mut self, bytes: u8) -> Result<i64, DecodeError> {
        let mut v = 0u64;
        for i in 0..bytes.min(8) {
            v |= u64::from(self.u8()?) << (8 * i);
        }
        Ok(match bytes {
            1 => i64::from(v as i8),
            2 => i64::from(v as i16),
            4 => i64::from(v as i32),
            _ => v as i64,
        })
    }
}

/// What stands before the opcode.
#[derive(Clone, Copy)]
pub(super) struct Prefixes {
    pub(super) mode: CodeMode,
    pub(super) seg: Option<Seg>,
    pub(super) opsize: bool,
    pub(super) addrsize: bool,
    pub(super) rep: Rep,
    pub(super) lock: bool,
    /// REX byte, 0 if there is none.
    pub(super) rex: u8,
}

impl Prefixes {
    /// Reads prefixes up to the opcode. Of a kind the last one counts; REX
    /// counts only right before the opcode.
    #[cfg_attr(target_os = "none", optimize(speed))]
    pub(super) fn read(c: &mut Cursor<'_>, mode: CodeMode) -> Result<Self, DecodeError> {
        let long = mode == CodeMode::Bits64;
        let mut p = Prefixes {
            mode,
            seg: None,
            opsize: false,
            addrsize: false,
            rep: Rep::None,
            lock: false,
            rex: 0,
        };
        loop {
            let b = c.peek()?;
            if long && b & 0xf0 == 0x40 {
                p.rex = b;
                c.u8()?;
                continue;
            }
            match b {
                // ES, CS, SS and DS mean nothing in 64-bit mode, and do not
                // cancel an FS or GS before them.
                0x26 | 0x2e | 0x36 | 0x3e if long => {}
                0x26 => p.seg = Some(Seg::Es),
                0x2e => p.seg = Some(Seg::Cs),
                0x36 => p.seg = Some(Seg::Ss),
                0x3e => p.seg = Some(Seg::Ds),
                0x64 => p.seg = Some(Seg::Fs),
                0x65 => p.seg = Some(Seg::Gs),
                0x66 => p.opsize = true,
                0x67 => p.addrsize = true,
                0xf0 => p.lock = true,
                0xf2 => p.rep = Rep::Repne,
                0xf3 => p.rep = Rep::Repe,
                _ => return Ok(p),
            }
            p.rex = 0;
            c.u8()?;
        }
    }

    pub(super) fn long(&self) -> bool {
        self.mode == CodeMode::Bits64
    }

    pub(super) fn rex_w(&self) -> bool {
        self.rex & 8 != 0
    }

    /// REX.R as bit 3 of a register's number.
    pub(super) fn rex_r(&self) -> u8 {
        (self.rex & 4) << 1
    }

    /// REX.X likewise.
    pub(super) fn rex_x(&self) -> u8 {
        (self.rex & 2) << 2
    }

    /// REX.B likewise.
    pub(super) fn rex_b(&self) -> u8 {
        (self.rex & 1) << 3
    }

    /// Operand size of a "v" operand, bytes.
    pub(super) fn operand_size(&self) -> u8 {
        match self.mode {
            CodeMode::Bits64 if self.rex_w() => 8,
            CodeMode::Bits16 => 2 << u8::from(self.opsize),
            _ => 4 >> u8::from(self.opsize),
        }
    }

    /// Operand size where 64-bit mode knows no 32 bits (PUSH, POP).
    pub(super) fn stack_size(&self) -> u8 {
        if self.long() && !self.opsize || self.rex_w() {
            8
        } else {
            self.operand_size()
        }
    }

    /// Address size, bytes.
    pub(super) fn address_size(&self) -> u8 {
        match (self.mode, self.addrsize) {
            (CodeMode::Bits64, false) => 8,
            (CodeMode::Bits16, false) | (CodeMode::Bits32, true) => 2,
            _ => 4,
        }
    }

    /// Neither 66 nor F2 nor F3: "NP" in the manual.
    pub(super) fn plain(&self) -> bool {
        !self.opsize && self.rep == Rep::None
    }
}
