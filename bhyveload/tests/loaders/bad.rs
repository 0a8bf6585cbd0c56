//! Files that are wrong in one place each: the error names the file and the field.

use crate::build::{MIB, bzimage, guest, input, kernel, kludge, module, multiboot_elf32};
use bhyveload::error::LoadError;
use bhyveload::target::MemoryTarget;
use bhyveload::{freebsd, linux, multiboot};

fn patched(mut file: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    file[at..at + bytes.len()].copy_from_slice(bytes);
    file
}

fn shoff(file: &[u8]) -> usize {
    u64::from_le_bytes(file[40..48].try_into().unwrap()) as usize
}

fn as_kernel(file: Vec<u8>) -> LoadError {
    let mut boot = guest();
    boot.kernel.data = file;
    freebsd::load(&mut MemoryTarget::new(16 * MIB), &boot).unwrap_err()
}

fn as_module(file: Vec<u8>) -> LoadError {
    let mut boot = guest();
    boot.modules[0].input.data = file;
    freebsd::load(&mut MemoryTarget::new(16 * MIB), &boot).unwrap_err()
}

fn as_linux(file: Vec<u8>) -> LoadError {
    let boot = linux::Linux {
        kernel: input("bzImage", file),
        initrd: None,
        command_line: String::new(),
    };
    linux::load(&mut MemoryTarget::new(16 * MIB), &boot).unwrap_err()
}

fn as_multiboot(file: Vec<u8>) -> LoadError {
    let boot = multiboot::Multiboot {
        kernel: input("test.flat", file),
        modules: Vec::new(),
        command_line: String::new(),
    };
    multiboot::load(&mut MemoryTarget::new(16 * MIB), &boot).unwrap_err()
}

#[track_caller]
fn names(error: &LoadError, file: &str, field: &str) {
    assert_eq!(error.file, file, "{error}");
    assert!(error.field.contains(field), "{error}: wanted {field}");
}

const MAX: [u8; 8] = [0xff; 8];

#[test]
fn bad_kernels() {
    let k = kernel;
    let cases = [
        ("e_ident", b"#!/bin/sh\n".to_vec()),
        ("ELF header", k()[..40].to_vec()),
        ("e_phoff", k()[..80].to_vec()),
        ("e_shoff", k()[..k().len() - 1].to_vec()),
        ("e_ident[EI_DATA]", patched(k(), 5, &[2])),
        ("e_ident", patched(k(), 4, &[7])),
        ("e_machine", patched(k(), 18, &[183, 0])),
        ("e_version", patched(k(), 20, &[2])),
        ("e_type", patched(k(), 16, &[3])),
        ("e_entry", patched(k(), 24, &0x40_1000u64.to_le_bytes())),
        (
            "e_entry",
            patched(k(), 24, &0xffff_ffff_8030_0000u64.to_le_bytes()),
        ),
        ("e_phoff", patched(k(), 32, &MAX)),
        ("e_phentsize", patched(k(), 54, &[55])),
        ("program headers", patched(k(), 56, &[0])),
        ("e_phoff", patched(k(), 56, &[0xff, 0xff])),
        ("p_offset", patched(k(), 64 + 8, &MAX)),
        ("p_vaddr", patched(k(), 64 + 16, &[0; 8])),
        ("p_vaddr", patched(k(), 64 + 16, &MAX)),
        (
            "p_vaddr",
            patched(k(), 64 + 16, &0xffff_ffff_8000_1000u64.to_le_bytes()),
        ),
        (
            "p_vaddr",
            patched(k(), 64 + 16, &0xffff_ffff_8009_f800u64.to_le_bytes()),
        ),
        ("p_filesz", patched(k(), 64 + 32, &0x2000u64.to_le_bytes())),
        ("p_memsz", patched(k(), 64 + 40, &MAX)),
        (
            "p_memsz",
            patched(k(), 64 + 40, &(16u64 << 20).to_le_bytes()),
        ),
        ("e_shentsize", patched(k(), 58, &[63])),
        // The symbol table's size, and where its strings are.
        ("sh_size", patched(k(), shoff(&k()) + 2 * 64 + 32, &MAX)),
        ("sh_link", patched(k(), shoff(&k()) + 2 * 64 + 40, &[9])),
    ];
    for (i, (field, file)) in cases.into_iter().enumerate() {
        let error = as_kernel(file);
        assert_eq!(error.file, "kernel", "case {i}: {error}");
        assert!(
            error.field.contains(field),
            "case {i}: {error}: wanted {field}"
        );
    }
}

#[test]
fn a_foreign_kernel_gets_the_right_advice() {
    let i386 = as_kernel(multiboot_elf32());
    names(&i386, "kernel", "e_machine");
    assert!(i386.problem.contains("i386"), "{i386}");
    assert!(i386.to_string().contains("--multiboot"), "{i386}");
    assert!(as_kernel(bzimage()).to_string().contains("--linux"));
    assert!(as_kernel(module()).to_string().contains("--module"));
    assert!(as_linux(kernel()).to_string().contains("--kernel"));
}

