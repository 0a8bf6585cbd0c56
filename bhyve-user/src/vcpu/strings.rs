//! INS and OUTS.

use vmmapi::abi::limits::{PROT_READ, PROT_WRITE};
use vmmapi::{CpuMode, InoutStr, RegName, Result};

use super::Next;
use super::inout::unclaimed;
use super::ops::{Memory, VcpuOps};
use super::{GP, UD};
use crate::bus::{PortBus, ones};

/// Elements done before the guest runs again, so that its interrupts wait no
/// longer than that.
const BATCH: u64 = 256;
const SS_FAULT: u8 = 12;
const AC_FAULT: u8 = 17;
const CR0_AM: u64 = 1 << 18;
const RFLAGS_DF: u64 = 1 << 10;
const RFLAGS_AC: u64 = 1 << 18;

/// The low bytes of a register that an address of `size` bytes uses.
fn low(size: u8, value: u64) -> u64 {
    value & ones(size)
}

/// A register after its low bytes were written (SDM Vol. 1 §3.4.1.1).
fn merged(vcpu: &impl VcpuOps, reg: RegName, size: u8, value: u64) -> Result<u64> {
    if size >= 4 {
        return Ok(low(size, value));
    }
    let old = vcpu.registers(&[reg])?.first().copied().unwrap_or(0);
    Ok((old & !ones(size)) | low(size, value))
}

/// The linear address of an element, or the exception that it causes (SDM
/// Vol. 3A §5.3, §3.3.7.1).
fn linear(s: &InoutStr, index: u64, bytes: u8) -> std::result::Result<u64, (u8, Option<u32>)> {
    let fault = if s.seg_name == RegName::Ss {
        SS_FAULT
    } else {
        GP
    };
    let gp = Err((fault, Some(0)));
    let last = u64::from(bytes).saturating_sub(1);
    if s.paging.cpu_mode == CpuMode::Bits64.raw() {
        let based = matches!(s.seg_name, RegName::Fs | RegName::Gs);
        let gla = index.wrapping_add(if based { s.seg_desc.base } else { 0 });
        let canonical = |a: u64| ((a as i64) << 16 >> 16) as u64 == a;
        return if canonical(gla) && canonical(gla.wrapping_add(last)) {
            Ok(gla)
        } else {
            gp
        };
    }
    let access = s.seg_desc.access;
    let unusable = access & (1 << 16) != 0;
    let expand_down = access & 0x0c == 0x04;
    let limit = u64::from(s.seg_desc.limit);
    let end = index.wrapping_add(last);
    let outside = if expand_down {
        let top = if access & (1 << 14) != 0 {
            0xffff_ffff
        } else {
            0xffff
        };
        index <= limit || end > top
    } else {
        end > limit
    };
    if (unusable && s.paging.cpu_mode != CpuMode::Real.raw()) || outside {
        return gp;
    }
    Ok(s.seg_desc.base.wrapping_add(index) & 0xffff_ffff)
}

/// Copies between guest-linear memory and `bytes`; `None` after a fault.
fn copy(
    vcpu: &impl VcpuOps,
    memory: &impl Memory,
    s: &InoutStr,
    gla: u64,
    bytes: &mut [u8],
) -> Result<Option<bool>> {
    let prot = if s.inout.input { PROT_WRITE } else { PROT_READ };
    let mut parts = [(0, 0_usize); 2];
    let first = (0x1000 - (gla & 0xfff) as usize).min(bytes.len());
    let lens = [first, bytes.len() - first];
    let mut at = gla;
    for (part, len) in parts.iter_mut().zip(lens) {
        if len > 0 {
            // Both pages are translated before anything is touched.
            let Some(gpa) = vcpu.translate(&s.paging, at, prot)? else {
                return Ok(None);
            };
            *part = (gpa, len);
            at = at.wrapping_add(len as u64);
        }
    }
    let mut rest = bytes;
    for (gpa, len) in parts {
        let (now, later) = rest.split_at_mut(len.min(rest.len()));
        let done = if s.inout.input {
            memory.write(gpa, now)
        } else {
            memory.read(gpa, now)
        };
        if !done && len > 0 {
            return Ok(Some(false));
        }
        rest = later;
    }
    Ok(Some(true))
}

