//! Execution of a decoded instruction on behalf of the guest.
//!
//! Registers change only once all memory accesses of the instruction (of the
//! iteration, for string instructions) have succeeded, so that the guest can
//! execute it again after a fault. Read-modify-write sequences are not atomic
//! towards other CPUs, LOCK or not: the memory meant here is a device's.

use super::address::{LinearAddress, exception, linear_address};
use super::alu::{self, Res};
use super::{CodeMode, Inst, Mem, Op, Operand, shift, size_mask, strings};
use crate::cpu::{Access, CpuState, Event, Gpr, Reg, Seg};
use crate::paging::WalkError;

/// Why the bus did not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BusError {
    /// Nobody here answers to the address: the instruction belongs to
    /// userland.
    NotHere,
    /// The guest gets this exception.
    Fault(Event),
}

/// Memory and devices as the instruction reaches them.
pub trait Bus {
    /// Guest-physical address of a linear one for a data access by the
    /// current privilege level ([`crate::paging::translate`]).
    fn translate(&mut self, gla: u64, access: Access) -> Result<u64, WalkError>;
    /// Reads `size` (1, 2, 4 or 8) bytes, which lie within a page: memory or
    /// device registers.
    fn read(&mut self, gpa: u64, size: u8) -> Result<u64, BusError>;
    /// Writes likewise.
    fn write(&mut self, gpa: u64, size: u8, value: u64) -> Result<(), BusError>;
    /// The low 128 bits of a vector register; `None` where they are out of
    /// reach, which makes such moves [`Outcome::Unsupported`].
    fn vec_read(&mut self, _n: u8) -> Option<u128> {
        None
    }
    /// Writes the low 128 bits of a vector register and clears those above
    /// for a VEX-encoded move; false where they are out of reach.
    fn vec_write(&mut self, _n: u8, _value: u128, _vex: bool) -> bool {
        false
    }
}

/// What the CPU has already translated: spares a page-table walk, and says
/// where the access went in case that the guest changed its tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hint {
    /// Linear address that faulted.
    pub gla: u64,
    /// Its guest-physical address.
    pub gpa: u64,
}

/// How an emulation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done: move RIP behind the instruction.
    Done,
    /// A part of a REP string instruction is done and the registers say
    /// which: leave RIP, the guest executes the rest.
    Restart,
    /// Inject this; RIP stays, CR2 is set.
    Fault(Event),
    /// The bus said [`BusError::NotHere`]; registers are as before (as
    /// after the last iteration). Ask userland.
    NotHere,
    /// Not emulated.
    Unsupported,
}

/// Iterations of a REP string instruction in one call.
pub const REP_LIMIT: u64 = 4096;

/// Ends an emulation early.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stop {
    Fault(Event),
    NotHere,
    Unsupported,
}

impl From<BusError> for Stop {
    fn from(e: BusError) -> Self {
        match e {
            BusError::NotHere => Stop::NotHere,
            BusError::Fault(e) => Stop::Fault(e),
        }
    }
}

impl From<Event> for Stop {
    fn from(e: Event) -> Self {
        Stop::Fault(e)
    }
}

pub(super) type Result<T, E = Stop> = core::result::Result<T, E>;

/// Executes `inst`, whose first byte is at the guest's RIP.
pub fn emulate<C: CpuState + ?Sized, B: Bus>(
    inst: &Inst,
    cpu: &mut C,
    bus: &mut B,
    hint: Option<Hint>,
) -> Outcome {
    let mode = CodeMode::of(cpu);
    let mut m = Machine {
        inst,
        cpu,
        bus,
        mode,
        hint,
    };
    let done = match inst.op {
        Op::Movs | Op::Cmps | Op::Stos | Op::Lods | Op::Scas => strings::run(&mut m),
        _ => m.run().map(|()| true),
    };
    match done {
        Ok(true) => Outcome::Done,
        Ok(false) => Outcome::Restart,
        Err(Stop::Fault(e)) => Outcome::Fault(e),
        Err(Stop::NotHere) => Outcome::NotHere,
        Err(Stop::Unsupported) => Outcome::Unsupported,
    }
}