#[test]
fn bad_modules() {
    let m = module;
    let section = |i: usize| shoff(&m()) + i * 64;
    for (field, file) in [
        ("e_ident", b"hello".to_vec()),
        ("e_type", kernel()),
        ("e_shnum", patched(m(), 60, &[0])),
        ("e_shstrndx", patched(m(), 62, &[1])),
        ("e_shstrndx", patched(m(), 62, &[0])),
        ("section headers", patched(m(), section(4) + 4, &[1])),
        ("sh_link", patched(m(), section(4) + 40, &MAX[..4])),
        ("sh_info", patched(m(), section(5) + 44, &MAX[..4])),
        ("sh_addralign", patched(m(), section(1) + 48, &[3])),
        ("sh_addralign", patched(m(), section(1) + 48, &MAX)),
        ("sh_size", patched(m(), section(3) + 32, &MAX)),
        (
            "sh_size",
            patched(m(), section(3) + 32, &(15u64 << 20).to_le_bytes()),
        ),
        ("sh_offset", patched(m(), section(1) + 24, &MAX)),
        ("e_shoff", m()[..m().len() - 64].to_vec()),
    ] {
        names(&as_module(file), "foo.ko", field);
    }
}

#[test]
fn bad_surroundings() {
    let mut boot = guest();
    boot.modules[1].input.data = vec![0; 14 * MIB];
    let error = freebsd::load(&mut MemoryTarget::new(16 * MIB), &boot).unwrap_err();
    names(&error, "root.img", "size");
    assert!(error.to_string().contains("-m"), "{error}");

    let mut boot = guest();
    boot.modules[0].kind = Some("elf kernel".to_owned());
    let error = freebsd::load(&mut MemoryTarget::new(16 * MIB), &boot).unwrap_err();
    names(&error, "foo.ko", "type");

    let mut boot = guest();
    boot.environment.set("long", "x".repeat(1000));
    let error = freebsd::load(&mut MemoryTarget::new(16 * MIB), &boot).unwrap_err();
    names(&error, "environment", "long");
}

#[test]
fn bad_bzimages() {
    let b = bzimage;
    for (field, file) in [
        ("header", b"MZ".to_vec()),
        ("version", patched(b(), 0x206, &[0x0b, 2])),
        ("loadflags", patched(b(), 0x211, &[0])),
        ("xloadflags", patched(b(), 0x236, &[0, 0])),
        ("setup_sects", patched(b(), 0x1f1, &[0xff])),
        ("jump", patched(b(), 0x201, &[0xff])),
        ("init_size", b()[..0x262].to_vec()),
        ("init_size", patched(b(), 0x260, &MAX[..4])),
        ("init_size", patched(b(), 0x258, &MAX)),
        ("pref_address", patched(b(), 0x258, &[0; 8])),
        ("kernel_alignment", patched(b(), 0x230, &[3])),
        ("protected-mode code", b()[..5 * 512 + 0x200].to_vec()),
    ] {
        names(&as_linux(file), "bzImage", field);
    }
}

#[test]
fn what_goes_with_a_bzimage_must_fit() {
    let mut boot = linux::Linux {
        kernel: input("bzImage", bzimage()),
        initrd: Some(input("initrd", vec![0; 14 * MIB])),
        command_line: String::new(),
    };
    let error = linux::load(&mut MemoryTarget::new(16 * MIB), &boot).unwrap_err();
    names(&error, "initrd", "size");
    boot.initrd = None;
    boot.command_line = "x".repeat(256);
    let error = linux::load(&mut MemoryTarget::new(16 * MIB), &boot).unwrap_err();
    names(&error, "bzImage", "cmdline_size");
    boot.command_line = "x".repeat(255);
    linux::load(&mut MemoryTarget::new(16 * MIB), &boot).unwrap();
}

#[test]
fn bad_multiboot_files() {
    let address = |i: usize, v: u32| patched(kludge(), 28 + 4 * i, &v.to_le_bytes());
    let flags = |flags: u32| {
        let sum = 0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags);
        let file = patched(kludge(), 20, &flags.to_le_bytes());
        patched(file, 24, &sum.to_le_bytes())
    };
    for (field, file) in [
        ("multiboot header", kernel()),
        ("multiboot header", patched(kludge(), 24, &[0])),
        ("multiboot header", kludge()[..40].to_vec()),
        ("flags", flags(1 << 16 | 4)),
        ("flags", flags(1 << 16 | 8)),
        ("e_ident", flags(0)),
        ("header_addr", address(0, 0x10_0020)),
        ("load_addr", address(1, 0x20_0000)),
        ("load_end_addr", address(2, 0x10_0041)),
        ("load_end_addr", address(2, 1)),
        ("bss_end_addr", address(3, 0x10_0001)),
        ("bss_end_addr", address(3, 0xffff_ffff)),
        ("entry", address(4, 0x10_2000)),
        ("e_machine", patched(multiboot_elf32(), 18, &[62])),
        ("e_phoff", patched(multiboot_elf32(), 28, &MAX[..4])),
        ("p_paddr", patched(multiboot_elf32(), 52 + 12, &MAX[..4])),
        ("p_offset", patched(multiboot_elf32(), 52 + 4, &[111])),
        ("entry", patched(multiboot_elf32(), 24, &[0; 4])),
    ] {
        names(&as_multiboot(file), "test.flat", field);
    }
}
