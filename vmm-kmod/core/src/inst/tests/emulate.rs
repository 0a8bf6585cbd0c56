//! Instructions against memory and a device.

use super::super::*;
use super::cpu::TestCpu;
use crate::cpu::{Access, CpuState, Event, SegDesc};
use crate::paging::{PageFault, WalkError};
use std::vec::Vec;

/// Linear addresses are physical ones, except that `absent` pages fault and
/// `device` pages answer by themselves.
struct TestBus {
    mem: Vec<u8>,
    device: u64,
    absent: u64,
    log: Vec<(char, u64, u8, u64)>,
    answer: u64,
    xmm: [u128; 16],
    /// What was to be translated.
    asked: Vec<(u64, Access)>,
}

const DEVICE: u64 = 0xfee0_0000;

fn bus() -> TestBus {
    TestBus {
        mem: std::vec![0; 0x10000],
        device: DEVICE,
        absent: 0x9000,
        log: Vec::new(),
        answer: 0x1122_3344_5566_7788,
        xmm: [0; 16],
        asked: Vec::new(),
    }
}

impl Bus for TestBus {
    fn translate(&mut self, gla: u64, access: Access) -> Result<u64, WalkError> {
        self.asked.push((gla, access));
        if gla & !0xfff == self.absent {
            let error_code = if access.contains(Access::WRITE) { 2 } else { 0 };
            return Err(WalkError::Fault(PageFault {
                error_code,
                cr2: gla,
            }));
        }
        Ok(gla)
    }
    fn read(&mut self, gpa: u64, size: u8) -> Result<u64, BusError> {
        assert!((gpa & 0xfff) + u64::from(size) <= 0x1000);
        if gpa & !0xfff == self.device {
            self.log.push(('r', gpa & 0xfff, size, 0));
            return Ok(self.answer & size_mask(size));
        }
        let mut v = 0;
        for i in 0..u64::from(size) {
            let b = self.mem.get((gpa + i) as usize).ok_or(BusError::NotHere)?;
            v |= u64::from(*b) << (8 * i);
        }
        Ok(v)
    }
    fn write(&mut self, gpa: u64, size: u8, value: u64) -> Result<(), BusError> {
        assert!((gpa & 0xfff) + u64::from(size) <= 0x1000);
        if gpa & !0xfff == self.device {
            self.log.push(('w', gpa & 0xfff, size, value));
            return Ok(());
        }
        for i in 0..u64::from(size) {
            *self
                .mem
                .get_mut((gpa + i) as usize)
                .ok_or(BusError::NotHere)? = (value >> (8 * i)) as u8;
        }
        Ok(())
    }
    fn vec_read(&mut self, n: u8) -> Option<u128> {
        Some(self.xmm[usize::from(n)])
    }
    fn vec_write(&mut self, n: u8, value: u128, _vex: bool) -> bool {
        self.xmm[usize::from(n)] = value;
        true
    }
}

fn run(cpu: &mut TestCpu, b: &mut TestBus, bytes: &[u8]) -> Outcome {
    let i = decode(bytes, CodeMode::of(cpu)).unwrap();
    assert_eq!(usize::from(i.len), bytes.len());
    emulate(&i, cpu, b, None)
}

fn done(cpu: &mut TestCpu, b: &mut TestBus, bytes: &[u8]) {
    assert_eq!(run(cpu, b, bytes), Outcome::Done, "{bytes:02x?}");
}

fn long() -> TestCpu {
    let mut c = TestCpu::new(CodeMode::Bits64);
    c.set_gpr(Gpr::Rbx, DEVICE);
    c
}

