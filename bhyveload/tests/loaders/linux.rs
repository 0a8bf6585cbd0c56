use crate::build::{MIB, bzimage, input};
use bhyveload::layout::{le32, le64};
use bhyveload::linux::{Linux, load};
use bhyveload::target::{MemoryTarget, Register};

fn guest() -> Linux {
    Linux {
        kernel: input("bzImage", bzimage()),
        initrd: Some(input("initrd", vec![0xcd; 5000])),
        command_line: "console=ttyS0 quiet".to_owned(),
    }
}

#[test]
fn the_zero_page_says_where_everything_is() {
    let mut target = MemoryTarget::new(64 * MIB);
    target.high = 1 << 30;
    let loaded = load(&mut target, &guest()).unwrap();
    let zero = target.registers[&Register::Rsi] as usize;
    let page = &target.memory[zero..zero + 4096];

    assert_eq!(&page[0x202..0x206], b"HdrS");
    assert_eq!(page[0x210], 0xff);
    let line = le32(page, 0x228).unwrap() as usize;
    assert_eq!(&target.memory[line..line + 20], b"console=ttyS0 quiet\0");

    let at = le32(page, 0x218).unwrap() as usize;
    assert_eq!(loaded.initrd, Some(at as u64));
    assert_eq!(le32(page, 0x21c), Some(5000));
    assert_eq!(at % 4096, 0);
    assert_eq!(target.memory[at..at + 5000], [0xcd; 5000]);

    let map: Vec<_> = page[0x2d0..]
        .chunks_exact(20)
        .take(usize::from(page[0x1e8]))
        .map(|e| {
            (
                le64(e, 0).unwrap(),
                le64(e, 8).unwrap(),
                le32(e, 16).unwrap(),
            )
        })
        .collect();
    assert!(map.contains(&(0, 0xa_0000, 1)));
    assert!(map.contains(&(0x10_0000, 63 * MIB as u64, 1)));
    assert!(map.contains(&(4 << 30, 1 << 30, 1)));
    // Nothing else of the setup code gets into the zero page.
    assert!(page[..0x1e8].iter().all(|&b| b == 0));
}

#[test]
fn the_cpu_enters_at_the_64_bit_entry_with_flat_boot_segments() {
    let mut target = MemoryTarget::new(64 * MIB);
    load(&mut target, &guest()).unwrap();
    let reg = |r| target.registers[&r];
    assert_eq!(reg(Register::Rip), 0x20_0200);
    let code: Vec<u8> = (0..3000).map(|i| i as u8).collect();
    assert_eq!(target.memory[0x20_0000..0x20_0000 + 3000], code);
    assert_eq!((reg(Register::Cs), reg(Register::Ds)), (0x10, 0x18));
    assert_eq!(reg(Register::Efer), 0x500);
    assert_eq!(reg(Register::Rflags) & 0x200, 0);
    let entry = |table: u64, i: u64| le64(&target.memory, (table + 8 * i) as usize).unwrap();
    let pdpt = entry(reg(Register::Cr3), 0) & !0xfff;
    for gpa in [0u64, 0x20_0200, 0x3fff_ffff, 0xffff_ffff] {
        let pd = entry(pdpt, gpa >> 30) & !0xfff;
        let pde = entry(pd, gpa >> 21 & 511);
        assert_eq!(pde, (gpa & !0x1f_ffff) | 0x83, "{gpa:#x}");
    }
    assert_eq!(entry(pdpt, 4), 0);
    let gdtr = target.descriptors[&Register::Gdtr];
    assert!(u64::from(gdtr.limit) >= 0x1f);
    assert_eq!(entry(gdtr.base, 2), 0x00af_9b00_0000_ffff);
}

#[test]
fn an_initramfs_stays_below_the_limit_that_the_kernel_names() {
    let mut target = MemoryTarget::new(64 * MIB);
    let mut linux = guest();
    linux.kernel.data[0x22c..0x230].copy_from_slice(&0xff_ffffu32.to_le_bytes());
    let at = load(&mut target, &linux).unwrap().initrd.unwrap();
    assert!(at + 5000 <= 16 * MIB as u64 && at >= 0x30_0000);
}
