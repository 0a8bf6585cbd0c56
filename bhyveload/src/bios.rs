//! What a BIOS leaves behind for a kernel that a multiboot loader starts:
//! interrupt controllers and timer set up for real mode, and an interrupt
//! vector table whose handlers do nothing (IBM PC AT Technical Reference, BIOS
//! listing; multiboot kernels may go back to real mode).

/// Vectors, handlers and set-up code lie below this address.
pub const END: u64 = 0x600;

/// IRET alone.
const IGNORE: u16 = 0x500;
/// As that, and the end of interrupt to the master 8259.
const MASTER: u16 = 0x508;
/// As that, and the end of interrupt to both.
const SLAVE: u16 = 0x510;
/// 32-bit code to run before the kernel.
pub const SETUP: u32 = 0x520;

/// PUSH AX; MOV AL, 20h; OUT 20h, AL; POP AX; IRET
const MASTER_CODE: [u8; 7] = [0x50, 0xb0, 0x20, 0xe6, 0x20, 0x58, 0xcf];
/// PUSH AX; MOV AL, 20h; OUT A0h, AL; OUT 20h, AL; POP AX; IRET
const SLAVE_CODE: [u8; 9] = [0x50, 0xb0, 0x20, 0xe6, 0xa0, 0xe6, 0x20, 0x58, 0xcf];

/// 8259s: vectors 8 and 70h up; timer, keyboard cascade and floppy, mouse, FPU
/// and disk enabled. 8254: counter 0 at its slowest.
const PORTS: [(u8, u8); 13] = [
    (0x20, 0x11),
    (0xa0, 0x11),
    (0x21, 0x08),
    (0xa1, 0x70),
    (0x21, 0x04),
    (0xa1, 0x02),
    (0x21, 0x01),
    (0xa1, 0x01),
    (0x21, 0xb8),
    (0xa1, 0x8f),
    (0x43, 0x34),
    (0x40, 0x00),
    (0x40, 0x00),
];

/// Virtual wire mode (MultiProcessor Specification 1.4 §3.6.2.2): APIC enabled,
/// LINT0 = ExtINT, LINT1 = NMI.
const APIC: [(u32, u32); 3] = [
    (0xfee0_00f0, 0x10f),
    (0xfee0_0350, 0x700),
    (0xfee0_0360, 0x400),
];

/// Bytes from address 0 on; [`SETUP`] ends at `entry` with `eax` in EAX and no
/// other register changed.
#[must_use]
pub fn image(entry: u32, eax: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(END as usize);
    for vector in 0..256 {
        let handler = match vector {
            0x08..0x10 => MASTER,
            0x70..0x78 => SLAVE,
            _ => IGNORE,
        };
        bytes.extend_from_slice(&handler.to_le_bytes());
        bytes.extend_from_slice(&[0, 0]);
    }
    let mut at = |address: usize, code: &[u8]| {
        bytes.resize(address, 0);
        bytes.extend_from_slice(code);
    };
    at(IGNORE.into(), &[0xcf]);
    at(MASTER.into(), &MASTER_CODE);
    at(SLAVE.into(), &SLAVE_CODE);
    at(SETUP as usize, &setup(entry, eax));
    bytes
}

fn setup(entry: u32, eax: u32) -> Vec<u8> {
    let mut code = Vec::new();
    for (port, value) in PORTS {
        // MOV AL, value; OUT port, AL
        code.extend_from_slice(&[0xb0, value, 0xe6, port]);
    }
    for (address, value) in APIC {
        // MOV DWORD [address], value
        code.extend_from_slice(&[0xc7, 0x05]);
        code.extend_from_slice(&address.to_le_bytes());
        code.extend_from_slice(&value.to_le_bytes());
    }
    // MOV EAX, eax
    code.push(0xb8);
    code.extend_from_slice(&eax.to_le_bytes());
    // JMP entry
    code.push(0xe9);
    let next = SETUP + code.len() as u32 + 4;
    code.extend_from_slice(&entry.wrapping_sub(next).to_le_bytes());
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_lead_to_handlers_and_the_setup_to_the_kernel() {
        let image = image(0x40_00bc, 0x2bad_b002);
        assert!(image.len() as u64 <= END);
        let handler = |vector: usize| {
            let at = usize::from(u16::from_le_bytes([
                image[4 * vector],
                image[4 * vector + 1],
            ]));
            assert_eq!(image[4 * vector + 2..4 * vector + 4], [0, 0], "segment");
            &image[at..]
        };
        assert_eq!(handler(0x1c)[0], 0xcf);
        assert!(handler(8).starts_with(&MASTER_CODE));
        assert!(handler(0xf).starts_with(&MASTER_CODE));
        assert!(handler(0x77).starts_with(&SLAVE_CODE));
        let jump = image.len() - 5;
        assert_eq!(image[jump], 0xe9);
        let rel = u32::from_le_bytes(image[jump + 1..].try_into().unwrap());
        assert_eq!((image.len() as u32).wrapping_add(rel), 0x40_00bc);
        assert_eq!(image[jump - 5..jump], [0xb8, 0x02, 0xb0, 0xad, 0x2b]);
    }
}