#[test]
fn device_registers_are_read_and_written_once_with_the_right_size() {
    let (mut c, mut b) = (long(), bus());
    c.set_gpr(Gpr::Rax, 0xaaaa_bbbb_cccc_dddd);
    done(&mut c, &mut b, &[0x8b, 0x43, 0x20]); // mov eax, [rbx+20h]
    assert_eq!(c.gpr(Gpr::Rax), 0x5566_7788);
    c.set_gpr(Gpr::Rax, 0xaaaa_bbbb_cccc_dddd);
    done(&mut c, &mut b, &[0x66, 0x8b, 0x03]); // mov ax, [rbx]
    assert_eq!(c.gpr(Gpr::Rax), 0xaaaa_bbbb_cccc_7788);
    done(&mut c, &mut b, &[0x8a, 0x23]); // mov ah, [rbx]
    assert_eq!(c.gpr(Gpr::Rax), 0xaaaa_bbbb_cccc_8888);
    done(&mut c, &mut b, &[0x48, 0x89, 0x43, 0x08]); // mov [rbx+8], rax
    done(&mut c, &mut b, &[0x88, 0x23]); // mov [rbx], ah
    done(
        &mut c,
        &mut b,
        &[0xc7, 0x83, 0xb0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
    );
    done(&mut c, &mut b, &[0x48, 0xc7, 0x03, 0xfe, 0xff, 0xff, 0xff]);
    assert_eq!(
        b.log,
        [
            ('r', 0x20, 4, 0),
            ('r', 0, 2, 0),
            ('r', 0, 1, 0),
            ('w', 8, 8, 0xaaaa_bbbb_cccc_8888),
            ('w', 0, 1, 0x88),
            ('w', 0xb0, 4, 0xffff_ffff),
            ('w', 0, 8, -2i64 as u64),
        ]
    );
}

#[test]
fn extension_and_byte_order() {
    let (mut c, mut b) = (long(), bus());
    b.answer = 0x80f1;
    c.set_gpr(Gpr::Rax, !0);
    done(&mut c, &mut b, &[0x0f, 0xb6, 0x03]); // movzx eax, byte
    assert_eq!(c.gpr(Gpr::Rax), 0xf1);
    done(&mut c, &mut b, &[0x0f, 0xbf, 0x03]); // movsx eax, word
    assert_eq!(c.gpr(Gpr::Rax), 0xffff_80f1);
    done(&mut c, &mut b, &[0x48, 0x0f, 0xbe, 0x03]); // movsx rax, byte
    assert_eq!(c.gpr(Gpr::Rax), 0xffff_ffff_ffff_fff1);
    b.answer = 0x8000_0000;
    done(&mut c, &mut b, &[0x48, 0x63, 0x03]); // movsxd rax, dword
    assert_eq!(c.gpr(Gpr::Rax), 0xffff_ffff_8000_0000);
    b.answer = 0x1122_3344;
    done(&mut c, &mut b, &[0x0f, 0x38, 0xf0, 0x03]); // movbe eax, [rbx]
    assert_eq!(c.gpr(Gpr::Rax), 0x4433_2211);
    done(&mut c, &mut b, &[0x66, 0x0f, 0x38, 0xf1, 0x03]); // movbe [rbx], ax
    assert_eq!(b.log.last(), Some(&('w', 0, 2, 0x1122)));
}

#[test]
fn read_modify_write() {
    let (mut c, mut b) = (long(), bus());
    b.answer = 0x10;
    c.set_gpr(Gpr::Rcx, 1);
    done(&mut c, &mut b, &[0x09, 0x0b]); // or [rbx], ecx
    done(&mut c, &mut b, &[0xf0, 0x83, 0x23, 0xef]); // lock and dword [rbx], ~10h
    assert_eq!(c.rflags & 0x40, 0x40);
    done(&mut c, &mut b, &[0xf7, 0x13]); // not
    done(&mut c, &mut b, &[0xff, 0x0b]); // dec
    done(&mut c, &mut b, &[0x3b, 0x0b]); // cmp ecx, [rbx]: 1 - 16 borrows
    assert_eq!(c.rflags & 1, 1);
    done(&mut c, &mut b, &[0xf7, 0x03, 0x10, 0, 0, 0]); // test dword [rbx], 10h
    assert_eq!(c.rflags & 0x41, 0);
    let w: Vec<u64> = b.log.iter().filter(|l| l.0 == 'w').map(|l| l.3).collect();
    assert_eq!(w, [0x11, 0, 0xffff_ffef, 0xf]);
}

#[test]
fn exchanges() {
    let (mut c, mut b) = (long(), bus());
    b.answer = 5;
    c.set_gpr(Gpr::Rcx, 9);
    done(&mut c, &mut b, &[0x87, 0x0b]); // xchg
    assert_eq!((c.gpr(Gpr::Rcx), b.log.last()), (5, Some(&('w', 0, 4, 9))));
    c.set_gpr(Gpr::Rcx, 9);
    done(&mut c, &mut b, &[0x0f, 0xc1, 0x0b]); // xadd
    assert_eq!((c.gpr(Gpr::Rcx), b.log.last()), (5, Some(&('w', 0, 4, 14))));
    c.set_gpr(Gpr::Rax, 5);
    c.set_gpr(Gpr::Rcx, 7);
    done(&mut c, &mut b, &[0x0f, 0xb1, 0x0b]); // cmpxchg, equal
    assert_eq!(
        (c.rflags & 0x40, b.log.last()),
        (0x40, Some(&('w', 0, 4, 7)))
    );
    c.set_gpr(Gpr::Rax, 6);
    done(&mut c, &mut b, &[0x0f, 0xb1, 0x0b]); // not equal
    assert_eq!(
        (c.rflags & 0x40, c.gpr(Gpr::Rax), b.log.last()),
        (0, 5, Some(&('w', 0, 4, 5)))
    );
    // cmpxchg8b in memory
    c.set_gpr(Gpr::Rdi, 0x1000);
    for (r, v) in [
        (Gpr::Rax, 0),
        (Gpr::Rdx, 0),
        (Gpr::Rbx, 0x11),
        (Gpr::Rcx, 0x22),
    ] {
        c.set_gpr(r, v);
    }
    done(&mut c, &mut b, &[0x0f, 0xc7, 0x0f]);
    assert_eq!(b.mem[0x1000..0x1008], [0x11, 0, 0, 0, 0x22, 0, 0, 0]);
    done(&mut c, &mut b, &[0x0f, 0xc7, 0x0f]);
    assert_eq!(
        (c.gpr(Gpr::Rax), c.gpr(Gpr::Rdx), c.rflags & 0x40),
        (0x11, 0x22, 0)
    );
    c.set_gpr(Gpr::Rdi, 0x1008);
    let cmpxchg16b = run(&mut c, &mut b, &[0x48, 0x0f, 0xc7, 0x0f]);
    assert_eq!(cmpxchg16b, Outcome::Fault(Event::GP0));
}

#[test]
fn bit_offsets_reach_beyond_the_operand() {
    let (mut c, mut b) = (long(), bus());
    c.set_gpr(Gpr::Rdi, 0x2000);
    c.set_gpr(Gpr::Rcx, 66);
    done(&mut c, &mut b, &[0x0f, 0xab, 0x0f]); // bts [rdi], ecx
    assert_eq!(b.mem[0x2008], 4);
    c.set_gpr(Gpr::Rcx, 0xffff_ffff);
    done(&mut c, &mut b, &[0x0f, 0xbb, 0x0f]); // btc [rdi], ecx: bit -1
    assert_eq!(b.mem[0x1fff], 0x80);
    done(&mut c, &mut b, &[0x0f, 0xa3, 0x0f]);
    assert_eq!(c.rflags & 1, 1);
    done(&mut c, &mut b, &[0x0f, 0xba, 0x37, 0x21]); // btr dword [rdi], 33: bit 1
    assert_eq!(b.mem[0x2000], 0);
    c.set_gpr(Gpr::Rcx, !0);
    done(&mut c, &mut b, &[0x48, 0x0f, 0xab, 0x0f]); // 64 bits
    assert_eq!(b.mem[0x1fff], 0x80);
}

#[test]
fn push_and_pop_of_memory() {
    let (mut c, mut b) = (long(), bus());
    c.set_gpr(Gpr::Rsp, 0x3010);
    done(&mut c, &mut b, &[0xff, 0x33]); // push qword [rbx]
    assert_eq!(c.gpr(Gpr::Rsp), 0x3008);
    assert_eq!(b.mem[0x3008..0x300c], [0x88, 0x77, 0x66, 0x55]);
    done(&mut c, &mut b, &[0x8f, 0x43, 0x10]); // pop qword [rbx+10h]
    assert_eq!(b.log.last(), Some(&('w', 0x10, 8, 0x1122_3344_5566_7788)));
    c.set_gpr(Gpr::Rsp, 0x3008);
    done(&mut c, &mut b, &[0x8f, 0x44, 0x24, 0x10]); // pop [rsp+10h]: after the increment
    assert_eq!(b.mem[0x3020], 0x88);
    let mut c = TestCpu::new(CodeMode::Bits16);
    c.set_gpr(Gpr::Rsp, 0xdead_0000);
    c.set_gpr(Gpr::Rbx, 0x100);
    b.mem[0x100] = 0x42;
    done(&mut c, &mut b, &[0xff, 0x37]); // push word [bx], SP wraps
    assert_eq!((c.gpr(Gpr::Rsp), b.mem[0xfffe]), (0xdead_fffe, 0x42));
}

#[test]
fn strings_count_and_step() {
    let (mut c, mut b) = (long(), bus());
    c.set_gpr(Gpr::Rdi, 0x4000);
    c.set_gpr(Gpr::Rcx, 3);
    c.set_gpr(Gpr::Rax, 0x0102_0304);
    done(&mut c, &mut b, &[0xf3, 0xab]); // rep stosd
    assert_eq!((c.gpr(Gpr::Rdi), c.gpr(Gpr::Rcx)), (0x400c, 0));
    assert_eq!(b.mem[0x4008..0x400d], [4, 3, 2, 1, 0]);
    // rep movsb from a device, downwards
    c.rflags |= 0x400;
    c.set_gpr(Gpr::Rsi, DEVICE + 1);
    c.set_gpr(Gpr::Rdi, 0x5001);
    c.set_gpr(Gpr::Rcx, 2);
    done(&mut c, &mut b, &[0xf3, 0xa4]);
    assert_eq!(b.log, [('r', 1, 1, 0), ('r', 0, 1, 0)]);
    assert_eq!((c.gpr(Gpr::Rsi), c.gpr(Gpr::Rdi)), (DEVICE - 1, 0x4fff));
    c.rflags &= !0x400;
    // repne scasb
    b.mem[0x6005] = 0x77;
    c.set_gpr(Gpr::Rax, 0x77);
    c.set_gpr(Gpr::Rdi, 0x6000);
    c.set_gpr(Gpr::Rcx, 100);
    done(&mut c, &mut b, &[0xf2, 0xae]);
    assert_eq!(
        (c.gpr(Gpr::Rdi), c.gpr(Gpr::Rcx), c.rflags & 0x40),
        (0x6006, 94, 0x40)
    );
    // repe cmpsb
    c.set_gpr(Gpr::Rsi, 0x7000);
    c.set_gpr(Gpr::Rdi, 0x6000);
    c.set_gpr(Gpr::Rcx, 100);
    done(&mut c, &mut b, &[0xf3, 0xa6]);
    assert_eq!(
        (c.gpr(Gpr::Rsi), c.gpr(Gpr::Rcx), c.rflags & 0x41),
        (0x7006, 94, 1)
    );
    // lodsw into AX
    c.set_gpr(Gpr::Rax, !0);
    c.set_gpr(Gpr::Rsi, 0x6005);
    done(&mut c, &mut b, &[0x66, 0xad]);
    assert_eq!(c.gpr(Gpr::Rax), 0xffff_ffff_ffff_0077);
    // ECX = 0
    c.set_gpr(Gpr::Rcx, 1 << 32);
    done(&mut c, &mut b, &[0x67, 0xf3, 0xaa]);
    assert_eq!(c.gpr(Gpr::Rdi), 0x6006);
}

#[test]
fn a_long_rep_gives_the_guest_its_turn() {
    let (mut c, mut b) = (long(), bus());
    c.set_gpr(Gpr::Rdi, 0x1000);
    c.set_gpr(Gpr::Rcx, REP_LIMIT + 5);
    assert_eq!(run(&mut c, &mut b, &[0xf3, 0xaa]), Outcome::Restart);
    assert_eq!(c.gpr(Gpr::Rcx), 5);
    done(&mut c, &mut b, &[0xf3, 0xaa]);
    c.set_gpr(Gpr::Rdi, 0x1000);
    c.set_gpr(Gpr::Rcx, REP_LIMIT);
    done(&mut c, &mut b, &[0xf3, 0xaa]);
}

#[test]
fn faults_leave_the_instruction_to_be_executed_again() {
    let (mut c, mut b) = (long(), bus());
    c.set_gpr(Gpr::Rsi, DEVICE);
    c.set_gpr(Gpr::Rdi, 0x8ffe);
    c.set_gpr(Gpr::Rcx, 2);
    // The second element crosses into the absent page.
    let f = run(&mut c, &mut b, &[0xf3, 0xa5]);
    assert_eq!(f, Outcome::Fault(Event::exception_with(14, 2)));
    assert_eq!(
        (c.cr2, c.gpr(Gpr::Rcx), c.gpr(Gpr::Rdi)),
        (0x9000, 2, 0x8ffe)
    );
    assert!(b.log.is_empty(), "the device must not have been read");
    assert_eq!(b.mem[0x8ffe], 0);
    // Nobody at the address: registers stay.
    c.set_gpr(Gpr::Rbx, 0x8000_0000);
    let before = c.clone();
    assert_eq!(run(&mut c, &mut b, &[0x87, 0x0b]), Outcome::NotHere);
    assert_eq!(c, before);
}

#[test]
fn operands_across_two_pages_are_split() {
    let (mut c, mut b) = (long(), bus());
    c.set_gpr(Gpr::Rbx, 0x1ffe);
    c.set_gpr(Gpr::Rax, 0x0403_0201);
    done(&mut c, &mut b, &[0x89, 0x03]);
    assert_eq!(b.mem[0x1ffe..0x2002], [1, 2, 3, 4]);
    done(&mut c, &mut b, &[0x48, 0x8b, 0x0b]);
    assert_eq!(c.gpr(Gpr::Rcx), 0x0403_0201);
    b.xmm[3] = 0x0f0e_0d0c_0b0a_0908_0706_0504_0302_0100;
    c.set_gpr(Gpr::Rbx, 0x1ff9);
    done(&mut c, &mut b, &[0x0f, 0x11, 0x1b]); // movups [rbx], xmm3
    assert_eq!(b.mem[0x1ff9..0x2009], *(0..16).collect::<Vec<u8>>());
    done(&mut c, &mut b, &[0x0f, 0x10, 0x23]); // movups xmm4, [rbx]
    assert_eq!(b.xmm[4], b.xmm[3]);
    let f = run(&mut c, &mut b, &[0x0f, 0x29, 0x1b]); // movaps
    assert_eq!(f, Outcome::Fault(Event::GP0));
}

#[test]
fn the_hint_spares_the_walk() {
    let (mut c, mut b) = (long(), bus());
    c.set_gpr(Gpr::Rbx, 0x9123);
    let i = decode(&[0x8a, 0x03], CodeMode::Bits64).unwrap();
    let hint = Hint {
        gla: 0x9123,
        gpa: DEVICE | 0x123,
    };
    assert_eq!(emulate(&i, &mut c, &mut b, Some(hint)), Outcome::Done);
    assert_eq!(b.log, [('r', 0x123, 1, 0)]);
}

#[test]
fn segments_are_checked() {
    let gp = Outcome::Fault(Event::GP0);
    let ss = Outcome::Fault(Event::exception_with(12, 0));
    let mut b = bus();
    let mut c = TestCpu::new(CodeMode::Bits64);
    c.set_gpr(Gpr::Rbx, 0x7fff_ffff_ffff);
    assert_eq!(run(&mut c, &mut b, &[0x8b, 0x03]), gp);
    c.set_gpr(Gpr::Rbp, 0x8000_0000_0000);
    assert_eq!(run(&mut c, &mut b, &[0x8b, 0x45, 0x00]), ss);
    c.segs[Seg::Gs as usize].base = 0x1000;
    b.mem[0x1234] = 0x99;
    c.set_gpr(Gpr::Rbx, 0x234);
    done(&mut c, &mut b, &[0x65, 0x8a, 0x03]);
    assert_eq!(c.gpr(Gpr::Rax), 0x99);

    let mut c = TestCpu::new(CodeMode::Bits32);
    c.segs[Seg::Ds as usize] = SegDesc {
        base: 0x1000,
        limit: 0x233,
        access: 0xc091,
    };
    c.set_gpr(Gpr::Rbx, 0x230);
    done(&mut c, &mut b, &[0x8b, 0x03]);
    assert_eq!(run(&mut c, &mut b, &[0x8b, 0x43, 0x01]), gp, "limit");
    assert_eq!(run(&mut c, &mut b, &[0x88, 0x03]), gp, "read-only");
    c.segs[Seg::Ds as usize].access |= 1 << 16;
    assert_eq!(run(&mut c, &mut b, &[0x8b, 0x03]), gp, "unusable");
    c.segs[Seg::Es as usize] = SegDesc {
        base: 0,
        limit: 0xfff,
        access: 0xc097,
    };
    assert_eq!(
        run(&mut c, &mut b, &[0x26, 0x8b, 0x03]),
        gp,
        "below an expand-down limit"
    );
    c.set_gpr(Gpr::Rbx, 0x1000);
    done(&mut c, &mut b, &[0x26, 0x8b, 0x03]);

    // Real mode: no error code.
    let mut c = TestCpu::new(CodeMode::Bits16);
    c.cr0 = 0x10;
    c.set_gpr(Gpr::Rbx, 0xffff);
    assert_eq!(
        run(&mut c, &mut b, &[0x8b, 0x07]),
        Outcome::Fault(Event::exception(13))
    );
    // Offsets wrap at 16 bits.
    c.set_gpr(Gpr::Rsi, 0x11);
    b.mem[0x10] = 0x5a;
    done(&mut c, &mut b, &[0x8a, 0x00]);
    assert_eq!(c.gpr(Gpr::Rax) & 0xff, 0x5a);
}

#[test]
fn alignment_check_of_user_code() {
    let (mut c, mut b) = (long(), bus());
    c.set_gpr(Gpr::Rbx, 0x1001);
    c.rflags |= 1 << 18;
    c.cr0 |= 1 << 18;
    done(&mut c, &mut b, &[0x8b, 0x03]);
    c.segs[Seg::Ss as usize].access |= 3 << 5;
    let f = run(&mut c, &mut b, &[0x8b, 0x03]);
    assert_eq!(f, Outcome::Fault(Event::exception_with(17, 0)));
    done(&mut c, &mut b, &[0x8a, 0x03]);
}

#[test]
fn relative_to_the_next_instruction() {
    let (mut c, mut b) = (long(), bus());
    b.mem[0x1017] = 0x3c;
    done(&mut c, &mut b, &[0x0f, 0xb6, 0x05, 0x10, 0, 0, 0]);
    assert_eq!(c.gpr(Gpr::Rax), 0x3c);
}

#[test]
fn what_is_only_decoded_is_unsupported() {
    let (mut c, mut b) = (long(), bus());
    for bytes in [
        &[0x0f, 0xa2][..],
        &[0xec],
        &[0xf3, 0x6c],
        &[0xc5, 0xfc, 0x11, 0x03],
    ] {
        assert_eq!(run(&mut c, &mut b, bytes), Outcome::Unsupported);
    }
}

#[test]
fn what_kvm_unit_tests_do_to_emulated_memory() {
    let (mut c, mut b) = (long(), bus());
    b.answer = 0;
    done(&mut c, &mut b, &[0x0f, 0x01, 0x23]); // smsw [rbx]
    assert_eq!(b.log.last(), Some(&('w', 0, 2, 0x11)));
    c.set_gpr(Gpr::Rax, 7);
    done(&mut c, &mut b, &[0x0f, 0xbc, 0x03]); // bsf eax, [rbx]: zero leaves eax
    assert_eq!((c.gpr(Gpr::Rax), c.rflags & 0x40), (7, 0x40));
    b.answer = 0xc000_0002;
    done(&mut c, &mut b, &[0x0f, 0xbc, 0x03]);
    assert_eq!((c.gpr(Gpr::Rax), c.rflags & 0x40), (1, 0));
    done(&mut c, &mut b, &[0x0f, 0xbd, 0x03]); // bsr
    assert_eq!(c.gpr(Gpr::Rax), 31);
    b.answer = 0x40;
    done(&mut c, &mut b, &[0x6b, 0x03, 51]); // imul eax, [rbx], 51
    assert_eq!((c.gpr(Gpr::Rax), c.rflags & 1), (0xcc0, 0));
    c.set_gpr(Gpr::Rcx, 4);
    done(&mut c, &mut b, &[0xd3, 0x23]); // shl dword [rbx], cl
    assert_eq!(b.log.last(), Some(&('w', 0, 4, 0x400)));
    done(&mut c, &mut b, &[0xd1, 0x2b]); // shr dword [rbx], 1
    assert_eq!(b.log.last(), Some(&('w', 0, 4, 0x20)));
    b.answer = 0;
    assert_eq!(
        run(&mut c, &mut b, &[0xf7, 0x33]),
        Outcome::Fault(Event::exception(0))
    );
    c.set_gpr(Gpr::Rax, !0);
    c.rflags |= 0x40;
    done(&mut c, &mut b, &[0x0f, 0x45, 0x03]); // cmovne eax, [rbx]: not taken
    assert_eq!(c.gpr(Gpr::Rax), 0xffff_ffff);
    done(&mut c, &mut b, &[0x0f, 0x94, 0x03]); // sete
    assert_eq!(b.log.last(), Some(&('w', 0, 1, 1)));
    b.answer = 0x33;
    c.set_gpr(Gpr::Rax, 0x1111_1111_1111_1111);
    done(&mut c, &mut b, &[0xf6, 0x23]); // mul byte
    assert_eq!(c.gpr(Gpr::Rax), 0x1111_1111_1111_0363);
}

#[test]
fn the_operand_is_what_emulation_reaches_and_nothing_else() {
    let known: [&[u8]; 15] = [
        &[0x8b, 0x43, 0x20],                      // mov eax, [rbx+20h]
        &[0x89, 0x43, 0x20],                      // mov [rbx+20h], eax
        &[0x88, 0x23],                            // mov [rbx], ah
        &[0xc7, 0x03, 1, 0, 0, 0],                // mov dword [rbx], 1
        &[0x0f, 0xb6, 0x04, 0xcb],                // movzx eax, byte [rbx+rcx*8]
        &[0x48, 0x0f, 0xbe, 0x03],                // movsx rax, byte [rbx]
        &[0x0f, 0xc3, 0x03],                      // movnti [rbx], eax
        &[0x39, 0x03],                            // cmp [rbx], eax
        &[0x85, 0x03],                            // test [rbx], eax
        &[0x23, 0x03],                            // and eax, [rbx]
        &[0x09, 0x03],                            // or [rbx], eax
        &[0x83, 0x23, 0x0f],                      // and dword [rbx], 15
        &[0x87, 0x03],                            // xchg [rbx], eax
        &[0x65, 0x8b, 0x03],                      // mov eax, gs:[rbx]
        &[0xa1, 0x10, 0, 0xe0, 0xfe, 0, 0, 0, 0], // mov eax, [fee00010h]
    ];
    for bytes in known {
        let (mut c, mut b) = (long(), bus());
        c.set_gpr(Gpr::Rcx, 3);
        c.set_seg(
            Seg::Gs,
            SegDesc {
                base: 0x40,
                ..SegDesc::default()
            },
        );
        let inst = decode(bytes, CodeMode::Bits64).unwrap();
        let operand = operand(&inst, &c).unwrap();
        assert_eq!(emulate(&inst, &mut c, &mut b, None), Outcome::Done);
        assert_eq!(b.asked, [operand], "{bytes:02x?}");
    }
    // Two places, or none.
    let others: [&[u8]; 4] = [&[0xa4], &[0xff, 0x33], &[0x0f, 0xa2], &[0x89, 0xc3]];
    for bytes in others {
        let inst = decode(bytes, CodeMode::Bits64).unwrap();
        assert_eq!(operand(&inst, &long()), None, "{bytes:02x?}");
    }
}

#[test]
fn the_operand_of_32_bit_code_has_its_segments_base_and_32_bits() {
    let mut c = TestCpu::new(CodeMode::Bits32);
    c.set_gpr(Gpr::Rbx, 0xffff_fff0);
    c.set_seg(
        Seg::Ds,
        SegDesc {
            base: 0x1000,
            ..SegDesc::default()
        },
    );
    let inst = decode(&[0x8b, 0x43, 0x20], CodeMode::Bits32).unwrap();
    assert_eq!(operand(&inst, &c), Some((0x1010, Access::READ)));
}
