use crate::build::{MIB, input, kludge, multiboot_elf32};
use bhyveload::bios;
use bhyveload::layout::{le32, le64};
use bhyveload::multiboot::{Multiboot, load};
use bhyveload::target::{MemoryTarget, Register};

fn guest(data: Vec<u8>) -> Multiboot {
    Multiboot {
        kernel: input("test.flat", data),
        modules: vec![(input("env", b"NR_CPUS=2\n".to_vec()), "env x".to_owned())],
        command_line: "a b".to_owned(),
    }
}

fn text(memory: &[u8], at: u32) -> &[u8] {
    let bytes = &memory[at as usize..];
    &bytes[..bytes.iter().position(|&b| b == 0).unwrap()]
}

/// Where the kernel is entered once what a BIOS would have done is done.
fn enters(target: &MemoryTarget) -> u32 {
    assert_eq!(target.registers[&Register::Rip], u64::from(bios::SETUP));
    let code = &target.memory[bios::SETUP as usize..bios::END as usize];
    let eax = [0xb8, 0x02, 0xb0, 0xad, 0x2b, 0xe9];
    let jump = code.windows(6).position(|w| w == eax).unwrap() + 6;
    let rel = le32(code, jump).unwrap();
    (bios::SETUP + jump as u32 + 4).wrapping_add(rel)
}

#[test]
fn an_elf32_kernel_lies_at_its_physical_address() {
    let mut target = MemoryTarget::new(16 * MIB);
    load(&mut target, &guest(multiboot_elf32())).unwrap();
    assert_eq!(enters(&target), 0x40_0004);
    assert_eq!(target.memory[0x40_0000..0x40_0010], [0xcc; 16]);
    assert!(target.memory[0x40_0010..0x40_2000].iter().all(|&b| b == 0));
    assert_eq!(target.memory[0x40_2000..0x40_200a], *b"NR_CPUS=2\n");
}

#[test]
fn the_aout_kludge_goes_by_the_addresses_in_the_header() {
    let mut target = MemoryTarget::new(16 * MIB);
    load(&mut target, &guest(kludge())).unwrap();
    assert_eq!(enters(&target), 0x10_0030);
    assert_eq!(target.memory[0x10_0000..0x10_0040], kludge());
    assert!(target.memory[0x10_0040..0x10_2000].iter().all(|&b| b == 0));
}

#[test]
fn the_boot_information_is_what_the_specification_says() {
    let mut target = MemoryTarget::new(16 * MIB);
    load(&mut target, &guest(multiboot_elf32())).unwrap();
    let mbi = target.registers[&Register::Rbx] as usize;
    let field = |offset: usize| le32(&target.memory, mbi + offset).unwrap();
    assert_eq!(field(0) & (1 | 4 | 8 | 0x40), 0x4d);
    assert_eq!((field(4), field(8)), (640, 15 * 1024));
    assert_eq!(text(&target.memory, field(16)), b"test.flat a b");
    assert_eq!(field(20), 1);
    let module = field(24) as usize;
    let module = |offset: usize| le32(&target.memory, module + offset).unwrap();
    assert_eq!((module(0), module(4)), (0x40_2000, 0x40_200a));
    assert_eq!(text(&target.memory, module(8)), b"env x");
    let mut at = field(48) as usize;
    let mut map = Vec::new();
    while at < (field(48) + field(44)) as usize {
        map.push((
            le64(&target.memory, at + 4).unwrap(),
            le64(&target.memory, at + 12).unwrap(),
        ));
        at += 4 + le32(&target.memory, at).unwrap() as usize;
    }
    assert_eq!(map, [(0, 0xa_0000), (0x10_0000, 15 * MIB as u64)]);
}

#[test]
fn the_cpu_enters_in_flat_protected_mode_without_paging() {
    let mut target = MemoryTarget::new(16 * MIB);
    load(&mut target, &guest(multiboot_elf32())).unwrap();
    let reg = |r| target.registers[&r];
    assert!(target.unrestricted);
    assert_eq!(reg(Register::Rax), 0x2bad_b002);
    assert_eq!(reg(Register::Cr0) & 0x8000_0001, 1);
    assert_eq!((reg(Register::Efer), reg(Register::Rflags)), (0, 2));
    for (segment, access) in [
        (Register::Cs, 0xc09b),
        (Register::Ds, 0xc093),
        (Register::Ss, 0xc093),
    ] {
        let d = target.descriptors[&segment];
        assert_eq!((d.base, d.limit, d.access), (0, u32::MAX, access));
    }
}

#[test]
fn a_kernel_in_low_memory_keeps_it() {
    let mut file = kludge();
    for (i, v) in [0x9010u32, 0x9000, 0x9040, 0xb000, 0x9030]
        .into_iter()
        .enumerate()
    {
        file[28 + 4 * i..32 + 4 * i].copy_from_slice(&v.to_le_bytes());
    }
    let mut target = MemoryTarget::new(16 * MIB);
    load(&mut target, &guest(file.clone())).unwrap();
    assert_eq!(target.memory[0x9000..0x9040], file);
    assert!(target.registers[&Register::Rbx] >= MIB as u64);
}