/// Does an INS or OUTS, up to `BATCH` elements of it.
pub fn emulate(
    ports: &PortBus,
    strict: bool,
    vcpu: &impl VcpuOps,
    memory: &impl Memory,
    s: &InoutStr,
) -> Result<Next> {
    let io = &s.inout;
    if !matches!(io.bytes, 1 | 2 | 4) || !matches!(s.addrsize, 2 | 4 | 8) {
        vcpu.inject_fault(UD, None)?;
        return Ok(Next::Run);
    }
    let device = ports.get(io.port);
    if device.is_none() && strict {
        return Ok(unclaimed(io));
    }
    let index_reg = if io.input { RegName::Rdi } else { RegName::Rsi };
    let step = if s.rflags & RFLAGS_DF != 0 {
        u64::from(io.bytes).wrapping_neg()
    } else {
        io.bytes.into()
    };
    let mut index = low(s.addrsize, s.index);
    let mut count = low(s.addrsize, s.count);
    let mut fault = None;
    let mut page_fault = false;
    for _ in 0..count.min(BATCH) {
        let gla = match linear(s, index, io.bytes) {
            Ok(gla) => gla,
            Err(f) => {
                fault = Some(f);
                break;
            }
        };
        let aligned = gla.is_multiple_of(io.bytes.into());
        if !aligned && s.paging.cpl == 3 && s.cr0 & CR0_AM != 0 && s.rflags & RFLAGS_AC != 0 {
            fault = Some((AC_FAULT, Some(0)));
            break;
        }
        let mut buf = [0; 4];
        let Some(bytes) = buf.get_mut(..usize::from(io.bytes)) else {
            break;
        };
        if io.input {
            // Translated before the port is read: reading it may consume.
            let probe = vcpu.translate(&s.paging, gla, PROT_WRITE)?;
            if probe.is_none() {
                page_fault = true;
                break;
            }
            let value = device
                .and_then(|d| d.port_read(io.port, io.bytes))
                .unwrap_or(u32::MAX);
            for (b, v) in bytes.iter_mut().zip(value.to_le_bytes()) {
                *b = v;
            }
        }
        match copy(vcpu, memory, s, gla, bytes)? {
            None => {
                page_fault = true;
                break;
            }
            Some(false) => {
                return Ok(Next::Fail(format!(
                    "INS or OUTS at port {:#x}: neither memory nor a device is at its other operand, linear {gla:#x}",
                    io.port
                )));
            }
            Some(true) => {}
        }
        if !io.input
            && let Some(d) = device
        {
            d.port_write(io.port, io.bytes, u32::from_le_bytes(buf));
        }
        index = low(s.addrsize, index.wrapping_add(step));
        count -= 1;
    }
    let value = merged(vcpu, index_reg, s.addrsize, index)?;
    vcpu.set_register(index_reg, value)?;
    if io.rep {
        let value = merged(vcpu, RegName::Rcx, s.addrsize, count)?;
        vcpu.set_register(RegName::Rcx, value)?;
    }
    if let Some((vector, code)) = fault {
        vcpu.inject_fault(vector, code)?;
    } else if count > 0 && !page_fault {
        vcpu.restart_instruction()?;
    }
    Ok(Next::Run)
}

#[cfg(test)]
mod tests {
    use super::super::ops::fake::Fake;
    use super::*;
    use crate::bus::PortDevice;
    use std::sync::{Arc, Mutex};
    use vmmapi::{GuestPaging, Inout, SegDesc};

    struct Dev(Mutex<Vec<u32>>);
    impl PortDevice for Dev {
        fn port_read(&self, _: u16, _: u8) -> Option<u32> {
            let mut v = crate::lock(&self.0);
            let n = v.len() as u32;
            v.push(n);
            Some(0x4030_2010 + n)
        }
        fn port_write(&self, _: u16, _: u8, value: u32) -> bool {
            crate::lock(&self.0).push(value);
            true
        }
    }

    struct Rig {
        ports: PortBus,
        dev: Arc<Dev>,
        cpu: Fake,
    }

    fn rig() -> Rig {
        let dev = Arc::new(Dev(Mutex::default()));
        let ports = PortBus::default();
        ports.claim(0xe0, 4, dev.clone()).unwrap();
        Rig {
            ports,
            dev,
            cpu: Fake::new(),
        }
    }