pub(super) struct Machine<'a, C: ?Sized, B> {
    pub(super) inst: &'a Inst,
    pub(super) cpu: &'a mut C,
    bus: &'a mut B,
    pub(super) mode: CodeMode,
    hint: Option<Hint>,
}

/// Bytes in guest-physical memory, in one page or two.
#[derive(Clone, Copy)]
pub(super) struct Place {
    first: u64,
    /// Guest-physical address of the second page's start and the number of
    /// bytes before it.
    second: Option<(u64, u8)>,
}

impl Place {
    fn byte(&self, n: u8) -> u64 {
        match self.second {
            Some((page, before)) if n >= before => page.wrapping_add(u64::from(n - before)),
            _ => self.first.wrapping_add(u64::from(n)),
        }
    }
}

/// An operand that is read, changed and written back.
#[derive(Clone, Copy)]
enum Target {
    Register(Operand),
    Memory(Place),
}

impl<C: CpuState + ?Sized, B: Bus> Machine<'_, C, B> {
    fn flags(&self) -> u64 {
        self.cpu.reg(Reg::Rflags)
    }

    pub(super) fn set_flags(&mut self, v: u64) {
        self.cpu.set_reg(Reg::Rflags, v);
    }

    fn translate(&mut self, gla: u64, access: Access) -> Result<u64> {
        if let Some(h) = self.hint
            && h.gla >> 12 == gla >> 12
        {
            return Ok(h.gpa & !0xfff | gla & 0xfff);
        }
        match self.bus.translate(gla, access) {
            Ok(gpa) => Ok(gpa),
            Err(WalkError::Fault(f)) => {
                self.cpu.set_reg(Reg::Cr2, f.cr2);
                Err(Stop::Fault(f.event()))
            }
            Err(WalkError::NoMemory(_)) => Err(Stop::Unsupported),
        }
    }

    /// Translates all pages of an operand before any byte of it is touched.
    pub(super) fn place(&mut self, a: LinearAddress, size: u8, access: Access) -> Result<Place> {
        let first = self.translate(a.gla, access)?;
        let before = 0x1000 - (a.gla & 0xfff);
        let second = if before < u64::from(size) {
            Some((self.translate(a.byte(before), access)?, before as u8))
        } else {
            None
        };
        Ok(Place { first, second })
    }

    pub(super) fn load(&mut self, p: Place, size: u8) -> Result<u64> {
        if p.second.is_none() {
            return Ok(self.bus.read(p.first, size)?);
        }
        let mut v = 0;
        for n in 0..size.min(8) {
            v |= (self.bus.read(p.byte(n), 1)? & 0xff) << (8 * n);
        }
        Ok(v)
    }

    pub(super) fn store(&mut self, p: Place, size: u8, v: u64) -> Result<()> {
        if p.second.is_none() {
            return Ok(self.bus.write(p.first, size, v & size_mask(size))?);
        }
        for n in 0..size.min(8) {
            self.bus.write(p.byte(n), 1, v >> (8 * n) & 0xff)?;
        }
        Ok(())
    }

    /// Place of `size` bytes at an offset of a segment.
    pub(super) fn at(&mut self, seg: Seg, offset: u64, size: u8, access: Access) -> Result<Place> {
        let a = linear_address(self.cpu, self.mode, seg, offset, size, access)?;
        self.place(a, size, access)
    }

    fn offset(&self) -> u64 {
        self.inst.offset(self.cpu, self.cpu.reg(Reg::Rip))
    }

    fn mem(&mut self, size: u8, access: Access) -> Result<Place> {
        let offset = self.offset();
        self.at(self.inst.seg, offset, size, access)
    }

    fn get_reg(&self, o: Operand, size: u8) -> u64 {
        match o {
            Operand::Reg(r) => self.cpu.gpr(r) & size_mask(size),
            Operand::HighByte(r) => self.cpu.gpr(r) >> 8 & 0xff,
            Operand::Imm => self.inst.imm as u64 & size_mask(size),
            _ => 0,
        }
    }

    /// Writes a register as the CPU does: 8 and 16 bits leave the rest alone,
    /// 32 bits clear the upper half.
    pub(super) fn set_reg(&mut self, o: Operand, size: u8, v: u64) {
        match o {
            Operand::Reg(r) => {
                let v = match size {
                    1 | 2 => {
                        let m = size_mask(size);
                        self.cpu.gpr(r) & !m | v & m
                    }
                    4 => v & 0xffff_ffff,
                    _ => v,
                };
                self.cpu.set_gpr(r, v);
            }
            Operand::HighByte(r) => {
                let v = self.cpu.gpr(r) & !0xff00 | (v & 0xff) << 8;
                self.cpu.set_gpr(r, v);
            }
            _ => {}
        }
    }

    fn read(&mut self, o: Operand, size: u8) -> Result<u64> {
        if o == Operand::Mem {
            let p = self.mem(size, Access::READ)?;
            self.load(p, size)
        } else {
            Ok(self.get_reg(o, size))
        }
    }

    fn write(&mut self, o: Operand, size: u8, v: u64) -> Result<()> {
        if o == Operand::Mem {
            let p = self.mem(size, Access::WRITE)?;
            self.store(p, size, v)
        } else {
            self.set_reg(o, size, v);
            Ok(())
        }
    }

    fn target(&mut self, o: Operand, size: u8) -> Result<Target> {
        Ok(if o == Operand::Mem {
            Target::Memory(self.mem(size, Access::READ | Access::WRITE)?)
        } else {
            Target::Register(o)
        })
    }

    fn get(&mut self, t: Target, size: u8) -> Result<u64> {
        match t {
            Target::Memory(p) => self.load(p, size),
            Target::Register(o) => Ok(self.get_reg(o, size)),
        }
    }

    fn put(&mut self, t: Target, size: u8, v: u64) -> Result<()> {
        match t {
            Target::Memory(p) => self.store(p, size, v),
            Target::Register(o) => {
                self.set_reg(o, size, v);
                Ok(())
            }
        }
    }

    fn run(&mut self) -> Result<()> {
        let Inst {
            op,
            dst,
            src,
            size,
            src_size,
            ..
        } = *self.inst;
        let flags = self.flags();
        match op {
            Op::Mov | Op::Movnti => {
                let v = self.read(src, size)?;
                self.write(dst, size, v)
            }
            Op::Movzx => {
                let v = self.read(src, src_size)?;
                self.write(dst, size, v)
            }
            Op::Movsx => {
                let v = self.read(src, src_size)?;
                self.write(dst, size, alu::sign_extend(v, src_size))
            }
            Op::Movbe => {
                let v = self.read(src, size)?;
                let v = v.swap_bytes() >> (64 - 8 * u32::from(size.clamp(1, 8)));
                self.write(dst, size, v)
            }
            Op::Cmp | Op::Test => {
                let a = self.read(dst, size)?;
                let b = self.read(src, size)?;
                let r = alu::binary(op, a, b, size, flags).ok_or(Stop::Unsupported)?;
                self.set_flags(r.flags);
                Ok(())
            }
            // The source may be the memory operand, the destination then is
            // not.
            Op::Add | Op::Or | Op::Adc | Op::Sbb | Op::And | Op::Sub | Op::Xor => {
                let b = self.read(src, size)?;
                self.modify(dst, size, |a| alu::binary(op, a, b, size, flags))
            }
            Op::Not | Op::Neg | Op::Inc | Op::Dec => {
                self.modify(dst, size, |a| alu::unary(op, a, size, flags))
            }
            Op::Xchg | Op::Xadd => {
                let b = self.get_reg(src, size);
                let t = self.target(dst, size)?;
                let a = self.get(t, size)?;
                let r = if op == Op::Xchg {
                    Res { value: b, flags }
                } else {
                    alu::add(a, b, 0, size, flags)
                };
                // XADD of a register with itself leaves the sum.
                if let Target::Register(_) = t {
                    self.set_reg(src, size, a);
                    self.put(t, size, r.value)?;
                } else {
                    self.put(t, size, r.value)?;
                    self.set_reg(src, size, a);
                }
                self.set_flags(r.flags);
                Ok(())
            }
            Op::Cmpxchg => {
                let acc = Operand::Reg(Gpr::Rax);
                let old = self.get_reg(acc, size);
                let new = self.get_reg(src, size);
                let t = self.target(dst, size)?;
                let a = self.get(t, size)?;
                let r = alu::sub(old, a, 0, size, flags);
                if r.value == 0 {
                    self.put(t, size, new)?;
                } else {
                    // The CPU writes the old value back.
                    self.put(t, size, a)?;
                    self.set_reg(acc, size, a);
                }
                self.set_flags(r.flags);
                Ok(())
            }
            Op::Cmpxchg8b => self.cmpxchg8b(size, flags),
            Op::Bt | Op::Bts | Op::Btr | Op::Btc => self.bit(flags),
            Op::Bextr => {
                let v = self.read(src, size)?;
                let control = self.get_reg(self.inst.extra, size);
                let r = alu::bextr(v, control, size, flags);
                self.set_reg(dst, size, r.value);
                self.set_flags(r.flags);
                Ok(())
            }
            Op::Rol | Op::Ror | Op::Rcl | Op::Rcr | Op::Shl | Op::Shr | Op::Sar => {
                let count = self.get_reg(src, 1);
                self.modify(dst, size, |a| shift::shift(op, a, count, size, flags))
            }
            Op::Shld | Op::Shrd => {
                let fill = self.get_reg(src, size);
                let count = self.get_reg(self.inst.extra, 1);
                self.modify(dst, size, |a| {
                    shift::double(op, a, fill, count, size, flags)
                })
            }
            Op::Bsf | Op::Bsr => {
                let v = self.read(src, size)?;
                let n = if op == Op::Bsf {
                    v.trailing_zeros()
                } else {
                    63 ^ v.leading_zeros()
                };
                if v != 0 {
                    self.set_reg(dst, size, u64::from(n));
                }
                self.set_flags(if v == 0 {
                    flags | alu::ZF
                } else {
                    flags & !alu::ZF
                });
                Ok(())
            }
            Op::Imul => {
                let a = self.read(src, size)?;
                let b = match self.inst.extra {
                    Operand::None => self.get_reg(dst, size),
                    o => self.get_reg(o, size),
                };
                let (v, _, over) = shift::multiply(a, b, size, true);
                self.set_reg(dst, size, v);
                self.set_flags(shift::overflow(flags, over));
                Ok(())
            }
            Op::Mul | Op::ImulWide => {
                let b = self.read(dst, size)?;
                let a = self.cpu.gpr(Gpr::Rax);
                let (lo, hi, over) = shift::multiply(a, b, size, op == Op::ImulWide);
                self.set_wide(size, lo, hi);
                self.set_flags(shift::overflow(flags, over));
                Ok(())
            }
            Op::Div | Op::Idiv => {
                let d = self.read(dst, size)?;
                let a = self.cpu.gpr(Gpr::Rax);
                let hi = if size == 1 {
                    a >> 8
                } else {
                    self.cpu.gpr(Gpr::Rdx)
                };
                let (q, r) = shift::divide(a, hi, d, size, op == Op::Idiv)
                    .ok_or(Stop::Fault(Event::exception(0)))?;
                self.set_wide(size, q, r);
                Ok(())
            }
            Op::Cmov => {
                // The operand is read, and the upper half cleared, either way.
                let v = self.read(src, size)?;
                let old = self.get_reg(dst, size);
                let taken = shift::condition(self.inst.raw.opcode, flags);
                self.set_reg(dst, size, if taken { v } else { old });
                Ok(())
            }
            Op::Set => {
                let v = shift::condition(self.inst.raw.opcode, flags);
                self.write(dst, 1, u64::from(v))
            }
            Op::Smsw => {
                let v = self.cpu.reg(Reg::Cr0);
                self.write(dst, size, v)
            }
            Op::Push => {
                let v = self.read(dst, size)?;
                let (sp, stack) = self.stack_pointer();
                let new = sp.wrapping_sub(u64::from(size)) & size_mask(stack);
                let p = self.at(Seg::Ss, new, size, Access::WRITE)?;
                self.store(p, size, v)?;
                self.set_reg(Operand::Reg(Gpr::Rsp), stack, new);
                Ok(())
            }
            Op::Pop => self.pop(dst, size),
            Op::VecMov | Op::VecMovAligned | Op::VecMovLow => self.vector(),
            // The line of a device's register is not cached.
            Op::Clflush => self.mem(1, Access::READ).map(|_| ()),
            _ => Err(Stop::Unsupported),
        }
    }

    /// Two results: AL and AH, or rAX and rDX.
    fn set_wide(&mut self, size: u8, lo: u64, hi: u64) {
        let rax = Operand::Reg(Gpr::Rax);
        if size == 1 {
            self.set_reg(rax, 2, lo & 0xff | hi << 8);
        } else {
            self.set_reg(rax, size, lo);
            self.set_reg(Operand::Reg(Gpr::Rdx), size, hi);
        }
    }

    fn modify(&mut self, dst: Operand, size: u8, f: impl FnOnce(u64) -> Option<Res>) -> Result<()> {
        let t = self.target(dst, size)?;
        let a = self.get(t, size)?;
        let r = f(a).ok_or(Stop::Unsupported)?;
        self.put(t, size, r.value)?;
        self.set_flags(r.flags);
        Ok(())
    }

    fn cmpxchg8b(&mut self, size: u8, flags: u64) -> Result<()> {
        let half = size / 2;
        let wide = size == 16;
        let p = self.mem(size, Access::READ | Access::WRITE)?;
        if wide && p.first & 0xf != 0 {
            return Err(exception(self.cpu, 13).into());
        }
        let (lo, hi) = if p.second.is_some() {
            // Only eight bytes can cross here.
            let v = self.load(p, 8)?;
            (v & 0xffff_ffff, v >> 32)
        } else {
            let lo = self.load(p, half)?;
            (lo, self.load(upper(p, half), half)?)
        };
        let m = size_mask(half);
        let (eax, edx) = (Operand::Reg(Gpr::Rax), Operand::Reg(Gpr::Rdx));
        let equal = lo == self.cpu.gpr(Gpr::Rax) & m && hi == self.cpu.gpr(Gpr::Rdx) & m;
        let (new_lo, new_hi) = if equal {
            (self.cpu.gpr(Gpr::Rbx) & m, self.cpu.gpr(Gpr::Rcx) & m)
        } else {
            (lo, hi)
        };
        if p.second.is_some() {
            self.store(p, 8, new_lo | new_hi << 32)?;
        } else {
            self.store(p, half, new_lo)?;
            self.store(upper(p, half), half, new_hi)?;
        }
        if equal {
            self.set_flags(flags | alu::ZF);
        } else {
            self.set_reg(eax, half, lo);
            self.set_reg(edx, half, hi);
            self.set_flags(flags & !alu::ZF);
        }
        Ok(())
    }

    /// A register as bit offset reaches memory beyond the operand, to both
    /// sides (SDM Vol. 2A "BT").
    fn bit(&mut self, flags: u64) -> Result<()> {
        let Inst {
            op, dst, src, size, ..
        } = *self.inst;
        let bits = u32::from(size) * 8;
        let index = self.get_reg(src, size);
        let n = index as u32 & (bits - 1);
        let access = if op == Op::Bt {
            Access::READ
        } else {
            Access::READ | Access::WRITE
        };
        let t = match dst {
            Operand::Mem => {
                let mut offset = self.offset();
                if src != Operand::Imm {
                    let index = alu::sign_extend(index, size) as i64;
                    let words = index >> bits.trailing_zeros();
                    offset = offset.wrapping_add((words as u64).wrapping_mul(u64::from(size)))
                        & size_mask(self.inst.addr_size);
                }
                Target::Memory(self.at(self.inst.seg, offset, size, access)?)
            }
            o => Target::Register(o),
        };
        let v = self.get(t, size)?;
        let r = alu::bit(op, v, n, flags).ok_or(Stop::Unsupported)?;
        if op != Op::Bt {
            self.put(t, size, r.value)?;
        }
        self.set_flags(r.flags);
        Ok(())
    }

    /// RSP cut to the stack's address size, and that size, bytes.
    fn stack_pointer(&self) -> (u64, u8) {
        let size = if self.mode == CodeMode::Bits64 {
            8
        } else if self.cpu.seg(Seg::Ss).default32() {
            4
        } else {
            2
        };
        (self.cpu.gpr(Gpr::Rsp) & size_mask(size), size)
    }

    fn pop(&mut self, dst: Operand, size: u8) -> Result<()> {
        let (sp, stack) = self.stack_pointer();
        let p = self.at(Seg::Ss, sp, size, Access::READ)?;
        let v = self.load(p, size)?;
        let new = sp.wrapping_add(u64::from(size)) & size_mask(stack);
        if dst == Operand::Mem {
            // An address by RSP is computed after it has been incremented.
            let mut offset = self.offset();
            if let Mem {
                base: Some(Gpr::Rsp),
                ..
            } = self.inst.mem
            {
                offset = offset.wrapping_add(u64::from(size)) & size_mask(self.inst.addr_size);
            }
            let p = self.at(self.inst.seg, offset, size, Access::WRITE)?;
            self.store(p, size, v)?;
        }
        self.set_reg(Operand::Reg(Gpr::Rsp), stack, new);
        self.set_reg(dst, size, v);
        Ok(())
    }

    fn vector(&mut self) -> Result<()> {
        let Inst {
            op,
            dst,
            src,
            size,
            vex,
            ..
        } = *self.inst;
        if size > 16 {
            return Err(Stop::Unsupported);
        }
        let write = dst == Operand::Mem;
        let access = if write { Access::WRITE } else { Access::READ };
        let p = self.mem(size, access)?;
        if op == Op::VecMovAligned && p.first & 0xf != 0 {
            return Err(exception(self.cpu, 13).into());
        }
        let part = size.min(8);
        match (dst, src) {
            (Operand::Mem, Operand::Vec(n)) => {
                let v = self.bus.vec_read(n).ok_or(Stop::Unsupported)?;
                for i in (0..size).step_by(usize::from(part)) {
                    self.store_part(p, i, part, (v >> (8 * u32::from(i))) as u64)?;
                }
                Ok(())
            }
            (Operand::Vec(n), Operand::Mem) => {
                // Out of reach is found before a device's register is read.
                self.bus.vec_read(n).ok_or(Stop::Unsupported)?;
                let mut v = 0u128;
                for i in (0..size).step_by(usize::from(part)) {
                    v |= u128::from(self.load_part(p, i, part)?) << (8 * u32::from(i));
                }
                if self.bus.vec_write(n, v, vex) {
                    Ok(())
                } else {
                    Err(Stop::Unsupported)
                }
            }
            _ => Err(Stop::Unsupported),
        }
    }

    fn load_part(&mut self, p: Place, at: u8, size: u8) -> Result<u64> {
        if p.second.is_none() {
            return self.load(upper(p, at), size);
        }
        let mut v = 0;
        for n in 0..size {
            v |= (self.bus.read(p.byte(at + n), 1)? & 0xff) << (8 * n);
        }
        Ok(v)
    }

    fn store_part(&mut self, p: Place, at: u8, size: u8, v: u64) -> Result<()> {
        if p.second.is_none() {
            return self.store(upper(p, at), size, v);
        }
        for n in 0..size {
            self.bus.write(p.byte(at + n), 1, v >> (8 * n) & 0xff)?;
        }
        Ok(())
    }
}

/// The place `by` bytes further on in the same page.
fn upper(p: Place, by: u8) -> Place {
    Place {
        first: p.first.wrapping_add(u64::from(by)),
        second: None,
    }
}