    fn exit(input: bool, bytes: u8, index: u64, count: u64) -> InoutStr {
        InoutStr {
            inout: Inout {
                port: 0xe0,
                bytes,
                input,
                string: true,
                rep: true,
                eax: 0,
            },
            paging: GuestPaging {
                cpu_mode: CpuMode::Bits64.raw(),
                ..GuestPaging::default()
            },
            rflags: 2,
            cr0: 0x8000_0011,
            index,
            count,
            addrsize: 8,
            seg_name: RegName::Ds,
            seg_desc: SegDesc::default(),
        }
    }

    fn go(r: &Rig, s: &InoutStr) -> Next {
        emulate(&r.ports, false, &r.cpu, &r.cpu, s).unwrap()
    }

    #[test]
    fn outs_sends_memory_and_moves_the_registers() {
        let r = rig();
        r.cpu.memory.borrow_mut()[0xffc..0x1004].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(go(&r, &exit(false, 2, 0xffc, 4)), Next::Run);
        assert_eq!(*crate::lock(&r.dev.0), [0x0201, 0x0403, 0x0605, 0x0807]);
        assert_eq!(
            (r.cpu.get(RegName::Rsi), r.cpu.get(RegName::Rcx)),
            (Some(0x1004), Some(0))
        );
        assert!(!*r.cpu.restarted.borrow());
    }

    #[test]
    fn ins_backwards_with_16_bit_addresses_keeps_the_upper_halves() {
        let r = rig();
        r.cpu
            .set_register(RegName::Rdi, 0xaaaa_bbbb_cccc_0001)
            .unwrap();
        r.cpu.set_register(RegName::Rcx, 0x1234_0002).unwrap();
        let mut s = exit(true, 1, 0xaaaa_bbbb_cccc_0001, 0x1234_0002);
        s.addrsize = 2;
        s.rflags |= RFLAGS_DF;
        s.seg_name = RegName::Es;
        s.paging.cpu_mode = CpuMode::Protected.raw();
        s.seg_desc = SegDesc {
            base: 0x2000,
            limit: 0xffff,
            access: 0x93,
        };
        go(&r, &s);
        assert_eq!(r.cpu.memory.borrow()[0x2000..0x2002], [0x11, 0x10]);
        assert_eq!(r.cpu.get(RegName::Rdi), Some(0xaaaa_bbbb_cccc_ffff));
        assert_eq!(r.cpu.get(RegName::Rcx), Some(0x1234_0000));
    }

    #[test]
    fn long_strings_are_done_in_parts() {
        let r = rig();
        go(&r, &exit(false, 1, 0, 1000));
        assert_eq!(crate::lock(&r.dev.0).len(), 256);
        assert_eq!(r.cpu.get(RegName::Rcx), Some(744));
        assert!(*r.cpu.restarted.borrow());
    }

    #[test]
    fn a_page_fault_stops_before_the_port_is_read() {
        let r = rig();
        go(&r, &exit(true, 1, 0xeffe, 10));
        assert_eq!(crate::lock(&r.dev.0).len(), 2);
        assert_eq!(*r.cpu.faults.borrow(), [(14, Some(0))]);
        assert_eq!(
            (r.cpu.get(RegName::Rdi), r.cpu.get(RegName::Rcx)),
            (Some(0xf000), Some(8))
        );
        assert!(!*r.cpu.restarted.borrow(), "the fault is delivered first");
    }

    #[test]
    fn addresses_that_segments_forbid_fault() {
        let r = rig();
        go(&r, &exit(false, 4, 0x7fff_ffff_fffe, 1));
        let mut s = exit(false, 4, 0xfffe, 1);
        s.addrsize = 4;
        s.seg_name = RegName::Ss;
        s.paging.cpu_mode = CpuMode::Protected.raw();
        s.seg_desc = SegDesc {
            base: 0,
            limit: 0xffff,
            access: 0x93,
        };
        go(&r, &s);
        assert_eq!(*r.cpu.faults.borrow(), [(13, Some(0)), (12, Some(0))]);
        assert!(crate::lock(&r.dev.0).is_empty());
    }

    #[test]
    fn device_memory_as_operand_is_refused_in_words() {
        let r = rig();
        let Next::Fail(why) = go(&r, &exit(false, 1, 0x10_0000, 1)) else {
            panic!("went on")
        };
        assert!(why.contains("0x100000"), "{why}");
    }
}
